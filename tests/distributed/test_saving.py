"""What several ranks save of a sharded run is what one process saves, and continues bit for bit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import TrainerCallback

from benchmarks.harness.measuring import watch_resident_memory
from derta import DertaTrainer
from derta.cli import main
from derta.manifest import verify
from derta.modeling.adapters import Method, adapt
from derta.modeling.loading import load_model
from derta.modeling.sharded_checkpoint import DESCRIPTION
from ranks import run_ranks
from runs import RECORDS, settings, trainer
from tiny import tiny_model, tiny_tokenizer

# A large epsilon keeps Adam from making much of gradients that are only rounding.
STEPS = dict(max_steps=3, optim="adamw_torch", adam_epsilon=0.1, learning_rate=0.1)
SAVES = dict(save_strategy="steps", save_steps=1, resume="auto")
# The first checkpoint is taken for the best one, and the end of the run is its model.
BEST = dict(
    eval_strategy="steps",
    eval_steps=1,
    load_best_model_at_end=True,
    metric_for_best_model="loss",
    greater_is_better=True,
    save_total_limit=1,
)
WHOLE = {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
# Engine, architecture, method, dtype of the weights, and further settings.
RUNS: dict[str, tuple[str, str, str, torch.dtype, dict[str, Any]]] = {
    "fsdp": ("fsdp", "mixtral", "full", torch.bfloat16, {"bf16": True}),
    "fsdp-whole": ("fsdp", "qwen2", "full", torch.float32, {**WHOLE, **BEST}),
    "fsdp-lora": ("fsdp", "llama", "lora", torch.bfloat16, {"bf16": True, **BEST}),
    "zero2": ("zero2", "qwen2", "full", torch.float32, BEST),
    "zero3": ("zero3", "llama", "full", torch.float32, {"bf16": True}),
    "zero3-lora": ("zero3", "llama", "lora", torch.float32, BEST),
}
ENGINES = [
    "fsdp",
    pytest.param(
        "zero", marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed")
    ),
]


def run_of(
    name: str,
    folder: Path,
    *,
    sharded: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    **changes: Any,
) -> DertaTrainer:
    shard, architecture, method, dtype, further = RUNS[name]
    further = {**STEPS, **further, **changes}
    if sharded:
        further |= {"shard": shard, "ddp_backend": "gloo"}
    else:
        further.pop("fsdp_config", None)
    args = settings(folder, max_tokens=160, max_length=160, **further)  # ZeRO-3 shards what is read
    model = load_model(str(models(folder) / architecture), dtype)
    torch.manual_seed(0)
    return DertaTrainer(
        model=adapt(model, Method(method=method, lora_r=2, lora_dropout=0.0)),
        args=args,
        train_dataset=iter(RECORDS),
        eval_dataset=iter(RECORDS) if "eval_strategy" in further else None,
        processing_class=tiny_tokenizer(),
        callbacks=[*callbacks],
    )


def models(folder: Path) -> Path:
    """Return the folder of the models that all runs begin with."""
    return folder.parents[1] / "models"


def figures(run: DertaTrainer) -> list[dict[str, float]]:
    kept = ("loss", "grad_norm", "eval_loss")
    rows = [{key: row[key] for key in kept if key in row} for row in run.state.log_history]
    return [row for row in rows if row]


class LargeShard(TrainerCallback):
    """Spoils the part that rank 1 has of one weight, after the last step."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == state.max_steps and args.process_index == 1:
            model.model.layers[1].mlp.up_proj.weight.ds_tensor.fill_(float("nan"))


def on_ranks(folder: Path, engine: str) -> None:
    """Train, save, and continue from the first checkpoint; write what was logged."""
    for name in RUNS:
        if not name.startswith(engine):
            continue
        logs = []
        for part in ("unbroken", "resumed"):
            run = run_of(name, folder / name / part, **SAVES)
            if part == "resumed" and run.args.process_index == 0:
                first = "checkpoint-1"
                shutil.copytree(folder / name / "unbroken" / first, folder / name / part / first)
            run.accelerator.wait_for_everyone()
            run.train()
            run.save_model()
            logs.append(figures(run))
        (folder / f"{name}-{run.args.process_index}.json").write_text(json.dumps(logs))
        (folder / name / f"bytes-{run.args.process_index}").write_text(str(run._bytes()))
    if engine == "zero":
        run = run_of("zero3", folder / "zero3" / "poisoned", callbacks=[LargeShard()])
        with pytest.raises(FloatingPointError) as error:
            run.train()
        (folder / f"poisoned-{run.args.process_index}").write_text(str(error.value))


SCRIPT = """
import sys
from pathlib import Path
import test_saving
getattr(test_saving, sys.argv[1])(Path(sys.argv[2]), *sys.argv[3:])
"""


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


