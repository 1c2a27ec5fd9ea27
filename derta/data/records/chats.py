"""Messages as other houses write them: OpenAI's chat rows, ShareGPT's turns, transcripts.

What our messages cannot hold is never dropped silently: a conversation that calls tools, or shows
images, is `Skipped` with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from derta.data.records.types import (
    EMPTY,
    SPEAKERS,
    Message,
    Skipped,
    check_messages,
    check_text,
    speaker_name,
)

TOOLS = Skipped("the conversation has tools")
PARTS = Skipped("the conversation holds more than text")
UNLEARNED = Skipped("an answer has weight 0, and all answers of a dialogue are learned")

_CALLS = frozenset({"tool_calls", "function_call", "tool_call_id"})
_CALLERS = frozenset("tool function function_call observation ipython".split())
_OFFERS = ("tools", "functions")
_MEDIA = ("images", "videos", "audios")
_WEIGHTS = ("weight", "loss_weight")
_UNREAD = frozenset((*_OFFERS, *_MEDIA))
_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def unread_of(row: Mapping[str, Any]) -> Skipped | None:
    """Return why a row's conversation cannot be read from its messages alone, if so."""
    if row.keys().isdisjoint(_UNREAD):
        return None
    if any(row.get(name) not in (None, "", "[]", []) for name in _OFFERS):
        return TOOLS
    return PARTS if any(row.get(name) for name in _MEDIA) else None


def chat_messages(field: str, value: Any) -> Any | Skipped:
    """Return OpenAI's messages in our form, not checked yet; what is no list of them as it is.

    Parts of text are joined, `name` is left out, `developer` is the system. An answer may have a
    `weight` of 0 or 1.

    Raises:
        TypeError, ValueError: a part is none, or the weight of an answer is another one.
    """
    if not isinstance(value, list | tuple) or all(map(_is_plain, value)):
        return value
    plain: list[Any] = []
    unlearned = False
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            return value
        given = {
            key: one
            for key, one in message.items()
            if key in ("role", "content") or one not in EMPTY
        }
        role, content = given.get("role"), given.get("content")
        if given.keys() & _CALLS or (isinstance(role, str) and role in _CALLERS):
            return TOOLS
        if isinstance(content, list):
            content = _joined(f"{field}[{index}].content", content)
            if isinstance(content, Skipped):
                return content
            given["content"] = content
        if role == "assistant" and not _is_learned(f"{field}[{index}]", given):
            unlearned = True
        given = {key: one for key, one in given.items() if key not in ("name", *_WEIGHTS)}
        plain.append({**given, "role": "system"} if role == "developer" else given)
    return UNLEARNED if unlearned else plain


def _is_plain(message: Any) -> bool:
    """Return True if a message is one of ours already, as most are: copying them takes time."""
    return (
        isinstance(message, dict)
        and len(message) == 2
        and message.get("role") in SPEAKERS
        and isinstance(message.get("content"), str)
    )


def _is_learned(name: str, answer: Mapping[str, Any]) -> bool:
    """Return False if an answer has weight 0."""
    weights = [answer[key] for key in _WEIGHTS if answer.get(key) is not None]
    if any(weight not in (0, 1) for weight in weights):
        raise ValueError(f"{name}.weight: expected 0 or 1")
    return 0 not in weights


def _joined(field: str, parts: Sequence[Any]) -> str | Skipped:
    texts = []
    for index, part in enumerate(parts):
        name = f"{field}[{index}]"
        if not isinstance(part, dict) or "type" not in part:
            raise ValueError(f"{name}: expected a part with type and text")
        if part["type"] != "text":
            return PARTS
        texts.append(check_text(f"{name}.text", part.get("text", part.get("value"))))
    return "".join(texts)


def sharegpt_messages(field: str, turns: Any) -> list[Message] | Skipped:
    """Return ShareGPT's turns, {"from", "value"}, as messages; an answer may have a weight too.

    Raises:
        TypeError: there is no list of turns, or a value is no text.
        ValueError: a turn lacks a field, has an unknown speaker, which the message names, or a
            weight other than 0 and 1.
    """
    if not isinstance(turns, list):
        raise TypeError(f"{field}: is {type(turns).__name__}, expected a list of turns")
    messages = []
    unlearned = False
    for index, turn in enumerate(turns):
        name = f"{field}[{index}]"
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"{name}: expected from and value")
        speaker = turn["from"]
        if isinstance(speaker, str) and speaker in _CALLERS:
            return TOOLS
        if not isinstance(speaker, str) or speaker not in _SHAREGPT:
            raise ValueError(
                f"{name}.from: is {speaker_name(speaker)}, expected one of {', '.join(_SHAREGPT)}"
            )
        content = check_text(f"{name}.value", turn["value"])
        role = _SHAREGPT[speaker]
        if role == "assistant" and not _is_learned(name, turn):
            unlearned = True
        messages.append({"role": role, "content": content})
    return UNLEARNED if unlearned else messages


def transcript_messages(field: str, value: Any) -> tuple[Message, ...]:
    """Return the turns of a text that marks them by "Human:" and "Assistant:" after a blank line.

    Raises:
        TypeError: the value is no text.
        ValueError: it starts otherwise, or a turn is blank.

    Source: arXiv 2204.05862, the files hh-rlhf.
    """
    before, *turns = _TURN.split(check_text(field, value))
    if before.strip() or not turns:
        raise ValueError(f"{field}: expected a transcript that starts with Human:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return check_messages(
        field,
        [
            {"role": roles[speaker], "content": said.strip()}
            for speaker, said in zip(turns[::2], turns[1::2], strict=True)
        ],
    )


def open_transcript(field: str, value: Any) -> tuple[Message, ...]:
    """Return the turns of a transcript that the assistant is to continue; (): it is something else.

    Raises:
        ValueError: a turn is blank.
    """
    if not isinstance(value, str) or not _TURN.match(value):
        return ()
    before, mark, after = value.rpartition("\n\nAssistant:")
    return transcript_messages(field, before) if mark and not after.strip() else ()
