"""A run's accelerator, optimizer, schedule and compiler, made for one layer before its model is.

A wrong argument of any of them ends a run before it loads a model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
)

from derta.modeling.sharding import without_zero3
from derta.settings.blame import LIBRARY_ERRORS, blame
from derta.training.config import DertaConfig
from derta_kernels import attention, head_loss

# Keys that belong to the run itself: its evaluation, reports, checkpoints and kernels.
_LEFT_OUT = {
    "eval_strategy": "no",
    "report_to": [],
    "load_best_model_at_end": False,
    "save_strategy": "no",
    "use_liger_kernel": False,
    "enable_jit_checkpoint": False,
    "output_dir": ".",
}


def rehearse(config: DertaConfig) -> None:
    """Choose the kernels, and try what transformers passes on on a model of one layer.

    Raises:
        ValueError: a library refuses some; names them.
    """

    def trial(values: Mapping[str, Any]) -> None:
        arguments = copy.copy(config)
        vars(arguments).update(values)
        _make(arguments)

    for key, room in (("head_impl", head_loss), ("attention_impl", attention)):
        try:
            room.choose(getattr(config, key), config.device)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    given = {field.name: getattr(config, field.name) for field in fields(TrainingArguments)}
    try:
        trial(given)
    except LIBRARY_ERRORS as error:
        neutral = DertaConfig(str(config.output_dir), use_cpu=config.use_cpu)
        defaults = {name: getattr(neutral, name) for name in given}
        raise blame(error, given, defaults, trial) from error


def check_optimized(config: DertaConfig, model_config: PreTrainedConfig) -> None:
    """Check, before weights are read, that a model has the modules that GaLore or APOLLO project.

    Raises:
        ValueError: optim_target_modules match none.
    """
    with without_zero3(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    try:
        Trainer.get_optimizer_cls_and_kwargs(config, model)
    except ValueError as error:
        raise ValueError(f"optim_target_modules: {config.optim_target_modules}: {error}") from error


def _make(arguments: DertaConfig) -> None:
    vars(arguments).update(_LEFT_OUT)
    if arguments.optim_target_modules is not None:
        arguments.optim_target_modules = "all-linear"  # for names, see `check_optimized`
    layer = nn.Sequential(nn.Linear(8, 8))
    trainer = Trainer(layer, arguments)
    if trainer.is_deepspeed_enabled:  # its optimizer is made with the model's engine
        AcceleratorState._reset_state()  # or there would be no second accelerator
    else:
        trainer.create_optimizer_and_scheduler(num_training_steps=1)
    if arguments.torch_compile:
        backend = arguments.torch_compile_backend or "inductor"
        torch.compile(layer, backend=backend, mode=arguments.torch_compile_mode)
