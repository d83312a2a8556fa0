"""The plan of a run: bytes as they come to be, what would fit, and nothing allocated for it."""

import contextlib
import io
import resource
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import small_network
import torch
from commands import result, script

from arcface_jax import config as configs
from arcface_jax.config import Config, HeadConfig, OptimizerConfig
from arcface_jax.convert import torch_iresnet
from arcface_jax.errors import UserError
from arcface_jax.heads import margin_softmax
from arcface_jax.heads.margin_softmax import Centers
from arcface_jax.machine import gpu, plan
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import manifest, step, validation

DEVICES, BATCH, D = 8, 64, 512
CLASSES = 10_000_000
MEMORY = 4.806
SHARE = 0.75  # of a device, which JAX takes
CONFIG = configs.replace(
    Config(),
    devices=DEVICES,
    data__global_batch_size=BATCH,
    model__network=small_network.NAME,
    model__dtype="float32",
    model__bn_batch_size=8,
)
R_TINY = configs.replace(CONFIG, model__network="r_tiny")
RECIPE = """
from arcface_jax import config as c


def get_config():
    return c.Config(
        devices=8,
        data=c.DataConfig(global_batch_size=64),
        model=c.ModelConfig(
            network="tests.support.small_network:make", dtype="float32", bn_batch_size=8
        ),
    )
"""


def head_flops(rate: float, *, num_classes: int, num_devices: int) -> float:
    return plan.head_flops(
        CONFIG.head,
        CONFIG.model,
        rate=rate,
        batch=BATCH,
        num_classes=num_classes,
        num_devices=num_devices,
    )


class Run(NamedTuple):
    """What a call of the command came to."""

    text: str
    outcome: dict
    grown: int
    """Bytes by which the process grew beyond its largest size before."""


def run(*arguments: str) -> Run:
    before, printed = largest_size(), io.StringIO()
    # Without a plugin, whether this machine has one or not: test_gpu_plan.py has the GPU's.
    missing = mock.patch.object(gpu, "check_plugin", side_effect=UserError("no plugin: install it"))
    with contextlib.redirect_stdout(printed), missing:
        script("plan").main(list(arguments))
    text = printed.getvalue()
    return Run(text, result(text), largest_size() - before)


def largest_size() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "tiny.py"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def planned(recipe) -> Run:
    """Ten million classes: 20 GB of centers, and as much momentum."""
    return run(recipe, "--num-classes", str(CLASSES), "--memory", str(MEMORY / SHARE))


def test_bytes_are_named_and_nothing_is_allocated(planned):
    outcome = planned.outcome
    assert outcome["bytes/centers"] == CLASSES // DEVICES * D * 4
    assert outcome["bytes/centers_optimizer"] == outcome["bytes/centers"]
    assert outcome["bytes/batch"] == BATCH // DEVICES * (112 * 112 * 3 + 4)
    named = {name: size for name, size in outcome.items() if name.startswith("bytes/")}
    total = named.pop("bytes/total")
    assert named.pop("bytes/running_mean") == 0  # the recipe asks for none
    assert total == sum(named.values()) and min(named.values()) > 0
    assert outcome["fits"] is True and total <= MEMORY * 2**30
    assert outcome["files"] == [] and outcome["seconds"] > 0
    assert planned.grown < 2**30
    assert "XLA's CPU backend" in planned.text and "10,000,000 classes" in planned.text
    assert "not for h100: no plugin: install it" in planned.text and outcome["backend"] == "cpu"


def test_the_largest_batch_is_valid_and_as_large_as_a_direct_compile_says(planned):
    """The straight line, held against the step compiled at its far end."""
    outcome, memory = planned.outcome, MEMORY * 2**30
    largest, unit = outcome["largest_batch"], DEVICES * 8
    config = configs.replace(CONFIG, workdir="-", data__path="-", data__global_batch_size=largest)
    validation.validate(config, num_devices=DEVICES)
    assert largest >= 4 * BATCH  # far enough from the two batches that were compiled
    mesh = meshes.make(DEVICES)
    state = step.abstract_state(CONFIG, num_classes=CLASSES, mesh=mesh)
    direct = plan.temporary_bytes(CONFIG, largest, state, num_classes=CLASSES, mesh=mesh)
    rest = outcome["bytes/total"] - outcome["bytes/activations"]
    rest += (largest - BATCH) * outcome["bytes/batch"] / BATCH
    assert rest + direct <= 1.01 * memory
    assert rest + 1.1 * direct * (largest + unit) / largest > memory


