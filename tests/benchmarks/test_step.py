"""The whole step: every rung trains the same objective, and the table shows its cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks.step.question import (
    LARGE,
    OFFICIAL,
    OURS,
    QUESTION,
    RUNGS,
    SHAPES,
    SMALL,
    batches_of,
    targets_of,
)

CPU = torch.device("cpu")
ON_A_CPU = [name for name, rung in RUNGS.items() if not rung.liger]
FEW = replace(SMALL, triples=6, branches=2)  # 18 samples: two batches of the official recipe
SHAPE = SHAPES[SMALL.model] | dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module", autouse=True)
def small_shape() -> Iterator[None]:
    """Use a smaller shape than the measured one, which is too slow for a test."""
    with mock.patch.dict(SHAPES, {SMALL.model: SHAPE}):
        yield


@pytest.fixture(scope="module")
def answers(small_shape: None) -> dict[bool, dict[str, torch.Tensor]]:
    return {lora: QUESTION.answer(replace(FEW, lora=lora), CPU) for lora in (False, True)}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ON_A_CPU)
def test_every_rung_has_the_official_recipes_gradients(name, lora, answers) -> None:
    case = replace(FEW, lora=lora)
    errors = QUESTION.setup(case, name, CPU).errors(answers[lora])
    assert set(errors) == {"gradient_error"}
    assert QUESTION.is_right(case, errors, {})
    trained = [part for part in answers[lora] if ("lora_" in part) == lora]
    assert trained and len(trained) == len(answers[lora])


def test_rungs_have_equal_targets_and_ever_fewer_tokens() -> None:
    batches = {name: batches_of(FEW, RUNGS[name], CPU) for name in ON_A_CPU}
    assert len({targets_of(of_one) for of_one in batches.values()}) == 1
    tokens = [QUESTION.derived(FEW, name, {"time_ms_p50": 500.0})["tokens"] for name in ON_A_CPU]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[-1] < tokens[-2] < tokens[0]


def test_clear_frees_a_steps_gradients() -> None:
    ready = QUESTION.setup(FEW, OURS, CPU)
    first = {name: gradient.clone() for name, gradient in ready.gradients().items()}
    for name, gradient in ready.gradients().items():
        assert torch.equal(gradient, first[name]), name


def test_a_bfloat16_result_is_judged_by_the_official_recipes_error() -> None:
    baseline = {"gradient_error": 0.01}
    assert QUESTION.is_right(LARGE, {"gradient_error": 0.025}, baseline)
    assert not QUESTION.is_right(LARGE, {"gradient_error": 0.03}, baseline)


def test_liger_is_listed_with_its_reason() -> None:
    with pytest.raises(NotImplementedError, match="Liger's layers need Triton"):
        QUESTION.setup(SMALL, "one pass, Liger layers", CPU)


def test_triples_per_second_use_the_median_step() -> None:
    derived = QUESTION.derived(FEW, OFFICIAL, {"time_ms_p50": 1500.0})
    assert derived["triples_per_s"] == 4.0
