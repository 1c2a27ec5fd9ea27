"""What one training example is, before any tokenizer: a triple or a dialogue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
ROLES = ("system", "user", "assistant")

_UNUSABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Triple:
    """One safety example: a prompt, a safe response and a harmful response.

    The prompt is one user message, `prompt`, or a conversation, `messages`, whose last message is
    the user's. Whichever is given, both are set afterwards: `messages` is a tuple, and `prompt` the
    text of its last message.

    Args:
        prompt: text of a single user message.
        messages: {"role", "content"} each, with roles system, user and assistant.
        safe: the response to learn.
        harmful: the response to learn to break off.
        id: names the example in errors, and seeds what is drawn for it; no other example of a run
            has it.
        source: where it comes from.

    Raises:
        TypeError: a field is not of its type.
        ValueError: a text is blank or holds NUL or a lone surrogate, a role is unknown, the last
            message is not the user's, or `prompt` and `messages` disagree.

    Source: arXiv 2407.09121, section 3.1 (q, r and r-hat).
    """

    prompt: str = ""
    messages: Sequence[Message] = ()
    safe: str
    harmful: str
    id: str
    source: str = ""

    def __post_init__(self) -> None:
        check_text("id", self.id)
        check_text("safe", self.safe)
        check_text("harmful", self.harmful)
        if self.messages == ():
            prompt = check_text("prompt", self.prompt)
            messages: tuple[Message, ...] = ({"role": "user", "content": prompt},)
        else:
            messages = check_messages("messages", self.messages)
            if messages[-1]["role"] != "user":
                raise ValueError(
                    f"messages: the last is the {messages[-1]['role']}'s, expected the user's"
                )
            prompt = messages[-1]["content"]
            if self.prompt not in ("", prompt):
                raise ValueError("prompt: differs from the last of messages, expected one of both")
        object.__setattr__(self, "prompt", prompt)
        object.__setattr__(self, "messages", messages)


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """One helpful example: a conversation whose assistant messages are all learnt.

    Args:
        messages: {"role", "content"} each, with roles system, user and assistant; the last is the
            assistant's, the first is not. A tuple afterwards.
        id: names the example in errors; no other example of a run has it.
        source: where it comes from.

    Raises:
        TypeError: a field is not of its type.
        ValueError: a text is blank or holds NUL or a lone surrogate, a role is unknown, or the
            assistant speaks first or not last.
    """

    messages: Sequence[Message]
    id: str
    source: str = ""

    def __post_init__(self) -> None:
        check_text("id", self.id)
        messages = check_messages("messages", self.messages)
        if messages[0]["role"] == "assistant":
            raise ValueError("messages: the first is the assistant's, expected something to answer")
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"messages: the last is the {messages[-1]['role']}'s, expected the assistant's"
            )
        object.__setattr__(self, "messages", messages)


Record = Triple | Dialogue


def check_text(field: str, value: Any) -> str:
    """Returns `value`, which must be text that a tokenizer can read; errors never quote it.

    Raises:
        TypeError: `value` is no str.
        ValueError: `value` is blank, or holds NUL or a lone surrogate.
    """
    if not isinstance(value, str):
        raise TypeError(f"{field}: is {type(value).__name__}, expected text")
    if not value.strip():
        raise ValueError(f"{field}: is blank, expected text")
    if unusable := _UNUSABLE.search(value):
        raise ValueError(
            f"{field}: has U+{ord(unusable[0]):04X} at character {unusable.start()}, "
            "expected text without NUL and lone surrogates"
        )
    return value


def check_messages(field: str, value: Any) -> tuple[Message, ...]:
    """Returns copies of the messages in `value`, which must be a list of {"role", "content"}.

    Raises:
        TypeError: `value`, a message or a content is not of its type.
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
            found = ", ".join(sorted(map(str, message))) or "nothing"
            raise ValueError(f"{name}: has {found}, expected role and content")
        if message["role"] not in ROLES:
            raise ValueError(
                f"{name}.role: is {message['role']!r}, expected one of {', '.join(ROLES)}"
            )
        check_text(f"{name}.content", message["content"])
    return tuple(dict(message) for message in value)


def distinct(placed: Iterable[tuple[str, Record]]) -> Iterator[Record]:
    """The records as they come, each given with the place that it is from.

    Raises:
        ValueError: two have one id, and would be cut at the same places; names both.
    """
    places: dict[str, str] = {}
    for place, record in placed:
        if record.id in places:
            raise ValueError(
                f"{place}: id: {record.id!r} is that of {places[record.id]} too, expected one of "
                "its own"
            )
        places[record.id] = place
        yield record


@contextmanager
def naming(record: Record) -> Iterator[None]:
    """Puts the record's id before the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{record.id}: {error}") from error
