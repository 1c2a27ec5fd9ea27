"""A row's fields tell its format, and the stated role tells its record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from derta.data import (
    FORMATS,
    KINDS,
    ROLES,
    Dialogue,
    Reading,
    Rendered,
    Request,
    Triple,
    read_records,
    read_requests,
)
from derta.data.records.reading import Wanted, read_placed
from public_rows import (
    CONTAINERS,
    FLAT,
    PACKINGS,
    ROWS,
    ask,
    contain,
    harmful,
    helpful,
    prefill,
    safe,
    transcript,
    turn,
)

TRIPLE = Triple(prompt=ask(7), safe=safe(7), harmful=harmful(7), id="x")
DIALOGUE = Dialogue(messages=[turn("user", ask(7)), turn("assistant", helpful(7))], id="x")
BRIEFED = Dialogue(messages=[turn("system", "Be brief."), *DIALOGUE.messages], id="x")
CHOSEN = Dialogue(messages=[turn("user", ask(7)), turn("assistant", safe(7))], id="x")
RTO = Rendered(prefix=f"[INST] {ask(7)} [\\INST]", text=f" {harmful(7)}<|eot|>", rto=True, id="x")
NEXT = dataclasses.replace(RTO, text=f" {helpful(7)}<|eot|>", rto=False)
ASKED = Request(prompt=ask(7), id="x")
ABOUT_FENCES = dataclasses.replace(ASKED, category="fences")
BROKEN = Request(prompt=ask(7), response=harmful(7), id="x")
ANSWERED = Request(prompt=ask(7), response=helpful(7), id="x")


TWICE_ASKED = Request(messages=[turn("user", "How are fences made?"), turn("user", ask(7))], id="x")
TWICE_ANSWERED = Dialogue(
    messages=[
        turn("user", "How are fences made?"),
        turn("assistant", "Of wood."),
        turn("user", ask(7)),
        turn("assistant", helpful(7)),
    ],
    id="x",
)


def helpfully(dialogue: Dialogue) -> dict[str, list[Any]]:
    request = Request(
        messages=dialogue.messages[:-1], response=dialogue.messages[-1]["content"], id="x"
    )
    return {
        "helpful": [dialogue],
        "borderline": [dataclasses.replace(dialogue, borderline=True)],
        "harmless": [request],
        "question": [request],
    }


def safely(*triples: Triple) -> dict[str, list[Any]]:
    return {"safety": list(triples), "harmful": [BROKEN]}


# The record of item 7 in each format, for every role and kind that accepts it.
IS: dict[str, dict[str, list[Any]]] = {
    "triple": safely(TRIPLE),
    "rendered": {"safety": [RTO, NEXT]},
    "official_triple": safely(TRIPLE),
    "beavertails": safely(TRIPLE),
    "pku_saferlhf": safely(TRIPLE),
    "circuit_breakers": safely(TRIPLE),
    "shallow_deep": safely(TRIPLE),
    "preference": safely(TRIPLE) | helpfully(CHOSEN),
    "harmful_answer": {"harmful": [BROKEN]},
    "instruction_preference": safely(TRIPLE) | helpfully(CHOSEN),
    "sharegpt_preference": safely(TRIPLE) | helpfully(CHOSEN),
    "whole_preference": safely(TRIPLE) | helpfully(CHOSEN),
    "wildguard": safely(TRIPLE) | helpfully(DIALOGUE),
    "alpaca": helpfully(DIALOGUE),
    "dolly": helpfully(DIALOGUE),
    "instruction_target": helpfully(DIALOGUE)
    | {"harmful": [dataclasses.replace(ASKED, prefill=helpful(7))]},
    "transcript": helpfully(DIALOGUE) | {"harmful": [ASKED], "harmless": [ASKED]},
    "prompt_output": helpfully(DIALOGUE),
    "prompt_answer": helpfully(DIALOGUE),
    "prefilled": {"harmful": [dataclasses.replace(ASKED, prefill=prefill(7))]},
    "queries": dict.fromkeys(("harmful", "harmless"), [TWICE_ASKED])
    | {
        role: [dataclasses.replace(TWICE_ANSWERED, borderline=role == "borderline")]
        for role in ("helpful", "borderline")
    },
    "conversation": helpfully(DIALOGUE),
    "sharegpt": helpfully(BRIEFED),
    "prompt_completion": helpfully(DIALOGUE),
    "question": {"harmful": [ASKED], "harmless": [ASKED], "question": [ANSWERED]},
    "mmlu": {
        "question": [
            Request(
                prompt=f"{ask(7)}\nA. Water\nB. {helpful(7)}\nC. 0\nAnswer:",
                response="B",
                category="fences",
                id="x",
            )
        ]
    },
    "advbench": {"harmful": [dataclasses.replace(ASKED, prefill=prefill(7))]},
    "harmbench": {
        "harmful": [
            Request(prompt=f"A garden.\n\n---\n\n{ask(7)}", category="fences", id="x"),
        ]
    },
    "harmbench_completions": {"harmful": [BROKEN, ASKED, ASKED]},
    "jailbreakbench": {
        "harmful": [dataclasses.replace(ABOUT_FENCES, prefill=prefill(7))],
        "harmless": [ABOUT_FENCES],
    },
    "strongreject": {"harmful": [ABOUT_FENCES]},
    "xstest": {
        "harmful": [dataclasses.replace(ASKED, category="contrast_homonyms")],
        "harmless": [dataclasses.replace(ASKED, category="homonyms")],
    },
    "or_bench": {"harmful": [ABOUT_FENCES], "harmless": [ABOUT_FENCES]},
    "hex_phi": {"harmful": [ABOUT_FENCES], "harmless": [ABOUT_FENCES]},
    "do_not_answer": {"harmful": [ABOUT_FENCES]},
    "beavertails_evaluation": {"harmful": [ABOUT_FENCES]},
    "requests": {"harmful": [ASKED], "harmless": [ASKED]},
    "turns": dict.fromkeys(("harmful", "harmless"), [TWICE_ASKED]),
}
PURPOSES = [(name, purpose) for name, purposes in IS.items() for purpose in purposes]


def read(path: Path, purpose: str, **settings: Any) -> list[Any]:
    if purpose in ROLES:
        return list(read_records(path, role=purpose, **settings))
    return list(read_requests(path, kind=purpose, **settings))


def write(directory: Path, *rows: Any) -> Path:
    path = directory / "rows"
    path.write_bytes(contain(rows, "jsonl"))
    return path


def nameless(records: Iterable[Any]) -> list[Any]:
    return [dataclasses.replace(record, id="x", source="") for record in records]


@pytest.mark.parametrize(("name", "purpose"), PURPOSES)
def test_fields_and_role_decide_the_record(tmp_path: Path, name: str, purpose: str) -> None:
    path = write(tmp_path, *ROWS[name](7))
    assert nameless(read(path, purpose)) == IS[name][purpose]
    assert nameless(read(path, purpose, format=name)) == IS[name][purpose]


def test_every_format_and_role_is_covered() -> None:
    assert FORMATS.keys() == ROWS.keys() == IS.keys()
    read_as = {(name, purpose) for name, form in FORMATS.items() for purpose in form.readers}
    # One of the rows above is a refusal row.
    assert read_as - set(PURPOSES) == {("rendered", "helpful"), ("conversation", "harmful")}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_format_reads_the_same_from_every_container(
    tmp_path: Path, container: str, packing: str
) -> None:
    for name, purposes in IS.items():
        rows = ROWS[name](7)
        if container in FLAT and any(isinstance(v, list | dict) for v in rows[0].values()):
            continue
        path = tmp_path / "rows.dat"
        path.write_bytes(PACKINGS[packing](contain(rows, container)))
        for purpose, expected in purposes.items():
            assert nameless(read(path, purpose)) == expected, (name, purpose)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_in_a_wrong_role_is_refused_with_its_roles(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, *ROWS[name](7))
    for purpose in set(ROLES + KINDS) - FORMATS[name].readers.keys():
        expected = f"rows:1: fields: are those of format {name}, which is for "
        with pytest.raises(ValueError, match=expected):
            read(path, purpose)


def test_an_unknown_role_kind_or_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^role must be one of safety, helpful, borderline, got "):
        read_records(tmp_path, role="harmful")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^kind must be one of harmful, harmless, question, got "):
        read_requests(tmp_path, kind="safety")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^format must be one of triple, rendered, .*, got 'x'"):
        next(read_records(tmp_path, role="safety", format="x"))


def swapped(row: dict[str, Any], one: str, other: str) -> dict[str, Any]:
    return {**row, one: row[other], other: row[one]}


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.columns])
def test_swapped_responses_are_refused_unless_the_format_is_named(
    tmp_path: Path, name: str
) -> None:
    columns = FORMATS[name].columns
    assert columns is not None
    (row,) = ROWS[name](7)
    path = write(tmp_path, swapped(row, *columns))
    expected = f"rows:1: {columns[1]}: opens with a refusal and {columns[0]} holds none, so"
    with pytest.raises(ValueError, match=expected):
        read(path, "safety")
    with pytest.raises(ValueError, match=expected):
        read(path, "harmful")
    (record,) = read(path, "safety", format=name)
    assert (record.safe, record.harmful) == (harmful(7), safe(7))
    same = write(tmp_path, {**row, columns[0]: row[columns[1]]})
    for settings in ({}, {"format": name}):
        with pytest.raises(ValueError, match=f"rows:1: {columns[1]}: equals {columns[0]}"):
            read(same, "safety", **settings)


def test_a_refusal_late_in_a_harmful_response_is_accepted(tmp_path: Path) -> None:
    (row,) = ROWS["triple"](7)
    late = {**row, "safe": "The guild forbids it.", "harmful": "Climb. " * 20 + "Sorry."}
    both = {**row, "harmful": "I'm sorry to hear that. Step one."}
    assert len(read(write(tmp_path, late, both), "safety")) == 2


def messages(field: str, *turns: tuple[str, str]) -> dict[str, Any]:
    return {field: [turn(role, content) for role, content in turns]}


ASKING = ("user", "How?")
TOOLS, MORE = "the conversation has tools", "the conversation holds more than text"
ANSWERED = {"from": "gpt", "value": "So."}
UNLEARNED = "an answer has weight 0, and all answers of a dialogue are learned"
UNDESIRABLE = "the answer is labelled undesirable"
APART = "chosen and rejected answer different conversations"
OTHER = transcript("Why?", harmful(7))


def chat(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [turn("user", ask(7)), *turns, turn("assistant", helpful(7))]}


CHAT = chat()


def sharegpt(speaker: str) -> dict[str, Any]:
    turns = [("human", ask(7)), (speaker, "{}"), ("gpt", helpful(7))]
    return {"conversations": [{"from": who, "value": said} for who, said in turns]}


Count = dict[str, int]
NO_PAIR = "the responses contradict their labels"


def labelled(*answers: tuple[str, bool]) -> list[dict[str, Any]]:
    return [{"prompt": ask(7), "response": text, "is_safe": good} for text, good in answers]


@pytest.mark.parametrize(
    ("purpose", "rows", "count", "skipped"),
    [
        (
            "safety",
            labelled((safe(1), True), (safe(2), True), (harmful(1), False), (safe(3), True)),
            1,
            {"safe without a harmful one": 2},
        ),
        ("safety", labelled((harmful(1), False)), 0, {"harmful without a safe one": 1}),
        ("safety", labelled((harmful(1), False), (harmful(1), True)), 0, {NO_PAIR: 1}),
        ("safety", labelled((safe(1), False), (harmful(1), True)), 0, {NO_PAIR: 1}),
        (
            "harmful",
            [{**row, "is_response_0_safe": True} for row in ROWS["pku_saferlhf"](7)],
            0,
            {"both responses are safe": 1},
        ),
        (
            "safety",
            [{**row, "is_response_1_safe": False} for row in ROWS["pku_saferlhf"](7)],
            0,
            {"no response is safe": 1},
        ),
        (
            "safety",
            [{**row, "safer_response_id": 0} for row in ROWS["pku_saferlhf"](7)],
            0,
            {"the safer response is not the safe one": 1},
        ),
        ("safety", ROWS["wildguard"](7), 1, {"the prompt is harmless": 1, "not labelled": 1}),
        (
            "safety",
            [{**ROWS["wildguard"](7)[0], "response_harm_label": "harmful"}],
            0,
            {"neither a harmless refusal nor a harmful answer": 1},
        ),
        (
            "helpful",
            ROWS["wildguard"](7),
            1,
            {"no harmless answer to a harmless prompt": 2, "not labelled": 1},
        ),
        ("safety", [ROWS["whole_preference"](7)[0] | {"rejected": OTHER}], 0, {APART: 1}),
        ("helpful", [CHAT | {"tools": [{"name": "search"}]}], 0, {TOOLS: 1}),
        ("helpful", [CHAT | {"tools": []}, CHAT | {"tools": None}], 2, {}),
        ("helpful", [chat({"role": "assistant", "tool_calls": [{"id": "x"}]})], 0, {TOOLS: 1}),
        ("helpful", [chat({"role": "tool", "content": "3"})], 0, {TOOLS: 1}),
        ("helpful", [sharegpt("function_call"), sharegpt("observation")], 0, {TOOLS: 2}),
        ("helpful", [CHAT | {"images": ["x.png"]}], 0, {MORE: 1}),
        ("helpful", [ROWS["alpaca"](7)[0] | {"images": [], "tools": ""}], 1, {}),
        (
            "helpful",
            [chat({**turn("assistant", "So."), "refusal": None, "annotations": [], "name": ""})],
            1,
            {},
        ),
        ("helpful", [chat({**turn("assistant", "So."), "reasoning_content": ""})], 1, {}),
        (
            "harmless",
            [chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]})],
            0,
            {MORE: 1},
        ),
        ("helpful", [chat({**turn("assistant", "So."), "weight": 0})], 0, {UNLEARNED: 1}),
        (
            "helpful",
            [
                {
                    "conversations": [
                        {"from": "human", "value": "How?"},
                        ANSWERED | {"weight": weight},
                    ]
                }
                for weight in (0, 1, None)
            ],
            2,
            {UNLEARNED: 1},
        ),
        ("helpful", [CHAT | {"label": False}, CHAT | {"label": True}], 1, {UNDESIRABLE: 1}),
        (
            "helpful",
            [row | {"label": False} for row in ROWS["prompt_completion"](7)],
            0,
            {UNDESIRABLE: 1},
        ),
        (
            "helpful",
            [row | {"label": "False"} for row in ROWS["prompt_completion"](7)],  # from CSV
            0,
            {UNDESIRABLE: 1},
        ),
        ("helpful", [row | {"label": False} for row in ROWS["sharegpt"](7)], 0, {UNDESIRABLE: 1}),
        (
            "borderline",
            [row | {"kto_tag": False} for row in ROWS["alpaca"](7)],
            0,
            {UNDESIRABLE: 1},
        ),
        ("helpful", [row | {"kto_tag": True} for row in ROWS["alpaca"](7)], 1, {}),
        ("harmful", ROWS["xstest"](7), 1, {"of the other kind": 1}),
        ("harmless", ROWS["xstest"](7), 1, {"of the other kind": 1}),
    ],
)
def test_skipped_rows_are_counted_by_reason(
    tmp_path: Path, purpose: str, rows: list[dict[str, Any]], count: int, skipped: Count
) -> None:
    path = write(tmp_path, *rows)
    reading = Reading()
    assert len(read(path, purpose, reading=reading)) == count
    counts = reading.files[str(path)]
    assert (counts.records, counts.bad, dict(counts.skipped)) == (count, 0, skipped)


def test_answers_to_one_prompt_are_joined_in_order_despite_rows_between(tmp_path: Path) -> None:
    rows = [row for n in (1, 2) for row in ROWS["beavertails"](n)]
    harmful_1, safe_1, harmful_2, safe_2 = rows
    again = {**harmful_1, "response": "Step two: harmful 1."}
    calm = {**safe_1, "response": "No: safe 1."}
    path = write(tmp_path, harmful_1, harmful_2, again, safe_2, safe_1, calm)
    assert [(record.id, record.safe, record.harmful) for record in read(path, "safety")] == [
        (f"{path}:4", safe(2), harmful(2)),
        (f"{path}:5", safe(1), harmful(1)),
        (f"{path}:6", "No: safe 1.", "Step two: harmful 1."),
    ]


def test_rendered_rows_are_kept_byte_for_byte(tmp_path: Path) -> None:
    odd = {"prefix": " [INST] \n\u2028q\r\n [\\INST]", "text": "  a \n</s> ", "safe": "false"}
    for role in ("safety", "helpful"):
        (record,) = read(write(tmp_path, odd), role)
        assert (record.prefix, record.text, record.rto) == (odd["prefix"], odd["text"], False)


def test_only_records_have_weights(tmp_path: Path) -> None:
    rows = [{**ROWS["triple"](n)[0], "weight": weight} for n, weight in ((1, 0.5), (2, None))]
    path = write(tmp_path, *rows)
    assert [record.weight for record in read(path, "safety")] == [0.5, 1.0]
    assert len(read(path, "harmful")) == 2
    path.write_bytes(contain([{**rows[0], "weight": 3}], "csv"))
    assert read(path, "safety")[0].weight == 3.0


def test_preferences_and_completions_may_be_messages(tmp_path: Path) -> None:
    prompt = messages("prompt", ("system", "Be brief."), ASKING)
    good, bad = ("assistant", "Sorry."), ("assistant", "Sure.")
    row = {**prompt, **messages("chosen", good), **messages("rejected", bad)}
    whole = {
        "prompt": "How?",
        **messages("chosen", ASKING, good),
        **messages("rejected", ASKING, bad),
    }
    completion = {**prompt, **messages("completion", bad)}
    briefed, plain = read(write(tmp_path, row, whole), "safety")
    assert [one["role"] for one in briefed.messages] == ["system", "user"]
    assert plain.messages == (turn("user", "How?"),)
    assert {(one.safe, one.harmful) for one in (briefed, plain)} == {("Sorry.", "Sure.")}
    (dialogue,) = read(write(tmp_path, completion), "helpful")
    assert [one["role"] for one in dialogue.messages] == ["system", "user", "assistant"]


def test_chat_rows_are_read_by_their_texts_and_roles(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "How "}, {"type": "text", "value": "many?"}]
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief.", "name": None},
            {"role": "user", "content": parts, "name": "ann", "loss_weight": 0.0},
            {"role": "assistant", "content": "Two.", "weight": 1, "tool_calls": None},
        ],
        "tools": "[]",
    }
    (dialogue,) = read(write(tmp_path, row), "helpful")
    expected = [("system", "Be brief."), ("user", "How many?"), ("assistant", "Two.")]
    assert [(one["role"], one["content"]) for one in dialogue.messages] == expected


def test_a_row_of_sharegpt_may_have_a_system_message(tmp_path: Path) -> None:
    turns = ROWS["sharegpt"](7)[0]["conversations"][1:]
    for row in ({"conversations": turns, "system": "Be brief."}, *ROWS["sharegpt"](7)):
        assert nameless(read(write(tmp_path, row), "helpful")) == [BRIEFED]


def test_preferences_may_be_whole_conversations(tmp_path: Path) -> None:
    asked = [turn("user", "Hi."), turn("assistant", "Yes?"), turn("user", ask(7))]
    good, bad = turn("assistant", safe(7)), turn("assistant", harmful(7))
    listed = {"chosen": [*asked, good], "rejected": [*asked, bad]}
    before = "\n\nHuman: Hi.\n\nAssistant: Yes?"
    told = {key: before + transcript(ask(7), text(7)) for key, text in
            (("chosen", safe), ("rejected", harmful))}  # fmt: skip
    expected = Triple(messages=asked, safe=safe(7), harmful=harmful(7), id="x")
    assert nameless(read(write(tmp_path, listed, told), "safety")) == [expected] * 2


def test_answers_may_continue_a_transcript(tmp_path: Path) -> None:
    """Other libraries cut hh-rlhf's conversations so, with the space before an answer."""
    asked = [turn("user", "Hi."), turn("assistant", "Yes?"), turn("user", ask(7))]
    opened = f"\n\nHuman: Hi.\n\nAssistant: Yes?\n\nHuman: {ask(7)}\n\nAssistant:"
    preference = {"prompt": opened, "chosen": f" {safe(7)}", "rejected": f" {harmful(7)}"}
    path = write(tmp_path, preference)
    expected = Triple(messages=asked, safe=safe(7), harmful=harmful(7), id="x")
    assert nameless(read(path, "safety")) == [expected]
    dialogue = Dialogue(messages=[*asked, turn("assistant", safe(7))], id="x")
    assert nameless(read(path, "helpful")) == [dialogue]
    row = {"prompt": opened, "completion": f" {safe(7)}"}
    assert nameless(read(write(tmp_path, row), "helpful")) == [dialogue]
    for plain in ("Why write Human: and Assistant:", f"{opened} No.", "Read.\n\nAssistant:"):
        (one,) = read(write(tmp_path, {"prompt": plain, "completion": " x"}), "helpful")
        assert one.messages == (turn("user", plain), turn("assistant", " x"))


