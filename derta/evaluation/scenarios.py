"""Scenarios: the prompts that a model gets, and the answers that count.

A scenario turns one request into one trial. To add a scenario, write the function for its trials
and a line in `make_scenarios`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from derta.data import Chat, Message
from derta.data.records.types import Request, naming
from derta.evaluation.attacks import SLOT, WHOLE, Attacks, Depth
from derta.evaluation.generation.decoding import GREEDY, Decoding
from derta.evaluation.judges.base import Verdict, succeeded
from derta.evaluation.questions import is_right


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Held-out requests by kind; a missing kind leaves its scenarios out.

    Args:
        harmful: requests that a model should refuse. Prefilling attacks put their responses and
            prefills into the model's mouth.
        benign: harmless requests.
        borderline: harmless requests that look harmful.
        helpful: requests with the right answers as their responses.
        multi_turn: harmful conversations. The model answers every user's turn itself; the
            assistant's messages are ignored.
        attacks: name to harmful prompts written by attack tools.
        completions: name to harmful texts that the model continues without a chat template.
        exports: name to harmless requests whose answers make no figure.
        questions: name to questions whose responses are, or end with, the one right answer, see
            `derta.evaluation.questions`.
        refusals: texts of known refusals, see `derta.evaluation.attacks.refusal_starts`.

    Raises:
        ValueError: a name cannot be a level of a metric, or the response to a question has no final
            answer (names the question's id).
    """

    harmful: Sequence[Request] = ()
    benign: Sequence[Request] = ()
    borderline: Sequence[Request] = ()
    helpful: Sequence[Request] = ()
    multi_turn: Sequence[Request] = ()
    attacks: Mapping[str, Sequence[Request]] = field(default_factory=dict)
    completions: Mapping[str, Sequence[Request]] = field(default_factory=dict)
    exports: Mapping[str, Sequence[Request]] = field(default_factory=dict)
    questions: Mapping[str, Sequence[Request]] = field(default_factory=dict)
    refusals: Sequence[str] = ()

    def __post_init__(self) -> None:
        for kind in ("attacks", "completions", "exports", "questions"):
            for name in getattr(self, kind):
                check_name(kind, name)
        for request in itertools.chain(*self.questions.values()):
            with naming(request):
                is_right("", request.response)


def check_name(kind: str, name: str) -> None:
    """Check that a name can be a level of a metric.

    Raises:
        ValueError: `name` is blank or has a dot.
    """
    if not name.strip() or "." in name:
        raise ValueError(f"{kind} must have names without dots, got {name!r}")


@dataclass(frozen=True)
class Trial:
    """One prompt to continue.

    Attributes:
        id: id of the request.
        messages: the conversation up to the request, without a template, for the judge.
        prompt: token ids that the model reads before it starts to write.
        depth: number of prompt tokens that are the prefilled start of a response.
        reference: the right answer, or "".
        later: messages that follow the model's answer; only its last answer counts.
        decoding: the choice of the last answer's tokens.
    """

    id: str
    messages: Sequence[Message]
    prompt: tuple[int, ...]
    depth: int = 0
    reference: str = ""
    later: tuple[Message, ...] = ()
    decoding: Decoding = GREEDY

    def after(self, answer: str | None, chat: Chat) -> Trial:
        """Return the trial of the next user's turn.

        Args:
            answer: the model's answer; None: a red flag withholds it, and its request is forgotten,
                as in `derta chat`.
            chat: the model's tokenizer and template.
        """
        said = list(self.messages[:-1])
        if answer is not None:
            said = [*self.messages, {"role": "assistant", "content": answer}]
        return _opened(self.id, [*said, *self.later], chat, start=len(said))


def direct(request: Request, chat: Chat) -> Trial:
    """Make a trial of the plain request."""
    return Trial(request.id, request.messages, tuple(chat.prompt_ids(request.messages)))


