"""Instructions on registers compute what the PTX ISA says, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.processor import Options
from ptx.snippets import results

INF, NAN = np.inf, np.nan
TOP, LOW = 2**31 - 1, -(2**31)
EPS = 2.0**-23
THIRD = float(np.float32(1) / np.float32(3))
BF16_1, BF16_M3 = 0x3F80, 0xC040  # 1 and -3

# instruction, types of operands and result, rows of operands and result
CASES: list[tuple[str, str, list[tuple]]] = [
    ("add.s32 {d}, {a}, {b}", "s32 s32 s32", [(TOP, 1, LOW), (5, -7, -2)]),
    ("add.s64 {d}, {a}, {b}", "s64 s64 s64", [(TOP, 1, 2**31), (-1, -1, -2)]),
    ("add.s64 {d}, {a}, -8", "s64 s64", [(3, -5)]),
    ("add.f32 {d}, {a}, {b}", "f32 f32 f32",
     [(1, EPS / 2, 1), (1, EPS, 1 + EPS), (INF, -INF, NAN)]),
    ("add.f32 {d}, {a}, 0f3F800000", "f32 f32", [(1.5, 2.5)]),
    ("add.rz.f32 {d}, {a}, {b}", "f32 f32 f32", [(1, EPS * 0.9, 1), (-1, -EPS * 0.9, -1)]),
    ("sub.s32 {d}, {a}, {b}", "s32 s32 s32", [(LOW, 1, TOP), (5, 7, -2)]),
    ("sub.f32 {d}, {a}, {b}", "f32 f32 f32", [(1, 3, -2)]),
    ("mul.lo.s32 {d}, {a}, {b}", "s32 s32 s32", [(65536, 65536, 0), (-3, 7, -21)]),
    ("mul.lo.s64 {d}, {a}, {b}", "s64 s64 s64", [(2**40, 3, 3 * 2**40)]),
    ("mul.hi.s32 {d}, {a}, {b}", "s32 s32 s32", [(65536, 65536, 1), (-1, 1, -1)]),
    ("mul.hi.u32 {d}, {a}, {b}", "u32 u32 u32", [(2**32 - 1, 2, 1)]),
    ("mul.wide.s32 {d}, {a}, {b}", "s32 s32 s64", [(LOW, 2, -(2**32)), (-1, 1, -1)]),
    ("mul.wide.u32 {d}, {a}, {b}", "u32 u32 u64", [(2**32 - 1, 2, 2**33 - 2)]),
    ("mul.wide.u16 {d}, {a}, {b}", "u16 u16 u32", [(65535, 2, 131070)]),
    ("mul.f32 {d}, {a}, {b}", "f32 f32 f32", [(3, 0.5, 1.5), (0, INF, NAN)]),
    ("mad.lo.s32 {d}, {a}, {b}, {c}", "s32 s32 s32 s32", [(65536, 65536, 5, 5), (-3, 7, 1, -20)]),
    ("mad.lo.s64 {d}, {a}, {b}, {c}", "s64 s64 s64 s64", [(2**32, 2**31, 1, -(2**63) + 1)]),
    ("mad.wide.s32 {d}, {a}, {b}, {c}", "s32 s32 s64 s64", [(TOP, 4, 1, 2**33 - 3)]),
    ("mad.wide.u32 {d}, {a}, {b}, {c}", "u32 u32 u64 u64", [(2**32 - 1, 2, 3, 2**33 + 1)]),
    # (1 + e)(1 - e) is 1 - e^2: the product alone would be rounded to 1.
    ("fma.rn.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32", [(1 + EPS, 1 - EPS, -1, -(EPS**2))]),
    # The product lies halfway between two floats, and the summand decides.
    ("fma.rn.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32",
     [(1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80, 1 + 2.0**-11 + EPS),
      (1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-80), 1 + 2.0**-11)]),
    ("fma.rm.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32",
     [(1, 1, EPS / 4, 1), (-1, 1, -EPS / 4, -1 - EPS)]),
    ("fma.rn.ftz.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32", [(2.0**-130, 1, 0, 0), (2, 3, 4, 10)]),
    ("fma.rn.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32", [(2.0**-130, 1, 0, 2.0**-130)]),
    ("fma.rn.f32.bf16 {d}, {a}, {b}, {c}", "u16 u16 f32 f32", [(BF16_1, BF16_M3, 5, 2)]),
    ("fma.rn.f32.f16 {d}, {a}, {b}, {c}", "f16 f16 f32 f32", [(1.5, -2, 5, 2)]),
    ("div.rn.f32 {d}, {a}, {b}", "f32 f32 f32", [(1, 3, THIRD), (1, 0, INF)]),
    ("div.full.f32 {d}, {a}, {b}", "f32 f32 f32", [(1, 3, THIRD), (-6, 2, -3)]),
    ("div.s32 {d}, {a}, {b}", "s32 s32 s32", [(7, 2, 3), (-7, 2, -3), (7, -2, -3), (-7, -2, 3)]),
    ("div.u32 {d}, {a}, {b}", "u32 u32 u32", [(2**32 - 1, 2, 2**31 - 1)]),
    ("rem.s32 {d}, {a}, {b}", "s32 s32 s32", [(7, 2, 1), (-7, 2, -1), (7, -2, 1)]),
    ("rcp.rn.f32 {d}, {a}", "f32 f32", [(3, THIRD), (0, INF)]),
    ("rcp.approx.ftz.f32 {d}, {a}", "f32 f32", [(4, 0.25), (2.0**-130, INF)]),
    ("ex2.approx.f32 {d}, {a}", "f32 f32", [(3, 8), (-INF, 0), (0, 1), (-130, 2.0**-130)]),
    ("ex2.approx.ftz.f32 {d}, {a}", "f32 f32", [(-1, 0.5), (-130, 0)]),
    ("lg2.approx.f32 {d}, {a}", "f32 f32", [(8, 3), (0, -INF), (-1, NAN)]),
    ("neg.f32 {d}, {a}", "f32 f32", [(1.5, -1.5), (INF, -INF)]),
    ("neg.s32 {d}, {a}", "s32 s32", [(5, -5), (LOW, LOW)]),
    ("abs.f32 {d}, {a}", "f32 f32", [(-1.5, 1.5), (2, 2)]),
    ("abs.bf16 {d}, {a}", "u16 u16", [(BF16_M3, 0x4040), (BF16_1, BF16_1)]),
    ("abs.f16 {d}, {a}", "f16 f16", [(-1.5, 1.5)]),
    ("abs.bf16x2 {d}, {a}", "u32 u32", [(0xC0403F80, 0x40403F80), (0x3F80C040, 0x3F804040)]),
    ("add.rn.f32.bf16 {d}, {a}, {b}", "u16 f32 f32", [(BF16_M3, 0.5, -2.5)]),
    ("add.rn.f32.f16 {d}, {a}, {b}", "f16 f32 f32", [(1.5, 0.5, 2)]),
    ("copysign.f32 {d}, {a}, {b}", "f32 f32 f32", [(-1, 5, -5), (1, -5, 5)]),
    ("max.f32 {d}, {a}, {b}", "f32 f32 f32", [(1, 2, 2), (NAN, 2, 2), (1, NAN, 1)]),
    ("max.NaN.f32 {d}, {a}, {b}", "f32 f32 f32", [(1, 2, 2), (NAN, 2, NAN)]),
    ("max.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32",
     [(1, 3, 2, 3), (NAN, NAN, 2, 2), (5, 3, 2, 5)]),
    ("min.f32 {d}, {a}, {b}", "f32 f32 f32", [(1, 2, 1), (NAN, 2, 2)]),
    ("max.s32 {d}, {a}, {b}", "s32 s32 s32", [(-1, 1, 1)]),
    ("max.u32 {d}, {a}, {b}", "u32 u32 u32", [(2**32 - 1, 1, 2**32 - 1)]),
    ("min.s64 {d}, {a}, {b}", "s64 s64 s64", [(2**40, -1, -1)]),
    ("and.b32 {d}, {a}, {b}", "u32 u32 u32", [(0b1100, 0b1010, 0b1000)]),
    ("or.b32 {d}, {a}, {b}", "u32 u32 u32", [(0b1100, 0b1010, 0b1110)]),
    ("xor.b32 {d}, {a}, {b}", "u32 u32 u32", [(0b1100, 0b1010, 0b0110)]),
    ("not.b32 {d}, {a}", "u32 u32", [(0xFFFF0000, 0x0000FFFF)]),
    ("and.b16 {d}, {a}, 15", "u16 u16", [(0xABCD, 13)]),
    ("or.b64 {d}, {a}, 4611686293305294848", "u64 u64", [(7, 4611686293305294855)]),
    ("shl.b32 {d}, {a}, {b}", "u32 u32 u32",
     [(1, 31, 2**31), (1, 32, 0), (3, 31, 2**31), (1, 99, 0)]),
    ("shl.b64 {d}, {a}, 33", "u64 u64", [(3, 3 * 2**33)]),
    ("shl.b16 {d}, {a}, 12", "u16 u16", [(0x1234, 0x4000)]),
    ("shr.u32 {d}, {a}, {b}", "u32 u32 u32", [(2**31, 31, 1), (2**31, 32, 0)]),
    ("shr.s32 {d}, {a}, {b}", "s32 u32 s32", [(LOW, 31, -1), (LOW, 99, -1), (-8, 1, -4)]),
    ("bfe.u32 {d}, {a}, 4, 8", "u32 u32", [(0xABCDE, 0xCD)]),
    ("bfe.s32 {d}, {a}, 4, 4", "s32 s32", [(0xF0, -1), (0x70, 7)]),
    ("prmt.b32 {d}, {a}, {b}, 0x5410", "u32 u32 u32", [(0x33221100, 0x77665544, 0x55441100)]),
    ("prmt.b32 {d}, {a}, {b}, 0x7632", "u32 u32 u32", [(0x33221100, 0x77665544, 0x77663322)]),
    ("prmt.b32 {d}, {a}, {b}, 0x0009", "u32 u32 u32", [(0x00008000, 0, 0x000000FF)]),
    ("mov.b32 {d}, {a}", "f32 f32", [(1.5, 1.5)]),
    ("cvt.s64.s32 {d}, {a}", "s32 s64", [(-5, -5)]),
    ("cvt.u64.u32 {d}, {a}", "u32 u64", [(2**32 - 5, 2**32 - 5)]),
    ("cvt.u32.u64 {d}, {a}", "u64 u32", [(2**33 + 7, 7)]),
    ("cvt.u32.u16 {d}, {a}", "u16 u32", [(65535, 65535)]),
    ("cvt.u16.u32 {d}, {a}", "u32 u16", [(65537, 1)]),
    ("cvt.rn.f32.s32 {d}, {a}", "s32 f32",
     [(2**24 + 1, 2.0**24), (2**24 + 3, 2.0**24 + 4), (-2, -2)]),
    ("cvt.rzi.s32.f32 {d}, {a}", "f32 s32", [(-2.7, -2), (1e20, TOP), (NAN, 0)]),
    ("cvt.rmi.s32.f32 {d}, {a}", "f32 s32", [(-2.2, -3)]),
    ("cvt.rni.s32.f32 {d}, {a}", "f32 s32", [(2.5, 2), (3.5, 4)]),
    ("cvt.f32.bf16 {d}, {a}", "u16 f32", [(BF16_M3, -3), (0x7F80, INF)]),
    # Ties to even: 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3 2^-8 between that and 1 + 2^-6.
    ("cvt.rn.bf16.f32 {d}, {a}", "f32 u16",
     [(1 + 2.0**-8, 0x3F80), (1 + 3 * 2.0**-8, 0x3F82), (1 + 2.0**-8 + EPS, 0x3F81),
      (NAN, 0x7FFF)]),
    ("cvt.rn.bf16x2.f32 {d}, {a}, {b}", "f32 f32 u32", [(1, -3, 0x3F80C040)]),
    ("cvt.f32.f16 {d}, {a}", "f16 f32", [(1.5, 1.5), (2.0**-24, 2.0**-24)]),
    ("cvt.rn.f16.f32 {d}, {a}", "f32 f16", [(1 + 2.0**-11, 1), (1e6, INF)]),
    ("cvt.rn.f16x2.f32 {d}, {a}, {b}", "f32 f32 u32", [(1, -2, 0x3C00C000)]),
    ("cvt.sat.f32.f32 {d}, {a}", "f32 f32", [(1.5, 1), (-0.5, 0), (0.5, 0.5), (NAN, 0)]),
    ("cvta.to.global.u64 {d}, {a}", "u64 u64", [(2**40, 2**40)]),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "kinds", "rows"), CASES, ids=[case[0] for case in CASES])
def test_an_instruction_computes_what_its_definition_says(instruction, kinds, rows) -> None:
    actual = results(instruction, kinds.split(), rows, capability=100)
    expected = np.array([row[-1] for row in rows]).astype(actual.dtype)
    np.testing.assert_array_equal(actual, expected)


def pair(low: float, high: float) -> int:
    return int(np.array([low, high], np.float32).view(np.uint64)[0])


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [("add", (4, 6)), ("sub", (-2, -2)), ("mul", (3, 8)), ("fma.rn", (8, 14))],
)
def test_pairs_of_floats_are_computed_apart(instruction, expected) -> None:
    more = ", {c}" * (instruction == "fma.rn")
    operands = [pair(1, 2), pair(3, 4), *[pair(5, 6)] * bool(more)]
    kinds = ["u64"] * (len(operands) + 1)
    actual = results(f"{instruction}.f32x2 {{d}}, {{a}}, {{b}}{more}", kinds, [operands])
    assert int(actual[0]) == pair(*expected)


COMPARISONS = {
    "eq.s32": [0, 1, 0],
    "ne.s32": [1, 0, 1],
    "lt.s32": [1, 0, 0],
    "le.s32": [1, 1, 0],
    "gt.s32": [0, 0, 1],
    "ge.s32": [0, 1, 1],
    "lt.u32": [0, 0, 0],  # -1 is the largest unsigned number
    "ge.u32": [1, 1, 1],
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_integers_are_compared(name: str) -> None:
    code = f"setp.{name} %p1, {{a}}, {{b}};\nselp.b32 {{d}}, 1, 0, %p1"
    rows = [(-1, 0), (0, 0), (1, 0)]
    assert results(code, ["s32", "s32", "s32"], rows).tolist() == COMPARISONS[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eq", [0, 1, 0]),
        ("ne", [1, 0, 0]),
        ("lt", [1, 0, 0]),
        ("ge", [0, 1, 0]),
        ("ltu", [1, 0, 1]),
        ("neu", [1, 0, 1]),
        ("nan", [0, 0, 1]),
        ("num", [1, 1, 0]),
    ],
)
def test_nan_is_like_no_number_and_passes_unordered_comparisons(name, expected) -> None:
    code = f"setp.{name}.f32 %p1, {{a}}, {{b}};\nselp.f32 {{d}}, 0f3F800000, 0f00000000, %p1"
    rows = [(1, 2), (2, 2), (NAN, 2)]
    assert results(code, ["f32", "f32", "f32"], rows).tolist() == expected


@pytest.mark.parametrize(
    ("operation", "expected"),
    [("and.pred %p3, %p1, %p2", [0, 0, 1]), ("or.pred %p3, %p1, %p2", [0, 1, 1]),
     ("xor.pred %p3, %p1, %p2", [0, 1, 0]), ("not.pred %p3, %p1", [1, 0, 0]),
     ("mov.pred %p3, %p2", [0, 0, 1]), ("mov.pred %p3, -1", [1, 1, 1])],
)  # fmt: skip
def test_predicates(operation: str, expected: list[int]) -> None:
    code = (
        "setp.ne.s32 %p1, {a}, 0;\nsetp.ne.s32 %p2, {b}, 0;\n"
        f"{operation};\nselp.b32 {{d}}, 1, 0, %p3"
    )
    assert results(code, ["s32"] * 3, [(0, 0), (1, 0), (1, 1)]).tolist() == expected


def test_a_register_is_split_and_joined_from_its_low_half() -> None:
    code = "mov.b64 {{%r60, %r61}}, {a};\nmov.b64 {d}, {{%r61, %r60}}"
    assert results(code, ["u64", "u64"], [(0x11112222_33334444,)])[0] == 0x33334444_11112222
    code = "mov.b32 {{%rs1, %rs2}}, {a};\nmov.b32 {d}, {{%rs2, %rs1}}"
    assert results(code, ["u32", "u32"], [(0x1111_2222,)])[0] == 0x2222_1111


def test_a_guard_leaves_the_other_lanes_as_they_were() -> None:
    code = (
        "mov.b32 {d}, 7;\nsetp.lt.s32 %p1, {a}, 2;\n@%p1 mov.b32 {d}, 1;\n@!%p1 add.s32 {d}, {d}, 1"
    )
    assert results(code, ["s32", "s32"], [(1,), (2,), (3,)]).tolist() == [1, 8, 8]


def test_lanes_that_diverge_meet_again() -> None:
    """A loop with as many rounds as the lane's operand says."""
    code = """mov.b32 {d}, 0;
setp.lt.s32 %p1, {a}, 1;
@%p1 bra $done;
$again:
add.s32 {d}, {d}, 10;
sub.s32 {a}, {a}, 1;
setp.gt.s32 %p1, {a}, 0;
@%p1 bra $again;
bra.uni $done;
$done:
add.s32 {d}, {d}, 1"""
    rows = [(n,) for n in range(9)]
    assert results(code, ["s32", "s32"], rows).tolist() == [10 * n + 1 for n in range(9)]


