"""The head loss in chunks of rows, gradients formed in the forward pass, in plain PyTorch.

The mathematics is in kernels/README.md. Gradients are stored for an upstream gradient of 1 and
scaled in the backward pass, so the loss may be divided, scaled or summed with others afterwards
without a second pass over the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCRATCH_LOGITS = 2**24
MIN_CHUNK_ROWS = 256


def head_loss_chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logsumexp and nll of rows that all have a target, never holding n x V logits.

    Equals, up to rounding: `head_loss_reference`, of which it takes the arguments.

    Memory, in bytes, with b = bytes of hidden's dtype, C = chunk rows, w = 4 (8 for float64):
        C V (b + w)     scratch; C V w where b = w. With a softcap and gradients, C V w more
        n d b           gradient of hidden, if required (n d w for float16)
        w V (d + 1)     gradients of weight and bias, only for those that are required
        C = min(n, max(256, 2^24 / V)): 64 MiB of float32 logits, or 256 rows if that is more. Every
        chunk reads weight twice and adds to all of its gradient; fewer rows would wait for that.

    Numerics: logits and their gradient are rounded to hidden's dtype once each, all else is
        float32 (float64 for float64 inputs), the gradient of weight and bias included. That of
        weight sums over chunks in order: deterministic.
    """
    needs_gradient = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    )
    loss, logsumexp, nll, *_ = _HeadLoss.apply(
        hidden, weight, bias, tokens, token_weight, softcap, logit_scale, needs_gradient
    )
    return loss, logsumexp, nll


class _HeadLoss(torch.autograd.Function):
    """Forms loss and gradients together; hands the gradients out so that they have a history.

    That history is what makes a second derivative an error: without it `_ScaledGradients` would
    return constants whenever the upstream gradient is one, and a gradient penalty would silently
    have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        token_weight: Tensor,
        softcap: float | None,
        logit_scale: float,
        needs_gradient: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        loss, logsumexp, nll, *gradients = _loss_and_gradients(
            hidden, weight, bias, tokens, token_weight, softcap, logit_scale, needs_gradient
        )
        ctx.mark_non_differentiable(logsumexp, nll)
        ctx.set_materialize_grads(False)  # or a second float32 V x d would be made, of zeros
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden.dtype
        return loss, logsumexp, nll, *gradients

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if d_loss is None:  # autograd's word for zero
            return (None,) * 8
        gradients = _ScaledGradients.apply(d_loss, ctx.dtype, *ctx.saved_tensors)
        return *gradients, None, None, None, None, None


class _ScaledGradients(torch.autograd.Function):
    """The stored gradients times the upstream gradient, rounded to `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, d_loss: Tensor, dtype: torch.dtype, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else _scaled(g, d_loss, dtype) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            "head_loss has no second derivative: its gradients are formed in the forward pass; "
            'use impl="reference" to differentiate twice'
        )


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * gradient in factor's dtype, rounded once; no second copy of it in that dtype."""
    scaled = torch.empty_like(gradient, dtype=dtype)
    rows = max(1, SCRATCH_LOGITS // 16 // max(1, gradient[:1].numel()))
    for source, destination in zip(gradient.split(rows), scaled.split(rows), strict=True):
        destination.copy_(source.to(factor.dtype) * factor)
    return scaled


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    needs_gradient: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`head_loss_reference`'s results and the gradients of hidden, weight and bias."""
    count, vocabulary = hidden.shape[0], weight.shape[0]
    dtype, wide = hidden.dtype, token_weight.dtype
    for_hidden, for_weight, for_bias = needs_gradient
    is_float16 = dtype == torch.float16

    logsumexp = token_weight.new_empty(count)
    nll = torch.empty_like(token_weight)
    d_hidden = torch.empty_like(hidden, dtype=wide if is_float16 else dtype) if for_hidden else None
    d_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
    d_bias = token_weight.new_zeros(vocabulary) if for_bias else None

    chunk_rows = min(count, max(MIN_CHUNK_ROWS, SCRATCH_LOGITS // vocabulary))
    rounded_scratch = hidden.new_empty(chunk_rows, vocabulary)
    wide_scratch = (
        rounded_scratch if dtype == wide else torch.empty_like(rounded_scratch, dtype=wide)
    )
    magnification = _magnification(token_weight, logit_scale) if is_float16 else None

    for start in range(0, count, max(1, chunk_rows)):
        chunk = slice(start, start + chunk_rows)
        rows = hidden[chunk]
        logits, z = rounded_scratch[: len(rows)], wide_scratch[: len(rows)]
        if bias is None:
            torch.mm(rows, weight.T, out=logits)
        else:
            torch.addmm(bias, rows, weight.T, out=logits)
        if dtype != wide:
            z.copy_(logits)

        logsumexp[chunk], nll[chunk] = _row_pass(
            z, tokens[chunk], token_weight[chunk], softcap, logit_scale, any(needs_gradient)
        )

        if d_weight is not None:
            d_weight.addmm_(z.T, rows.to(wide))
        if d_bias is not None:
            d_bias += z.sum(0)
        if d_hidden is not None:
            if magnification is not None:
                z.mul_(magnification)
            if dtype != wide:
                logits.copy_(z)
            d_hidden[chunk] = torch.mm(logits, weight)

    if d_hidden is not None and magnification is not None:
        d_hidden /= magnification
    loss = (token_weight * nll.where(token_weight != 0, 0.0)).sum()
    return loss, logsumexp, nll, d_hidden, d_weight, d_bias


def _row_pass(
    z: Tensor,
    tokens: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """logsumexp (C,) and nll (C, 2) of raw logits z (C, V), which become their own gradient."""
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        if needs_gradient:
            slope = z.square().neg_().add_(1)
        z.mul_(softcap)
    highest = z.amax(1, keepdim=True)
    token_logits = z.gather(1, tokens)
    z.sub_(highest).exp_()
    total = z.sum(1, keepdim=True)
    log_total = total.log()

    if needs_gradient:
        z.mul_(token_weight.sum(1, keepdim=True) / total)
        row = torch.arange(len(z), device=z.device)
        for token, token_share in zip(tokens.unbind(1), token_weight.unbind(1), strict=True):
            z[row, token] -= token_share  # one token at a time: they may be the same
        if slope is not None:
            z.mul_(slope)
        if logit_scale != 1.0:
            z.mul_(logit_scale)
    return (highest + log_total).squeeze(1), (highest - token_logits) + log_total


def _magnification(token_weight: Tensor, logit_scale: float) -> Tensor:
    """() factor that puts gradients of logits well inside float16, whose range is 6e-8 to 65504.

    A row's gradient sums to at most twice its weight in absolute value. At 1024 times the heaviest
    row, one of p = 0.99999 still has a full significand, and the product with a head whose weights
    are below 32 does not overflow.
    """
    heaviest = token_weight.abs().sum(1).amax() if len(token_weight) else token_weight.new_ones(())
    return 1024 / (heaviest * abs(logit_scale)).clamp_min(1e-30)
