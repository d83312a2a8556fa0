"""`benchmark.py step` as a user would start it, and what its figures are counted from."""

import json

import jax
import pytest
from test_benchmark import benchmark

from arcface_jax.machine import peaks
from arcface_jax.models import registry
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import manifest, step
from benchmarks import step as benchmark_step
from benchmarks import step_table
from benchmarks.step import Case

TINY = ["step", "--network", "r_tiny", "--batch", "4", "--classes", "50", "--repeats", "1"]


def outcome(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))


@pytest.mark.slow
def test_all_parts_are_timed_beside_the_torch_twin(tmp_path, capsys):
    forms = ["--against", "torch", "--torch-forms", "plain", "channels_last"]
    benchmark(*TINY, *forms, "--output", str(tmp_path))
    found = outcome(capsys)
    rows = {(row["implementation"], row["part"]): row for row in found["measurements"]}
    assert set(rows) == {
        (who, part) for who in ("arcface_jax", "torch") for part in benchmark_step.PARTS
    }
    for (who, part), row in rows.items():
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
        ours = rows["arcface_jax", part]["seconds"]
        assert row["ratio"] == (None if who == "arcface_jax" else ours / row["seconds"])
        assert row["peak_share"] is None  # nobody knows that of this CPU
    assert set(found["torch_forms"]) == {"plain", "channels_last"}
    stored = json.loads((tmp_path / "step.json").read_text())
    assert stored["measurements"] == found["measurements"]


def test_model_flops_are_those_that_xla_counts():
    case = Case("r_tiny", 4, 50, 1, "float32")
    backbone = registry.build("r_tiny")
    images = jax.ShapeDtypeStruct((4, 112, 112, 3), "uint8")
    counted = step.make_embed(backbone).lower(*backbone.shapes, images).cost_analysis()["flops"]
    flops = benchmark_step.model_flops(case)
    # XLA leaves out products with padding, and counts what is no product.
    assert flops["forward"] == pytest.approx(counted, rel=0.1)
    assert flops["forward+backward"] == 3 * flops["forward"]
    assert flops["step"] - flops["forward+backward"] == 6 * 4 * 512 * 50


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A10G", "float16", 70e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312e12),
        ("NVIDIA A100-PCIE-40GB", "bfloat16", 312e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA A100-SXM4-80GB", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peaks_go_by_the_devices_name(kind, dtype, expected):
    assert peaks.peak(kind, dtype) == expected


@pytest.mark.slow
def test_the_host_overhead_is_reported(tmp_path, capsys):
    benchmark(*TINY, "--host-overhead", "--output", str(tmp_path))
    found = outcome(capsys)["host_overhead"]
    assert found["arrays"] > 100 and found["call_seconds"] > 0


@pytest.mark.slow
def test_the_table_counts_the_state_of_a_device():
    """Eight devices: the backbone whole, an eighth of the centers and of their momentum."""
    said = []
    rows = step_table.measure(cases=(("r_tiny", 80_000, 16),), say=said.append)
    assert len(rows) == len(said) == 8  # five compiled, three sums; nothing was published
    config = benchmark_step.make_config(Case("r_tiny", 16, 80_000, 8, "float32"))
    state = step.abstract_state(config, num_classes=80_000, mesh=meshes.make(8))
    backbone = manifest.device_bytes((state.params, state.batch_stats, state.opt_state))
    for row in rows:
        assert row.state_bytes - backbone - 2 * 4 * 512 * 80_000 // 8 in range(100)
    full, dense = (
        next(row for row in rows if row.method == name)
        for name in ("blocked full softmax, float32", "model parallel, float32")
    )
    # The logits of the whole batch over a device's classes, at least once.
    assert dense.temporary_bytes - full.temporary_bytes >= 4 * 16 * 80_000 // 8


def test_what_cannot_be_run_is_said(tmp_path, capsys):
    (tmp_path / "partial_fc_v2.py").touch()
    cases = {
        "requires CUDA": ["--reference", str(tmp_path)],
        "one device, not 2": ["--against", "torch", "--devices", "2"],
        "not of --sample-rate 0.1": ["--against", "torch", "--sample-rate", "0.1"],
        "cannot be divided by 3 devices": ["--devices", "3"],
    }
    for words, options in cases.items():
        with pytest.raises(SystemExit) as stop:
            benchmark(*TINY, *options, "--output", str(tmp_path / "out"))
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