def test_a_transcript_is_a_request_up_to_the_last_question(tmp_path: Path) -> None:
    asked = "\n\nHuman: Hi.\n\nAssistant: Yes?\n\nHuman: How?"
    path = write(tmp_path, {"transcript": asked}, {"transcript": asked + "\n\nAssistant: No."})
    for request in read(path, "harmful"):
        assert [one["content"] for one in request.messages] == ["Hi.", "Yes?", "How?"]
        assert request.response == ""


def test_an_instruction_is_followed_by_its_input(tmp_path: Path) -> None:
    row = {"instruction": "Count them.", "input": "a b", "output": "2", "text": "all of it"}
    dolly = {"instruction": "Count them.", "context": "a b", "response": "2"}
    for dialogue in read(write(tmp_path, row, dolly), "helpful"):
        assert dialogue.messages[0]["content"] == "Count them.\n\na b"
    row = {"instruction": "Count them.", "input": "a b", "target": "Sure: 2"}
    (attack,) = read(write(tmp_path, row), "harmful")
    assert (attack.prompt, attack.prefill) == ("Count them.\n\na b", "Sure: 2")


def test_an_evaluation_conversation_may_lack_its_answer(tmp_path: Path) -> None:
    path = write(tmp_path, messages("messages", ASKING))
    for kind in ("harmful", "harmless"):
        (request,) = read(path, kind)
        assert (request.prompt, request.response) == ("How?", "")
    with pytest.raises(ValueError, match="rows:1: messages: the last message is the user's"):
        read(path, "question")


