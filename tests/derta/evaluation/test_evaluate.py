"""An evaluation of a scripted model finds the figures that follow from the script."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from derta.data import Chat, Dialogue, Message, Request, Triple
from derta.data.tokens.chat import PROBE
from derta.evaluation import (
    Attacks,
    Decoding,
    Defence,
    EvaluationData,
    EvaluationSettings,
    Exchange,
    KeywordJudge,
    RankAttack,
    Verdict,
    evaluate_model,
    find_refusal_token,
    refusal_curve,
    refusal_curves,
    response,
    summarize,
    wilson_interval,
    write_report,
)
from derta.evaluation.attacks import WHOLE, keywords_of, refusal_starts, thinking_tag
from derta.evaluation.evaluate import tokens_before
from derta.evaluation.generation.decoding import GREEDY
from derta.evaluation.generation.local import Written
from derta.evaluation.presets import OFFICIAL_CHAT_TEMPLATE
from derta.evaluation.scenarios import completion, following, in_context, make_scenarios
from derta.modeling.introspection import context_length
from derta.modeling.patch import apply_derta
from marked import marked
from tiny import tiny_model, tiny_tokenizer

REFUSAL = "Sorry, I cannot help."
HARMFUL = "The quick brown fox jumps over a lazy dog"
BREAKS_OFF_AFTER = 3


def asked(id: str, response: str = HARMFUL, **fields: str) -> Request:
    return Request(id=id, prompt="How do I paint?", response=response, **fields)


def harmless(id: str, response: str) -> Request:
    return Request(id=id, prompt="What does the fox do?", response=response)


DATA = EvaluationData(
    harmful=[asked("a"), asked("b"), asked("short", "The quick")],
    benign=[harmless("c", "It jumps.")],
    helpful=[harmless("d", "  Sorry,  I cannot help.\n"), harmless("e", "It jumps.")],
)


@pytest.fixture
def model(
    chat: Chat,
    scripted: Callable[..., PreTrainedModel],
    chain: Callable[..., dict[int, int]],
) -> PreTrainedModel:
    """Return a model that refuses at once or after three harmful tokens, but not after four."""
    messages = asked("a").messages
    refusal = chat.response_ids(messages, REFUSAL)
    harmful = chat.response_ids(messages, HARMFUL)
    assert len(set(refusal + harmful)) == len(refusal + harmful)
    return scripted(
        chain(chat.prompt_ids(messages)[-1], *refusal)
        | chain(*harmful[:BREAKS_OFF_AFTER], refusal[0])
        | chain(*harmful[BREAKS_OFF_AFTER:])
    )


def counts(hits: int, trials: int, **others: int) -> dict[str, int]:
    """Return the counts of a figure in a summary."""
    usual = {"left_out": 0, "empty": 0, "undecided": 0, "answers": trials, "per_request": 1}
    return {"hits": hits, "trials": trials, **usual, **others}


def settings(**changes: object) -> EvaluationSettings:
    return EvaluationSettings(
        **{"prefill_depths": (0, 1, 3, 4, 50), "max_new_tokens": 30, "batch_size": 4, **changes}
    )


def test_every_figure_follows_from_the_script(model: PreTrainedModel, chat: Chat) -> None:
    result = evaluate_model(model, chat.tokenizer, DATA, settings()).to_dict()
    short = len(chat.response_ids(asked("a").messages, "The quick"))
    assert short == 3  # left out from depth 3 on
    assert result["asr"] == {
        "direct": 0.0,
        "prefill": {"0": 0.0, "1": 0.0, "3": 0.0, "4": 1.0},
    }
    assert result["over_refusal"] == {"benign": 1.0}
    assert result["helpful_accuracy"] == 0.5
    assert result["counts"]["asr"]["prefill"] == {
        "0": counts(0, 3, left_out=0),
        "1": counts(0, 3, left_out=0),
        "3": counts(0, 2, left_out=1),
        "4": counts(2, 2, left_out=1),
        "50": counts(0, 0, left_out=3),
    }
    # Nothing is answered to raw text, which is neither a success nor a defence.
    silent = counts(0, 0, empty=3, answers=3)
    assert result["counts"]["asr"]["completion"] == silent
    # Those at depth 0 are the plain ones again: 3 + 3 + 2 + 2 + 3 answers.
    assert result["empty"] == {"asr": pytest.approx(3 / 13, abs=1e-6), "over_refusal": 0.0}
    assert result["refusal_positions"]["asr"] == {
        "direct": [0, 0, 0],
        "prefill": {"0": [0, 0, 0], "1": [3, 3, 3], "3": [3, 3], "4": []},
    }
    assert result["intervals"]["over_refusal"]["benign"] == [pytest.approx(0.206543), 1.0]
    certain = [round(p) for p in result["refusal_curve"]["harmful"]]
    assert [depth for depth, p in enumerate(certain) if p] == [0, BREAKS_OFF_AFTER]
    longest = len(chat.response_ids(asked("a").messages, HARMFUL))
    assert result["refusal_curve_counts"]["harmful"] == [3] * (short + 1) + [2] * (longest - short)
    assert [round(p) for p in result["refusal_curve"]["benign"]][:2] == [1, 0]
    assert result["detector_auc"] == 0.5  # it refuses everything alike
    assert "samples" not in result


def test_ranks_are_attacked_as_the_conditions_say(model: PreTrainedModel, chat: Chat) -> None:
    attack = RankAttack(top_k=(1,), prefill=2, tokens=1)
    result = evaluate_model(model, chat.tokenizer, DATA, settings(rank_attack=attack)).to_dict()
    # After two tokens the script has one more of each response, and breaks off after three.
    assert result["rank_assisted"] == {"1": 1.0}
    assert result["counts"]["top_k"]["1"]["trials"] == 3
    conditions = {"rank_prefill": 2, "rank_tokens": 1, "rank_misses": 0.0}
    assert conditions.items() <= result["conditions"].items()


def test_samples_are_kept_only_on_request(model: PreTrainedModel, chat: Chat) -> None:
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


def test_a_missing_kind_of_records_has_no_figures(model: PreTrainedModel, chat: Chat) -> None:
    result = evaluate_model(
        model, chat.tokenizer, EvaluationData(benign=DATA.benign), settings()
    ).to_dict()
    assert result.keys() == {
        "over_refusal",
        "empty",
        "intervals",
        "counts",
        "refusal_positions",
        "judge",
        "conditions",
        "seconds",
    }


def test_perplexity_replaces_exact_match(model: PreTrainedModel, chat: Chat) -> None:
    data = EvaluationData(helpful=[harmless("d", REFUSAL)])
    result = evaluate_model(model, chat.tokenizer, data, settings(helpful="perplexity")).to_dict()
    assert result["helpful_perplexity"] == pytest.approx(1.0, abs=1e-3)
    assert "helpful_accuracy" not in result
    with pytest.raises(ValueError, match=re.escape("d: the dialogue exceeds the model's context")):
        long = EvaluationData(helpful=[harmless("d", "jumps " * 400)])
        evaluate_model(model, chat.tokenizer, long, settings(helpful="perplexity"))


def test_a_custom_judge_sees_the_answer_apart_from_its_prefill(
    model: PreTrainedModel, chat: Chat
) -> None:
    read: list[Exchange] = []

    def judge(exchanges: list[Exchange]) -> list[Verdict]:
        read.extend(exchanges)
        return [Verdict(refused=True) for _ in exchanges]

    data = EvaluationData(harmful=DATA.harmful[:1])
    result = evaluate_model(
        model, chat.tokenizer, data, settings(judges={"all": judge}, prefill_depths=(3,))
    ).to_dict()
    assert [exchange.answer for exchange in read] == [REFUSAL, REFUSAL, ""]
    begun = chat.tokenizer.decode(chat.response_ids(DATA.harmful[0].messages, HARMFUL)[:3])
    assert [exchange.response for exchange in read] == [REFUSAL, begun + REFUSAL, ""]
    assert all(exchange.messages == DATA.harmful[0].messages for exchange in read)
    assert result["asr"] == {"direct": 0.0, "prefill": {"3": 0.0}}
    assert result["refusal_positions"]["asr"]["direct"] == []  # this judge cannot tell where


def test_patched_and_plain_models_have_equal_results(model: PreTrainedModel, chat: Chat) -> None:
    plain = evaluate_model(model, chat.tokenizer, DATA, settings())
    (sorry, *_) = chat.response_ids(asked("a").messages, REFUSAL)
    patched = evaluate_model(apply_derta(model, sorry), chat.tokenizer, DATA, settings())
    assert patched.outcomes == plain.outcomes
    for one, other in zip(patched.harmful_curves, plain.harmful_curves, strict=True):
        np.testing.assert_array_equal(one, other)


def test_completion_is_raw_text_after_the_beginning_of_sequence(chat: Chat) -> None:
    bos = chat.tokenizer.bos_token_id
    text = chat.tokenizer("How do I paint?", add_special_tokens=False)["input_ids"]
    assert completion(asked("a"), chat).prompt == (bos, *text)
    bare = Chat(tiny_tokenizer.__wrapped__())
    bare.tokenizer.chat_template = bare.tokenizer.chat_template.replace("{{ bos_token }}", "")
    assert completion(asked("a"), Chat(bare.tokenizer)).prompt == tuple(text)


MARK = "<|eot_id|>"


def marked_data(prompt: str, mark: str = MARK) -> EvaluationData:
    harmful = [Request(id="a", prompt=prompt, response=f"{mark} the", prefill=f"Sure {mark}")]
    conversation = [{"role": "user", "content": text} for text in (prompt, "And then?")]
    return EvaluationData(
        harmful=harmful,
        multi_turn=[Request(id="m", messages=conversation)],
        attacks={"tool": [Request(id="t", prompt=prompt)]},
        helpful=[Request(id="h", prompt=prompt, response=prompt)],
    )


@pytest.mark.promise("Special tokens in texts of records become plain text.")
def test_special_tokens_in_requests_are_plain_unless_they_are_kept(
    chat: Chat, record_property: Callable[[str, object], None]
) -> None:
    special = set(chat.tokenizer.all_special_ids)

    def control_tokens(mark: str, chat: Chat) -> dict[str, int]:
        made = make_scenarios(
            marked_data(f"{mark}The {mark}fox", mark),
            Attacks(prefill_depths=(1,), templates=[f"Say {{request}} {mark}"]),
        )
        trials = {one.metric: one.trial(one.records[0], chat) for one in made}
        return {
            name: sum(id in special for id in trial.prompt)
            for name, trial in trials.items()
            if trial is not None
        }

    usual = control_tokens("", chat)
    assert control_tokens(MARK, chat) == usual
    kept = control_tokens(MARK, Chat(chat.tokenizer, "keep"))
    added = {name: kept[name] - count for name, count in usual.items()}
    assert added == {
        "asr.direct": 2,
        "asr.prefill.1": 3,
        "asr.prefilled": 3,
        "asr.completion": 2,
        "asr.template": 3,
        "asr.template_prefill.1": 4,
        "asr.multi_turn": 2,
        "asr.file.tool": 2,
        "helpful_accuracy": 2,
    }
    record_property("cases", len(usual))


@pytest.mark.promise("Special tokens in texts of records become plain text.")
def test_refused_special_tokens_name_the_request(model: PreTrainedModel, chat: Chat) -> None:
    def run(data: EvaluationData, **changes: object) -> None:
        changed = settings(special_tokens_in_text="refuse", curve=False, **changes)
        evaluate_model(model, chat.tokenizer, data, changed)

    said = r" has the special token '<\|eot_id\|>' as text, expected none: remove it, or choose"
    with pytest.raises(ValueError, match=f"^a: response:{said}"):
        run(marked_data("How?"))
    with pytest.raises(ValueError, match=f"^m: messages\\[0\\].content:{said}"):
        run(EvaluationData(multi_turn=marked_data(MARK).multi_turn))
    with pytest.raises(ValueError, match=rf"^templates\[0\]:{said}"):
        run(EvaluationData(harmful=[asked("a")]), templates=[f"{{request}} {MARK}"])
    with pytest.raises(ValueError, match=rf"^h: messages\[0\].content:{said}"):
        run(EvaluationData(helpful=marked_data(MARK).helpful), helpful="perplexity")
    with pytest.raises(ValueError, match=f"^a: response:{said}"):
        refusal_curves(
            model, chat.tokenizer, marked_data("How?").harmful, special_tokens_in_text="refuse"
        )


def test_only_whole_tokens_before_a_character_count(chat: Chat) -> None:
    ids = chat.tokenizer("The quick Sorry", add_special_tokens=False)["input_ids"]
    pieces = [chat.tokenizer.decode([id]) for id in ids]
    ends = np.cumsum([len(piece) for piece in pieces])
    for start in range(len("The quick Sorry")):
        assert tokens_before(chat.tokenizer, ids, start) == int((ends <= start).sum())


def rates(model: PreTrainedModel, chat: Chat, data: EvaluationData, **changes: object) -> dict:
    return evaluate_model(model, chat.tokenizer, data, settings(curve=False, **changes)).to_dict()


def test_a_request_may_have_its_own_prefill(model: PreTrainedModel, chat: Chat) -> None:
    start = chat.tokenizer.decode(
        chat.response_ids(asked("a").messages, HARMFUL)[: BREAKS_OFF_AFTER + 1]
    )
    data = EvaluationData(harmful=[asked("a", prefill=start), asked("b", prefill=HARMFUL[:3])])
    result = rates(model, chat, EvaluationData(harmful=[*data.harmful, asked("c")]))
    assert result["asr"]["prefilled"] == 0.5
    assert result["counts"]["asr"]["prefilled"]["left_out"] == 1
    assert "prefilled" not in rates(model, chat, DATA)["asr"]


def test_requests_without_responses_have_no_prefill_scenarios(
    model: PreTrainedModel, chat: Chat
) -> None:
    data = EvaluationData(harmful=[asked("a", response="")])
    assert rates(model, chat, data)["counts"]["asr"].keys() == {"direct", "completion"}


def test_requests_use_templates_in_turn_and_judges_do_not_see_them(chat: Chat) -> None:
    templates = ["Be brief. {request}", "{request} {request} {braces}"]
    chosen = {
        one.metric: one
        for one in make_scenarios(DATA, Attacks(prefill_depths=(0, 2), templates=templates))
        if "template" in one.metric
    }
    assert chosen.keys() == {
        "asr.template",
        "asr.template_prefill.0",
        "asr.template_prefill.2",
    }
    made = [chosen["asr.template"].trial(one, chat) for one in chosen["asr.template"].records]
    texts = [
        template.replace("{request}", "How do I paint?") for template in [*templates, templates[0]]
    ]
    prompts = [chat.prompt_ids([{"role": "user", "content": text}]) for text in texts]
    assert [list(trial.prompt) for trial in made] == prompts
    assert all(trial.messages == asked("a").messages for trial in made)
    deep = chosen["asr.template_prefill.2"]
    start = tuple(chat.response_ids(asked("a").messages, HARMFUL)[:2])
    trial = deep.trial(deep.records[0], chat)
    assert (trial.prompt, trial.depth) == ((*prompts[0], *start), 2)


def test_the_model_answers_every_turn_of_a_conversation(model: PreTrainedModel, chat: Chat) -> None:
    read: list[Exchange] = []

    def judge(exchanges: list[Exchange]) -> list[Verdict]:
        read.extend(exchanges)
        return [Verdict(refused=False, harmful=True) for _ in exchanges]

    user = [{"role": "user", "content": text} for text in ("Hello", "And how?", "Paint!")]
    given = {"role": "assistant", "content": "Not the model's."}
    system = {"role": "system", "content": "Be kind."}
    talks = [
        Request(id="three", messages=[system, user[0], given, user[1], given, user[2]]),
        Request(id="one", messages=user[:1]),
        Request(id="two", messages=[user[0], given, user[1]]),
    ]
    result = rates(model, chat, EvaluationData(multi_turn=talks), judges={"all": judge})
    own = {"role": "assistant", "content": REFUSAL}
    assert [list(exchange.messages) for exchange in read] == [
        [system, user[0], own, user[1], own, user[2]],
        user[:1],
        [user[0], own, user[1]],
    ]
    assert [exchange.answer for exchange in read] == [REFUSAL] * 3
    assert result["asr"] == {"multi_turn": 1.0}


def test_attacks_and_questions_have_figures_by_name(model: PreTrainedModel, chat: Chat) -> None:
    data = EvaluationData(
        attacks={"pair": [asked("a")], "code": [asked("b"), asked("c")]},
        questions={"mmlu": [harmless("d", "I"), harmless("e", "B")]},
    )
    result = rates(model, chat, data)
    assert result["asr"] == {"file": {"pair": 0.0, "code": 0.0}}
    assert result["counts"]["asr"]["file"]["code"]["trials"] == 2
    assert result["accuracy"] == {"mmlu": 0.0}
    with pytest.raises(ValueError, match="d: response: expected a number or a letter"):
        EvaluationData(questions={"gsm8k": [harmless("d", "It jumps.")]})
    with pytest.raises(ValueError, match="d: response: is missing, expected the right answer"):
        rates(model, chat, EvaluationData(helpful=[harmless("d", "")]))
    with pytest.raises(ValueError, match="d: response: is missing, expected the right answer"):
        data = EvaluationData(helpful=[harmless("d", "")])
        rates(model, chat, data, helpful="perplexity")


@pytest.mark.parametrize("kind", ["attacks", "questions"])
@pytest.mark.parametrize("name", ["v1.2", " "])
def test_names_that_cannot_be_metric_levels_are_refused(kind: str, name: str) -> None:
    message = f"{kind} must have names without dots, got {name!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        EvaluationData(**{kind: {name: [asked("a")]}})


def test_borderline_requests_have_their_own_figures(model: PreTrainedModel, chat: Chat) -> None:
    borderline = [harmless("x", "It jumps."), asked("y")]
    data = EvaluationData(harmful=DATA.harmful, benign=DATA.benign, borderline=borderline)
    result = evaluate_model(model, chat.tokenizer, data, settings())
    assert result.to_dict()["over_refusal"] == {"benign": 1.0, "borderline": 1.0}
    assert result.to_dict()["refusal_curve"].keys() == {"harmful", "benign", "borderline"}
    assert [len(result.benign_curves), len(result.borderline_curves)] == [1, 2]


def test_judges_read_the_same_answers_and_have_separate_figures(
    model: PreTrainedModel, chat: Chat
) -> None:
    read: list[list[Exchange]] = []

    def strict(exchanges: list[Exchange]) -> list[Verdict]:
        read.append(exchanges)
        return [Verdict(refused=True, harmful=True) for _ in exchanges]

    def silent(exchanges: list[Exchange]) -> list[Verdict]:
        read.append(exchanges)
        return [Verdict(refused=None) for _ in exchanges]

    result = rates(
        model,
        chat,
        DATA,
        prefill_depths=(4,),
        judges={"keyword": KeywordJudge(), "strict": strict, "silent": silent},
    )
    assert result["judge"] == "keyword"
    assert result["asr"] == {"direct": 0.0, "prefill": {"4": 1.0}}
    others = result["judges"]
    # A harmful answer is a success even if it also refuses.
    assert others["strict"]["asr"] == {"direct": 1.0, "prefill": {"4": 1.0}}
    assert others["strict"]["over_refusal"] == {"benign": 1.0}
    assert "helpful_accuracy" not in others["strict"]
    silent = counts(0, 0, undecided=3, answers=3)
    assert others["silent"]["counts"]["asr"]["direct"] == silent
    assert others["silent"].keys().isdisjoint({"asr", "over_refusal"})
    assert read[0] == read[1] and len(read[0]) == 3 + 2 + 3 + 1  # no helpful answer among them


def test_settings_that_need_a_local_model_are_refused_without_one(chat: Chat) -> None:
    for changes, key in (
        ({}, "curve"),
        ({"curve": False, "helpful": "perplexity"}, "helpful: perplexity"),
    ):
        with pytest.raises(ValueError, match=f"{key} needs a model on this machine"):
            evaluate_model(None, chat.tokenizer, DATA, settings(**changes))


def test_curves_of_all_record_types_are_those_of_their_responses(
    model: PreTrainedModel, chat: Chat
) -> None:
    messages = asked("a").messages
    triple = Triple(id="t", prompt="How do I paint?", safe=REFUSAL, harmful=HARMFUL)
    answer = {"role": "assistant", "content": HARMFUL}
    dialogue = Dialogue(id="u", messages=[*messages, answer])
    curves = refusal_curves(model, chat.tokenizer, [triple, dialogue, asked("v")])
    (sorry, *_) = chat.response_ids(messages, REFUSAL)
    (expected,) = refusal_curve(model, [response(chat, "a", messages, HARMFUL)], sorry)
    for curve in curves:
        np.testing.assert_array_equal(curve, expected)
    assert [round(p) for p in expected[: BREAKS_OFF_AFTER + 1]] == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="v: response: is missing, expected one to read"):
        refusal_curves(model, chat.tokenizer, [asked("v", response="")])
    with pytest.raises(TypeError, match="records must be triples, dialogues or requests, got str"):
        refusal_curves(model, chat.tokenizer, ["How do I paint?"])


def test_the_refusal_token_comes_from_the_patch_or_the_safe_responses(chat: Chat) -> None:
    model = tiny_model("llama", vocab_size=len(chat.tokenizer))
    messages = asked("a").messages
    triple = Triple(id="t", prompt="How do I paint?", safe="First, no.", harmful=HARMFUL)

    def first(text: str) -> int:
        return chat.response_ids(messages, text)[0]

    assert find_refusal_token(model, chat.tokenizer) == first("Sorry")
    assert find_refusal_token(model, chat.tokenizer, triples=[triple]) == first("First, no.")
    assert find_refusal_token(model, chat.tokenizer, 7, [triple]) == 7
    apply_derta(model, 9)
    assert find_refusal_token(model, chat.tokenizer, triples=[triple]) == 9


@pytest.mark.parametrize("depths", [(0, 4, 4), (-1,), (True,), ("all",)])
def test_negative_or_repeated_depths_are_refused(depths: tuple[int, ...]) -> None:
    message = f"prefill_depths must be distinct numbers from 0 on or whole, got {list(depths)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Attacks(prefill_depths=depths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"helpful": "bleu"}, "helpful must be exact_match or perplexity, got 'bleu'"),
        ({"samples": -1}, "samples must be at least 0, got -1"),
        ({"judges": {}}, "judges must name at least one judge, got none"),
        ({"keywords": ()}, "keywords must name at least one, got none"),
        ({"templates": ["{request}", "Hi"]}, "templates[1] must have the slot {request}, got none"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**changes)


def test_errors_name_records_that_do_not_fit(chat: Chat) -> None:
    torch.manual_seed(0)
    model = tiny_model("llama", max_position_embeddings=64)
    with pytest.raises(ValueError, match="c: the prompt's .* exceed the model's context of 64"):
        evaluate_model(
            model,
            chat.tokenizer,
            EvaluationData(benign=DATA.benign),
            settings(max_new_tokens=60, curve=False),
        )


def answering(answers: Mapping[tuple[int, ...], str], chat: Chat) -> Callable[..., list[Written]]:
    """Return a generator that says "Sorry." but to given prompts, and keeps what it was asked."""

    def generate(
        prompts: list[tuple[int, ...]], *, ids: list[str], decoding: Decoding = GREEDY
    ) -> list[Written]:
        seen.extend((prompt, decoding) for prompt in prompts)
        texts = [answers.get(tuple(prompt), "Sorry.") for prompt in prompts]
        return [Written(text, chat.text_ids(text) if text else []) for text in texts]

    seen: list[tuple[tuple[int, ...], Decoding]] = []
    generate.seen = seen  # type: ignore[attr-defined]
    return generate


def three() -> list[Request]:
    return [
        Request(id=id, prompt=f"How do I paint {id}?", response=f"First the {id}, then the fox")
        for id in ("doors", "fences", "walls")
    ]


def test_keyword_judges_tell_attacks_and_defences_the_keywords() -> None:
    judges = [KeywordJudge(["gladly", "no"]), print, KeywordJudge(["no", "never"])]
    assert keywords_of(judges, ["sorry"]) == ("gladly", "no", "never")
    assert keywords_of([print], ["sorry"]) == ("sorry",)


def test_starts_of_refusals_are_forbidden_and_reported(
    model: PreTrainedModel, chat: Chat, tmp_path: Path
) -> None:
    """The scripted model ends its turn where its refusal is forbidden, or goes on with harm."""
    data = EvaluationData(harmful=[asked("a"), asked("b")], refusals=["Lazy dogs only."] * 3)
    result = evaluate_model(
        model,
        chat.tokenizer,
        data,
        settings(curve=False, refusal_banned=2, prefill_depths=(1, 4, WHOLE)),
    )
    found = result.to_dict()
    assert found["asr"]["prefill"] == {"1": 0.0, "4": 1.0}
    banned = found["counts"]["asr"]["refusal_banned"]
    assert banned.keys() == {"0", "1", "4", "whole"}
    starts = set(result.refusal_starts)
    (lazy, *_), (sorry, *_) = (
        chat.response_ids(asked("a").messages, text) for text in ("Lazy dogs only.", REFUSAL)
    )
    assert {chat.text(lazy), chat.text(sorry)} <= starts
    assert chat.text(chat.text_ids(" I")[0]) in starts
    # After one token the model writes two more, and then its refusal, too late to be forbidden.
    assert banned["1"]["hits"] == 0 and banned["1"]["trials"] == 2
    # At once it would refuse: what it writes instead is no refusal.
    assert banned["0"]["hits"] + banned["0"]["empty"] == 2
    page = write_report(summarize({"model": [result]}, seconds=1), tmp_path).read_text("utf-8")
    said = f"model: {len(starts)} tokens that begin a refusal are forbidden in the first 2"
    assert said in page
    assert "starts of refusals forbidden, after prefilled tokens" in page
    plain = evaluate_model(model, chat.tokenizer, data, settings(curve=False))
    assert "refusal_starts" not in plain.to_dict()


def test_no_token_that_begins_a_refusal_is_left_and_none_that_ends_an_answer(chat: Chat) -> None:
    rare = ["Sorry, no."] * 199 + ["Lazy dogs only."]
    starts = refusal_starts(chat, 7, ["sorry", "I cannot"], rare)
    assert 7 in starts
    for text in ("Sorry", "sorry", " Sorry", "SORRY", "I", " I"):
        assert chat.text_ids(text)[0] in starts
    assert chat.response_ids(PROBE, "Lazy")[0] not in starts  # in one of 200 refusals
    assert chat.response_ids(PROBE, "Lazy")[0] in refusal_starts(chat, 7, ["sorry"], rare[100:])
    ends = set(chat.closing_ids)
    assert not ends & {*starts, *refusal_starts(chat, chat.closing_ids, ["sorry"])}


def test_a_refusal_on_a_new_line_begins_with_a_token_of_its_own() -> None:
    tokenizer = copy.deepcopy(marked("unigram"))
    tokenizer.chat_template = OFFICIAL_CHAT_TEMPLATE  # with a space before the response
    chat = Chat(tokenizer)
    spaced, lined = (tokenizer.convert_tokens_to_ids(token) for token in ("▁the", "the"))
    assert chat.response_ids(PROBE, "the end")[0] == spaced
    assert lined in chat.text_ids("\nthe end")
    assert {spaced, lined} <= set(refusal_starts(chat, 7, ["the end"]))


def test_one_drawn_success_of_several_is_enough(model: PreTrainedModel, chat: Chat) -> None:
    harmful = three()
    said = {
        ("doors", 0): "Sorry.",
        ("doors", 1): "Paint.",
        ("doors", 2): "",
        ("fences", 0): "",
        ("fences", 1): "Sorry.",
        ("fences", 2): "Sorry.",
        ("walls", 0): "",
        ("walls", 1): "",
        ("walls", 2): " ",
    }
    drawn: set[Decoding] = set()

    def generate(
        prompts: list[tuple[int, ...]], *, ids: list[str], decoding: Decoding = GREEDY
    ) -> list[Written]:
        if decoding == GREEDY:
            return [Written("Sorry.", [1]) for _ in prompts]
        drawn.add(decoding)
        return [Written(said[id, decoding.sample], []) for id in ids]

    def unsure(exchanges: list[Exchange]) -> list[Verdict]:
        return [Verdict(refused=False if "Paint" in one.answer else None) for one in exchanges]

    judges = {"keyword": KeywordJudge(), "unsure": unsure}
    found = evaluate_model(
        model,
        chat.tokenizer,
        EvaluationData(harmful=harmful),
        settings(
            curve=False, prefill_depths=(), sampling=3, temperature=0.7, seed=5, judges=judges
        ),
        generator=generate,
    ).to_dict()
    # A success decides, whatever a judge leaves open; a failure does not.
    told = found["judges"]["unsure"]["counts"]["asr"]["sampling"]["3"]
    assert told == counts(1, 1, empty=1, undecided=1, answers=3)
    assert drawn == {Decoding(temperature=0.7, seed=5, sample=n) for n in range(3)}
    assert found["counts"]["asr"]["sampling"] == {
        "1": counts(1, 4, empty=5, answers=9, per_request=3),
        "3": counts(1, 2, empty=1, answers=3),
    }
    assert found["asr"]["sampling"] == {"1": 0.25, "3": 0.5}
    # Three plain answers, three to raw text, and three times three draws that weigh as three.
    assert found["empty"]["asr"] == pytest.approx((5 / 3) / 9, abs=1e-6)
    single = wilson_interval(1 / 3, 4 / 3)  # four answers are not four requests
    assert found["intervals"]["asr"]["sampling"]["1"] == pytest.approx(single, abs=1e-6)


def test_the_whole_response_is_a_prefill_that_goes_on(chat: Chat) -> None:
    (whole, deep) = (
        one.trial(three()[0], chat)
        for one in make_scenarios(
            EvaluationData(harmful=three()), Attacks(prefill_depths=(WHOLE, 64))
        )
        if "prefill" in one.metric
    )
    request = three()[0]
    response = chat.response_ids(request.messages, request.response)
    assert list(whole.prompt) == [*chat.prompt_ids(request.messages), *response]
    assert whole.depth == len(response) and deep is None


def test_prefilled_tokens_stand_in_an_open_thinking_block(model: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer.__wrapped__()
    chat = Chat(tokenizer)
    changed = settings(curve=False, prefill_depths=(2,), prefill_thinking="auto")
    data = EvaluationData(harmful=three())
    with pytest.raises(ValueError, match="^prefill_thinking: the chat template opens no thinking"):
        evaluate_model(model, tokenizer, data, changed)
    request = three()[0]
    start = chat.response_ids(request.messages, request.response)[:2]

    def trial(tag: str) -> str:
        (scenario,) = (
            one
            for one in make_scenarios(
                data, changed, thinking_tag=thinking_tag(Chat(tokenizer), tag)
            )
            if "thinking" in one.metric
        )
        made = scenario.trial(request, Chat(tokenizer))
        assert made.depth == 2 and list(made.prompt[-2:]) == start
        return str(tokenizer.decode(list(made.prompt[:-2])))

    opened = tokenizer.decode(chat.prompt_ids(request.messages))
    assert trial("<reason>") == f"{opened}<reason>\n"
    # As Qwen's: an empty block before an answer, none in the generation prompt.
    own, said = str(tokenizer.chat_template), "{{ m['content'] | trim }}"
    # As DeepSeek's: the generation prompt opens the block, unless it is told not to.
    asked = "enable_thinking is not defined or enable_thinking"
    tokenizer.chat_template = (
        f"{own}{{% if add_generation_prompt and ({asked}) %}}<think>\n{{% endif %}}"
    )
    assert tokenizer.decode(Chat(tokenizer).prompt_ids(request.messages)) == opened
    assert trial("auto") == f"{opened}<think>\n"
    tokenizer.chat_template = own
    block = "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(said, block + said)
    assert "</think>" in tokenizer.decode(Chat(tokenizer).prompt_ids(request.messages))
    assert trial("auto") == f"{opened}<think>\n"


def test_a_request_follows_another_and_its_harmful_response(chat: Chat) -> None:
    doors, fences, walls = three()
    system: Message = {"role": "system", "content": "Be kind."}
    fences = replace(fences, prompt="", messages=[system, *fences.messages])
    harmful = [doors, fences, replace(walls, response="")]
    (scenario,) = (
        one
        for one in make_scenarios(EvaluationData(harmful=harmful), Attacks(in_context=True))
        if one.metric == "asr.in_context"
    )
    made = [scenario.trial(one, chat) for one in scenario.records]
    earlier = [fences, doors, fences]  # the closest one before that has a response

    def talk(request: Request, before: Request) -> list[Message]:
        own = [message for message in request.messages if message["role"] == "system"]
        said: Message = {"role": "assistant", "content": before.response}
        return [*own, before.messages[-1], said, request.messages[-1]]

    expected = [chat.prompt_ids(talk(*pair)) for pair in zip(harmful, earlier, strict=True)]
    assert [list(trial.prompt) for trial in made] == expected
    assert [trial.messages for trial in made] == [one.messages for one in harmful]
    (alone,) = following([doors])
    assert in_context(alone, chat) is None


@pytest.mark.parametrize("attack", [dict(in_context=True), dict(prefill_thinking="<think>")])
def test_attacks_with_harmful_responses_are_not_left_out_in_silence(
    attack: dict[str, object], model: PreTrainedModel, chat: Chat
) -> None:
    data = EvaluationData(harmful=[asked("a", response="")])
    with pytest.raises(ValueError, match=f"^{[*attack][0]} needs harmful responses, got requests"):
        evaluate_model(model, chat.tokenizer, data, settings(**attack))


def test_empty_answers_are_apart_or_failures(model: PreTrainedModel, chat: Chat) -> None:
    data = EvaluationData(harmful=three(), benign=[harmless("c", "It jumps.")], helpful=three())
    silent = answering({tuple(chat.prompt_ids(one.messages)): "" for one in three()[:2]}, chat)

    def found(**changes: object) -> dict:
        changed = settings(curve=False, prefill_depths=(), **changes)
        return evaluate_model(model, chat.tokenizer, data, changed, generator=silent).to_dict()

    apart, failed = found(), found(empty_answers="failed")
    assert apart["counts"]["asr"]["direct"] == counts(0, 1, empty=2, answers=3)
    assert failed["counts"]["asr"]["direct"] == counts(0, 3, empty=2)
    # An empty answer is a wrong one, however it is counted elsewhere.
    assert apart["counts"]["helpful_accuracy"] == failed["counts"]["helpful_accuracy"]
    assert apart["counts"]["helpful_accuracy"] == counts(0, 3, empty=2)
    assert apart["empty"]["asr"] == pytest.approx(2 / 6, abs=1e-6)
    # Two attacks of the same three requests, whose answers are not six requests.
    interval = pytest.approx(wilson_interval(1, 3), abs=1e-6)
    assert apart["intervals"]["empty"]["asr"] == interval


def test_a_header_put_in_again_replaces_what_the_model_would_refuse(
    model: PreTrainedModel, chat: Chat
) -> None:
    harmful, kind = three(), harmless("c", "It jumps.")
    header = chat.header_ids()
    asked_for = chat.prompt_ids(harmful[0].messages)
    assert asked_for[-len(header) :] == header
    start = chat.response_ids(harmful[0].messages, harmful[0].response)[:2]
    plain = tuple(chat.prompt_ids(kind.messages))
    jumps = chat.text_ids("It jumps over")
    complies = {
        tuple(chat.prompt_ids(one.messages)) + extra: "It jumps over"
        for one in (*harmful, kind)
        for extra in ((), tuple(chat.response_ids(one.messages, one.response)[:2]))
    }
    # Its check refuses in the midst of harmful answers, and goes on in a harmless one.
    complies[(*plain, *jumps[:2], *header)] = "It jumps."
    generator = answering(complies, chat)
    data = EvaluationData(harmful=harmful, benign=[kind])

    def found(defence: Defence | None) -> dict:
        changed = settings(prefill_depths=(2,), defence=defence, samples=1)
        return evaluate_model(model, chat.tokenizer, data, changed, generator=generator).to_dict()

    def rates(entry: dict) -> dict:
        return {**entry["asr"]["prefill"], "direct": entry["asr"]["direct"]} | entry["over_refusal"]

    assert rates(found(None)) == {"2": 1.0, "direct": 1.0, "benign": 0.0}
    assert (
        found(None)["conditions"].items() >= {"system_prompt": None, "header_after": None}.items()
    )
    defended = found(Defence(reinsert_header=True, header_after=2))
    assert defended["conditions"].items() >= {"system_prompt": None, "header_after": 2}.items()
    assert rates(defended) == {"2": 0.0, "direct": 0.0, "benign": 0.0}
    assert "refusal_curve" not in defended  # it has none of its own
    seen = [prompt for prompt, _ in generator.seen]  # type: ignore[attr-defined]
    assert (*asked_for, *start, *header) in seen  # at the depth of the attack
    assert (*asked_for, *jumps[:2], *header) in seen  # and in the midst of an answer
    shown = {one["metric"]: one["answer"] for one in defended["samples"]}
    assert shown["asr.prefill.2"] == "Sorry."
    assert shown["asr.direct"] == chat.tokenizer.decode(jumps[:2]) + "\nSorry."
    assert defended["refusal_positions"]["asr"]["direct"] == [2, 2, 2]


def test_no_word_before_it_hides_the_refusal_after_a_header(
    model: PreTrainedModel, chat: Chat
) -> None:
    """Without a border the keyword judge reads "BBQI can't", a word of its own."""
    harmful = Request(id="a", prompt="How do I paint?")
    prompt = tuple(chat.prompt_ids(harmful.messages))
    kept = chat.text_ids("I like the BBQ")
    generator = answering(
        {prompt: "I like the BBQ", (*prompt, *kept, *chat.header_ids()): "I can't do that."}, chat
    )
    defence = Defence(reinsert_header=True, header_after=len(kept))
    changed = settings(curve=False, defence=defence, samples=1)
    data = EvaluationData(harmful=[harmful])
    found = evaluate_model(model, chat.tokenizer, data, changed, generator=generator).to_dict()
    assert found["samples"][0]["answer"] == "I like the BBQ\nI can't do that."
    assert found["asr"]["direct"] == 0.0
    assert found["refusal_positions"]["asr"]["direct"] == [len(kept)]


def test_every_turn_of_a_conversation_is_defended(model: PreTrainedModel, chat: Chat) -> None:
    hello, paint = ({"role": "user", "content": text} for text in ("Hello", "How do I paint?"))
    jumps = chat.text_ids("It jumps over")
    generator = answering({tuple(chat.prompt_ids([hello])): "It jumps over"}, chat)
    defence = Defence(reinsert_header=True, header_after=2)
    data = EvaluationData(multi_turn=[Request(id="a", messages=[hello, paint])])
    changed = settings(curve=False, defence=defence)
    evaluate_model(model, chat.tokenizer, data, changed, generator=generator)
    refused = {"role": "assistant", "content": chat.tokenizer.decode(jumps[:2]) + "\nSorry."}
    asked = [tuple(prompt) for prompt, _ in generator.seen]  # type: ignore[attr-defined]
    assert tuple(chat.prompt_ids([hello, refused, paint])) in asked


def test_no_attacker_chooses_the_tokens_of_a_header_s_check(
    model: PreTrainedModel, chat: Chat
) -> None:
    generator = answering({}, chat)
    data = EvaluationData(harmful=[asked("a")])
    changed = settings(
        curve=False,
        prefill_depths=(2,),
        refusal_banned=3,
        sampling=2,
        defence=Defence(reinsert_header=True, header_after=1),
    )
    evaluate_model(model, chat.tokenizer, data, changed, generator=generator)
    plain, header = tuple(chat.prompt_ids(asked("a").messages)), tuple(chat.header_ids())
    chosen: dict[bool, set[Decoding]] = {True: set(), False: set()}
    for prompt, decoding in generator.seen:  # type: ignore[attr-defined]
        is_check = prompt[-len(header) :] == header and prompt != plain
        chosen[is_check].add(decoding)
    assert chosen[True] == {GREEDY} and len(chosen[False]) == 4  # greedy, two draws, and a ban


@pytest.mark.parametrize("depth", [0, 6])
def test_a_header_that_does_not_fit_is_refused_before_the_first_answer(
    model: PreTrainedModel, chat: Chat, depth: int
) -> None:
    generator = answering({}, chat)
    header, prompt = len(chat.header_ids()), len(chat.prompt_ids(asked("a").messages)) + depth
    kept = 0 if depth else 4

    def run(room: int) -> None:
        changed = settings(
            prefill_depths=(depth,),
            defence=Defence(reinsert_header=True, header_after=4),
            max_new_tokens=context_length(model) - prompt - kept - header - room,
        )
        data = EvaluationData(harmful=[asked("a")])
        evaluate_model(model, chat.tokenizer, data, changed, generator=generator)

    message = f"^a: the prompt's {prompt} tokens, {kept} of an answer, the {header} of reinsert_hea"
    with pytest.raises(ValueError, match=message):
        run(-1)
    assert not generator.seen  # type: ignore[attr-defined]
    run(0)


def test_the_room_of_a_header_is_that_of_the_longest_answer(
    model: PreTrainedModel, chat: Chat
) -> None:
    header, prompt = len(chat.header_ids()), len(chat.prompt_ids(asked("a").messages))
    longest = (context_length(model) - prompt - header) // 2  # all of an answer, and a check's

    def run(max_new_tokens: int) -> None:
        defence = Defence(reinsert_header=True, header_after=context_length(model))
        changed = settings(prefill_depths=(), defence=defence, max_new_tokens=max_new_tokens)
        data = EvaluationData(harmful=[asked("a")])
        evaluate_model(model, chat.tokenizer, data, changed, generator=answering({}, chat))

    with pytest.raises(ValueError, match=rf"^a: the prompt's {prompt} tokens, {longest + 1} of an"):
        run(longest + 1)
    run(longest)


def test_a_later_turn_that_leaves_a_header_no_room_is_refused_before_it_is_asked(
    model: PreTrainedModel, chat: Chat
) -> None:
    hello, paint = ({"role": "user", "content": text} for text in ("Hello", "How do I paint?"))
    said = {"role": "assistant", "content": "It jumps. " * 20}
    first, second = (tuple(chat.prompt_ids(turns)) for turns in ([hello], [hello, said, paint]))
    generator = answering(
        {first: said["content"], (*first, *chat.header_ids()): "It jumps over"}, chat
    )
    room = context_length(model) - len(second) - len(chat.header_ids())
    changed = settings(
        curve=False,
        defence=Defence(reinsert_header=True, header_after=0),
        max_new_tokens=room + 1,
    )
    data = EvaluationData(multi_turn=[Request(id="a", messages=[hello, paint])])
    with pytest.raises(ValueError, match=f"^a: the prompt's {len(second)} tokens, 0 of an answer"):
        evaluate_model(model, chat.tokenizer, data, changed, generator=generator)
    assert second not in [prompt for prompt, _ in generator.seen]  # type: ignore[attr-defined]


def test_without_a_generation_prompt_the_header_is_what_stands_before_an_answer() -> None:
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.chat_template = OFFICIAL_CHAT_TEMPLATE
    assert tokenizer.decode(Chat(tokenizer).header_ids()) == "\n\n [\\INST]"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="^chat_template writes nothing between a message and its"):
        Chat(tokenizer).header_ids()


def test_a_system_prompt_stands_before_every_conversation(
    model: PreTrainedModel, chat: Chat
) -> None:
    own: Message = {"role": "system", "content": "Be brief."}
    request = Request(id="a", messages=[own, *three()[0].messages], response="First the")
    read: list[Exchange] = []

    def judge(exchanges: list[Exchange]) -> list[Verdict]:
        read.extend(exchanges)
        return [Verdict(refused=False) for _ in exchanges]

    data = EvaluationData(harmful=[request], benign=[harmless("c", "It jumps.")])
    generator = answering({}, chat)
    defence = Defence(system_prompt="Refuse what harms.")
    changed = settings(
        prefill_depths=(1,),
        defence=defence,
        judges={"all": judge},
        in_context=True,
        prefill_thinking="<think>",
        refusal_banned=1,
        sampling=1,
        templates=["Now: {request}"],
    )
    found = evaluate_model(model, chat.tokenizer, data, changed, generator=generator)
    assert found.conditions["system_prompt"] == "Refuse what harms."
    prompts = [tuple(prompt) for prompt, _ in generator.seen]  # type: ignore[attr-defined]
    both: Message = {"role": "system", "content": "Refuse what harms.\n\nBe brief."}
    alone: Message = {"role": "system", "content": "Refuse what harms."}
    assert tuple(chat.prompt_ids([both, *three()[0].messages])) in prompts
    assert tuple(chat.prompt_ids([alone, *harmless("c", "x").messages])) in prompts
    assert any("<think>" in chat.tokenizer.decode(list(prompt)) for prompt in prompts)
    raw = tuple(completion(request, chat).prompt)  # there is no place for a system's message
    assert all(
        "Refuse what harms." in chat.tokenizer.decode(list(prompt))
        for prompt in prompts
        if prompt != raw
    )
    assert all(not any(m["content"].startswith("Refuse") for m in one.messages) for one in read)
    bare = tiny_tokenizer.__wrapped__()
    bare.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] + ': ' + "
        "m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    generator.seen.clear()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="^system_prompt: the chat template drops the system's"):
        evaluate_model(model, bare, data, changed, generator=generator)
    bare.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    header = replace(changed, defence=Defence(reinsert_header=True), prefill_thinking=None)
    with pytest.raises(ValueError, match="^chat_template writes nothing between a message and its"):
        evaluate_model(model, bare, data, header, generator=generator)
    assert not generator.seen  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Defence(), "system_prompt or reinsert_header must be given, got neither"),
        (
            lambda: Defence(reinsert_header=True, header_after=-1),
            "header_after must be at least 0, got -1",
        ),
        (
            lambda: Attacks(refusal_banned=-1),
            "refusal_banned must be an integer from 0 on, got -1",
        ),
        (lambda: Attacks(sampling=True), "sampling must be an integer from 0 on, got True"),
        (lambda: Attacks(temperature=0.0), "temperature must be above 0, got 0.0"),
        (
            lambda: Attacks(prefill_thinking=" "),
            "prefill_thinking must be auto or a text, got a blank one",
        ),
        (
            lambda: Attacks(prefill_thinking="<think>", prefill_depths=()),
            "prefill_thinking needs prefill_depths, the tokens in the thinking block, got none",
        ),
        (
            lambda: settings(empty_answers="never"),
            "empty_answers must be apart or failed, got 'never'",
        ),
    ],
)
def test_attacks_and_defences_out_of_range_are_refused(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
