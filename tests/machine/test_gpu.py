"""Compiling for a GPU that is not there: descriptions, plugins, and the process that does it."""

import importlib.util
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.errors import ConfigError, UserError
from arcface_jax.machine import gpu, peaks

CONFIG = configs.replace(
    Config(),
    data__global_batch_size=128,
    model__network="r_tiny",
    model__dtype="bfloat16",
    model__bn_batch_size=128,
    head__dtype="bfloat16",
)


@pytest.fixture
def fake(monkeypatch):
    """A worker that answers at once, and a plugin that need not be there."""
    monkeypatch.setattr(gpu, "_WORKER", "fake_gpu_worker")
    monkeypatch.setattr(gpu, "check_plugin", lambda: "fake")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))


@pytest.mark.parametrize("name", gpu.NAMES)
def test_each_target_is_described_with_its_sources(name: str):
    target, text = gpu.target(name), gpu.description(name)
    assert "data sheet" in text and "CUDA C++ Programming Guide" in text
    assert text.startswith("#") and text.count("{") == text.count("}")
    assert peaks.peak(target.device_kind, "bfloat16") is not None
    assert gpu.name_of(target.device_kind) == name
    assert 40 * 2**30 < target.memory < 190 * 2**30
    assert 8e11 < target.bandwidth < 8e12 and target.l2 >= 40 * 2**20


def test_published_figures_of_the_cards():
    by_sheet = {"a100": 2039, "h100": 3352, "h200": 4800, "b200": 7672, "l40s": 864}
    assert {name: gpu.target(name).bandwidth / 1e9 for name in gpu.NAMES} == by_sheet
    assert gpu.name_of("NVIDIA GeForce RTX 4090") is None


def test_topologies():
    found = {n: gpu.topology(n) for n in (1, 3, 8, 12, 16, 1024)}
    assert found == {
        1: "1x1x1",
        3: "1x1x3",
        8: "1x1x8",
        12: "2x1x6",
        16: "2x1x8",
        1024: "128x1x8",
    }
    for number in (0, 1025):
        with pytest.raises(ConfigError, match=f"--devices {number} must be 1 to 1024"):
            gpu.topology(number)
    with pytest.raises(ConfigError, match="--gpu v100 is unknown: use one of a100, b200"):
        gpu.description("v100")


def test_a_missing_plugin_is_an_error_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    version = metadata.version("jaxlib")
    with pytest.raises(UserError) as caught:
        gpu.check_plugin()
    text = str(caught.value)
    assert f"needs the CUDA plugin of jaxlib {version}, and none is installed" in text
    assert f"pip install 'jax-cuda12-plugin=={version}.*' 'jax-cuda12-pjrt=={version}.*'" in text
    assert "gpu-plan-cuda12" in text and "\n" not in text


@pytest.mark.parametrize(
    ("installed", "outcome"),
    [("0.4.0", "is installed: pip install"), ("{}.1", None), ("{}", None)],
    ids=["other release", "rebuild", "same"],
)
def test_a_plugin_has_to_be_of_jaxlibs_release(monkeypatch, installed, outcome):
    real, version = metadata.version, metadata.version("jaxlib")
    plugin = installed.format(version)
    known = {"jax-cuda13-plugin": plugin}
    monkeypatch.setattr(metadata, "version", lambda name: known.get(name) or real(name))
    named = "jax_cuda13_plugin"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == named or None)
    monkeypatch.setattr(gpu, "_has_ptxas", lambda: True)
    if outcome is None:
        assert gpu.check_plugin() == f"jax-cuda13-plugin {plugin}"
    else:
        with pytest.raises(UserError, match=f"jax-cuda13-plugin 0.4.0 {outcome}") as caught:
            gpu.check_plugin()
        assert "nvidia-nvvm" in str(caught.value)
        return
    monkeypatch.setattr(gpu, "_has_ptxas", lambda: False)
    with pytest.raises(UserError, match="needs ptxas"):
        gpu.check_plugin()


def test_one_process_compiles_several_programs(fake):
    with gpu.compiler("h100", devices=8) as process:
        found = process.compile(CONFIG, num_classes=10)
        larger = configs.replace(CONFIG, data__global_batch_size=256)
        assert process.compile(larger, num_classes=10).temporary_bytes == 256
    assert (found.temporary_bytes, found.argument_bytes) == (128, 8)
    assert found.module.total.kernels == 1 and found.state == {"centers": 1}


def test_its_errors_are_one_line(fake):
    with gpu.compiler("h100", devices=1) as process:
        with pytest.raises(UserError, match=r"^the batch is odd$"):
            process.compile(CONFIG, num_classes=1)
        with pytest.raises(UserError, match="cannot compile this run for the GPU: XlaRuntime"):
            process.compile(CONFIG, num_classes=2)
        with pytest.raises(UserError, match="exit code 7: fatal: out of registers"):
            process.compile(CONFIG, num_classes=3)


def test_ctrl_c_kills_the_process(fake):
    """The compile that is interrupted would take ten minutes."""

    def interrupted(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupted)
    try:
        with (
            pytest.raises(KeyboardInterrupt),
            gpu.compiler("h100", devices=1) as process,
        ):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            process.compile(CONFIG, num_classes=4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert process._process.returncode == -signal.SIGKILL


def test_the_calling_process_loads_neither_jax_nor_a_plugin():
    code = (
        "import sys; from arcface_jax.machine import gpu, roofline; "
        "assert not [m for m in sys.modules if m == 'jax' or m.startswith('jax_cuda')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu.NAMES)
def test_the_real_step_compiles_for_each_gpu(name: str):
    try:
        gpu.check_plugin()
    except UserError as error:
        pytest.skip(str(error))
    program = gpu.compile_step(CONFIG, num_classes=100_000, gpu=name, devices=1)
    assert program.argument_bytes == pytest.approx(sum(program.state.values()), rel=1e-3)
    assert program.alias_bytes >= program.state["centers"] + program.state["centers_optimizer"]
    assert all(loop.trip_count for loop in program.module.loops)
    assert sum(kernel.kind == "convolution" for kernel in program.module.kernels) > 30
