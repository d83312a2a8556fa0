"""The table of what runs need on GPUs that are not there: its rows, and that it resumes."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from arcface_jax.errors import UserError
from arcface_jax.machine import gpu
from benchmarks import plan_table

TEXT = (Path(__file__).parents[1] / "machine" / "programs" / "elementwise.hlo").read_text()


def test_its_rows_are_the_published_table_the_networks_and_many_identities():
    jobs = plan_table.jobs()
    assert len({job.name for job in jobs}) == len(jobs) == 4 * (6 + 10 + 4)
    h100 = [job for job in jobs if job.gpu == "h100"]
    classes = {(job.case.classes, job.case.devices) for job in h100 if job.table == "large"}
    assert classes >= {(10_000_000, 8), (30_000_000, 1), (130_000_000, 8)}
    assert all(job.case.batch == 128 * job.case.devices for job in h100 if job.table != "speed")


@pytest.fixture
def starts(monkeypatch) -> list[str]:
    """The programs that were compiled; the third attempt fails."""
    found: list[str] = []

    class Fake:
        def compile(self, config, *, num_classes):
            found.append(config.model.network)
            if len(found) == 3:
                raise UserError("interrupted")
            return gpu.Program(TEXT, 2**30, 0, 0, 0, {"centers": 2**31, "batch": 2**20}, 1.0)

    @contextmanager
    def start(name, *, devices):
        yield Fake()

    monkeypatch.setattr(gpu, "compiler", start)
    return found


def test_it_resumes_where_it_stopped(starts, tmp_path, monkeypatch):
    wanted = [job for job in plan_table.jobs(("h100",)) if job.table != "large"][:4]
    told: list[str] = []
    with pytest.raises(UserError, match="interrupted"):
        plan_table.measure(wanted, tmp_path, say=told.append)
    rows = plan_table.measure(wanted, tmp_path, say=told.append)
    assert len(starts) == 5 and len(told) == len(rows) == 4  # none but the third was made twice
    assert [row.network for row in rows] == [job.case.network for job in wanted]
    first = rows[0]
    assert first.state_bytes == 2**31 and first.hbm_bytes == 12 * 2**20
    assert first.fits == {"0.75": True, "0.95": True}
    assert first.images_per_second == pytest.approx(1e3 * first.batch / first.modelled_ms)
    monkeypatch.setattr(plan_table, "program_digest", lambda: "another program")
    plan_table.measure(wanted[:1], tmp_path, say=told.append)
    assert len(starts) == 6
    (path,) = tmp_path.glob(f"{wanted[0].name}.json")
    assert json.loads(path.read_text())["program"] == "another program"


def test_tables_are_markdown_beside_the_published_figures(starts, tmp_path):
    jobs = plan_table.jobs(("h100",))
    wanted = [next(job for job in jobs if job.table == table) for table in ("speed", "large")]
    text = plan_table.markdown(plan_table.measure(wanted, tmp_path, say=lambda words: None))
    speed, large = text.split("\n\nr50 and")
    assert "| 20.3 | 2,006 |" in speed or "| 11.9 | 3,247 |" in speed
    assert "| yes | yes |" in large
    for block in (speed, large):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1
