"""A set of refusal tokens is as exact as one token, in every row pass, shard and tile.

Values and gradients of whole heads are in test_head_loss.py, beside those of one token.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from derta_kernels.head_loss import custom_op, head_loss
from derta_kernels.head_loss.choice import ROW_PASSES, row_pass, unavailable
from derta_kernels.head_loss.shards import merged, sent_bytes
from derta_kernels.head_loss.token_set import token_set, with_set
from derta_kernels.testing import HostReads, HostTransfers, head_case, relative_error
from heads import DEVICE, results, row_passes

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=ROW_PASSES)
def impl(request: pytest.FixtureRequest) -> str:
    why_not = unavailable(request.param, DEVICE, torch.float32)
    if why_not is not None:
        pytest.skip(f"{request.param}: {why_not}")
    return request.param


@pytest.mark.parametrize("lead", [8.0, 37.0, 75.0])
@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32))
def test_rows_that_are_sure_of_the_set_and_of_no_token_keep_their_loss_and_gradient(
    impl: str, dtype: torch.dtype, lead: float
) -> None:
    """1 - P is 4e-2 to 1e-31, and the sum over the row is 2.6: it says nothing about that."""
    vocabulary, ids = 4099, [4098, 0, 1024, 17]
    z = torch.full((vocabulary,), -lead, dtype=torch.float64)
    z[ids] = torch.tensor([0.0, -0.5, 0.0, -math.inf], dtype=torch.float64)
    outside, inside = z.clone(), z[ids].exp().sum()
    outside[ids] = -math.inf
    share = outside.exp().sum() / inside  # (1 - P) / P
    expected = outside.exp() / inside / (1 + share)
    expected[ids] = -share / (1 + share) * z[ids].exp() / inside
    # The identity as the head: hidden is its own logits. The second row is pulled to a token of
    # the set, too.
    hidden = z.to(DEVICE, dtype).clamp(min=-1e30).repeat(2, 1).requires_grad_()
    out = head_loss(
        hidden,
        torch.eye(vocabulary, dtype=dtype, device=DEVICE),
        torch.tensor([-100, 0], device=DEVICE),
        torch.ones(2, dtype=torch.bool, device=DEVICE),
        refusal_token_id=ids,
        impl=impl,
    )
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    sum_of_terms = (16 + vocabulary**0.5) * EPS
    assert relative_error(out.refusal_nll.cpu(), share.log1p().repeat(2)) <= sum_of_terms
    assert relative_error(gradient[0].cpu(), expected) <= sum_of_terms
    p = (z - z.logsumexp(0)).exp()
    p[0] -= 1
    assert relative_error(gradient[1].cpu(), expected + p) <= sum_of_terms


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("logit_scale", [1.0, -0.5])
def test_a_row_that_is_sure_of_one_token_of_the_set_is_exact_for_every_target(
    impl: str, softcap: float | None, logit_scale: float
) -> None:
    """The set, a next token in it and an unlikely token in it, with 1 - p near 1e-12."""
    vocabulary, ids = 301, (5, 100, 299)
    logits = -torch.linspace(28, 29, vocabulary, dtype=torch.float64).repeat(3, 1)
    logits[:, 100] = 0
    logits = (logits / logit_scale).float()
    tokens = torch.tensor([[3, 5, 7], [100, 5, 5], [100, 5, 100]])
    weight = torch.tensor([[0.3, 1.1, 0.0], [0.7, 0.6, 0.9], [0.5, 1.3, 0.4]])
    exact = logits.double()
    z = logit_scale * exact
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    terms = z.exp() / z[:, 100:101].exp()
    in_set = torch.isin(torch.arange(vocabulary), torch.tensor(ids))
    outside, inside = terms[:, ~in_set].sum(1), terms[:, in_set].sum(1)
    total = (outside + inside)[:, None]
    gradient = torch.where(in_set, -outside[:, None] / inside[:, None], 1.0) * terms / total
    gradient *= weight[:, 1:2]
    for row, (next_token, _, unlikely) in enumerate(tokens.tolist()):
        for token, factor in ((next_token, weight[row, 0]), (unlikely, -weight[row, 2])):
            others = terms[row].clone()
            others[token] = 0
            pull = others / total[row]
            pull[token] = -others.sum() / total[row]
            if factor < 0:  # -log(1 - p) pulls by p / (1 - p) times as much, and away
                pull *= terms[row, token] / others.sum()
            gradient[row] += factor * pull
    slope = 1.0 if softcap is None else 1 - (z / softcap).square()
    passes = with_set(row_pass(impl), token_set(ids, 0, vocabulary, DEVICE))
    found = logits.to(DEVICE, copy=True)
    _, nll = passes.whole(found, tokens.to(DEVICE), weight.to(DEVICE), softcap, logit_scale, True)
    assert relative_error(nll[:, 1].cpu(), (outside / inside).log1p()) <= 64 * EPS
    assert relative_error(found.cpu(), gradient * slope * logit_scale) <= 64 * EPS


@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32, torch.float64))
def test_a_set_with_tokens_that_are_impossible_is_the_one_that_is_left(
    impl: str, dtype: torch.dtype
) -> None:
    case = head_case(dtype=dtype, bias=True, unlikely=True)
    assert case.bias is not None
    impossible = [0, 96]
    case.bias[impossible] = -1e4
    rest = {
        name: values.masked_fill(torch.isin(values, torch.tensor(impossible)), 1)
        for name, values in (("target", case.target), ("unlikely_target", case.unlikely_target))
        if values is not None
    }
    case = replace(case, **rest)
    one = results(case, impl)
    several = results(replace(case, refusal_token_id=[96, case.refusal_token_id, 0]), impl)
    for name, expected in one.items():
        bound = 8 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(several[name], expected, rtol=1e2 * bound, atol=bound, msg=name)


def test_a_sequence_of_one_token_is_that_token_bit_for_bit() -> None:
    case = head_case(dtype=torch.bfloat16)
    one, same = results(case, "auto"), results(replace(case, refusal_token_id=[32]), "auto")
    assert case.refusal_token_id == 32
    assert all(torch.equal(one[name], same[name]) for name in one)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("sizes", [(650, 651), (1301, 0), (0, 1, 1024, 276), (8, 700, 593)])
def test_a_set_over_several_shards_is_the_set_of_the_whole_row(
    impl: str, sizes: tuple[int, ...], softcap: float | None
) -> None:
    """Shards have all, some or none of its tokens."""
    ids, vocabulary, rows = (0, 7, 8, 649, 650, 1300), 1301, 9
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator).to(DEVICE)
    logits[::2, [7, 1300]] = 20.0
    tokens = torch.tensor([[7, 0, 8], [3, 0, 1300], [1299, 0, 4]]).repeat(3, 1).to(DEVICE)
    weight = (0.5 + torch.rand(rows, 3, generator=generator)).to(DEVICE)
    whole = logits.clone()
    passes = with_set(row_pass(impl), token_set(ids, 0, vocabulary, DEVICE))
    expected = (*passes.whole(whole, tokens, weight, softcap, 0.5, True), whole)

    shards = [part.clone() for part in logits.split(list(sizes), 1)]
    starts = list(itertools.accumulate(sizes, initial=0))[: len(sizes)]
    walks = [
        with_set(row_pass(impl), token_set(ids, start, size, DEVICE))
        for start, size in zip(starts, sizes, strict=True)
    ]
    own = [
        (tokens - start).masked_fill((tokens < start) | (tokens >= start + size), -1)
        for start, size in zip(starts, sizes, strict=True)
    ]
    summary = merged(
        torch.stack(
            [
                walk.first_walk(shard, places, softcap, 0.5)
                for walk, shard, places in zip(walks, shards, own, strict=True)
            ]
        )
    )
    found = [
        walk.second_walk(shard, places, weight, summary, softcap, 0.5, True)
        for walk, shard, places in zip(walks, shards, own, strict=True)
    ]
    for logsumexp, nll in found[1:]:
        assert torch.equal(logsumexp, found[0][0]) and torch.equal(nll, found[0][1])
    for actual, values in zip((*found[0], torch.cat(shards, 1)), expected, strict=True):
        assert relative_error(actual.double(), values.double()) <= 16 * EPS
    assert sent_bytes(10, 8, 2, 2, torch.float32, False, refusal_tokens=6) == 10 * (3 + 2 + 6) * 4


def test_a_set_of_all_tokens_has_nothing_to_learn(impl: str) -> None:
    hidden = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    out = head_loss(
        hidden,
        torch.randn(6, 4, device=DEVICE),
        torch.full((3,), -100, device=DEVICE),
        torch.ones(3, dtype=torch.bool, device=DEVICE),
        refusal_token_id=range(6),
        softcap=5.0,
        impl=impl,
    )
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    assert out.loss == 0 and torch.equal(gradient, torch.zeros_like(gradient))


def test_a_set_waits_for_no_device_if_live_rows_are_known() -> None:
    case = head_case(refusals=4, softcap=50.0, dtype=torch.float32).requiring_gradients()
    rows = ((case.target != -100) | case.rto_mask).nonzero().squeeze(1)
    within = {
        torch.ops.derta.head_loss_of_rows.default: custom_op.loss_and_gradients_of_rows,
        torch.ops.derta.scale_gradients.default: custom_op.scale_gradients,
    }
    with HostReads(within) as reads, HostTransfers() as transfers:
        head_loss(**case.arguments(), live_rows=rows, impl="torch").loss.backward()
    assert transfers.count == 0 and reads.found == []


def test_each_row_reports_the_loss_of_the_set() -> None:
    case = head_case(refusals=3)
    log_p = torch.log_softmax(case.hidden @ case.weight.T, 1)
    live = (case.target != -100) | case.rto_mask
    assert not isinstance(case.refusal_token_id, int)
    expected = -log_p[:, list(case.refusal_token_id)].logsumexp(1).where(live, 0.0)
    for impl in ("reference", "torch"):
        actual = head_loss(**case.arguments(), impl=impl).refusal_nll
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-13)
