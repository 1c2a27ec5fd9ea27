"""`derta data build`: files of people become files of `derta train`, with a report."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from derta.cli import main
from derta.data import Record, read_records
from derta.data.records.building import read_sources
from derta.data.records.formats import Half
from derta.data.records.sources import Source


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, *rows: dict[str, Any]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())


def answer(prompt: str, response: str, is_safe: bool) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "is_safe": is_safe}


def mixed_files() -> str:
    """Write files of every role, and return their sources as the command line takes them."""
    write(
        "triples.jsonl",
        *(
            {"prompt": f"Paint fence {i}?", "safe": "Sorry.\u2028", "harmful": f"{i}.", "weight": 3}
            for i in range(6)
        ),
    )
    said = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Lift it?"},
        {"role": "assistant", "content": "Sorry."},
        {"role": "user", "content": "Paint it, é?"},
    ]
    write("turns.jsonl", {"messages": said, "safe": "Sorry.", "harmful": "Sure.", "id": 7})
    write(
        "old.jsonl",
        {"prefix": r"[INST] Drop it? [\INST]", "text": " Sure.<end>", "safe": "true"},
        {"prefix": r"[INST] Drop it? [\INST]", "text": " Sorry.<end>", "safe": "false"},
    )
    write("helpful.jsonl", *({"instruction": f"Stir {i}?", "output": "So."} for i in range(6)))
    write("close.jsonl", {"messages": [*said[1:3]]})
    return (
        "[{path: [triples.jsonl, turns.jsonl], role: safety, weight: 2}, "
        "{path: old.jsonl, role: safety}, {path: helpful.jsonl, role: helpful, limit: 5}, "
        "{path: close.jsonl, role: borderline, weight: 0.5}]"
    )


def brought() -> list[Record]:
    sources = [
        Source(path=["triples.jsonl", "turns.jsonl"], role="safety", weight=2),
        Source(path="old.jsonl", role="safety"),
        Source(path="helpful.jsonl", role="helpful", limit=5),
        Source(path="close.jsonl", role="borderline", weight=0.5),
    ]
    records = [record for _, record in read_sources(sources) if not isinstance(record, Half)]
    assert {record.weight for record in records} == {6.0, 2.0, 1.0, 0.5}
    return records


def built(folder: str) -> list[Record]:
    return [
        record
        for path in sorted(Path(folder).glob("*.jsonl"))
        for record in read_records(path, role=path.name.split(".")[1])  # type: ignore[arg-type]
    ]


def test_a_built_data_set_reads_as_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sources", mixed_files(), "--output_dir", "out", "--near", "null"]
    assert main(["data", "build", *options, "--eval_share", "0.4"]) == 0
    assert {record.id: record for record in built("out")} == {
        record.id: record for record in brought()
    }
    told = capsys.readouterr().out
    assert "triples: 6 safety" in told
    assert "  - {path: out/train.safety.jsonl, role: safety, format: triple}" in told
    assert "  - {path: out/train.safety.rendered.jsonl, role: safety}" in told
    summary = json.loads(Path("out/build.json").read_text(encoding="utf-8"))
    assert sum(file["rows"] for file in summary["files"].values()) == len(brought()) == 15
    assert any(name.startswith("eval.") for name in summary["files"])


def test_answers_of_several_files_become_triples() -> None:
    write(
        "unsafe.jsonl.gz",
        answer("Paint it?", "Sure, 1.", False),
        answer("Lift it?", "Sure, 2.", False),
        answer("Lift it?", "Sorry, 2.", True),
        answer("Drop it?", "Sure, 3.", False),
    )
    write("safe.jsonl", answer("Paint it?", "Sorry, 1.", True))
    sources = "[{path: unsafe.jsonl.gz, role: safety, weight: 2}, {path: safe.jsonl, role: safety}]"
    options = ["--sources", sources, "--eval_share", "0", "--near", "null"]
    assert main(["data", "build", *options, "--output_dir", "out"]) == 0
    assert {(r.prompt, r.safe, r.harmful, r.weight) for r in built("out")} == {  # type: ignore[union-attr]
        ("Lift it?", "Sorry, 2.", "Sure, 2.", 2.0),
        ("Paint it?", "Sorry, 1.", "Sure, 1.", 2.0),
    }
    completed = [*options, "--output_dir", "dev", "--refusal_text", "Sorry, no."]
    assert main(["data", "build", *completed]) == 0
    (added,) = {r.prompt: r for r in built("dev")}.keys() - {r.prompt for r in built("out")}  # type: ignore[union-attr]
    assert added == "Drop it?"


def test_rows_of_a_named_format_keep_that_format(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"prompt": "Paint it?", "chosen": "Sure, step 1.", "rejected": "Sorry, I cannot help."}
    write("rows.jsonl", row)
    sources = "[{path: rows.jsonl, role: safety, format: preference}]"
    assert main(["data", "build", "--sources", sources, "--output_dir", "out"]) == 0
    assert "role: safety, format: triple}" in capsys.readouterr().out
    (record,) = read_records("out/train.safety.jsonl", role="safety", format="triple")
    (before,) = read_records("rows.jsonl", role="safety", format="preference")
    assert record == replace(before, weight=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "rows.jsonl"], "output_dir: rows.jsonl: rows.jsonl is a file, expected"),
        (["--output_dir", "full"], "output_dir: full is not empty, choose another"),
        (["--output_dir", "out", "--near", "0.2"], "near must lie in [0.5, 1]"),
        (["--output_dir", "out", "--eval_share", "1"], "eval_share must lie in [0, 1), got 1.0"),
    ],
)
def test_impossible_builds_are_refused_with_the_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("rows.jsonl", {"prompt": "Paint it?", "safe": "Sorry.", "harmful": "Sure."})
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    sources = "[{path: rows.jsonl, role: safety}]"
    assert main(["data", "build", "--sources", sources, *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"derta data build: {message}")
    assert sorted(path.name for path in Path().iterdir()) == ["full", "rows.jsonl"]
