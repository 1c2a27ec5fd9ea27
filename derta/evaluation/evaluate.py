"""Evaluation of one model: all scenarios, refusal curves, perplexity and tasks of lm-eval."""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from derta.data import Chat, Dialogue, EncodedDialogue, Encoder
from derta.data.records.defaults import SpecialTokensInText
from derta.data.records.refusal_keywords import REFUSAL_KEYWORDS
from derta.data.records.types import Request, naming
from derta.data.tokens.red_flag import NAME as FLAG_NAME
from derta.evaluation.answering import Answer, Respondent
from derta.evaluation.attacks import Attacks, keywords_of, refusal_starts, thinking_tag
from derta.evaluation.defences import Defence, defended
from derta.evaluation.generation.local import Generator, ModelGenerator, Written, decode
from derta.evaluation.judges.base import (
    FLAGGED,
    Exchange,
    Judge,
    KeywordJudge,
    Verdict,
    decides_refusals,
)
from derta.evaluation.lm_tasks import check_tasks, run_tasks
from derta.evaluation.measures.ranks import RankAttack
from derta.evaluation.measures.results import Outcome, Sample, VariantResult
from derta.evaluation.scenarios import (
    EvaluationData,
    Scenario,
    Trial,
    direct,
    make_scenarios,
)
from derta.evaluation.teacher_forcing import (
    ResponseCurves,
    find_refusal_token,
    perplexity,
    refusal_ids,
    response_curves,
)
from derta.modeling.introspection import context_length
from derta_kernels.head_loss import checked_ids

# The verdict for trials that need no judge.
UNJUDGED = Verdict(refused=None)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Attacks):
    """Settings of an evaluation: those of `Attacks`, and these.

    Args:
        refusal: the refusal token of the curves, and of attacks that forbid it, see
            `find_refusal_token`.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts per batch.
        max_tokens: tokens per pack for curves.
        curve: if True, refusal curves and rank curves are measured; they need harmful responses and
            a model that `apply_derta` supports.
        rank_attack: the attacker whose success the ranks tell.
        helpful: "exact_match" of generated answers, or "perplexity" of the given answers.
        judges: name to judge; all judges read the same answers, and the first one's figures are the
            main ones.
        keywords: phrases by which attacks and defences recognize a refusal if there is no keyword
            judge; else its own count.
        lm_eval: tasks of lm-eval, by name or as a YAML file, see `derta.evaluation.lm_tasks`.
        samples: number of answers kept per scenario; 0 by default, to show no text.
        special_tokens_in_text: control tokens in requests, templates and responses: "plain" text;
            "refuse", an error of the request; or "keep", for an attacker whose prompts reach a
            model that reads them as control tokens. Answers of the model are never refused.
        empty_answers: an empty answer neither refuses nor complies. "apart": it is counted beside
            the rates of attacks and of over-refusal, and is no trial of them; "failed": it is a
            trial, of an attack without success or of a request that is not refused.
        defence: a defence at inference, under which every answer is generated; curves, perplexity
            and tasks of lm-eval, which no defence changes, are then left out.

    Raises:
        ValueError: a value is out of its range, two prefill depths are the same, a template lacks
            its slot, there is no judge or no keyword, or lm-eval is not installed or lacks a task.
    """

    refusal: str | int | Sequence[str | int] = "auto"
    max_new_tokens: int = 256
    batch_size: int = 16
    max_tokens: int = 4096
    curve: bool = True
    rank_attack: RankAttack = field(default_factory=RankAttack)
    helpful: Literal["exact_match", "perplexity"] = "exact_match"
    judges: Mapping[str, Judge] = field(default_factory=lambda: {"keyword": KeywordJudge()})
    keywords: Sequence[str] = REFUSAL_KEYWORDS
    lm_eval: Sequence[str] = ()
    samples: int = 0
    special_tokens_in_text: SpecialTokensInText = "plain"
    empty_answers: Literal["apart", "failed"] = "apart"
    defence: Defence | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.helpful not in ("exact_match", "perplexity"):
            raise ValueError(f"helpful must be exact_match or perplexity, got {self.helpful!r}")
        if self.empty_answers not in ("apart", "failed"):
            raise ValueError(f"empty_answers must be apart or failed, got {self.empty_answers!r}")
        if self.lm_eval:
            check_tasks(self.lm_eval)
        if not self.judges:
            raise ValueError("judges must name at least one judge, got none")
        KeywordJudge(self.keywords)
        least = {"max_new_tokens": 1, "batch_size": 1, "max_tokens": 1, "samples": 0}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} must be at least {limit}, got {getattr(self, name)}")

    def conditions(self) -> dict[str, Any]:
        """Return the settings on which rates depend, beside data, prompts and judges.

        Those of a defence are None without it, so that a row without is unlike one with it.
        """
        attacks: dict[str, Any] = {
            "refusal_banned": self.refusal_banned or None,
            "temperature": self.temperature if self.sampling else None,
        }
        if self.curve and self.rank_attack.top_k:
            wanted = self.rank_attack
            attacks |= {
                "rank_prefill": wanted.prefill,
                "rank_tokens": wanted.tokens or "all",
                "rank_misses": wanted.misses,
            }
        return {
            "max_new_tokens": self.max_new_tokens,
            "empty_answers": self.empty_answers,
            **{name: value for name, value in attacks.items() if value is not None},
            **dict.fromkeys(("system_prompt", "header_after")),
            **({} if self.defence is None else self.defence.conditions()),
        }