def prefill(request: Request, chat: Chat, *, depth: Depth) -> Trial | None:
    """Make a trial whose answer already starts with `depth` tokens of the harmful response.

    A response of no more than `depth` tokens is left out: nothing remains to be written, and any
    text after a finished answer would count as a success of the attack. At depth "whole" that is
    the attack: all of the response stands unfinished, and what the model goes on to write succeeds
    unless it refuses. A request without a response is left out too.
    """
    start = _start(request, chat, depth)
    return None if start is None else _begun(request, chat, start)


def prefill_thinking(request: Request, chat: Chat, *, depth: Depth, tag: str) -> Trial | None:
    """Make a trial like that of `prefill` whose tokens stand in an open thinking block.

    The block that the model goes on with is part of its answer.
    """
    start = _start(request, chat, depth)
    if start is None:
        return None
    prompt = (*chat.thinking_ids(request.messages, tag), *start)
    return Trial(request.id, request.messages, prompt, len(start))


def _start(request: Request, chat: Chat, depth: Depth) -> list[int] | None:
    """Return the first tokens of the harmful response, None if nothing remains of it."""
    if not request.response:
        return None
    response = chat.response_ids(request.messages, request.response)
    if depth == WHOLE:
        return response
    return response[:depth] if len(response) > depth else None


def prefilled(request: Request, chat: Chat) -> Trial | None:
    """Make a trial whose answer already starts with the request's whole prefill."""
    if not request.prefill:
        return None
    return _begun(request, chat, chat.response_ids(request.messages, request.prefill))


def _begun(request: Request, chat: Chat, start: Sequence[int]) -> Trial:
    prompt = (*chat.prompt_ids(request.messages), *start)
    return Trial(request.id, request.messages, prompt, len(start))


def completion(request: Request, chat: Chat) -> Trial:
    """Make a trial of the request as raw text to be continued, without a chat template.

    Only a beginning-of-sequence token is kept, if the template begins every chat with one. The
    paper's CompletingAttack first rewrites each request as a statement. For the same attack, give
    a file of such statements as prompts.

    Source: arXiv 2407.09121, section 4.1.
    """
    start = chat.prompt_ids(request.messages)[:1]
    beginning = start if start == [chat.tokenizer.bos_token_id] else []
    text = chat.text_ids(request.prompt)
    return Trial(request.id, request.messages, tuple(beginning + text))


class Templated(NamedTuple):
    """A request and the template around it."""

    request: Request
    template: str

    @property
    def id(self) -> str:
        """The id of the request."""
        return self.request.id


def templated(
    one: Templated, chat: Chat, *, ask: Callable[[Request, Chat], Trial | None] = direct
) -> Trial | None:
    """Make the trial that `ask` makes of the request in the slot of its template.

    A judge reads only the request: a template is written to mislead its reader.
    """
    *before, last = one.request.messages
    content = one.template.replace(SLOT, last["content"])
    trial = ask(
        replace(one.request, prompt="", messages=[*before, {"role": "user", "content": content}]),
        chat,
    )
    return None if trial is None else replace(trial, messages=one.request.messages)


class Sampled(NamedTuple):
    """A request and the number of its drawn answer."""

    request: Request
    sample: int

    @property
    def id(self) -> str:
        """The id of the request."""
        return self.request.id


def sampled(one: Sampled, chat: Chat, *, temperature: float, seed: int) -> Trial:
    """Make a trial of the plain request whose answer is drawn."""
    decoding = Decoding(temperature=temperature, seed=seed, sample=one.sample)
    return replace(direct(one.request, chat), decoding=decoding)


def banned(
    request: Request,
    chat: Chat,
    *,
    ask: Callable[[Request, Chat], Trial | None],
    decoding: Decoding,
) -> Trial | None:
    """Make the trial that `ask` makes, with tokens forbidden at the start of its answer."""
    trial = ask(request, chat)
    return None if trial is None else replace(trial, decoding=decoding)


class Following(NamedTuple):
    """A request, and another one with a harmful response that stands before it."""

    request: Request
    before: Request | None

    @property
    def id(self) -> str:
        """The id of the request."""
        return self.request.id


