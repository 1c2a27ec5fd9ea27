"""Each hazard that the interpreter looks for, in a kernel that has it and one that has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptx.launches import Run
from ptx.memory import Fault
from ptx.processor import Options
from ptx.snippets import run, zeros

PLACES = """mov.b32 %r1, global_smem;
mad.lo.s32 %r2, %r0, 4, %r1;
sub.s32 %r3, 63, %r0;
mad.lo.s32 %r4, %r3, 4, %r1;
mul.wide.u32 %rd10, %r0, 4;
add.s64 %rd11, %rd0, %rd10;
"""  # %r2 and %r4: the words of a thread and of the one opposite, in another warp of two


def hazards(body: str, **options: Any) -> set[str]:
    """Return the hazards of a body that 64 threads run, with 1 KiB of shared memory."""
    arguments: dict[str, Any] = dict(threads=64, shared=1024, x=zeros(64, dtype=torch.int32))
    made = run(PLACES + body, **arguments | options)
    return {what for what, *_ in made.hazards}


SYNC = "bar.sync 0;\n"
STORE, LOAD = "st.shared.b32 [%r2], %r0;\n", "ld.shared.b32 %r5, [%r4];\n"
STORE_OPPOSITE = "st.shared.b32 [%r4], %r3;\n"
ALL_READ = STORE + SYNC + "ld.shared.b32 %r5, [%r1];\n"
LAST_WRITES = "setp.eq.s32 %p1, %r0, 63;\n@%p1 st.shared.b32 [%r1], %r0;\n"
# An asynchronous copy of 4 bytes a thread.
COPY = "cp.async.ca.shared.global [%r2], [%rd11], 4;\ncp.async.commit_group;\n"
WAIT = "cp.async.wait_group 0;\n"
OWN = "ld.shared.b32 %r5, [%r2];\n"


@pytest.mark.parametrize(
    ("hazard", "with_it", "without"),
    [
        ("write, then read", STORE + LOAD, STORE + SYNC + LOAD),
        ("read, then write", STORE + SYNC + LOAD + STORE, STORE + SYNC + LOAD + SYNC + STORE),
        # Warps 0 and 1 read one word, and warp 1 writes it.
        ("read, then write", ALL_READ + LAST_WRITES, ALL_READ + SYNC + LAST_WRITES),
        ("write, then write", STORE + STORE_OPPOSITE, STORE + SYNC + STORE_OPPOSITE),
        ("write, then read", COPY + WAIT + LOAD, COPY + WAIT + SYNC + LOAD),
        ("touches an asynchronous copy under way", COPY + OWN, COPY + WAIT + OWN),
        (
            "touches an asynchronous copy under way",
            COPY + COPY.replace("%r2", "%r2+256") + "cp.async.wait_group 1;\n"
            + OWN.replace("%r2", "%r2+256"),
            COPY + COPY.replace("%r2", "%r2+256") + "cp.async.wait_group 1;\n" + OWN,
        ),
        ("reads what nobody wrote", OWN, STORE + OWN),
        (
            "lanes write different values to one place",
            "st.shared.b32 [%r1], %r0;\n",
            "setp.eq.s32 %p1, %r0, 0;\n@%p1 st.shared.b32 [%r1], %r0;\n",
        ),
    ],
    ids=lambda value: value if value.count("\n") == 0 else "",
)  # fmt: skip
def test_hazards_in_shared_memory(hazard: str, with_it: str, without: str) -> None:
    assert hazard in hazards(with_it)
    assert hazards(without) == set()


@pytest.mark.parametrize("late", [True, False])
def test_copies_land_at_their_wait_or_at_their_issue(late: bool) -> None:
    """Both orders are possible: a kernel that is right computes the same in both."""
    values, out = torch.arange(64, dtype=torch.int32), zeros(64, dtype=torch.int32)
    store = "mul.wide.u32 %rd12, %r0, 4;\nadd.s64 %rd13, %rd1, %rd12;\nst.global.b32 [%rd13], %r5;"
    early = Options(late_copies=late, checks=False)
    run(PLACES + COPY + OWN + store, threads=64, shared=1024, options=early, x=values, y=out)
    assert out.tolist() == ([-1] * 64 if late else values.tolist())
    run(PLACES + COPY + WAIT + OWN + store, threads=64, shared=1024, options=early, x=values, y=out)
    assert torch.equal(out, values)


def test_a_copy_of_no_bytes_fills_with_zeros() -> None:
    values, out = torch.arange(64, dtype=torch.int32), zeros(64, dtype=torch.int32)
    code = "setp.lt.s32 %p1, %r0, 8;\nselp.b32 %r6, 4, 0, %p1;\n"
    code += "cp.async.ca.shared.global [%r2], [%rd11], 4, %r6;\ncp.async.commit_group;\n" + WAIT
    code += OWN + "add.s64 %rd13, %rd1, %rd10;\nst.global.b32 [%rd13], %r5;"
    assert not run(PLACES + code, threads=64, shared=256, x=values, y=out).faults()
    assert out.tolist() == [*range(8), *[0] * 56]


WRITE_GLOBAL = "st.global.b32 [%rd11], %r0;\n"
READ_OPPOSITE = "sub.s64 %rd12, %rd0, %rd10;\nld.global.b32 %r5, [%rd12+252];\n"


def test_a_barrier_orders_global_memory_within_a_cta_only() -> None:
    assert "write, then read" in hazards(WRITE_GLOBAL + READ_OPPOSITE)
    assert hazards(WRITE_GLOBAL + SYNC + READ_OPPOSITE) == set()
    found = hazards(WRITE_GLOBAL + SYNC + READ_OPPOSITE, grid=2)
    assert {"write, then read"} <= found


def test_outputs_that_nobody_wrote_are_counted() -> None:
    code = PLACES + "setp.lt.s32 %p1, %r0, 60;\n@%p1 st.global.b32 [%rd11], %r0;"
    made = run(code, threads=64, outputs=["x"], x=zeros(64, dtype=torch.int32))
    assert made.unwritten == {"x": 2 * 4}  # units of two bytes
    assert made.faults() == ["snippet, sm_80: 8 units of x are not written"]


def test_outputs_are_not_read_as_they_were() -> None:
    assert hazards("ld.global.b32 %r5, [%rd11];\n", outputs=["x"]) == {"reads what nobody wrote"}
    assert hazards("ld.global.b32 %r5, [%rd11];\n") == set()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b64 %rd5, [%rd11];", "misaligned by 4: ld.global.b64"),
        ("ld.global.b32 %r5, [%rd11+4];", "1 of 64 lanes outside of any tensor's elements"),
        ("ld.global.b32 %r5, [%rd10];", "64 of 64 lanes outside of any tensor's elements"),
        ("st.shared.b32 [%r2+772], %r0;", "1 of 64 lanes outside .* at 0x400: st.shared.b32"),
        (
            "setp.lt.s32 %p1, %r0, 40;\n@%p1 shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;",
            "a warp diverges at @%p1 shfl.sync.bfly.b32",
        ),
        (
            "setp.lt.s32 %p1, %r0, 40;\n@%p1 bra $here;\n$wait:\nbar.sync 0;\n$here:\n"
            "setp.lt.s32 %p1, %r0, 40;\n@!%p1 bra $there;\n$again:\nbra.uni $last;\n$there:\n"
            "mov.b32 %r5, 1;\n$last:\nbar.sync 0;",
            "a barrier that not all threads reach",
        ),
        ("div.s32 %r5, %r0, 0;", "division by 0: div.s32 %r5, %r0, 0"),
        ("@%p9 mov.b32 %r5, 1;", "%p9 is read before anything is in it"),
    ],
)
def test_what_a_gpu_stops_at_is_a_fault(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        hazards(body)


def test_elements_around_a_view_are_out_of_bounds() -> None:
    whole = torch.arange(66, dtype=torch.int32)
    code = PLACES + "ld.global.b32 %r5, [%rd11];"
    run(code, threads=64, x=whole[1:65])
    with pytest.raises(Fault, match="1 of 64 lanes outside of any tensor's elements"):
        run(code, threads=64, x=whole[2:65])
    every_other = torch.arange(128, dtype=torch.int32)[::2]
    with pytest.raises(Fault, match="32 of 64 lanes outside of any tensor's elements"):
        run(code, threads=64, x=every_other)


def test_traffic_is_counted_in_sectors_and_wavefronts() -> None:
    def counts(body: str) -> dict[str, int]:
        x: Tensor = zeros(64 * 8, dtype=torch.int32)
        options = Options(stats=True)
        made: Run = run(PLACES + body, threads=32, shared=4096, options=options, x=x)
        return dict(made.traffic)

    near = counts("ld.global.b32 %r5, [%rd11];")
    assert near["global load sectors"] == 4 and near["global load bytes"] == 128
    far = "mul.wide.u32 %rd12, %r0, 32;\nadd.s64 %rd13, %rd0, %rd12;\nld.global.b32 %r5, [%rd13];"
    assert counts(far)["global load sectors"] == 32
    assert counts("st.shared.b32 [%r2], %r0;")["shared store wavefronts"] == 1
    # 32 words that lie in one bank
    one_bank = "mad.lo.s32 %r6, %r0, 128, %r1;\nst.shared.b32 [%r6], %r0;"
    assert counts(one_bank)["shared store wavefronts"] == 32
    wide = "mad.lo.s32 %r6, %r0, 16, %r1;\nst.shared.v4.b32 [%r6], {%r0, %r0, %r0, %r0};"
    assert counts(wide)["shared store wavefronts"] == 4
