"""A data set is built whole: halves joined once, unique rows, no request on both sides."""

from __future__ import annotations

import hashlib
import json
import random
import stat
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from derta.data import Dialogue, Rendered, Triple
from derta.data.records.building import build
from derta.data.records.duplicates import Fingerprint, RequestIndex, normalized
from derta.data.records.formats import Half

SYSTEM = {"role": "system", "content": "Be kind."}


def ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def half(request: str, response: str, *, safe: bool, id: str, **more: Any) -> Half:
    return Half(request, response, safe, {"id": id, "source": "halves", **more})


def triple(place: int, request: str, **more: Any) -> Triple:
    return Triple(prompt=request, safe="Sorry.", harmful=f"Step {place}.", id=str(place), **more)


def dialogue(place: int, request: str, **more: Any) -> Dialogue:
    return Dialogue(messages=[ask(request), say(f"Stir {place}.")], id=f"d{place}", **more)


def official(request: str) -> str:
    return rf"[INST] {request} [\INST]"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_rows(folder: Path, side: str) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob(f"{side}.*.jsonl")) for row in rows(path)]


def request(row: dict[str, Any]) -> str:
    """Return the first user message of a row."""
    if "prefix" in row:
        return row["prefix"].removeprefix("[INST] ").removesuffix(r" [\INST]")
    if "prompt" in row:
        return row["prompt"]
    return next(turn["content"] for turn in row["messages"] if turn["role"] == "user")


def requests(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices([f"word{i}" for i in range(300)], k=12)) for _ in range(count)]


def test_halves_are_joined_across_files_each_once(tmp_path: Path) -> None:
    records = [
        ("safety", half("Paint it?", "Sure, 1.", safe=False, id="a", source="x", weight=2.0)),
        ("safety", half("Lift it?", "Sure, 2.", safe=False, id="b", source="x")),
        ("safety", half("paint it", "Sorry, 1.", safe=True, id="c", source="y")),
        ("safety", half("Paint it", "Sorry, 2.", safe=True, id="d", source="y")),
        ("safety", half("Paint it", "sorry, 1", safe=True, id="e", source="y")),
        ("safety", half("Drop it?", "Sorry, 3.", safe=True, id="f", source="y")),
    ]
    summary = build(records, tmp_path / "out", eval_share=0)
    (row,) = rows(tmp_path / "out" / "train.safety.jsonl")
    assert row == {
        "prompt": "Paint it?",
        "safe": "Sorry, 1.",
        "harmful": "Sure, 1.",
        "id": "a+c",
        "source": "x",
        "weight": 2.0,
    }
    assert summary["read"] == {"x": {"safety_halves": 2}, "y": {"safety_halves": 4}}
    assert (summary["joined"], summary["completed"]) == (1, 0)
    assert summary["dropped"] == {
        "duplicates": 1,
        "contradicting": 0,
        "safe_halves": 2,
        "harmful_halves": 1,
        "near_evaluation": 0,
    }


def test_a_harmful_half_is_completed_only_on_request(tmp_path: Path) -> None:
    records = [
        ("safety", half("Paint it?", "Sure, 1.", safe=False, id="a")),
        ("safety", half("Paint it?", "Sorry.", safe=True, id="b")),
        ("safety", half("Paint it?", "Sure, 2.", safe=False, id="c")),
    ]
    summary = build(records, tmp_path / "out", eval_share=0, refusal_text="Sorry, no.")
    made = rows(tmp_path / "out" / "train.safety.jsonl")
    assert [(row["id"], row["safe"]) for row in made] == [("a+b", "Sorry."), ("c", "Sorry, no.")]
    assert (summary["joined"], summary["completed"]) == (1, 1)
    assert summary["dropped"]["harmful_halves"] == 0


def test_halves_that_contradict_their_labels_are_not_joined(tmp_path: Path) -> None:
    records = [
        ("safety", half("Paint it?", "Sorry, I cannot help.", safe=False, id="a")),
        ("safety", half("Paint it?", "Sure, step 1.", safe=True, id="b")),
        ("safety", half("Lift it?", "Sure, step 1.", safe=False, id="c")),
        ("safety", half("Lift it?", "Sorry, I cannot help.", safe=True, id="d")),
    ]
    summary = build(records, tmp_path / "out", eval_share=0)
    assert [row["id"] for row in all_rows(tmp_path / "out", "train")] == ["c+d"]
    assert (summary["joined"], summary["dropped"]["contradicting"]) == (1, 1)


def test_the_first_of_several_duplicates_is_kept(tmp_path: Path) -> None:
    first = triple(1, "How do I paint it?")
    records = [
        ("safety", first),
        ("safety", replace(first, prompt="how do i PAINT it", messages=(), id="2")),
        ("safety", replace(first, safe="Sorry, otherwise.", id="3")),
        ("helpful", dialogue(1, "How do I paint it?")),
        ("helpful", dialogue(1, "How do I paint it?")),
    ]
    summary = build(records, tmp_path / "out", eval_share=0)
    assert [row["id"] for row in all_rows(tmp_path / "out", "train")] == ["d1", "1", "3"]
    assert summary["dropped"]["duplicates"] == 2


