"""`derta train`: a seed decides the model, and a folder holds the model of one run only."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer
from transformers.trainer_utils import TrainOutput

from derta.cli import main
from derta.cli.train import TrainConfig, describe_shares, load_model
from derta.data import Source
from derta.objectives.derta import DertaObjective
from derta.objectives.unlikelihood import UnlikelihoodObjective
from derta.training.config import WATCHED
from derta.training.metrics import figure_names
from derta.training.trainer import DertaTrainer
from runs import poison
from tiny import tiny_model, tiny_tokenizer

LORA = ("--method", "lora", "--lora_r", "2")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a model and a file of triples."""
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


def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """The errors of a run that ends before it loads its model."""
    monkeypatch.delattr("derta.cli.train.load_model")
    assert train(*arguments) == 1
    return capsys.readouterr().err


def test_a_terminated_run_leaves_no_temporary_file(workplace: Path) -> None:
    temporary = workplace / "temporary"
    temporary.mkdir()
    sources = ["--sources", "{path: rows.jsonl, role: safety}", "--refusal", "Sorry"]
    options = ["--model", "model", *sources, "--output_dir", "out", "--max_steps", "1000000"]
    run = subprocess.Popen(
        [sys.executable, "-m", "derta", "train", *options, "--use_cpu", "--disable_tqdm", "true"],
        env=os.environ
        | {
            "TMPDIR": str(temporary),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONUNBUFFERED": "1",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    with run.stdout as said:  # of the training: all is encoded
        assert any("examples" in line for line in said)
        assert list(temporary.glob(".derta-examples-*/examples.arrow"))
        run.terminate()
        assert run.wait() == 128 + signal.SIGTERM
    assert not list(temporary.glob(".derta-*"))


def weights(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir() if re.match("model|adapter", path.name)}


def test_the_seed_decides_the_adapters() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        config = TrainConfig(
            model="model",
            sources=[Source(path="rows.jsonl", role="safety")],
            output_dir="out",
            method="lora",
            seed=seed,
            use_cpu=True,
        )
        parameters = load_model(config, tiny_tokenizer()).named_parameters()
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


def test_a_new_model_replaces_the_former_one_and_no_other_file() -> None:
    keep = ["out/notes.md", "out/model-card.txt", "out/adapter_notes.txt", "out/checkpoint-7/model"]
    for path in keep:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("mine")
    assert train(*LORA) == 0
    assert weights("out") >= {"adapter_config.json", "adapter_model.safetensors"}
    assert train() == 1
    assert weights("out") >= {"adapter_config.json", "adapter_model.safetensors"}
    shards = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    for name in shards:
        Path("out", name).write_text("of a larger model")
    assert train("--overwrite") == 0
    mine = {Path(path).name for path in keep}
    assert weights("out") - mine == {"model.safetensors"}
    AutoModelForCausalLM.from_pretrained("out", use_safetensors=True)
    assert train(*LORA, "--overwrite") == 0
    assert weights("out") - mine == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(Path(path).read_text() == "mine" for path in keep)
    assert not list(Path("out").glob(".*"))


def test_an_interrupted_save_neither_removes_nor_mixes_models(
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
        assert train("--overwrite") == 130
    assert {name: Path("out", name).read_bytes() for name in weights("out")} == former
    assert train("--overwrite") == 0
    assert weights("out") == {"model.safetensors"}
    assert not list(Path("out").glob(".*"))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((), set()),
        (("--save_strategy", "steps", "--save_steps", "1"), {"checkpoint-1", "checkpoint-2"}),
    ],
)
def test_a_gradient_that_is_not_finite_leaves_no_model(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    kept: set[str],
) -> None:
    """Cover the last step too, which no later loss would show."""
    begin = DertaTrainer.train

    def poisoned(self: DertaTrainer, **arguments: Any) -> TrainOutput:
        poison(self.model, 2)
        return begin(self, **arguments)

    monkeypatch.setattr(DertaTrainer, "train", poisoned)
    assert train("--max_steps", "3", *options) == 1
    assert {path.name for path in Path("out").glob("*")} == kept
    said = capsys.readouterr().err
    where = r"is not finite at step 3 in the pack of examples rows.jsonl:\d, rows.jsonl:\d"
    message = rf"derta train: the gradient norm of .* {where}; nothing of it was saved"
    assert re.fullmatch(message, said.splitlines()[-1])
    assert said.count("derta train:") == 1 and "Traceback" not in said


def test_a_run_first_prints_the_tokens_that_one_pass_saves(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="derta.training.trainer")
    assert train() == 0
    said = re.search(
        r"one pass: ([\d,]+) tokens an epoch, ([\d.]+) x fewer than the ([\d,]+) of",
        capsys.readouterr().out,
    )
    assert said is not None
    one_pass, apart = (int(said[group].replace(",", "")) for group in (1, 3))
    assert one_pass < apart and said[2] == f"{apart / one_pass:.2f}"
    assert said[0] in caplog.text


def test_a_run_first_prints_the_share_of_each_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say = {"role": "assistant", "content": "A brush."}
    for name in "ab":
        row = {"messages": [{"role": "user", "content": "What?"}, say], "id": name}
        Path(f"{name}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    sources = "[{path: a.jsonl, role: helpful}, {path: b.jsonl, role: borderline, weight: 3}]"
    refusals = ["--refusal_tokens", "[Sorry, 7]"]
    assert train("--sources", sources, *refusals, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "\nrefusal tokens 'Sorry' (id" in f"\n{said}" and "; refusal tokens '$', 'Sorry'" in said
    assert "  b  next token  75.0%   RTO   0.0%\n  a  next token  25.0%   RTO   0.0%\n" in said


def test_many_sources_share_the_last_row_of_the_table() -> None:
    shares = {f"{n}": {"mle": 0.2, "rto": 0.05} for n in range(4)}
    table = describe_shares(shares, DertaObjective().terms, rows=2).splitlines()
    assert len(table) == 4
    assert table[-1].split() == ["2", "others", "next", "token", "40.0%", "RTO", "10.0%"]


def test_the_checkpoint_with_the_best_trade_off_is_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Let attack success fall to 0 and stay there: the first checkpoint with 0 is the best."""
    say = {"role": "assistant", "content": "A brush."}
    row = {"messages": [{"role": "user", "content": "What paints?"}, say]}
    Path("helpful.jsonl").write_text(json.dumps(row), encoding="utf-8")
    both = "[{path: rows.jsonl, role: safety}, {path: helpful.jsonl, role: helpful}]"
    watching = {
        "--sources": both,
        "--eval_sources": both,
        "--over_refusal_weight": "0",
        "--metric_for_best_model": "trade_off",
        "--load_best_model_at_end": "true",
        "--early_stopping_patience": "2",
        "--eval_strategy": "steps",
        "--save_strategy": "steps",
        "--eval_steps": "2",
        "--save_steps": "2",
        "--max_steps": "40",
        "--learning_rate": "1e-2",
    }
    assert train(*(part for pair in watching.items() for part in pair)) == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    trade_offs = {row["step"]: row["eval_trade_off"] for row in history if "eval_asr" in row}
    best = min(trade_offs, key=lambda step: (trade_offs[step], step))
    assert trade_offs[best] == 0 < trade_offs[2]
    said = capsys.readouterr().out
    pattern = r"step +2  held out:  loss \S+  attack success 1.0000  over-refusal \S+  trade-off 1."
    assert re.search(pattern, said)
    assert re.search(r"last  0\.\d\d harmless  lr", said)
    last = max(trade_offs)
    assert last == best + 4 < 40  # two evaluations that were no better
    figure = f"the best by trade_off, {trade_offs[best]:.4f}"
    assert said.splitlines()[-1] == (
        f"tuned model: out, stopped at step {last} of 40, of step {best}: {figure}"
    )
    left, *others = (
        load_file(f"{folder}/model.safetensors")
        for folder in ("out", f"out/checkpoint-{best}", f"out/checkpoint-{last}")
    )
    assert all(torch.equal(left[name], value) for name, value in others[0].items())
    assert any(not torch.equal(left[name], value) for name, value in others[1].items())


def test_the_training_log_is_written_beside_the_model() -> None:
    assert train("--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1") == 0
    assert train("--max_steps", "1", "--overwrite") == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1]
    assert not list(Path("out").glob("checkpoint-*"))


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
def test_an_unusable_output_folder_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert refusal(monkeypatch, capsys, *arguments).startswith(f"derta train: {message}")


def test_lengths_beyond_the_context_are_refused_with_the_remedy(
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


# Modules of transformers that may ask for GaLore, by version.
HOMES = ("transformers.trainer", "transformers.trainer_optimizer")


class GaLore(torch.optim.SGD):
    """A stand-in for the package's optimizers: groups of parameters with keys of its own."""

    def __init__(self, params: Any, lr: float, **rest: Any) -> None:
        super().__init__(params, lr)


HELD_OUT = ("--eval_sources", "{path: rows.jsonl, role: safety}", "--eval_strategy", "epoch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head_impl", "x"], "head_impl: impl must be one of auto, reference, torch, native"),
        (["--attention_impl", "x"], "attention_impl: impl must be one of auto, reference, sdpa"),
        (["--optim_args", "a"], "optim_args: 'a': not enough values to unpack (expected 2, got 1)"),
        (["--torch_compile_mode", "x"], "torch_compile: True, torch_compile_mode: 'x': Unrecogni"),
    ],
)
def test_what_the_run_would_be_refused_is_named_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    said = refusal(monkeypatch, capsys, *arguments)
    assert said.splitlines()[-1].startswith(f"derta train: {message}")
    assert not Path("out").exists()


