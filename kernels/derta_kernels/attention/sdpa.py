"""Interval attention through torch's own kernels, one packed example at a time.

A mask over the whole pack would cost more than one pass saves, since work and memory grow with the
square of the masked length. So every example has its own mask, and only for its branches: a plain
sequence, and the trunk before the branches, are plain causal attention. In a long example even that
mask is too large. Its queries are computed in chunks, and again in the backward pass, so that no
chunk keeps a mask or scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from derta_kernels.attention.layout import Example, Layout

# The most tokens of an example that is computed whole, and of a chunk of queries of a longer one.
# A chunk of a 64k-token example has as many scores as the longest example computed whole.
LONGEST_WHOLE = 8192
QUERY_CHUNK = 1024


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
    """Compute `interval_attention` example by example.

    Memory: for examples of up to 8192 tokens the masks of `Layout`; with a softcap also four copies
        of one example's scores, (Hq, L, L) in float32 (float64 for float64 inputs), of which each
        example keeps one for the backward pass. For longer examples linear: one (1024, L) mask at a
        time and its copy in q's dtype, key and value gradients in float32, and, with a softcap or
        where torch has no fused kernel, a few copies of (Hq, 1024, L) scores. Nothing for a plain
        sequence that torch's fused kernel takes.
    Numerics: those of torch's kernel; with a softcap, scores are rounded to q's dtype before the
        cap and all else is float32 (float64 for float64 inputs). Gradients of a long example's keys
        and values are summed over chunks in float32. Deterministic on a CPU.

    Args and returns: those of `interval_attention`, with a scale.
    """
    lengths = [example.end - example.start for example in layout.examples]
    by_example = zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)
    outputs = []
    for example, tensors in zip(layout.examples, by_example, strict=True):
        queries, keys, values = (x.transpose(0, 1)[None] for x in tensors)  # (1, H, L, D)
        length = example.end - example.start
        is_long = length > LONGEST_WHOLE
        causal = layout.causal_queries(example, window) if softcap is None else 0
        if causal == length and not (is_long and _forms_all_scores(queries, keys, values)):
            output = _fused(queries, keys, values, None, scale)
        elif is_long:
            attend = _chunk_attention(layout, example, scale, softcap, window)
            output = _ByChunks.apply(queries, keys, values, attend)
        else:
            mask = layout.mask(example, window, causal)
            output = _masked(queries[:, :, causal:], keys, values, mask, scale, softcap)
            if causal:
                trunk_q, trunk_k, trunk_v = (x[:, :, :causal] for x in (queries, keys, values))
                trunk = _fused(trunk_q, trunk_k, trunk_v, None, scale)
                output = torch.cat((trunk, output), 2)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs).unflatten(0, q.shape[:2])


def _forms_all_scores(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether torch lacks a fused kernel for plain causal attention of these tensors."""
    enable_gqa = q.shape[1] != k.shape[1]
    backend = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=enable_gqa)
    return backend == SDPBackend.MATH.value


# q, k, v -> output of queries start <= i < end of an example.
_ChunkAttention = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


def _chunk_attention(
    layout: Layout, example: Example, scale: float, softcap: float | None, window: int | None
) -> _ChunkAttention:
    """Return the attention of a chunk of an example's queries.

    It takes (1, H, C, D) queries and the (1, Hkv, end, D) keys and values up to the last of them.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, start: int, end: int) -> Tensor:
        mask = layout.mask_rows(example, window, start, end)
        # The backward pass runs outside the autocast of the forward pass.
        with torch.autocast(q.device.type, enabled=False):
            return _masked(q, k, v, mask, scale, softcap)

    return attend


class _ByChunks(torch.autograd.Function):
    """Attention of (1, H, L, D) inputs in chunks of queries, each over the keys up to its end."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attend: _ChunkAttention) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.attend = attend
        outputs = [
            attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], start, end)
            for start, end in _chunks(q)
        ]
        return torch.cat(outputs, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        d_q = torch.empty_like(q)
        d_k, d_v = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        for start, end in _chunks(q):
            inputs = [
                x.detach().requires_grad_()
                for x in (q[:, :, start:end], k[:, :, :end], v[:, :, :end])
            ]
            with torch.enable_grad():
                output = ctx.attend(*inputs, start, end)
            gradients = torch.autograd.grad(output, inputs, d_output[:, :, start:end])
            d_q[:, :, start:end] = gradients[0]
            d_k[:, :, :end] += gradients[1]
            d_v[:, :, :end] += gradients[2]
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None


def _chunks(q: Tensor) -> list[tuple[int, int]]:
    """Return start and end of each chunk of the queries (1, H, L, D)."""
    length = q.shape[2]
    return [(start, min(start + QUERY_CHUNK, length)) for start in range(0, length, QUERY_CHUNK)]


def _masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attend with (1, H, Lq, D) queries to (1, Hkv, Lk, D) keys and values, mask (Lq, Lk)."""
    if softcap is None:
        return _fused(q, k, v, mask, scale)
    return _softcapped(q, k, v, mask, scale, softcap)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Call torch's kernel, plain causal if there is no mask."""
    if mask is not None and q.is_cuda:  # no fused kernel takes both a mask and groups there
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
    """Compute scores and softmax explicitly, as torch's kernels have no soft-cap."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(1, k.shape[1], -1, q.shape[-1])  # (1, Hkv, Hq / Hkv * Lq, D)
    scores = (grouped @ k.transpose(2, 3)).to(dtype) * scale
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(2, (-1, q.shape[2])).masked_fill(~mask, -torch.inf)
    shares = scores.softmax(-1).to(v.dtype).flatten(2, 3)
    return (shares @ v).reshape(*q.shape[:3], v.shape[-1])