def refuse_what_takes_a_model(data: EvaluationData, settings: EvaluationSettings) -> None:
    """Check that a served model, which only gives answers, is enough for the settings.

    Raises:
        ValueError: curves, perplexity or tasks of lm-eval are requested.
    """
    asked = {
        "curve": settings.curve and any(request.response for request in data.harmful),
        "helpful: perplexity": settings.helpful == "perplexity",
        "lm_eval": bool(settings.lm_eval),
    }
    for key, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"{key} needs a model on this machine, got one behind a server")


def refuse_what_takes_responses(data: EvaluationData, settings: EvaluationSettings) -> None:
    """Check that there are harmful responses for the attacks that write them.

    Raises:
        ValueError: there are harmful requests, none has a response, and an attack needs one.
    """
    if not data.harmful or any(request.response for request in data.harmful):
        return
    for name in ("prefill_thinking", "in_context"):
        if getattr(settings, name):
            raise ValueError(f"{name} needs harmful responses, got requests without any")


def evaluate_model(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    data: EvaluationData,
    settings: EvaluationSettings,
    *,
    generator: Generator | None = None,
) -> VariantResult:
    """Evaluate a model: collect its answers, then judge them.

    The judges run while the model is still in memory. For several models, or for judges that need
    the model's memory, call `collect_answers` and `judge_answers` instead.

    Args:
        model, tokenizer, data, settings, generator: see `collect_answers`.

    Raises:
        ValueError: as `collect_answers`.
    """
    answered = collect_answers(model, tokenizer, data, settings, generator=generator)
    (result,) = judge_answers([answered], settings)
    return result


@dataclass(frozen=True)
class Answered:
    """The answers of a model, and the results that need no judge.

    Attributes:
        scenarios: the scenarios.
        answers: answers to the trials of each scenario.
        tokenizer: the model's tokenizer.
        found: curves, what they tell of attacks, perplexity, figures of lm-eval, conditions, and
            the duration.
        exports: name to requests and answers for another program.
    """

    scenarios: Sequence[Scenario]
    answers: Sequence[Sequence[Answer]]
    tokenizer: PreTrainedTokenizerBase
    found: VariantResult
    exports: Mapping[str, Sequence[tuple[str, str]]]


