"""The table of docs/distillation.md, from the workdirs of runs that are complete."""

import json

import pytest

from arcface_jax.errors import UserError
from benchmarks import distillation
from benchmarks.distillation import Case


def finish(output, case: Case, *, accuracy: float, tar: float, mixed: float | None = None) -> None:
    """What a complete run leaves behind."""
    workdir = output / case.name
    workdir.mkdir(parents=True)
    lines = [{"step": 0, "train/chance_loss": 9.0}]
    for epoch in range(1, case.epochs + 1):
        share = epoch / case.epochs
        line = {"step": 10 * epoch, "eval/lfw_dev/accuracy": 0.5 + share * (accuracy - 0.5)}
        lines.append(line | {"eval/lfw_dev/tar@far=1e-2": share * tar})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "result.json").write_text(json.dumps({"mixed": mixed}))


def test_table_gain_and_picture_are_of_the_complete_runs(tmp_path, monkeypatch):
    output, docs = tmp_path / "runs", tmp_path / "docs"
    finish(output, Case("taught", 0), accuracy=0.9, tar=0.7)
    finish(output, Case("alone", 0), accuracy=0.8, tar=0.4)
    finish(output, Case("taught", 1), accuracy=0.88, tar=0.72)
    finish(output, Case("alone", 1), accuracy=0.84, tar=0.5)
    finish(output, Case("taught", 2), accuracy=0.99, tar=0.99)  # its other half is not complete
    finish(output, Case("compatible", 0), accuracy=0.89, tar=0.6, mixed=0.95)
    page = docs / "distillation.md"
    docs.mkdir()
    page.write_text(f"a\n{distillation.BEGIN}\nold\n<!-- end -->\nb\n")
    monkeypatch.setattr(distillation, "DOCS", docs)
    trained = []
    monkeypatch.setattr(distillation, "train", lambda case, **_: trained.append(case))
    gains = distillation.measure(
        data=tmp_path, teacher=tmp_path, output=output, seeds=3, write=True
    )
    assert gains["seeds"] == 2
    assert gains["gain/accuracy"] == pytest.approx(0.07)
    assert gains["gain/tar@far=1e-2"] == pytest.approx(0.26)
    assert len(trained) == len(set(trained)) == 9
    text = page.read_text()
    assert "| labels only | 5 | 2 | 0.820 (0.800, 0.840) | 0.450 (0.400, 0.500) |  |" in text
    assert "| compatible, 128 numbers | 5 | 1 | 0.890 | 0.600 | 0.950 |" in text
    assert "old" not in text and (docs / "images" / "distillation.png").stat().st_size > 5000


def test_a_failed_run_ends_the_measurement(tmp_path):
    with pytest.raises(UserError, match="ended with code 2"):
        distillation.train(
            Case("alone", 0), data=tmp_path / "none", teacher=tmp_path, output=tmp_path
        )
