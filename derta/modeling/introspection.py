"""The parts of any decoder-only transformers model: body, head, router, context."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from derta.modeling.attention import scope_of
from derta.modeling.sharding import class_name, whole_shape
from derta_kernels.head_loss import Head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model, unwrapped from PEFT.

    Raises:
        TypeError: it is not a transformers model.
    """
    unwrap = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            "model must be a transformers PreTrainedModel or a PEFT model of one, got "
            f"{type(inner).__name__}"
        )
    return inner


def context_length(model: nn.Module) -> int:
    """Return the number of tokens of the longest sequence that the model can read."""
    return context_of(transformers_model(model).config)


def context_of(config: PreTrainedConfig) -> int:
    """Return the `context_length` of the model that the config describes."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None) or sys.maxsize


def head_of(model: PreTrainedModel) -> Head:
    """Return the current head: PEFT may have wrapped the model after `apply_derta`.

    A head that tensor parallelism shards by row is this rank's shard, with its group, or a DTensor.

    Raises:
        ValueError: the head has an adapter or is quantized.
    """
    name = class_name(model)
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"{name} has an adapter on its head, which a loss on hidden states would ignore: take "
            "the head out of target_modules, or train a copy of it with modules_to_save"
        )
    weight = getattr(head, "weight", None)
    shape = whole_shape(weight) if isinstance(weight, Tensor) else ()
    if not isinstance(weight, Tensor) or len(shape) != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{name} must have a head with a floating-point weight (V, d), got "
            f"{type(head).__name__} with {getattr(weight, 'dtype', None)}: a quantized head cannot "
            "be used, leave it out of the quantization"
        )
    config = model.config.get_text_config(decoder=True)
    logit_scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    logit_scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return Head(weight, getattr(head, "bias", None), softcap, logit_scale, _plain_shard_group(head))


def _plain_shard_group(head: nn.Module) -> ProcessGroup | None:
    """Return the group that shares a head whose tensor-parallel shards are plain tensors.

    Early transformers 5 makes such shards, and leaves their mesh on the module. Later ones make
    DTensors, which have their mesh themselves.
    """
    plan = getattr(head, "_hf_tp_plan", None)
    if plan is None or "colwise" not in plan or hasattr(head.weight, "device_mesh"):
        return None
    mesh: Any = head._hf_device_mesh
    return mesh.get_group()


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return the rows of the whole head."""
    head = head_of(model)
    if head.group is None:
        return whole_shape(head.weight)[0]
    return model.config.get_text_config(decoder=True).vocab_size


def run_body(model: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
    """Run the model without its head, with the router's logits if its loss needs them."""
    if has_router_loss(model):
        inputs["output_router_logits"] = True
    return model.base_model(*args, **inputs)


def has_router_loss(model: PreTrainedModel) -> bool:
    """Return True if the model adds a loss that balances the load of its experts."""
    return bool(getattr(model.config, "output_router_logits", False))


def router_loss(model: PreTrainedModel, body: Any) -> Tensor:
    """Return the model's own load-balancing loss over all tokens: a pack has no padding."""
    load_balancing_loss = scope_of(model)["load_balancing_loss_func"]
    return load_balancing_loss(body.router_logits, model.num_experts, model.num_experts_per_tok)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and gradients; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