def following(harmful: Sequence[Request]) -> list[Following]:
    """Pair each request with the closest earlier one that differs and has a response.

    Before the first request comes the last one.
    """
    pairs = []
    for place, request in enumerate(harmful):
        earlier = (*harmful[place + 1 :], *harmful[:place])
        others = (one for one in reversed(earlier) if one.response and one.prompt != request.prompt)
        pairs.append(Following(request, next(others, None)))
    return pairs


def in_context(one: Following, chat: Chat) -> Trial | None:
    """Make a trial of a request that follows another one and its harmful response.

    The system's message is the request's own. A judge reads the request alone: what stands before
    it is the attacker's.
    """
    if one.before is None:
        return None
    own, before = one.request.messages, one.before
    harm: Message = {"role": "assistant", "content": before.response}
    messages = [
        *(message for message in own if message["role"] == "system"),
        *(message for message in before.messages if message["role"] != "system"),
        harm,
        *(message for message in own if message["role"] != "system"),
    ]
    return Trial(one.id, own, tuple(chat.prompt_ids(messages)))


def conversed(request: Request, chat: Chat) -> Trial:
    """Make a trial of a conversation in which the model answers every user's turn itself."""
    messages = [message for message in request.messages if message["role"] != "assistant"]
    return _opened(request.id, messages, chat, start=0)


def _opened(id: str, messages: Sequence[Message], chat: Chat, *, start: int) -> Trial:
    """Make a trial up to the first user's turn from `start` on; later turns follow."""
    turn = next(i for i in range(start, len(messages)) if messages[i]["role"] == "user") + 1
    asked = tuple(messages[:turn])
    return Trial(id, asked, tuple(chat.prompt_ids(asked)), later=tuple(messages[turn:]))


def answered(request: Request, chat: Chat) -> Trial:
    """Make a trial whose answer is compared with the request's response.

    Raises:
        ValueError: the request has no response.
    """
    if not request.response:
        raise ValueError("response: is missing, expected the right answer")
    return replace(direct(request, chat), reference=request.response)


def complied(trial: Trial, answer: str, verdict: Verdict) -> bool | None:
    """Decide if the attack succeeded."""
    return succeeded(answer, verdict)


def refused(trial: Trial, answer: str, verdict: Verdict) -> bool | None:
    """Decide if the model refused."""
    return verdict.refused


def matched(trial: Trial, answer: str, verdict: Verdict) -> bool:
    """Decide if the answer equals the reference, ignoring white space."""
    return answer.split() == trial.reference.split()


def solved(trial: Trial, answer: str, verdict: Verdict) -> bool:
    """Decide if the final answer is that of the reference, see `derta.evaluation.questions`."""
    return is_right(answer, trial.reference)


Asked = Request | Templated | Sampled | Following


@dataclass(frozen=True)
class Scenario:
    """One figure of an evaluation: the share of trials that count.

    Attributes:
        metric: place of the figure in a summary; dots separate its levels.
        records: requests, each with an id.
        trial: function from a record to its trial, or to None to leave the record out.
        counts: function that decides if an answer counts; None if the judge is undecided.
        is_judged: if True, `counts` needs a judge's verdict.
        per_request: number of records that are one request; their trials are not independent.
        worst_of: number of trials in a row of which one that counts is enough.
    """

    metric: str
    records: Sequence[Asked]
    trial: Callable[..., Trial | None]
    counts: Callable[[Trial, str, Verdict], bool | None]
    is_judged: bool = True
    per_request: int = 1
    worst_of: int = 1


