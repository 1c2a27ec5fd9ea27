"""What is proved to change nothing changes nothing, and what is needed is not proved."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ptx import launches, snippets
from ptx.equivalence import Proofs
from ptx.mutation import recorded, subjects
from ptx.parse import Instruction
from ptx.test_hopper import BARRIER, COMMIT, ORDER, PRODUCT, PROXY, READ, START, WAIT

STORE = "shl.b32 %r2, %r0, 2;\nadd.s32 %r3, %r1, %r2;\nst.shared.b32 [%r3], %r0;\n"
LOAD = "sub.s32 %r4, 63, %r0;\nshl.b32 %r5, %r4, 2;\nadd.s32 %r6, %r1, %r5;\n"
LOAD += "ld.shared.b32 %r7, [%r6];\n"
PLACE = "mov.b32 %r1, global_smem;\n"
COPY = "shl.b32 %r2, %r0, 2;\nadd.s32 %r3, %r1, %r2;\nmul.wide.u32 %rd8, %r0, 4;\n"
COPY += "add.s64 %rd9, %rd0, %rd8;\ncp.async.ca.shared.global [%r3], [%rd9], 0x4;\n"
LANDED = "cp.async.wait_all;\n"


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(snippets, "execute", lambda *given: launches.execute(*given))
    yield


def proofs(
    body: str,
    kind: str,
    capability: int = 80,
    threads: int = 64,
    proof: Callable[[Proofs, str, Instruction], str] = Proofs.of,
    **x: Tensor,
) -> list[str]:
    """Return what is proved of the mutations of a kind, in their order."""
    with recorded() as found:
        snippets.run(body, capability=capability, threads=threads, shared=2048, **x)
    (subject,) = subjects(found)
    return [
        proof(subject.proofs, one.kind, one.spoilt)
        for one in subject.mutations()
        if one.kind == kind
    ]


def test_a_barrier_is_needless_if_another_stands_on_all_ways_between_conflicts() -> None:
    x = torch.zeros(64)
    assert proofs(PLACE + STORE + BARRIER + LOAD, "barrier", x=x) == [""]
    own = LOAD.replace("sub.s32 %r4, 63, %r0", "mov.b32 %r4, %r0")
    assert all(proofs(PLACE + STORE + BARRIER + own, "barrier", x=x))
    assert all(proofs(PLACE + STORE + 2 * BARRIER + LOAD, "barrier", x=x))
    skipped = "setp.ge.s32 %p1, %r0, 0;\n@%p1 bra $over;\n" + BARRIER + "$over:\n"
    assert proofs(PLACE + STORE + BARRIER + skipped + LOAD, "barrier", x=x) == [""]


def test_a_copy_under_way_may_land_until_its_wait() -> None:
    body = PLACE + COPY + BARRIER + LANDED + BARRIER + LOAD
    early, late = proofs(body, "barrier", x=torch.zeros(64))
    assert early and not late


def test_a_fence_is_needless_if_the_sums_are_untouched_since_another() -> None:
    done = PRODUCT + COMMIT + WAIT
    x = torch.ones(1024, dtype=torch.bfloat16)
    body = START + PROXY + BARRIER + ORDER + done
    for between, is_needless in (("", True), (READ, False)):
        found = proofs(body + between + ORDER + done, "barrier", 90, 128, x=x)
        assert [bool(one) for one in found[-2:]] == [False, is_needless]


def test_a_barrier_that_orders_an_mbarrier_alone_is_told_from_one_that_orders_memory() -> None:
    make = "setp.eq.s32 %p6, %r0, 0;\nadd.s32 %r8, %r1, 1024;\n"
    make += "@%p6 mbarrier.init.shared::cta.b64 [%r8], 1;\n"
    end = "@%p6 mbarrier.inval.shared::cta.b64 [%r8];\n"
    for before, after, is_alone in (("", "", True), (STORE, LOAD, False)):
        body = PLACE + before + make + BARRIER + end + after
        assert proofs(body, "barrier", 100, x=torch.zeros(64)) == [""]
        (why,) = proofs(body, "barrier", 100, proof=Proofs.unmodelled, x=torch.zeros(64))
        assert bool(why) == is_alone


def test_a_guard_that_chooses_one_of_the_threads_with_the_same_value_changes_nothing() -> None:
    bits = "and.b32 %r2, %r0, 63;\nsetp.eq.b32 %p1, %r2, 0;\nmov.b32 %r3, 7;\n"
    store = "@%p1 st.global.b32 [%rd0], %r3;\n"
    for kind in ("guard", "comparison"):
        assert all(proofs(bits + store, kind, threads=32, x=torch.zeros(1)))
        # By size, of a value that was loaded, or if something else depends on it.
        by_size = bits.replace("eq.b32", "lt.s32").replace("%r2, 0;", "%r2, 1;")
        loaded = "ld.global.b32 %r4, [%rd0];\nadd.s32 %r2, %r0, %r4;\n" + bits.partition("\n")[2]
        assert proofs(by_size + store, kind, threads=32, x=torch.zeros(1)) == [""]
        assert proofs(loaded + store, kind, threads=32, x=torch.zeros(1)) == [""]
        chosen = "selp.b32 %r6, 1, 2, %p1;\n"
        assert proofs(bits + store + chosen, kind, threads=32, x=torch.zeros(1)) == [""]
