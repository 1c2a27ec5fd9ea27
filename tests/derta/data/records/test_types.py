"""Records are checked at construction, from memory or from files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from derta.data import Dialogue, Triple

ASK = {"role": "user", "content": "How?"}
SAY = {"role": "assistant", "content": "So."}


def test_a_prompt_is_one_user_message() -> None:
    triple = Triple(prompt="How?", safe="Sorry.", harmful="Sure.", id="1")
    assert triple.messages == (ASK,)
    assert triple == Triple(messages=[ASK], safe="Sorry.", harmful="Sure.", id="1")
    assert replace(triple, safe="No.").messages == (ASK,)


def test_a_record_does_not_change_with_its_inputs() -> None:
    messages = [dict(ASK), dict(SAY)]
    dialogue = Dialogue(messages=messages, id="1")
    messages[1]["content"] = "Otherwise."
    assert dialogue.messages == (ASK, SAY)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"safe": ""}, ValueError, "^safe: is blank, expected text"),
        ({"harmful": " \n"}, ValueError, "^harmful: is blank, expected text"),
        ({"prompt": 3}, TypeError, "^prompt: is int, expected text"),
        ({"id": None}, TypeError, "^id: is NoneType, expected text"),
        ({"prompt": "a\0"}, ValueError, r"^prompt: has U\+0000 at character 1, expected text w"),
        ({"safe": "ab\udc80"}, ValueError, r"^safe: has U\+DC80 at character 2"),
        ({"messages": []}, ValueError, "^messages: is empty, expected at least one message"),
        ({"messages": "How?"}, TypeError, "^messages: is str, expected a list of messages"),
        ({"messages": ["How?"]}, TypeError, r"^messages\[0\]: is str, expected role and content"),
        (
            {"messages": [ASK, SAY]},
            ValueError,
            "the last message is the assistant's, expected the user's",
        ),
        ({"messages": [SAY, {**ASK, "content": "Why?"}]}, ValueError, "^prompt: differs from the"),
        (
            {"messages": [{"role": "user"}]},
            ValueError,
            r"^messages\[0\]: has role, expected role and content",
        ),
        (
            {"messages": [{**ASK, "name": "x"}]},
            ValueError,
            r"^messages\[0\]: has content, name, role, expected role and content",
        ),
        (
            {"messages": [{**ASK, "role": "bot"}]},
            ValueError,
            r"^messages\[0\].role: is 'bot', expected one of system, user, assistant",
        ),
        (
            {"messages": [{**ASK, "content": ["a"]}]},
            TypeError,
            r"^messages\[0\].content: is list, expected text",
        ),
    ],
)
def test_an_unusable_triple_is_refused(changes: dict, error: type[Exception], message: str) -> None:
    fields = {"prompt": "How?", "safe": "Sorry.", "harmful": "Sure.", "id": "1", **changes}
    with pytest.raises(error, match=message):
        Triple(**fields)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([ASK], "^messages: the last message is the user's, expected the assistant's"),
        ([SAY], "^messages: the first message is the assistant's, expected another role"),
    ],
)
def test_a_dialogue_must_answer_a_user(messages: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dialogue(messages=messages, id="1")


def test_derta_data_imports_no_slow_package() -> None:
    heavy = {"transformers", "peft", "datasets", "pyarrow"}
    code = f"import sys, derta.data; print({heavy} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[4],
    )
    assert done.stdout.strip() == "set()"
