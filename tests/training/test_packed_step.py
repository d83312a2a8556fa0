"""Arrays packed in buffers, as on GPUs: nothing but the step's program may notice."""

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from arcface_jax import config as configs
from arcface_jax.config import Config, ModelConfig
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.errors import UserError
from arcface_jax.machine import plan
from arcface_jax.models import layers
from arcface_jax.models.registry import Arrays
from arcface_jax.runtime import devices as meshes
from arcface_jax.train import train
from arcface_jax.training import packing, saved_runs, step

CLASSES, BATCH, DEVICES = 7, 16, 2
CONFIG = configs.replace(
    Config(),
    model__network=f"{__name__}:SmallNetwork",
    model__dtype="float32",
    model__embedding_size=8,
    model__bn_batch_size=BATCH // DEVICES,
    head__dtype="float32",
    head__margin=0.2,
    head__scale=16.0,
    data__global_batch_size=BATCH,
    optimizer__ema=0.9,
    finetune__frozen=("0.*",),
    finetune__rates=(("1.*", 0.1),),
)


class SmallNetwork(nnx.Module):
    """Three convolutions with BatchNorm and PReLU, 112 pixels to 7, which compile quickly."""

    def __init__(self, model: ModelConfig, *, bn_groups: int | str, init: layers.Initializer):
        widths, dtype = (3, 4, 6, 10), jnp.dtype(model.dtype)
        for number, (taken, given) in enumerate(itertools.pairwise(widths)):
            parts = {
                "conv": layers.Conv(
                    taken, given, kernel=3, stride=4 - 2 * bool(number), dtype=dtype, init=init
                ),
                "bn": layers.BatchNorm(given, groups=bn_groups),
                "prelu": layers.PReLU(given),
            }
            setattr(self, str(number), nnx.Dict(parts))
        self.fc = layers.Linear(10 * 7 * 7, model.embedding_size, init=init)
        self.features = layers.BatchNorm(model.embedding_size, groups=bn_groups)

    def __call__(self, x: jax.Array, *, train: bool, keys: jax.Array | None = None) -> jax.Array:
        for number in range(3):
            block = getattr(self, str(number))
            x = block["prelu"](block["bn"](block["conv"](x), train=train))
        return self.features(self.fc(x.reshape(len(x), -1)), train=train)


class WithoutMatrix(nnx.Module):
    """Convolutions and BatchNorm only."""

    def __init__(self, model: ModelConfig, *, bn_groups: int | str, init: layers.Initializer):
        for name, widths in {"one": (3, 4), "two": (4, model.embedding_size)}.items():
            conv = layers.Conv(*widths, kernel=3, stride=4, dtype=jnp.float32, init=init)
            norm = layers.BatchNorm(widths[1], groups=bn_groups)
            setattr(self, name, nnx.Dict({"conv": conv, "bn": norm}))

    def __call__(self, x: jax.Array, *, train: bool, keys: jax.Array | None = None) -> jax.Array:
        for block in (self.one, self.two):
            x = block["bn"](block["conv"](x), train=train)
        return x.mean((1, 2))


@pytest.fixture(autouse=True)
def _small_networks_too(monkeypatch):
    monkeypatch.setattr(packing, "FEW", 0)


@pytest.fixture
def packed(monkeypatch):
    """The form of the step for GPUs, on CPUs."""
    monkeypatch.setattr(meshes, "is_gpu", lambda mesh: True)


def shapes(**given: tuple[int, ...]) -> Arrays:
    return {name.replace("__", "."): np.broadcast_to(np.float32(0), s) for name, s in given.items()}


