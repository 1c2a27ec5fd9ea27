"""Every row pass, cut between its walks, computes of shards what it computes of whole rows.

Shards take turns here, in one process; tests/distributed has ranks that hold one each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from derta_kernels.head_loss.choice import ROW_PASSES, row_pass, unavailable
from derta_kernels.head_loss.reference import head_loss_reference
from derta_kernels.head_loss.shards import merged, sent_bytes
from derta_kernels.testing import error_budget, relative_error
from interpreted import INTERPRETED, TRUNCATES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARY = 1301
ROWS = 15
# Even, uneven and empty shards, and one that ends just after a token.
SIZES = [(650, 651), (1301, 0), (0, 1, 1024, 276), (8, 700, 593)]
HEADS: list[tuple[float | None, float, int]] = [
    (None, 1.0, 2),
    (30.0, -2.0, 2),
    (None, 0.25, 3),
    (30.0, 1.0, 3),
]


@pytest.fixture(params=ROW_PASSES)
def impl(request: pytest.FixtureRequest) -> str:
    why_not = unavailable(request.param, DEVICE, torch.float32)
    if why_not is not None:
        pytest.skip(f"{request.param}: {why_not}")
    return request.param


def of_shards(
    impl: str,
    logits: Tensor,
    tokens: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    softcap: float | None = None,
    logit_scale: float = 1.0,
    form_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logsumexp, nll and gradient, given whole logits, of a row pass over shards of them."""
    walks = row_pass(impl)
    shards = [part.clone() for part in logits.to(DEVICE).split(list(sizes), 1)]
    starts = itertools.accumulate(sizes, initial=0)
    tokens, weight = tokens.to(DEVICE), weight.to(DEVICE)
    own = [
        (tokens - start).masked_fill((tokens < start) | (tokens >= start + size), -1)
        for start, size in zip(starts, sizes, strict=False)
    ]
    summaries = []
    for shard, places in zip(shards, own, strict=True):
        before = shard.clone()
        summaries.append(walks.first_walk(shard, places, softcap, logit_scale))
        assert torch.equal(shard, before) or shard.isnan().any()
    summary = merged(torch.stack(summaries))
    found = [
        walks.second_walk(shard, places, weight, summary, softcap, logit_scale, form_gradient)
        for shard, places in zip(shards, own, strict=True)
    ]
    for logsumexp, nll in found[1:]:
        torch.testing.assert_close((logsumexp, nll), found[0], rtol=0, atol=0, equal_nan=True)
    return *found[0], torch.cat(shards, 1)


