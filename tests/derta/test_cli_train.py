"""`derta train`: one seed makes one model, and a folder holds the model of one run alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer

from derta.cli import main
from derta.cli.train import Config, load_model
from derta.data import Source
from derta.trainer import DertaTrainer
from tiny import tiny_model, tiny_tokenizer

LORA = ("--method", "lora", "--lora_r", "2")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a file of triples."""
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    row = {"prompt": "How?", "safe": "Sorry, no.", "harmful": "Step one, step two. " * 6}
    Path("rows.jsonl").write_text((json.dumps(row) + "\n") * 2, encoding="utf-8")
    return tmp_path


def train(*arguments: str) -> int:
    given = {
        "--model": "model",
        "--sources": "{path: rows.jsonl, role: safety}",
        "--output_dir": "out",
        "--max_steps": "1",
        "--logging_steps": "1",
        "--save_strategy": "no",
    }
    options = [part for pair in given.items() for part in pair]
    return main(["train", *options, "--use_cpu", *arguments])


def weights(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir() if re.match("model|adapter", path.name)}


def test_adapters_are_those_of_the_seed() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        config = Config(
            model="model",
            sources=[Source(path="rows.jsonl", role="safety")],
            output_dir="out",
            method="lora",
            seed=seed,
            use_cpu=True,
        )
        parameters = load_model(config).named_parameters()
        return {name: value for name, value in parameters if "lora_A" in name}

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert first
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name


def test_adapters_find_their_base_from_any_folder(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(*LORA, "--save_strategy", "steps", "--save_steps", "1") == 0
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for folder in ("out", "out/checkpoint-1"):
        record = json.loads((workplace / folder / "adapter_config.json").read_text())
        assert record["base_model_name_or_path"] == str(workplace / "model")
        base = AutoModelForCausalLM.from_pretrained(record["base_model_name_or_path"])
        PeftModel.from_pretrained(base, workplace / folder)


def test_a_folder_holds_the_model_of_its_last_run_and_what_is_not_a_model_stays() -> None:
    keep = ["out/notes.md", "out/model-card.txt", "out/adapter_notes.txt", "out/checkpoint-7/model"]
    for path in keep:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("mine")
    assert train(*LORA) == 0
    assert weights("out") >= {"adapter_config.json", "adapter_model.safetensors"}
    shards = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    for name in shards:
        Path("out", name).write_text("of a larger model")
    assert train() == 0
    mine = {Path(path).name for path in keep}
    assert weights("out") - mine == {"model.safetensors"}
    AutoModelForCausalLM.from_pretrained("out", use_safetensors=True)
    assert train(*LORA) == 0
    assert weights("out") - mine == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(Path(path).read_text() == "mine" for path in keep)
    assert not Path("out/unfinished").exists()


def test_an_interrupted_save_costs_no_model_and_never_becomes_part_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert train(*LORA) == 0
    former = {name: Path("out", name).read_bytes() for name in weights("out")}
    save = Trainer._save

    def breaks_off(self: DertaTrainer, output_dir: str, *rest: Any) -> None:
        save(self, output_dir, *rest)
        Path(output_dir, "model-00001-of-00002.safetensors").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", breaks_off)
        assert train() == 130
    assert {name: Path("out", name).read_bytes() for name in weights("out")} == former
    assert train() == 0
    assert weights("out") == {"model.safetensors"}
    assert not Path("out/unfinished").exists()


def test_a_run_begins_with_the_tokens_that_one_pass_saves(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="derta.trainer")
    assert train() == 0
    said = re.search(
        r"one pass: ([\d,]+) tokens an epoch, ([\d.]+) x fewer than the ([\d,]+) of",
        capsys.readouterr().out,
    )
    assert said is not None
    one_pass, apart = (int(said[group].replace(",", "")) for group in (1, 3))
    assert one_pass < apart and said[2] == f"{apart / one_pass:.2f}"
    assert said[0] in caplog.text


def test_the_record_of_the_training_lies_beside_its_model() -> None:
    assert train("--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1") == 0
    assert train("--max_steps", "1") == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1]
    assert Path("out/checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "rows.jsonl"], "output_dir: rows.jsonl: rows.jsonl is a file, expected"),
        (
            ["--output_dir", "rows.jsonl/a/b"],
            "output_dir: rows.jsonl/a/b: rows.jsonl is a file, expected a folder",
        ),
        (
            [*LORA, "--output_dir", "./model/"],
            "output_dir: ./model/ holds the model that the adapters are for, choose another folder",
        ),
    ],
)
def test_a_folder_that_cannot_take_the_model_is_refused_before_one_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.delattr("derta.cli.train.load_model")
    assert train(*arguments) == 1
    assert capsys.readouterr().err.startswith(f"derta train: {message}")


def test_what_exceeds_the_context_is_refused_with_the_way_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_model("llama", max_position_embeddings=48).save_pretrained("model")
    assert train() == 1
    message = capsys.readouterr().err.splitlines()[-1]
    way_out = re.fullmatch(
        r"derta train: rows.jsonl:1: its \d\d+ tokens exceed the model's context of 48: "
        r"(--max_length 48) cuts or skips what is longer",
        message,
    )
    assert way_out
    assert train(*way_out[1].split()) == 0
