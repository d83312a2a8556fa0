"""Stacked networks against the same weights block by block: values, gradients, names, memory."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcface_jax import config as configs
from arcface_jax.config import Config, OptimizerConfig
from arcface_jax.convert import parity, torch_iresnet, weights
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.machine import plan
from arcface_jax.models import iresnet, preprocess, registry, stacks
from arcface_jax.models.registry import Backbone
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import checkpoint, optim, saved_runs, step

# Behind the first blocks: two of stage 2, and of stage 3 three groups of two, and one alone.
SHALLOW = iresnet.Architecture(
    (1, 3, 8, 1),
    (8, 12, 16, 24),
    stem_stride=2,
    strides=(2, 2, 2, 1),
    blocks_are="nested",
    remat=True,
)
# The same in other depths and forms, for what takes longer.
OTHERS = {
    "scanned": replace(SHALLOW, blocks_are="scanned", remat=False),
    "rematerialized": replace(SHALLOW, blocks_are="scanned"),
    "with_tails": replace(SHALLOW, blocks=(2, 6, 9, 3)),
}
CONFIG = configs.replace(
    Config(),
    model__network="r18",
    model__embedding_size=16,
    data__global_batch_size=8,
    model__bn_batch_size=8,
    optimizer__kind="adamw",
)


@pytest.fixture
def shallow(monkeypatch) -> None:
    """The shallow nested network under the name of r18, which a configuration may have."""
    monkeypatch.setitem(iresnet.ARCHITECTURES, "r18", SHALLOW)


def faces(count: int) -> np.ndarray:
    return np.stack([draw_face(seed=5, identity=i, index=0) for i in range(count)])


def relative(ours: dict, theirs: dict) -> float:
    """||a - b|| / ||b|| over all arrays together."""
    assert ours.keys() == theirs.keys()
    a, b = (np.concatenate([np.ravel(x[name]) for name in theirs]) for x in (ours, theirs))
    assert np.isfinite(a).all()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def one_step(backbone: Backbone, params: dict, batch_stats: dict):
    """What a step of SGD on drawn faces changes, block by block, and its embeddings."""
    target = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    optimizer = optim.make_optimizer(OptimizerConfig())

    @jax.jit
    def run(params, batch_stats, images):
        def loss(params):
            x = preprocess.normalize(images)
            embeddings, moved = backbone.apply(params, batch_stats, x, train=True)
            return jnp.mean(embeddings * target), (embeddings, moved)

        gradients, (embeddings, moved) = jax.grad(loss, has_aux=True)(params)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return updates, moved, embeddings

    updates, moved, embeddings = run(params, batch_stats, jnp.asarray(faces(8)))
    return stacks.unstack(updates), stacks.unstack(moved), np.asarray(embeddings)


def assert_equal_to_unrolled() -> None:
    """Measured: embeddings and statistics bit for bit, updates to 2e-7."""
    stacked = registry.build("r18", embedding_size=16)
    unrolled = registry.build("r18", embedding_size=16, stacked=False)
    arrays = stacked.init(0)
    alone = tuple(map(stacks.unstack, arrays))
    assert [set(a) for a in alone] == [set(a) for a in unrolled.shapes]
    updates, moved, embeddings = one_step(stacked, *arrays)
    expected_updates, expected_moved, expected = one_step(unrolled, *alone)
    assert parity.largest_error(embeddings, expected) < 1e-5
    assert relative(moved, expected_moved) < 1e-5
    assert relative(updates, expected_updates) < 1e-5
    for name, before in alone[1].items():  # every block's, not the last one's alone
        assert name == "features.scale" or not np.array_equal(moved[name], before), name


@pytest.mark.slow
def test_a_nested_networks_step_is_that_of_the_unrolled_one(shallow):
    assert_equal_to_unrolled()


@pytest.mark.slow
def test_two_devices_take_the_step_of_one(shallow):
    """With statistics of their own in each half of the batch, on one device too."""
    config = configs.replace(
        CONFIG, model__bn_batch_size=4, model__dtype="float32", head__dtype="float32"
    )
    batch = {"image": faces(8), "label": np.arange(8, dtype=np.int32) % 5}
    schedule = optim.make_schedule(config.schedule, base_rate=0.1, steps_per_epoch=5)
    found = []
    for count in (1, 2):
        devices = meshes.make(count)
        state = step.init_state(config, num_classes=5, mesh=devices)
        run = step.make_train_step(config, num_classes=5, schedule=schedule, mesh=devices)
        state, metrics = run(state, meshes.to_devices(batch, devices))
        mean = [part.mu for part in state.opt_state if hasattr(part, "mu")]
        found.append(({**mean[0], **state.batch_stats}, float(metrics["train/loss"])))
    (one, loss), (two, other_loss) = found
    assert other_loss == pytest.approx(loss, rel=1e-5)
    error = relative(two, one)
    print("two devices", error)
    assert error < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("form", OTHERS)
def test_the_step_is_the_same_in_every_form(form, monkeypatch):
    monkeypatch.setitem(iresnet.ARCHITECTURES, "r18", OTHERS[form])
    assert_equal_to_unrolled()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 29, 127, 895])
def test_every_block_has_one_place_in_order(count, nested):
    numbers = []
    for first, lead in stacks.plan(1, count, nested=nested):
        name = f"layer3.{stacks.name(first, lead)}.conv1.kernel"
        members = stacks.names_of_members(name) or [name]
        assert len(members) == np.prod(lead, dtype=int)
        assert not lead or min(lead) > 1
        numbers += members
    assert numbers == [f"layer3.{number}.conv1.kernel" for number in range(1, count + 1)]


def test_forms_are_converted_bit_for_bit_and_exported_alike(shallow):
    nested, unrolled = registry.build("r18"), registry.build("r18", stacked=False)
    params, batch_stats = nested.init(0)
    assert params["layer3.1-6.conv1.kernel"].shape == (3, 2, 3, 3, 16, 16)
    alone = stacks.restack(params, unrolled.shapes[0])
    for number in range(6):
        block = params["layer3.1-6.conv1.kernel"][number // 2, number % 2]
        np.testing.assert_array_equal(alone[f"layer3.{number + 1}.conv1.kernel"], block)
    again = stacks.restack(alone, nested.shapes[0])
    assert again.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(again[name], array)

    state = weights.to_state_dict(params, batch_stats)
    twin = torch_iresnet.TorchIResNet(SHALLOW)
    twin.load_state_dict(state, strict=True)
    other = weights.to_state_dict(alone, stacks.unstack(batch_stats))
    assert other.keys() == state.keys()
    back = weights.from_state_dict(twin.state_dict(), "r18", source="twin")
    for ours, theirs in zip(back, (params, batch_stats), strict=True):
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array)


@pytest.mark.parametrize("saved_as", ["unrolled", "nested"])
def test_checkpoints_move_between_the_forms(saved_as, monkeypatch, tmp_path):
    unrolled = replace(SHALLOW, blocks_are="unrolled")
    written, read = (unrolled, SHALLOW) if saved_as == "unrolled" else (SHALLOW, unrolled)
    config = configs.replace(CONFIG, workdir=str(tmp_path / "run"))
    monkeypatch.setitem(iresnet.ARCHITECTURES, "r18", written)
    state = step.init_state(config, num_classes=5, mesh=meshes.make(1))
    (mean,) = [part.mu for part in state.opt_state if hasattr(part, "mu")]
    mean.update({name: array + 1 for name, array in state.params.items()})
    manager = checkpoint.open_workdir(config)
    checkpoint.save(manager, state, {"num_classes": 5})
    manager.wait_until_finished()

    monkeypatch.setitem(iresnet.ARCHITECTURES, "r18", read)
    fresh = step.init_state(configs.replace(config, seed=1), num_classes=5, mesh=meshes.make(2))
    restored = checkpoint.restore(manager, fresh, {"num_classes": 5})
    assert restored is not None
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    for ours, like in zip(jax.tree.leaves(restored), jax.tree.leaves(fresh), strict=True):
        assert (ours.shape, ours.sharding) == (like.shape, like.sharding)
    (again,) = [part.mu for part in restored.opt_state if hasattr(part, "mu")]
    _, params, batch_stats, _ = saved_runs.restore_backbone(tmp_path / "run")
    for ours, theirs in (
        (restored.params, state.params),
        (again, mean),
        (params, state.params),
        (restored.batch_stats, state.batch_stats),
        (batch_stats, state.batch_stats),
    ):
        alone, expected = stacks.unstack(ours), stacks.unstack(theirs)
        assert alone.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(alone[name], array)


def gradient_bytes(backbone: Backbone, batch: int) -> int:
    """Temporary memory of the gradient, from shapes alone."""

    def gradient(params, batch_stats, images):
        def loss(params):
            embeddings, moved = backbone.apply(params, batch_stats, images, train=True)
            return jnp.sum(jnp.square(embeddings)), moved

        return jax.grad(loss, has_aux=True)(params)

    images = jax.ShapeDtypeStruct((batch, 112, 112, 3), jnp.float32)
    compiled = jax.jit(gradient).lower(*backbone.shapes, images).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_a_nested_scan_keeps_few_blocks_activations(monkeypatch):
    """Of 400 blocks twenty and twenty inputs are kept, not 400 times all insides."""
    deep = replace(SHALLOW, blocks=(1, 1, 401, 1))
    needed = {}
    for form, remat in (("scanned", False), ("nested", True)):
        monkeypatch.setitem(
            iresnet.ARCHITECTURES, "r18", replace(deep, blocks_are=form, remat=remat)
        )
        needed[form] = gradient_bytes(registry.build("r18", embedding_size=16), 8)
    output = 8 * 14 * 14 * 16 * 4  # of one block
    assert needed["scanned"] > 400 * output
    # Twenty inputs of groups, twenty of blocks, and the stages before, whose outputs are larger.
    assert needed["nested"] < 160 * output


@pytest.mark.slow
def test_the_gradient_of_r2060_takes_less_than_a_gibibyte():
    """Measured: 0.83 GiB."""
    assert gradient_bytes(registry.build("r2060"), 8) < 2**30


@pytest.mark.slow
def test_a_real_step_of_r2060(capsys):
    """On two quiet cores it is compiled in 30 s and run in 2 minutes; this prints both."""
    config = configs.replace(
        Config(), model__network="r2060", data__global_batch_size=2, model__bn_batch_size=2
    )
    devices = meshes.make(1)
    schedule = optim.make_schedule(config.schedule, base_rate=0.1, steps_per_epoch=5)
    run = step.make_train_step(config, num_classes=16, schedule=schedule, mesh=devices)
    start = time.perf_counter()
    abstract = step.abstract_state(config, num_classes=16, mesh=devices)
    compiled = run.lower(abstract, plan.abstract_batch(2, devices)).compile()
    seconds = {"trace and compile": time.perf_counter() - start}
    state = jax.block_until_ready(step.init_state(config, num_classes=16, mesh=devices))
    batch = {"image": faces(2), "label": np.arange(2, dtype=np.int32)}
    start = time.perf_counter()
    state, metrics = compiled(state, meshes.to_devices(batch, devices))
    assert np.isfinite(float(metrics["train/loss"]))
    seconds["step"] = time.perf_counter() - start
    assert all(bool(jnp.isfinite(x).all()) for x in state.params.values())
    with capsys.disabled():
        print({name: round(value, 1) for name, value in seconds.items()}, flush=True)
