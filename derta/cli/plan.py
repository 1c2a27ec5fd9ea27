"""`derta plan`: what a training step takes of a GPU, the longest pack that fits, what to set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.utils import logging

from derta.memory.optimizer import STATE_BYTES
from derta.memory.plan import GIB, Triples, describe
from derta.memory.probe import probe
from derta.memory.step import make_step
from derta.modeling.adapters import Method
from derta.modeling.introspection import context_of
from derta.modeling.loading import find_device, loading
from derta.training.config import RECIPES, check_planned


@dataclass(kw_only=True)
class PlanConfig(Method):
    """What decides how much memory a step takes: `Method`, and keys of `DertaConfig`.

    Args:
        model: model folder, its config.json, or a name on the model hub; no weights are read.
        gpu: memory of the GPU, in GiB: what is called a 24 GB card has 24.
        dtype, bf16, optim, gradient_checkpointing, offload_checkpoints, mlp_tile, use_liger_kernel,
        max_tokens, branches, rto_keep: as in training.
        prompt_tokens, safe_tokens: of a triple, on average.
        probe: whether one such pack is then run, forward and backward, by a model of that shape
            with random weights: on the GPU if there is one, with what it took at its peak.

    Raises:
        ValueError: a number is out of its range, or Liger is to be planned with and not installed.
    """

    model: str
    gpu: float
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    bf16: bool = False
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    offload_checkpoints: bool = False
    mlp_tile: int | None = None
    use_liger_kernel: bool = False
    max_tokens: int = 4096
    branches: int = 1
    rto_keep: float = 1.0
    prompt_tokens: int = Triples.prompt
    safe_tokens: int = Triples.safe
    probe: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gpu > 0:
            raise ValueError(f"gpu must be the memory of a GPU in GiB, got {self.gpu}")
        for name in ("prompt_tokens", "safe_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_planned(self)
        if self.optim not in STATE_BYTES:
            raise ValueError(
                f"optim: nothing is known of {self.optim!r}, expected one of "
                f"{', '.join(STATE_BYTES)}"
            )
        if self.offload_checkpoints and not self.gradient_checkpointing:
            raise ValueError("offload_checkpoints needs gradient_checkpointing: true")

    @property
    def triples(self) -> Triples:
        """What packs are made of."""
        return Triples(self.branches, self.rto_keep, self.prompt_tokens, self.safe_tokens)


def of_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a training run's configuration says of its memory."""
    from derta.cli import train

    values = {**RECIPES.get(str(values.get("recipe")), {}), **values}
    ours = {field.name for field in fields(PlanConfig)} - {
        "probe"
    }  # there it precedes the training
    theirs = {field.name for field in fields(train.TrainConfig)}
    return {key: value for key, value in values.items() if key in ours or key not in theirs}


def run(config: PlanConfig) -> None:
    """Prints the plan.

    Raises:
        OSError: there is no such model.
        ValueError: its config is not one of a causal language model, max_tokens or the model's
            context have no room for a triple, or the probe asks for what is not installed.
        MemoryError: the probe does not fit the device.
    """
    logging.set_verbosity_error()
    model = Path(config.model)
    folder = str(model.parent) if model.name == "config.json" else config.model
    with loading("the configuration", folder):
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{model_config.model_type} is no causal language model")
    config.triples.check(min(config.max_tokens, context_of(model_config)))
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    step = make_step(
        model_config,
        config,
        dtype=dtype,
        checkpointing=config.gradient_checkpointing,
        device_type="cuda",
        memory=int(config.gpu * GIB),
    )
    print(describe(step, config.max_tokens, config.triples))
    if config.probe:
        print(probe(step, config.max_tokens, config.triples, find_device("auto")))
