"""The head loss as its definition: all logits at once, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def head_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    refusal_tokens: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss, logsumexp and nll of rows that all have a target.

    Every other implementation must equal this one up to rounding. It is the oracle in float64 and
    "eager" in any other dtype.

    Memory: three float32 copies of the n x V logits, four with a softcap.

    Args:
        hidden: (n, d) floating point.
        weight: (V, d) in hidden's dtype.
        bias: (V,) in hidden's dtype, or None.
        tokens: (n, K) int64, the tokens of each row, within [0, V), see `row_pass_torch`.
        token_weight: (n, K) in the dtype to compute in, the weight of each of them; a token of
            weight 0 is no target: its nll is returned but kept out of the loss.
        softcap: bound of the logits, > 0, or None.
        logit_scale: factor of the logits.
        refusal_tokens: the set whose probability the second column is of; empty: of its token.

    Returns:
        loss (), differentiable; logsumexp (n,) and nll (n, K), detached; all in token_weight's
        dtype.
    """
    hidden = hidden.contiguous()  # libraries read past a view's rows, see `chunked.new_scratch`
    z = logit_scale * F.linear(hidden, weight, bias).to(token_weight.dtype)  # (n, V)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    highest = z.detach().amax(1, keepdim=True)  # a constant to autograd: it cancels
    terms = (z - highest).exp()
    log_sum = terms.sum(1, keepdim=True).log()
    token_logits = z.gather(1, tokens)
    if refusal_tokens:
        of_set = z[:, list(refusal_tokens)].logsumexp(1, keepdim=True)
        token_logits = torch.cat((token_logits[:, :1], of_set, token_logits[:, 2:]), 1)
    nll = (highest - token_logits) + log_sum
    if tokens.shape[1] == 3:
        # -log1p(-p) below p = 0.5, else by the sum of the other terms, as 1 - p loses its digits.
        unlikely = tokens[:, 2:]
        p = (-nll[:, 2:]).exp()
        others = terms.scatter(1, unlikely, 0.0).sum(1, keepdim=True)
        near_1 = log_sum - others.clamp(min=torch.finfo(z.dtype).tiny).log()
        unlikelihood = torch.where(p < 0.5, -torch.log1p(-p.clamp(max=0.5)), near_1)
        nll = torch.cat((nll[:, :2], unlikelihood), 1)
    loss = (token_weight * nll.where(token_weight != 0, 0.0)).sum()
    return loss, (highest + log_sum).squeeze(1).detach(), nll.detach()
