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

from collections.abc import Iterator
from typing import NamedTuple

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
    summary = token_weight.new_empty(len(tokens), 3 + tokens.shape[1])
    for part in _slices(logits):
        z = logits[part].to(token_weight.dtype)
        slope = finish_logits(z, softcap, logit_scale, form_gradient)
        summary[part] = _summarise(z, z.gather(1, tokens[part]))
        if form_gradient:
            gradients = _differentiate(z, tokens[part], token_weight[part], summary[part])
            z.scatter_(1, tokens[part], gradients)
            unfinish_gradient(z, slope, logit_scale)
            if z.dtype != logits.dtype:
                logits[part] = z
    return _losses(summary)


def first_walk_torch(
    logits: Tensor, tokens: Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """Return the summary (C, 3 + K) of a shard, see `row_pass`; logits (C, V) stay as they are.

    Memory: 2^22 logits (or one row, if that is more) widened.

    Args:
        tokens: (C, K) int64, within [0, V), or -1 for a token of another shard.
        logits, softcap, logit_scale: as `row_pass_torch`.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    summary = torch.full(
        (len(logits), 3 + tokens.shape[1]), -torch.inf, dtype=wide, device=logits.device
    )
    summary[:, 0] = torch.finfo(wide).min
    summary[:, 1:3] = 0
    for part in _slices(logits):
        z = logits[part].to(wide, copy=True)
        finish_logits(z, softcap, logit_scale, False)
        token_logits = z.gather(1, tokens[part].clamp(min=0))
        token_logits = token_logits.masked_fill(tokens[part] < 0, -torch.inf)
        summary[part] = _summarise(z, token_logits)
    return summary


def second_walk_torch(
    logits: Tensor,
    tokens: Tensor,
    token_weight: Tensor,
    summary: Tensor,
    softcap: float | None,
    logit_scale: float,
    form_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `row_pass_torch` does, for a shard and the merged summary of all shards.

    Memory: as `row_pass_torch`.

    Args:
        tokens: (C, K) int64, within [0, V), or -1 for a token of another shard.
        summary: (C, 3 + K) in token_weight's dtype, see `row_pass`.
        logits, token_weight, ...: as `row_pass_torch`.
    """
    for part in _slices(logits) if form_gradient else ():
        z = logits[part].to(token_weight.dtype)
        slope = finish_logits(z, softcap, logit_scale, True)
        z.sub_(summary[part, :1]).exp_()
        gradients = _differentiate(z, tokens[part], token_weight[part], summary[part])
        _put_own(z, tokens[part], gradients)
        unfinish_gradient(z, slope, logit_scale)
        if z.dtype != logits.dtype:
            logits[part] = z
    return _losses(summary)


def _slices(logits: Tensor) -> Iterator[slice]:
    """Yield the rows to widen at a time; none of logits (C, 0)."""
    count, vocabulary = logits.shape
    if vocabulary > 0:
        step = max(1, WIDE_LOGITS // vocabulary)
        yield from (slice(start, start + step) for start in range(0, count, step))


def finish_logits(
    z: Tensor, softcap: float | None, logit_scale: float, form_slope: bool
) -> Tensor | None:
    """Scale and cap z (C, V) in place; return the cap's derivative, or None where it is 1."""
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        if form_slope:
            slope = z.square().neg_().add_(1)
        z.mul_(softcap)
    return slope


def _summarise(z: Tensor, token_logits: Tensor) -> Tensor:
    """Return the summary (C, 3 + K) of z (C, V), and set z to its terms exp(z - highest)."""
    highest, place = z.max(1, keepdim=True)
    highest = highest.clamp(min=torch.finfo(z.dtype).min)
    # The highest term is 1 by construction (or 0, if all logits are -inf): set it to 0 and sum the
    # rest, which would lose its digits if it were added to 1.
    z.sub_(highest).exp_()
    ones = z.gather(1, place)
    rest = z.scatter_(1, place, 0.0).sum(1, keepdim=True)
    z.scatter_(1, place, ones)
    return torch.cat((highest, ones, rest, token_logits), 1)


class _Known(NamedTuple):
    """Numbers of each row from its summary; the sum of all terms exp(z - highest) is 1 + rest.

    Attributes:
        highest, rest: (C, 1).
        token_logits, terms: (C, K), the tokens' z and exp(z - highest).
    """

    highest: Tensor
    rest: Tensor
    token_logits: Tensor
    terms: Tensor

    def unlikely(self) -> tuple[Tensor, Tensor]:
        """Return p of the third token and the sum of the others' terms, both (C, 1)."""
        term = self.terms[:, 2:]
        # others / (1 + rest) is 1 - p. For a row that is sure of the token, others is the rest.
        others = torch.where(term == 1, self.rest, (1 + self.rest) - term)
        return term / (1 + self.rest), others.clamp(min=torch.finfo(term.dtype).tiny)


def _known(summary: Tensor) -> _Known:
    highest, ones, rest, token_logits = summary.split((1, 1, 1, summary.shape[1] - 3), 1)
    return _Known(highest, (ones - 1) + rest, token_logits, (token_logits - highest).exp())


def _losses(summary: Tensor) -> tuple[Tensor, Tensor]:
    """Return logsumexp (C,) and nll (C, K)."""
    row = _known(summary)
    log_total = row.rest.log1p()
    nll = (row.highest - row.token_logits) + log_total
    if nll.shape[1] == 3:
        p, others = row.unlikely()
        nll[:, 2:] = torch.where(p < 0.5, -torch.log1p(-p), log_total - others.log())
    return (row.highest + log_total).squeeze(1), nll


def _differentiate(terms: Tensor, tokens: Tensor, token_weight: Tensor, summary: Tensor) -> Tensor:
    """Replace terms exp(z - highest), (C, V), by the gradient of z; return the tokens' own, (C, K).

    The terms at the tokens' places are still to be replaced by the latter.
    """
    row = _known(summary)
    # Every logit's gradient is factor * exp(z - highest), but for the tokens' own: those are
    # computed by themselves, where their first difference is exact, and put in their places.
    share = token_weight[:, :2].sum(1, keepdim=True)
    factor = share / (1 + row.rest)
    same = tokens[:, :, None] == tokens[:, None, :2]
    own = (same * token_weight[:, None, :2]).sum(2)
    token_gradient = ((share * row.terms - own) - own * row.rest) / (1 + row.rest)
    if tokens.shape[1] == 3:
        p, others = row.unlikely()
        push = token_weight[:, 2:] * p
        others_push = (push / others).clamp(max=torch.finfo(terms.dtype).max)
        factor = factor - others_push
        token_gradient += torch.where(tokens == tokens[:, 2:], push, -(others_push * row.terms))
    terms.mul_(factor)
    return token_gradient


def unfinish_gradient(gradient: Tensor, slope: Tensor | None, logit_scale: float) -> None:
    """Turn the gradient of z (C, V) into that of the logits that `finish_logits` took."""
    if slope is not None:
        gradient.mul_(slope)
    if logit_scale != 1.0:
        gradient.mul_(logit_scale)


def _put_own(rows: Tensor, places: Tensor, values: Tensor) -> None:
    """Set values (C, K) at their places in rows (C, V); -1 is no place.

    A value without a place is put where another of its row has one, and is then that value. A row
    without any keeps its first number.
    """
    first = (places >= 0).to(torch.int8).argmax(1, keepdim=True)
    place = places.gather(1, first).clamp(min=0)
    has_place = places.gather(1, first) >= 0
    value = values.gather(1, first).where(has_place, rows.gather(1, place))
    rows.scatter_(1, places.where(places >= 0, place), values.where(places >= 0, value))
