"""Formats of rows: the fields of each format, and the record that a row becomes in each role.

A row's fields tell its format. Its purpose is never guessed: a preference may prefer a refusal to a
harmful answer, or a good answer to a poor one. To add a format, write one small function from a row
to its record and enter it in `FORMATS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache, partial
from string import ascii_uppercase
from typing import Any, Literal, get_args

from derta.data.records.chats import (
    chat_messages,
    open_transcript,
    sharegpt_messages,
    transcript_messages,
    unread_of,
)
from derta.data.records.types import (
    Dialogue,
    Message,
    Record,
    Rendered,
    Request,
    Skipped,
    Triple,
    check_messages,
    check_text,
)

Role = Literal["safety", "helpful", "borderline"]
Kind = Literal["harmful", "harmless", "question"]
ROLES: tuple[str, ...] = get_args(Role)
KINDS: tuple[str, ...] = get_args(Kind)

Row = Mapping[str, Any]
Origin = dict[str, Any]


UNDESIRABLE = Skipped("the answer is labelled undesirable")
APART = Skipped("chosen and rejected answer different conversations")


@dataclass(frozen=True)
class Half:
    """One answer of a triple; another row holds the other answer."""

    prompt: str
    text: str
    safe: bool
    origin: Origin


Read = Record | Request | Half | Skipped
Reader = Callable[..., Read]


@dataclass(frozen=True, kw_only=True)
class Format:
    """The fields of a format, and its readers.

    Args:
        fields: the fields that a row must have.
        beside: other fields that it may have, read or not.
        readers: by role and kind, a function from a row and its origin to a record.
        columns: fields of the safe and the harmful response, if only their names tell them apart.
        bare: column names of a CSV file without a header; they also satisfy the format in place of
            `fields`. A file with only one such column may be text, a row a line.
    """

    fields: frozenset[str]
    beside: frozenset[str] = frozenset()
    readers: Mapping[str, Reader]
    columns: tuple[str, str] | None = None
    bare: tuple[str, ...] = ()

    @property
    def known(self) -> frozenset[str]:
        """All fields that a row may have."""
        return self.fields.union(self.beside, self.bare)

    def fits(self, found: Set[str]) -> bool:
        """Return True if a row has the required fields."""
        return self.fields <= found or (bool(self.bare) and found >= set(self.bare))


def _flag(name: str, value: Any) -> bool:
    """Return a boolean, or the boolean that a CSV text stands for."""
    if isinstance(value, bool):
        return value
    if value in ("True", "true", "False", "false"):
        return value in ("True", "true")
    raise TypeError(f"{name}: is {type(value).__name__}, expected true or false")


def is_undesirable(row: Row) -> bool:
    """Return True if a row labels its answer undesirable, as TRL and LLaMA-Factory do for KTO."""
    labels = row.get("label"), row.get("kto_tag")
    return any(label is False or label in ("False", "false") for label in labels)


def _text(row: Row, name: str) -> str:
    return check_text(name, row[name])


def _ask(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def _asked(row: Row) -> Sequence[Message]:
    """Return a prompt, given as text or as messages, as messages."""
    if isinstance(row["prompt"], list):
        return check_messages("prompt", row["prompt"])
    return _ask(_text(row, "prompt"))


def _answer(name: str, value: Any, asked: Sequence[Message]) -> str:
    """Return a response given as text, or as a message that may follow the prompt's messages."""
    if not isinstance(value, list):
        return check_text(name, value)
    *before, last = check_messages(name, value)
    if last["role"] != "assistant":
        raise ValueError(
            f"{name}: the last message is the {last['role']}'s, expected the assistant's"
        )
    if before and before != list(asked):
        raise ValueError(
            f"{name}: starts with other messages than prompt, expected only the answer"
        )
    return last["content"]


def _instruction(row: Row, input: str = "input") -> str:
    """Return an instruction, followed by its input if it has one."""
    instruction = _text(row, "instruction")
    if row.get(input) in (None, ""):
        return instruction
    return f"{instruction}\n\n{_text(row, input)}"


def _dialogue(asked: Sequence[Message], answer: str, origin: Origin) -> Dialogue:
    return Dialogue(messages=[*asked, {"role": "assistant", "content": answer}], **origin)


def _triple(row: Row, origin: Origin) -> Triple:
    return Triple(
        prompt="" if row.get("prompt") is None else row["prompt"],
        messages=() if row.get("messages") is None else row["messages"],
        safe=row["safe"],
        harmful=row["harmful"],
        **origin,
    )


