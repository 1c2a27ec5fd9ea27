"""Live rows, those with a target. Dead rows are dropped before the first product."""

from __future__ import annotations

import torch
from torch import Tensor

# The argument of `head_loss` that each column of a row's tokens and weights comes from. The second
# may also be second_target. The third column exists only if that argument was given.
COLUMNS = ("target", "refusal_token_id", "unlikely_target")


def counted_rows(tokens: Tensor, has_target: Tensor, vocabulary: int) -> Tensor | None:
    """Return the indices of the rows with a target, ascending, or None for all rows.

    Checks that targets are tokens of the vocabulary.

    Synchronisation: one transfer to the host, of the live count and the count of bad tokens.

    Args:
        tokens: (N, K) int64, the tokens of each row, in the order of `COLUMNS`; those that are no
            targets have to be tokens too.
        has_target: (N, K) bool, flags of the tokens that are targets.
        vocabulary: V.

    Raises:
        ValueError: a target outside [0, V).
    """
    live = has_target.any(1)
    out_of_range = (tokens < 0) | (tokens >= vocabulary)
    live_count, bad_count = torch.stack((live.sum(), out_of_range.sum())).tolist()
    if bad_count:
        _, column = out_of_range.nonzero()[0].tolist()
        name = COLUMNS[column]
        if column == 1 and (tokens[:, 1] != tokens[0, 1]).any():  # not one for all rows
            name = "second_target"
        raise ValueError(
            f"{name} must lie in [0, V) = [0, {vocabulary}) or be ignore_index, "
            f"got {tokens[out_of_range][0].item()} ({bad_count} such targets)"
        )
    if live_count == len(live):
        return None
    return torch.nonzero_static(live, size=live_count).squeeze(1)


def checked_rows(rows: Tensor, tokens: Tensor, has_target: Tensor, vocabulary: int) -> Tensor:
    """Return rows (n,), those with a target as the caller knows them, checked on the device.

    No transfer to the host: a failed check on a CUDA device is a device-side assertion, which a
    later call reports.

    Args:
        rows: (n,) int64.
        tokens, has_target, vocabulary: see `counted_rows`.

    Raises:
        RuntimeError: rows are not those with a target, ascending; a target outside [0, V).
    """
    live = has_target.any(1)
    are_live = (live.sum() == len(rows)) & live[rows].all() & (rows.diff() > 0).all()
    in_range = ((tokens >= 0) & (tokens < vocabulary)).all()
    torch._assert_async(
        are_live & in_range,
        f"live_rows must be the rows with a target, ascending, and targets must lie in [0, V) = "
        f"[0, {vocabulary})",
    )
    return rows


def gathered(values: Tensor, rows: Tensor | None) -> Tensor:
    """Return the values (n, ...) of the live rows of (N, ...)."""
    return values if rows is None else values.index_select(0, rows)


def scattered(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Return (N, ...) with the live rows' values (n, ...) in their places and 0 elsewhere."""
    if rows is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, rows, values)
