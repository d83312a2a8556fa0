"""The plan of a GPU's program, with a compiler whose temporaries are a known function."""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import result, script

from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.machine import gpu, gpu_plan, plan
from arcface_jax.machine.gpu import Program
from arcface_jax.training import validation

GIB = 2**30
CONFIG = configs.replace(
    Config(),
    devices=8,
    data__global_batch_size=64,
    model__network="r_tiny",
    model__bn_batch_size=8,
)
TEXT = (Path(__file__).parent / "programs" / "sums_over_devices.hlo").read_text()


class Call(NamedTuple):
    part: str
    batch: int
    classes: int


class FakeCompiler:
    """Temporaries grow with the batch in a line that bends at 1,000 images."""

    def __init__(self):
        self.calls: list[Call] = []

    def temporary(self, batch: int) -> int:
        return 3 * 2**20 * batch + 2**20 * max(0, batch - 1000)

    def compile(self, config, *, num_classes, part="step") -> Program:
        batch = config.data.global_batch_size
        self.calls.append(Call(part, batch, num_classes))
        rows = -(-num_classes // 8) * 512 * 4
        state = dict.fromkeys(("parameters", "batch_norm", "optimizer", "running_mean"), 2**20)
        state |= {"scalars": 16, "centers": rows, "centers_optimizer": rows, "batch": 5000 * batch}
        return Program(
            text=TEXT,
            temporary_bytes=self.temporary(batch) if part == "step" else 20 * 2**20,
            argument_bytes=0,
            output_bytes=0,
            alias_bytes=0,
            state=state if part == "step" else {},
            seconds=1.0,
        )


@pytest.fixture
def compiler(monkeypatch) -> FakeCompiler:
    found = FakeCompiler()

    @contextmanager
    def start(name, *, devices):
        assert (name, devices) == ("h100", 8)
        yield found

    monkeypatch.setattr(gpu, "compiler", start)
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    return found


def made(
    classes: int = 1_000_000, memory: int | None = 16 * GIB, config: Config = CONFIG
) -> plan.Plan:
    return gpu_plan.make(config, num_classes=classes, name="h100", memory=memory)


def test_memory_is_named_and_held_against_jaxs_share(compiler):
    found = made()
    outcome = found.results()
    assert outcome["backend"] == "NVIDIA H100 80GB HBM3" and outcome["memory_share"] == 0.75
    assert outcome["bytes/head"] == 20 * 2**20
    assert outcome["bytes/activations"] + outcome["bytes/head"] == compiler.temporary(64)
    named = {name: size for name, size in outcome.items() if name.startswith("bytes/")}
    assert named.pop("bytes/total") == sum(named.values())
    assert named["bytes/cudnn_workspace"] == 512 * 2**20
    assert found.usable == 12 * GIB
    assert outcome["outside/nccl"] == 512 * 2**20
    assert outcome["collectives/all-reduce"] == [1, 2**20]


def test_the_largest_batch_is_compiled_and_the_next_one_would_not_fit(compiler):
    found = made()

    def total(batch: int) -> float:
        rest = found.total - found.needed["batch"] - compiler.temporary(64)
        return rest + 5000 * batch + compiler.temporary(batch)

    largest = found.largest_batch
    assert largest > 1000  # beyond the bend: two points are not enough
    assert largest in [call.batch for call in compiler.calls if call.part == "step"]
    assert total(largest) <= found.usable < total(largest + 64)
    assert found.measured[:2] == (64, 128) and largest in found.measured[2:]


def test_with_micro_batches_every_compiled_batch_is_valid(compiler):
    config = configs.replace(
        CONFIG,
        workdir="-",
        data__path="-",
        data__global_batch_size=8 * 8 * 3,
        optimizer__micro_batches=3,
    )
    largest = made(config=config).largest_batch
    steps = [call.batch for call in compiler.calls if call.part == "step"]
    assert largest in steps and len(steps) > 2
    for batch in steps:
        sized = configs.replace(config, data__global_batch_size=batch)
        validation.validate(sized, num_devices=8)
    # Without room for a batch that can be sliced, a smaller one does not help.
    assert made(config=config, memory=3 * GIB // 2).largest_batch == 0


def test_the_most_classes_are_compiled_too(compiler):
    found = made()
    assert Call("head", 64, found.largest_classes) in compiler.calls
    each = 2 * 512 * 4 / 8
    spare = found.usable - found.total
    assert spare - 8 * each < (found.largest_classes - 1_000_000) * each <= spare


def test_130_million_classes_need_more_than_jaxs_75_percent(compiler):
    found = made(130_000_000, None)
    assert found.memory == gpu.target("h100").memory
    assert not found.fits(found.share) and found.fits(0.95)
    verdict = plan.in_words(found, CONFIG.model, num_classes=130_000_000)[0]
    assert verdict.startswith("does not fit: 62.")
    assert "it fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in verdict
    assert found.largest_batch == 0


def test_the_share_is_that_of_the_environment(compiler, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
    assert made(130_000_000, None).results()["fits"] is True
    # No room is left for the CUDA context and NCCL.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "1")
    assert made().results()["fits"] is False
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "75")
    with pytest.raises(plan.UserError, match="MEM_FRACTION=75 must be above 0 and at most 1"):
        made()


def test_the_command_prints_tables_and_writes_a_picture(compiler, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "check_plugin", lambda: "jax-cuda12-plugin 1.2.3")
    recipe = tmp_path / "tiny.py"
    recipe.write_text(
        "from arcface_jax import config as c\n\n\ndef get_config():\n"
        "    return c.Config(devices=8, data=c.DataConfig(global_batch_size=64), "
        'model=c.ModelConfig(network="r_tiny", bn_batch_size=8))\n'
    )
    more = ("--num-classes", "1000000", "--memory", "16", "--output", str(tmp_path / "plan"))
    more += ("--data.path", "nowhere", "--distill.teacher", "any.onnx")
    assert script("plan").main([str(recipe), *more]) == 0
    text = capsys.readouterr().out
    for words in (
        "on each device (NVIDIA H100 80GB HBM3)",
        "BatchNorm and elementwise",
        "all-reduce",
        "cuDNN's workspace (allowed for)",
        "TF_CUDNN_WORKSPACE_LIMIT_IN_MB",
        "images/s on 8 GPU(s)",
        "compiled with jax-cuda12-plugin 1.2.3",
        "teacher's cache: its disk space is unknown without the data (data.path nowhere does not",
    ):
        assert words in text
    outcome = result(text)
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert written == {name: outcome[name] for name in written} and "hbm_bytes/head" in written
    assert outcome["files"] == [str(tmp_path / "plan" / f"plan.{kind}") for kind in ("json", "png")]
    assert (tmp_path / "plan" / "plan.png").read_bytes().startswith(b"\x89PNG")
