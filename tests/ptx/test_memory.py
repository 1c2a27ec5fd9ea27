"""Memory is sparse, and addresses have 64 bits."""

from __future__ import annotations

import pytest
import torch

from ptx.memory import PAGE, Fault, GlobalMemory
from ptx.snippets import far, run

BEYOND = 2**31 + 2**10  # elements


def test_only_pages_with_elements_take_room() -> None:
    x = far((3, 8), (BEYOND, 1), torch.float32)
    x.copy_(torch.arange(24.0).view(3, 8))
    memory = GlobalMemory([x])
    assert len(memory.data) == 3 * PAGE
    memory.load(x)
    copy = x.clone()
    x.zero_()
    memory.store(x)
    assert torch.equal(x, copy)
    assert memory.address(x[2]) - memory.address(x) == 2 * BEYOND * 4


# The thread's number times the stride, as an offset of its row: in 64 bits, and in 32.
WIDE = "mul.wide.u32 %rd10, %r0, {stride};\nshl.b64 %rd11, %rd10, 1;\n"
NARROW = "mul.lo.s32 %r5, %r0, {stride};\ncvt.s64.s32 %rd10, %r5;\nshl.b64 %rd11, %rd10, 1;\n"
SET = "add.s64 %rd12, %rd0, %rd11;\nmov.b16 %rs1, 7;\nst.global.b16 [%rd12], %rs1;"


def test_an_offset_past_2_to_the_31_elements_needs_64_bits() -> None:
    stride = BEYOND // 31
    x = far((32,), (stride,), torch.int16)
    run(WIDE.format(stride=stride) + SET, x=x)
    assert x.tolist() == [7] * 32
    with pytest.raises(Fault, match="1 of 32 lanes outside of any tensor's elements"):
        run(NARROW.format(stride=stride) + SET, x=x)


def test_views_of_one_storage_keep_their_distance_and_others_have_room_between() -> None:
    whole, other = torch.zeros(100), torch.zeros(100)
    memory = GlobalMemory([whole[10:20], whole[50:], other])
    assert memory.address(whole[50:]) - memory.address(whole[10:20]) == 160
    assert abs(memory.address(other) - memory.address(whole)) >= 2 * PAGE
    assert memory.allowed.sum() == 2 * (10 + 50 + 100)