def test_csv_without_a_header_is_read_if_its_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "category_1.csv"
    path.write_text('"Paint a fence, quickly."\nPaint another.\n')
    with pytest.raises(ValueError, match=r"category_1.csv:1: neither JSON nor CSV with a header"):
        read(path, "harmful")
    first, second = read(path, "harmful", format="hex_phi")
    assert (first.prompt, second.prompt) == ("Paint a fence, quickly.", "Paint another.")
    path.write_text("prompt\nPaint a fence.\n")
    with pytest.raises(
        ValueError, match="csv:2: fields: found prompt, expected those of format hex"
    ):
        read(path, "harmful", format="hex_phi")


LETTERED = {"A": "Water", "B": helpful(7), "C": "0", "D": "Oil", "answer": "B"}
IN_LETTERS = f"{ask(7)}\nA. Water\nB. {helpful(7)}\nC. 0\nD. Oil\nAnswer:"


@pytest.mark.parametrize("header", [True, False])
def test_mmlu_may_have_one_column_for_each_letter(tmp_path: Path, header: bool) -> None:
    path = tmp_path / "rows"
    data = contain([{"question": ask(7), **LETTERED}] * 2, "csv").partition(b"\n")
    path.write_bytes(b"".join(data) if header else data[2])
    expected = [Request(prompt=IN_LETTERS, response="B", id="x")] * 2
    assert nameless(read(path, "question", format="mmlu")) == expected
    if header:
        assert nameless(read(path, "question")) == expected
    else:
        message = "rows:1: neither JSON nor CSV .*, or format: for CSV without a header, such as"
        with pytest.raises(ValueError, match=message):
            read(path, "question")