def largest(slope: float, *, memory: int, **changes: int) -> int:
    """Of a run with 100 bytes at batch 32, of which 64 are activations and 32 the batch."""
    needed = {"rest": 4, "activations": 64, "batch": 32}
    sizes = {"batch": 32, "bn_batch": 16, "micro_batches": 1, "num_devices": 2, **changes}
    return plan.largest_batch(needed, slope, memory=memory, **sizes)


def test_the_largest_batch_has_whole_groups_in_each_slice():
    assert [largest(2.0, memory=memory) for memory in (100, 195, 196, 55, 9)] == [32, 32, 64, 16, 0]
    assert largest(2.0, memory=484, micro_batches=2) == 128  # 160 without
    assert largest(2.0, memory=100, micro_batches=2) == 0
    # The activations shrink in the second measurement: no reason to name more than what fits.
    assert largest(-4.0, memory=99) == 16
    assert largest(-4.0, memory=196) == 64


def test_the_most_classes_fill_the_memory(planned):
    outcome = planned.outcome
    each = 2 * D * 4 / DEVICES  # a center and its momentum
    spare = MEMORY * 2**30 - outcome["bytes/total"]
    more = outcome["largest_classes"] - CLASSES
    assert more % DEVICES == 0
    assert spare - DEVICES * each < more * each <= spare


def test_too_little_memory_fits_nothing(planned, recipe):
    little = run(recipe, "--num-classes", str(CLASSES), "--memory", "0.01").outcome
    assert little["fits"] is False
    assert little["largest_batch"] == little["largest_classes"] == 0
    same = [name for name in little if name.startswith("bytes/")]
    assert [little[name] for name in same] == [planned.outcome[name] for name in same]


@pytest.mark.parametrize(
    ("devices", "changes"),
    [(1, {}), (3, {"optimizer__kind": "adamw", "head__subcenters": 2}), (8, {})],
    ids=["1", "3-adamw-subcenters", "8"],
)
def test_planned_bytes_are_those_of_a_real_state(devices, changes):
    config, mesh = configs.replace(CONFIG, **changes), meshes.make(devices)
    real = step.init_state(config, num_classes=100, mesh=mesh)
    first = mesh.devices.flat[0]

    def held(tree) -> int:
        shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == first)

    expected = {
        "parameters": held(real.params),
        "batch_norm": held(real.batch_stats),
        "optimizer": held(real.opt_state),
        "centers": held(real.centers),
        "centers_optimizer": held(real.centers_opt),
        "running_mean": held(real.ema),
        "scalars": held((real.step, real.head_state, real.counters, real.loss_scale)),
    }
    state = step.abstract_state(config, num_classes=100, mesh=mesh)
    assert manifest.state_bytes(state) == expected
    assert sum(expected.values()) == held(real)


def test_the_heads_flops_are_four_products_a_class():
    """Against XLA's count of a head whose blocks, loop bodies counted once, hold all classes."""
    classes, mesh = 4096, meshes.make(1)
    head, rule = HeadConfig(block_size=classes, dtype="float32"), OptimizerConfig()
    centers = jax.eval_shape(
        lambda: margin_softmax.init_centers(
            jax.random.key(0),
            num_classes=classes,
            embedding_size=D,
            num_devices=1,
            head=head,
            optimizer=rule,
        )
    )

    def apply(embeddings, labels, centers: Centers, step):
        return margin_softmax.apply(
            embeddings,
            labels,
            centers,
            learning_rate=jnp.float32(0.1),
            step=step,
            key=jax.random.key(0),
            num_classes=classes,
            head=head,
            optimizer=rule,
            mesh=mesh,
        )

    shape = jax.ShapeDtypeStruct
    embeddings, labels = shape((BATCH, D), jnp.float32), shape((BATCH,), jnp.int32)
    lowered = jax.jit(apply).lower(embeddings, labels, centers, shape((), jnp.int32))
    counted = lowered.cost_analysis()["flops"]
    formula = head_flops(1.0, num_classes=classes, num_devices=1)
    assert formula == 8 * BATCH * D * classes
    assert formula == pytest.approx(counted, rel=0.1)


