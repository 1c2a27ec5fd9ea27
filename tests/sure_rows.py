"""Rows for tests of row passes: as sure of their tokens as trained ones, and eager's results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from derta_kernels.testing import PROBABILITIES


def sure_logits(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    softcap: float | None,
    logit_scale: float,
    padding: int = 0,
    probabilities: Sequence[float] = PROBABILITIES,
    columns: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits that are as sure of a token as `probabilities` say, tokens and weights.

    Rows have both kinds of target, one of them, or the same token twice. With `columns` 3 they also
    have an unlikely token: the sure one, the refusal token or another, in some rows with weight 0.
    `padding` is the number of logits between rows, all NaN.
    """
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    tokens = torch.randint(vocabulary, (rows, 2), generator=generator)
    if vocabulary > 1:
        p = torch.tensor(probabilities, dtype=torch.float64)
        odds = p.logit()[torch.arange(rows) % len(p), None]
        others = z.scatter(1, tokens[:, :1], -torch.inf).logsumexp(1, keepdim=True)
        z.scatter_(1, tokens[:, :1], others + odds)
    kind = torch.arange(rows) // 5 % 4
    tokens[kind == 3, 1] = tokens[kind == 3, 0]
    weight = 0.5 + torch.rand(rows, 2, generator=generator)
    weight[kind == 1, 1] = 0
    weight[kind == 2, 0] = 0
    if columns == 3:
        third = torch.randint(vocabulary, (rows, 1), generator=generator)
        turn = torch.arange(rows)[:, None] % 3
        third = torch.where(turn == 0, tokens[:, :1], third.where(turn == 2, tokens[:, 1:]))
        tokens = torch.cat((tokens, third), 1)
        third_weight = torch.rand(rows, 1, generator=generator)
        weight = torch.cat((weight, third_weight.where(torch.arange(rows)[:, None] % 7 != 6, 0)), 1)
    if softcap is not None:
        z = softcap * torch.atanh(z / softcap)
    logits = torch.full((rows, vocabulary + padding), torch.nan, dtype=dtype)[:, :vocabulary]
    return logits.copy_(z / logit_scale), tokens, weight


def eager(
    logits: Tensor,
    tokens: Tensor,
    weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute logsumexp, nll and, by autograd, the gradient in the logits' dtype, all in `wide`."""
    leaf = logits.detach().to(torch.float64 if wide == torch.float64 else logits.dtype)
    leaf.requires_grad_()
    z = logit_scale * leaf.to(wide)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    highest = z.detach().amax(1, keepdim=True)
    terms = (z - highest).exp()
    log_sum = terms.sum(1, keepdim=True).log()
    nll = (highest - z.gather(1, tokens)) + log_sum
    if tokens.shape[1] == 3:
        others = terms.scatter(1, tokens[:, 2:], 0.0).sum(1, keepdim=True)
        p = (-nll[:, 2:]).exp().clamp(max=0.5)
        unlikelihood = torch.where(p < 0.5, -torch.log1p(-p), log_sum - others.log())
        nll = torch.cat((nll[:, :2], unlikelihood), 1)
    (gradient,) = torch.autograd.grad((weight * nll.where(weight != 0, 0.0)).sum(), leaf)
    return (highest + log_sum).squeeze(1).detach(), nll.detach(), gradient