def test_buffers_hold_kernels_and_vectors_the_last_layers_first():
    big = (3, 3, 512, 512)
    arrays = shapes(
        conv1__kernel=big,
        layer1__9__kernel=big,
        layer1__10__kernel=big,
        layer1__10__scale=(512,),
        layer2__0__kernel=big,
        fc__kernel=(512, 512),
        fc__bias=(512,),
        frozen__bias=(5,),
    )
    arrays["layer3.1-4.kernel"] = np.zeros((4, 3, 3, 8, 8), np.float32)
    arrays["layer3.1-4.scale"] = np.zeros((4, 8), np.float32)
    groups = {name: name == "frozen.bias" for name in arrays}
    layout = packing.plan(arrays, groups, unrolled=False)
    members = [[name for name, _ in buffer.members] for buffer in layout]
    # A buffer of 28 MiB takes three of the large kernels, of 9 MiB.
    assert members == [
        ["fc.kernel"],
        ["layer3.1-4.kernel"],
        ["layer2.0.kernel", "layer1.10.kernel", "layer1.9.kernel"],
        ["conv1.kernel"],
        ["layer3.1-4.scale"],
        ["layer1.10.scale", "fc.bias"],
        ["frozen.bias"],
    ]
    assert all(b.name == b.members[0][0] for b in layout if len(b.members) == 1)


def test_stacks_applied_layer_by_layer_share_buffers():
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        "layer1.1-3.kernel": rng.normal(size=(3, 3, 3, 4, 5)).astype(np.float32),
        "layer1.1-3.scale": rng.normal(size=(3, 5)).astype(np.float32),
        "layer1.0.scale": rng.normal(size=(5,)).astype(np.float32),
        "fc.kernel": rng.normal(size=(5, 6)).astype(np.float32),
    }
    layout = packing.plan(arrays, dict.fromkeys(arrays), unrolled=True)
    assert [[name for name, _ in buffer.members] for buffer in layout] == [
        ["fc.kernel"],
        ["layer1.1-3.kernel"],
        ["layer1.1-3.scale", "layer1.0.scale"],
    ]
    held = packing.pack(layout, arrays)
    assert held.keys() == {"fc.kernel", "packed.1", "packed.2"}
    kernels = np.einsum("lhwio->lohwi", arrays["layer1.1-3.kernel"])
    np.testing.assert_array_equal(held["packed.1"], kernels.ravel())
    back = packing.unpack(layout, held)
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)


def test_parameters_and_statistics_that_are_all_packed_stay_apart(packed):
    """A network without a matrix: no buffer has an array's own name."""
    network = configs.replace(CONFIG, model__network=f"{__name__}:WithoutMatrix")
    network = configs.replace(network, finetune__frozen=(), finetune__rates=())
    layouts = step.make_packing(network, meshes.make(1))
    names = [{buffer.name for buffer in layout} for layout in layouts]
    assert names == [{"packed.0", "packed.1"}, {"packed_statistics.0"}]
    params, batch_stats = step.backbone(network).init(0)
    tree = {"params": params, "batch_stats": batch_stats}
    back = layouts.unpack(layouts.pack(jax.tree.map(jnp.asarray, tree)))
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_a_buffer_has_its_kernels_output_channels_first():
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        "a.kernel": rng.normal(size=(3, 3, 2, 4)).astype(np.float32),
        "b.kernel": rng.normal(size=(1, 1, 4, 5)).astype(np.float32),
        "b.bias": rng.normal(size=(5,)).astype(np.float32),
        "c.kernel": rng.normal(size=(5, 6)).astype(np.float32),
    }
    layout = packing.plan(arrays, dict.fromkeys(arrays), unrolled=False)
    form = packing.Packing(layout, ())
    held = form.pack({"params": arrays, "momentum": {"trace": arrays}, "other": {"x": np.ones(2)}})
    (kernels,) = (b for b in layout if len(b.members) > 1)
    expected = [np.einsum("hwio->ohwi", arrays[name]).ravel() for name in ("b.kernel", "a.kernel")]
    np.testing.assert_array_equal(held["params"][kernels.name], np.concatenate(expected))
    assert held["params"].keys() == {kernels.name, "b.bias", "c.kernel"}
    again = form.pack(held)
    assert all(map(np.array_equal, jax.tree.leaves(held), jax.tree.leaves(again)))
    back = form.unpack(held)
    for got in (back["params"], back["momentum"]["trace"]):
        assert got.keys() == arrays.keys()
        assert all(np.array_equal(got[name], arrays[name]) for name in arrays)


