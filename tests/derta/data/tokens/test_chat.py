"""Chat templates that are wrong, or do not end: one sentence, within seconds."""

from __future__ import annotations

import copy
import multiprocessing
import re
import time

import pytest

from derta.data import Chat
from derta.data.tokens import trial
from tiny import tiny_tokenizer

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}"
)
WRONG = {
    LOOP: "does not end: one message took more than 1 s",
    DOUBLED: "does not end: one message took more than 128 MiB",
    "{{ 'word' * 10**12 }}": "does not end: one message took more than 128 MiB",
    "{{ 'word' * 10**6 }}": "writes more than 1,000,000 characters for one message",
    "{% if %}": "is not valid Jinja: Expected an expression, got",
    "\n{% for m in messages %}": "is not valid Jinja: Unexpected end of template.",
    "{{ nothing() }}": "rejects the messages: 'nothing' is undefined",
    "{{ raise_exception('no\\nway') }}": "rejects the messages: no way",
    "{{ messages + 1 }}": "rejects the messages: can only concatenate list",
    "{{ 1 / 0 }}": "rejects the messages: division by zero",
    "{{ range(10**9) }}": "rejects the messages: Range too big.",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "rejects the messages: maximum recursion",
    "{{ messages | none }}": "is not valid Jinja: No filter named 'none'",
    "{{ messages['role']['none'] }}": "rejects the messages: ",
}


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork, so no trial"
)
@pytest.mark.promise("A chat template that is wrong or never ends is one sentence within seconds.")
@pytest.mark.parametrize("template", WRONG)
def test_a_template_that_is_wrong_or_never_ends_is_one_sentence(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "MOST_SECONDS", 1)
    monkeypatch.setattr(trial, "MOST_BYTES", 2**27)
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = template
    said = WRONG[template]
    with pytest.raises(ValueError, match=f"^chat_template {re.escape(said)}[^\n]*$"):
        Chat(tokenizer)


def test_a_template_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Chat(tiny_tokenizer())
    monkeypatch.setattr(multiprocessing, "get_context", None)
    Chat(tiny_tokenizer())


def test_a_trial_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "WAIT_S", 0.1)
    with pytest.raises(ValueError, match="^chat_template does not end: one message took more than"):
        trial.check_ends("sleeps", lambda: str(time.sleep(60)))
