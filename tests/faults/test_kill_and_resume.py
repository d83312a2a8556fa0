"""A training that is killed again and again comes to the same weights."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_runs_come_to_the_same_weights(capsys):
    path = Path(__file__).parent / "kill_and_resume.py"
    spec = importlib.util.spec_from_file_location("kill_and_resume", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--kills", "4", "--seed", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert result["equal"] and result["kills"] == 4 and result["during_a_save"] > 0