def test_modules_for_galore_must_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = dict.fromkeys(("GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit"), GaLore)
    monkeypatch.setitem(sys.modules, "galore_torch", SimpleNamespace(**kinds))
    for module in filter(None, map(sys.modules.get, HOMES)):
        if hasattr(module, "is_galore_torch_available"):
            monkeypatch.setattr(module, "is_galore_torch_available", lambda: True)
    galore = ("--overwrite", "--optim", "galore_adamw", "--optim_target_modules")
    assert train(*galore, "[q_proj]") == 0
    monkeypatch.delattr("derta.cli.train.load_model")
    assert train(*galore, "[nope]") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("derta train: optim_target_modules: ['nope']: No target modules found")


def test_a_metric_without_targets_is_named_at_the_first_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(*HELD_OUT, "--metric_for_best_model", "benign_refusal_p") == 1
    said = "metric_for_best_model: benign_refusal_p has no target in the evaluation records, which"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"derta train: {said} give mle_loss")


def test_every_figure_of_an_evaluation_may_choose_the_best_checkpoint() -> None:
    assert train(*HELD_OUT, "--unlikelihood_weight", "1") == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    found = {name for row in history for name in row if name.startswith("eval_")}
    timed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    objective = UnlikelihoodObjective(unlikelihood_weight=1.0)
    known = {"loss", *figure_names(objective), *WATCHED}
    assert {name.removeprefix("eval_") for name in found - timed} <= known
