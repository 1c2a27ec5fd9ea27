"""The interface of every row pass: both walks at once, or each by itself.

The first walk over a row of logits summarises it; losses and the second walk, which leaves the
gradient in the logits' place, need nothing else. Where ranks hold the vocabulary in shards, the
summaries of all shards are merged between the walks (`shards`). A summary has 3 + K numbers in the
dtype computed in:

    highest     the highest logit z, never below the lowest finite number
    ones        how many terms exp(z - highest) are 1
    rest        the sum of the other terms
    z           of each of the row's K tokens; -inf for a token of another shard
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class RowPass(NamedTuple):
    """An implementation of the row pass; `row_pass_torch` documents the arguments.

    Attributes:
        whole: (logits, tokens, token_weight, softcap, logit_scale, form_gradient) -> logsumexp,
            nll; both walks, of rows that are whole.
        first_walk: (logits, tokens, softcap, logit_scale) -> summary (C, 3 + K); of a shard, whose
            logits stay as they are.
        second_walk: (logits, tokens, token_weight, summary, softcap, logit_scale, form_gradient) ->
            logsumexp, nll; of a shard, given the merged summary.
    """

    whole: Callable[[Tensor, Tensor, Tensor, float | None, float, bool], tuple[Tensor, Tensor]]
    first_walk: Callable[[Tensor, Tensor, float | None, float], Tensor]
    second_walk: Callable[
        [Tensor, Tensor, Tensor, Tensor, float | None, float, bool], tuple[Tensor, Tensor]
    ]
