"""scripts/doctor.py on eight CPU devices, and what it would find on a machine with faults."""

import dataclasses
import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from commands import result, script

from arcface_jax import config as configs
from arcface_jax.config import Config, loading
from arcface_jax.data.opening import open_source
from arcface_jax.errors import UserError
from arcface_jax.machine import collectives, doctor, gpu, plan
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import manifest

RECIPE = """
from arcface_jax import config as c


def get_config():
    return c.Config(
        data=c.DataConfig(path="synthetic", global_batch_size=16),
        model=c.ModelConfig(network="r_tiny", dtype="float32", embedding_size=32, bn_batch_size=16),
        head=c.HeadConfig(dtype="float32"),
    )
"""


def examine(folder: Path, capsys, *more: str) -> tuple[int, dict, str]:
    """Exit code, RESULT, and the table of scripts/doctor.py with the recipe above."""
    (folder / "tiny.py").write_text(RECIPE)
    code = script("doctor").main([str(folder / "tiny.py"), "--devices", "8", *more])
    out = capsys.readouterr().out
    return code, result(out), out


def test_a_sound_machine_gets_its_bottleneck_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    more = ("--workdir", str(tmp_path / "new" / "run"), "--seconds", "0.2")
    more += ("--deterministic", "--distributed.local-devices", "0")
    code, found, out = examine(tmp_path, capsys, *more)
    assert code == 0 and found["fails"] == []
    for name in ("versions", "driver", "data", "memory", "disk", "compute", "traffic"):
        assert name in out
    assert found["devices"] == 8
    assert "--xla_gpu_deterministic_ops=true" in os.environ["XLA_FLAGS"]
    assert "--distributed.* are not applied" in out
    # A ring of 8 sends 7/8 of the (16, 32) float32 embeddings, and back.
    assert found["all_gather_bytes"] == found["reduce_scatter_bytes"] == 7 / 8 * 16 * 32 * 4
    parts = ("data_ms", "compute_ms", "head_ms", "all_reduce_ms")
    longest = max(found[name] for name in parts)
    assert found["most_images_per_second"] == pytest.approx(16 / longest * 1e3)
    assert "will be the bottleneck" in found["bottleneck"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.py"]  # nothing stays behind


@pytest.mark.parametrize(
    ("more", "name", "words"),
    [
        (("--data.global-batch-size", "12"), "devices", "12 cannot be divided by 8 devices"),
        (("--data.path", "nowhere"), "data", "nowhere"),
        (("--num-classes", "2000000000", "--data.path", ""), "memory", "fewer classes"),
        (("--workdir", "/proc/run", "--data.path", "", "--num-classes", "9"), "disk", "/proc"),
    ],
)
def test_what_would_make_a_run_fail_is_the_exit_code(tmp_path, capsys, more, name, words):
    code, found, out = examine(tmp_path, capsys, "--seconds", "0.1", *more)
    assert code == 1 and found["fails"] == [name]
    assert words in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--num-classes", "0"), "--num-classes 0 must be 1 to 2147483647"),
        (("--num-classes", "2147483648"), "--num-classes 2147483648 must be 1 to 2147483647"),
        (("--seconds", "nan"), "--seconds nan must be above 0"),
        (("--seconds", "0"), "--seconds 0 must be above 0"),
    ],
)
def test_bad_options_are_one_message(tmp_path, capsys, more, words):
    with pytest.raises(SystemExit) as stop:
        examine(tmp_path, capsys, *more)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_what_the_recipe_names_has_to_exist(tmp_path):
    there = tmp_path / "there.bin"
    there.touch()
    config = configs.replace(
        Config(workdir=str(tmp_path / "run")),
        data__path=str(tmp_path),
        init_from=str(there),
        distill__teacher=str(there),
        evaluation__targets=("there.bin", "synthetic", "arcface_jax.plugins:parse"),
    )
    assert doctor.check_files(config).verdict == "ok"
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    missing = configs.replace(
        config,
        init_from=str(tmp_path / "empty"),
        distill__teacher="nowhere.onnx",
        evaluation__targets=("there.bin", "ther.bin", "pairs.txt:faces", "no_such_module:it"),
    )
    check = doctor.check_files(missing)
    assert check.verdict == "fails"
    for words in (
        f"init_from {tmp_path / 'empty'} does not exist",
        "distill.teacher nowhere.onnx does not exist",
        "did you mean there.bin?",
        "no list of pairs at",
        "cannot import no_such_module",
    ):
        assert words in check.words
    assert "there.bin does not exist" not in check.words
    # Without data, relative targets cannot be found.
    unknown = configs.replace(config, data__path="", evaluation__targets=("ther.bin",))
    assert doctor.check_files(unknown).verdict == "ok"


