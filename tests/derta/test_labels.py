"""The objective as labels alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from derta.labels import derta_labels
from derta_kernels.testing import equals_snippet

REFUSAL = 3


def random_case(seed: int) -> tuple[Tensor, Tensor]:
    """Labels (B, T) with prompts and padding, and which rows are RTO."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = torch.randint(1, 90, (2,), generator=generator).tolist()
    labels = torch.randint(1000, (rows, length), generator=generator)
    edges = torch.randint(length + 1, (rows, 2), generator=generator).sort(1).values
    position = torch.arange(length)
    unlabelled = (position < edges[:, :1]) | (position >= edges[:, 1:])
    return labels.masked_fill(unlabelled, -100), torch.rand(rows, generator=generator) < 0.5


def official_labels(labels: Tensor, is_rto: Tensor) -> Tensor:
    """What the official full-parameter script trains on, row after row, as it draws it."""
    result = labels.clone()
    for row in range(len(labels)):
        if is_rto[row]:
            result[row, labels[row] != -100] = REFUSAL
            length = labels.shape[1]
            dropped = torch.randperm(length)[: length - max(1, (length + 19) // 20)]
            result[row, dropped] = -100
    return result


def test_official_labels_are_matched_on_200_random_cases_by_seed() -> None:
    for seed in range(200):
        labels, is_rto = random_case(seed)
        torch.manual_seed(seed)
        expected = official_labels(labels, is_rto)
        torch.manual_seed(seed)
        assert torch.equal(derta_labels(labels, is_rto, REFUSAL, keep="official"), expected)
        generator = torch.Generator().manual_seed(seed)
        by_generator = derta_labels(labels, is_rto, REFUSAL, "official", generator)
        assert torch.equal(by_generator, expected)


def test_keeping_everything_equals_the_documented_line() -> None:
    labels, is_rto = random_case(0)
    names = dict(torch=torch, labels=labels, is_rto=is_rto, refusal_token_id=REFUSAL)
    assert is_rto.any() and not is_rto.all()
    assert torch.equal(
        derta_labels(labels, is_rto, REFUSAL), eval(equals_snippet(derta_labels), names)
    )


@pytest.mark.parametrize("keep", [1e-9, 0.05, 0.25, 0.5, 0.9, 1])
def test_a_share_keeps_exactly_that_many_labels_and_never_none(keep: float) -> None:
    for seed in range(20):
        labels, is_rto = random_case(seed)
        result = derta_labels(labels, is_rto, REFUSAL, keep)
        kept = result != -100
        assert torch.equal(result[~is_rto], labels[~is_rto])
        assert (result[is_rto][kept[is_rto]] == REFUSAL).all()
        assert not (kept & (labels == -100)).any()
        for row in is_rto.nonzero().flatten().tolist():
            labelled = int((labels[row] != -100).sum())
            assert kept[row].sum() == (max(1, round(keep * labelled)) if labelled else 0)


def test_a_label_that_nothing_predicts_is_the_first_to_go() -> None:
    labels = torch.full((500, 4), 7)
    result = derta_labels(labels, torch.ones(500, dtype=torch.bool), REFUSAL, keep=0.75)
    assert (result[:, 0] == -100).all() and (result[:, 1:] == REFUSAL).all()


def test_every_label_is_as_likely_to_stay_as_any_other() -> None:
    rows, length = 4000, 21
    labels = torch.full((rows, length), 7)
    labels[:, 0] = -100
    generator = torch.Generator().manual_seed(0)
    result = derta_labels(labels, torch.ones(rows, dtype=torch.bool), REFUSAL, 0.25, generator)
    share = (result[:, 1:] == REFUSAL).double().mean(0)
    five_sigma = 5 * (0.25 * 0.75 / rows) ** 0.5
    assert ((share - 0.25).abs() < five_sigma).all()


def test_draws_follow_the_generator_and_leave_the_input_alone() -> None:
    labels, is_rto = random_case(1)
    before = labels.clone()

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return derta_labels(labels, is_rto, REFUSAL, 0.3, generator)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(labels, before)


@pytest.mark.parametrize("keep", [0.5, "official"])
def test_empty_batches_stay_empty(keep: Any) -> None:
    for shape in ((0, 5), (2, 0)):
        labels = torch.zeros(shape, dtype=torch.int64)
        assert derta_labels(labels, torch.ones(shape[0]).bool(), REFUSAL, keep).shape == shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(labels=torch.zeros(6).long()), ValueError, r"labels must have shape \(B, T\), got"),
        (dict(labels=torch.zeros(2, 3)), ValueError, "labels must be int64, got torch.float32"),
        (dict(is_rto=torch.ones(3).bool()), ValueError, r"is_rto must have shape \(B,\) = \(2,\)"),
        (dict(is_rto=torch.ones(2)), ValueError, "is_rto must be bool, got torch.float32"),
        (
            dict(is_rto=torch.ones(2, dtype=torch.bool, device="meta")),
            ValueError,
            "is_rto must be on cpu as labels are, got meta",
        ),
        (dict(refusal_token_id="Sorry"), TypeError, "refusal_token_id must be int, got str"),
        (dict(refusal_token_id=-1), ValueError, "refusal_token_id must be at least 0, got -1"),
        (dict(keep=0.0), ValueError, r"keep must lie in \(0, 1\] or be \"official\", got 0.0"),
        (dict(keep=1.5), ValueError, r"keep must lie in \(0, 1\]"),
        (dict(keep="5%"), ValueError, "keep must lie in .* got '5%'"),
        (dict(keep=None), TypeError, 'keep must be a number or "official", got NoneType'),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = dict(
        labels=torch.zeros(2, 3, dtype=torch.int64),
        is_rto=torch.ones(2, dtype=torch.bool),
        refusal_token_id=REFUSAL,
    )
    with pytest.raises(error, match=message):
        derta_labels(**arguments | change)