@pytest.mark.parametrize("seed", [0, 1])
def test_approximate_functions_may_be_off_always_by_the_same(seed: int) -> None:
    rows = [(x / 7,) for x in range(1, 30)]
    exact = results("ex2.approx.f32 {d}, {a}", ["f32", "f32"], rows)
    options = Options(approx_ulp=2, seed=seed)
    first, again = (
        results("ex2.approx.f32 {d}, {a}", ["f32", "f32"], rows, options=options) for _ in range(2)
    )
    ulp = np.abs(first.view(np.int32) - exact.view(np.int32))
    assert ulp.max() == 2 and (first == again).all()
    assert (results("div.rn.f32 {d}, {a}, 0f40400000", ["f32", "f32"], rows, options=options)
            == np.array(rows, np.float32)[:, 0] / np.float32(3)).all()  # fmt: skip


@pytest.mark.parametrize(
    ("last", "fused"),
    [("add.f32 {d}, %r60, {c}", True), ("add.rn.f32 {d}, %r60, {c}", False),
     ("sub.f32 {d}, %r60, {c}", True), ("sub.f32 {d}, {c}, %r60", True)],
)  # fmt: skip
def test_contraction_fuses_products_with_sums_that_have_no_rounding_mode(last, fused) -> None:
    sign = -1 if last.startswith("add") else 1
    rows = [(1 + EPS, 1 - EPS, sign * 1.0)]
    code, kinds = "mul.f32 %r60, {a}, {b};\n" + last, ["f32"] * 4
    assert results(code, kinds, rows)[0] == 0
    found = results(code, kinds, rows, options=Options(contract=True))[0]
    expected = EPS**2 if "{c}, %r60" in last else -(EPS**2)
    assert found == (expected if fused else 0)
