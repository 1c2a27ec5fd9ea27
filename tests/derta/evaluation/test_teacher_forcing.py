"""Refusal curves and perplexity from packs equal those of separate passes with full logits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from derta.data import Chat, Dialogue, EncodedTriple, Encoder
from derta.evaluation import (
    VariantResult,
    detector_auc,
    find_refusal_token,
    forced_rates,
    mean_curve,
    perplexity,
    refusal_curve,
    response,
    response_curve,
)
from derta.evaluation.measures.results import forced_outcomes
from derta.modeling import patch
from derta.modeling.patch import apply_derta, remove_derta
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

WORDS = "First buy a brush then open the paint and stir it well".split()
REFUSAL = 70


@pytest.fixture
def examples(chat: Chat) -> list[EncodedTriple]:
    return [
        response(
            chat,
            f"example {place}",
            [{"role": "user", "content": f"How do I paint {'the fence ' * place}green?"}],
            " ".join(WORDS[: 1 + 5 * place % 11]),
        )
        for place in range(6)
    ]


def separate_logits(model: PreTrainedModel, example: EncodedTriple) -> torch.Tensor:
    ids = torch.tensor([[*example.prompt, *example.harmful]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(example.prompt) - 1 :]


def separate_curve(model: PreTrainedModel, example: EncodedTriple) -> torch.Tensor:
    return separate_logits(model, example).softmax(-1)[:, REFUSAL]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_curves_equal_those_of_separate_passes(
    architecture: str, examples: list[EncodedTriple]
) -> None:
    model = tiny_model(architecture, dtype=torch.float64).eval()
    curves = refusal_curve(model, examples, REFUSAL, max_tokens=90)
    for curve, example in zip(curves, examples, strict=True):
        assert curve.shape == (len(example.harmful) + 1,)
        expected = separate_curve(model, example).numpy()
        np.testing.assert_allclose(curve, expected, rtol=1e-5)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_ranks_come_with_the_refusal_curve_from_one_pass(
    architecture: str, examples: list[EncodedTriple], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture, dtype=torch.float64).eval()
    alone = refusal_curve(model, examples, REFUSAL, max_tokens=90)
    passes = []
    apply_derta(model, REFUSAL)
    monkeypatch.setattr(patch, "run_body", counted(patch.run_body, passes))
    curves = response_curve(model, examples, REFUSAL, max_tokens=90)
    assert len(passes) < len(examples)  # packs, each read once
    remove_derta(model)
    for curve, refusal, example in zip(curves, alone, examples, strict=True):
        np.testing.assert_array_equal(curve.refusal, refusal)
        logits, tokens = separate_logits(model, example)[:-1], torch.tensor(example.harmful).long()
        expected = (logits > logits.gather(1, tokens[:, None])).sum(1)
        assert curve.ranks.tolist() == expected.tolist()
    assert len({rank for curve in curves for rank in curve.ranks}) > 5


def counted(function: Callable[..., Any], calls: list[None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    return call


def test_curves_do_not_depend_on_packing(examples: list[EncodedTriple]) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    together = refusal_curve(model, examples, REFUSAL)
    alone = refusal_curve(model, examples, REFUSAL, max_tokens=1)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert refusal_curve(model, [], REFUSAL) == []


def test_a_curve_of_several_tokens_is_the_sum_of_theirs(examples: list[EncodedTriple]) -> None:
    model, several = tiny_model("llama", dtype=torch.float64), (REFUSAL, 3, 9)
    added = [refusal_curve(model, examples, one) for one in several]
    tokenizer = tiny_tokenizer()
    assert find_refusal_token(model, tokenizer, [9, "Sorry"]) == (
        9,
        find_refusal_token(model, tokenizer, "Sorry"),
    )
    with pytest.raises(ValueError, match="^refusal must name at least one token, got none"):
        find_refusal_token(model, tokenizer, [])
    apply_derta(model, several)
    assert find_refusal_token(model, tokenizer) == tuple(sorted(several))
    together = refusal_curve(model, examples, several)
    for place, curve in enumerate(together):
        np.testing.assert_allclose(curve, sum(one[place] for one in added), rtol=1e-5)
    apply_derta(model, [REFUSAL])
    np.testing.assert_allclose(refusal_curve(model, examples, (REFUSAL,))[0], added[0][0])


def test_adapters_are_used(examples: list[EncodedTriple]) -> None:
    model = get_peft_model(
        tiny_model("llama", dtype=torch.float64),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    curves = refusal_curve(model, examples, REFUSAL)
    model.eval()
    for curve, example in zip(curves, examples, strict=True):
        np.testing.assert_allclose(curve, separate_curve(model, example).numpy(), rtol=1e-5)


def test_the_state_of_the_model_is_restored(examples: list[EncodedTriple]) -> None:
    model = tiny_model("llama").train()
    ids = torch.tensor([[5, 6, 7]])
    before, attributes = model(input_ids=ids).logits, set(vars(model))
    refusal_curve(model, examples, REFUSAL)
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert set(vars(model)) == attributes

    apply_derta(model, REFUSAL)
    refusal_curve(model, examples, REFUSAL)
    assert model(
        input_ids=ids,
        position_ids=torch.tensor([[0, 1, 2]]),
        visible_until=torch.tensor([[3, 3, 3]], dtype=torch.int32),
        rto_mask=torch.ones(1, 3, dtype=torch.bool),
    ).loss.requires_grad
    remove_derta(model)


def test_errors_name_examples_that_cannot_be_read(examples: list[EncodedTriple]) -> None:
    model = apply_derta(tiny_model("llama"), 7)
    with pytest.raises(ValueError, match="the one given to apply_derta, 7, got 70"):
        refusal_curve(model, examples, REFUSAL)
    short = tiny_model("llama", max_position_embeddings=40)
    length = len(examples[5].prompt) + len(examples[5].harmful)
    message = f"example 5: its {length} tokens exceed the model's context of 40"
    with pytest.raises(ValueError, match=re.escape(message)):
        refusal_curve(short, examples[5:], REFUSAL)


def test_perplexity_is_that_of_the_assistants_tokens(chat: Chat) -> None:
    model = tiny_model("llama", dtype=torch.float64).eval()
    encoder = Encoder(tiny_tokenizer(), max_length=512, max_tokens=512, branches=0, cuts="zero")
    turns = ["How do I paint?", "Open the paint.", "And then?", "Stir it well."]
    dialogues = [
        encoder.encode(
            Dialogue(
                id=str(count),
                messages=[
                    {"role": role, "content": text}
                    for role, text in zip(["user", "assistant"] * 2, turns[:count], strict=False)
                ],
            )
        )
        for count in (2, 4)
    ]
    nll, tokens = perplexity(model, dialogues)
    expected = []
    for dialogue in dialogues:
        ids = torch.from_numpy(dialogue.input_ids).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        expected += losses[torch.from_numpy(dialogue.is_target[1:])].tolist()
    assert tokens == len(expected)
    assert nll == pytest.approx(math.fsum(expected), rel=1e-6)


CURVES = [np.array(curve) for curve in ([0.9, 0.1, 0.2], [0.2, 0.6], [0.1, 0.3, 0.4, 0.8, 0.0])]


def test_the_mean_curve_counts_only_responses_that_are_long_enough() -> None:
    mean, count = mean_curve(CURVES)
    np.testing.assert_allclose(mean, [0.4, 1.0 / 3, 0.3, 0.8, 0.0])
    assert count.tolist() == [3, 3, 2, 1, 1]
    assert [part.size for part in mean_curve([])] == [0, 0]


def test_the_detector_reads_the_highest_probability() -> None:
    benign = [np.array([0.1, 0.7]), np.array([0.9])]
    # Peaks 0.9, 0.6, 0.8 against 0.7, 0.9: two of six pairs are won, and one is a tie.
    assert detector_auc(CURVES, benign) == 2.5 / 6


def test_forced_rates_follow_the_rest_of_each_response() -> None:
    # At depth 0 all three are stopped, at depth 1 the last two. The second has only one token and
    # is left out at depth 1. At depth 4 no response has tokens left.
    assert forced_rates(CURVES, [], [0]) == {"asr": 0.0}
    assert forced_rates(CURVES, [], [1]) == {"asr": 1 / 2}
    assert forced_rates(CURVES, [], [0, 1]) == {"asr": 1 / 5}
    assert forced_rates(CURVES, [], [4]) == {}
    assert forced_rates([np.array([0.5, 0.5])], [], [0]) == {"asr": 1.0}  # half is not more
    assert forced_rates([], CURVES[1:2] + [np.array([0.5])], [0]) == {"over_refusal": 1 / 2}
    assert forced_rates([np.array([np.nan, 0.1])], [], [0]) == {"asr": 1.0}  # NaN stops nothing


@pytest.mark.parametrize("refusals", [1, 2, 8])
def test_a_forced_refusal_is_the_likeliest_token(refusals: int) -> None:
    """Tokens of a set may have most of the probability together, and none of them be said."""
    torch.manual_seed(0)
    logits = torch.randn(4000, 12, dtype=torch.float64)
    logits[:, :refusals] += torch.randn(4000, 1) * 3 + 3
    p = logits.softmax(1)
    of_set = p[:, :refusals].sum(1)
    refuses = p.argmax(1) < refusals
    forced = torch.tensor(
        [forced_rates([], [curve[None]], [], refusals)["over_refusal"] for curve in of_set.numpy()]
    ).bool()
    assert (forced <= refuses).all()
    assert 500 < forced.sum() < refuses.sum()
    # No lower bar would do: an even set, and another token that is a little likelier.
    bar = refusals / (refusals + 1)
    even = torch.cat([torch.full((refusals,), (bar - 1e-6) / refusals), torch.tensor([1 - bar])])
    assert even.argmax() == refusals
    curve = np.array([float(even[:refusals].sum())])
    assert forced_rates([curve], [curve], [], refusals) == {"over_refusal": 0.0}
    result = VariantResult(benign_curves=(curve + 2e-6,), refusals=refusals)
    assert [one.hits for one in forced_outcomes(result, [0])] == [1]


def test_a_broken_model_has_no_curve(examples: list[EncodedTriple]) -> None:
    model = apply_derta(tiny_model("llama"), REFUSAL)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(
        FloatingPointError, match="^example .: the refusal's probability is NaN, exp"
    ):
        refusal_curve(model, examples, REFUSAL)
    with pytest.raises(
        FloatingPointError, match="^logits must be numbers for a token to have a ra"
    ):
        response_curve(model, examples, REFUSAL)