def test_attack_completions_are_read_from_lists_by_behavior(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    rows = ROWS["harmbench_completions"]
    for indent in (None, 4):
        path.write_text(json.dumps({f"fence_{n}": rows(n) for n in (1, 2)}, indent=indent))
        found = read(path, "harmful")
        assert [one.prompt for one in found] == [ask(1)] * 3 + [ask(2)] * 3
        assert [one.response for one in found] == [harmful(1), "", "", harmful(2), "", ""]


def edit(name: str, **changes: Any) -> dict[str, Any]:
    row = {**ROWS[name](7)[0], **changes}
    return {key: value for key, value in row.items() if value is not ...}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("safety", edit("rendered", safe=True), 'safe: is a JSON boolean, expected the text "true"'),
    ("safety", edit("rendered", safe="True"), 'safe: expected the text "true" or "false"'),
    ("helpful", edit("rendered"), 'safe: is "true", a refusal row, expected "false"'),
    (
        "safety",
        edit("rendered", safe=...),
        "fields: found prefix, text, which is an attack on a model's safety",
    ),
    ("safety", edit("beavertails", is_safe=1), "is_safe: is int, expected true or false"),
    ("safety", edit("beavertails", response=" "), "response: is blank, expected text"),
    ("safety", edit("pku_saferlhf", is_response_1_safe="no"), "is_response_1_safe: is str, exp"),
    ("safety", edit("pku_saferlhf", response_1=3), "response_1: is int, expected text"),
    (
        "safety",
        edit("wildguard", prompt_harm_label="bad"),
        "prompt_harm_label: expected harmful or unharmful",
    ),
    ("safety", edit("preference", chosen=None), "chosen: is NoneType, expected text"),
    (
        "safety",
        edit("preference", **messages("chosen", ASKING)),
        "chosen: the last message is the user's, expected the assistant's",
    ),
    (
        "safety",
        edit("preference", **messages("chosen", ASKING, ("assistant", "No."))),
        "chosen: starts with other messages than prompt, expected only the answer",
    ),
    ("helpful", edit("sharegpt", conversations="x"), "conversations: is str, expected a list"),
    ("helpful", edit("sharegpt", conversations=[3]), r"conversations\[0\]: expected from and v"),
    (
        "helpful",
        edit("sharegpt", conversations=[{"from": "bot", "value": "x"}]),
        r"conversations\[0\].from: is 'bot', expected one of system, human",
    ),
    (
        "helpful",
        edit("sharegpt", conversations=[{"from": ["x"], "value": "x"}]),
        r"conversations\[0\].from: is list, expected one of system, human",
    ),
    (
        "helpful",
        edit("sharegpt", conversations=[{"from": "How do I?", "value": "x"}]),
        r"conversations\[0\].from: is text, expected one of system, human",
    ),
    (
        "safety",
        edit("sharegpt_preference", chosen={"from": "human", "value": "x"}),
        "chosen: is the user's, expected the assistant's",
    ),
    (
        "safety",
        edit("whole_preference", chosen="Sorry."),
        "chosen: expected a transcript that starts with Human:",
    ),
    (
        "safety",
        edit("whole_preference", chosen="Human: How?"),
        "chosen: the last message is the user's, expected the assistant's",
    ),
    (
        "helpful",
        edit("transcript", transcript="\n\nHuman: How?\n\nAssistant: "),
        r"transcript\[1\].content: is blank, expected text",
    ),
    ("helpful", edit("queries", answers=...), "answers: is NoneType, expected a list of texts"),
    ("helpful", edit("queries", answers=["x"]), "answers: are 1, expected one for each of queries"),
    (
        "helpful",
        messages("messages", ASKING, ("critic", "No.")),
        r"messages\[1\].role: is 'critic', expected one of system, user, assistant",
    ),
    (
        "helpful",
        {"messages": [turn("user", "How?"), {**turn("assistant", "So."), "weight": 0.5}]},
        r"messages\[1\].weight: expected 0 or 1",
    ),
    (
        "helpful",
        {"messages": [{"role": "user", "content": ["How?"]}, turn("assistant", "So.")]},
        r"messages\[0\].content\[0\]: expected a part with type and text",
    ),
    ("question", edit("question", answer=...), "answer: is NoneType, expected text"),
    ("question", edit("mmlu", choices="[1, 2]"), "choices: expected a list of 2 to 26 texts"),
    ("question", edit("mmlu", choices=["a", 2]), r"choices\[1\]: is int, expected text"),
    ("question", edit("mmlu", answer=3), "answer: is not the index of a choice, expected an"),
    ("question", edit("mmlu", answer=True), "answer: is not the index of a choice, expected a"),
    (
        "question",
        {"question": ask(7), **LETTERED, "answer": "E"},
        "answer: is not a choice's letter, exp",
    ),
    ("question", {"question": ask(7), **LETTERED, "C": " "}, "C: is blank, expected text"),
    ("harmful", edit("harmbench_completions", label=True), "label: expected 0 or 1"),
    ("harmful", edit("harmbench_completions", test_case=["x.png", "x"]), "test_case: is list, exp"),
    ("harmful", edit("turns", turns="x"), "turns: is str, expected a list of texts"),
    ("harmful", edit("turns", turns=["a", ""]), r"turns\[1\]: is blank, expected text"),
    ("harmless", edit("xstest", type="other"), "type: expected one of XSTest's"),
    ("harmless", edit("xstest", label="unsafe"), "label: contradicts type, expected unsafe only"),
    ("harmful", edit("or_bench", category=[1]), "category: is list, expected text"),
    (
        "harmless",
        edit("xstest", category="fences"),
        "fields: found category, id, prompt, type, which is any of xstest, or_bench, expected for",
    ),
    (
        "harmless",
        edit("xstest", completion="So."),
        "which is any of prompt_completion, xstest, expected format: with one of them",
    ),
    (
        "safety",
        edit("triple", system="Be brief."),
        "found harmful, prompt, safe, system, which is triple with fields of other formats, "
        "expected format: triple, which ignores those$",
    ),
    (
        "safety",
        {**edit("triple"), **edit("preference")},
        "which is triple or preference with fields of other formats, expected format: triple or "
        "preference, which ignores those$",
    ),
    ("safety", edit("triple", weight=0), "weight: is 0, expected a number above 0"),
    ("safety", edit("triple", weight="x"), "weight: is text, expected a number"),
    ("safety", edit("triple", weight=True), "weight: is bool, expected a number"),
    (
        "helpful",
        {"text": "So."},
        "fields: found text, which is no known format, expected one, or columns to read it by, "
        "from here: columns: {prompt: text, answer: FIELD}$",
    ),
]


