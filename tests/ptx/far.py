"""Kernels on tensors whose elements lie more than 2^31 elements apart; part of `sample`.

They compute the same bits as from the same numbers side by side. The tensors are views of sparse
files, of which only their elements take room, and an address that is computed in 32 bits is a
fault.
"""

from __future__ import annotations

import torch

from derta_kernels.head_loss.row_pass_triton import row_pass_triton
from packs import packed, results, tensors
from ptx import compiled
from ptx.snippets import far

BEYOND = 2**31 + 2**10  # elements


def rows() -> None:
    """Run the row pass over three rows, the last one of which begins past 2^31 logits."""
    generator = torch.Generator().manual_seed(0)
    near = (3 * torch.randn(3, 1008, generator=generator)).bfloat16()
    tokens = torch.randint(1008, (3, 2), generator=generator)
    logits = far(near.shape, (BEYOND // 2 // 16 * 16, 1), near.dtype)
    logits.copy_(near)
    results = [
        (*row_pass_triton(x, tokens, torch.ones(3, 2), None, 1.0, True), x) for x in (near, logits)
    ]
    assert all(map(torch.equal, *results))


def attention(tokens: int, token_stride: int) -> None:
    """Attend with the last tokens and the last head of q, k and v past 2^31 elements."""
    row = packed([(tokens - 5, [(9, 5)])])
    # Near, the kernels are those that `sample` has compiled.
    near = tensors(row, dtype=torch.bfloat16, heads=3, kv_heads=3, width=64, value_width=64)
    apart = dict(near)
    for name in "qkv":
        x = near[name].detach()
        # The stride of heads has 32 bits: its product with a head's number has not.
        apart[name] = far(x.shape, (1, token_stride, 2**30 + 2**13, 1), x.dtype)
        apart[name].copy_(x).requires_grad_()
    assert all(map(torch.equal, *(results(x, impl="triton") for x in (near, apart))))


def main(capability: int) -> None:
    """Run all cases as compiled for a compute capability."""
    for name, function in {
        "row pass": rows,
        "attention": lambda: attention(140, 2**24),
        "attention, copied": lambda: attention(40, 2**26),
    }.items():
        with compiled.kernels(capability) as runs:
            function()
        assert not [fault for run in runs for fault in run.faults()]
        print(f"{capability}, far {name}")