def kinds(files: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    return {
        file: {name: (one.dtype, one.shape) for name, one in held.items()}
        for file, held in files.items()
    }


@pytest.mark.promise("Two ranks continue a run bit for bit, with sharded checkpoints too.")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sharded_run_saves_what_one_process_saves(engine: str, tmp_path: Path) -> None:
    for architecture in ("llama", "mixtral", "qwen2"):
        tiny_model(architecture).save_pretrained(tmp_path / "models" / architecture)
    run_ranks(SCRIPT, "on_ranks", tmp_path, engine)
    for name in RUNS:
        if not name.startswith(engine):
            continue
        unbroken, resumed, alone = (tmp_path / name / one for one in ("unbroken", "resumed", "one"))
        one = run_of(name, alone, sharded=False, **SAVES)
        one.train()
        one.save_model()
        precise = not one.args.bf16
        logs = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        expected = [pytest.approx(row, rel=1e-5 if precise else 0.02) for row in figures(one)]
        for ours, again in logs:
            assert ours == again, name
            assert ours == expected, name
        saved, wanted = tensors(unbroken), tensors(alone)
        assert kinds(saved) == kinds(wanted), name
        for file, held in wanted.items():
            for key, value in held.items():
                error = (saved[file][key] - value).abs().max()
                assert error <= (1e-6 if precise else 0.02), (name, key)
        for file in saved:
            assert (unbroken / file).read_bytes() == (resumed / file).read_bytes()
        for file in ("config.json", "generation_config.json"):
            if (alone / file).exists():
                assert (unbroken / file).read_text() == (alone / file).read_text()
        for path in (unbroken, *unbroken.glob("checkpoint-*")):
            verify(path)
        assert not list(tmp_path.rglob("*.unfinished"))
        count = sum(one.numel() for held in saved.values() for one in held.values())
        # Weights and two states of Adam, in float32; DeepSpeed's passes may be in bfloat16.
        needed = count * (10 if name == "zero3" else 12)
        for rank in range(2):
            told = int((tmp_path / name / f"bytes-{rank}").read_text())
            assert told == pytest.approx(needed, rel=1e-2), name
        kept = 2 if one.args.save_total_limit else 3
        assert len(list(unbroken.glob("checkpoint-*"))) == kept
        if "lora" in name:
            # None of it holds the model beneath the adapters.
            model = tmp_path / "models" / "llama" / "model.safetensors"
            for path in unbroken.rglob("*"):
                if path.name == DESCRIPTION:
                    described = dcp.FileSystemReader(path.parent).read_metadata()
                    for key, kind in described.state_dict_metadata.items():
                        assert "lora_" in key or not isinstance(kind, TensorStorageMetadata), key
                elif path.suffix != ".distcp":
                    assert path.stat().st_size < model.stat().st_size, path
    if engine == "zero":
        for rank in range(2):
            assert (tmp_path / f"poisoned-{rank}").read_text() == (
                "the norm of model.layers.1.mlp.up_proj.weight is not finite after step 3; nothing "
                "of it was saved"
            )
    if engine == "fsdp":
        merged = tmp_path / "merged"
        shards = tmp_path / "fsdp" / "unbroken"
        assert main(["merge", str(shards / "checkpoint-3"), "--output_dir", str(merged)]) == 0
        for file in ("model.safetensors", "config.json", "generation_config.json"):
            assert (merged / file).read_bytes() == (shards / file).read_bytes()


def test_the_first_version_of_fsdp_is_refused_before_training(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="expected version: 2, got the first version of FSDP"):
        run.train()


def measure(folder: Path, engine: str) -> None:
    """Save a model of 140 MB after a step; write the MiB that this took of the host's memory."""
    model = tiny_model(
        "llama",
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    run = trainer(folder, model, shard=engine, ddp_backend="gloo", max_length=160, max_tokens=160)
    run.train()
    took_mib = watch_resident_memory()
    run.save_model()
    (folder / f"took-{run.args.process_index}").write_text(str(took_mib()))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "engine",
    [
        "fsdp",
        pytest.param("zero3", marks=ENGINES[1].marks),  # type: ignore[attr-defined]
    ],
)
def test_no_rank_holds_the_model_that_is_saved(engine: str, tmp_path: Path) -> None:
    """Each holds four weights of 4 MiB at most: the one before, gathered, whole, and written."""
    # What is freed goes back to the system, else the peak is that of the allocator's free lists.
    run_ranks(SCRIPT, "measure", tmp_path, engine, MALLOC_MMAP_THRESHOLD_="65536")
    size = (tmp_path / "model.safetensors").stat().st_size
    for rank in range(2):
        took_mib = float((tmp_path / f"took-{rank}").read_text())
        print(f"{engine}, rank {rank}: {took_mib:.0f} MiB to save {size / 2**20:.0f} MiB")
        assert took_mib < 5 * 4
