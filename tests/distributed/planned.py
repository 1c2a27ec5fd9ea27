"""The memory that a rank's tensors take at most in a step, as torch's allocator hands it out."""

from __future__ import annotations

import gc
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from derta import DertaTrainer, Triple
from derta.modeling.adapters import Method, adapt
from runs import settings
from tiny import tiny_tokenizer

SIZES: dict[str, Any] = dict(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
TOKENS = 512
STEPS = 4  # ZeRO-3 learns the order of modules in the first ones
MEASURED = 2  # of the last steps
# Settings of runs whose weights, beside activations, take most of the memory.
CASES: dict[str, dict[str, Any]] = {
    "ddp": dict(shard="ddp"),
    "fsdp": dict(shard="fsdp"),
    "fsdp, bfloat16": dict(shard="fsdp", bf16=True),
    "fsdp, lora": dict(shard="fsdp", method="lora", gradient_checkpointing=True),
    "zero3": dict(shard="zero3"),
}
MARK = "a boundary of a measured step"


class Marks(TrainerCallback):
    """Marks the beginning and the end of the last steps."""

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= STEPS - MEASURED:
            mark()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > STEPS - MEASURED:
            mark()


def mark() -> None:
    with record_function(MARK):
        pass


class Done:
    """A transfer that is over."""

    def wait(self, *_: Any, **__: Any) -> bool:
        return True


def speak_through_files(folder: Path) -> None:
    """Let ranks gather and reduce by files: gloo copies tensors, and keeps some for a while."""
    calls = itertools.count()

    def shared(tensor: Tensor) -> list[np.ndarray]:
        number = next(calls) % 4
        own = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        own.tofile(folder / f"{number}-{dist.get_rank()}")
        dist.barrier()
        return [
            np.memmap(folder / f"{number}-{rank}", dtype=np.uint8, mode="r")[: own.nbytes]
            for rank in range(dist.get_world_size())
        ]

    def gather(
        output_tensor: Tensor, input_tensor: Tensor, *_: Any, async_op: bool = False, **__: Any
    ) -> Any:
        np.concatenate(shared(input_tensor), out=output_tensor.view(-1).view(torch.uint8).numpy())
        return Done() if async_op else None

    def reduce(
        output: Tensor, input: Tensor, op: Any = None, *_: Any, async_op: bool = False, **__: Any
    ) -> Any:
        assert output.dtype == torch.float32
        parts = [part.view(np.float32).reshape(dist.get_world_size(), -1) for part in shared(input)]
        total = sum(part[dist.get_rank()] for part in parts)
        output.view(-1).numpy()[:] = total / (len(parts) if op == dist.ReduceOp.AVG else 1)
        return Done() if async_op else None

    # The second of each pair is the name since torch 2.13.
    dist.all_gather_into_tensor = dist.all_gather_single = gather
    dist.reduce_scatter_tensor = dist.reduce_scatter_single = reduce


def peak_of_a_step(folder: Path, case: dict[str, Any]) -> dict[str, float]:
    """Train; return the most bytes alive in a step, its longest pack and its live rows.

    It is that of the last steps with fewer bytes: the threads of gloo, through which DDP reduces,
    now and then keep a bucket for a while.
    """
    changes = dict(case)
    method = Method(method=changes.pop("method", "full"))
    records = [
        Triple(
            prompt=f"How do I paint fence {number}?",
            harmful="step one, take the ladder. " * (TOKENS // 8),
            safe="Sorry, no.",
            id=str(number),
        )
        for number in range(4 * STEPS)  # two packs for each rank and step
    ]
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
        args = settings(
            folder,
            branches=1,
            max_length=TOKENS,
            max_tokens=TOKENS,
            examples_per_step=4,
            max_steps=STEPS,
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            max_grad_norm=1.0,
            **changes,
        )
        trainer = DertaTrainer(
            model=adapt(model, method),
            args=args,
            train_dataset=records,
            processing_class=tiny_tokenizer(),
            callbacks=[Marks()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    events = record.profiler.kineto_results.events()
    marks = sorted(event.start_ns() for event in events if event.name() == MARK)
    assert len(marks) == 2 * MEASURED
    changed = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = list(itertools.accumulate(size for _, size in changed))
    peaks = [
        max(size for (time, _), size in zip(changed, alive, strict=True) if begin <= time <= end)
        for begin, end in zip(marks[::2], marks[1::2], strict=True)
    ]
    packs = trainer.train_dataset[STEPS - 1]
    live = [
        (pack.columns["rto_mask"] | (pack.columns["shift_labels"] != -100)).float().mean().item()
        for pack in packs
    ]
    return {
        "peak": min(peaks),
        "packs": len(packs),
        "tokens": max(pack.input_ids.shape[1] for pack in packs),
        "live": max(live),
    }


def main() -> None:
    """Run the named cases on this rank, and write what they took."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    (folder / "shared").mkdir(exist_ok=True)
    speak_through_files(folder / "shared")
    taken = {name: peak_of_a_step(folder / name, CASES[name]) for name in names}
    torch.save(taken, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