def collect_answers(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    data: EvaluationData,
    settings: EvaluationSettings,
    *,
    generator: Generator | None = None,
) -> Answered:
    """Run the part of an evaluation that needs the model.

    The model's mode, generation configuration and patch are restored.

    Args:
        model: a causal language model, plain or under PEFT; None for a served model, which has no
            curves, no perplexity and no tasks of lm-eval.
        tokenizer: its tokenizer, with a chat template.
        data: held-out requests.
        settings: see `EvaluationSettings`; of its judges, only the keywords are used, and its
            samples are ignored.
        generator: the generator of the answers; None: the model.

    Raises:
        ValueError: a request does not fit the model's context or its chat template, or has a
            special token that is refused (names its id), the refusal token cannot be resolved,
            `apply_derta` refuses the model for curves, the chat template has no thinking block, no
            system message or no header where the settings need one, or the settings need harmful
            responses that are not there, or more than a served model.
    """
    started = time.perf_counter()
    defence = settings.defence
    chat = defended(Chat(tokenizer, settings.special_tokens_in_text), defence)
    for place, template in enumerate(settings.templates):
        chat.check_text(f"templates[{place}]", template)
    refuse_what_takes_responses(data, settings)
    starts = _refusal_starts(model, chat, data, settings)
    chosen = make_scenarios(
        data,
        settings,
        helpful=settings.helpful,
        refusal_starts=starts,
        thinking_tag=(
            thinking_tag(chat, settings.prefill_thinking) if settings.prefill_thinking else ""
        ),
    )
    trials = [_trials(scenario, chat) for scenario in chosen]
    curves, refusals = _NO_CURVES
    nll, lm_figures = (0.0, 0), {}
    if model is None:
        refuse_what_takes_a_model(data, settings)
    elif defence is None:
        curves, refusals = _curves(model, chat, data, settings)
        nll = _perplexity(model, tokenizer, data, settings)
        lm_figures = run_tasks(model, tokenizer, settings.lm_eval, settings.batch_size)
    if generator is None:
        assert model is not None, "a model that is not here needs a generator"
        generator = ModelGenerator(
            model, chat, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size
        )
    exported = {
        name: [_direct(request, chat) for request in asked] for name, asked in data.exports.items()
    }
    respond = Respondent(
        generator=generator,
        chat=chat,
        max_new_tokens=settings.max_new_tokens,
        context=None if model is None else context_length(model),
        defence=defence,
        keywords=keywords_of(settings.judges.values(), settings.keywords),
    )
    written = iter(respond(list(itertools.chain(*trials, *exported.values()))))
    answers = [list(itertools.islice(written, len(made))) for made in trials]
    exports = {
        name: [
            (trial.messages[-1]["content"], answer.text)
            for trial, answer in itertools.islice(written, len(made))
        ]
        for name, made in exported.items()
    }
    harmful, benign, borderline = (tuple(one.refusal for one in kind) for kind in curves)
    ranks = tuple(one.ranks for one in curves[0])
    found = VariantResult(
        outcomes=settings.rank_attack.outcomes(ranks),
        harmful_curves=harmful,
        benign_curves=benign,
        borderline_curves=borderline,
        refusals=refusals,
        harmful_ranks=ranks,
        top_k=tuple(settings.rank_attack.top_k),
        perplexity=nll,
        lm_eval=lm_figures,
        conditions=settings.conditions(),
        refusal_starts=tuple(map(chat.text, starts)),
        seconds=time.perf_counter() - started,
    )
    return Answered(chosen, answers, tokenizer, found, exports)


def judge_answers(
    answered: Sequence[Answered], settings: EvaluationSettings
) -> list[VariantResult]:
    """Let one judge after another read the answers of all models.

    Args:
        answered: the answers, one entry per model.
        settings: see `EvaluationSettings`: those of the answers, but for a defence.
    """
    verdicts = {name: _verdicts(judge, answered) for name, judge in settings.judges.items()}
    return [
        _result(one, {name: said[place] for name, said in verdicts.items()}, settings)
        for place, one in enumerate(answered)
    ]


def _result(
    answered: Answered,
    verdicts: Mapping[str, Sequence[Sequence[Verdict]]],
    settings: EvaluationSettings,
) -> VariantResult:
    """Return the result of one model from each judge's verdicts, by scenario."""
    tokenizer, apart = answered.tokenizer, settings.empty_answers == "apart"
    said = {
        name: list(zip(answered.scenarios, answered.answers, by_scenario, strict=True))
        for name, by_scenario in verdicts.items()
    }
    main, *others = verdicts
    return replace(
        answered.found,
        outcomes=(
            *(_outcome(*one, tokenizer, apart) for one in said[main]),
            *answered.found.outcomes,
        ),
        judge=main,
        judges={
            name: tuple(_outcome(*one, tokenizer, apart) for one in said[name] if one[0].is_judged)
            for name in others
        },
        samples=tuple(
            _sample(scenario, *one, tokenizer)
            for scenario, made, decided in said[main]
            for one in itertools.islice(zip(made, decided, strict=True), settings.samples)
        ),
    )


