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
    highest = z.amax(1, keepdim=True)
    token_logits = z.gather(1, tokens)
    z.sub_(highest).exp_()
    total = z.sum(1, keepdim=True)
    log_total = total.log()

    if form_gradient:
        z.mul_(token_weight.sum(1, keepdim=True) / total)
        row = torch.arange(len(z), device=z.device)
        for token, token_share in zip(tokens.unbind(1), token_weight.unbind(1), strict=True):
            z[row, token] -= token_share  # one token at a time: they may be the same
        if slope is not None:
            z.mul_(slope)
        if logit_scale != 1.0:
            z.mul_(logit_scale)
    return (highest + log_total).squeeze(1), (highest - token_logits) + log_total
