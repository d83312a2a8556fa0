"""The reader of compiled programs, on programs whose traffic and FLOPs are known by hand."""

from pathlib import Path

import pytest

from arcface_jax.machine import hlo

PROGRAMS = Path(__file__).parent / "programs"
F32, BF16 = 4, 2
BLOCK = 256 * 512


def read(name: str) -> hlo.Module:
    """A program that XLA:GPU compiled for an H100 (tests/support/gpu_programs.py)."""
    return hlo.parse((PROGRAMS / f"{name}.hlo").read_text())


def by_hand(body: str, *, others: str = "", header: str = "") -> hlo.Module:
    """A program with this entry computation."""
    return hlo.parse(
        f"HloModule hand\n{header}\n{others}\nENTRY %main () -> f32[] {{\n{body}\n}}\n"
    )


def test_an_elementwise_kernel_reads_its_operands_and_writes_its_result():
    (kernel,) = read("elementwise").kernels
    assert (kernel.kind, kernel.runs) == ("fusion", 1)
    assert kernel.read == 2 * 1024 * 1024 * F32
    assert kernel.written == 1024 * 1024 * F32
    assert kernel.flops == 0


def test_a_reduction_writes_what_is_left():
    (kernel,) = read("row_sums").kernels
    assert (kernel.read, kernel.written) == (4096 * 512 * BF16, 4096 * F32)


def test_a_loop_counts_slices_and_updates_as_often_as_it_runs():
    module = read("blocks")
    (loop,) = module.loops
    assert (loop.trip_count, loop.runs) == (64, 1)
    assert [str(shape) for shape in loop.carry] == [
        "s32[]",
        "f32[128]",
        "f32[16384,512]",
        "bf16[128,512]",
    ]
    kernels = {kernel.name: kernel for kernel in module.kernels}
    cast, update = kernels["loop_convert_fusion"], kernels["loop_dynamic_update_slice_fusion"]
    assert cast.runs == update.runs == 64 and cast.loops == (loop.name,)
    counter = 4  # the loop's own, int32
    assert (cast.read, cast.written) == (BLOCK * F32 + counter, BLOCK * BF16)
    assert (update.read, update.written) == (BLOCK * F32 + counter, BLOCK * F32)
    product = kernels["gemm_fusion_dot"]
    assert product.kind == "gemm" and product.dtype == "bf16"
    assert product.read == 128 * 512 * BF16 + BLOCK * BF16
    assert module.total.flops == 64 * 2 * 128 * 256 * 512
    # The array is read twice and written once over the whole loop; no copy of it is made.
    whole = 16384 * 512 * F32
    assert 64 * (cast.read + update.read + update.written) == 3 * whole + 64 * 2 * counter
    assert max(copy.bytes for copy in module.copies) < 100


def test_convolutions_and_their_gradients_take_as_many_flops_each():
    module = read("convolution")
    convolutions = [kernel for kernel in module.kernels if kernel.kind == "convolution"]
    assert len(convolutions) == 3
    for kernel in convolutions:
        assert kernel.flops == 2 * (8 * 28 * 28) * (3 * 3 * 64) * 64
        assert kernel.part == "convolutions" and kernel.dtype == "bf16"
        assert "b01f_o01i->b01f {3,2,1,0}" in kernel.detail  # NHWC
    image, weights = 8 * 28 * 28 * 64 * BF16, 3 * 3 * 64 * 64 * BF16
    assert sum(kernel.bytes for kernel in convolutions) == 6 * image + 3 * weights
    assert [copy.bytes for copy in module.copies] == [2 * weights] * 2  # HWIO to OHWI and back


def test_a_collective_is_one_kernel_with_a_place_in_the_schedule():
    module = read("sums_over_devices")
    (found,) = module.collectives
    assert (found.kind, found.bytes, found.runs, found.dtype) == (
        "all-reduce",
        1024 * 256 * F32,
        1,
        "f32",
    )
    assert (found.position, found.finished) == (0.5, 1.0)
    assert hlo.count_collectives(module.collectives) == {"all-reduce": (1, 1024 * 256 * F32)}


def test_asynchronous_collectives_count_operands_and_results_once():
    module = by_hand(
        """  %x = bf16[16,512]{1,0} parameter(0)
  %i = s32[16]{0} parameter(1)
  %ag = ((s32[16], bf16[16,512]), (s32[128], bf16[128,512])) all-gather-start(%i, %x)
  %agd = (s32[128], bf16[128,512]) all-gather-done(%ag)
  %y = f32[1024,512]{1,0} parameter(2)
  %rs = ((f32[1024,512]{1,0}), f32[128,512]{1,0}) reduce-scatter-start(%y), to_apply=%add
  %other = f32[1024,512]{1,0} copy(%y)
  ROOT %rsd = f32[128,512]{1,0} reduce-scatter-done(%rs)"""
    )
    gather, scatter = module.collectives
    assert gather.bytes == 128 * (4 + 512 * BF16) and gather.dtype == "bf16"
    assert scatter.bytes == 1024 * 512 * F32
    kernels = {kernel.name: kernel for kernel in module.kernels}
    assert kernels["ag"].read == gather.bytes // 8
    assert kernels["rs"].written == scatter.bytes // 8
    assert (scatter.position, scatter.finished) == (1 / 3, 1.0)
    assert module.total.kernels == 3


