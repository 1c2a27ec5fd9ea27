"""Training runs of tiny models on a few records, and what makes them fail."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from derta import DertaConfig, DertaTrainer, Dialogue, Triple
from derta.data import Record
from tiny import tiny_model, tiny_tokenizer

RECORDS: list[Record] = [
    Triple(
        prompt=f"How do I paint the {colour} fence?",
        harmful="Sure, here is how: " + "step one, take the ladder. " * (1 + index % 4),
        safe="Sorry, I cannot help with that.",
        id=f"triple-{index}",
        weight=0.5 + index % 3,
    )
    for index, colour in enumerate(["green", "brown", "quiet", "seven", "lazy", "quick"])
] + [
    Dialogue(
        messages=[
            {"role": "user", "content": "What does the fox do?"},
            {"role": "assistant", "content": "The quick brown fox jumps. " * (index + 1)},
        ],
        id=f"dialogue-{index}",
        borderline=index == 2,
        weight=0.25 * (1 + index),
    )
    for index in range(3)
]


def settings(directory: Path, **changes: object) -> DertaConfig:
    return DertaConfig(
        **{
            "output_dir": str(directory),
            "refusal": "Sorry",
            "branches": 2,
            "max_length": 256,
            "max_tokens": 4096,
            "examples_per_step": len(RECORDS),
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "weight_decay": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
    )


def trainer(
    directory: Path,
    model: PreTrainedModel | None = None,
    records: list[Record] = RECORDS,
    **changes: object,
) -> DertaTrainer:
    return DertaTrainer(
        model=model or tiny_model("llama", dtype=torch.float64),
        args=settings(directory, **changes),
        train_dataset=iter(records),
        processing_class=tiny_tokenizer(),
    )


def poison(
    model: PreTrainedModel, *packs: int, loss: bool = False, column: int | slice = slice(None)
) -> PreTrainedModel:
    """Makes gradients NaN from those of the packs that are run from now on; or losses too.

    The gradient is that of the last norm's output, in all columns or one.
    """
    count = itertools.count()

    def spoil(norm: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if output.requires_grad and next(count) in packs:
            if loss:
                return output * float("nan")
            output.register_hook(spoiled)
        return output

    def spoiled(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[..., column] = float("nan")
        return gradient

    model.model.norm.register_forward_hook(spoil)
    return model
