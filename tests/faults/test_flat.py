"""A long run holds no more memory, descriptors and threads than a short one."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from arcface_jax import config as c
from arcface_jax import train
from arcface_jax.training.run import Run


class Held(NamedTuple):
    """What this process holds."""

    mebibytes: float
    descriptors: int
    threads: int


def held() -> Held:
    status = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    kibibytes = int(fields["VmRSS"].split()[0])
    descriptors = len(os.listdir("/proc/self/fd"))
    return Held(kibibytes / 1024, descriptors, int(fields["Threads"]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads open files in /proc")
def test_1500_steps_hold_no_more_than_500(tmp_path, monkeypatch):
    seen: dict[int, Held] = {}
    log_step = Run.log_step

    def noting(run: Run, metrics) -> dict[str, float]:
        seen[run.done] = held()
        return log_step(run, metrics)

    monkeypatch.setattr(Run, "log_step", noting)
    config = c.Config(
        workdir=str(tmp_path / "run"),
        devices=1,
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=2,
            synthetic=c.SyntheticConfig(
                identities=10, images_per_identity=10, pairs=20, pair_identities=4
            ),
        ),
        model=c.ModelConfig(network="r_tiny", dtype="float32", embedding_size=32, bn_batch_size=2),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        schedule=c.ScheduleConfig(epochs=30),
        evaluation=c.EvaluationConfig(targets=("synthetic",), batch_size=8, every_epochs=5),
        checkpoint=c.CheckpointConfig(every_epochs=2),
        logging=c.LoggingConfig(every_steps=20),
    )
    assert train.train(config).step == 1500
    early = [held for step, held in seen.items() if 300 <= step <= 500]
    late = [held for step, held in seen.items() if step > 1300]
    # Savers and readers come and go, so the most of several moments is compared.
    for field in ("descriptors", "threads"):
        assert max(getattr(x, field) for x in late) <= max(getattr(x, field) for x in early) + 4
    # The state has 8 MiB, and a batch less than one.
    assert max(x.mebibytes for x in late) <= max(x.mebibytes for x in early) + 100
