"""What only a GPU can test; skipped where there is none. `pytest -m gpu` runs these alone."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcface_jax.models import registry, vit
from arcface_jax.models.layers import BatchNorm
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import optim, step
from benchmarks import head
from benchmarks import step as benchmark
from benchmarks.step import Case

ROOT = Path(__file__).parents[2]
MIB = 2**20

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"JAX runs on {jax.default_backend()} here; needs a GPU")


def one_step(case: Case) -> benchmark.Program:
    """The train step; each compilation on a GPU takes a quarter of a minute."""
    return benchmark.compile_parts(case, ["step"])["step"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_steps_have_a_finite_loss(dtype):
    run = one_step(Case("r18", 32, 1000, 1, dtype)).run
    losses = [float(run()[1]["train/loss"]) for _ in range(3)]
    assert np.isfinite(losses).all() and losses[0] > 20  # s m and ln C, for one that knows nothing


def test_a_million_classes_need_no_memory_for_their_logits():
    few, many = (
        one_step(Case("r18", 128, classes, 1, "bfloat16")) for classes in (10_000, 1_000_000)
    )
    assert many.temporary_bytes <= few.temporary_bytes + 64 * MIB
    assert np.isfinite(float(many.run()[1]["train/loss"]))


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, "scripts/benchmark.py", "step", "--network", "r18", "--batch", "32"]
    command += ["--dtype", "bfloat16", "--repeats", "2", "--output", str(tmp_path)]
    # This process holds its share of the GPU's memory.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert {row["part"] for row in outcome["measurements"]} == set(benchmark.PARTS)
    assert all(row["images_per_second"] > 0 for row in outcome["measurements"])


@pytest.mark.parametrize(
    ("dtype", "bound", "head", "tokens"),
    [
        *(("bfloat16", 1e-2, head, 129) for head in (32, 64, 96)),  # of vit_t, vit_s, vit_l
        ("bfloat16", 1e-2, 128, 144),  # of vit_h, which hides no token
        ("float16", 2e-3, 64, 129),
        ("float16", 2e-3, 32, 144),
    ],
)
def test_cudnns_attention_is_that_of_float32(dtype, bound, head, tokens):
    if not vit.can_fuse(
        8 * head, dtype=jnp.dtype(dtype), gpu=meshes.compute_capability(meshes.make(1))
    ):
        pytest.skip("cuDNN has no fused attention for this GPU")
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(4, tokens, 3, 8, head)), dtype)
    d_mixed = jnp.asarray(rng.normal(size=(4, tokens, 8, head)), dtype)

    def both(attend, qkv, d_mixed):
        mixed, vjp = jax.vjp(attend, qkv)
        return mixed, vjp(d_mixed)[0]

    found = jax.jit(partial(both, vit.attend_fused))(qkv, d_mixed)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(partial(both, vit.attend))(qkv.astype("float32"), d_mixed.astype("float32"))
    for ours, theirs in zip(found, exact, strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
        assert np.linalg.norm(ours - theirs) < bound * np.linalg.norm(theirs)


@pytest.mark.parametrize("network", ["vit_t", "r100"])
def test_steps_in_the_forms_for_gpus_have_a_finite_loss(network):
    run = one_step(Case(network, 16, 1000, 1, "bfloat16")).run
    assert np.isfinite([float(run()[1]["train/loss"]) for _ in range(3)]).all()


def test_batch_norm_in_one_pass_keeps_the_variance():
    x = jnp.asarray(30 + np.random.default_rng(0).normal(size=(64, 28, 28, 64)), jnp.bfloat16)
    norm = BatchNorm(64)
    norm.momentum = 1.0
    norm(x, train=True)
    exact = np.asarray(x, np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(norm.var[...], exact, rtol=2e-6)


@pytest.fixture
def cpu() -> jax.Device:
    """A CPU, beside the GPU."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        pytest.skip("JAX_PLATFORMS leaves out the CPU")


def mesh_of(device: jax.Device) -> jax.sharding.Mesh:
    return jax.make_mesh((1,), (meshes.AXIS,), (jax.sharding.AxisType.Auto,), devices=[device])


@pytest.mark.parametrize("network", ["r18", "mbf", "vit_t", "edgeface_xs"])
def test_float32_embeddings_are_those_of_a_cpu(network, cpu):
    """Exports are checked to 1e-4 against torch on the CPU; TF32 would miss that."""
    backbone = registry.build(network)
    params, batch_stats = backbone.init(0)
    images = np.random.default_rng(0).integers(0, 256, (8, 112, 112, 3), dtype=np.uint8)
    embed = step.make_embed(backbone)
    ours, theirs = (
        np.asarray(embed(*jax.device_put((params, batch_stats, images), device)))
        for device in (jax.devices()[0], cpu)
    )
    error = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert error.max() < 1e-5


def test_float32_steps_are_those_of_a_cpu(cpu):
    """With the forms for GPUs: packed parameters, the head's large blocks."""
    case = Case("r18", 16, 20_000, 1, "float32")
    config = benchmark.make_config(case)
    schedule = optim.make_schedule(config.schedule, base_rate=0.1, steps_per_epoch=100)
    found = []
    with jax.default_matmul_precision("highest"):
        for mesh in (meshes.make(1), mesh_of(cpu)):
            state = step.init_state(config, num_classes=case.classes, mesh=mesh)
            run = step.make_train_step(
                config, num_classes=case.classes, schedule=schedule, mesh=mesh
            )
            batch = meshes.to_devices(benchmark.draw_batch(case), mesh)
            losses = []
            for _ in range(3):
                state, metrics = run(state, batch)
                losses.append(float(metrics["train/loss"]))
            packing = step.make_packing(config, mesh)
            kernel = packing.unpack(state).params["fc.kernel"]
            arrays = [kernel, state.centers, *state.centers_opt.values()]
            found.append((losses, [np.asarray(array) for array in arrays]))
    (ours, our_arrays), (theirs, their_arrays) = found
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    for here, there in zip(our_arrays, their_arrays, strict=True):
        assert np.linalg.norm(here - there) < 1e-3 * np.linalg.norm(there)


@pytest.mark.parametrize("batch", [128, 1024])
@pytest.mark.parametrize("form", ["unit", "scaled", "powers"])
def test_the_heads_forms_compute_the_same(batch, form):
    """In bfloat16, with whatever the autotuner chose for their products, against float32."""
    rng = np.random.default_rng(0)
    classes, size = 100_000, 512
    embeddings = rng.normal(size=(batch, size)).astype(np.float32)
    labels = rng.integers(0, classes, batch, dtype=np.int32)
    rows = rng.normal(size=(classes, size)).astype(np.float32)

    def step_with(**options):
        case = head.Case(classes, batch, 1, **options)
        moments = {"momentum": jnp.zeros_like(rows)}
        given = jax.device_put((embeddings, labels, rows, moments, np.int32(0)))
        loss, d_embeddings, _, moments = head.compile_method("blocked", case).run(*given)
        return float(loss), np.asarray(d_embeddings), np.asarray(moments["momentum"])

    exact = step_with(dtype="float32", block_form="unit")
    found = step_with(dtype="bfloat16", block_form=form)
    assert found[0] == pytest.approx(exact[0], rel=1e-3)
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        assert np.linalg.norm(ours - theirs) < 2e-2 * np.linalg.norm(theirs)
