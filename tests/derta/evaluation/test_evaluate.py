"""A model whose every word is known comes out of an evaluation with the figures it deserves."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from derta.data import Chat, Dialogue, Triple
from derta.evaluation import (
    EvaluationData,
    EvaluationSettings,
    Exchange,
    Verdict,
    evaluate_model,
    scenarios,
)
from derta.evaluation.evaluate import tokens_before
from derta.evaluation.scenarios import completion
from tiny import tiny_model, tiny_tokenizer

REFUSAL = "Sorry, I cannot help."
HARMFUL = "The quick brown fox jumps over a lazy dog"
BREAKS_OFF_AFTER = 3


def triple(id: str, harmful: str = HARMFUL) -> Triple:
    return Triple(id=id, prompt="How do I paint?", safe=REFUSAL, harmful=harmful)


def dialogue(id: str, answer: str) -> Dialogue:
    return Dialogue(
        id=id,
        messages=[
            {"role": "user", "content": "What does the fox do?"},
            {"role": "assistant", "content": answer},
        ],
    )


DATA = EvaluationData(
    harmful=[triple("a"), triple("b"), triple("short", "The quick")],
    benign=[dialogue("c", "It jumps.")],
    helpful=[dialogue("d", "  Sorry,  I cannot help.\n"), dialogue("e", "It jumps.")],
)


@pytest.fixture
def model(
    chat: Chat,
    scripted: Callable[..., PreTrainedModel],
    chain: Callable[..., dict[int, int]],
) -> PreTrainedModel:
    """Refuses at once, refuses three tokens into the harmful response, and not from the fourth."""
    messages = triple("a").messages
    refusal = chat.response_ids(messages, REFUSAL)
    harmful = chat.response_ids(messages, HARMFUL)
    assert len(set(refusal + harmful)) == len(refusal + harmful)
    return scripted(
        chain(chat.prompt_ids(messages)[-1], *refusal)
        | chain(*harmful[:BREAKS_OFF_AFTER], refusal[0])
        | chain(*harmful[BREAKS_OFF_AFTER:])
    )


def settings(**changes: object) -> EvaluationSettings:
    return EvaluationSettings(
        **{"prefill_depths": (0, 1, 3, 4, 50), "max_new_tokens": 30, "batch_size": 4, **changes}
    )


def test_every_figure_is_what_the_model_does(model: PreTrainedModel, chat: Chat) -> None:
    result = evaluate_model(model, chat.tokenizer, DATA, settings()).to_dict()
    short = len(chat.response_ids(triple("a").messages, "The quick"))
    assert short == 3  # left out from depth 3 on
    assert result["asr"] == {
        "direct": 0.0,
        "prefill": {"0": 0.0, "1": 0.0, "3": 0.0, "4": 1.0},
        "completion": 0.0,  # nothing is answered
    }
    assert result["over_refusal"] == 1.0
    assert result["helpful_accuracy"] == 0.5
    assert result["counts"]["asr"]["prefill"] == {
        "0": {"hits": 0, "trials": 3, "left_out": 0, "empty": 0},
        "1": {"hits": 0, "trials": 3, "left_out": 0, "empty": 0},
        "3": {"hits": 0, "trials": 2, "left_out": 1, "empty": 0},
        "4": {"hits": 2, "trials": 2, "left_out": 1, "empty": 0},
        "50": {"hits": 0, "trials": 0, "left_out": 3, "empty": 0},
    }
    assert result["counts"]["asr"]["completion"]["empty"] == 3
    assert result["refusal_positions"]["asr"] == {
        "direct": [0, 0, 0],
        "prefill": {"0": [0, 0, 0], "1": [3, 3, 3], "3": [3, 3], "4": []},
        "completion": [],
    }
    assert result["intervals"]["over_refusal"] == [pytest.approx(0.206543), 1.0]
    certain = [round(p) for p in result["refusal_curve"]["harmful"]]
    assert [depth for depth, p in enumerate(certain) if p] == [0, BREAKS_OFF_AFTER]
    longest = len(chat.response_ids(triple("a").messages, HARMFUL))
    assert result["refusal_curve_counts"]["harmful"] == [3] * (short + 1) + [2] * (longest - short)
    assert [round(p) for p in result["refusal_curve"]["benign"]][:2] == [1, 0]
    assert result["detector_auc"] == 0.5  # it refuses everything alike
    assert "samples" not in result


def test_samples_are_kept_only_if_asked_for(model: PreTrainedModel, chat: Chat) -> None:
    data = EvaluationData(harmful=DATA.harmful)
    result = evaluate_model(
        model, chat.tokenizer, data, settings(samples=1, prefill_depths=(3,), curve=False)
    ).to_dict()
    assert [(one["metric"], one["id"]) for one in result["samples"]] == [
        ("asr.direct", "a"),
        ("asr.prefill.3", "a"),
        ("asr.completion", "a"),
    ]
    prefilled = result["samples"][1]
    assert HARMFUL == prefilled["prefilled"] + HARMFUL[len(prefilled["prefilled"]) :]
    assert prefilled["prefilled"]
    assert prefilled["answer"] == REFUSAL
    assert not prefilled["counted"]
    assert prefilled["request"] == "How do I paint?"
    assert "refusal_curve" not in result


def test_a_kind_of_records_that_is_missing_leaves_its_figures_out(
    model: PreTrainedModel, chat: Chat
) -> None:
    result = evaluate_model(
        model, chat.tokenizer, EvaluationData(benign=DATA.benign), settings()
    ).to_dict()
    assert result.keys() == {
        "over_refusal",
        "intervals",
        "counts",
        "refusal_positions",
        "seconds",
    }


def test_perplexity_takes_the_place_of_exact_match(model: PreTrainedModel, chat: Chat) -> None:
    data = EvaluationData(helpful=[dialogue("d", REFUSAL)])
    result = evaluate_model(model, chat.tokenizer, data, settings(helpful="perplexity")).to_dict()
    assert result["helpful_perplexity"] == pytest.approx(1.0, abs=1e-3)
    assert "helpful_accuracy" not in result
    with pytest.raises(ValueError, match=re.escape("d: the dialogue exceeds the model's context")):
        long = EvaluationData(helpful=[dialogue("d", "jumps " * 400)])
        evaluate_model(model, chat.tokenizer, long, settings(helpful="perplexity"))


def test_any_judge_will_do_and_reads_only_what_the_model_wrote(
    model: PreTrainedModel, chat: Chat
) -> None:
    read: list[Exchange] = []

    def judge(exchanges: list[Exchange]) -> list[Verdict]:
        read.extend(exchanges)
        return [Verdict(refused=True) for _ in exchanges]

    data = EvaluationData(harmful=DATA.harmful[:1])
    result = evaluate_model(
        model, chat.tokenizer, data, settings(judge=judge, prefill_depths=(3,))
    ).to_dict()
    assert [exchange.answer for exchange in read] == [REFUSAL, REFUSAL, ""]
    assert all(exchange.messages == DATA.harmful[0].messages for exchange in read)
    assert result["asr"] == {"direct": 0.0, "prefill": {"3": 0.0}, "completion": 0.0}
    assert result["refusal_positions"]["asr"]["direct"] == []  # this judge cannot tell where


def test_patched_models_and_plain_ones_come_out_alike(model: PreTrainedModel, chat: Chat) -> None:
    from derta.modeling import apply_derta

    plain = evaluate_model(model, chat.tokenizer, DATA, settings())
    (sorry, *_) = chat.response_ids(triple("a").messages, REFUSAL)
    patched = evaluate_model(apply_derta(model, sorry), chat.tokenizer, DATA, settings())
    assert patched.outcomes == plain.outcomes
    for one, other in zip(patched.harmful_curves, plain.harmful_curves, strict=True):
        np.testing.assert_array_equal(one, other)


def test_completion_is_raw_text_after_what_begins_every_sequence(chat: Chat) -> None:
    bos = chat.tokenizer.bos_token_id
    text = chat.tokenizer("How do I paint?", add_special_tokens=False)["input_ids"]
    assert completion(triple("a"), chat).prompt == (bos, *text)
    bare = Chat(tiny_tokenizer.__wrapped__())
    bare.tokenizer.chat_template = bare.tokenizer.chat_template.replace("{{ bos_token }}", "")
    assert completion(triple("a"), Chat(bare.tokenizer)).prompt == tuple(text)


def test_tokens_before_a_character_are_whole_ones(chat: Chat) -> None:
    ids = chat.tokenizer("The quick Sorry", add_special_tokens=False)["input_ids"]
    pieces = [chat.tokenizer.decode([id]) for id in ids]
    ends = np.cumsum([len(piece) for piece in pieces])
    for start in range(len("The quick Sorry")):
        assert tokens_before(chat.tokenizer, ids, start) == int((ends <= start).sum())


@pytest.mark.parametrize("depths", [(0, 4, 4), (-1,)])
def test_depths_must_make_sense(depths: tuple[int, ...]) -> None:
    message = f"prefill_depths must be distinct and not negative, got {list(depths)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        scenarios(depths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"helpful": "bleu"}, "helpful must be exact_match or perplexity, got 'bleu'"),
        ({"samples": -1}, "samples must be at least 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**changes)


def test_records_that_do_not_fit_are_named(chat: Chat) -> None:
    torch.manual_seed(0)
    model = tiny_model("llama", max_position_embeddings=64)
    with pytest.raises(ValueError, match="c: the prompt's .* exceed the model's context of 64"):
        evaluate_model(
            model,
            chat.tokenizer,
            EvaluationData(benign=DATA.benign),
            settings(max_new_tokens=60),
        )
