"""Which rows have a target, and the way to them and back: dead rows never meet the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def live_rows(tokens: Tensor, has_target: Tensor, vocabulary: int) -> Tensor | None:
    """Indices of the rows with a target, ascending; None: all rows. Checks the tokens on the way.

    Synchronisation: one transfer to the host, of the live count and the count of bad tokens.

    Args:
        tokens: (N, 2) int64, a row's next token and the refusal token.
        has_target: (N, 2) bool, which of them are targets.
        vocabulary: V.

    Raises:
        ValueError: a target outside [0, V).
    """
    live = has_target.any(1)
    out_of_range = has_target & ((tokens < 0) | (tokens >= vocabulary))
    live_count, bad_count = torch.stack((live.sum(), out_of_range.sum())).tolist()
    if bad_count:
        raise ValueError(
            f"target must lie in [0, V) = [0, {vocabulary}) or be ignore_index, "
            f"got {tokens[out_of_range][0].item()} ({bad_count} such rows)"
        )
    if live_count == len(live):
        return None
    return torch.nonzero_static(live, size=live_count).squeeze(1)


def gathered(values: Tensor, rows: Tensor | None) -> Tensor:
    """(n, ...) the values of the live rows of (N, ...)."""
    return values if rows is None else values.index_select(0, rows)


def scattered(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """(N, ...) with the live rows' values (n, ...) in their places and 0 elsewhere."""
    if rows is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, rows, values)