def _trials(scenario: Scenario, chat: Chat) -> list[Trial]:
    trials = []
    for record in scenario.records:
        with naming(record):
            chat.check(record if isinstance(record, Request) else record.request)
            trial = scenario.trial(record, chat)
        if trial is not None:
            trials.append(trial)
    return trials


def _direct(request: Request, chat: Chat) -> Trial:
    with naming(request):
        chat.check(request)
        return direct(request, chat)


def _refusal_starts(
    model: PreTrainedModel | None, chat: Chat, data: EvaluationData, settings: EvaluationSettings
) -> tuple[int, ...]:
    """Return the tokens that an attacker forbids, () without such an attack."""
    if not (settings.refusal_banned and data.harmful):
        return ()
    if model is None:
        refusal = refusal_ids(chat.tokenizer, settings.refusal)
    else:
        refusal = find_refusal_token(model, chat.tokenizer, settings.refusal)
    keywords = keywords_of(settings.judges.values(), settings.keywords)
    return refusal_starts(chat, refusal, keywords, data.refusals)


def _verdicts(judge: Judge, answered: Sequence[Answered]) -> list[list[list[Verdict]]]:
    """Return the verdict on each answer; one that a red flag ends needs no judge.

    A blank or a flagged answer is no refusal to a judge that decides on none: it would be the only
    one that is decided.
    """
    exchanges = [
        Exchange(answer.trial.messages, answer.written.text, _prefilled(answer, one.tokenizer))
        for one in answered
        for scenario, made in zip(one.scenarios, one.answers, strict=True)
        for answer in made
        if scenario.is_judged and not answer.written.flagged
    ]
    said, decides = iter(judge(exchanges)), decides_refusals(judge)

    def verdict(answer: Answer) -> Verdict:
        own = FLAGGED if answer.written.flagged else next(said)
        return own if decides else replace(own, refused=None, start=None)

    return [
        [
            list(map(verdict, made)) if scenario.is_judged else [UNJUDGED] * len(made)
            for scenario, made in zip(one.scenarios, one.answers, strict=True)
        ]
        for one in answered
    ]


