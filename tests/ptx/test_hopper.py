"""Products of warpgroups: fragments, layouts of shared memory, hazards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptx.launches import Run
from ptx.memory import Fault
from ptx.snippets import image, run, small_integers, zeros

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
MODES = {128: 1, 64: 2, 32: 3}  # of the swizzle in a descriptor
GROUP = 128  # threads


def copied(tensor: str, size: int, place: int) -> str:
    """Copy `size` bytes of a tensor to a place in shared memory, by 128 threads."""
    assert size % (4 * GROUP) == 0
    code = "mov.b32 %r1, global_smem;\nmad.lo.s32 %r2, %r0, 4, %r1;\nmul.wide.u32 %rd10, %r0, 4;\n"
    code += f"add.s64 %rd11, {tensor}, %rd10;\n"
    for at in range(0, size, 4 * GROUP):
        code += f"ld.global.b32 %r3, [%rd11+{at}];\nst.shared.b32 [%r2+{place + at}], %r3;\n"
    return code


def descriptor(register: str, place: int, along: int, across: int, mode: int) -> str:
    """Set a register to the descriptor of a matrix; distances are in bytes."""
    high = (along >> 4) << 16 | (across >> 4) << 32 | mode << 62
    high -= 1 << 64 if high >> 63 else 0
    return (
        f"add.s32 %r4, %r1, {place};\nbfe.u32 %r5, %r4, 4, 14;\ncvt.u64.u32 %rd12, %r5;\n"
        f"or.b64 {register}, %rd12, {high};\n"
    )


def registers(first: int, number: int) -> str:
    return "{" + ",".join(f"%r{first + i}" for i in range(number)) + "}"


def stored(tensor: str, first: int, number: int) -> str:
    """Store each thread's registers side by side."""
    code = f"mul.wide.u32 %rd10, %r0, {4 * number};\nadd.s64 %rd11, {tensor}, %rd10;\n"
    return code + "".join(f"st.global.b32 [%rd11+{4 * i}], %r{first + i};\n" for i in range(number))


FENCES = "fence.proxy.async.shared::cta;\nbar.sync 0;\nwgmma.fence.sync.aligned;\n"
DONE = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
D = 100  # the first register of sums