def test_a_request_is_never_on_both_sides(tmp_path: Path) -> None:
    records: list[tuple[str, Any]] = []
    for place, text in enumerate(requests(200)):
        written = text.upper() + "?"
        records += [
            ("safety", triple(place, text)),
            ("helpful", dialogue(place, written)),
            ("borderline", replace(dialogue(place, f"  {text}!"), id=f"b{place}")),
            (
                "helpful",
                Dialogue(
                    messages=[SYSTEM, ask(text), say("So."), ask("And?"), say("Thus.")],
                    id=f"m{place}",
                ),
            ),
            (
                "safety",
                Rendered(
                    prefix=rf"[INST] {text} [\INST]", text=" Sorry.", rto=True, id=f"r{place}"
                ),
            ),
        ]
    summary = build(records, tmp_path / "out", eval_share=0.3, near=None)

    def side(name: str) -> set[str]:
        return {normalized(request(row)) for row in all_rows(tmp_path / "out", name)}

    assert side("train").isdisjoint(side("eval"))
    assert len(side("train") | side("eval")) == 200
    assert 0.2 < len(side("eval")) / 200 < 0.4
    assert set(summary["files"]) == {
        f"{name}.{role}.jsonl"
        for name in ("train", "eval")
        for role in ("safety", "safety.rendered", "helpful", "borderline")
    }


def test_held_out_requests_stay_held_out_when_data_is_added(tmp_path: Path) -> None:
    few = [("safety", triple(place, text)) for place, text in enumerate(requests(100))]
    more = [("safety", triple(1000 + place, text)) for place, text in enumerate(requests(100, 1))]
    build(few, tmp_path / "few", eval_share=0.2, near=None)
    build(more + few[::-1], tmp_path / "more", eval_share=0.2, near=None)
    build(few, tmp_path / "other", eval_share=0.2, near=None, seed=1)

    def held_out(name: str) -> set[str]:
        return {request(row) for row in all_rows(tmp_path / name, "eval")}

    assert held_out("few") == held_out("more") & set(requests(100))
    assert held_out("few") != held_out("other")


def test_no_training_request_is_near_to_a_held_out_one(tmp_path: Path) -> None:
    records: list[tuple[str, Any]] = []
    for place, text in enumerate(requests(120)):
        records.append(("safety", triple(place, text)))
        records.append(("helpful", dialogue(place, f"{text} please")))
    summary = build(records, tmp_path / "out", eval_share=0.3)
    index = RequestIndex()
    for row in all_rows(tmp_path / "out", "eval"):
        index.add(row["id"], Fingerprint([request(row)]))
    kept = all_rows(tmp_path / "out", "train")
    assert not [row for row in kept if index.matches(Fingerprint([request(row)]))]
    dropped = summary["dropped"]["near_evaluation"]
    assert dropped > 20
    assert len(kept) + len(index) + dropped == len(records)
    assert not list(tmp_path.glob("out/all.*"))


def test_a_taken_id_gets_its_source_as_a_prefix(tmp_path: Path) -> None:
    sources = {
        "paint": "x",
        "lift": "y",
        "drop": "y",
    }  # files with the same name in different folders
    records = [
        ("safety", replace(triple(1, word), source=source)) for word, source in sources.items()
    ]
    build(records, tmp_path / "out", eval_share=0)
    assert [row["id"] for row in all_rows(tmp_path / "out", "train")] == ["1", "y:1", "y:y:1"]


def test_rows_that_all_share_an_id_get_short_distinct_ids(tmp_path: Path) -> None:
    records = [("safety", triple(1, text, source="x")) for text in requests(400)]
    build(records, tmp_path / "out", eval_share=0)
    ids = [row["id"] for row in all_rows(tmp_path / "out", "train")]
    assert len(set(ids)) == len(records)
    assert ids[:6] == ["1", "x:1", "x:x:1", "x:x:x:1", "x:x:x:x:1", "x:6:x:x:x:x:1"]
    assert max(map(len, ids)) == len("x:400:x:x:x:x:1")


def test_the_summary_describes_the_files(tmp_path: Path) -> None:
    records = [("safety", triple(place, text)) for place, text in enumerate(requests(50))]
    summary = build(records, tmp_path / "deep" / "out", eval_share=0.2)
    folder = tmp_path / "deep" / "out"
    assert json.loads((folder / "build.json").read_text(encoding="utf-8")) == summary
    assert {path.name for path in folder.iterdir()} == {"build.json", *summary["files"]}
    for name, told in summary["files"].items():
        data = (folder / name).read_bytes()
        assert told == {"rows": data.count(b"\n"), "sha256": hashlib.sha256(data).hexdigest()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.parent.iterdir()) == [folder]


def test_an_interrupted_build_leaves_and_deletes_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, Triple]]:
        yield "safety", triple(1, "Paint it?")
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        build(interrupted(), tmp_path / "out")
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]
    mine = tmp_path / "out" / "mine.txt"
    mine.write_text("mine")
    with pytest.raises(ValueError, match="^output_dir: .*out is not empty, choose"):
        build([("safety", triple(1, "Paint it?"))], tmp_path / "out")
    with pytest.raises(ValueError, match="^output_dir: .*mine.txt is not empty"):
        build([("safety", triple(1, "Paint it?"))], mine)
    assert list(tmp_path.rglob("*")) == [tmp_path / "out", mine]
    assert mine.read_text() == "mine"


def test_rows_are_streamed(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        text = "word " * 2_000
        records = (("safety", triple(place, f"{text} {place}")) for place in range(count))
        tracemalloc.start()
        try:
            build(records, tmp_path / str(count), eval_share=0.1, near=None)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # one-time allocations
    assert peak(400) < peak(40) + 1_000_000  # 360 more rows are 3.6 MB of text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_share": 1.0}, r"^eval_share must lie in \[0, 1\), got 1.0"),
        ({"eval_share": -0.1}, r"^eval_share must lie in \[0, 1\), got -0.1"),
        ({"near": 0.1}, r"^near must lie in \[0.5, 1\]"),
        ({"refusal_text": " "}, "^refusal_text: is blank, expected text"),
        ({"eval_share": 0.9999999}, "^no example is left to train on: add data or lower"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(
    tmp_path: Path, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build([("safety", triple(1, "Paint it?"))], tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
