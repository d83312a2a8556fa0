"""Every kind of file in a workdir, damaged in every way: no traceback, no silent loss."""

import json

import pytest

from tests.faults import matrix


@pytest.mark.slow
def test_every_damage_is_answered(capsys):
    assert matrix.main([]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert result["bad"] == 0 and result["cells"] > 200
