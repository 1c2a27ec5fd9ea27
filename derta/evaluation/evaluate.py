"""One model through all scenarios and its refusal curves."""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from derta.data import Chat, EncodedDialogue, Encoder, resolve_refusal_token
from derta.data.records import naming
from derta.evaluation.generate import generate, stop_ids
from derta.evaluation.judge import Exchange, Judge, KeywordJudge, Verdict
from derta.evaluation.results import Outcome, Sample, VariantResult
from derta.evaluation.scenarios import EvaluationData, Scenario, Trial, scenarios
from derta.evaluation.teacher_forcing import perplexity, refusal_curve, response
from derta.modeling import context_length


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How a model is evaluated.

    Args:
        refusal: the refusal token whose curve is read, see `resolve_refusal_token`.
        prefill_depths: how many tokens of the harmful response an answer starts with.
        max_new_tokens: longest answer.
        batch_size: prompts a batch.
        max_tokens: tokens a pack of the refusal curve.
        curve: whether to read refusal curves, which need a model that `apply_derta` takes.
        helpful: "exact_match" of generated answers, or "perplexity" of the given ones.
        judge: decides which answers refuse.
        samples: answers kept for each scenario; none by default, so that no text is shown.

    Raises:
        ValueError: a value is out of its range, or two prefill depths are the same.
    """

    refusal: str | int = "auto"
    prefill_depths: Sequence[int] = (0, 4, 8, 16, 32, 64)
    max_new_tokens: int = 256
    batch_size: int = 16
    max_tokens: int = 4096
    curve: bool = True
    helpful: Literal["exact_match", "perplexity"] = "exact_match"
    judge: Judge = field(default_factory=KeywordJudge)
    samples: int = 0

    def __post_init__(self) -> None:
        if self.helpful not in ("exact_match", "perplexity"):
            raise ValueError(f"helpful must be exact_match or perplexity, got {self.helpful!r}")
        scenarios(self.prefill_depths)
        least = {"max_new_tokens": 1, "batch_size": 1, "max_tokens": 1, "samples": 0}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} must be at least {limit}, got {getattr(self, name)}")


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: EvaluationData,
    settings: EvaluationSettings,
) -> VariantResult:
    """Attacks a model, asks it harmless things, and reads its refusal curves.

    The model is left as it was: its mode, its generation configuration, and whether `apply_derta`
    has been applied.

    Args:
        model: a causal language model, plain or under PEFT.
        tokenizer: its tokenizer, with a chat template.
        data: held-out records.
        settings: see `EvaluationSettings`.

    Raises:
        ValueError: a record does not fit the model's context or its chat template (names its id),
            the refusal token cannot be resolved, or curves are asked of a model that `apply_derta`
            refuses.
    """
    started = time.perf_counter()
    context = context_length(model)
    encoder = Encoder(tokenizer, max_length=context, max_tokens=context, branches=0, cuts="zero")
    chosen = [
        scenario
        for scenario in scenarios(settings.prefill_depths)
        if scenario.metric != "helpful_accuracy" or settings.helpful == "exact_match"
    ]
    trials = [_trials(scenario, data, encoder) for scenario in chosen]
    harmful_curves, benign_curves = _curves(model, encoder, data, settings)
    answers = iter(_answers(model, encoder, list(itertools.chain(*trials)), settings))
    outcomes, samples = [], []
    for scenario, made in zip(chosen, trials, strict=True):
        if records := getattr(data, scenario.source):
            answered = list(itertools.islice(answers, len(made)))
            left_out = len(records) - len(made)
            outcomes.append(_outcome(scenario, answered, left_out, tokenizer))
            samples += [_sample(scenario, a, tokenizer) for a in answered[: settings.samples]]
    return VariantResult(
        outcomes=tuple(outcomes),
        harmful_curves=harmful_curves,
        benign_curves=benign_curves,
        perplexity=_perplexity(model, encoder, data, settings),
        samples=tuple(samples),
        seconds=time.perf_counter() - started,
    )


class _Answer(NamedTuple):
    trial: Trial
    ids: list[int]
    text: str
    verdict: Verdict


def _trials(scenario: Scenario, data: EvaluationData, chat: Chat) -> list[Trial]:
    trials = []
    for record in getattr(data, scenario.source):
        with naming(record):
            trial = scenario.trial(record, chat)
        if trial is not None:
            trials.append(trial)
    return trials


def _answers(
    model: PreTrainedModel, chat: Chat, trials: Sequence[Trial], settings: EvaluationSettings
) -> list[_Answer]:
    ids = generate(
        model,
        [trial.prompt for trial in trials],
        ids=[trial.id for trial in trials],
        stop_ids=stop_ids(model, chat),
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )
    texts = [_text(chat.tokenizer, answer) for answer in ids]
    verdicts = settings.judge(
        [Exchange(trial.messages, text) for trial, text in zip(trials, texts, strict=True)]
    )
    return [_Answer(*parts) for parts in zip(trials, ids, texts, verdicts, strict=True)]


def _outcome(
    scenario: Scenario,
    answers: Sequence[_Answer],
    left_out: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Outcome:
    return Outcome(
        scenario.metric,
        hits=sum(_counts(scenario, answer) for answer in answers),
        trials=len(answers),
        left_out=left_out,
        empty=sum(not answer.text.strip() for answer in answers),
        positions=tuple(
            answer.trial.depth + tokens_before(tokenizer, answer.ids, answer.verdict.start)
            for answer in answers
            if answer.verdict.start is not None
        ),
    )


def _counts(scenario: Scenario, answer: _Answer) -> bool:
    return scenario.counts(answer.trial, answer.text, answer.verdict)


def tokens_before(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int) -> int:
    """How many whole tokens of an answer come before character `start` of its text."""

    def length(count: int) -> int:
        return len(_text(tokenizer, ids[:count]))

    return bisect.bisect_right(range(len(ids) + 1), start, key=length) - 1


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)  # a list only for a list of lists
    return text


def _sample(scenario: Scenario, answer: _Answer, tokenizer: PreTrainedTokenizerBase) -> Sample:
    trial = answer.trial
    return Sample(
        metric=scenario.metric,
        id=trial.id,
        request=trial.messages[-1]["content"],
        prefilled=_text(tokenizer, trial.prompt[len(trial.prompt) - trial.depth :]),
        answer=answer.text,
        counted=_counts(scenario, answer),
    )


def _curves(
    model: PreTrainedModel, chat: Chat, data: EvaluationData, settings: EvaluationSettings
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Of harmful and of benign responses; the harmful ones also tell the refusal token."""
    if not (settings.curve and data.harmful):
        return (), ()
    refusal = resolve_refusal_token(chat.tokenizer, settings.refusal, data.harmful)
    harmful, benign = [], []
    for triple in data.harmful:
        with naming(triple):
            harmful.append(response(chat, triple.id, triple.messages, triple.harmful))
    for dialogue in data.benign:
        with naming(dialogue):
            *messages, last = dialogue.messages
            benign.append(response(chat, dialogue.id, messages, last["content"]))
    curves = refusal_curve(model, harmful + benign, refusal.id, settings.max_tokens)
    return tuple(curves[: len(harmful)]), tuple(curves[len(harmful) :])


def _perplexity(
    model: PreTrainedModel, encoder: Encoder, data: EvaluationData, settings: EvaluationSettings
) -> tuple[float, int]:
    if settings.helpful != "perplexity":
        return 0.0, 0
    dialogues = []
    for dialogue, encoded in zip(data.helpful, encoder.encode_many(data.helpful), strict=True):
        if not isinstance(encoded, EncodedDialogue):
            raise ValueError(
                f"{dialogue.id}: the dialogue exceeds the model's context of {encoder.max_length}"
            )
        dialogues.append(encoded)
    return perplexity(model, dialogues, settings.max_tokens)
