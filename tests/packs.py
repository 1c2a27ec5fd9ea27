"""Packs for tests of attention: small ones, every sequence they stand for, and random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from derta_kernels.attention import interval_attention


@dataclass(frozen=True)
class Packed:
    """One batch row: visible_until and position_ids, and every sequence that it stands for.

    sequences: indices of the row's tokens, in order; own: how many of the last ones are new.
    """

    visible_until: list[int]
    position_ids: list[int]
    bounds: tuple[tuple[int, int], ...]
    sequences: list[tuple[list[int], int]]


def packed(examples: list[tuple[int, list[tuple[int, int]]]]) -> Packed:
    """Examples of a trunk's length and branches (cut, length), cuts counted from the start.

    Written token by token, to be read beside the rule: a branch that is cut at c sees the first c
    tokens of the trunk and itself.
    """
    until: list[int] = []
    positions: list[int] = []
    bounds = []
    sequences = []
    for trunk, branches in examples:
        start = len(until)
        branches = sorted(branches, reverse=True)
        positions += range(trunk)
        sequences.append((list(range(start, start + trunk)), trunk))
        ends = []
        for cut, length in branches:
            first = len(positions)
            positions += range(cut, cut + length)
            ends.append(len(positions))
            own = list(range(first, first + length))
            sequences.append((list(range(start, start + cut)) + own, length))
        for token in range(trunk):
            readers = [end for end, (cut, _) in zip(ends, branches, strict=True) if cut > token]
            until.append(max(readers, default=start + trunk))
        if trunk:
            until[start] = len(positions)
        for end, (_, length) in zip(ends, branches, strict=True):
            until += [end] * length
        bounds.append((start, len(until)))
    return Packed(until, positions, tuple(bounds), sequences)


BRANCHED = packed([(9, [(3, 4), (6, 1), (6, 5)]), (1, []), (7, []), (5, [(5, 3)])])
PLAIN = packed([(6, []), (11, [])])


@st.composite
def rows(draw: st.DrawFn, longest_trunk: int = 8, longest_branch: int = 4) -> Packed:
    examples = []
    for _ in range(draw(st.integers(1, 3))):
        trunk = draw(st.integers(1, longest_trunk))
        branch = st.tuples(st.integers(1, trunk), st.integers(1, longest_branch))
        examples.append((trunk, draw(st.lists(branch, max_size=3))))
    return packed(examples)


def tensors(
    row: Packed,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 6,
    value_width: int = 5,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """q, k, v that require gradients, visible_until and position_ids, by argument name."""
    generator = torch.Generator().manual_seed(0)
    count = len(row.visible_until)

    def normal(heads: int, width: int) -> Tensor:
        values = torch.randn(1, count, heads, width, generator=generator, dtype=torch.float64)
        return (2 * values).to(dtype).requires_grad_()

    return dict(
        q=normal(heads, width),
        k=normal(kv_heads, width),
        v=normal(kv_heads, value_width),
        visible_until=torch.tensor([row.visible_until], dtype=torch.int32),
        position_ids=torch.tensor([row.position_ids]),
    )


def with_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of the inputs for an upstream gradient that is not constant.

    It is the same in all dtypes, rounded to the coarsest of them.
    """
    upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).bfloat16()
    upstream = upstream.to(output).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def results(arguments: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Attend, and return output and gradients of q, k, v."""
    output = interval_attention(**arguments, **options)
    return with_gradients(output, [arguments[name] for name in "qkv"])


def oracle(arguments: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Return the results of the definition in float64."""
    exact = {name: x.double() if name in "qkv" else x for name, x in arguments.items()}
    return results(exact, impl="reference", **options)


def distance(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))
