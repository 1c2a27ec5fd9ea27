"""Record types before tokenization: examples to train on, requests to evaluate with."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, str]
# Values that say nothing.
EMPTY: tuple[Any, ...] = (None, "", [], {})
SPEAKERS = ("system", "user", "assistant")

_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_NAME = re.compile(r"[\w.-]{1,20}")


@dataclass(frozen=True, kw_only=True)
class Triple:
    """One safety example: a prompt, a safe response and a harmful response.

    The prompt is either one user message, `prompt`, or a conversation, `messages`, that ends with a
    user message. After construction both are set: `messages` is a tuple, and `prompt` the text of
    its last message.

    Args:
        prompt: text of a single user message.
        messages: {"role", "content"} dicts with roles system, user and assistant.
        safe: the response to learn.
        harmful: the response to learn to break off.
        id: unique name of the example in the run; it appears in errors and seeds random draws.
        source: name of the data set.
        weight: weight of the example's targets in the loss, relative to other examples.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a text is blank or holds NUL or a lone surrogate, a role is unknown, the last
            message is not the user's, `prompt` and `messages` disagree, or the weight is not a
            positive number.

    Source: arXiv 2407.09121, section 3.1 (q, r and r-hat).
    """

    prompt: str = ""
    messages: Sequence[Message] = ()
    safe: str
    harmful: str
    id: str
    source: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_text("id", self.id)
        check_weight("weight", self.weight)
        check_text("safe", self.safe)
        check_text("harmful", self.harmful)
        _set_messages(self)


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """One harmless example: a conversation whose assistant messages are all learned.

    Args:
        messages: {"role", "content"} dicts with roles system, user and assistant; the last is the
            assistant's, the first is not. Stored as a tuple.
        id: unique name of the example in the run; it appears in errors.
        source: name of the data set.
        weight: weight of the example's targets in the loss, relative to other examples.
        borderline: if True, the request looks harmful and is not.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a text is blank or holds NUL or a lone surrogate, a role is unknown, the
            assistant speaks first or not last, or the weight is not a positive number.
    """

    messages: Sequence[Message]
    id: str
    source: str = ""
    weight: float = 1.0
    borderline: bool = False

    def __post_init__(self) -> None:
        check_text("id", self.id)
        check_weight("weight", self.weight)
        messages = check_messages("messages", self.messages)
        if messages[0]["role"] == "assistant":
            raise ValueError(
                "messages: the first message is the assistant's, expected another role"
            )
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"messages: the last message is the {messages[-1]['role']}'s, expected the "
                "assistant's"
            )
        object.__setattr__(self, "messages", messages)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One row of the authors' generated training files: a rendered prompt and text, unchanged.

    Nothing is added to them or removed from them, not even the end of a response.

    Args:
        prefix: context without targets.
        text: the targets.
        rto: if True, the target at each token of `text` is the refusal token, else that token.
        id, source, weight: as in `Triple`.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a text is blank or holds NUL or a lone surrogate, or the weight is not a
            positive number.

    Source: the authors' code, `safe` "true" and "false" of llama_derta.json.
    """

    prefix: str
    text: str
    rto: bool
    id: str
    source: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_text("id", self.id)
        check_text("prefix", self.prefix)
        check_text("text", self.text)
        check_weight("weight", self.weight)


Record = Triple | Dialogue | Rendered


