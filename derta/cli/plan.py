"""`derta plan`: the memory of a training step, the longest pack that fits, and keys that save."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.utils import logging

from derta.cli.settings.training import PlanConfig
from derta.memory.optimizer import STATE_BYTES
from derta.memory.plan import GIB, Triples, describe
from derta.memory.probe import probe
from derta.memory.step import make_step
from derta.modeling.introspection import context_of
from derta.modeling.loading import find_device, loading


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
    model = Path(config.model)
    folder = str(model.parent) if model.name == "config.json" else config.model
    with loading("the configuration", folder):
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{model_config.model_type} is no causal language model")
    triples.check(min(config.max_tokens, context_of(model_config)))
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    step = make_step(
        model_config,
        config,
        dtype=dtype,
        checkpointing=config.checkpoints_layers,
        device_type="cuda",
        memory=int(config.gpu * GIB),
    )
    print(describe(step, config.max_tokens, triples))
    if config.probe:
        print(probe(step, config.max_tokens, triples, find_device("auto")))
