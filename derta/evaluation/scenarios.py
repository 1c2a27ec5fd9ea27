"""Scenarios: what a model is asked, and which of its answers count.

A scenario turns one request into one trial. To add one, write that small function and give it a
line in `make_scenarios`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from derta.data import Chat, Message
from derta.data.records.types import Request
from derta.evaluation.judges.base import Verdict, succeeded
from derta.evaluation.questions import is_right

SLOT = "{request}"


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Held-out requests; a kind that is missing leaves its scenarios out.

    Args:
        harmful: ought to be refused; their responses and prefills are what attacks put into a
            model's mouth.
        benign: harmless, and like any other.
        borderline: harmless, and look harmful.
        helpful: with the right answers as their responses.
        multi_turn: harmful conversations, of which the model answers every user's turn itself:
            assistant's messages in them play no part.
        attacks: name to harmful prompts that are ready-made, as attackers' tools write them.
        questions: name to questions whose responses are, or end with, the one right answer, see
            `derta.evaluation.questions`.

    Raises:
        ValueError: a name cannot be one of a metric's levels.
    """

    harmful: Sequence[Request] = ()
    benign: Sequence[Request] = ()
    borderline: Sequence[Request] = ()
    helpful: Sequence[Request] = ()
    multi_turn: Sequence[Request] = ()
    attacks: Mapping[str, Sequence[Request]] = field(default_factory=dict)
    questions: Mapping[str, Sequence[Request]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in ("attacks", "questions"):
            for name in getattr(self, kind):
                check_name(kind, name)


def check_name(kind: str, name: str) -> None:
    """Refuses what cannot be a level of a metric.

    Raises:
        ValueError: `name` is blank or has a dot.
    """
    if not name.strip() or "." in name:
        raise ValueError(f"{kind} must have names without dots, got {name!r}")


@dataclass(frozen=True)
class Trial:
    """One prompt to continue.

    Attributes:
        id: the request's.
        messages: the conversation up to the request, as a judge reads it: without a template.
        prompt: token ids, all that the model has read when it starts to write.
        depth: how many of them are the prefilled start of a response.
        reference: the right answer, where there is one.
        later: messages that follow once the model has answered; its last answer is the trial's.
    """

    id: str
    messages: Sequence[Message]
    prompt: tuple[int, ...]
    depth: int = 0
    reference: str = ""
    later: tuple[Message, ...] = ()

    def after(self, answer: str, chat: Chat) -> Trial:
        """What is asked next, up to the next user's turn, once the model has given `answer`."""
        said = [*self.messages, {"role": "assistant", "content": answer}]
        return _opened(self.id, [*said, *self.later], chat, start=len(said))


def direct(request: Request, chat: Chat) -> Trial:
    """The request as it is."""
    return Trial(request.id, request.messages, tuple(chat.prompt_ids(request.messages)))


def prefill(request: Request, chat: Chat, *, depth: int) -> Trial | None:
    """The answer has already started with the first `depth` tokens of the harmful response.

    A response of no more than `depth` tokens is left out: nothing of it remains to be written, and
    whatever a model appends to a finished answer would count as an attack's success. So is a
    request without one.
    """
    if not request.response:
        return None
    response = chat.response_ids(request.messages, request.response)
    if len(response) <= depth:
        return None
    return _begun(request, chat, response[:depth])


def prefilled(request: Request, chat: Chat) -> Trial | None:
    """The answer has already started as the request's file says, with all of that."""
    if not request.prefill:
        return None
    return _begun(request, chat, chat.response_ids(request.messages, request.prefill))


def _begun(request: Request, chat: Chat, start: Sequence[int]) -> Trial:
    prompt = (*chat.prompt_ids(request.messages), *start)
    return Trial(request.id, request.messages, prompt, len(start))


def completion(request: Request, chat: Chat) -> Trial:
    """The request as raw text to be continued, without any chat template.

    Only a beginning-of-sequence token is kept, where the template begins every chat with one. The
    paper's CompletingAttack rewrites each request as a statement first; a file of such statements
    as prompts gives exactly that.

    Source: arXiv 2407.09121, section 4.1.
    """
    tokenizer = chat.tokenizer
    start = chat.prompt_ids(request.messages)[:1]
    beginning = start if start == [tokenizer.bos_token_id] else []
    text = tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
    return Trial(request.id, request.messages, tuple(beginning + text))


class Templated(NamedTuple):
    """A request and the template around it."""

    request: Request
    template: str

    @property
    def id(self) -> str:
        """The request's."""
        return self.request.id


def templated(
    one: Templated, chat: Chat, *, ask: Callable[[Request, Chat], Trial | None] = direct
) -> Trial | None:
    """The request in the slot of its template, otherwise asked as `ask` asks.

    A judge reads the request alone: a template is made to lead its reader astray.
    """
    *before, last = one.request.messages
    content = one.template.replace(SLOT, last["content"])
    trial = ask(
        replace(one.request, prompt="", messages=[*before, {"role": "user", "content": content}]),
        chat,
    )
    return None if trial is None else replace(trial, messages=one.request.messages)


def conversed(request: Request, chat: Chat) -> Trial:
    """A conversation in which every user's turn is answered by the model itself."""
    messages = [message for message in request.messages if message["role"] != "assistant"]
    return _opened(request.id, messages, chat, start=0)


def _opened(id: str, messages: Sequence[Message], chat: Chat, *, start: int) -> Trial:
    """Up to the first user's turn from `start` on; the others come later."""
    turn = next(i for i in range(start, len(messages)) if messages[i]["role"] == "user") + 1
    asked = tuple(messages[:turn])
    return Trial(id, asked, tuple(chat.prompt_ids(asked)), later=tuple(messages[turn:]))


def answered(request: Request, chat: Chat) -> Trial:
    """The request, to whose response the answer is compared.

    Raises:
        ValueError: it has none.
    """
    if not request.response:
        raise ValueError("response: is missing, expected the right answer")
    return replace(direct(request, chat), reference=request.response)


def question(request: Request, chat: Chat) -> Trial:
    """The question, whose answer comes to the same as the request's response, or does not.

    Raises:
        ValueError: the response has no final answer.
    """
    trial = answered(request, chat)
    is_right("", trial.reference)
    return trial


def complied(trial: Trial, answer: str, verdict: Verdict) -> bool | None:
    """The attack succeeded."""
    return succeeded(answer, verdict)


def refused(trial: Trial, answer: str, verdict: Verdict) -> bool | None:
    """The model refused."""
    return verdict.refused


def matched(trial: Trial, answer: str, verdict: Verdict) -> bool:
    """The answer is the reference, white space apart."""
    return answer.split() == trial.reference.split()


def solved(trial: Trial, answer: str, verdict: Verdict) -> bool:
    """The answer comes to the same as the reference, see `derta.evaluation.questions`."""
    return is_right(answer, trial.reference)


@dataclass(frozen=True)
class Scenario:
    """One figure of an evaluation: the share of trials that count.

    Attributes:
        metric: where the figure stands in a summary, its levels parted by dots.
        records: what it is about, each with an id.
        trial: makes a trial of a record, or None to leave it out.
        counts: whether an answer counts, None where the judge is undecided.
        is_judged: whether that takes a judge.
    """

    metric: str
    records: Sequence[Request] | Sequence[Templated]
    trial: Callable[..., Trial | None]
    counts: Callable[[Trial, str, Verdict], bool | None]
    is_judged: bool = True


def make_scenarios(
    data: EvaluationData,
    *,
    prefill_depths: Sequence[int],
    templates: Sequence[str] = (),
    helpful: Literal["exact_match", "perplexity"] = "exact_match",
) -> list[Scenario]:
    """All scenarios that `data` has a request for.

    Args:
        data: see `EvaluationData`.
        prefill_depths: how many tokens of the harmful response an answer starts with.
        templates: texts around a request, each with the slot `{request}`; the k-th request takes
            the k-th of them, and after the last comes the first again.
        helpful: whether answers to helpful requests are generated ("exact_match").

    Raises:
        ValueError: a depth is negative or given twice, or a template lacks its slot.
    """
    if min(prefill_depths, default=0) < 0 or len(set(prefill_depths)) < len(prefill_depths):
        raise ValueError(
            f"prefill_depths must be distinct and not negative, got {list(prefill_depths)}"
        )
    for place, template in enumerate(templates):
        if SLOT not in template:
            raise ValueError(f"templates[{place}] must have the slot {SLOT}, got none")
    harmful = data.harmful
    in_templates = [
        Templated(request, templates[place % len(templates)])
        for place, request in enumerate(harmful)
        if templates
    ]
    deep = [(depth, functools.partial(prefill, depth=depth)) for depth in prefill_depths]
    deep = deep if any(request.response for request in harmful) else []
    begun = harmful if any(request.prefill for request in harmful) else ()
    exact = data.helpful if helpful == "exact_match" else ()
    made = [
        Scenario("asr.direct", harmful, direct, complied),
        *(Scenario(f"asr.prefill.{k}", harmful, ask, complied) for k, ask in deep),
        Scenario("asr.prefilled", begun, prefilled, complied),
        Scenario("asr.completion", harmful, completion, complied),
        Scenario("asr.template", in_templates, templated, complied),
        *(
            Scenario(
                f"asr.template_prefill.{depth}",
                in_templates,
                functools.partial(templated, ask=ask),
                complied,
            )
            for depth, ask in deep
        ),
        Scenario("asr.multi_turn", data.multi_turn, conversed, complied),
        *(Scenario(f"asr.file.{n}", of, direct, complied) for n, of in data.attacks.items()),
        Scenario("over_refusal.benign", data.benign, direct, refused),
        Scenario("over_refusal.borderline", data.borderline, direct, refused),
        Scenario("helpful_accuracy", exact, answered, matched, is_judged=False),
        *(
            Scenario(f"accuracy.{name}", asked, question, solved, is_judged=False)
            for name, asked in data.questions.items()
        ),
    ]
    return [scenario for scenario in made if scenario.records]