class Made(NamedTuple):
    """A step of CONFIG with changes, and what it is called with."""

    config: Config
    mesh: Mesh
    form: packing.Packing
    run: step.TrainStep
    state: step.TrainState
    batch: dict[str, jax.Array]


def make(**changes) -> Made:
    config, mesh = configs.replace(CONFIG, **changes), meshes.make(DEVICES)
    labels = np.arange(BATCH, dtype=np.int32) % CLASSES
    faces = [draw_face(seed=0, identity=int(y), index=i) for i, y in enumerate(labels)]
    return Made(
        config,
        mesh,
        step.make_packing(config, mesh),
        step.make_train_step(config, num_classes=CLASSES, schedule=schedule, mesh=mesh),
        step.init_state(config, num_classes=CLASSES, mesh=mesh),
        meshes.to_devices({"image": np.stack(faces), "label": labels}, mesh),
    )


def schedule(done: jax.Array) -> jax.Array:
    return jnp.float32(0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__kind": "sgd"},
        pytest.param({"optimizer__kind": "adamw"}, marks=pytest.mark.slow),
        pytest.param(
            {"optimizer__micro_batches": 2, "model__bn_batch_size": 4}, marks=pytest.mark.slow
        ),
    ],
    ids=["sgd", "adamw", "micro-batches"],
)
def test_a_packed_step_gives_what_the_step_by_name_gives(monkeypatch, changes):
    """With frozen layers, layers with a rate of their own, and running means of the weights."""
    results = []
    for packs in (False, True):
        monkeypatch.setattr(meshes, "is_gpu", lambda mesh, packs=packs: packs)
        made = make(**changes)
        assert made.form.packs == packs
        before = jax.tree.map(np.asarray, made.state)
        held, _ = made.run(made.state, made.batch)
        held, metrics = made.run(held, made.batch)
        state = jax.tree.map(np.asarray, made.form.unpack(held))
        results.append((before, state, {name: float(value) for name, value in metrics.items()}))
        assert packs == any(name.startswith("packed.") for name in held.params)
    (before, expected, expected_metrics), (_, state, metrics) = results
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)
    for name in ("params", "batch_stats", "opt_state", "ema", "centers"):
        parts = [jax.tree.leaves(getattr(s, name)) for s in (before, state, expected)]
        for start, a, b in zip(*parts, strict=True):
            # A bias before a BatchNorm moves by rounding errors only.
            limit = 1e-4 * np.linalg.norm(b - start) + 1e-7 * np.sqrt(a.size)
            assert np.linalg.norm(a - b) <= limit, name
    frozen = {k: v for k, v in state.params.items() if k.startswith("0.")}
    assert frozen and all(np.array_equal(v, before.params[k]) for k, v in frozen.items())


def test_gradients_are_summed_buffer_by_buffer(packed):
    """One all-reduce for each trained buffer; XLA may start each when its buffer is complete."""
    made = make()
    abstract = step.abstract_state(made.config, num_classes=CLASSES, mesh=made.mesh)
    text = made.run.lower(abstract, plan.abstract_batch(BATCH, made.mesh)).as_text()
    trained = step.trained(CONFIG.finetune, made.state.params)
    buffers = packing.by_buffer(made.form.params, trained)
    # Beside them: the statistics, and of the head a maximum and a sum.
    count = len(re.findall(r"stablehlo\.all_reduce", text))
    assert len(buffers) < count <= len(buffers) + 4 < len(trained)
    assert len(re.findall(r"stablehlo\.optimization_barrier", text)) >= len(buffers) - 1


