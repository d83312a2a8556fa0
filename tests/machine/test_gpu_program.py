"""The train step that XLA compiles for an H100, held to its bars; `make gpu-program` runs these.

They need a CUDA plugin of jaxlib's version and no GPU; without one they are skipped.
"""

import json
from functools import cache

import pytest

from arcface_jax import config as configs
from arcface_jax.errors import UserError
from arcface_jax.machine import gpu, hlo
from benchmarks import program
from benchmarks.program import SUBJECTS

pytestmark = pytest.mark.gpu_program

MIB = 2**20
STEPS = [name for name, subject in SUBJECTS.items() if subject.part == "step"]
ONE, EIGHT, R100, HEAD, VIT = SUBJECTS


@pytest.fixture(autouse=True)
def _needs_a_plugin(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # those of the tests on CPUs
    try:
        gpu.check_plugin()
    except UserError as error:
        pytest.skip(str(error))


@cache
def compiled(name: str) -> gpu.Program:
    return program.compile_one(SUBJECTS[name])


@cache
def head(classes: int, devices: int, optimizer: str = "sgd", rate: float = 1.0) -> gpu.Program:
    subject = SUBJECTS[HEAD]._replace(classes=classes, devices=devices, each=1024 // devices)
    config = configs.replace(subject.config(), optimizer__kind=optimizer, head__sample_rate=rate)
    return gpu.compile_step(config, num_classes=classes, gpu="h100", devices=devices, part="head")


def shard_bytes(name: str) -> int:
    subject = SUBJECTS[name]
    return 4 * 512 * subject.classes // subject.devices


@pytest.mark.parametrize("name", SUBJECTS)
def test_it_is_within_the_bar(name):
    figures = program.figures(compiled(name))
    bar = SUBJECTS[name].bar
    assert figures.temporary_bytes <= bar.temporary_bytes
    assert figures.hbm_bytes <= bar.hbm_bytes
    assert figures.kernels <= bar.kernels


@pytest.mark.parametrize("name", SUBJECTS)
def test_it_is_what_was_recorded(name):
    kept = json.loads(program.RECORD.read_text())["programs"][name]
    for field, value in program.figures(compiled(name))._asdict().items():
        assert value == pytest.approx(kept[field], rel=0.03), field
    found = hlo.count_collectives(compiled(name).module.collectives)
    assert {kind: list(value) for kind, value in found.items()} == kept["collectives"]


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_copy_is_as_large_as_the_shard(name):
    largest = max((copy.bytes for copy in compiled(name).module.copies), default=0)
    assert largest < shard_bytes(name) / 4
    assert compiled(name).temporary_bytes < 8 * 2**30


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_no_head_copies_its_centers(devices, optimizer, rate):
    shard = 4 * 512 * 1_000_000 // devices
    found = head(1_000_000, devices, optimizer, rate)
    assert max((copy.bytes for copy in found.module.copies), default=0) < shard / 4
    assert found.temporary_bytes < 128 * MIB < shard  # blocks, and no array of the shard's size


@pytest.mark.parametrize("devices", [1, 8])
def test_the_heads_temporaries_do_not_grow_with_the_classes(devices):
    few, many = (head(classes, devices).temporary_bytes for classes in (1_000_000, 10_000_000))
    assert many == pytest.approx(few, rel=0.01)


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_loop_of_the_head_has_a_known_length(name):
    loops = [loop for loop in compiled(name).module.loops if loop.part == "head"]
    assert loops
    assert all(loop.trip_count for loop in loops)


@pytest.mark.parametrize("name", [ONE, EIGHT, R100])
def test_convolutions_are_cudnn_in_bfloat16_with_channels_last(name):
    found = [k for k in compiled(name).module.kernels if k.kind == "convolution"]
    # Forward, and both gradients; the first convolution needs none of its input.
    layers = {"r50": 53, "r100": 103}[SUBJECTS[name].network]
    assert len(found) == 3 * layers - 1
    assert {kernel.dtype for kernel in found} == {"bf16"}
    assert all("b01f" in kernel.detail or "NHWC" in kernel.detail for kernel in found)


@pytest.mark.parametrize("name", STEPS)
def test_no_loop_carries_float32_activations(name):
    subject = SUBJECTS[name]
    # Float32 stacks of a scanned network are its parameters and their gradients; an activation
    # has the device's images in its shape.
    for loop in compiled(name).module.loops:
        if loop.part == "head":
            continue
        wide = [
            shape
            for shape in loop.carry
            if shape.dtype == "f32" and len(shape.dims) > 3 and subject.each in shape.dims
        ]
        assert not wide, loop.name


@pytest.mark.parametrize("name", [EIGHT, R100])
def test_the_first_gradients_are_summed_before_the_backward_pass_ends(name):
    module = compiled(name).module
    kept = json.loads(program.RECORD.read_text())["programs"][name]
    found = program.first_gradient_sum(module)
    assert found is not None
    assert found <= kept["first_gradient_sum"] + 0.03
    sums = [c for c in module.collectives if c.kind == "all-reduce" and c.bytes > MIB]
    assert sums[0].bytes == max(c.bytes for c in sums[:2])  # fc's, which is ready first


def test_the_head_of_1024_gpus_has_small_temporaries():
    subject = SUBJECTS[HEAD]._replace(classes=100_000_000, each=128, devices=1024)
    found = program.compile_one(subject)
    assert found.temporary_bytes <= 256 * MIB
    assert all(loop.trip_count for loop in found.module.loops)


def test_float32_stays_float32():
    """No product of a float32 step is rounded to TF32 or computed in 16 bits."""
    config = configs.replace(
        SUBJECTS[ONE].config(), model__network="r_tiny", model__dtype="float32",
        head__dtype="float32",
    )  # fmt: skip
    found = gpu.compile_step(config, num_classes=10_000, gpu="h100", devices=1)
    products = [k for k in found.module.kernels if k.flops and k.part == "head"]
    assert products
    assert {kernel.dtype for kernel in products} == {"f32"}


def test_cublas_compiles_too(monkeypatch):
    """A GPU may choose cuBLAS where Triton is the default here."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    subject = SUBJECTS[HEAD]._replace(classes=1_000_000)
    found = program.compile_one(subject)
    assert found.temporary_bytes < 128 * MIB
    assert any(kernel.kind == "gemm" for kernel in found.module.kernels)