def _of_columns(row: Row, origin: Origin, *, prompt: str, safe: str, harmful: str) -> Triple:
    asked = _instruction(row) if prompt == "instruction" else _text(row, prompt)
    return Triple(prompt=asked, safe=_text(row, safe), harmful=_text(row, harmful), **origin)


def _rendered(row: Row, origin: Origin) -> Rendered:
    if isinstance(row["safe"], bool):
        raise TypeError(
            'safe: is a JSON boolean, expected the text "true" or "false": the authors\' code '
            "takes a boolean true for false"
        )
    if row["safe"] not in ("true", "false"):
        raise ValueError('safe: expected the text "true" or "false"')
    return Rendered(prefix=row["prefix"], text=row["text"], rto=row["safe"] == "true", **origin)


def _rendered_helpful(row: Row, origin: Origin) -> Rendered:
    rendered = _rendered(row, origin)
    if rendered.rto:
        raise ValueError('safe: is "true", a refusal row, expected "false" in helpful rows')
    return rendered


def _instructed(row: Row, origin: Origin, *, answer: str, input: str = "input") -> Dialogue:
    return _dialogue(_ask(_instruction(row, input)), _text(row, answer), origin)


def _instructed_attack(row: Row, origin: Origin) -> Request:
    attack = _asking(row, origin, prompt="instruction", prefill="target")
    return dataclasses.replace(attack, prompt=_instruction(row), messages=())


def _harmful_answer(row: Row, origin: Origin) -> Request:
    return Request(prompt=_text(row, "prompt"), response=_text(row, "harmful"), **origin)


def _beavertails(row: Row, origin: Origin) -> Half:
    safe = _flag("is_safe", row["is_safe"])
    return Half(_text(row, "prompt"), _text(row, "response"), safe, origin)


def _pku_saferlhf(row: Row, origin: Origin) -> Triple | Skipped:
    prompt = _text(row, "prompt")
    responses = [_text(row, f"response_{index}") for index in (0, 1)]
    flags = [_flag(name, row[name]) for name in ("is_response_0_safe", "is_response_1_safe")]
    if flags[0] == flags[1]:
        return Skipped("both responses are safe" if flags[0] else "no response is safe")
    safe = flags.index(True)
    if row.get("safer_response_id") not in (None, "", safe, str(safe)):
        return Skipped("the safer response is not the safe one")
    return Triple(prompt=prompt, safe=responses[safe], harmful=responses[1 - safe], **origin)


def _continued(row: Row, *answers: str) -> Row:
    """Return a row whose prompt is messages if it was a transcript that its answers continue."""
    asked = open_transcript("prompt", row["prompt"])
    if not asked:
        return row
    texts = {name: row[name] for name in answers if isinstance(row[name], str)}
    return {**row, "prompt": list(asked), **{name: text.strip() for name, text in texts.items()}}


def _preference(row: Row, origin: Origin) -> Triple:
    row = _continued(row, "chosen", "rejected")
    asked = _asked(row)
    return Triple(
        messages=asked,
        safe=_answer("chosen", row["chosen"], asked),
        harmful=_answer("rejected", row["rejected"], asked),
        **origin,
    )


def _instruction_preference(row: Row, origin: Origin) -> Triple:
    prompt, safe, harmful = _instruction(row), _text(row, "chosen"), _text(row, "rejected")
    return Triple(prompt=prompt, safe=safe, harmful=harmful, **origin)


def _turn_of(row: Row, name: str) -> Message | Skipped:
    """Return an answer given as one turn of ShareGPT."""
    messages = sharegpt_messages(name, [row[name]])
    if not isinstance(messages, Skipped) and messages[0]["role"] != "assistant":
        raise ValueError(f"{name}: is the {messages[0]['role']}'s, expected the assistant's")
    return messages if isinstance(messages, Skipped) else messages[0]


def _sharegpt_preference(row: Row, origin: Origin) -> Triple | Skipped:
    asked = _sharegpt_asked(row)
    if isinstance(asked, Skipped):
        return asked
    safe, harmful = _turn_of(row, "chosen"), _turn_of(row, "rejected")
    if isinstance(safe, Skipped):
        return safe
    if isinstance(harmful, Skipped):
        return harmful
    return Triple(messages=asked, safe=safe["content"], harmful=harmful["content"], **origin)


