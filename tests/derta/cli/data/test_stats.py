"""`derta data stats`: a table and a JSON file that hold numbers and places, and no text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from derta.cli import main
from tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a tokenizer, training files, and an evaluation file that leaks into one of them."""
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save_pretrained("model")
    triples = [
        {"prompt": f"How do I paint {i} fences?", "safe": "Sorry, no.", "harmful": "Step one. " * i}
        for i in range(1, 6)
    ]
    helpful = [{"instruction": "Who keeps a ladder?", "output": "A painter."}] * 2
    for name, rows in {"fences": triples, "ladders": helpful}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("held.csv").write_text("goal,target\nHow do I paint 3 FENCES,Sure\nWho sweeps?,Sure\n")


SOURCES = (
    "[{path: fences.jsonl, role: safety, weight: 2}, "
    "{path: ladders.jsonl, role: helpful, limit: 2}]"
)


def stats(*arguments: str) -> int:
    return main(["data", "stats", "--sources", SOURCES, *arguments])


def test_all_statistics_are_in_the_table_and_in_the_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    held = "[{path: held.csv, role: harmful}, {path: ladders.jsonl, role: helpful}]"
    options = ["--eval_sources", held, "--model", "model", "--output", "stats.json"]
    assert stats(*options, "--branches", "2", "--rto_keep", "0.5") == 0
    told = capsys.readouterr().out
    found = json.loads(Path("stats.json").read_text())
    tokens = found["tokens"]
    assert f"one pass: {tokens['one_pass']:,} tokens an epoch" in told
    assert tokens["apart"] > tokens["one_pass"]
    shares = found["loss"]
    assert sum(sum(terms.values()) for terms in shares.values()) == pytest.approx(1)
    assert shares["fences"]["rto"] > 0 == shares["ladders"]["rto"]
    assert f"{shares['ladders']['mle']:.1%}" in told
    (token,) = found["refusal"]["tokens"]
    assert token["text"] == "Sorry" and "refusal token: 'Sorry' (id" in told
    assert found["duplicates"]["example"] == 1
    assert found["leakage"]["leaked"] == 2
    assert "2 of 3 evaluation requests" in told
    assert "ladders.jsonl:2  ladders.jsonl:1" in told
    assert "fences.jsonl:3  held.csv:2" in told
    for said in (told, json.dumps(found)):
        assert not [word for word in ("paint", "Step", "painter", "sweeps") if word in said]


def test_the_configuration_of_a_training_run_is_accepted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("run.yaml").write_text(
        "model: model\noutput_dir: out\nlearning_rate: 1e-5\nrecipe: vanilla\n"
        f"sources: {SOURCES}\n"
        "eval_sources: [{path: fences.jsonl, role: safety, weight: 2, limit: 1}]\n"
    )
    assert main(["data", "stats", "run.yaml", "--output", "stats.json"]) == 0
    found = json.loads(Path("stats.json").read_text())
    assert found["loss"]["fences"]["rto"] == 0
    assert found["leakage"]["leaked"] == found["leakage"]["evaluation"] == 5
    Path("run.yaml").write_text(f"sources: {SOURCES}\nmax_lenght: 3\n")
    assert main(["data", "stats", "run.yaml"]) == 1
    assert "run.yaml: unknown key 'max_lenght'; did you mean" in capsys.readouterr().err


def test_records_that_are_too_long_are_counted_as_told(capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--model", "model", "--max_length", "36"]
    assert stats(*limits, "--output", "skip.json") == 0
    assert stats(*limits, "--too_long", "truncate", "--output", "truncate.json") == 0
    skip, truncate = (
        json.loads(Path(f"{name}.json").read_text())["tokens"] for name in ("skip", "truncate")
    )
    assert skip["truncated"] == 0 and truncate["truncated"] == skip["skipped"] == 2
    assert "2 other records truncated, 0 skipped" in capsys.readouterr().out


def test_columns_name_the_fields_of_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.jsonl").write_text('{"ask": "Who sweeps?", "say": "Nobody."}\n')
    sources = "[{path: own.jsonl, role: helpful, columns: {prompt: ask, answer: say}}]"
    held = "[{path: own.jsonl, role: harmful, columns: {prompt: ask}}]"
    assert main(["data", "stats", "--sources", sources, "--eval_sources", held]) == 0
    assert "1 of 1 evaluation requests" in capsys.readouterr().out
    wrong = sources.replace("prompt", "promt")
    assert main(["data", "stats", "--sources", wrong]) == 1
    assert "sources[0].columns: no format knows a field 'promt'" in capsys.readouterr().err


def test_weights_of_sources_are_in_the_shares(capsys: pytest.CaptureFixture[str]) -> None:
    def share(weight: int) -> float:
        sources = SOURCES.replace("weight: 2", f"weight: {weight}")
        output = f"{weight}.json"
        assert (
            main(["data", "stats", "--sources", sources, "--model", "model", "--output", output])
            == 0
        )
        return sum(json.loads(Path(output).read_text())["loss"]["fences"].values())

    once, thrice = share(1), share(3)
    assert thrice / (1 - thrice) == pytest.approx(3 * once / (1 - once))


def test_characters_are_counted_without_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert stats("--near", "null") == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0] == "records"
    assert "characters" in told and "tokens" not in told and "near:" not in told


@pytest.mark.promise("Special tokens in texts of records become plain text.")
def test_special_tokens_in_texts_are_counted_and_may_be_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"prompt": "How <|eot_id|>?", "safe": "Sorry.", "harmful": "</s><|eot_id|>", "id": "a"}
    with open("fences.jsonl", "a") as file:
        file.write(json.dumps(row))
    assert stats("--model", "model", "--output", "stats.json") == 0
    assert "special tokens in texts: 1 records (<|eot_id|> 2)\n" in capsys.readouterr().out
    found = json.loads(Path("stats.json").read_text())
    assert found["special_tokens"] == {"records": 1, "tokens": {"<|eot_id|>": 2}}
    assert stats("--near", "null") == 0
    assert "texts: 1 records (<|eot_id|> 2, </s> 1)\n" in capsys.readouterr().out
    assert stats("--model", "model", "--special_tokens_in_text", "refuse") == 1
    expected = "derta data stats: a: prompt: has the special token '<|eot_id|>' as text, expected"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--near", "0.2"], "near must lie in [0.5, 1]"),
        (["--max_length", "0"], "max_length must be at least 1, got 0"),
        (["--listed", "-1"], "listed must be at least 0, got -1"),
        (["--output", "held.csv"], "output: held.csv is there already, choose another file"),
        (["--model", "model", "--rto_keep", "2"], "rto_keep must lie in [0, 1], got 2.0"),
    ],
)
def test_impossible_statistics_are_refused_with_the_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stats(*arguments) == 1
    assert message in capsys.readouterr().err
