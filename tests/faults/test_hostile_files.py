"""Hostile and randomly changed files: a part in every run of the suite, all of them when slow."""

import json
import os

import pytest
from commands import ROOT, result, run_process

# Formats whose readers import nothing large; an attack of each kind that has been successful.
QUICK = ("list", "pairs .bin", "calibration")
ATTACKS = ("code", "claims", "expansion", "nesting", "pipe", "device")
FUZZED = ("list", "RecordIO", "LMDB", "WebDataset", "pairs .bin", "embeddings", "gallery")


def test_hostile_files_end_in_a_line():
    done = run_process(["-m", "tests.faults.hostile", "--formats", *QUICK, "--attacks", *ATTACKS])
    assert done.returncode == 0, done.stdout + done.stderr
    found = result(done.stdout)
    assert found["bad"] == 0 and found["files"] > 40
    assert found["memory_mib"] < 1024


def test_changed_files_raise_nothing_but_declared_errors():
    done = run_process(["-m", "tests.faults.fuzz", "--count", "40", "--formats", *FUZZED])
    assert done.returncode == 0, done.stdout + done.stderr
    found = result(done.stdout)
    assert found["failures"] == 0 and found["read"] > 20 and found["refused"] > 20


CONTROLS = """
import os, time
import numpy as np
from arcface_jax.errors import DataError
from tests.faults import confined

def waits():
    os.mkfifo("pipe")
    return open("pipe").read()

def runs():
    while True: pass

def takes():
    return str(len(np.ones(1 << 28)))

def dies():
    os.kill(os.getpid(), 11)

def two_lines():
    raise DataError("one\\ntwo")

def one_line():
    raise DataError("one")

def raises():
    return {}["x"]

for work in (waits, runs, takes, dies, two_lines, one_line, raises, lambda: "good"):
    outcome = confined.run(work, seconds=1, memory=1 << 28)
    print(outcome.kind, outcome.bad)
"""


def test_the_watcher_notices_what_it_is_there_for(tmp_path):
    done = run_process(["-c", CONTROLS], cwd=tmp_path, env=_environment())
    assert done.stdout.splitlines() == [
        *("HANG True", "TIME True", "MEMORY True", "SIGSEGV True", "refused True"),
        *("refused False", "TRACEBACK True", "read False"),
    ], done.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


FAULT = """
import sys
from arcface_jax.evaluation import calibration
from tests.faults import fuzz

def read(path):
    raise KeyError("not a declared error")

calibration.read = read
sys.exit(fuzz.main(["--formats", "calibration", "--count", "2"]))
"""


def test_an_undeclared_error_fails_the_fuzzer():
    done = run_process(["-c", FAULT], env=_environment())
    assert done.returncode == 1
    assert "calibration, --seed 0: " in done.stdout and "not a declared error" in done.stdout


@pytest.mark.slow
def test_all_hostile_files_end_in_a_line():
    done = run_process(["-m", "tests.faults.hostile"], timeout=7200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(done.stdout)["files"] > 700


@pytest.mark.slow
def test_a_minute_of_changed_files_of_all_formats():
    done = run_process(["-m", "tests.faults.fuzz", "--minutes", "1"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))["failures"] == 0