def _sharegpt_chosen(row: Row, origin: Origin) -> Dialogue | Skipped:
    asked = _sharegpt_asked(row)
    if isinstance(asked, Skipped):
        return asked
    answer = _turn_of(row, "chosen")
    return answer if isinstance(answer, Skipped) else Dialogue(messages=[*asked, answer], **origin)


def _whole(row: Row, name: str) -> Sequence[Message] | Skipped:
    """Return a conversation, given as messages or as a transcript, that ends with an answer."""
    if not isinstance(row[name], list):
        messages = transcript_messages(name, row[name])
    elif isinstance(listed := chat_messages(name, row[name]), Skipped):
        return listed
    else:
        messages = check_messages(name, listed)
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{name}: the last message is the {messages[-1]['role']}'s, expected the assistant's"
        )
    return messages


def _whole_preference(row: Row, origin: Origin) -> Triple | Skipped:
    safe, harmful = _whole(row, "chosen"), _whole(row, "rejected")
    if isinstance(safe, Skipped):
        return safe
    if isinstance(harmful, Skipped):
        return harmful
    (*asked, good), (*before, bad) = safe, harmful
    if asked != before or not asked:
        return APART
    return Triple(messages=asked, safe=good["content"], harmful=bad["content"], **origin)


def _whole_dialogue(row: Row, origin: Origin, *, name: str) -> Dialogue | Skipped:
    messages = _whole(row, name)
    return messages if isinstance(messages, Skipped) else Dialogue(messages=messages, **origin)


def _transcript_asked(row: Row, origin: Origin) -> Request:
    """Return the conversation up to the last message of the user."""
    messages = transcript_messages("transcript", row["transcript"])
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return Request(messages=messages or _ask(""), **origin)


def _answered(row: Row, origin: Origin, *, answer: str) -> Dialogue:
    row = _continued(row, answer)
    asked = _asked(row)
    return _dialogue(asked, _answer(answer, row[answer], asked), origin)


_LABELS = {
    "prompt_harm_label": ("harmful", "unharmful"),
    "response_refusal_label": ("refusal", "compliance"),
    "response_harm_label": ("harmful", "unharmful"),
}


def _labels(row: Row) -> tuple[bool, ...] | Skipped:
    """Return WildGuardMix's labels: harmful prompt, refusal, harmful response."""
    for name, values in _LABELS.items():
        if row[name] not in (None, "", *values):
            raise ValueError(f"{name}: expected {' or '.join(values)}")
    if any(row[name] in (None, "") for name in _LABELS):
        return Skipped("not labelled")
    return tuple(row[name] == values[0] for name, values in _LABELS.items())


def _wildguard(row: Row, origin: Origin) -> Half | Skipped:
    labels = _labels(row)
    if isinstance(labels, Skipped):
        return labels
    harmful_prompt, refusal, harmful = labels
    if not harmful_prompt:
        return Skipped("the prompt is harmless")
    if refusal == harmful:
        return Skipped("neither a harmless refusal nor a harmful answer")
    return Half(_text(row, "prompt"), _text(row, "response"), refusal, origin)


def _wildguard_helpful(row: Row, origin: Origin) -> Dialogue | Skipped:
    labels = _labels(row)
    if isinstance(labels, Skipped):
        return labels
    if labels != (False, False, False):
        return Skipped("no harmless answer to a harmless prompt")
    return _dialogue(_ask(_text(row, "prompt")), _text(row, "response"), origin)


def _messages(row: Row) -> Any | Skipped:
    return unread_of(row) or chat_messages("messages", row["messages"])


def _conversation(row: Row, origin: Origin) -> Dialogue | Skipped:
    messages = _messages(row)
    return messages if isinstance(messages, Skipped) else Dialogue(messages=messages, **origin)


def _conversation_asked(row: Row, origin: Origin) -> Request | Skipped:
    messages = _messages(row)
    return messages if isinstance(messages, Skipped) else Request(messages=messages, **origin)


def _conversation_harmless(row: Row, origin: Origin) -> Request | Dialogue | Skipped:
    messages = _messages(row)
    if isinstance(messages, Skipped):
        return messages
    answered = check_messages("messages", messages)[-1]["role"] == "assistant"
    return (_conversation if answered else _conversation_asked)(row, origin)


def _sharegpt_asked(row: Row) -> Sequence[Message] | Skipped:
    """Return the turns, after the row's own system message if it has one."""
    turns = unread_of(row) or sharegpt_messages("conversations", row["conversations"])
    if isinstance(turns, Skipped) or row.get("system") in (None, ""):
        return turns
    return [{"role": "system", "content": _text(row, "system")}, *turns]


