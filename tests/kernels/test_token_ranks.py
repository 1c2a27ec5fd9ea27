"""Ranks of tokens are those of all logits at once, in any chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from allocated import peak_bytes
from derta_kernels.head_loss import chunked, ranks, token_ranks
from derta_kernels.testing import HeadCase, HostTransfers, equals_snippet, head_case
from heads import DEVICE

HEADS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "bias": dict(bias=True),
    "scale": dict(logit_scale=0.25),
    "bias and negative scale": dict(bias=True, logit_scale=-2.0),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set chunks of seven rows and slices of three, so that both end in a ragged one."""
    monkeypatch.setattr(ranks, "chunk_rows", lambda *_: 7)
    monkeypatch.setattr(ranks, "SLICE_ELEMENTS", 3 * 97)
    for module in (chunked, ranks):
        monkeypatch.setattr(module, "product_dtype", lambda dtype, _: dtype)


def of(case: HeadCase, **options: Any) -> Tensor:
    found = token_ranks(
        case.hidden, case.weight, case.target, bias=case.bias, logit_scale=case.logit_scale,
        **options,
    )  # fmt: skip
    assert found.dtype == torch.int64 and found.shape == case.target.shape
    return found


@pytest.mark.parametrize("head", HEADS)
def test_it_equals_its_documented_equation(head: str) -> None:
    case = head_case(probabilities=(0.5, 0.01), **HEADS[head]).on(DEVICE)
    # Any token, not only one that its row is sure of.
    any_token = torch.arange(60, device=DEVICE) * 53 % 97
    case = replace(case, target=any_token.where(case.target != -100, -100))
    names = case.arguments() | dict(torch=torch, F=F, ignore_index=-100)
    exec(equals_snippet(token_ranks).replace(".float()", ""), names)
    assert len(set(names["ranks"].tolist())) > 30
    assert torch.equal(of(case), names["ranks"])


def test_a_cap_of_the_logits_would_change_nothing() -> None:
    case = head_case(probabilities=(0.5,), softcap=50.0)
    z = 50.0 * torch.tanh(F.linear(case.hidden, case.weight) / 50.0)
    own = z.gather(1, case.target.clamp(min=0)[:, None])
    expected = (z > own).sum(1).where(case.target != -100, -1)
    assert torch.equal(of(case), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_logits_have_the_lowest_rank_of_any_order(dtype: torch.dtype) -> None:
    # With the identity as its head, hidden is its own logits: 0 twice, then 3 five times, then 9.
    logits = torch.tensor([0, 0, 3, 3, 3, 3, 3, 9]).repeat(8, 1)
    weight = torch.eye(8)
    found = token_ranks(logits.to(dtype), weight.to(dtype), torch.arange(8))
    assert found.tolist() == [6, 6, 1, 1, 1, 1, 1, 0]
    found = token_ranks(logits.to(dtype), weight.to(dtype), torch.arange(8), logit_scale=-1.0)
    assert found.tolist() == [0, 0, 2, 2, 2, 2, 2, 7]


@pytest.mark.parametrize("vocabulary", [2, 257, 1301])
def test_bfloat16_counts_are_not_rounded(vocabulary: int) -> None:
    """A sum of a thousand ones in bfloat16 would stop at 256."""
    hidden = torch.ones(3, 1, dtype=torch.bfloat16)
    weight = torch.arange(vocabulary).div(-vocabulary).to(torch.bfloat16)[:, None]
    target = torch.tensor([vocabulary - 1, 0, -100])
    expected = int((weight[:, 0] > weight[-1, 0]).sum())
    assert token_ranks(hidden, weight, target).tolist() == [expected, 0, -1]


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_no_rows_one_row_and_rows_without_a_target(rows: int) -> None:
    case = head_case(rows, probabilities=(0.5,))
    # Most of the probability on the target makes it the likeliest token, see `head_case`.
    assert of(case).tolist() == [0, -1, 0, 0, -1][:rows]
    assert (of(replace(case, target=torch.full_like(case.target, -100))) == -1).all()


def test_autocast_casts_as_a_linear_layer_does() -> None:
    case = head_case(dtype=torch.float32, probabilities=(0.01,), bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = of(case)
    assert torch.equal(found, of(case.to(torch.bfloat16)))
    assert not torch.equal(found, of(case))


def test_memory_is_a_chunk_and_the_host_waits_twice() -> None:
    hidden, weight = torch.randn(280, 16), torch.randn(4099, 16)
    target = torch.arange(280)
    chunk = 7 * 4 * 4128  # rows are padded to 128 bytes
    small = 280 * 8 * 8 + 8 * 7 * 16  # a few numbers a row, and a chunk's hidden states
    assert peak_bytes(lambda: token_ranks(hidden, weight, target)) <= chunk + small
    with HostTransfers() as transfers:
        token_ranks(hidden, weight, target)
    assert transfers.count == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("logit_scale", [1.0, -1.0])
def test_a_broken_model_ranks_nothing(dtype: torch.dtype, logit_scale: float) -> None:
    """A comparison with NaN is false, so any token of its row would pass for the likeliest one."""
    hidden, weight = torch.zeros(20, 1, dtype=dtype), torch.ones(9, 1, dtype=dtype)
    target = torch.arange(20) % 9
    target[3] = -100
    said = "^logits must be numbers for a token to have a rank, got NaN or infinity in {} of 19 r"

    def found(**changes: Tensor) -> list[int]:
        inputs = dict(hidden=hidden, weight=weight, target=target) | changes
        return token_ranks(**inputs, logit_scale=logit_scale).tolist()

    broken = hidden.clone()
    broken[3] = torch.nan  # a row without a target
    assert found(hidden=broken) == found()
    broken[[1, 16]] = torch.nan
    with pytest.raises(FloatingPointError, match=said.format(2)):
        found(hidden=broken)
    bias = torch.zeros(9, dtype=dtype)
    for value in (torch.nan, logit_scale * torch.inf):
        bias[8] = value  # of one token alone
        with pytest.raises(FloatingPointError, match=said.format(19)):
            found(bias=bias)
    bias[8] = -logit_scale * torch.inf  # a token that is never said
    assert found(bias=bias) == [-1 if one < 0 else 8 * (one == 8) for one in target.tolist()]


def test_no_gradient_is_formed() -> None:
    case = head_case(5).requiring_gradients()
    assert not of(case).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(target=torch.zeros(3, dtype=torch.int64)), r"target must have shape \(N,\) = \(60,"),
        (dict(target=torch.full((60,), 97)), r"target must lie in \[0, V\) = \[0, 97\)"),
        (dict(weight=torch.zeros(97, 2)), r"weight must have shape \(V, d\)|hidden's dtype"),
        (dict(bias=torch.zeros(3)), r"bias must have shape \(V,\) = \(97,\), got \(3,\)"),
        (dict(scratch_mb=0), "scratch_mb must be > 0"),
        (dict(logit_scale=0.0), "logit_scale must be finite and not 0"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    case = head_case()
    arguments = dict(hidden=case.hidden, weight=case.weight, target=case.target) | change
    with pytest.raises(ValueError, match=message):
        token_ranks(**arguments)
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup"):
        token_ranks(case.hidden, case.weight, case.target, group="tp")  # type: ignore[arg-type]
