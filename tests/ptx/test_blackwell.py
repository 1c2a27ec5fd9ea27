"""Tensor memory, its products and the barriers that tell when they are done."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptx.launches import Run
from ptx.memory import Fault
from ptx.snippets import image, run, small_integers, zeros
from ptx.test_hopper import copied, descriptor, registers, stored

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
LAYOUTS = {128: 2, 64: 4, 32: 6}  # of the swizzle in a descriptor
THREADS = 128
# Bytes at the start of shared memory: the address of tensor memory, an mbarrier, and room up to a
# multiple of the largest swizzled block.
SMALL = 1024

ALLOCATE = """mov.b32 %r1, global_smem;
setp.lt.u32 %p7, %r0, 32;
setp.eq.s32 %p6, %r0, 0;
@%p7 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 256;
add.s32 %r6, %r1, 8;
@%p6 mbarrier.init.shared::cta.b64 [%r6], 1;
bar.sync 0;
ld.shared.b32 %r7, [global_smem];
bar.sync 0;
"""
FREE = """bar.sync 0;
@%p6 mbarrier.inval.shared::cta.b64 [%r6];
@%p7 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
@%p7 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r7, 256;
"""
# The address of a warp's own 32 rows, in the high half.
OWN = "shr.u32 %r8, %r0, 5;\nshl.b32 %r8, %r8, 21;\nadd.s32 %r8, %r8, %r7;\n"
COMMIT = "@%p6 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r6];\n"
# As Triton 3.6 spells it.
UNSPACED_COMMIT = """cvt.u64.u32 %rd30, %r6;
@%p6 tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%rd30];
"""


def wait(parity: int) -> str:
    return f"""mov.b32 %r9, {parity};
{{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r6], %r9;
    @!complete bra.uni waitLoop;
}}
"""


def shared_descriptor(register: str, place: int, along: int, across: int, width: int) -> str:
    high = 1 << 46 | LAYOUTS[width] << 61
    high -= 1 << 64 if high >> 63 else 0
    code = descriptor(register, place, along, across, 0)
    return code + f"or.b64 {register}, {register}, {high};\n"


def word(kind: str, m: int, n: int, flips: tuple[int, int] = (0, 0)) -> int:
    """Return the descriptor of an instruction whose sums are float32."""
    one = int(kind == "bf16")
    return (
        1 << 4
        | one << 7
        | one << 10
        | flips[0] << 15
        | flips[1] << 16
        | n // 8 << 17
        | m // 16 << 24
    )


def multiplied(left: str, description: int, keep: str) -> str:
    code = f"mov.b32 %r10, {description};\nmov.pred %p1, {keep};\n"
    return code + f"@%p6 tcgen05.mma.cta_group::1.kind::f16 [%r7+0], {left}, %rd21, %r10, %p1;\n"


LOAD = "tcgen05.ld.sync.aligned.32x32b.x{n}.b32 {into}, [%r8+0];\ntcgen05.wait::ld.sync.aligned;\n"
PROXY = "fence.proxy.async.shared::cta;\nbar.sync 0;\n"


def padded(elements: Tensor, dtype: torch.dtype) -> Tensor:
    size = -(-elements.numel() // (2 * THREADS)) * 2 * THREADS
    return torch.cat((elements, torch.zeros(size - elements.numel()))).to(dtype)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize(
    ("n", "width", "flips"),
    [(16, 32, (0, 0)), (32, 128, (1, 1)), (64, 64, (0, 1)), (128, 128, (1, 0)), (64, 32, (1, 1))],
)
def test_both_matrices_in_shared_memory(m: int, kind: str, n: int, width: int, flips) -> None:
    """The second product adds to the first. 64 rows of sums are the first 16 of each 32."""
    matrices = [small_integers(m, 16, seed=0), small_integers(n, 16, seed=1)]
    code, images, place = ALLOCATE + OWN, [], SMALL
    for i, (matrix, flip) in enumerate(zip(matrices, flips, strict=True)):
        elements, along, across = image(matrix, width, transposed=bool(flip))
        images.append(padded(elements, DTYPES[kind]))
        code += copied(f"%rd{i}", 2 * images[-1].numel(), place)
        code += shared_descriptor(f"%rd{20 + i}", place, along, across, width)
        place += 2 * images[-1].numel()
    code += PROXY + multiplied("%rd20", word(kind, m, n, flips), "0") + COMMIT + wait(0)
    code += multiplied("%rd20", word(kind, m, n, flips), "-1") + UNSPACED_COMMIT
    code += wait(1).replace("shared::cta", "shared")
    code += LOAD.format(n=n, into=registers(100, n)) + stored("%rd2", 100, n) + FREE
    out = zeros(THREADS, n)
    made = run(code, capability=100, threads=THREADS, shared=place, a=images[0], b=images[1],
               out=out)  # fmt: skip
    rows = range(128) if m == 128 else [i for i in range(128) if i % 32 < 16]
    assert torch.equal(out[list(rows)], 2 * matrices[0] @ matrices[1].T)
    assert not made.faults()
    assert made.traffic["tensor-core operations"] == 2 * 2 * m * n * 16


def test_a_left_matrix_in_tensor_memory() -> None:
    """Its 16 elements of a row are 8 columns."""
    a, b = small_integers(128, 16, seed=4), small_integers(32, 16, seed=5)
    elements, along, across = image(b, 32, transposed=False)
    right = padded(elements, torch.bfloat16)
    code = ALLOCATE + OWN + copied("%rd1", 2 * right.numel(), SMALL)
    code += shared_descriptor("%rd21", SMALL, along, across, 32)
    code += "mul.wide.u32 %rd10, %r0, 32;\nadd.s64 %rd11, %rd0, %rd10;\n"
    code += "".join(f"ld.global.b32 %r{20 + i}, [%rd11+{4 * i}];\n" for i in range(8))
    code += f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r8+64], {registers(20, 8)};\n"
    code += "tcgen05.wait::st.sync.aligned;\n" + PROXY
    code += multiplied("[%r7+64]", word("bf16", 128, 32), "0") + COMMIT + wait(0)
    code += LOAD.format(n=32, into=registers(100, 32)) + stored("%rd2", 100, 32) + FREE
    out = zeros(THREADS, 32)
    made = run(code, capability=100, threads=THREADS, shared=SMALL + 2 * right.numel(),
               a=a.bfloat16(), b=right, out=out)  # fmt: skip
    assert torch.equal(out, a @ b.T)
    assert not made.faults()


def test_half_a_warp_may_reach_further_columns_of_16_rows() -> None:
    """What 16x32bx2 stores is read back by 32x32b, row by row."""
    store = "tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r8+0], 4, {%r20, %r21, %r22, %r23};\n"
    code = ALLOCATE + OWN
    code += "".join(f"mad.lo.s32 %r{20 + i}, %r0, 10, {i};\n" for i in range(4)) + store
    code += "tcgen05.wait::st.sync.aligned;\n"
    code += LOAD.format(n=8, into=registers(100, 8)) + stored("%rd0", 100, 8)
    code += "tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {%r30, %r31, %r32, %r33}, [%r8+0], 4;\n"
    code += stored("%rd1", 30, 4) + FREE
    rows, back = zeros(THREADS, 8, dtype=torch.int32), zeros(THREADS, 4, dtype=torch.int32)
    run(code, capability=100, threads=THREADS, shared=SMALL, rows=rows, back=back)
    for thread in range(THREADS):
        warp, lane = divmod(thread, 32)
        stored_there = [thread * 10 + i for i in range(4)]
        assert back[thread].tolist() == stored_there
        columns = slice(4 * (lane // 16), 4 * (lane // 16) + 4)
        assert rows[32 * warp + lane % 16, columns].tolist() == stored_there


# Hazards and faults

ONES = torch.ones(2048, dtype=torch.bfloat16)
COPY = copied("%rd0", 4096, SMALL)
DESCRIBE = shared_descriptor("%rd20", SMALL, 0, 256, 32) + shared_descriptor(
    "%rd21", SMALL, 0, 256, 32
)
START = ALLOCATE + OWN + COPY + DESCRIBE
PRODUCT = multiplied("%rd20", word("bf16", 128, 128), "0")


def launched(body: str) -> Run:
    return run(body, capability=100, threads=THREADS, shared=SMALL + 4096, x=ONES)


def hazards(body: str) -> set[str]:
    return {what for what, *_ in launched(START + body).hazards}


@pytest.mark.parametrize(
    ("hazard", "before"),
    [
        ("a product reads what no fence.proxy.async made visible to it", "bar.sync 0;\n"),
        ("write, then read", "fence.proxy.async.shared::cta;\n"),
    ],
)
def test_products_read_what_a_fence_and_a_barrier_made_visible(hazard: str, before: str) -> None:
    assert hazard in hazards(before + PRODUCT + COMMIT + wait(0))
    assert hazards(PROXY + PRODUCT + COMMIT + wait(0)) == set()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (START + PROXY + PRODUCT + wait(0), "all threads that are left wait for an mbarrier"),
        (START + PROXY + PRODUCT + COMMIT + wait(1) + wait(0) + wait(1), "all threads that are le"),
        (START + "add.s32 %r6, %r6, 8;\n" + wait(0), "no mbarrier was made there: mbarrier.try"),
        (START + LOAD.format(n=2, into=registers(100, 2)).replace("+0", "+255"),
         "columns that are not allocated: tcgen05.ld"),
        (START + LOAD.format(n=1, into="%r100").replace("%r8", "%r7"),
         "a warp reaches rows of another"),
        (START + "@%p7 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r7, 256;\n" + PROXY + PRODUCT,
         "columns that are not allocated: @%p6 tcgen05.mma"),
    ],
    ids=lambda value: value if value.count("\n") == 0 else "",
)  # fmt: skip
def test_what_a_gpu_stops_at_or_never_ends_is_a_fault(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        launched(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (multiplied("%rd20", word("bf16", 128, 128) | 1 << 3, "0"), "instruction descriptor 0x"),
        (multiplied("%rd20", word("bf16", 128, 128) & ~(1 << 7), "0"), "factors of two types"),
        (multiplied("%rd20", word("bf16", 96, 128), "0"), "a product of 96 rows"),
        ("mov.b64 %rd20, 0;\n" + PRODUCT, "the matrix descriptor 0x0"),
    ],
)
def test_descriptors_of_another_form_are_refused(body: str, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        launched(START + PROXY + body)
