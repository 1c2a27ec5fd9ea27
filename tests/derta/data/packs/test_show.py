"""A pack can be read by people: its parts, and what each row is trained to say."""

from __future__ import annotations

import re

import pytest

from derta.data import (
    Collator,
    Dialogue,
    Encoder,
    PackedBatch,
    Triple,
    pack,
    render_pack,
    resolve_refusal_token,
)
from derta.objectives.unlikelihood import UnlikelihoodObjective

OBJECTIVE = UnlikelihoodObjective(branches=2, rto_keep=0.5, unlikelihood_weight=0.1)


@pytest.fixture(autouse=True)
def colors_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def tokenizer(templated):
    return templated("llama3")


@pytest.fixture
def batch(tokenizer) -> PackedBatch:
    records = [
        Triple(prompt="How?", safe="Sorry, no.", harmful="Sure, \x1b[2J here is how.", id="first"),
        Dialogue(
            messages=[
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": "The fox."},
            ],
            id="second",
        ),
    ]
    encoder = Encoder(tokenizer, max_length=256, max_tokens=256, branches=2, cuts="uniform")
    return Collator(OBJECTIVE)(list(encoder.encode_many(records)))


def test_every_row_with_a_target_is_a_line_that_says_it(batch: PackedBatch, tokenizer) -> None:
    sorry = resolve_refusal_token(tokenizer, "Sorry").id
    lines = render_pack(batch, OBJECTIVE, tokenizer, sorry, color=False).split("\n")
    shown = {int(line[:6]): line for line in lines if re.match(r" *\d+ +\d+  ", line)}
    live = (batch.columns["shift_labels"] != -100) | batch.columns["rto_mask"]
    for row in live[0].nonzero().flatten().tolist():
        token = repr(tokenizer.decode([batch.input_ids[0, row]]))
        line, label = shown[row], int(batch.columns["shift_labels"][0, row])
        assert line[6:].split()[0] == str(int(batch.position_ids[0, row]))
        assert f"  {token}  " in line
        assert ("-> refuse" in line) == bool(batch.columns["rto_mask"][0, row])
        assert (f"-> {tokenizer.decode([label])!r}" in line) if label != -100 else True
        assert ("cut, safe" in line) == (label == sorry)
        unlikely = int(batch.columns["unlikely_labels"][0, row])
        assert ("  not " in line) == (unlikely != -100)
        assert unlikely == -100 or line.endswith(f"  not {tokenizer.decode([unlikely])!r}")
    branches = batch.branch_bounds[0]
    for number, (start, end) in enumerate(branches, start=1):
        assert {shown[row][15:21] for row in range(start, end)} == {f"safe {number}"}
        (cut,) = (row for row, line in shown.items() if f"cut, safe {number} -> 'Sorry'" in line)
        assert batch.position_ids[0, cut] + 1 == batch.position_ids[0, start]
    parts = {line[15:22].strip() for line in shown.values()}
    assert parts == {"prompt", "harmful", "safe 1", "safe 2", "answer"}
    assert "first" in lines and "second" in lines
    # Rows without a target are shown too, in runs.
    assert any("How?<|eot_id|>" in line for line in shown.values())


def test_colour_is_only_for_those_who_want_it(
    batch: PackedBatch, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = render_pack(batch, OBJECTIVE, tokenizer, 0, color=False)
    colored = render_pack(batch, OBJECTIVE, tokenizer, 0)
    assert "\x1b[31m" in colored and "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]+m", "", colored) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert render_pack(batch, OBJECTIVE, tokenizer, 0) == plain


def test_an_empty_pack_can_be_shown(tokenizer) -> None:
    shown = render_pack(pack((), OBJECTIVE), OBJECTIVE, tokenizer, 0, color=False)
    assert shown.startswith("1 tokens, 0 examples")
