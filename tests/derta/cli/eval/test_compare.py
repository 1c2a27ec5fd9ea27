"""`derta eval compare` on summaries and official files, and one sentence for every wrong call."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from derta.cli import main
from derta.evaluation import Outcome, VariantResult, summarize
from tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write two summaries, and result files in the layout of the official repository."""
    monkeypatch.chdir(tmp_path)
    for folder, names in {"one": ["derta"], "two": ["vanilla", "derta"]}.items():
        results = {
            name: [VariantResult(outcomes=(Outcome("asr.direct", hits, 4, positions=(0,)),))]
            for hits, name in enumerate(names, 2)
        }
        write(f"{folder}/summary.json", summarize(results, seconds=1))
    for name, answer in {"before": "Take a brush.", "after": "Take a brush. Sorry, no."}.items():
        rows = [{"question": f"How to paint {n}?", "response": answer} for n in range(4)]
        write(f"results/rhyme/{name}_rhyme_4.json", *rows)
        write(f"results/completion/{name}_completion_4.json", f"To paint: {answer}")
    write("prompts.json", {"question": "To paint:"})
    return tmp_path


def write(name: str, *rows: Any) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def compared(*arguments: str) -> dict[str, Any]:
    assert main(["eval", "compare", *arguments, "--output_dir", "out"]) == 0
    return json.loads(Path("out/comparison.json").read_text("utf-8"))


def test_summaries_are_compared_under_their_own_or_given_names() -> None:
    assert list(compared("two")["models"]) == ["vanilla", "derta"]
    named = compared("one/summary.json", "two", "--names", "[tuned, two]")
    assert list(named["models"]) == ["tuned", "two vanilla", "two derta"]
    same = compared("--results", "{tuned: one, two: two}")
    assert same == named


def test_a_pattern_finds_files_of_the_official_layout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = compared(
        "--results",
        "{vanilla: results/*/before*, derta: [results/rhyme/after_rhyme_4.json, "
        "results/completion/after_completion_4.json]}",
        "--prompts",
        "prompts.json",
    )
    assert {n: m["asr"]["file"] for n, m in found["models"].items()} == {
        "vanilla": {"completion": 1.0, "rhyme": 1.0},
        "derta": {"rhyme": 0.0, "completion": 0.0},
    }
    assert found["models"]["derta"]["refusal_positions"]["asr"]["file"] == {
        "rhyme": [3] * 4,
        "completion": [3],
    }
    assert found["terms"]["compared"] == {"both": ["vanilla", "derta"]}
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "Refusals that start at once"
    assert out[-1] == "page: out/comparison.html"


def test_attacks_and_analyses_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(
        "--results={a: {paint: results/rhyme/after_rhyme_4.json}}",
        "--analysis=first_tokens",
        "--keywords=[brush]",
    )
    assert found["first_tokens"]["a"]["file.paint"]["share"] == 1.0
    assert "terms" not in found
    found = compared("results/completion", "--results=results/completion/after_completion_4.json")
    assert list(found["models"]) == ["after_completion_4"]
    assert "note: after_completion_4, completion: 1 of 1 rows refuse at an unknown place" in (
        capsys.readouterr().out
    )


def test_tokens_and_repeats_of_official_files_are_counted_on_demand() -> None:
    tiny_tokenizer().save_pretrained("tokenizer")
    row = {"question": "How?", "response": "Take a brush. Sorry, no."}
    write("results/twice/twice.json", row, row)
    paths = ["results/twice/twice.json", "--tokenizer", "tokenizer"]
    (entry,) = compared(*paths)["models"].values()
    assert entry["position_unit"] == "tokens"
    (entry,) = compared(*paths, "--keep_repeats")["models"].values()
    assert entry["counts"]["asr"]["file"]["twice"]["trials"] == 2


def test_models_are_matched_to_recipes() -> None:
    recipes = "{vanilla: two vanilla, rto_only: tuned}"
    found = compared("two", "one", "--names", "[two, tuned]", "--recipes", recipes)
    assert found["terms"]["compared"] == {
        "RTO": ["two vanilla", "tuned"],
        "two vanilla → two derta": ["two vanilla", "two derta"],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "missing results"),
        ("--results []", "results: expected at least one file or folder, got none"),
        ("--results {a:[]}", "results: expected at least one file of every model, got none"),
        ("one --names [a,b]", "names must be as many as results, 1, got 2"),
        ("--results {a:one} --names a", "names are for a list of results, a mapping has its own"),
        ("none/*.json", "none/*.json: no such result file, nor a folder with any"),
        ("one two", "results: two models are called derta; name them: --results '{before: a/"),
        (
            "--results {a:[one,results/rhyme/before_rhyme_4.json]}",
            "results: one/summary.json is a summary, which stands for a model by itself",
        ),
        ("results/rhyme", "results/rhyme/before_rhyme_4.json lie in one folder, after which attac"),
        (
            "--results {a:{rhyme:results/rhyme/*}}",
            "results: rhyme: expected one file, got results/rhyme/*",
        ),
        *(
            (name, f"{name}/summary.json: variants: expected those of derta eval, each with its co")
            for name in ("bad", "worse")
        ),
        ("one --recipes {derta:other}", "recipes: derta must be one of ['derta'], got 'other'"),
        ("one --keywords []", "keywords must name at least one"),
        ("one --output_dir prompts.json", "output_dir: prompts.json: prompts.json is a file"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    write("bad/summary.json", {"variants": {"a": {"asr": {}}}})
    write("worse/summary.json", {"variants": {"a": {"counts": {"asr": {"direct": 3}}}}})
    spaced = [re.sub(r":(?=\S)", ": ", part) for part in arguments.split()]
    if "--output_dir" not in spaced:
        spaced += ["--output_dir", "out"]
    assert main(["eval", "compare", *spaced]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("derta")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not Path("out").exists()
