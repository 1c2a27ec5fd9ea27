"""`derta plan`: the memory of a training step, the longest pack that fits, and keys that save."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging

from derta.cli.settings.training import PlanConfig
from derta.memory.optimizer import STATE_BYTES
from derta.memory.plan import GIB, Triples, describe
from derta.memory.probe import probe
from derta.memory.step import StepSettings, make_step
from derta.modeling.hub import check_hub
from derta.modeling.introspection import context_of
from derta.modeling.loading import find_device, loading


def read_config(model: str, *, local_files_only: bool = False) -> PreTrainedConfig:
    """Return the configuration of a causal language model.

    Args:
        model: folder of the model, its config.json, or a name on the model hub.
        local_files_only: if True, nothing is downloaded.

    Raises:
        OSError: the model does not exist.
        ValueError: the model is no causal language model.
    """
    path = Path(model)
    folder = str(path.parent) if path.name == "config.json" else model
    if not local_files_only:
        check_hub(folder)
    with loading("the configuration", folder):
        found = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=local_files_only
        )
        if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{found.model_type} is no causal language model")
    return found


def planned_step(model_config: PreTrainedConfig, config: PlanConfig) -> StepSettings:
    """Return the step of a plan, on a GPU."""
    return make_step(
        model_config,
        config,
        dtype=torch.float32 if config.dtype == "float32" else torch.bfloat16,
        checkpointing=config.checkpoints_layers,
        device_type="cuda",
        memory=int(config.gpu * GIB),
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
    triples = Triples(config.branches, config.rto_keep, config.prompt_tokens, config.safe_tokens)
    logging.set_verbosity_error()
    model_config = read_config(config.model)
    triples.check(min(config.max_tokens, context_of(model_config)))
    step = planned_step(model_config, config)
    print(describe(step, config.max_tokens, triples))
    if config.probe:
        print(probe(step, config.max_tokens, triples, find_device("auto")))
