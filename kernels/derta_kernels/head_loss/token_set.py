"""Rows whose refusal target is a set of tokens: -log of the sum of their probabilities.

Every row pass gains it without a kernel of its own. The set is a shard of the vocabulary (`shards`)
that each chunk keeps in float32: its logits are read from the scratch rows, and their columns are
masked, so the first walk sums up the others by themselves. The two summaries are merged as those of
ranks are, the second walk forms the gradient outside the set, and that inside is written over the
masked columns, formed in the dtype computed in and rounded once.

Invariant: a row that is sure of the set keeps 1 - P, the share of the tokens outside. It may be
sure of no single token, and its sum of exp(z - highest) then says nothing about 1 - P. So the sum
outside is never the difference of two sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from derta_kernels.head_loss.row_pass import RowPass, then_blocks
from derta_kernels.head_loss.shards import merged

# The most numbers that a chunk's row has at once for each token of the set.
SET_NUMBERS = 8


class TokenSet(NamedTuple):
    """A set of K tokens, as columns of a chunk's logits.

    Attributes:
        size: K, the tokens of the whole set.
        places: (k,) int64, the columns of those in this shard of the vocabulary, ascending.
        own: their slots among the K.
    """

    size: int
    places: Tensor
    own: slice


def checked_ids(given: int | Sequence[int]) -> tuple[int, ...]:
    """Return the refusal tokens as a tuple, ascending.

    Raises:
        TypeError: it is neither an int nor a sequence of them.
        ValueError: a sequence is empty or has a token twice.
    """
    ids = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    wrong = next((id for id in ids if isinstance(id, bool) or not isinstance(id, int)), None)
    if wrong is not None:
        raise TypeError(
            f"refusal_token_id must be int or a sequence of int, got {type(wrong).__name__}"
            + " in a sequence" * (ids is given)
        )
    if not ids:
        raise ValueError("refusal_token_id must have at least one token, got an empty sequence")
    ascending = tuple(sorted(ids))
    for one, following in itertools.pairwise(ascending):
        if one == following:
            raise ValueError(f"refusal_token_id must have distinct tokens, got {one} twice")
    return ascending


def check_in_vocabulary(ids: Sequence[int], vocabulary: int) -> None:
    """Check that refusal tokens are tokens.

    Raises:
        ValueError: one lies outside [0, vocabulary).
    """
    for id in ids:
        if not 0 <= id < vocabulary:
            raise ValueError(f"refusal_token_id must lie in [0, V) = [0, {vocabulary}), got {id}")


def token_set(ids: Sequence[int], start: int, vocabulary: int, device: torch.device) -> TokenSet:
    """Return the set of `ids`, ascending, in a shard of `vocabulary` tokens from `start` on.

    No transfer: the places are formed on the device.
    """
    slots = [slot for slot, id in enumerate(ids) if 0 <= id - start < vocabulary]
    first = slots[0] if slots else 0
    places = torch.empty(len(slots), dtype=torch.int64, device=device)
    for place, slot in zip(places, slots, strict=True):
        place.fill_(ids[slot] - start)
    return TokenSet(len(ids), places, slice(first, first + len(slots)))


def with_set(row_pass: RowPass, tokens_of: TokenSet) -> RowPass:
    """Return a row pass whose second column, the refusal target, is the set.

    The column's token is any one of the set. Its nll is that of the set, and the gradient is of
    sum(token_weight * nll) with it. Summaries have K more numbers, the logits z of the set. The
    first walk masks the set's columns; the second one writes all of the gradient.

    Memory: about 8 C K numbers in the dtype computed in, see `SET_NUMBERS`.
    """

    def first_walk(
        logits: Tensor, tokens: Tensor, softcap: float | None, logit_scale: float
    ) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        z = torch.full((len(logits), tokens_of.size), -torch.inf, dtype=wide, device=logits.device)
        own, places = z[:, tokens_of.own], tokens_of.places
        own.copy_(logits.index_select(1, places)).mul_(logit_scale)
        if softcap is not None:
            own.div_(softcap).tanh_().mul_(softcap)
        logits.index_fill_(1, places, -torch.inf if logit_scale > 0 else torch.inf)
        summary = row_pass.first_walk(logits, tokens, softcap, logit_scale)
        if len(places):
            if softcap is not None:
                _forget_masked(summary, softcap, len(places))
            # Tokens of the set were masked.
            slot = torch.searchsorted(places, tokens).clamp_(max=len(places) - 1)
            is_masked = places[slot] == tokens
            summary[:, 3:] = own.gather(1, slot).where(is_masked, summary[:, 3:])
        return torch.cat((summary, z), 1)

    def second_walk(
        logits: Tensor,
        tokens: Tensor,
        token_weight: Tensor,
        summary: Tensor,
        softcap: float | None,
        logit_scale: float,
        form_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        row = _Row(summary, tokens.shape[1])
        logsumexp, nll = row_pass.second_walk(
            logits, tokens, token_weight, row.summary, softcap, logit_scale, form_gradient
        )
        nll[:, 1:2] = row.nll()
        if form_gradient:
            gradient = row.gradient(tokens_of, tokens, token_weight)
            if softcap is not None:
                bounded = row.z[:, tokens_of.own] / softcap
                gradient.mul_((1 - bounded) * (1 + bounded))
            gradient.mul_(logit_scale)
            logits.index_copy_(1, tokens_of.places, gradient.to(logits.dtype))
        return logsumexp, nll

    def whole(
        logits: Tensor,
        tokens: Tensor,
        token_weight: Tensor,
        softcap: float | None,
        logit_scale: float,
        form_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        summary = first_walk(logits, tokens, softcap, logit_scale)
        return second_walk(
            logits, tokens, token_weight, summary, softcap, logit_scale, form_gradient
        )

    return RowPass(whole, first_walk, second_walk, then_blocks(whole))


def _forget_masked(summary: Tensor, softcap: float, masked: int) -> None:
    """Take masked columns out of a summary: a cap made their z finite, -softcap.

    No other z is lower, so the difference keeps its digits.
    """
    term = masked * (-softcap - summary[:, 0]).exp()
    are_ones = summary[:, 0] == -softcap
    summary[:, 1] -= term.where(are_ones, 0)
    summary[:, 2] -= term.where(~are_ones, 0)
    summary[:, 2].clamp_(min=0)


class _Row:
    """The numbers of each row, all (C, 1) but z (C, K) and the summary (C, 3 + columns).

    Attributes:
        z: the logits of the set.
        summary: the summary of the whole row, see `row_pass`.
    """

    def __init__(self, summary: Tensor, columns: int) -> None:
        outside, self.z = summary.split((3 + columns, summary.shape[1] - 3 - columns), 1)
        lowest = torch.finfo(summary.dtype).min
        self._highest_inside = self.z.amax(1, keepdim=True).clamp(min=lowest)
        self._terms = (self.z - self._highest_inside).exp()
        self._inside = self._terms.sum(1, keepdim=True).clamp(min=torch.finfo(self.z.dtype).tiny)
        is_one = self._terms == 1
        ones = is_one.sum(1, keepdim=True, dtype=self.z.dtype)
        rest = self._terms.masked_fill(is_one, 0).sum(1, keepdim=True)
        of_set = torch.cat((self._highest_inside, ones, rest, outside[:, 3:]), 1)
        self.summary = merged(torch.stack((outside, of_set)))
        self._highest, ones, rest = self.summary[:, :3].split(1, 1)
        self._rest = (ones - 1) + rest
        sum_outside = outside[:, 1:2] + outside[:, 2:3]
        # The sums of exp(z - highest) outside and inside the set.
        self._others = sum_outside * (outside[:, :1] - self._highest).exp()
        self._share = self._inside * (self._highest_inside - self._highest).exp()

    def nll(self) -> Tensor:
        """Return -log of the set's probability, exact where it is near 0."""
        unlikely = (self._highest - self._highest_inside) + (
            self._rest.log1p() - self._inside.log()
        )
        likely = torch.log1p(self._others / self._share)
        return torch.where(self._share >= self._others, likely, unlikely)

    def gradient(self, tokens_of: TokenSet, tokens: Tensor, token_weight: Tensor) -> Tensor:
        """Return the gradient of this shard's z of the set, (C, k)."""
        total = 1 + self._rest
        next_weight, refusal_weight = token_weight[:, :1], token_weight[:, 1:2]
        own = self.z[:, tokens_of.own]
        terms = (own - self._highest).exp()
        # Two parts that are exact each: that of the set is -weight (1 - P) times a token's share in
        # the set, that of a next token is weight (p - 1) at its place.
        gradient = self._terms[:, tokens_of.own] * (
            -refusal_weight * (self._others / total) / self._inside
        )
        is_next = tokens_of.places == tokens[:, :1]
        _, others = self._token(0)
        gradient += next_weight * torch.where(is_next, -others, terms) / total
        if tokens.shape[1] == 3:
            term, others = self._token(2)
            others = others.clamp(min=torch.finfo(own.dtype).tiny)
            push = token_weight[:, 2:] * (term / total)
            others_push = (push / others).clamp(max=torch.finfo(own.dtype).max)
            is_unlikely = tokens_of.places == tokens[:, 2:]
            gradient += torch.where(is_unlikely, push, -(others_push * terms))
        return gradient

    def _token(self, column: int) -> tuple[Tensor, Tensor]:
        """Return exp(z - highest) of a token, and the sum of the other tokens' terms."""
        term = (self.summary[:, 3 + column : 4 + column] - self._highest).exp()
        # For a row that is sure of the token, the others are the rest.
        return term, torch.where(term == 1, self._rest, (1 + self._rest) - term)
