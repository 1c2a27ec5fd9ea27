"""Interval attention as its definition: the whole mask, all scores, an explicit softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def interval_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    position_ids: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Compute `interval_attention` from all scores, as the oracle of every other implementation.

    Memory: about five copies of the (B, Hq, N, N) scores, in float32 (float64 for float64 inputs).

    Args and returns: those of `interval_attention`, with a scale, and with position_ids if there is
        a window.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    queries = q.to(dtype).transpose(1, 2)  # (B, Hq, N, D)
    keys, values = (x.to(dtype).repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    scores = scale * (queries @ keys.transpose(2, 3))  # (B, Hq, N, N), query by key
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    index = torch.arange(q.shape[1], device=q.device)
    seen = (index <= index[:, None]) & (index[:, None] < visible_until[:, None, :])
    if window is not None:
        assert position_ids is not None
        seen &= position_ids[:, :, None] - position_ids[:, None, :] < window
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2).to(q.dtype)
