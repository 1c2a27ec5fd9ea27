"""The fingerprint of a run: the settings, data and model that its result depends on."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from derta.modeling.sharding import whole, whole_shape

# Keys of settings that decide the weights after a step. Those of the tuning method are known to
# the command line only. Others (packages, kernels, the number of ranks) change no more than
# rounding, or no weight at all.
RESULT_KEYS = (
    "method",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_modules_to_save",
    "lora_dora",
    "branches",
    "cuts",
    "rto_keep",
    "rto_weight",
    "rto_depth",
    "unlikelihood_weight",
    "preference",
    "preference_beta",
    "preference_weight",
    "simpo_gamma",
    "red_flag",
    "retention_weight",
    "loss_norm",
    "scratch_mb",
    "sparse_backward",
    "max_length",
    "max_tokens",
    "examples_per_step",
    "examples_per_pack",
    "num_train_epochs",
    "max_steps",
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
)
# Those that decide which checkpoint becomes the model, if the best one does.
SELECTION_KEYS = (
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
    "early_stopping_patience",
    "over_refusal_weight",
    "eval_strategy",
    "eval_steps",
)
# What a checkpoint's weights and optimizer states belong to: no run continues with another.
FIXED = (
    "model",
    "method",
    "lora_r",
    "lora_target_modules",
    "lora_modules_to_save",
    "lora_dora",
    "optim",
    "optim_target_modules",
)
SAMPLED = 64


def fingerprint(
    settings: Any, model: nn.Module, data: str, held_out: str | None, refusal: int | Sequence[int]
) -> dict[str, Any]:
    """Return the fingerprint, as plain values. All ranks call it together.

    Args:
        settings: the run's settings, resolved.
        model: the model before its first step.
        data: the digest of its examples.
        held_out: the digest of the examples that it is evaluated on, if there are some.
        refusal: id of the refusal token, or those of several.
    """
    found = {"data": data, "model": _described(model), "refusal token": _plain(refusal)}
    names = [name for name in RESULT_KEYS if hasattr(settings, name)]
    if settings.load_best_model_at_end:
        names += SELECTION_KEYS
        found["held-out data"] = held_out
    return found | {name: _plain(getattr(settings, name)) for name in names}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return how each key differs, in words, without those that are the same.

    A key that an earlier version did not know was None there.
    """
    return {
        key: f"{key}: {then.get(key)} then, {now.get(key)} now"
        for key in [*then, *(key for key in now if key not in then)]
        if then.get(key) != now.get(key)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return value


def _described(model: nn.Module) -> str:
    """Return the model's class, its size, and a digest that tells it from other models.

    The digest holds names and shapes, and some values of every tensor that tuning did not add.
    """
    adapted = isinstance(model, PeftModel)
    hashed, size = blake2b(digest_size=8), 0
    for name, value in model.named_parameters():
        shape = whole_shape(value)
        hashed.update(f"{name} {tuple(shape)}".encode())
        size += shape.numel()
        if not (adapted and value.requires_grad):
            hashed.update(_sample(whole(value, value.dtype)))
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return f"{type(base).__name__} of {size:,} weights ({hashed.hexdigest()})"


@torch.no_grad()
def _sample(tensor: Tensor) -> bytes:
    """Return the bytes of some evenly spread values."""
    if tensor.is_meta:
        return b""
    spread = tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLED)][:SAMPLED]
    return spread.contiguous().view(torch.uint8).cpu().numpy().tobytes()