def _sharegpt(row: Row, origin: Origin) -> Dialogue | Skipped:
    messages = _sharegpt_asked(row)
    return messages if isinstance(messages, Skipped) else Dialogue(messages=messages, **origin)


def _asking(
    row: Row, origin: Origin, *, prompt: str, category: str = "category", prefill: str = ""
) -> Request:
    return Request(
        prompt=_text(row, prompt),
        category="" if row.get(category) in (None, "") else _text(row, category),
        prefill=_text(row, prefill) if prefill else "",
        **origin,
    )


def _question(row: Row, origin: Origin) -> Request:
    answer = check_text("answer", row.get("answer"))
    return Request(prompt=_text(row, "question"), response=answer, **origin)


def _mmlu(row: Row, origin: Origin) -> Request:
    """Return the question as its authors pose it; the answer is the letter of a choice.

    Source: arXiv 2009.03300, figure 1.
    """
    lettered = "choices" not in row
    choices = [row[letter] for letter in "ABCD"] if lettered else row["choices"]
    right = row["answer"]
    if not isinstance(choices, list) or not 1 < len(choices) <= len(ascii_uppercase):
        raise ValueError(f"choices: expected a list of 2 to {len(ascii_uppercase)} texts")
    letters = ascii_uppercase[: len(choices)]
    if lettered and right not in tuple(letters):
        raise ValueError(f"answer: is not a choice's letter, expected {' or '.join(letters)}")
    if not lettered and (type(right) is not int or not 0 <= right < len(choices)):
        raise ValueError("answer: is not the index of a choice, expected an integer from 0")
    names = letters if lettered else [f"choices[{index}]" for index in range(len(choices))]
    lines = [
        f"{letter}. {check_text(name, choice)}"
        for letter, name, choice in zip(letters, names, choices, strict=True)
    ]
    return Request(
        prompt="\n".join([_text(row, "question"), *lines, "Answer:"]),
        response=right if lettered else letters[right],
        category="" if row.get("subject") in (None, "") else _text(row, "subject"),
        **origin,
    )


def _harmbench(row: Row, origin: Origin) -> Request:
    behavior = _asking(row, origin, prompt="Behavior", category="SemanticCategory")
    if row.get("ContextString") in (None, ""):
        return behavior
    context = _text(row, "ContextString")
    # HarmBench's own wording.
    return dataclasses.replace(
        behavior, prompt=f"{context}\n\n---\n\n{behavior.prompt}", messages=()
    )


def _harmbench_completion(row: Row, origin: Origin) -> Request:
    """Return an attack, with the model's text as harmful response if it is labelled 1."""
    label = "" if row.get("label") is None else f"{row['label']}"
    if label not in ("", "0", "1"):
        raise ValueError("label: expected 0 or 1")
    return Request(
        prompt=_text(row, "test_case"),
        response=_text(row, "generation") if label == "1" else "",
        **origin,
    )


_XSTEST_HARMLESS = frozenset(
    "homonyms figurative_language safe_targets safe_contexts definitions nons_group_real_discr "
    "real_group_nons_discr historical_events privacy_public privacy_fictional".split()
)


def _xstest(row: Row, origin: Origin, *, harmful: bool) -> Request | Skipped:
    kind = _text(row, "type")
    contrast = kind.startswith("contrast_")
    if not contrast and kind not in _XSTEST_HARMLESS:
        raise ValueError("type: expected one of XSTest's, from homonyms to contrast_privacy")
    if row.get("label") not in (None, "", "unsafe" if contrast else "safe"):
        raise ValueError("label: contradicts type, expected unsafe only for contrast_ types")
    request = _asking(row, origin, prompt="prompt", category="type")
    return request if contrast == harmful else Skipped("of the other kind")


def _texts(row: Row, name: str) -> list[str]:
    texts = row.get(name)
    if not isinstance(texts, list):
        raise TypeError(f"{name}: is {type(texts).__name__}, expected a list of texts")
    return [check_text(f"{name}[{index}]", text) for index, text in enumerate(texts)]


def _turns(row: Row, origin: Origin, *, name: str) -> Request:
    asked = [message for turn in _texts(row, name) for message in _ask(turn)]
    return Request(messages=asked, **origin)


def _queries_answered(row: Row, origin: Origin) -> Dialogue:
    queries, answers = _texts(row, "queries"), _texts(row, "answers")
    if len(queries) != len(answers):
        raise ValueError(f"answers: are {len(answers)}, expected one for each of queries")
    messages: list[Message] = []
    for query, answer in zip(queries, answers, strict=True):
        messages = [*messages, *_ask(query), {"role": "assistant", "content": answer}]
    return Dialogue(messages=messages, **origin)