@pytest.mark.slow
def test_norms_of_gradients_have_the_names_of_arrays(monkeypatch):
    found = []
    for packs in (False, True):
        monkeypatch.setattr(meshes, "is_gpu", lambda mesh, packs=packs: packs)
        made = make()
        norms = step.make_gradient_norms(
            made.config, num_classes=CLASSES, schedule=schedule, mesh=made.mesh
        )(made.form.pack(made.state), made.batch)
        found.append({name: float(norm) for name, norm in norms.items()})
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert "2.conv.kernel" in found[1] and "0.conv.kernel" not in found[1]


def test_an_optimizer_that_takes_norms_of_arrays_is_not_packed(packed):
    mesh = meshes.make(1)
    for kind, packs in {"sgd": True, "adamw": True, "lars": False, "lamb": False}.items():
        config = configs.replace(CONFIG, optimizer__kind=kind)
        assert step.make_packing(config, mesh).packs == packs


def test_a_backbone_of_few_arrays_is_not_packed(packed, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(meshes, "is_gpu", lambda mesh: True)
    for network, packs in {"vit_t": False, "r_tiny": True, "r50": True}.items():
        config = configs.replace(Config(), model__network=network)
        assert step.make_packing(config, meshes.make(1)).packs == packs, network


def test_the_platform_is_that_of_the_mesh():
    """Of the devices that the program is for: it may be compiled on a machine without them."""
    assert not meshes.is_gpu(meshes.make(1))
    device = SimpleNamespace(platform="gpu")
    assert meshes.is_gpu(SimpleNamespace(devices=np.array([device])))  # pyright: ignore[reportArgumentType]


def run_config(workdir: Path, **changes) -> Config:
    return configs.replace(
        CONFIG,
        workdir=str(workdir),
        devices=DEVICES,
        data__path="synthetic",
        data__synthetic__identities=CLASSES,
        data__synthetic__images_per_identity=5,
        evaluation__targets=(),
        evaluation__batch_size=BATCH,
        logging__every_steps=1,
        logging__tensorboard=False,
        finetune__frozen=(),
        finetune__rates=(),
        **{"schedule__epochs": 2, **changes},
    )


def stored(workdir: Path) -> set[str]:
    """The arrays of the newest checkpoint's items, by the names on disk."""
    folder = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    metadata = [json.loads(p.read_text()) for p in sorted(folder.glob("*/_METADATA"))]
    return {key for tree in metadata for key in tree["tree_metadata"]}


@pytest.mark.slow
def test_a_run_moves_between_packed_and_named_arrays(tmp_path, monkeypatch):
    """Checkpoints are the same, so a run that began on CPUs resumes on GPUs, and the reverse."""
    first = train(run_config(tmp_path / "named"))
    names = stored(tmp_path / "named")
    shutil.copytree(tmp_path / "named", tmp_path / "packed")
    steps = sorted(int(path.name) for path in (tmp_path / "packed/checkpoints").glob("[0-9]*"))
    shutil.rmtree(tmp_path / f"packed/checkpoints/{steps[-1]}")  # as after half of the run
    monkeypatch.setattr(meshes, "is_gpu", lambda mesh: True)
    second = train(run_config(tmp_path / "packed"))
    assert len(steps) > 1 and names and stored(tmp_path / "packed") == names
    assert first.step == second.step == int(second.state.step)
    assert jax.tree.structure(second.state) == jax.tree.structure(first.state)
    for a, b in zip(jax.tree.leaves(second.state), jax.tree.leaves(first.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    weights = saved_runs.restore_backbone(tmp_path / "packed")[1]
    assert all(np.array_equal(weights[k], x) for k, x in second.state.ema["params"].items())


@pytest.mark.slow
def test_a_failing_packed_run_names_its_gradients(tmp_path, packed):
    config = run_config(
        tmp_path / "run",
        optimizer__learning_rate=1e30,
        optimizer__stop_after_skipped=1,
        schedule__epochs=6,
        schedule__warmup_epochs=0,
    )
    with pytest.raises(UserError):
        train(config)
    (report,) = (tmp_path / "run").glob("failure*.json")
    assert "2.conv.kernel" in json.loads(report.read_text())["gradient_norms"]
