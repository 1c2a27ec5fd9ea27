"""The interface of every row pass: both walks at once, or each by itself.

The first walk over a row of logits summarises it; losses and the second walk, which leaves the
gradient in the logits' place, need nothing else. Where ranks hold the vocabulary in shards, the
summaries of all shards are merged between the walks (`shards`). A summary has 3 + K numbers in the
dtype computed in:

    highest     the highest logit z, never below the lowest finite number
    ones        how many terms exp(z - highest) are 1
    rest        the sum of the other terms
    z           of each of the row's K tokens; -inf for a token of another shard

A sparse backward pass (`sparse`) needs two figures of each row's blocks of `TILE` columns, the last
of which may be narrower: the largest |gradient| and the sum of |gradient|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128  # columns of a block; as many rows make a tile
SIZES = 2**18  # of the gradient, that are formed at a time: a MiB of float32, as an L2 cache holds


class RowPass(NamedTuple):
    """An implementation of the row pass; `row_pass_torch` documents the arguments.

    Attributes:
        whole: (logits, tokens, token_weight, softcap, logit_scale, form_gradient) -> logsumexp,
            nll; both walks, of rows that are whole.
        first_walk: (logits, tokens, softcap, logit_scale) -> summary (C, 3 + K); of a shard, whose
            logits stay as they are.
        second_walk: (logits, tokens, token_weight, summary, softcap, logit_scale, form_gradient) ->
            logsumexp, nll; of a shard, given the merged summary.
        with_blocks: (logits, tokens, token_weight, softcap, logit_scale) -> logsumexp, nll, blocks
            (C, 2, ceil(V / TILE)); `whole` with the gradient, and the figures of its blocks.
    """

    whole: Callable[[Tensor, Tensor, Tensor, float | None, float, bool], tuple[Tensor, Tensor]]
    first_walk: Callable[[Tensor, Tensor, float | None, float], Tensor]
    second_walk: Callable[
        [Tensor, Tensor, Tensor, Tensor, float | None, float, bool], tuple[Tensor, Tensor]
    ]
    with_blocks: Callable[
        [Tensor, Tensor, Tensor, float | None, float], tuple[Tensor, Tensor, Tensor]
    ]


def then_blocks(
    whole: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[[Tensor, Tensor, Tensor, float | None, float], tuple[Tensor, Tensor, Tensor]]:
    """Return a `with_blocks` that reads the gradient once more after a row pass.

    Memory: 2^18 numbers in the dtype of the logits, or one row of them if that is more.
    """

    def with_blocks(
        logits: Tensor,
        tokens: Tensor,
        token_weight: Tensor,
        softcap: float | None,
        logit_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logsumexp, nll = whole(logits, tokens, token_weight, softcap, logit_scale, True)
        return logsumexp, nll, _figures_of_blocks(logits, token_weight.dtype)

    return with_blocks


def _figures_of_blocks(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest |gradient| (C, V) of each block and their sum, (C, 2, ceil(V / TILE))."""
    count, vocabulary = gradient.shape
    blocks = gradient.new_empty(count, 2, -(-vocabulary // TILE), dtype=dtype)
    step = max(1, SIZES // vocabulary)
    for part in (slice(start, start + step) for start in range(0, count, step)):
        _put_figures(blocks[part], gradient[part].abs())  # without a name, or two would exist
    return blocks


def _put_figures(blocks: Tensor, size: Tensor) -> None:
    """Set blocks (c, 2, ceil(V / TILE)) to each block's largest of size (c, V), and its sum."""
    whole = size.shape[1] // TILE
    for columns, place in (
        (size[:, : whole * TILE].unflatten(1, (whole, TILE)), slice(None, whole)),
        (size[:, None, whole * TILE :], slice(whole, None)),
    ):
        if columns.numel():
            blocks[:, 0, place] = columns.amax(2).to(blocks.dtype)
            blocks[:, 1, place] = columns.sum(2, dtype=blocks.dtype)