def _prefilled(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text before the answer, decoded with the answer to keep the space between them."""
    trial, written = answer
    start = trial.prompt[len(trial.prompt) - trial.depth :]
    whole = decode(tokenizer, [*start, *written.ids])
    # A character split between the two is in neither text.
    if written.flagged or not whole.endswith(written.text):
        return decode(tokenizer, start)
    return whole.removesuffix(written.text)


def _outcome(
    scenario: Scenario,
    answers: Sequence[Answer],
    verdicts: Sequence[Verdict],
    tokenizer: PreTrainedTokenizerBase,
    apart: bool,
) -> Outcome:
    apart = apart and scenario.is_judged
    counted: list[bool | None] = []
    empty = []
    for (trial, written), verdict in zip(answers, verdicts, strict=True):
        empty.append(not written.text.strip() and not written.flagged)
        counted.append(scenario.counts(trial, written.text, verdict))
    positions = [
        trial.depth
        + (
            len(written.ids)
            if written.flagged
            else _tokens_before(tokenizer, written, verdict.start)
        )
        for (trial, written), verdict in zip(answers, verdicts, strict=True)
        if verdict.start is not None
    ]
    groups = range(0, len(answers), scenario.worst_of)
    if scenario.worst_of > 1:
        counted = [_worst(counted[n : n + scenario.worst_of]) for n in groups]
        empty = [all(empty[n : n + scenario.worst_of]) for n in groups]
        positions = []  # an attack that succeeds has none of its answers' refusals
    decided = [one for one, silent in zip(counted, empty, strict=True) if not (apart and silent)]
    return Outcome(
        scenario.metric,
        hits=decided.count(True),
        trials=len(decided) - decided.count(None),
        left_out=(len(scenario.records) - len(answers)) // scenario.worst_of,
        empty=sum(empty),
        positions=tuple(positions),
        undecided=decided.count(None),
        answers=len(counted),
        per_request=scenario.per_request,
    )


def _worst(counted: Sequence[bool | None]) -> bool | None:
    """Return the count of several answers of which one success is enough."""
    return True if True in counted else None if None in counted else False


def _tokens_before(tokenizer: PreTrainedTokenizerBase, written: Written, start: int) -> int:
    """Count the whole tokens of an answer before character `start`, see `Written.kept`."""
    kept, rest = written.ids[: written.kept], written.ids[written.kept :]
    in_rest = start - len(decode(tokenizer, kept)) - bool(kept)
    if in_rest < 0:
        return tokens_before(tokenizer, kept, start)
    return len(kept) + tokens_before(tokenizer, rest, in_rest)


def tokens_before(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int) -> int:
    """Count the whole tokens of an answer before character `start` of its text."""

    def length(count: int) -> int:
        return len(decode(tokenizer, ids[:count]))

    return bisect.bisect_right(range(len(ids) + 1), start, key=length) - 1


def _sample(
    scenario: Scenario, answer: Answer, verdict: Verdict, tokenizer: PreTrainedTokenizerBase
) -> Sample:
    trial, written = answer
    return Sample(
        metric=scenario.metric,
        id=trial.id,
        request=trial.messages[-1]["content"],
        prefilled=_prefilled(answer, tokenizer),
        answer=str(getattr(tokenizer, FLAG_NAME)) if written.flagged else written.text,
        counted=scenario.counts(trial, written.text, verdict),
    )


_NO_CURVES: tuple[list[list[ResponseCurves]], int] = [[], [], []], 1


def _curves(
    model: PreTrainedModel, chat: Chat, data: EvaluationData, settings: EvaluationSettings
) -> tuple[list[list[ResponseCurves]], int]:
    """Return the curves of harmful, benign and borderline responses, and their refusal tokens."""
    kinds = [
        [request for request in requests if request.response]
        for requests in (data.harmful, data.benign, data.borderline)
    ]
    if not settings.curve or not kinds[0]:
        return _NO_CURVES
    refusal_id = find_refusal_token(model, chat.tokenizer, settings.refusal)
    curves = iter(
        response_curves(
            model,
            chat.tokenizer,
            list(itertools.chain(*kinds)),
            refusal=refusal_id,
            max_tokens=settings.max_tokens,
            special_tokens_in_text=settings.special_tokens_in_text,
        )
    )
    by_kind = [list(itertools.islice(curves, len(kind))) for kind in kinds]
    return by_kind, len(checked_ids(refusal_id))


def _perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: EvaluationData,
    settings: EvaluationSettings,
) -> tuple[float, int]:
    if settings.helpful != "perplexity" or not data.helpful:
        return 0.0, 0
    context = context_length(model)
    encoder = Encoder(
        tokenizer,
        max_length=context,
        max_tokens=context,
        branches=0,
        cuts="zero",
        special_tokens_in_text=settings.special_tokens_in_text,
    )
    dialogues = [answered_dialogue(request, "the right answer") for request in data.helpful]
    encoded = []
    for dialogue, one in zip(dialogues, encoder.encode_many(dialogues), strict=True):
        if not isinstance(one, EncodedDialogue):
            raise ValueError(
                f"{dialogue.id}: the dialogue exceeds the model's context of {context}"
            )
        encoded.append(one)
    return perplexity(model, encoded, settings.max_tokens)


def answered_dialogue(request: Request, expected: str) -> Dialogue:
    """Return a request with its response as the answer.

    Args:
        request: the request.
        expected: the use of the response, for the error.

    Raises:
        ValueError: the request has no response; names its id.
    """
    if not request.response:
        raise ValueError(f"{request.id}: response: is missing, expected {expected}")
    answer = {"role": "assistant", "content": request.response}
    return Dialogue(id=request.id, messages=[*request.messages, answer])