def test_fewer_images_than_a_batch_do_if_it_is_padded():
    noise = configs.NoiseConfig(classes=3, images=18)
    data = configs.DataConfig(path="noise", noise=noise, global_batch_size=50, last_batch="pad")
    source = open_source(data, seed=0)
    assert doctor.check_data(data, source, seconds=0.02).verdict == "ok"
    with pytest.raises(UserError, match="18 images, fewer than one batch of 50"):
        doctor.check_data(dataclasses.replace(data, last_batch="drop"), source, seconds=0.02)


def test_checkpoints_that_exist_need_no_more_room(tmp_path, monkeypatch):
    def check(free: int, keep: int = 2) -> str:
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
        settings = configs.CheckpointConfig(keep=keep)
        return doctor.check_disk(tmp_path, settings, {"parameters": 100}, meshes.make(1)).verdict

    monkeypatch.setattr(doctor, "_disk_speed", lambda folder: (1e9, 1e9))
    assert (check(299), check(300)) == ("fails", "ok")
    for step in ("10", "20"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "checkpoints" / step / "arrays").write_bytes(bytes(100))
    assert (check(99), check(100)) == ("fails", "ok")
    assert (check(99, keep=1), check(100, keep=1)) == ("fails", "ok")  # written before one goes


def test_a_measured_step_holds_one_state(monkeypatch):
    class State:
        """Stands for the arrays of a state."""

    alive: list[weakref.ref] = []

    def made() -> State:
        state = State()
        alive.append(weakref.ref(state))
        return state

    def run(state, batch):
        assert sum(ref() is not None for ref in alive) == 1
        return state, {}

    packing = SimpleNamespace(pack=lambda state: made())
    fakes = {
        "init_state": lambda *a, **k: made(),
        "make_packing": lambda *a: packing,
        "make_train_step": lambda *a, **k: run,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(doctor.step, name, fake)
    monkeypatch.setattr(doctor.jax, "block_until_ready", lambda tree: tree)
    config = configs.replace(Config(), data__global_batch_size=2)
    doctor.measure_step(config, num_classes=9, mesh=meshes.make(1), repeats=1)
    assert len(alive) == 2


def test_the_versions_are_those_that_a_run_writes():
    found = manifest.versions()
    assert found.keys() <= set(manifest.PACKAGES) and {"jax", "jaxlib", "flax"} <= found.keys()
    assert found["jax"] == jax.__version__
    assert doctor.check_versions(found).words.startswith(
        ", ".join(f"{k} {found[k]}" for k in found)
    )


def test_versions_that_are_apart_are_named():
    check = doctor.check_versions
    assert check({"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "1"}).verdict == "ok"
    assert check({"jax": "0.10.2", "jaxlib": "0.10.1"}).verdict == "warning"
    rebuilt = {"jax": "0.12.0", "jaxlib": "0.12.0", "jax-cuda12-plugin": "0.12.0.1"}
    assert check(rebuilt).verdict == "ok"
    plugin = check({"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.9.0"})
    assert plugin.verdict == "fails"
    assert "pip install jax-cuda12-plugin==0.10.2" in plugin.words


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("echo 'NVIDIA H100, 560.1, 81559 MiB'", "JAX sees only the CPU"),
        ("echo 'driver/library version mismatch'; exit 9", "nvidia-smi fails: driver/library"),
    ],
)
def test_a_driver_that_jax_cannot_use_fails(tmp_path, monkeypatch, program, words):
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{program}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    check = doctor.check_driver()
    assert check.verdict == "fails" and words in check.words


def test_the_longest_part_is_the_bottleneck():
    check = doctor.bottleneck({"reading": 40.0, "sending": 10.0}, batch=128)
    assert check.words.startswith("reading will be the bottleneck: no more than 3,200 images/s")


class FakeMesh(NamedTuple):
    """Two GPUs."""

    devices: np.ndarray
    size: int = 2


def a_mesh(kind: str) -> FakeMesh:
    return FakeMesh(np.array([SimpleNamespace(device_kind=kind, platform="gpu")] * 2))


def test_a_measured_step_stands_beside_the_compiled_one(monkeypatch):
    text = (Path(__file__).parent / "programs" / "elementwise.hlo").read_text()
    program = gpu.Program(text, 3 * 2**30, 5 * 2**30, 5 * 2**30, 4 * 2**30, {}, 1.0)
    asked = {}

    def compile_step(config, **options):
        asked.update(options)
        return program

    monkeypatch.setattr(gpu, "compile_step", compile_step)
    measured = doctor.Step(0.01, 8 * 2**30)
    monkeypatch.setattr(doctor, "measure_step", lambda *args, **options: measured)
    check = doctor.check_step(Config(), num_classes=9, mesh=a_mesh("NVIDIA H200"))
    assert asked == {"num_classes": 9, "gpu": "h200", "devices": 2}
    assert check.verdict == "ok"
    assert check.values["peak_bytes"] == 8 * 2**30
    assert check.values["compiled_bytes"] == 9 * 2**30  # 1 GiB of the results lies elsewhere
    assert check.values["modelled_ms"] == pytest.approx(1e3 * 12 * 2**20 / (0.85 * 4.8e12))
    assert "measured 10.00 ms, peak memory 8.00 GiB" in check.words
    other = doctor.check_step(Config(), num_classes=9, mesh=a_mesh("NVIDIA L4"))
    assert "no model of NVIDIA L4" in other.words and "compiled_bytes" not in other.values


def test_the_teachers_cache_is_counted_less_what_is_there(tmp_path, monkeypatch):
    config = configs.replace(
        Config(workdir=str(tmp_path)),
        data__path="synthetic",
        data__synthetic__identities=10,
        data__synthetic__images_per_identity=3,
        model__embedding_size=8,
        distill__teacher="any.onnx",
        distill__views="both",
    )
    needed, words = plan.teacher_disk(config)
    assert needed == 30 * 2 * 8 * 2 and "30 images" in words
    usage = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    check = doctor.check_teacher(config)
    assert check.verdict == "fails" and "--distill.cache" in check.words
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "teacher-00000.npy").write_bytes(b"x")
    assert doctor.check_teacher(config).verdict == "ok"
    online = configs.replace(config, distill__online=True)
    assert plan.teacher_disk(online) == (0, "")
    assert doctor.check_teacher(online).verdict == "ok"
    batch = plan.batch_of(config, meshes.make(1))
    assert batch["teacher"].shape == (128, 2, 8)