def sure_rows(dtype: torch.dtype, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (15, V) that are as sure of a token as trained rows are, tokens and weights."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(ROWS, VOCABULARY, generator=generator)
    tokens = torch.randint(VOCABULARY, (ROWS, columns), generator=generator)
    tokens[::3, 1] = tokens[::3, 0]
    tokens[::2, -1] = tokens[::2, 0]  # the unlikely token, if there is one
    logits.scatter_(1, tokens[:, :1], torch.arange(float(ROWS))[:, None] + 6)
    weight = 0.5 + torch.rand(ROWS, columns, generator=generator)
    weight[::7, 0] = 0
    return logits.to(dtype), tokens, weight


def eager(
    logits: Tensor, tokens: Tensor, weight: Tensor, softcap: float | None, logit_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the definition says, with the identity as the head, in the logits' dtype."""
    hidden = logits.clone().requires_grad_()
    identity = torch.eye(VOCABULARY, dtype=logits.dtype)
    wide = weight.to(torch.promote_types(logits.dtype, torch.float32))
    loss, logsumexp, nll = head_loss_reference(
        hidden, identity, None, tokens, wide, softcap, logit_scale
    )
    return logsumexp, nll, torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize(("softcap", "logit_scale", "columns"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_are_within_the_budget_of_whole_rows(
    impl: str, dtype: torch.dtype, softcap: float | None, logit_scale: float, columns: int
) -> None:
    if impl == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip(TRUNCATES)
    logits, tokens, weight = sure_rows(dtype, columns)
    head = (softcap, logit_scale)
    oracle = eager(logits.double(), tokens, weight, *head)
    budgets = [
        error_budget(own, exact, dtype)
        for own, exact in zip(eager(logits, tokens, weight, *head), oracle, strict=True)
    ]
    for sizes in SIZES if impl != "triton" else SIZES[2:3]:
        actual = of_shards(impl, logits, tokens, weight, sizes, *head)
        names = ("logsumexp", "nll", "gradient")
        for name, values, exact, budget in zip(names, actual, oracle, budgets, strict=True):
            assert relative_error(values.cpu(), exact) <= budget, (name, sizes)
    if softcap is None:
        only_read = of_shards(impl, logits, tokens, weight, sizes, *head, form_gradient=False)
        assert torch.equal(only_read[0], actual[0]) and torch.equal(only_read[1], actual[1])
        assert torch.equal(only_read[2].cpu(), logits)


@pytest.mark.parametrize("lead", [8.0, 37.0, 77.0])
def test_rows_with_p_closer_to_1_than_any_float_keep_their_loss_and_gradient(
    impl: str, lead: float
) -> None:
    """The token's shard counts the one, others only add to the rest, to 1 - p = 1e-30."""
    leaders = torch.tensor([0, 7, 8, 650, 1300])
    logits = torch.full((5, VOCABULARY), -lead)
    logits[range(5), leaders] = 0
    weight = torch.tensor([[1.0, 0.0]] * 5)
    rest = (VOCABULARY - 1) * math.exp(-lead)
    gradient = torch.full((5, VOCABULARY), math.exp(-lead) / (1 + rest), dtype=torch.float64)
    gradient[range(5), leaders] = -rest / (1 + rest)
    few_roundings = 16 * torch.finfo(torch.float32).eps
    for sizes in SIZES:
        _, nll, actual = of_shards(impl, logits, leaders[:, None].repeat(1, 2), weight, sizes)
        expected = torch.full((5, 2), math.log1p(rest), dtype=torch.float64)
        assert relative_error(nll.cpu(), expected) <= few_roundings, sizes
        assert relative_error(actual.cpu().flatten(), gradient.flatten()) <= few_roundings, sizes


def test_ones_of_several_shards_are_counted_and_those_below_the_maximum_join_the_rest(
    impl: str,
) -> None:
    logits = torch.full((2, VOCABULARY), -50.0)
    logits[:, 100] = logits[:, 1200] = 3.0  # two ones, in two shards
    logits[1, 1250] = 4.0  # one that is higher than both
    tokens = torch.tensor([[100, 1200], [1250, 100]])
    logsumexp, nll, _ = of_shards(impl, logits, tokens, torch.ones(2, 2), (650, 651))
    first, second = 3 + math.log(2), 4 + math.log1p(2 * math.exp(-1))
    torch.testing.assert_close(logsumexp.cpu(), torch.tensor([first, second]))
    expected = torch.tensor([[first - 3, first - 3], [second - 4, second - 3]])
    torch.testing.assert_close(nll.cpu(), expected)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_shard_of_forbidden_tokens_leaves_the_others_finite(
    impl: str, softcap: float | None
) -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, :650] = -torch.inf
    tokens = torch.tensor([[700, 1300], [1300, 650]])
    logsumexp, _, gradient = of_shards(
        impl, logits, tokens, torch.ones(2, 2), (650, 651), softcap=softcap
    )
    assert gradient.isfinite().all() and (gradient[:, :650] == 0).all()
    if softcap is None:
        torch.testing.assert_close(logsumexp.cpu(), torch.full((2,), math.log(651)))


def test_nan_in_one_shard_reaches_all(impl: str) -> None:
    logits, tokens, weight = sure_rows(torch.float32, 2)
    logits[1, 1250] = torch.nan
    logsumexp, nll, gradient = of_shards(impl, logits, tokens, weight, (650, 651))
    others = torch.arange(ROWS) != 1
    assert logsumexp[1].isnan() and nll[1].isnan().all() and gradient[1].isnan().all()
    assert gradient[others].isfinite().all() and nll[others].isfinite().all()


def test_a_shard_of_any_cut_changes_no_more_than_the_last_bits(impl: str) -> None:
    """One shard that is the whole row is the whole row, through the seam and past it."""
    logits, tokens, weight = sure_rows(torch.float32, 3)
    whole = logits.to(DEVICE, copy=True)
    args = (tokens.to(DEVICE), weight.to(DEVICE), 30.0, 1.0, True)
    found = (*row_pass(impl).whole(whole, *args), whole)
    for sizes in ((VOCABULARY,), SIZES[2]):
        for actual, expected in zip(
            of_shards(impl, logits, tokens, weight, sizes, 30.0), found, strict=True
        ):
            error = relative_error(actual.double(), expected.double())
            assert error <= 4 * torch.finfo(torch.float32).eps, sizes


def test_bytes_sent_follow_the_formula() -> None:
    sent = sent_bytes(1000, 4096, 2, 8, torch.bfloat16, hidden_gradient=True)
    assert sent == 7 * 1000 * 5 * 4 + 2 * 7 / 8 * 1000 * 4096 * 4
    assert sent_bytes(1000, 4096, 3, 2, torch.float64, hidden_gradient=False) == 1000 * 6 * 8
    assert sent_bytes(1000, 4096, 2, 1, torch.bfloat16, hidden_gradient=True) == 0