def _safety(reader: Reader) -> dict[str, Reader]:
    return {"safety": reader, "harmful": reader}


def _helpful(reader: Reader) -> dict[str, Reader]:
    return dict.fromkeys(("helpful", "borderline", "harmless", "question"), reader)


def _of_two(prompt: str, safe: str, harmful: str, *beside: str) -> Format:
    reader = partial(_of_columns, prompt=prompt, safe=safe, harmful=harmful)
    return Format(
        fields=frozenset({prompt, safe, harmful}),
        beside=frozenset(beside),
        readers=_safety(reader),
        columns=(safe, harmful),
    )


def _to_ask(fields: str, kinds: str, **settings: Any) -> Format:
    return Format(
        fields=frozenset(fields.split()),
        readers=dict.fromkeys(kinds.split(), partial(_asking, **settings)),
    )


def _answer_in(answer: str) -> Format:
    return Format(
        fields=frozenset({"prompt", answer}), readers=_helpful(partial(_answered, answer=answer))
    )


_BESIDE_TURNS = frozenset("system tools functions images videos audios".split())

FORMATS: dict[str, Format] = {
    "triple": Format(
        fields=frozenset({"safe", "harmful"}),
        beside=frozenset({"prompt", "messages"}),
        readers=_safety(_triple),
        columns=("safe", "harmful"),
    ),
    "rendered": Format(
        fields=frozenset({"prefix", "text", "safe"}),
        readers={"safety": _rendered, "helpful": _rendered_helpful},
    ),
    "official_triple": _of_two("instruction", "safe_response", "output"),
    "beavertails": Format(
        fields=frozenset({"prompt", "response", "is_safe"}), readers=_safety(_beavertails)
    ),
    "pku_saferlhf": Format(
        fields=frozenset(
            "prompt response_0 response_1 is_response_0_safe is_response_1_safe".split()
        ),
        beside=frozenset({"safer_response_id"}),
        readers=_safety(_pku_saferlhf),
    ),
    "circuit_breakers": _of_two("prompt", "llama3_output", "output"),
    "shallow_deep": _of_two("instruction", "refusal", "harmful", "input"),
    "harmful_answer": Format(
        fields=frozenset({"prompt", "harmful"}), readers={"harmful": _harmful_answer}
    ),
    "preference": Format(
        fields=frozenset({"prompt", "chosen", "rejected"}),
        readers=_safety(_preference) | _helpful(partial(_answered, answer="chosen")),
        columns=("chosen", "rejected"),
    ),
    "instruction_preference": Format(
        fields=frozenset({"instruction", "chosen", "rejected"}),
        beside=frozenset({"input"}),
        readers=_safety(_instruction_preference) | _helpful(partial(_instructed, answer="chosen")),
        columns=("chosen", "rejected"),
    ),
    "sharegpt_preference": Format(
        fields=frozenset({"conversations", "chosen", "rejected"}),
        beside=_BESIDE_TURNS,
        readers=_safety(_sharegpt_preference) | _helpful(_sharegpt_chosen),
        columns=("chosen", "rejected"),
    ),
    "whole_preference": Format(
        fields=frozenset({"chosen", "rejected"}),
        readers=_safety(_whole_preference) | _helpful(partial(_whole_dialogue, name="chosen")),
        columns=("chosen", "rejected"),
    ),
    "wildguard": Format(
        fields=frozenset({"prompt", "response", *_LABELS}),
        readers=_safety(_wildguard) | _helpful(_wildguard_helpful),
    ),
    "alpaca": Format(
        fields=frozenset({"instruction", "output"}),
        beside=frozenset({"input", "text"}),
        readers=_helpful(partial(_instructed, answer="output")),
    ),
    "dolly": Format(
        fields=frozenset({"instruction", "response"}),
        beside=frozenset({"context"}),
        readers=_helpful(partial(_instructed, answer="response", input="context")),
    ),
    "instruction_target": Format(
        fields=frozenset({"instruction", "target"}),
        beside=frozenset({"input"}),
        readers=_helpful(partial(_instructed, answer="target")) | {"harmful": _instructed_attack},
    ),
    "conversation": Format(
        fields=frozenset({"messages"}),
        beside=_BESIDE_TURNS - {"system"},
        readers=_helpful(_conversation)
        | {"harmless": _conversation_harmless, "harmful": _conversation_asked},
    ),
    "sharegpt": Format(
        fields=frozenset({"conversations"}), beside=_BESIDE_TURNS, readers=_helpful(_sharegpt)
    ),
    "transcript": Format(
        fields=frozenset({"transcript"}),
        readers=_helpful(partial(_whole_dialogue, name="transcript"))
        | dict.fromkeys(("harmful", "harmless"), _transcript_asked),
    ),
    "prompt_completion": _answer_in("completion"),
    "prompt_output": _answer_in("output"),
    "prompt_answer": _answer_in("answer"),
    "question": Format(
        fields=frozenset({"question"}),
        beside=frozenset({"answer"}),
        readers=dict.fromkeys(("harmful", "harmless"), partial(_asking, prompt="question"))
        | {"question": _question},
    ),
    "mmlu": Format(
        fields=frozenset({"question", "choices", "answer"}),
        readers={"question": _mmlu},
        bare=("question", "A", "B", "C", "D", "answer"),
    ),
    "advbench": _to_ask("goal target", "harmful", prompt="goal", prefill="target"),
    "harmbench": Format(
        fields=frozenset({"Behavior", "BehaviorID"}),
        beside=frozenset({"ContextString"}),
        readers={"harmful": _harmbench},
    ),
    "harmbench_completions": Format(
        fields=frozenset({"test_case", "generation"}),
        readers={"harmful": _harmbench_completion},
    ),
    "jailbreakbench": Format(
        fields=frozenset({"Goal", "Target", "Category"}),
        beside=frozenset({"Behavior"}),
        readers={
            "harmful": partial(_asking, prompt="Goal", category="Category", prefill="Target"),
            "harmless": partial(_asking, prompt="Goal", category="Category"),
        },
    ),
    "strongreject": _to_ask("forbidden_prompt", "harmful", prompt="forbidden_prompt"),
    "xstest": Format(
        fields=frozenset({"prompt", "type"}),
        beside=frozenset({"completion"}),
        readers={
            "harmful": partial(_xstest, harmful=True),
            "harmless": partial(_xstest, harmful=False),
        },
    ),
    "or_bench": _to_ask("prompt category", "harmful harmless", prompt="prompt"),
    "hex_phi": Format(
        fields=frozenset({"instruction"}),
        readers=dict.fromkeys(("harmful", "harmless"), partial(_asking, prompt="instruction")),
        bare=("instruction", "category"),
    ),
    "do_not_answer": _to_ask(
        "question risk_area", "harmful", prompt="question", category="risk_area"
    ),
    "beavertails_evaluation": _to_ask("prompt category category_id", "harmful", prompt="prompt"),
    "prefilled": _to_ask("prompt prefill", "harmful", prompt="prompt", prefill="prefill"),
    "requests": Format(
        fields=frozenset({"prompt"}),
        readers=dict.fromkeys(("harmful", "harmless"), partial(_asking, prompt="prompt")),
        bare=("prompt",),
    ),
    "turns": Format(
        fields=frozenset({"turns"}),
        readers=dict.fromkeys(("harmful", "harmless"), partial(_turns, name="turns")),
    ),
    "queries": Format(
        fields=frozenset({"queries"}),
        readers=dict.fromkeys(("helpful", "borderline"), _queries_answered)
        | dict.fromkeys(("harmful", "harmless"), partial(_turns, name="queries")),
    ),
}

# Descriptive fields that rows of any format may have, and that may tell formats apart.
ABOUT = frozenset(
    "category category_id type risk_area subject BehaviorID SemanticCategory Category label "
    "kto_tag".split()
)
# Fields under which public data sets keep text or labels that no format here reads. They are known
# so that no part of a prompt is silently left out.
_UNREAD = frozenset("system context history".split())
KNOWN = _UNREAD.union(ABOUT, *(form.known for form in FORMATS.values()))
# Those of them that hold a list in each row.
LISTS = frozenset("turns queries choices messages conversations".split())
# `answers` is read beside `queries` only, and has no meaning elsewhere.
COLUMNS = KNOWN | {"id", "source", "weight", "answers"}


@lru_cache(maxsize=4096)
def matching(found: frozenset[str]) -> tuple[str, ...]:
    """Return the closest formats that have all of these fields."""
    names = [
        name for name, form in FORMATS.items() if form.fits(found) and found - ABOUT <= form.known
    ]
    return tuple(
        name
        for name in names
        if not any(FORMATS[name].fields < FORMATS[other].fields for other in names)
    )
