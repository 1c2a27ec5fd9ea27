"""The same run on every engine: what its ranks and one process each give."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PrinterCallback

from derta import DertaTrainer
from derta.modeling.adapters import Method, adapt, quantization
from derta.modeling.loading import load_model
from derta.modeling.red_flag import add_flag
from runs import RECORDS, settings
from tiny import tiny_model, tiny_tokenizer

# Steps of four, four and one example: packs are uneven, gradients are summed over several packs,
# and one of two ranks has nothing in the third and sixth step. Packs are not those of one process:
# without so large an epsilon, Adam would magnify the rounding of the smallest gradients.
RUN = dict(
    max_tokens=160,
    max_length=160,
    examples_per_step=4,
    max_steps=6,
    optim="adamw_torch",
    learning_rate=1e-2,
    adam_epsilon=1e-2,
    max_grad_norm=1.0,
)
# Engine, method, model, and preference loss or red flag; the model `tied` has its head in the
# embedding.
SHARDED = [
    ("ddp", "full", "llama"),
    ("fsdp", "full", "llama"),
    ("fsdp", "full", "tied"),
    ("fsdp", "lora", "llama"),
    ("fsdp", "qlora", "llama"),
]
WITH_DEEPSPEED = [
    ("zero2", "full", "llama"),
    ("zero3", "full", "tied"),
    ("zero3", "lora", "llama"),
]
OF_PAIRS = [
    ("ddp", "full", "llama", "dpo"),
    ("fsdp", "full", "tied", "dpo"),
    ("fsdp", "lora", "llama", "dpo"),
    ("fsdp", "full", "llama", "orpo"),
]
# In most steps, one rank of two has all dialogues, and with them the only pass of the reference.
OF_FLAGS = [
    ("ddp", "full", "tied", "red_flag"),
    ("ddp", "lora", "llama", "red_flag"),
]
Case = tuple[str, ...]


def write_models(folder: Path) -> None:
    """Write the models of all cases."""
    for name in ("llama", "tied"):
        # Rows of 4-bit layers are whole blocks of 64.
        widths = dict(hidden_size=64, intermediate_size=64)
        model = tiny_model("llama", **widths, tie_word_embeddings=name == "tied")
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)


def make(folder: Path, case: Case, output: Path, **changes: Any) -> DertaTrainer:
    """Return the trainer of a case."""
    shard, tuned, name, *further = case
    # DeepSpeed takes no probe, which must leave no mark on the others.
    probe = dict(probe=shard in ("ddp", "fsdp"))
    objective: dict[str, Any] = {}
    if further == ["red_flag"]:
        objective = dict(red_flag="auto", refusal="auto", branches=0)
    elif further:  # at a lower rate pairs do not converge: their loss would be all rounding
        objective = dict(preference=further[0], branches=1, learning_rate=1e-3)
    args = settings(output, shard=shard, **{**RUN, **probe, **objective, **changes})
    method = Method(method=tuned, lora_dropout=0.0)
    storage = torch.uint8 if shard == "none" else torch.float32
    model = load_model(
        str(folder / name),
        torch.float32,
        quantization=quantization(method, torch.float32, storage),
        device=args.device,
    )
    if shard == "fsdp" and tuned != "qlora":  # one rank of a machine reads the weights
        read = torch.equal(model.model.norm.weight, weights(folder / name)["model.norm.weight"])
        assert read == (args.process_index == 0)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    flags = [add_flag(model, tokenizer, args.red_flag, args.seed)] if args.red_flag else []
    torch.manual_seed(0)
    trainer = DertaTrainer(
        model=adapt(model, method, flags),
        args=args,
        train_dataset=iter(RECORDS),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(folder: Path, case: Case, output: Path) -> list[dict[str, float]]:
    """Train and save a case; return the figures of its steps."""
    trainer = make(folder, case, output)
    trainer.train()
    trainer.save_model()
    return [row for row in trainer.state.log_history if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a model or of adapters."""
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def main() -> None:
    """Run the cases of one list on this rank, and write what it logs."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    logs = []
    for case in globals()[name]:
        logs.append(run(folder, case, folder / "-".join(case)))
    torch.save(logs, folder / f"{name}-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
