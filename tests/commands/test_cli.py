"""The command `arcface-jax`: what it offers, how fast it answers, and what it accepts."""

import errno
import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import arcface_jax
from arcface_jax import cli, errors
from arcface_jax.commands import Result, command
from arcface_jax.errors import UserError

ROOT = Path(__file__).parents[2]
# Sub-commands that parse a command line of their own.
NESTED = ["data pack", "import torch", "import centers", "export torch", "export onnx"]
NESTED += ["export stablehlo", "export safetensors", "export hub"]
NESTED += ["gallery build", "gallery search"]
FIRST = {name: ["demo"] for name in ("train", "plan", "doctor")}
FIRST |= {"status": ["w"], "protocol": ["groups"], "verify": ["a", "b"], "data pack": ["a", "b"]}
FIRST |= {"data": ["pack", "a", "b"], "import centers": ["read", "a"]}
FIRST |= {"gallery": ["build", "e"], "gallery build": ["e"], "gallery search": ["g"]}
SECONDS = 2.0


def run(*words: str, cwd: Path = ROOT) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs `python -m arcface_jax` in a process; what it came to, and the CPU time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "arcface_jax", *words], cwd=cwd, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("name", ["train", "export onnx"])
def test_help_and_a_mistyped_option_are_answered_at_once(name: str):
    shown, seconds = run(*name.split(), "--help")
    assert shown.returncode == 0 and seconds <= SECONDS
    wrong, seconds = run(*name.split(), *FIRST.get(name, []), "--bogus")
    assert wrong.returncode == 2 and seconds <= SECONDS


# Answers many command lines, each in a process forked before any command's module is imported.
ANSWER = """
import contextlib, json, os, sys
import tyro
from arcface_jax import cli, errors

def answer(words):
    with contextlib.redirect_stdout(open("out", "w")), contextlib.redirect_stderr(open("err", "w")):
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush(), sys.stderr.flush()
    heavy = sorted({"jax", "flax", "torch", "cv2"} & set(sys.modules))
    found = {"code": code, "out": open("out").read(), "err": open("err").read(), "heavy": heavy}
    with open("answers", "a") as file:
        file.write(json.dumps(found) + "\\n")

for words in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        try:
            answer(words)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


def test_no_command_imports_jax_to_show_its_help_or_refuse_an_option(tmp_path):
    """JAX's import would take longer than the answer may."""
    names = [*cli.COMMANDS, *NESTED]
    lines = [[*name.split(), "--help"] for name in names]
    lines += [[*name.split(), *FIRST.get(name, []), "--bogus"] for name in names]
    command = [sys.executable, "-c", ANSWER, json.dumps(lines)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    answers = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    shown, refused = answers[: len(names)], answers[len(names) :]
    assert len(shown) == len(refused) == len(names)
    for name, found in zip(names, shown, strict=True):
        assert (found["code"], found["err"], found["heavy"]) == (0, "", []), name
        assert f"usage: arcface-jax {name}" in found["out"], name
        examples = f"\n    arcface-jax {name} "
        assert examples in found["out"] or name in ("models", "data pack"), name
    for name, found in zip(names, refused, strict=True):
        assert (found["code"], found["out"], found["heavy"]) == (2, "", []), name
        assert "--bogus" in found["err"] and "Traceback" not in found["err"], name


def test_the_program_lists_its_commands_and_its_version(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"arcface-jax {arcface_jax.__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "no command 'trian': did you mean train?"),
        (["inferrence"], "no command 'inferrence': arcface-jax --help"),
        ([], "expects one of demo, train"),
        (["export"], "expects one of torch, onnx, stablehlo, safetensors, hub"),
        (["export", "onx"], "arcface-jax export has no command 'onx': did you mean onnx?"),
        (["import", "center"], "did you mean centers?"),
        (["data", "inspect", "faces", "--threads", "-1"], "-1 must be 0 or more"),
        (["data", "split", "faces", "a", "--seed", "-1"], "-1 must be 0 or more"),
        (["data", "to-tfds", "faces", "a", "--shard-images", "0"], "0 must be 1 or more"),
        (["data", "align", "faces", "a", "--quality", "900"], "900 must be 1 to 100"),
        (["protocol", "groups", "--threads", "0"], "0 must be 1 or more"),
        (
            ["export", "safetensors", "--checkpoint", "w", "--output", "b.pth"],
            "end in .safetensors",
        ),
    ],
)
def test_a_wrong_command_is_answered_with_what_is_near(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_an_unknown_option_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "demo", "--optimizer.lerning-rate", "1"])
    assert stop.value.code == 2
    assert "--optimizer.learning-rate" in capsys.readouterr().err