def test_the_backbones_flops_are_those_of_the_torch_network():
    module = torch_iresnet.build("r_tiny", embedding_size=D).eval()
    products = []
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            each = layer.weight[0].numel()
            layer.register_forward_hook(lambda *a, each=each: products.append(each * a[2].numel()))
    with torch.no_grad():
        module(torch.zeros(1, 3, 112, 112))
    # Two operations each, in the forward pass and for two gradients.
    assert plan.backbone_flops_per_image(R_TINY.model) == 6 * sum(products)


def test_sampling_is_suggested_where_the_head_costs_more_than_the_backbone(planned):
    """A hundredth of the classes: 26 GFLOP a step; the backbone takes 28, and at a fiftieth 52."""
    work = plan.work(R_TINY, num_classes=CLASSES, num_devices=DEVICES)
    assert work["sample_rate"] == planned.outcome["sample_rate"] == 0.01
    assert work["head_flops"][0.01] < work["backbone_flops"] < work["head_flops"][0.02]
    assert "sampling saves compute, not memory" in planned.text
    half = head_flops(0.5, num_classes=CLASSES, num_devices=DEVICES)
    assert half == 8 * BATCH * D * CLASSES / 2
    # A device visits all classes of the batch, however few were asked for.
    least = head_flops(0.01, num_classes=800, num_devices=DEVICES)
    assert least == 8 * BATCH * D * DEVICES * BATCH


def test_the_class_count_comes_from_the_option_or_the_data():
    drawn = configs.DataConfig(path="synthetic", synthetic=configs.SyntheticConfig(identities=7))
    assert plan.count_classes(drawn, None, seed=0) == (7, "data.path synthetic")
    assert plan.count_classes(drawn, 9, seed=0) == (9, "--num-classes")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], ["data.path is empty", "--num-classes 93431"]),
        (["--data.path", "nowhere"], ["nowhere does not exist", "--num-classes 93431"]),
        (["--num-classes", "0"], ["--num-classes 0", "1 to"]),
        (["--num-classes", "many"], ["--num-classes", "many"]),
        (["--num-classes", "9", "--memory", "-4"], ["--memory -4", "above 0", "80"]),
        (["--num-classes", "9", "--memory", "nan"], ["--memory nan", "above 0"]),
        (["--num-classes", "9", "--memory", "big"], ["--memory", "big"]),
        (["--num-classes", "9", "--devices", "0"], ["devices 0", "--devices 8"]),
        (["--num-classes", "9", "--devices", "7"], ["global_batch_size 64", "multiple of 7"]),
        (["--num-classes", "9", "--data.bacth", "7"], ["--data.bacth"]),
    ],
    ids=lambda value: "_".join(value[-2:]) if isinstance(value, list) else None,
)
def test_bad_options_are_one_message_and_code_2(recipe, capsys, options, named):
    with pytest.raises(SystemExit) as stop:
        script("plan").main([recipe, *options])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in named), message
    assert "Traceback" not in message


def test_a_recipe_without_devices_asks_for_them(tmp_path, capsys):
    (tmp_path / "plain.py").write_text(RECIPE.replace("devices=8,", ""))
    with pytest.raises(SystemExit) as stop:
        script("plan").main([str(tmp_path / "plain.py"), "--num-classes", "9"])
    assert stop.value.code == 2
    assert "--devices 8" in capsys.readouterr().err


def test_help_tells_the_default_memory(capsys):
    with pytest.raises(SystemExit) as stop:
        script("plan").main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "--memory" in said and "80" in said and "H100" in said