def test_generic_asynchronous_instructions_are_what_they_call():
    others = """%scatter (x: f32[80]) -> f32[10] {
  %x = f32[80]{0} parameter(0)
  ROOT %r = f32[10]{0} reduce-scatter(%x), to_apply=%add
}
%elsewhere (x: f32[80]) -> f32[80] {
  %x = f32[80]{0} parameter(0)
  ROOT %c = f32[80]{0} copy(%x)
}"""
    module = by_hand(
        """  %x = f32[80]{0} parameter(0)
  %s = ((f32[80]), f32[10], s32[]) async-start(%x), calls=%scatter
  %t = ((f32[80]), f32[80], s32[]) async-start(%x), calls=%elsewhere
  %sd = f32[10]{0} async-done(%s)
  ROOT %td = f32[80]{0} async-done(%t)""",
        others=others,
    )
    assert [(kernel.name, kernel.kind) for kernel in module.kernels] == [
        ("s", "collective"),
        ("c", "copy"),
    ]
    assert module.collectives[0].bytes == 80 * F32
    assert module.kernels[1].bytes == 2 * 80 * F32


def test_an_asynchronous_fusion_reads_what_it_slices():
    """As JAX 0.11.2's XLA wrote it for an H100."""
    module = by_hand(
        "  %stack = bf16[24,384,512]{2,1,0} parameter(0)\n"
        "  %place = s32[] parameter(1)\n"
        "  %fusion-start.2 = ((bf16[24,384,512]{2,1,0}, s32[]), bf16[1,384,512]{2,1,0}, u32[]) "
        "fusion-start(%stack, %place), kind=kLoop, calls=%taken\n"
        "  ROOT %fusion-done.2 = bf16[1,384,512]{2,1,0} fusion-done(%fusion-start.2)",
        others="%taken (p0: bf16[24,384,512], p1: s32[]) -> bf16[1,384,512] {\n"
        "  %p0 = bf16[24,384,512]{2,1,0} parameter(0)\n"
        "  %p1 = s32[] parameter(1)\n"
        "  %zero = s32[] constant(0)\n"
        "  ROOT %slice = bf16[1,384,512]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), "
        "dynamic_slice_sizes={1,384,512}\n}\n",
    )
    (kernel,) = module.kernels
    assert (kernel.kind, kernel.dtype) == ("fusion", "bf16")
    assert (kernel.read, kernel.written) == (384 * 512 * BF16 + 4, 384 * 512 * BF16)


def test_the_workspace_of_a_library_call_is_no_traffic():
    module = by_hand(
        "  %a = bf16[128,512]{1,0} parameter(0)\n"
        "  %b = bf16[512,256]{1,0} parameter(1)\n"
        "  ROOT %custom-call.1 = (f32[128,256]{1,0}, s8[33554432]{0}) custom-call(%a, %b), "
        'custom_call_target="__cublas$lt$matmul"'
    )
    (kernel,) = module.kernels
    assert kernel.kind == "gemm"
    assert (kernel.read, kernel.written) == ((128 + 256) * 512 * BF16, 128 * 256 * F32)


def test_slices_of_one_operand_are_added_and_the_same_slice_is_read_once():
    fused = """%fused (p: f32[1000]) -> (f32[10], f32[20]) {
  %p = f32[1000]{0} parameter(0)
  %a = f32[10]{0} slice(%p), slice={[0:10]}
  %again = f32[10]{0} slice(%p), slice={[0:10]}
  %sum = f32[10]{0} add(%a, %again)
  %b = f32[20]{0} slice(%p), slice={[100:120]}
  ROOT %t = (f32[10]{0}, f32[20]{0}) tuple(%sum, %b)
}"""
    module = by_hand(
        """  %p = f32[1000]{0} parameter(0)
  ROOT %f = (f32[10]{0}, f32[20]{0}) fusion(%p), kind=kLoop, calls=%fused""",
        others=fused,
    )
    (kernel,) = module.kernels
    assert (kernel.read, kernel.written) == (30 * F32, 30 * F32)