def test_positional_arguments_are_shown_by_what_they_are(capsys):
    for words, usage in {
        "data pack": "PATH OUTPUT",
        "data align": "PATH OUTPUT",
        "import centers read": "SOURCE",
        "verify": "FIRST SECOND",
        "recipes": "NAME",
        "status": "WORKDIR",
        "protocol": "PROTOCOL",
    }.items():
        with pytest.raises(SystemExit):
            cli.main([*words.split(), "--help"])
        line = capsys.readouterr().out.splitlines()[0]
        assert line.startswith("usage: ") and usage in line and "STR" not in line, words


def test_importing_the_package_imports_nothing_heavy():
    code = """
import sys
import arcface_jax
import arcface_jax.cli
light = {"jax", "flax", "numpy", "cv2", "torch", "pydantic", "tyro"} & set(sys.modules)
assert not light, light
from arcface_jax import Config
assert Config().seed == 0 and "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_public_api_is_found_in_either_order():
    """`arcface_jax.train` is a module and a function; both are the same object."""
    code = """
import arcface_jax
from arcface_jax import Embedder, train
from arcface_jax.train import train as function
import arcface_jax.train as module
assert arcface_jax.train is train is module and callable(train)
assert Embedder.__name__ == "Embedder"
try:
    train(arcface_jax.Config())
except arcface_jax.errors.UserError as error:
    assert "workdir" in str(error), error
try:
    arcface_jax.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


def test_result_has_seconds_and_files_at_the_end(capsys):
    @command
    def body(value: int) -> Result:
        if value < 0:
            raise UserError("value -1 must be positive")
        print("words")
        return Result({"value": value}, [Path("a")], code=3, reported=value > 0)

    assert body(1) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last.removeprefix("RESULT ")) == {"value": 1, "seconds": 0.0, "files": ["a"]}
    assert body(0) == 3
    assert "RESULT" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        body(-1)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: value -1 must be positive\n"


@pytest.mark.parametrize(
    ("number", "name", "expected"),
    [
        (errno.ENOSPC, None, "cannot write the output: No space left on device. Free disk space"),
        (errno.EROFS, "a/b", "cannot write a/b: Read-only file system. Make the disk writable"),
        (errno.EACCES, "a/b", "cannot use a/b: Permission denied. Change its permissions"),
        (errno.EISDIR, "a/b", "cannot use a/b: Is a directory. It is a folder: name a file"),
        (errno.EISDIR, None, None),
        (errno.ECHILD, "a/b", None),
    ],
)
def test_a_path_or_disk_that_cannot_be_used_ends_in_one_line(number, name, expected, capsys):
    with pytest.raises(SystemExit if expected else OSError) as stop, errors.reported():
        raise OSError(number, "in the library's words", name)
    if expected:
        assert isinstance(stop.value, SystemExit) and stop.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {expected}")


@pytest.mark.parametrize(
    ("module", "usage"),
    [
        ("convert.to_torch", "--checkpoint PATH"),
        ("convert.from_torch", "--weight PATH"),
        ("convert.to_onnx", "--normalization"),
        ("convert.to_stablehlo", "--output PATH"),
        ("convert.centers", "{read,write}"),
    ],
)
def test_the_commands_of_convert_work_in_a_checkout(module: str, usage: str):
    command = [sys.executable, "-W", "error", "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m {module}" in done.stdout and usage in done.stdout


def test_a_module_of_convert_that_is_no_command_is_one_line():
    command = [sys.executable, "-m", "convert.from_onnx", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "convert.from_onnx is not a command: use `arcface-jax import`" in done.stderr


def test_a_module_of_convert_without_a_successor_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"convert\.trained has no successor"):
        importlib.import_module("convert.trained")


def test_imports_from_convert_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"convert\.weights is now arcface_jax\.convert"):
        from convert import weights
    with pytest.warns(DeprecationWarning, match=r"convert\.to_torch is now arcface_jax\.convert"):
        from convert import to_torch
    from arcface_jax import convert

    assert weights.load and to_torch.export
    assert to_torch is convert.to_torch


@pytest.mark.parametrize(
    "name", ["train", "status", "evaluate", "inference", "data", "plan", "doctor"]
)
def test_the_scripts_of_a_checkout_have_their_own_names(name: str):
    command = [sys.executable, f"scripts/{name}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: {name}.py" in done.stdout
