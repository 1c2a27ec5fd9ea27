"""Text that the interpreter does not know in full is refused."""

from __future__ import annotations

import pytest
import torch

from ptx.parse import Address, parse
from ptx.snippets import TEXT, run, zeros


def kernel(body: str):
    return parse(TEXT.format(params="", threads=32, loads="", body=body))


def test_an_instruction_is_parsed_into_its_parts() -> None:
    made = kernel(
        "\t.loc\t1 9 5  // row_pass.py:9:5\n"
        "@!%p3 ld.global.v2.b32 {%r1, %r2}, [%rd1+-8];  // a comment"
    ).instructions[1]
    assert (made.op, made.suffix, made.type) == ("ld", "global.v2.b32", "b32")
    assert (made.guard, made.negated) == ("%p3", True)
    assert made.operands == (["%r1", "%r2"], Address("%rd1", -8))
    assert str(made).endswith("[%rd1+-8] (row_pass.py:9:5)")


def test_scopes_have_their_own_labels_and_registers() -> None:
    """As Triton waits for an mbarrier: twice the same names, in brackets."""
    wait = """{
    .reg .pred complete;
    waitLoop:
    setp.eq.s32 complete, %r0, %r0;
    @!complete bra.uni waitLoop;
}
"""
    made = kernel(wait + wait)
    assert list(made.labels) == ["waitLoop.1", "waitLoop.2"]
    assert made.width("%complete.1") == 1
    run(wait + wait, x=zeros(1))


def test_parameters_and_shared_variables_are_sized() -> None:
    text = TEXT.format(
        params=".param .u64 .ptr .global .align 1 a,\n.param .u32 b,\n.param .align 8 .b8 c[104]",
        threads=64,
        loads=".shared .align 16 .b8 table[48];",
        body="",
    )
    made = parse(text)
    assert made.params == [("a", 8), ("b", 4), ("c", 104)]
    assert made.threads == 64 and made.static_shared == 48
    assert made.shared == {"table": 0, "global_smem": 48}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.s32 %r1, %r0;", "does not know this form: add.s32 %r1, %r0"),
        ("add.s32 %r1, %r0, 1, 2;", "does not know this form: add.s32"),
        ("add.sat.s32 %r1, %r0, 1;", "does not know this form: add.sat.s32"),
        ("add.s32 %r1, %r0, [%rd0];", "does not know this form: add.s32"),
        ("add.s32 {%r1, %r2}, %r0, 1;", "does not know this form: add.s32"),
        ("popc.b32 %r1, %r0;", "does not know this form: popc.b32"),
        ("ld.global.nc.b32 %r1, [%rd0];", "does not know this form: ld.global.nc.b32"),
        ("ld.global.v2.b32 %r1, [%rd0];", "1 operands instead of 2: ld.global.v2.b32"),
        ("bar.sync 1;", "a barrier of a part of the threads: bar.sync 1"),
        ("shfl.sync.bfly.b32 %r1, %r0, 1, 7199, -1;", "segments of a warp"),
        ("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 15;", "a part of a warp"),
        ("wgmma.fence.sync.aligned;", "does not know this form: wgmma"),  # of 9.0 alone
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2}, [%r0];", "2 matrices instead"),
    ],
)
def test_unknown_instructions_modifiers_and_operands_are_refused(body: str, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        run(body, shared=64, x=zeros(64, dtype=torch.int32))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (".local .b8 stack[16];", "cannot parse '.local .b8 stack"),
        ("add.s32 %r1, %r0, f(1);", r"cannot parse the operand f\(1\)"),
        ("ld.global.b32 %r1, [%rd0*2];", r"cannot parse the address \[%rd0\*2\]"),
        ("%r1 = 3;", "cannot parse '%r1 = 3'"),
        ("{", "the body of the kernel is not closed"),
    ],
)
def test_what_is_no_statement_is_refused(body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel(body)


def test_a_text_has_one_entry() -> None:
    with pytest.raises(ValueError, match="the text must have one entry, got 0"):
        parse(".version 8.7\n")
