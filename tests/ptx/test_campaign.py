"""Spoilt instructions are noticed, survivors need an explanation, and nvcc's row pass is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from derta_kernels.attention import launch_configs
from ptx import campaign, cases, launches, native, snippets
from ptx.campaign import Executed, Spoilt, Survivor, Tested, complaints, tables
from ptx.mutation import recorded, subjects

# Two warps hand each other a number through swizzled shared memory; 60 of 64 threads store the sum
# of theirs and a neighbour's. The second barrier orders nothing, and no thread is near bound 100.
EXCHANGE = """
mov.b32 %r1, global_smem;
shl.b32 %r2, %r0, 2;
xor.b32 %r3, %r2, 16;
add.s32 %r4, %r1, %r3;
st.shared.b32 [%r4], %r0;
bar.sync 0;
bar.sync 0;
sub.s32 %r5, 63, %r0;
shl.b32 %r6, %r5, 2;
xor.b32 %r7, %r6, 16;
add.s32 %r8, %r1, %r7;
ld.shared.b32 %r9, [%r8];
shfl.sync.bfly.b32 %r10, %r9, 1, 31, -1;
add.s32 %r11, %r9, %r10;
mul.wide.u32 %rd10, %r0, 4;
add.s64 %rd11, %rd0, %rd10;
setp.lt.s32 %p1, %r0, 60;
setp.lt.s32 %p2, %r0, 100;
@%p1 st.global.b32 [%rd11], %r11;
"""
NEEDLESS = "no accesses that conflict stand on both sides of it without another barrier"


def test_what_is_spoilt_is_noticed_and_what_changes_nothing_survives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snippets, "execute", lambda *given: launches.execute(*given))
    out = torch.zeros(60, dtype=torch.int32)
    scale = torch.ones(1)  # results of integers have a float's rounding beside them
    with recorded() as found:
        snippets.run(EXCHANGE, threads=64, shared=1024, outputs=("out",), out=out, scale=scale)
    assert out.tolist() == [63 - i + (63 - (i ^ 1)) for i in range(60)]
    (subject,) = subjects(found)
    reasons = {subject.proofs.of(one.kind, one.spoilt) for one in subject.mutations()}
    assert reasons == {"", NEEDLESS}
    noticed = [
        (one.kind, one.spoilt.text.split()[0], subject.notices(one)) for one in subject.mutations()
    ]
    assert [one[:2] for one in noticed] == [
        ("swizzle", "xor.b32"),
        ("barrier", "bar.sync"),
        ("barrier", "bar.sync"),
        ("swizzle", "xor.b32"),
        ("shuffle", "shfl.sync.bfly.b32"),
        ("comparison", "setp.lt.s32"),
        ("bound", "setp.lt.s32"),
        ("bound", "setp.lt.s32"),
        ("comparison", "setp.lt.s32"),
        ("guard", "@%p1"),
    ]
    why = [one[2] for one in noticed]
    assert why[1:3] == [None, None]  # either barrier is enough, and that is proved
    barriers = [one.spoilt for one in subject.mutations() if one.kind == "barrier"]
    assert [subject.proofs.of("barrier", one) for one in barriers] == [NEEDLESS, NEEDLESS]
    assert why[0] == why[3] == why[4] == "out differs"
    assert all("outside of any tensor" in str(one) for one in (why[5], why[6], why[9]))
    assert why[7] == "an output is not written"  # the 60th thread no longer stores


def test_low_coverage_a_low_score_and_unexplained_survivors_are_complaints() -> None:
    well = Executed("forward", 80, "bf16", 100, 97)
    assert complaints([well], [Spoilt("forward", "D 32", 80, "wait", 10, [])]) == []
    low = Executed("forward", 90, "bf16", 100, 96)
    assert complaints([low], []) == [
        "forward, sm_90, bf16: 96 of 100 instructions are executed, under 97%"
    ]
    survivor = Survivor("bar.sync 0", "a line that no kernel has")
    bad = Spoilt("row_pass", "soft cap", 90, "wait", 5, [survivor])
    assert complaints([], [bad]) == [
        "1 of 5 mutations survive, over 10%",
        "row_pass, sm_90: no reason for a survivor, wait: bar.sync 0 (a line that no kernel has)",
    ]
    proved = replace(bad, spoilt=20, survivors=[survivor._replace(why="it is proved")])
    assert complaints([], [proved]) == []
    equivalents = Spoilt("row_pass", "soft cap", 90, "barrier", 0, [], [NEEDLESS, NEEDLESS])
    assert complaints([], [equivalents]) == []
    no_run = ("forward", "mov.b32 \t%r1, 0f00000000", "b_product = tl.dot(b_q, b_k)")
    assert campaign.is_unreachable(*no_run)
    assert not campaign.is_unreachable("row_pass", *no_run[1:])
    text = tables([well, low], [bad, equivalents], [Tested(90, 38)], 3, 2)
    assert "| forward | 97.0% | 96.0% |" in text
    assert "passed |  | 38 |" in text
    assert "One in 3 of the executed instructions of a kind, in 2 draws, spoilt" in text
    assert "| row_pass, soft cap | " in text
    assert text.count("4 of 5 (80%)") == 3  # of the kernel, of all, and of the kinds with a limit
    assert f"| 2 | barrier | {NEEDLESS} |" in text


def test_every_launch_of_attention_is_asked_for() -> None:
    rows = {
        target: launch_configs.fenced(config, target.chip)
        for target, config in launch_configs.LAUNCH_CONFIGS.items()
        if target.itemsize == 2
    }
    launched = [Executed("", 0, "", 1, 1, launch=row) for row in rows.items()]
    assert campaign.unlaunched(launched) == []
    (target, config), *others = rows.items()
    other_warps = Executed("", 0, "", 1, 1, launch=(target, config._replace(num_warps=1)))
    (missing,) = campaign.unlaunched([other_warps, *launched[1:]])
    assert missing == f"{target}, {config}: no case launches it"


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_the_cuda_row_pass_is_right() -> None:
    """The case's own assertions are the test: float64's values within the budget, no hazards."""
    runs = list(cases.rows("native", 90, torch.bfloat16, **cases.SOFTCAP, vocabularies=(1131,)))
    assert len(runs) == 2 * 6  # two tokens and three; two shards' walks, and two whole passes


def test_every_explanation_says_what_it_explains() -> None:
    for one in campaign.EXPLAINED["survivor"] + campaign.EXPLAINED["equivalent"]:
        assert one["why"] and set(one["kinds"]) <= set(campaign.KINDS)
        assert set(one) <= {"kinds", "kernels", "instruction", "line", "why"}
        assert set(one.get("kernels", [])) <= set(campaign.KERNELS)
