"""The row pass of the head loss in plain PyTorch: for every device and dtype, several passes."""

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
    """Logsumexp and nll of rows of logits, which are overwritten by their gradient.

    Memory: 2^22 logits (or one row, if that is more) widened to token_weight's dtype, and as many
        again with a softcap; nothing without one where logits have that dtype.

    Args:
        logits: (C, V) floating point, as the product left them; any row stride. On return the
            gradient of sum(token_weight * nll), or undefined without `form_gradient`.
        tokens: (C, 2) int64, within [0, V).
        token_weight: (C, 2) in the dtype to compute in; 0: no target, whatever its nll.
        softcap: bound of the logits, > 0, or None.
        logit_scale: factor of the logits, before the cap.
        form_gradient: whether to.

    Returns:
        logsumexp (C,) and nll (C, 2), in token_weight's dtype.
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
    """`row_pass_torch` of logits that are as wide as the computation."""
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        if form_gradient:
            slope = z.square().neg_().add_(1)
        z.mul_(softcap)
    # Where a row is sure of its token, the sum is 1 and a small rest: the rest is all that its loss
    # and gradient consist of, and added to 1 it would lose the digits that 1 has.
    highest, place = z.max(1, keepdim=True)
    token_logits = z.gather(1, tokens)
    z.sub_(highest).exp_().scatter_(1, place, 0.0)
    rest = z.sum(1, keepdim=True)
    log_total = rest.log1p()

    if form_gradient:
        share = token_weight.sum(1, keepdim=True)
        z.scatter_(1, place, 1.0).mul_(share / (1 + rest))
        same = (tokens[:, :1] == tokens[:, 1:]).expand_as(token_weight)
        own = torch.where(same, share, token_weight)
        token_gradient = (share * (token_logits - highest).exp() - own) - own * rest
        z.scatter_(1, tokens, token_gradient / (1 + rest))
        if slope is not None:
            z.mul_(slope)
        if logit_scale != 1.0:
            z.mul_(logit_scale)
    return (highest + log_total).squeeze(1), (highest - token_logits) + log_total
