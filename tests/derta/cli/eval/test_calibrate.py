"""`derta eval calibrate`: judges of a configuration compared with labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from derta.cli import main
from derta.evaluation import Exchange
from derta.evaluation.judges.base import decides_refusals
from derta.evaluation.judges.registry import make_judges
from derta.evaluation.judges.rubrics import HARMBENCH_TEMPLATE
from served import Trouble, said, serving
from tiny import tiny_model, tiny_tokenizer

ROWS = [
    {"prompt": "How?", "response": "Sorry, no.", "label": "refusal"},
    {"prompt": "How?", "response": "Buy a brush.", "label": "compliance"},
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("labels.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def call(judges: str, *arguments: str) -> int:
    options = ["--output_dir", "out", "--judges", judges, *arguments]
    return main(["eval", "calibrate", "labels.jsonl", *options])


def test_judges_are_compared_and_a_rerun_asks_a_server_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        refused = "Sorry" in body["messages"][0]["content"].partition("<answer>")[2]
        return said(f"HARMFUL: no\nREFUSED: {'yes' if refused else 'no'}")

    with serving(reply) as served:
        judges = (
            f"{{keyword: {{}}, gpt: {{kind: server, base_url: '{served.base_url}', model: m}}}}"
        )
        for asked in (2, 2):
            assert call(judges) == 0
            assert len(served.asked) == asked
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "calibration: out/calibration.json"
    assert out.split().count("100.0") == out.split().count("1.00") == 4
    result = json.loads(Path("out/calibration.json").read_text())["labels.jsonl"]
    assert (result["answers"], result["left_out"]) == (2, 0)
    assert list(result["refused"]) == ["keyword", "gpt"]
    assert result["refused"]["gpt"]["kappa"] == 1.0
    assert Path("out/verdicts.gpt.jsonl").stat().st_mode & 0o077 == 0
    assert "brush" not in out


def save_classifier(folder: str) -> None:
    config = AutoConfig.for_model(
        "bert",
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        id2label={0: "NORMAL", 1: "REJECTION"},
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def test_models_in_folders_judge(workplace: Path) -> None:
    tiny_model("llama", max_position_embeddings=1024).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    save_classifier("classifier")
    Path("rubric.txt").write_text("Is {answer} good for {request}?")
    judges = """{
        guard: {kind: wildguard, path: model, device: cpu},
        harmbench: {path: model, batch_size: 2},
        llama_guard: {path: model, dtype: bfloat16},
        any: {kind: llm, path: model, template: rubric.txt, max_new_tokens: 2},
        words: {kind: keyword, keywords: [brush]},
        classifier: {path: classifier, refusal_label: REJECTION}}"""
    assert call(judges) == 0
    result = json.loads(Path("out/calibration.json").read_text())["labels.jsonl"]["refused"]
    # A model of random weights does not reply as it is asked to: all of that is undecided.
    assert {name: one["decided"] for name, one in result.items()} == {
        "guard": 0,
        "harmbench": 0,
        "llama_guard": 0,
        "any": 0,
        "words": 2,
        "classifier": 2,
    }
    assert result["words"]["agreement"] == 0.0


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        ("{}", "judges: expected at least one, got none"),
        ("{'a b': {}}", "judges: expected a name of letters, digits, - and _, got 'a b'"),
        ("{gpt: 3}", "judges.gpt: expected settings, as in {gpt: {kind: keyword}}"),
        ("{gpt: {}}", "judges.gpt: kind is 'gpt', expected one of keyword, harmbench, wildguard, "),
        ("{gpt: {kind: server}}", "judges.gpt: missing base_url, model"),
        ("{wildguard: {pth: a}}", "judges.wildguard: settings: unknown key 'pth'; did you mean 'p"),
        ("{wildguard: {path: none}}", "judges.wildguard: none: no such model folder"),
        (
            "{wildguard: {path: ., batch_size: 0}}",
            "judges.wildguard: batch_size must be at least 1, got 0",
        ),
        ("{keyword: {keywords: []}}", "judges.keyword: keywords must name at least one, got none"),
        (
            "{gpt: {kind: server, base_url: 'http://a', model: m, concurrency: 0}}",
            "judges.gpt: concurrency must be at least 1, got 0",
        ),
        (
            "{gpt: {kind: server, base_url: 'http://a', model: m, template: none.txt}}",
            "judges.gpt: template: expected text with {request} or a file, got 'none.txt'",
        ),
        (
            "{gpt: {kind: server, base_url: 'http://a', model: m, template: '{answer}?'}}",
            "judges.gpt: template: has no {request}, expected {request} and {answer}",
        ),
        *(
            (
                "{gpt: {kind: server, base_url: 'http://a', model: m, rubric: harmbench, "
                f"{name}: {value}}}}}",
                f"judges.gpt: {name} is for rubric: paper, and harmbench has its own: leave it out",
            )
            for name, value in (("template", "'{request} {answer}'"), ("max_new_tokens", 3))
        ),
    ],
)
def test_a_wrong_judge_is_one_sentence_and_leaves_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str], judges: str, message: str
) -> None:
    assert call(judges) == 1
    assert capsys.readouterr().err.startswith(f"derta eval calibrate: {message}")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--files", "[]"], "files: expected at least one file of labelled answers, got none"),
        (["--files", "none.csv"], "none.csv: no such record file"),
        (["--output_dir", "labels.jsonl"], "output_dir: labels.jsonl: labels.jsonl is a file"),
    ],
)
def test_a_wrong_call_is_one_sentence(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert call("{keyword: {}}", *arguments) == 1
    assert capsys.readouterr().err.startswith(f"derta eval calibrate: {message}")


def test_a_server_that_refuses_ends_the_run_with_one_sentence(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda path, body: said("")) as served:
        served.trouble_of = lambda body: Trouble(401)
        address = f"base_url: '{served.base_url}', model: m, api_key_env: MY_KEY"
        judges = f"{{gpt: {{kind: server, {address}}}}}"
        assert call(judges) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("derta eval calibrate: exchange ")
    assert line.endswith("replied with status 401, expected a key that it knows in MY_KEY")


def test_pickled_weights_of_a_judge_are_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    for kind in ("wildguard: {path: model}", "classifier: {path: model, refusal_label: LABEL_1}"):
        assert call(f"{{{kind}}}") == 1
        assert "safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["harmbench", "llama_guard", "wildguard"])
def test_a_local_judge_of_harm_alone_says_so_before_it_is_loaded(
    workplace: Path, kind: str
) -> None:
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    (judge,) = make_judges({kind: {"path": "model"}}, workplace).values()
    assert decides_refusals(judge) == (kind == "wildguard")


def test_a_local_classifier_decides_what_it_has_labels_for(workplace: Path) -> None:
    save_classifier("model")
    for asked in ("refusal_label", "harmful_label"):
        settings = {"kind": "classifier", "path": "model", asked: "REJECTION"}
        (judge,) = make_judges({"a": settings}, workplace).values()
        assert decides_refusals(judge) == (asked == "refusal_label")


def test_a_server_gets_the_rubric_of_the_configuration(tmp_path: Path) -> None:
    with serving(lambda path, body: said("yes")) as served:
        settings = {"kind": "server", "base_url": served.base_url, "model": "m"}
        (judge,) = make_judges({"cls": {**settings, "rubric": "harmbench"}}, tmp_path).values()
        (verdict,) = judge([Exchange([{"role": "user", "content": "How?"}], "So.")])
    assert verdict.harmful is True
    (asked,) = served.asked
    expected = HARMBENCH_TEMPLATE.replace("{request}", "How?").replace("{answer}", "So.")
    assert asked.body["prompt"] == expected
