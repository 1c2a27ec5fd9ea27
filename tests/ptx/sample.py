"""A sample of compiled launches, for a process without Triton's interpreter.

`python -m ptx.sample 80 90` prints a line a case: the compute capability, what was launched, and
its error over the error that is allowed. Below it is everything else that is wrong. For the first
one the cases of `far` follow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from derta_kernels.head_loss.row_pass_torch import row_pass_torch
from derta_kernels.head_loss.row_pass_triton import row_pass_triton
from packs import distance, oracle, packed, results, tensors
from ptx import compiled, far

# A tile that is seen whole, masked ones, one that a window leaves out, and an example of a token.
ROW = packed([(150, [(70, 40)]), (1, [])])


class Case(NamedTuple):
    """What the kernel gives, what is right, and what eager PyTorch gives in the same dtype."""

    name: str
    dtype: torch.dtype
    ours: Sequence[Tensor]
    exact: Sequence[Tensor]
    eager: Sequence[Tensor]

    def worst(self) -> float:
        """Return the largest error over its budget, which is twice that of eager and a rounding."""
        eps = torch.finfo(self.dtype).eps
        return max(
            distance(x.double(), right) / (2 * (distance(y.double(), right) + eps))
            for x, right, y in zip(self.ours, self.exact, self.eager, strict=True)
        )


def rows(dtype: torch.dtype) -> Case:
    """Run the row pass with a soft-cap over whole blocks and a ragged one, some rows being sure."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 2500, generator=generator)
    tokens = torch.randint(2500, (5, 2), generator=generator)
    logits[::2].scatter_(1, tokens[::2, :1], 25.0)
    logits, weight = logits.to(dtype), torch.rand(5, 2, generator=generator) + 0.5

    def results(function: Callable[..., Any], x: Tensor) -> list[Tensor]:
        x = x.clone()
        return [*function(x, tokens, weight.to(torch.promote_types(x.dtype, torch.float32)),
                          30.0, 1.0, True), x]  # fmt: skip

    exact, eager = results(row_pass_torch, logits.double()), results(row_pass_torch, logits)
    return Case("row pass", dtype, results(row_pass_triton, logits), exact, eager)


def attention(dtype: torch.dtype, head_dim: int, **options: Any) -> Case:
    """Run attention and its backward pass in the tiles of a chip."""
    given = tensors(ROW, dtype=dtype, heads=2, kv_heads=2, width=head_dim, value_width=head_dim)
    ours, eager = (results(given, impl=impl, **options) for impl in ("triton", "sdpa"))
    return Case(f"attention {options}", dtype, ours, oracle(given, **options), eager)


CASES: list[Callable[[], Case]] = [
    lambda: rows(torch.bfloat16),
    lambda: attention(torch.bfloat16, 64),
    lambda: attention(torch.float16, 32, window=40, softcap=2.0),
]


def main(capabilities: Sequence[int]) -> None:
    """Run all cases as compiled for compute capabilities."""
    for capability in capabilities:
        for made in CASES:
            with compiled.kernels(capability) as runs:
                case = made()
            print(capability, case.name, f"{len(runs)} launches", f"{case.worst():.2f}", sep=", ")
            print(*(f"  {fault}\n" for run in runs for fault in run.faults()), sep="", end="")


if __name__ == "__main__":
    main([int(one) for one in sys.argv[1:]])
    far.main(int(sys.argv[1]))
