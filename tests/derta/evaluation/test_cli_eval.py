"""`derta eval` on local folders, and the sentence it has for every wrong call."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from derta.cli import main
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, adapters trained on it, and the two kinds of records."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    model.save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    state = {"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "rto_loss": 0.5}]}
    (tmp_path / "model" / "trainer_state.json").write_text(json.dumps(state))
    base = AutoModelForCausalLM.from_pretrained("model")
    lora = LoraConfig(r=2, target_modules="all-linear")
    get_peft_model(base, lora).save_pretrained("adapters")
    # Another run's, which says nothing of these adapters.
    checkpoint = tmp_path / "adapters" / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    write(
        "harmful.jsonl", {"prompt": "How?", "safe": "Sorry, no.", "harmful": "Step one, step two."}
    )
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Stir it."}]
    write("benign.jsonl", {"messages": turns})
    return tmp_path


def write(name: str, row: dict) -> None:
    Path(name).write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")


def call(arguments: str) -> int:
    return main(["eval", "--device", "cpu", "--output_dir", "out", *arguments.split()])


def test_models_and_adapters_are_compared(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = call(
        "--model [model,adapters] --harmful harmful.jsonl --benign benign.jsonl "
        "--helpful benign.jsonl --prefill_depths [0,2] --max_new_tokens 4"
    )
    assert status == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "report: out/report.html"
    assert Path("out/report.html").is_file()
    summary = json.loads(Path("out/summary.json").read_text())
    assert list(summary["variants"]) == ["model", "adapters"]
    for entry in summary["variants"].values():
        assert entry["asr"]["prefill"].keys() == {"0", "2"}
        assert entry["counts"]["over_refusal"]["trials"] == 3
        assert "detector_auc" in entry and "helpful_accuracy" in entry
        assert "samples" not in entry
    assert summary["variants"]["model"]["loss"][1] == {"step": 2, "loss": 1.0, "rto_loss": 0.5}
    assert "loss" not in summary["variants"]["adapters"]


def test_settings_reach_the_evaluation(workplace: Path) -> None:
    status = call(
        "--model model --harmful harmful.jsonl --helpful benign.jsonl --prefill_depths [1] "
        "--helpful_metric perplexity --samples 2 --curve false --max_new_tokens 2 --keywords [e,a]"
    )
    assert status == 0
    (entry,) = json.loads(Path("out/summary.json").read_text())["variants"].values()
    assert entry["helpful_perplexity"] > 1
    assert "refusal_curve" not in entry
    assert len(entry["samples"]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model model", "name at least one file of records: harmful, benign or helpful"),
        ("--model [] --benign benign.jsonl", "model: expected at least one folder, got none"),
        ("--model none --benign benign.jsonl", "none: no such model folder"),
        (
            "--model [model,../{0}/model] --benign benign.jsonl",
            "model: two folders have one name; name them: --model '{before: a/model, after: ",
        ),
        ("--model model --benign none.jsonl", "none.jsonl: no such record file"),
        (
            "--model model --harmful benign.jsonl",
            "benign.jsonl: harmful takes a file of triples, benign.jsonl:1 is a dialogue",
        ),
        ("--model bare --benign benign.jsonl", "bare: adapters without adapter_model.safetensors"),
        (
            "--model prompts --benign benign.jsonl",
            "prompts: PROMPT_TUNING adapters are prompts, not weights",
        ),
        (
            "--model moved --benign benign.jsonl",
            "moved: the base model of these adapters, 'a/base/elsewhere', is neither a folder seen",
        ),
        (
            "--model model --benign benign.jsonl --chat_template none.jinja",
            "none.jinja",
        ),
        ("--model model --benign benign.jsonl --keywords []", "keywords must name at least one"),
        # Nothing is in `bare` that could be loaded: these are told without trying.
        (
            "--model bare --benign benign.jsonl --prefill_depths [0,-1]",
            "prefill_depths must be distinct and not negative, got [0, -1]",
        ),
        (
            "--model bare --benign benign.jsonl --batch_size 0",
            "batch_size must be at least 1, got 0",
        ),
        (
            "--model bare --benign benign.jsonl --max_new_tokens 0",
            "max_new_tokens must be at least 1, got 0",
        ),
        (
            "--model bare --benign benign.jsonl --device cuda:99",
            "device must be auto, cpu or a GPU",
        ),
        (
            "--model bare --benign benign.jsonl --output_dir benign.jsonl",
            "output_dir: benign.jsonl: benign.jsonl is a file, expected a folder",
        ),
    ],
)
def test_a_wrong_call_is_one_sentence_and_leaves_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    Path("bare").mkdir()
    Path("bare/adapter_config.json").write_text(Path("adapters/adapter_config.json").read_text())
    shutil.copytree("adapters", "moved")
    settings = json.loads(Path("moved/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "a/base/elsewhere"
    Path("moved/adapter_config.json").write_text(json.dumps(settings))
    prompts = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, base_model_name_or_path="model"
    )
    prompts.save_pretrained("prompts")
    assert call(arguments.replace("{0}", workplace.name)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("derta")]
    assert len(lines) == 1
    assert re.match(r"derta eval: ", lines[0])
    assert message in lines[0]
    assert not Path("out").exists()


def test_damaged_adapters_are_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = Path("adapters/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert call("--model adapters --benign benign.jsonl") == 1
    assert "derta eval: adapters: its weights are damaged" in capsys.readouterr().err


def test_pickled_weights_are_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    assert call("--model model --benign benign.jsonl") == 1
    assert "safetensors" in capsys.readouterr().err
