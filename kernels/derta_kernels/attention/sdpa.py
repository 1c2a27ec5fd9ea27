"""Interval attention through torch's own kernels, one packed example at a time.

A mask over the whole pack would cost more than one pass saves: work and memory grow with the
square of what is masked, so every example gets its own, and a plain sequence gets none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from derta_kernels.attention.layout import Layout


def interval_attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """`interval_attention` by example.

    Memory: the masks of `Layout`; with a softcap also four copies of one example's scores,
        (Hq, L, L) in float32 (float64 for float64 inputs), and one of them kept for the backward
        pass for each example.
    Numerics: those of torch's kernel; with a softcap, scores are rounded to q's dtype before the
        cap and all else is float32 (float64 for float64 inputs). Deterministic on a CPU.

    Args and returns: those of `interval_attention`, scale given.
    """
    lengths = [example.end - example.start for example in layout.examples]
    by_example = zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)
    outputs = []
    for example, tensors in zip(layout.examples, by_example, strict=True):
        queries, keys, values = (x.transpose(0, 1)[None] for x in tensors)  # (1, H, L, D)
        if softcap is not None:
            mask = layout.mask(example, window)
            output = _softcapped(queries, keys, values, mask, scale, softcap)
        elif layout.is_causal(example, window):
            output = _fused(queries, keys, values, None, scale)
        else:
            output = _fused(queries, keys, values, layout.mask(example, window), scale)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs).unflatten(0, q.shape[:2])


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """torch's kernel, plain causal where there is no mask."""
    if mask is not None and q.is_cuda:  # where no fused kernel takes both a mask and groups
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """Explicit scores and softmax, as torch's kernels have no soft-cap."""
    kv_heads, length = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(1, kv_heads, -1, q.shape[-1])  # (1, Hkv, Hq / Hkv * L, D)
    scores = (grouped @ k.transpose(2, 3)).to(dtype) * scale
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(2, (-1, length)).masked_fill(~mask, -torch.inf)
    shares = scores.softmax(-1).to(v.dtype).flatten(2, 3)
    return (shares @ v).reshape(*q.shape[:3], v.shape[-1])