def test_a_step_without_a_plugin_or_without_room(monkeypatch):
    def missing(*args, **options):
        raise UserError("no plugin: pip install it")

    def full(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(gpu, "compile_step", missing)
    monkeypatch.setattr(doctor, "measure_step", lambda *args, **options: doctor.Step(0.01, None))
    mesh = a_mesh("NVIDIA H200")
    check = doctor.check_step(Config(), num_classes=9, mesh=mesh)
    assert check.verdict == "ok" and "no plugin: pip install it" in check.words
    monkeypatch.setattr(doctor, "measure_step", full)
    check = doctor.check_step(Config(), num_classes=9, mesh=mesh)
    assert check.verdict == "fails" and "arcface-jax plan" in check.words


@pytest.mark.slow
def test_a_step_is_measured(tmp_path):
    (tmp_path / "tiny.py").write_text(RECIPE)
    config = loading.read_recipe(tmp_path / "tiny.py")
    found = doctor.measure_step(config, num_classes=9, mesh=meshes.make(2), repeats=1)
    assert found.seconds > 0


def test_traffic_goes_with_the_arrays():
    found = collectives.measure(
        meshes.make(4),
        **{"batch": 64, "size": 16, "parameters": 1000},
        head_dtype="bfloat16",
        head_reduce_dtype="float32",
        reduce_dtype="float32",
    )
    sent = {name: traffic.bytes for name, traffic in found.items()}
    whole = {"all_gather": 64 * 16 * 2, "reduce_scatter": 64 * 16 * 4, "all_reduce": 2 * 1000 * 4}
    assert sent == {name: size * 3 / 4 for name, size in whole.items()}
    assert all(traffic.rate > 0 for traffic in found.values())