def multiplied(n: int, kind: str, left: str, flips: str, keep: str) -> str:
    return (
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {registers(D, n // 2)}, "
        f"{left}, %rd21, {keep}, 1, 1, {flips};\n"
    )


def fragments(matrix: Tensor) -> Tensor:
    """Return what each of 128 threads holds of a left matrix (64, 16), as the PTX ISA has it."""
    held = []
    for thread in range(GROUP):
        row, t = thread // 32 * 16 + thread % 32 // 4, thread % 4
        held.append(
            [matrix[row + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)] for i in range(8)]
        )
    return torch.tensor(held)


def sums(out: Tensor, n: int) -> Tensor:
    """Return (64, n) sums from what each thread holds of them."""
    matrix = torch.full((64, n), torch.nan)
    for thread in range(GROUP):
        row, t = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for i in range(n // 2):
            matrix[row + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2] = out[thread, i]
    return matrix


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("n", [16, 32, 64, 128, 256])
def test_a_left_matrix_in_registers(n: int, kind: str) -> None:
    """The second product adds to the first, whose sums were nothing yet."""
    a, b = small_integers(64, 16, seed=0), small_integers(n, 16, seed=1)
    right, along, across = image(b, 32, transposed=False)
    size = max(2 * right.numel(), 4 * GROUP)
    code = copied("%rd1", size, 0)
    code += "mul.wide.u32 %rd10, %r0, 16;\nadd.s64 %rd11, %rd0, %rd10;\n"
    code += "".join(f"ld.global.b32 %r{20 + i}, [%rd11+{4 * i}];\n" for i in range(4))
    code += descriptor("%rd21", 0, along, across, MODES[32]) + "mov.pred %p1, 0;\n" + FENCES
    left = registers(20, 4)
    code += multiplied(n, kind, left, "0", "0") + "mov.pred %p1, -1;\n"
    code += multiplied(n, kind, left, "0", "%p1") + DONE + stored("%rd2", D, n // 2)
    out = zeros(GROUP, n // 2)
    padded = torch.zeros(size // 2, dtype=DTYPES[kind])
    padded[: right.numel()] = right.to(DTYPES[kind])
    made = run(code, capability=90, threads=GROUP, shared=size,
               a=fragments(a).to(DTYPES[kind]), b=padded, out=out)  # fmt: skip
    assert torch.equal(sums(out, n), 2 * a @ b.T)
    assert not made.faults()
    assert made.executed.sum() > 0


@pytest.mark.parametrize("width", [128, 64, 32])
@pytest.mark.parametrize("flips", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_both_matrices_in_shared_memory(width: int, flips: tuple[int, int]) -> None:
    """A transposed matrix has the depth of the product across its rows."""
    n = 64
    a, b = small_integers(64, 16, seed=2), small_integers(n, 16, seed=3)
    images, places, code = [], [], ""
    for i, (matrix, flip) in enumerate(zip((a, b), flips, strict=True)):
        elements, along, across = image(matrix, width, transposed=bool(flip))
        place = 0 if i == 0 else 2 * images[0].numel()
        images.append(elements.bfloat16())
        places.append(place)
        code += copied(f"%rd{i}", 2 * elements.numel(), place)
        code += descriptor(f"%rd{20 + i}", place, along, across, MODES[width])
    code += FENCES + multiplied(n, "bf16", "%rd20", f"{flips[0]}, {flips[1]}", "0")
    code += DONE + stored("%rd2", D, n // 2)
    out = zeros(GROUP, n // 2)
    size = 2 * sum(x.numel() for x in images)
    made = run(code, capability=90, threads=GROUP, shared=size, a=images[0], b=images[1], out=out)
    assert torch.equal(sums(out, n), a @ b.T)
    assert not made.faults()


# Hazards

COPY = copied("%rd0", 2048, 0)
BARRIER, PROXY = "bar.sync 0;\n", "fence.proxy.async.shared::cta;\n"
ORDER = "wgmma.fence.sync.aligned;\n"
DESCRIBE = descriptor("%rd20", 0, 0, 256, 3) + descriptor("%rd21", 0, 0, 256, 3)
PRODUCT = multiplied(64, "bf16", "%rd20", "0, 0", "0")
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;\n", "wgmma.wait_group.sync.aligned 0;\n"
READ = f"add.f32 %r10, %r{D}, %r{D};\n"
SET = f"mov.b32 %r{D}, 0;\n"
WRITE = "st.shared.b32 [%r2], %r0;\n"
INCREASE = multiplied(64, "bf16", "%rd20", "0, 0", "%p1")
START = COPY + DESCRIBE + "mov.pred %p1, -1;\n"


def hazards(body: str) -> set[str]:
    x = torch.ones(1024, dtype=torch.bfloat16)
    made: Run = run(START + body, capability=90, threads=GROUP, shared=2048, x=x)
    return {what for what, *_ in made.hazards}


UNFENCED = "a product reads what no fence.proxy.async made visible to it"


@pytest.mark.parametrize(
    ("hazard", "with_it", "without"),
    [
        (UNFENCED, BARRIER + ORDER + PRODUCT + DONE, PROXY + BARRIER + ORDER + PRODUCT + DONE),
        (
            "write, then read",
            PROXY + ORDER + PRODUCT + DONE,
            PROXY + BARRIER + ORDER + PRODUCT + DONE,
        ),
        (
            "reads a register that a product under way will set",
            PROXY + BARRIER + ORDER + PRODUCT + COMMIT + READ,
            PROXY + BARRIER + ORDER + PRODUCT + COMMIT + WAIT + READ,
        ),
        (
            "sets a register that a product under way will set",
            PROXY + BARRIER + ORDER + PRODUCT + COMMIT + SET,
            PROXY + BARRIER + ORDER + PRODUCT + COMMIT + WAIT + SET,
        ),
        (
            "writes what a product under way reads",
            PROXY + BARRIER + ORDER + PRODUCT + COMMIT + BARRIER + WRITE,
            PROXY + BARRIER + ORDER + PRODUCT + COMMIT + WAIT + BARRIER + WRITE,
        ),
        (
            "read, then write",
            PROXY + BARRIER + ORDER + PRODUCT + COMMIT + WAIT + WRITE,
            PROXY + BARRIER + ORDER + PRODUCT + COMMIT + WAIT + BARRIER + WRITE,
        ),
        (
            "sums were touched after the last wgmma.fence",
            PROXY + BARRIER + ORDER + PRODUCT + DONE + SET + INCREASE + DONE,
            PROXY + BARRIER + ORDER + PRODUCT + DONE + SET + ORDER + INCREASE + DONE,
        ),
        (  # also sums that start from zero
            "sums were touched after the last wgmma.fence",
            PROXY + BARRIER + ORDER + PRODUCT + DONE + READ + PRODUCT + DONE,
            PROXY + BARRIER + ORDER + PRODUCT + DONE + READ + ORDER + PRODUCT + DONE,
        ),
        (
            "a product before the first wgmma.fence",
            PROXY + BARRIER + PRODUCT + DONE,
            PROXY + BARRIER + ORDER + PRODUCT + DONE,
        ),
    ],
    ids=lambda value: value if value.count("\n") == 0 else "",
)
def test_hazards_of_products(hazard: str, with_it: str, without: str) -> None:
    assert hazard in hazards(with_it)
    assert hazards(without) == set()


def test_products_of_one_shape_may_follow_one_another_without_a_wait() -> None:
    body = PROXY + BARRIER + ORDER + PRODUCT + INCREASE + COMMIT
    assert hazards(body + INCREASE + COMMIT + WAIT + READ) == set()
    later = body + INCREASE + COMMIT + "wgmma.wait_group.sync.aligned 1;\n" + READ
    assert "reads a register that a product under way will set" in hazards(later)


def test_a_matrix_that_leaves_shared_memory_is_a_fault() -> None:
    far = descriptor("%rd20", 1024, 0, 256, 3)
    with pytest.raises(Fault, match="outside of the shared memory: wgmma"):
        hazards(far + PROXY + BARRIER + ORDER + PRODUCT + DONE)


def test_threads_that_give_different_descriptors_are_a_fault() -> None:
    own = "cvt.u64.u32 %rd13, %r0;\nadd.s64 %rd20, %rd20, %rd13;\n"
    with pytest.raises(Fault, match="threads of a warpgroup give different descriptors"):
        hazards(own + PROXY + BARRIER + ORDER + PRODUCT + DONE)