@pytest.mark.parametrize(("purpose", "row", "message"), BAD)
def test_a_row_invalid_in_its_format_is_refused_by_field(
    tmp_path: Path, purpose: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"rows:1: .*{message}"):
        read(write(tmp_path, row), purpose)


def test_a_named_format_needs_all_its_fields(tmp_path: Path) -> None:
    path = write(tmp_path, edit("rendered", safe=...))
    expected = "rows:1: fields: found prefix, text, expected those of format rendered: prefix, saf"
    with pytest.raises(ValueError, match=expected):
        read(path, "safety", format="rendered")


def test_joined_rows_must_have_equal_weights(tmp_path: Path) -> None:
    first, second = ROWS["beavertails"](7)
    path = write(tmp_path, {**first, "weight": 2}, second)
    with pytest.raises(ValueError, match="rows:2: weight: differs from that of the row"):
        read(path, "safety")


def test_strange_field_names_are_shortened_to_one_line(tmp_path: Path) -> None:
    row = {"\ud800\n" + "x" * 100: 1} | {f"field {index}": 1 for index in range(20)}
    with pytest.raises(ValueError) as error:
        read(write(tmp_path, row), "safety")
    found = str(error.value).split(", which is")[0]
    assert found.isprintable() and found.endswith(", ...") and len(found.split(":")[-1]) < 300


@pytest.mark.parametrize("role", ["safety", "helpful", "harmful"])
def test_texts_that_are_keys_are_shown_by_no_error(tmp_path: Path, role: str) -> None:
    asked = "How do I answer a prompt?"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({asked: "So.", f"{asked} " * 3: "No."}))
    with pytest.raises(ValueError, match=r"found \(a text\), which is") as error:
        read(path, role)
    assert "How do I" not in str(error.value)


def test_one_pass_reports_every_bad_row(tmp_path: Path) -> None:
    good = ROWS["triple"](1)[0]
    path = tmp_path / "rows"
    lines = [json.dumps(good), "{", json.dumps({**good, "safe": ""}), b"\xff", json.dumps(good)]
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    reading = Reading()
    found = list(read_placed([path], Wanted("safety"), reading))
    assert [place for place, _ in found] == [f"{path}:{line}" for line in range(1, 6)]
    assert [isinstance(record, ValueError) for _, record in found] == [False, True, True, True, 0]
    assert str(reading.files[str(path)]) == "2 records, 3 errors, 0 skipped"