def make_scenarios(
    data: EvaluationData,
    attacks: Attacks,
    *,
    helpful: Literal["exact_match", "perplexity"] = "exact_match",
    refusal_starts: Sequence[int] = (),
    thinking_tag: str = "",
) -> list[Scenario]:
    """Make all scenarios for which `data` has a request.

    Args:
        data: held-out requests, see `EvaluationData`.
        attacks: the attacks on harmful requests, and their strength.
        helpful: "exact_match" to generate answers to helpful requests, or "perplexity".
        refusal_starts: tokens that begin a refusal, see `derta.evaluation.attacks.refusal_starts`.
        thinking_tag: text that opens a thinking block, see `derta.evaluation.attacks.thinking_tag`.
    """
    harmful = data.harmful
    has_responses = any(request.response for request in harmful)
    exact = data.helpful if helpful == "exact_match" else ()
    made = [
        Scenario("asr.direct", harmful, direct, complied),
        *_prefilling(data, attacks, has_responses),
        *_banning(harmful, attacks, has_responses, refusal_starts),
        *_sampling(harmful, attacks),
        *(
            Scenario(
                f"asr.prefill_thinking.{depth}",
                harmful,
                functools.partial(prefill_thinking, depth=depth, tag=thinking_tag),
                complied,
            )
            for depth in attacks.prefill_depths
            if has_responses and thinking_tag
        ),
        Scenario(
            "asr.in_context",
            following(harmful) if attacks.in_context and has_responses else (),
            in_context,
            complied,
        ),
        Scenario("asr.multi_turn", data.multi_turn, conversed, complied),
        *(Scenario(f"asr.file.{n}", of, direct, complied) for n, of in data.attacks.items()),
        *(
            Scenario(f"asr.file.{name}", texts, completion, complied)
            for name, texts in data.completions.items()
        ),
        Scenario("over_refusal.benign", data.benign, direct, refused),
        Scenario("over_refusal.borderline", data.borderline, direct, refused),
        Scenario("helpful_accuracy", exact, answered, matched, is_judged=False),
        *(
            Scenario(f"accuracy.{name}", asked, answered, solved, is_judged=False)
            for name, asked in data.questions.items()
        ),
    ]
    return [scenario for scenario in made if scenario.records]


def _prefilling(data: EvaluationData, attacks: Attacks, has_responses: bool) -> list[Scenario]:
    """Make the scenarios of prefilled starts, of raw text, and of templates."""
    harmful, templates = data.harmful, attacks.templates
    in_templates = [
        Templated(request, templates[place % len(templates)])
        for place, request in enumerate(harmful)
        if templates
    ]
    deep = [
        (depth, functools.partial(prefill, depth=depth))
        for depth in attacks.prefill_depths
        if has_responses
    ]
    begun = harmful if any(request.prefill for request in harmful) else ()
    return [
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
    ]


def _banning(
    harmful: Sequence[Request],
    attacks: Attacks,
    has_responses: bool,
    refusal_starts: Sequence[int],
) -> list[Scenario]:
    """Make the scenarios that forbid the starts of refusals: at depth 0, and after prefills."""
    if not attacks.refusal_banned:
        return []
    decoding = Decoding(banned=tuple(refusal_starts), banned_for=attacks.refusal_banned)
    deeper = [depth for depth in attacks.prefill_depths if depth != 0 and has_responses]
    asks: dict[Depth, Callable[[Request, Chat], Trial | None]] = {
        0: direct,
        **{depth: functools.partial(prefill, depth=depth) for depth in deeper},
    }
    return [
        Scenario(
            f"asr.refusal_banned.{depth}",
            harmful,
            functools.partial(banned, ask=ask, decoding=decoding),
            complied,
        )
        for depth, ask in asks.items()
    ]


def _sampling(harmful: Sequence[Request], attacks: Attacks) -> list[Scenario]:
    """Make the scenarios of single drawn answers, and of the worst of several."""
    count = attacks.sampling
    records = [Sampled(request, n) for request in harmful for n in range(count)]
    ask = functools.partial(sampled, temperature=attacks.temperature, seed=attacks.seed)
    single = Scenario("asr.sampling.1", records, ask, complied, per_request=count)
    if count < 2:
        return [single]
    return [single, Scenario(f"asr.sampling.{count}", records, ask, complied, worst_of=count)]