@dataclass(frozen=True)
class Skipped:
    """A row that was read and yields nothing.

    Args:
        reason: a constant text, under which such rows are counted.
    """

    reason: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request to evaluate a model with.

    Args:
        prompt, messages: as in `Triple`.
        response: a whole response: a harmful one to a harmful request, a right one to any other.
            Prefill attacks use its start, refusal curves all of it. "": none.
        prefill: an attacker's complete start of the answer. "": none.
        category: topic of the request, as its file names it.
        id, source: as in `Triple`.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a text holds NUL or a lone surrogate, or there is no prompt.
    """

    prompt: str = ""
    messages: Sequence[Message] = ()
    response: str = ""
    prefill: str = ""
    category: str = ""
    id: str
    source: str = ""

    def __post_init__(self) -> None:
        check_text("id", self.id)
        for field in ("response", "prefill"):
            if getattr(self, field) != "":
                check_text(field, getattr(self, field))
        _set_messages(self)


def _set_messages(record: Triple | Request) -> None:
    """Set both `messages` and `prompt` from the one given."""
    if record.messages == ():
        prompt = check_text("prompt", record.prompt)
        messages: tuple[Message, ...] = ({"role": "user", "content": prompt},)
    else:
        messages = check_messages("messages", record.messages)
        if messages[-1]["role"] != "user":
            raise ValueError(
                f"messages: the last message is the {messages[-1]['role']}'s, expected the user's"
            )
        prompt = messages[-1]["content"]
        if record.prompt not in ("", prompt):
            raise ValueError("prompt: differs from the last message, expected only one of the two")
    object.__setattr__(record, "prompt", prompt)
    object.__setattr__(record, "messages", messages)


def texts_of(record: Triple | Dialogue | Request) -> Iterator[tuple[str, str]]:
    """Yield the name of each field that holds text, and the text."""
    single = len(record.messages) == 1
    for index, message in enumerate(record.messages):
        yield "prompt" if single else f"messages[{index}].content", message["content"]
    for field in ("safe", "harmful", "response", "prefill"):
        if text := getattr(record, field, ""):
            yield field, text


def check_weight(field: str, value: Any) -> float:
    """Return `value` as a float if it is a positive number.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is not above 0, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field}: is {type(value).__name__}, expected a number")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{field}: is {value}, expected a number above 0")
    return float(value)


def check_text(field: str, value: Any) -> str:
    """Return `value` if it is text that a tokenizer can read; errors never quote it.

    Raises:
        TypeError: `value` is not a str.
        ValueError: `value` is blank, or holds NUL or a lone surrogate.
    """
    if not isinstance(value, str):
        raise TypeError(f"{field}: is {type(value).__name__}, expected text")
    if not value.strip():
        raise ValueError(f"{field}: is blank, expected text")
    # Most texts are ASCII and need only a search for NUL, which is ten times as fast.
    if (not value.isascii() or "\0" in value) and (unusable := _UNUSABLE.search(value)):
        raise ValueError(
            f"{field}: has U+{ord(unusable[0]):04X} at character {unusable.start()}, "
            "expected text without NUL and lone surrogates"
        )
    return value


def check_messages(field: str, value: Any) -> tuple[Message, ...]:
    """Return copies of the messages in `value`, a list of {"role", "content"}.

    Raises:
        TypeError: `value`, a message or a content has the wrong type.
        ValueError: there is no message, a message has other fields, or a role or text is unusable.
    """
    if not isinstance(value, list | tuple):
        raise TypeError(f"{field}: is {type(value).__name__}, expected a list of messages")
    if not value:
        raise ValueError(f"{field}: is empty, expected at least one message")
    for index, message in enumerate(value):
        name = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise TypeError(f"{name}: is {type(message).__name__}, expected role and content")
        if message.keys() != {"role", "content"}:
            raise ValueError(f"{name}: has {field_names(message)}, expected role and content")
        if message["role"] not in SPEAKERS:
            found = message["role"]
            found = repr(found[:20]) if isinstance(found, str) else type(found).__name__
            raise ValueError(f"{name}.role: is {found}, expected one of {', '.join(SPEAKERS)}")
        check_text(f"{name}.content", message["content"])
    return tuple(dict(message) for message in value)


def is_name(text: str) -> bool:
    """Return True if a key is short enough to be a name: files have texts as keys, too."""
    return len(text) <= 40 and len(text.split()) <= 4


def field_names(names: Iterable[Any]) -> str:
    """Format arbitrary names for an error: a few of them, on one line, and no texts."""
    given = (f"{name}" if is_name(f"{name}") else "(a text)" for name in names)
    shown = sorted({name.encode("unicode_escape").decode("ascii") for name in given})
    return ", ".join(shown[:12] + ["..."] * (len(shown) > 12)) or "none"


def speaker_name(speaker: Any) -> str:
    """Format a turn's speaker for an error: a short name, or the type of what may be a text."""
    if isinstance(speaker, str):
        return repr(speaker) if _NAME.fullmatch(speaker) else "text"
    return type(speaker).__name__


class Named(Protocol):
    """An object with an id."""

    @property
    def id(self) -> str: ...


@contextmanager
def naming(record: Named) -> Iterator[None]:
    """Prefix a ValueError raised inside with the record's id."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{record.id}: {error}") from error
