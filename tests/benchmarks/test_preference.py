"""A step of a preference loss: ours and TRL's have the same gradients, and the table their cost."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from benchmarks.preference import question
from benchmarks.preference.question import OURS, QUESTION, Case, names_of

CPU = torch.device("cpu")
SHAPE = question.TINY | dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(autouse=True)
def small_shape() -> Iterator[None]:
    """Use a smaller shape than the measured one, which is too slow for a test."""
    with mock.patch.object(question, "TINY", SHAPE):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("loss", list(question.CASES))
def test_all_have_the_gradients_of_trl_in_float64(loss) -> None:
    pytest.importorskip("trl")
    case = Case(loss, 3)
    answer = QUESTION.answer(case, CPU)
    tokens = {}
    for name in names_of(case):
        errors = QUESTION.setup(case, name, CPU).errors(answer)
        assert QUESTION.is_right(case, errors, {}), name
        tokens[name] = QUESTION.derived(case, name, {})["tokens"]
    assert tokens.pop(OURS) < min(tokens.values())
    answer["model.norm.weight"] *= 1.01
    assert not QUESTION.is_right(case, QUESTION.setup(case, OURS, CPU).errors(answer), {})


def test_tokens_are_those_that_trl_pads_to() -> None:
    pytest.importorskip("trl")
    case = Case("dpo", 3)
    batch = QUESTION.setup(case, question.TRL, CPU).batch
    assert QUESTION.derived(case, question.TRL, {})["tokens"] == batch["input_ids"].numel()
