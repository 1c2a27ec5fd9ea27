"""`derta plan`: the memory of a training step, the longest pack that fits, and keys that save."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from derta.cli.settings.training import PlanConfig
from derta.memory.optimizer import STATE_BYTES
from derta.memory.plan import GIB, Triples, describe
from derta.memory.probe import probe
from derta.memory.step import StepSettings, make_step
from derta.modeling.introspection import context_of
from derta.modeling.loading import empty_model, find_device, load_config
from derta.terminal import say


def read_config(model: str, *, local_files_only: bool = False) -> PreTrainedConfig:
    """Return the configuration of a causal language model.

    Args:
        model: folder of the model, its config.json, or a name on the model hub.
        local_files_only: if True, nothing is downloaded.

    Raises:
        OSError: the model does not exist.
        ValueError: config.json is damaged, or describes no causal language model.
    """
    path = Path(model)
    folder = str(path.parent) if path.name == "config.json" else model
    found = load_config(folder, local_files_only=local_files_only)
    empty_model(folder, found)
    return found


def planned_step(model_config: PreTrainedConfig, config: PlanConfig) -> StepSettings:
    """Return the step of a plan, on each of its GPUs."""
    return make_step(
        model_config,
        config,
        dtype=torch.float32 if config.dtype == "float32" else torch.bfloat16,
        checkpointing=config.checkpoints_layers,
        device_type="cuda",
        memory=int(config.gpu * GIB),
        gpus=config.gpus,
    )


def run(config: PlanConfig) -> None:
    """Print the plan.

    Raises:
        OSError: the model does not exist.
        ValueError: the optimizer is unknown, the model is no causal language model, max_tokens or
            the model's context have no room for a triple, or the probe needs a missing package.
        MemoryError: the probe does not fit the device.
    """
    if config.optim not in STATE_BYTES:
        raise ValueError(
            f"optim: nothing is known of {config.optim!r}, expected one of {', '.join(STATE_BYTES)}"
        )
    lengths = (config.prompt_tokens, config.safe_tokens)
    triples = Triples(config.branches, config.trunk_share, *lengths)
    logging.set_verbosity_error()
    model_config = read_config(config.model)
    triples.check(min(config.max_tokens, context_of(model_config)))
    step = planned_step(model_config, config)
    say(describe(step, config.max_tokens, triples))
    if config.probe:
        say(probe(step, config.max_tokens, triples, find_device("auto")))
