"""`python -m benchmarks gpu` to its end at toy sizes, in parts, and after failures."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from arcface_jax.errors import UserError
from arcface_jax.machine import hlo
from benchmarks import gpu, gpu_item
from benchmarks.gpu import Gpu

CPU = {"platform": "cpu", "bytes_limit": None, "device": "a CPU", "devices": 1, "jax": "0"}


def test_an_item_is_measured_in_a_process_of_its_own(tmp_path):
    (toy,) = [item for item in gpu.items("toy") if item.kind == "head"]
    answer = gpu._ask(toy, Gpu(sizes="toy", output=tmp_path), limit=300)
    assert answer["seconds"] > 0 and answer["kernels"] > 10
    assert answer["compiled_bytes"] > answer["temporary_bytes"] > 0
    assert sum(answer["share_of_time"].values()) == pytest.approx(1)


def test_a_failure_is_told_by_its_last_lines():
    impossible = gpu.Item("impossible", "head", classes=100, batch=-1)
    assert "exit code 1" in gpu._ask(impossible, Gpu(), limit=300)["failed"]


def test_the_heads_forms_are_measured_in_one_process(tmp_path):
    (toy,) = [item for item in gpu.items("toy") if item.kind == "forms"]
    answer = gpu._ask(toy, Gpu(sizes="toy", output=tmp_path), limit=300)
    assert {"scaled 16,384", "powers 8,192", "unit 8,192"} <= set(answer["forms"])
    assert all(seconds > 0 for seconds in answer["forms"].values())


def test_a_profile_is_summed_by_kind_and_part():
    """Of a loop and three convolutions, compiled for an H100."""
    programs = Path(__file__).parents[1] / "machine" / "programs"
    parts = gpu_item._parts(hlo.parse((programs / "convolution.hlo").read_text()))
    assert parts["cudnn_conv_1"] == "convolutions"
    # A library's kernel is known by its instruction, XLA's in a CUDA graph by its name.
    events = [
        SimpleNamespace(name=name, start_ns=start, duration_ns=ns, stats=[("hlo_op", instruction)])
        for name, start, ns, instruction in (
            ("sm90_xmma_fprop", 0, 60, "cudnn-conv.1"),
            ("sm90_xmma_fprop", 60, 30, "command_buffer"),
            ("copy_1", 80, 20, "command_buffer"),
            ("nvjet_tst", 150, 50, "command_buffer"),
        )
    ]
    parts["copy_1"] = "batch_norm_elementwise"
    lines = [
        SimpleNamespace(name="Stream #13(Compute)", events=events[:2]),
        SimpleNamespace(name="Stream #14(Memcpy)", events=events[2:]),
        SimpleNamespace(name="XLA Ops", events=events),  # the same again
    ]
    planes = [SimpleNamespace(name="/device:GPU:0", lines=lines)]
    planes.append(SimpleNamespace(name="/device:GPU:1", lines=lines))
    kernels = gpu_item._kernels(SimpleNamespace(planes=planes))
    found = gpu_item.summary(kernels, parts)
    assert found["kernels"] == pytest.approx(4 / 3)  # of three steps
    assert found["busy"] == pytest.approx(150 / 200)  # 80 to 90 is covered twice
    milliseconds = {name: 3e9 * s for name, s in found["seconds_by_part"].items()}
    assert milliseconds == pytest.approx(
        {"convolutions": 60, "batch_norm_elementwise": 20, "unknown": 80}
    )
    longest = [(kernel["name"], kernel["part"]) for kernel in found["longest_kernels"]]
    assert longest[0] == ("sm90_xmma_fprop", "convolutions")
    assert ("sm90_xmma_fprop", "unknown") in longest
    shares = {"convolutions": 90 / 160, "copies": 20 / 160, "matrix products": 50 / 160}
    assert found["share_of_time"] == pytest.approx(shares)


def test_a_failed_profile_keeps_the_times(tmp_path, monkeypatch):
    def profile(*arguments):
        raise ValueError("no such thing")

    monkeypatch.setattr(gpu_item, "_profile", profile)
    (toy,) = [item for item in gpu.items("toy") if item.kind == "head"]
    found = gpu_item.measure(toy, tmp_path)
    assert found["seconds"] > 0 and found["profile_failed"] == "ValueError: no such thing"


def test_a_form_that_fails_leaves_the_others(monkeypatch):
    (toy,) = [item for item in gpu.items("toy") if item.kind == "forms"]
    compile_one = gpu_item._head

    def head(item, *, block_form, block_size):
        if block_form == "powers":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return compile_one(item, block_form=block_form, block_size=block_size)

    monkeypatch.setattr(gpu_item, "_head", head)
    monkeypatch.setattr(gpu_item, "_FORMS", (("powers", 8192), ("scaled", 8192)))
    found = dict(gpu_item._forms(toy))
    assert found["powers 8,192"] == "RESOURCE_EXHAUSTED: out of memory"
    assert found["scaled 8,192"] > 0
    report = {"answers": {toy.name: {"forms": found}}}
    titles = {str(table.title): table for table in gpu._tables([toy], report)}
    assert titles["ms of the head by form and block size"].row_count == 1
    assert titles["other answers"].row_count == 1


@pytest.mark.slow
def test_toys_run_to_the_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "_machine", lambda: CPU)  # else JAX starts once more
    gpu.main(Gpu(sizes="toy", output=tmp_path))
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert outcome["left"] == []
    step, head = (outcome["answers"][name] for name in ("r50, 1 M ids", "head, 1.25 M ids"))
    assert step["seconds"] > 0 and head["seconds"] > 0
    assert step["kernels"] > 100 and step["busy"] > 0
    assert sum(step["share_of_time"].values()) == pytest.approx(1)
    assert step["share_of_time"]["convolutions"] > 0
    assert step["compiled_bytes"] > step["temporary_bytes"] > head["temporary_bytes"]
    assert "skipped" in outcome["answers"]["tests"]["outcome"]
    assert "--reference" in outcome["answers"]["arcface_torch, r50, 1 M ids"]["left_out"]
    longest = step["longest_kernels"]
    assert len(longest) > 10 and longest[0]["seconds"] >= longest[-1]["seconds"] > 0
    assert sum(step["seconds_by_part"].values()) > longest[0]["seconds"]
    kept = {path.name for path in (tmp_path / "programs").iterdir()}
    assert {"r50_1_M_ids.txt.gz", "r50_1_M_ids.xplane.pb", "head_1.25_M_ids.txt.gz"} <= kept
    page = (tmp_path / "gpu.md").read_text()
    assert "| r50, 1 M ids |" in page and "device a CPU" in page


@pytest.fixture
def asked(monkeypatch):
    """The names of the items that are measured; every measurement is a second, or fails."""
    asked = []

    def answer(item, arguments, *, limit, memory):
        asked.append(item.name)
        return {"failed": "out of memory"} if item.name == "vit_b" else {"seconds": 1.0}

    monkeypatch.setattr(gpu, "_machine", lambda: CPU | {"platform": "gpu"})
    monkeypatch.setattr(gpu, "_ask", answer)
    return asked


def test_what_there_is_no_time_for_is_measured_by_the_next_call(tmp_path, asked, monkeypatch):
    clock = iter(range(0, 10**6, 100))  # each look at the clock is 100 s later
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    wanted = [item.name for item in gpu.items("real") if item.devices == 1]
    wanted.remove("arcface_torch, r50, 1 M ids")  # no checkout is named
    calls = 0
    while gpu.run(Gpu(output=tmp_path))["left"]:
        calls += 1
    assert calls > 2
    assert sorted(asked) == sorted(wanted)  # each of them once
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["answers"]["r50, 1 M ids, 8 GPUs"] == {"left_out": "needs 8 GPUs, here are 1"}
    assert "| vit_b | out of memory |" in (tmp_path / "gpu.md").read_text()


def test_failures_are_measured_again_when_asked_for(tmp_path, asked):
    gpu.run(Gpu(output=tmp_path))
    asked.clear()
    gpu.run(Gpu(output=tmp_path))
    assert asked == []
    gpu.run(Gpu(output=tmp_path, again=("failed", "r50, 10 M ids")))
    assert asked == ["vit_b", "r50, 10 M ids"]


def test_real_sizes_need_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_machine", lambda: CPU)
    with pytest.raises(UserError, match=r"JAX runs on cpu here.*--sizes toy"):
        gpu.run(Gpu(output=tmp_path))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collectives"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("sm90_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32", "convolutions"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("gemm_fusion_dot_12", "matrix products"),
        ("MemcpyD2D", "copies"),
        ("loop_convert_fusion_6", "elementwise"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "convolutions"),
        ("input_reduce_fusion_3", "reductions"),
        ("loop_add_fusion", "elementwise"),
        ("unheard_of", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name, kind):
    assert gpu_item.kind(name) == kind
