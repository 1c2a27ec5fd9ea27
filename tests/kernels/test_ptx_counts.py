"""What a loop asks of a multiprocessor is counted as by hand."""

from __future__ import annotations

from derta_kernels.ptx_counts import Counts, inner_loops, total

# The loop's last block comes before its first one, as LLVM likes to lay them out.
PTX = """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u32 kernel_param_1)
{
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r20, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	ld.global.b32 	%r9, [%rd1];
	shl.b32 	%r2, %r1, SHIFT;
	add.s32 	%r3, %r9, %r2;
	and.b32 	%r4, %r1, 3;
	setp.lt.s32 	%p1, %r1, 8;
	setp.lt.s32 	%p2, %r1, %r9;
	mul.wide.s32 	%rd2, %r1, STRIDE;
	add.s64 	%rd3, %rd1, %rd2;
	bra.uni 	$L__BB0_2;
$L__BB0_1:
	@%p1 st.shared.v4.b32 	[%r3+16], {%r5, %r6, %r7, %r8};
	@%p2 ld.global.v4.b32 	{%r5, %r6, %r7, %r8}, [ %rd3 + 0 ];
	@%p3 bra 	$L__BB0_3;
$L__BB0_2:
	ld.shared.b32 	%r5, [%r3];
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 	{%f1}, {%r5}, {%r6}, {%f1};
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 	{%f1}, {%r5}, %rd9, 1, 1, 1, 0;
	bra.uni 	$L__BB0_1;
$L__BB0_3:
	st.shared.b32 	[%r3], %r5;
	ret;
}
"""


def counts_of(shift: int, stride: int) -> Counts:
    ptx = PTX.replace("SHIFT", str(shift)).replace("STRIDE", str(stride))
    (counts,) = inner_loops(ptx, num_warps=4)
    return counts


def test_a_loop_without_conflicts() -> None:
    counts = counts_of(shift=4, stride=16)
    # 16 bytes of 32 lanes apart take 4 cycles a word, the 8 lanes of one store 1 cycle; 32 x 16
    # values of 2 bytes are read for the asynchronous product.
    assert counts == Counts(
        tensor_flops=4 * 2 * 16 * 8 * 16 + 2 * 64 * 32 * 16,
        instructions=4 * 5,
        wavefronts=4 * 4 + 1 + 32 * 16 * 2 // 128,
        wavefronts_needed=4 + 1 + 32 * 16 * 2 // 128,
        sectors=4 * 16,
        sectors_needed=4 * 16,
    )


def test_conflicts_and_strides_are_seen() -> None:
    counts = counts_of(shift=7, stride=64)
    assert counts.wavefronts == 4 * 32 + 8 + 8  # every lane in the same bank
    assert counts.wavefronts_needed == 4 + 1 + 8
    assert (counts.sectors, counts.sectors_needed) == (4 * 32, 4 * 16)


def test_cycles_are_those_of_the_chip_and_loops_add_up() -> None:
    counts = Counts(4096, 40, 7, 5, 3, 2)
    assert counts.cycles(80) == {"tensor": 2.0, "shared": 7, "issue": 10.0}
    assert counts.cycles(90)["tensor"] == 1.0
    assert total([counts, counts]) == Counts(8192, 80, 14, 10, 6, 4)
