"""Weights in shards: what a loss and a check must know of FSDP2 and of DeepSpeed's ZeRO-3.

Both gather the weights of a module when it is called and release them afterwards. A loss that reads
the weight of the head is therefore computed inside a call of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed

Result = TypeVar("Result")


@contextmanager
def without_zero3() -> Iterator[None]:
    """Let transformers make and load models whole inside, where ZeRO-3 would shard them at once."""
    configuration = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = configuration


def whole_shape(weight: Tensor) -> torch.Size:
    """Return the shape of a weight; ZeRO-3 empties it between calls of its module."""
    return getattr(weight, "ds_shape", weight.shape)


def class_name(model: nn.Module) -> str:
    """Return the name of a model's class, which FSDP2 replaces by one of its own."""
    return next(one for one in type(model).__mro__ if not issubclass(one, FSDPModule)).__name__


def is_whole(model: nn.Module) -> bool:
    """Return True if every weight is there: none is on the meta device or in shards."""
    return not any(
        parameter.is_meta or parameter.numel() == 0 or isinstance(module, FSDPModule)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )


def inside(module: Any, hidden: Tensor, compute: Callable[[Tensor], Result]) -> Result:
    """Return compute(hidden) as a call of a module does: with its weight whole.

    The engine's own hooks gather the weight once, release it and bring its gradient to the shards.
    A module without an engine is not called.

    Args:
        module: a module with a weight, or a wrapper of one.
        hidden: its input.
        compute: takes the place of the module's forward.
    """
    if isinstance(module, FSDPModule) or hasattr(module.weight, "ds_id"):
        return call(module, hidden, compute)
    return compute(hidden)


def call(module: Any, hidden: Tensor, compute: Callable[[Tensor], Result]) -> Result:
    """Call a module, or a wrapper of one, with compute(hidden) in the place of its forward."""
    weight = module.weight
    owners = (one for one in module.modules() if one._parameters.get("weight") is weight)
    owner: Any = next(owners, module)  # PEFT puts a weight of trained rows together in each call
    former = vars(owner).get("forward")
    owner.forward = compute
    try:
        return module(hidden)
    finally:
        del owner.forward
        if former is not None:
            owner.forward = former


def gather_no_more_than_needed(embedding: Any, head: Any) -> None:
    """Let FSDP2 leave out gathers for backward passes that read no weight.

    A lookup never does. A frozen head does not either: its loss has formed all gradients in the
    forward pass, right after which it is released. Modules that are gathered together with others
    stay as they are.

    Args:
        embedding: the input embedding.
        head: the head.
    """
    if _is_gathered_alone(embedding):
        embedding.set_unshard_in_backward(False)
    if _is_gathered_alone(head) and not any(one.requires_grad for one in head.parameters()):
        head.set_unshard_in_backward(False)
        head.set_reshard_after_forward(True)


def _is_gathered_alone(module: Any) -> bool:
    return isinstance(module, FSDPModule) and getattr(module._get_fsdp_state(), "_modules", ()) == (
        module,
    )


def reshard(model: nn.Module) -> None:
    """Release what FSDP2 keeps gathered after a pass without gradients.

    Otherwise weights that are loaded next would not be seen by the next pass.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight or buffer whole, in a dtype; all ranks call it together.

    DeepSpeed steps 16-bit weights through float32 ones, which are returned if `dtype` can hold
    them.
    """
    if isinstance(weight, DTensor):
        # Shards on the host are gathered where the ranks' group is.
        shards: Any = weight.detach().to(weight.device_mesh.device_type, dtype)
        gathered: Tensor = shards.full_tensor()
        return gathered
    if weight.dtype.itemsize < dtype.itemsize and weight.requires_grad:
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(weight)
        assert master is not None
        return master.detach().to(dtype)
    if hasattr(weight, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([weight]):
            return weight.detach().to(dtype, copy=True)
    return weight.detach().to(dtype)
