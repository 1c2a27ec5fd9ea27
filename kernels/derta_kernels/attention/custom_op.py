"""The Triton attention as PyTorch operators, for autograd and `torch.compile`.

There are two: `derta::interval_attention` and its backward pass,
`derta::interval_attention_backward`, whose own derivative raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from derta_kernels.attention.layout import layout_of

# Offsets within a tile, of up to 128 tokens, are 32-bit in the kernels.
MAX_TOKEN_STRIDE = 2**24
_OPTIONS = "Tensor? position_ids, float scale, float? softcap, int? window"
# The host works out the layout of each batch; a captured graph would not do it again.
_TAGS = (torch.Tag.cudagraph_unsafe,)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    position_ids: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Return output (B, N, Hq, D) and logsumexp (Hq, B N) float32.

    See `interval_attention`; scale must be > 0.
    """
    from derta_kernels.attention.triton_forward import forward_triton

    shape = q.shape
    q, k, v = (_by_token(x) for x in (q, k, v))
    layout = layout_of(visible_until, position_ids, None)
    out, logsumexp = forward_triton(q, k, v, layout, scale=scale, softcap=softcap, window=window)
    return out.view(shape), logsumexp


attention_op = torch.library.custom_op(
    "derta::interval_attention",
    attention_forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor visible_until, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)


@attention_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, count, heads, _width = q.shape
    return q.new_empty(q.shape), q.new_empty(heads, rows * count, dtype=torch.float32)


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    visible_until: Tensor,
    position_ids: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    from derta_kernels.attention.triton_backward import backward_triton

    d_out, out = (x.contiguous().flatten(0, 1) for x in (d_out, out))
    rows = len(q)
    q, k, v = (_by_token(x) for x in (q, k, v))
    layout = layout_of(visible_until, position_ids, None)
    d_q, d_k, d_v = (
        gradient.unflatten(0, (rows, -1))
        for gradient in backward_triton(
            d_out, q, k, v, out, logsumexp, layout, scale=scale, softcap=softcap, window=window
        )
    )
    return d_q, d_k, d_v


attention_backward_op = torch.library.custom_op(
    "derta::interval_attention_backward",
    attention_backward,
    mutates_args=(),
    schema="(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, "
    f"Tensor visible_until, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@attention_backward_op.register_fake
def _(_d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _by_token(x: Tensor) -> Tensor:
    """Return (B N, H, D) with strides that the kernels take, as a view where possible."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 and x.stride(0) <= MAX_TOKEN_STRIDE else x.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, visible_until, position_ids, *ctx.options = inputs
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(q, k, v, out, logsumexp, visible_until, position_ids)


def _backward(ctx: Any, d_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
    gradients = attention_backward_op(d_out, *ctx.saved_tensors, *ctx.options)
    return *gradients, *(None,) * 5


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        'interval_attention has no second derivative in Triton: use impl="sdpa" or "reference"'
    )


attention_op.register_autograd(_backward, setup_context=_setup_context)
attention_backward_op.register_autograd(_no_second_derivative)
