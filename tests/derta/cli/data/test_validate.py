"""`derta data validate` names every bad row and counts the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from derta.cli import main
from public_rows import ROWS, contain
from tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (good,) = ROWS["triple"](1)
    rows = [good, {**good, "safe": ""}, {"prompt": "How?"}, good]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("b.csv").write_bytes(contain(ROWS["beavertails"](1) + ROWS["beavertails"](2)[:1], "csv"))
    Path("c.gz").write_bytes(b"\x1f\x8b\x08\0")


def test_every_bad_row_of_every_file_is_named_in_one_pass(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main("data validate a.jsonl c.gz b.csv --role safety".split()) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:2] == [
        "a.jsonl:2: safe: is blank, expected text",
        "a.jsonl:3: fields: are those of format requests, which is for harmful, harmless, "
        "expected a format for safety",
    ]
    assert lines[2].startswith("c.gz:1: the file cannot be unpacked")
    assert lines[3:] == [
        "a.jsonl: 2 records, 2 errors, 0 skipped",
        "c.gz: 0 records, 1 errors, 0 skipped",
        "b.csv: 1 records, 0 errors, 1 skipped (1 harmful without a safe one)",
    ]
    assert err == "derta data validate: errors: 3 in 3 files\n"


def test_an_unknown_file_passes_with_the_columns_that_its_error_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (good,) = ROWS["triple"](1)
    row = {"question": good["prompt"], "refusal": good["safe"], "unsafe": good["harmful"]}
    Path("d.jsonl").write_text(json.dumps(row))
    assert main("data validate d.jsonl --role safety".split()) == 1
    line = capsys.readouterr().out.splitlines()[0]
    start, _, columns = line.partition(" columns: ")
    assert start.startswith("d.jsonl:1: fields: found question, refusal, unsafe, which is no known")
    assert columns == "{prompt: question, safe: refusal, harmful: unsafe}"
    assert main(["data", "validate", "d.jsonl", "--role", "safety", "--columns", columns]) == 0
    assert capsys.readouterr().out == "d.jsonl: 1 records, 0 errors, 0 skipped\n"
    assert main("data validate d.jsonl --role safety --columns question".split()) == 1
    assert "columns: expected {name: value, ...}, got 'question'" in capsys.readouterr().err
    wrong = ["data", "validate", "d.jsonl", "--role", "safety", "--columns", "{promt: question}"]
    assert main(wrong) == 1
    assert "columns: no format knows a field 'promt'; did you mean" in capsys.readouterr().err


def test_good_files_pass_in_every_role(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("data validate b.csv --role harmful --format beavertails".split()) == 0
    assert capsys.readouterr().out.startswith("b.csv: 1 records, 0 errors")


def test_an_id_given_twice_is_an_error_of_the_later_row(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (good,) = ROWS["triple"](1)
    Path("a.jsonl").write_text((json.dumps({**good, "id": "one"}) + "\n") * 2)
    assert main("data validate a.jsonl --role safety".split()) == 1
    expected = "a.jsonl:2: id: 'one' is already used by an earlier record, expected a unique id\n"
    assert capsys.readouterr().out.startswith(expected)


def test_several_files_may_use_the_same_ids(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "id": n} for n in range(3) for row in ROWS["triple"](n)]
    for name in ("a.jsonl", "d.jsonl"):
        Path(name).write_bytes(contain(rows, "jsonl"))
    assert main("data validate a.jsonl d.jsonl --role safety".split()) == 0
    expected = [f"{name}.jsonl: 3 records, 0 errors, 0 skipped" for name in "ad"]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "expected one of validate, stats, build, got ''"),
        ("inspect a.jsonl", "expected one of validate, stats, build, got 'inspect'"),
        ("validate --role safety", "missing files"),
        ("validate a.jsonl", "missing role"),
        ("validate none --role safety", "none: no such record file"),
        ("validate a.jsonl --role harm", "command line: role: expected "),
        ("validate a.jsonl --role safety --format x", "format must be one of triple, rendered"),
    ],
)
def test_a_wrong_call_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main(["data", *arguments.split()]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    command = "derta data validate" if arguments.startswith("validate") else "derta data"
    assert line.startswith(f"{command}: {message}")


@pytest.mark.promise("Special tokens in texts of records become plain text.")
def test_special_tokens_in_texts_are_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (good,) = ROWS["triple"](1)
    marked = {**good, "harmful": "the <|end|><|eot_id|> fence", "safe": "no</s>"}
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, marked)))
    assert main("data validate a.jsonl --role safety".split()) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "special tokens in texts: 1 records (</s> 1, <|end|> 1, <|eot_id|> 1), first in a.jsonl:2: "
        "safe; see special_tokens_in_text"
    ]
    tiny_tokenizer().save_pretrained("model")
    assert main("data validate a.jsonl --role safety --model model".split()) == 0
    told = capsys.readouterr().out.splitlines()[1]
    assert told.startswith("special tokens in texts: 1 records (<|eot_id|> 1), first in a.jsonl:2:")