def test_a_nested_fusion_slices_for_the_outer_one():
    fused = """%inner (q: f32[1000]) -> f32[10] {
  %q = f32[1000]{0} parameter(0)
  ROOT %s = f32[10]{0} slice(%q), slice={[0:10]}
}
%outer (p: f32[1000]) -> f32[10] {
  %p = f32[1000]{0} parameter(0)
  ROOT %f = f32[10]{0} fusion(%p), kind=kLoop, calls=%inner
}"""
    module = by_hand(
        """  %p = f32[1000]{0} parameter(0)
  ROOT %f = f32[10]{0} fusion(%p), kind=kLoop, calls=%outer""",
        others=fused,
    )
    assert module.kernels[0].read == 10 * F32


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        (
            "%c = (f32[128,256]{1,0}, s8[4]{0}) custom-call(%x, %y), "
            'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}',
            2 * 128 * 256 * 512,
        ),
        (
            # Depthwise: each of 512 channels has one kernel of 3x3.
            "%c = (bf16[8,14,14,512]{3,2,1,0}, u8[0]{0}) custom-call(%image, %depthwise), "
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, feature_group_count=512, "
            'custom_call_target="__cudnn$convForward"',
            2 * (8 * 14 * 14 * 512) * 9,
        ),
        (
            "%c = (bf16[4,8,136,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), "
            'custom_call_target="__cudnn$fmhaSoftmax"',
            2 * 2 * (4 * 136 * 8 * 64) * 136,
        ),
        (
            "%c = (bf16[4,8,136,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), "
            'custom_call_target="__cudnn$fmhaSoftmaxBackward"',
            5 * 2 * (4 * 136 * 8 * 64) * 136,
        ),
    ],
    ids=["cublas", "depthwise", "attention", "attention-backward"],
)
def test_flops_of_library_calls(line: str, flops: int):
    module = by_hand(
        f"""  %x = f32[128,512]{{1,0}} parameter(0)
  %y = f32[256,512]{{1,0}} parameter(1)
  %image = bf16[8,14,14,512]{{3,2,1,0}} parameter(2)
  %depthwise = bf16[512,3,3,1]{{3,2,1,0}} parameter(3)
  %q = bf16[4,136,8,64]{{3,2,1,0}} parameter(4)
  %k = bf16[4,136,8,64]{{3,2,1,0}} parameter(5)
  {line}"""
    )
    (kernel,) = module.kernels
    assert kernel.flops == flops
    assert kernel.kind in ("gemm", "convolution", "attention")


def test_loops_of_unknown_length_and_conditionals():
    others = """%body (t: (s32[], f32[100])) -> (s32[], f32[100]) {
  %t = (s32[], f32[100]{0}) parameter(0)
  %g = f32[100]{0} get-tuple-element(%t), index=1
  %c = f32[100]{0} copy(%g)
  ROOT %r = (s32[], f32[100]{0}) tuple(%g, %c)
}
%small (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  ROOT %c = f32[100]{0} copy(%p)
}
%large (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  %c1 = f32[100]{0} copy(%p)
  ROOT %c2 = f32[100]{0} copy(%c1)
}"""
    module = by_hand(
        """  %t = (s32[], f32[100]{0}) parameter(0)
  %w = (s32[], f32[100]{0}) while(%t), condition=%cond, body=%body
  %i = s32[] parameter(1)
  %p = f32[100]{0} parameter(2)
  ROOT %b = f32[100]{0} conditional(%i, %p, %p), branch_computations={%small, %large}""",
        others=others,
    )
    assert [loop.trip_count for loop in module.loops] == [None]
    assert [kernel.name for kernel in module.kernels] == ["c", "c1", "c2"]  # the larger branch


def test_parts_are_told_by_the_python_stack():
    header = """FileNames
1 "site/arcface_jax/heads/block_passes.py"
2 "site/arcface_jax/models/layers.py"
3 "site/arcface_jax/training/step.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=2 function_name_id=1 line=1}
3 {file_name_id=3 function_name_id=1 line=1}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=2}
"""
    module = by_hand(
        """  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} negate(%p), metadata={op_name="jit(step)/neg" stack_frame_id=2}
  %b = f32[8]{0} negate(%p), metadata={op_name="jit(step)/jvp()/neg" stack_frame_id=3}
  %c = f32[8]{0} negate(%p), metadata={op_name="jit(step)/neg" stack_frame_id=1}
  %moved = f32[8]{0} copy(%a)
  ROOT %d = f32[8]{0} negate(%p)""",
        header=header,
    )
    parts = {kernel.name: kernel.part for kernel in module.kernels}
    assert parts == {
        "a": "head",
        "b": "batch_norm_elementwise",
        "c": "optimizer",
        "moved": "head",  # made by the compiler: as what it copies
        "d": "other",
    }
    assert [frame.file.split("/")[-1] for frame in module.frames[2]] == [
        "block_passes.py",
        "step.py",
    ]
    assert hlo.by_part(module.kernels)["head"].kernels == 2


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")


def test_types_have_sizes():
    sizes = {name: hlo.bits(name) for name in ("pred", "s4", "bf16", "f8e4m3fn", "u64", "c64")}
    assert sizes == {"pred": 8, "s4": 4, "bf16": 16, "f8e4m3fn": 8, "u64": 64, "c64": 64}
    assert hlo.shapes("(f8e4m3fn[16,2]{1,0}, pred[3]{0})")[0].bytes == 32
