"""Instructions of warps, and the fragments of `mma.sync`, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx.snippets import results, run, small_integers, zeros

LANES = range(32)


@pytest.mark.parametrize(
    ("mode", "source"),
    [
        ("bfly.b32 {d}, {a}, 5, 31, -1", [lane ^ 5 for lane in LANES]),
        ("idx.b32 {d}, {a}, 9, 31, -1", [9] * 32),
        ("up.b32 {d}, {a}, 3, 0, -1", [max(lane - 3, lane if lane < 3 else 0) for lane in LANES]),
        ("down.b32 {d}, {a}, 3, 31, -1", [lane + 3 if lane < 29 else lane for lane in LANES]),
    ],
)
def test_shuffles_read_other_lanes_or_their_own_where_there_is_none(mode, source) -> None:
    rows = [(100 + lane,) for lane in LANES]
    actual = results(f"shfl.sync.{mode}", ["s32", "s32"], rows)
    assert actual.tolist() == [100 + lane for lane in source]


def test_a_shuffle_tells_which_lanes_had_a_source() -> None:
    code = "shfl.sync.down.b32 {d}|%p1, {a}, 3, 31, -1;\nselp.b32 {d}, 1, 0, %p1"
    actual = results(code, ["s32", "s32"], [(lane,) for lane in LANES])
    assert actual.tolist() == [1] * 29 + [0] * 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("min.s32", -5), ("max.s32", 26), ("min.u32", 0), ("add.s32", sum(range(-5, 27))),
     ("and.b32", 0), ("or.b32", -1), ("xor.b32", int(np.bitwise_xor.reduce(np.arange(-5, 27))))],
)  # fmt: skip
def test_reductions_of_a_warp(name: str, expected: int) -> None:
    rows = [(lane - 5,) for lane in LANES]
    actual = results(f"redux.sync.{name} {{d}}, {{a}}, -1", ["s32", "s32"], rows)
    assert actual.tolist() == [expected] * 32


def test_reductions_of_floats_pass_nan_over() -> None:
    rows = [(float(lane) if lane != 9 else np.nan,) for lane in LANES]
    for name, expected in (("min", 0), ("max", 31)):
        code = f"redux.sync.{name}.f32 {{d}}, {{a}}, -1"
        assert results(code, ["f32", "f32"], rows).tolist() == [expected] * 32


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("vote.sync.ballot.b32 {d}, %p1, -1", 0b100101),
        ("vote.sync.ballot.b32 {d}, !%p1, -1", ~0b100101),
        ("vote.sync.any.pred %p2, %p1, -1;\nselp.b32 {d}, 1, 0, %p2", 1),
        ("vote.sync.all.pred %p2, %p1, -1;\nselp.b32 {d}, 1, 0, %p2", 0),
    ],
)
def test_votes(code: str, expected: int) -> None:
    rows = [(int(lane in (0, 2, 5)),) for lane in LANES]
    actual = results("setp.ne.s32 %p1, {a}, 0;\n" + code, ["s32", "s32"], rows)
    assert actual.tolist() == [expected] * 32


def test_one_lane_is_elected() -> None:
    code = "elect.sync _|%p1, -1;\nselp.b32 {d}, 1, 0, %p1"
    actual = results(code, ["s32", "s32"], [(0,)] * 32, capability=100)
    assert actual.tolist() == [1] + [0] * 31


# Matrices of 8 x 8 elements


def to_shared(tensor: str, words: int) -> str:
    """Each of 32 lanes copies `words` words of a tensor to shared memory, %r1 its place there."""
    copies = f"mov.b32 %r2, global_smem;\nmad.lo.s32 %r1, %r0, {4 * words}, %r2;\n"
    copies += f"mul.wide.u32 %rd10, %r0, {4 * words};\nadd.s64 %rd11, {tensor}, %rd10;\n"
    for i in range(words):
        copies += f"ld.global.b32 %r3, [%rd11+{4 * i}];\nst.shared.b32 [%r1+{4 * i}], %r3;\n"
    return copies + "bar.sync 0;\n"


def from_registers(tensor: str, registers: list[str]) -> str:
    """Each lane stores its registers to a tensor, beside those of the lane before."""
    width = 4 * len(registers)
    code = f"mul.wide.u32 %rd10, %r0, {width};\nadd.s64 %rd11, {tensor}, %rd10;\n"
    return code + "".join(
        f"st.global.b32 [%rd11+{4 * i}], {register};\n" for i, register in enumerate(registers)
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_two_elements_of_a_row_or_a_column(transposed: bool) -> None:
    elements = torch.arange(4 * 64, dtype=torch.int16)
    out = zeros(32, 4, dtype=torch.int32)
    trans = ".trans" * transposed
    # Lane l gives the address of row l of the four matrices.
    code = to_shared("%rd0", 4) + "mad.lo.s32 %r5, %r0, 16, %r2;\n"
    code += f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r5];\n"
    code += from_registers("%rd1", ["%r10", "%r11", "%r12", "%r13"])
    run(code, shared=512, x=elements, y=out)
    actual = out.view(torch.int16).view(32, 4, 2)
    matrices = elements.view(4, 8, 8)
    for lane in LANES:
        for i in range(4):
            for j in range(2):
                row, column = lane // 4, lane % 4 * 2 + j
                place = (column, row) if transposed else (row, column)
                assert actual[lane, i, j] == matrices[i][place]


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_stores_what_ldmatrix_loads(transposed: bool) -> None:
    elements = torch.arange(4 * 64, dtype=torch.int16)
    out = zeros(4 * 64, dtype=torch.int16)
    trans = ".trans" * transposed
    code = to_shared("%rd0", 4) + "mad.lo.s32 %r5, %r0, 16, %r2;\n"
    code += f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r5];\n"
    code += "bar.sync 0;\n"
    code += f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r5+512], "
    code += "{%r10, %r11, %r12, %r13};\n"
    code += "bar.sync 0;\n"
    code += "".join(f"ld.shared.b32 %r2{i}, [%r1+{512 + 4 * i}];\n" for i in range(4))
    code += from_registers("%rd1", [f"%r2{i}" for i in range(4)])
    run(code, shared=1024, x=elements, y=out)
    assert torch.equal(out, elements)


def words_of(lane_elements: list[list[float]], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(lane_elements, dtype=torch.float32).to(dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_mma_multiplies_its_fragments(kind: str, dtype: torch.dtype) -> None:
    """Where elements lie is written out as the PTX ISA has it for m16n8k16."""
    a, b, c = (small_integers(*s, seed=i) for i, s in enumerate([(16, 16), (16, 8), (16, 8)]))
    left, right, sums = [], [], []
    for lane in LANES:
        g, t = lane // 4, lane % 4
        left.append(
            [
                a[g + (8 if i in (2, 3, 6, 7) else 0), t * 2 + i % 2 + (8 if i >= 4 else 0)]
                for i in range(8)
            ]
        )
        right.append([b[t * 2 + i % 2 + (8 if i >= 2 else 0), g] for i in range(4)])
        sums.append([c[g + (8 if i >= 2 else 0), t * 2 + i % 2] for i in range(4)])
    out = zeros(32, 4)
    code = ""
    for tensor, first, words in (("%rd0", 10, 4), ("%rd1", 20, 2), ("%rd2", 30, 4)):
        code += f"mul.wide.u32 %rd10, %r0, {4 * words};\nadd.s64 %rd11, {tensor}, %rd10;\n"
        for i in range(words):
            code += f"ld.global.b32 %r{first + i}, [%rd11+{4 * i}];\n"
    code += f"""mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r40, %r41, %r42, %r43}},
{{%r10, %r11, %r12, %r13}}, {{%r20, %r21}}, {{%r30, %r31, %r32, %r33}};\n""".replace(",\n", ", ")
    code += from_registers("%rd3", ["%r40", "%r41", "%r42", "%r43"])
    run(
        code,
        a=words_of(left, dtype),
        b=words_of(right, dtype),
        c=words_of(sums, torch.float32),
        d=out,
    )
    expected = a @ b + c
    for lane in LANES:
        for i in range(4):
            row, column = lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2
            assert out[lane, i] == expected[row, column]


def test_barriers_let_warps_exchange_values() -> None:
    """Each of 64 threads reads what the thread opposite wrote."""
    out = zeros(64, dtype=torch.int32)
    code = """mov.b32 %r1, global_smem;
mad.lo.s32 %r2, %r0, 4, %r1;
st.shared.b32 [%r2], %r0;
bar.sync 0;
sub.s32 %r3, 63, %r0;
mad.lo.s32 %r4, %r3, 4, %r1;
ld.shared.b32 %r5, [%r4];
"""
    made = run(code + from_registers("%rd0", ["%r5"]), threads=64, shared=256, x=out)
    assert out.tolist() == list(range(63, -1, -1)) and not made.faults()
