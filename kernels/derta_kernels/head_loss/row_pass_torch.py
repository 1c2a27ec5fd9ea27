"""The row pass of the head loss in plain PyTorch, for every device and dtype.

A row pass turns a chunk's logits into the loss of each row's tokens and, in place, into the
gradient. This one is a sequence of PyTorch calls. It passes about a dozen times over the logits,
widened slice by slice, where the fused ones read them twice and write them once. It runs
everywhere, float64 included, and is the one to read first: `row_pass_triton` and csrc/one_row.h
compute the same numbers.

Invariant: in a row that is sure of its token, the sum of exp(z - highest) is 1 and a small rest,
and the rest is all that loss and gradient consist of. So the rest is summed by itself, the tokens'
logits come from the same widened z as the sum, and differences are taken between numbers that are
still exact. Otherwise a float32 row with 1 - p below 6e-8 would have no loss and no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDE_LOGITS = 2**22


def row_pass_torch(
    logits: Tensor,
    tokens: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    form_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return logsumexp and nll of rows of logits, and overwrite the logits by their gradient.

    A row has K tokens. The first two are trained to be said: their nll is -log p(token). The third,
    if K is 3, is trained not to be said: its nll is -log(1 - p(token)), finite for p = 1.

    Memory: 2^22 logits (or one row, if that is more) widened to token_weight's dtype, and as many
        again with a softcap. If the logits have that dtype and there is no softcap, none.

    Args:
        logits: (C, V) floating point, as the product left them, any row stride. On return the
            gradient of sum(token_weight * nll), or undefined without `form_gradient`.
        tokens: (C, K) int64, within [0, V); K is 2 or 3.
        token_weight: (C, K) in the dtype to compute in; 0: no target, whatever its nll.
        softcap: bound of the logits, > 0, or None.
        logit_scale: factor of the logits, before the cap.
        form_gradient: if False, no gradient is formed.

    Returns:
        logsumexp (C,) and nll (C, K), in token_weight's dtype.
    """
    logsumexp = token_weight.new_empty(len(logits))
    nll = torch.empty_like(token_weight)
    step = max(1, WIDE_LOGITS // logits.shape[1])
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        z = logits[part].to(token_weight.dtype)
        logsumexp[part], nll[part] = _in_place(
            z, tokens[part], token_weight[part], softcap, logit_scale, form_gradient
        )
        if form_gradient and z.dtype != logits.dtype:
            logits[part] = z
    return logsumexp, nll


def _in_place(
    z: Tensor,
    tokens: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    form_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `row_pass_torch` does, for logits that are as wide as the computation."""
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        if form_gradient:
            slope = z.square().neg_().add_(1)
        z.mul_(softcap)
    # The highest term is 1 by construction: set it to 0 and sum the rest, which would lose its
    # digits if it were added to 1.
    highest, place = z.max(1, keepdim=True)
    token_logits = z.gather(1, tokens)
    z.sub_(highest).exp_().scatter_(1, place, 0.0)
    rest = z.sum(1, keepdim=True)
    log_total = rest.log1p()
    nll = (highest - token_logits) + log_total
    terms = (token_logits - highest).exp()  # (C, K)
    if tokens.shape[1] == 3:
        # others / (1 + rest) is 1 - p. For a row that is sure of the token, others is the rest.
        unlikely = terms[:, 2:]
        p = unlikely / (1 + rest)
        others = torch.where(unlikely == 1, rest, (1 + rest) - unlikely)
        others = others.clamp(min=torch.finfo(z.dtype).tiny)
        nll[:, 2:] = torch.where(p < 0.5, -torch.log1p(-p), log_total - others.log())

    if form_gradient:
        # Every logit's gradient is factor * exp(z - highest), but for the tokens' own: those are
        # computed by themselves, where their first difference is exact, and put in their places.
        share = token_weight[:, :2].sum(1, keepdim=True)
        factor = share / (1 + rest)
        same = tokens[:, :, None] == tokens[:, None, :2]
        own = (same * token_weight[:, None, :2]).sum(2)
        token_gradient = ((share * terms - own) - own * rest) / (1 + rest)
        if tokens.shape[1] == 3:
            push = token_weight[:, 2:] * p
            others_push = (push / others).clamp(max=torch.finfo(z.dtype).max)
            factor = factor - others_push
            token_gradient += torch.where(tokens == tokens[:, 2:], push, -(others_push * terms))
        z.scatter_(1, place, 1.0).mul_(factor)
        z.scatter_(1, tokens, token_gradient)
        if slope is not None:
            z.mul_(slope)
        if logit_scale != 1.0:
            z.mul_(logit_scale)
    return (highest + log_total).squeeze(1), nll
