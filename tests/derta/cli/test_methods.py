"""Adapters from training to a plain model: `train` with `lora` and `qlora`, `merge`, `chat`."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from derta.cli import main
from derta.cli.train import TrainConfig, load_model
from derta.data import Source, read_records
from derta.modeling.loading import load_tuned
from derta.training.trainer import DertaTrainer
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
try:
    import bitsandbytes as _  # noqa: F401
except ImportError as error:
    NO_BITSANDBYTES: str | None = f"bitsandbytes: {error}"
else:
    NO_BITSANDBYTES = None
QLORA = pytest.param(
    "qlora", marks=pytest.mark.skipif(NO_BITSANDBYTES is not None, reason=str(NO_BITSANDBYTES))
)


BOTH = "[{path: rows.jsonl, role: safety}, {path: chats.jsonl, role: helpful}]"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a model wide enough for 4-bit blocks, triples and a dialogue."""
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    rows = [
        {"prompt": "How?", "safe": "Sorry, no.", "harmful": "Step one, step two. " * words}
        for words in (2, 6, 4)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chat = {"messages": [{"role": r, "content": "Hello."} for r in ("user", "assistant")]}
    Path("chats.jsonl").write_text(json.dumps(chat) + "\n", encoding="utf-8")
    return tmp_path


def train(*arguments: str) -> int:
    given = {
        "--model": "model",
        "--sources": "{path: rows.jsonl, role: safety}",
        "--output_dir": "out",
        "--max_steps": "2",
        "--logging_steps": "1",
        "--save_strategy": "no",
        "--lora_r": "4",
        "--learning_rate": "0.01",
    }
    options = [part for pair in given.items() for part in pair]
    return main(["train", *options, "--use_cpu", *arguments])


def hidden_states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None], output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize(
    "options",
    [
        ("lora",),
        ("lora", "--lora_dora"),
        ("lora", "--lora_modules_to_save", "embed_tokens"),
        ("lora", "--red_flag", "auto", "--sources", BOTH),
        QLORA,
    ],
    ids=str,
)
def test_adapters_become_a_plain_model(options: tuple[str, ...] | str) -> None:
    method = (options,) if isinstance(options, str) else options
    assert train("--method", *method) == 0
    assert main(["merge", "out", "--output_dir", "merged", "--dtype", "float32"]) == 0
    names = set(load_file("merged/model.safetensors"))
    assert names == set(load_file("model/model.safetensors"))
    merged = AutoModelForCausalLM.from_pretrained("merged", use_safetensors=True)
    adapted, _ = load_tuned(Path("out"), torch.float32, None)
    base = AutoModelForCausalLM.from_pretrained("model")
    tuned = hidden_states(merged)
    assert torch.allclose(tuned, hidden_states(adapted), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tuned, hidden_states(base), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["lora", QLORA])
def test_a_frozen_head_has_neither_gradient_nor_buffer(method: str) -> None:
    config = TrainConfig(
        model="model",
        sources=[Source(path="rows.jsonl", role="safety")],
        output_dir="out",
        method=method,  # type: ignore[arg-type]
        use_cpu=True,
        dtype="bfloat16",
        lora_r=2,
        max_steps=1,
    )
    model: Any = load_model(config, tiny_tokenizer())
    head = model.get_output_embeddings()
    assert type(head) is torch.nn.Linear
    assert head.weight.dtype == torch.bfloat16 and not head.weight.requires_grad
    DertaTrainer(
        model=model,
        args=config,
        train_dataset=list(read_records("rows.jsonl", role="safety")),
        processing_class=tiny_tokenizer(),
    ).train()
    assert head.weight.grad is None and not head._buffers
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert all("lora_" in name for name in trained)


@pytest.mark.skipif(NO_BITSANDBYTES is not None, reason=str(NO_BITSANDBYTES))
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(("width", "inner"), [(32, 128), (40, 64), (64, 128)])
def test_qlora_trains_models_of_any_size_on_any_cpu(
    width: int, inner: int, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train and evaluate in turn, with and without weights that bitsandbytes packs."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: packs)
    tiny_model("llama", hidden_size=width, intermediate_size=inner).save_pretrained("model")
    evaluations = ("--eval_sources", "{path: rows.jsonl, role: safety}", "--eval_strategy", "steps")
    assert train("--method", "qlora", *evaluations, "--eval_steps", "1") == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    losses = [row[key] for row in history for key in ("loss", "eval_loss") if key in row]
    assert len(losses) == 4 and all(map(math.isfinite, losses))


def test_a_missing_bitsandbytes_is_reported_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("derta.modeling.adapters.find_spec", lambda name: None)
    assert train("--method", "qlora") == 1
    assert "method: qlora needs bitsandbytes: pip install 'derta[qlora]'" in capsys.readouterr().err


def test_an_adapter_on_the_head_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--method", "lora", "--lora_target_modules", "lm_head") == 1
    assert "has an adapter on its head" in capsys.readouterr().err


def final_weights(*arguments: str) -> dict[str, torch.Tensor]:
    assert train("--method", "lora", "--overwrite", *arguments) == 0
    return load_file("out/adapter_model.safetensors")


def test_a_probe_runs_the_largest_pack_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = ("--max_tokens", "80", "--examples_per_step", "1", "--lora_dropout", "0.3")
    plain = final_weights(*packs)
    capsys.readouterr()
    probed = final_weights(*packs, "--probe")
    assert all(torch.equal(plain[name], probed[name]) for name in plain)
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    tokens = history[0]["probe_tokens"]
    assert f"probe: the largest pack fits, {tokens} tokens" in capsys.readouterr().out
    assert all(row["step"] == 0 for row in history if "probe_tokens" in row)
    assert tokens > 40


@pytest.mark.parametrize("options", [(), ("--probe",)], ids=str)
def test_running_out_of_memory_ends_with_the_plan(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    allocate: Callable[..., Any] = lambda *_: torch.empty(2**46)  # noqa: E731
    monkeypatch.setattr(DertaTrainer, "_probe" if options else "_pack_loss", allocate)
    assert train(*options) == 1
    message = capsys.readouterr().err
    assert "derta train: out of memory; a step with packs of " in message
    for said in ("weights", "optimizer", "the longest pack", "gradient_checkpointing: true"):
        assert said in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--output_dir", "new"], "model: holds a whole model already, there is nothing"),
        ([".", "--output_dir", "new"], ".: nothing to merge, expected adapter_config.json or"),
        (["model", "--output_dir", "model"], "output_dir: model is not empty, choose another"),
        (["model", "--output_dir", "rows.jsonl"], "output_dir: rows.jsonl: rows.jsonl is a file"),
    ],
)
def test_impossible_merges_are_refused_with_the_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", *arguments]) == 1
    assert f"derta merge: {message}" in capsys.readouterr().err


def test_a_chat_answers_line_by_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("How?\n\nAnd then?\n/new\nHow?\n"))
    arguments = ["--max_new_tokens", "4", "--prefill", "Sure, here is", "--device", "cpu"]
    assert main(["chat", "model", *arguments]) == 0
    first, then, again = capsys.readouterr().out.splitlines()
    assert first == again
    assert all(answer.startswith("Sure, here is") for answer in (first, then))
    assert main(["chat", "nowhere"]) == 1
    assert "nowhere: no such model folder" in capsys.readouterr().err


def test_a_command_prints_no_warnings_of_imported_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "derta", "chat", "model", "--device", "cpu"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )
    assert done.returncode == 0
    for said in ("torchao", "bitsandbytes", "deprecated", "Warning"):
        assert said not in done.stderr
