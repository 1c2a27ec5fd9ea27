"""Attention over packs in transformers: a twin of the model's own implementation.

A pack travels through the model as its `attention_mask`, int32 and 4-D, which transformers passes
to every layer unchanged. The twin of the model's implementation ("sdpa", say) recognises such a
mask and runs `interval_attention`. It leaves everything else, above all generation, to the
implementation, masks included.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from derta_kernels.attention import Bounds, interval_attention, layout_of

PREFIX = "derta"

# Arguments of models that do not affect the attention.
BOOKKEEPING = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def register_attention(name: str, impl: str = "auto") -> str:
    """Register the twin of an attention implementation; repeated calls are harmless.

    Args:
        name: an implementation of transformers, "eager" included.
        impl: implementation for packs, see `interval_attention`.

    Returns:
        the twin's name. It contains `name`, since transformers searches it for "flash", but nothing
        that marks a kernel of the hub.
    """
    twin = "_".join((PREFIX, impl, re.sub(r"\W", "_", name)))
    AttentionInterface.register(twin, _twin(name, impl))
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(twin, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return twin


def packed_mask(
    visible_until: Tensor, position_ids: Tensor, example_bounds: Bounds | None = None
) -> Tensor:
    """Return the attention mask that carries a pack.

    Args:
        visible_until: (B, N) int32, see `interval_attention`.
        position_ids: (B, N) integer.
        example_bounds: see `interval_attention`.

    Returns:
        (B, 1, 2, N) int32: visible_until and position_ids.

    Raises:
        ValueError: a tensor has a wrong shape or dtype.
    """
    for name, tensor in (("visible_until", visible_until), ("position_ids", position_ids)):
        if tensor.dim() != 2 or tensor.shape != visible_until.shape:
            raise ValueError(
                f"{name} must have shape (B, N) as visible_until has "
                f"{tuple(visible_until.shape)}, got {tuple(tensor.shape)}"
            )
    if visible_until.dtype != torch.int32:
        raise ValueError(f"visible_until must be torch.int32, got {visible_until.dtype}")
    mask = torch.stack((visible_until, position_ids.to(torch.int32)), 1).unsqueeze(1)
    if not torch.compiler.is_compiling():  # compiled layers read the bounds from the mask
        layout_of(*_rows(mask), example_bounds)  # cached for all layers, which lack the bounds
    return mask


def scope_of(module: nn.Module) -> dict[str, Any]:
    """Return the global names of the module's own `forward`: those of its modeling file.

    FSDP2 replaces a module's class with its own, which does not name the modeling file.
    """
    return inspect.unwrap(type(module).forward).__globals__


def _rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    visible_until, position_ids = mask[:, 0].unbind(1)
    return visible_until, position_ids


def _is_packed(mask: object) -> TypeGuard[Tensor]:
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.int32
        and mask.dim() == 4
        and mask.shape[1:3] == (1, 2)
    )


def _twin(name: str, impl: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if _is_packed(attention_mask):
            return _attend(module, query, key, value, attention_mask, impl, **kwargs), None
        scope = scope_of(module)
        interface = scope.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
        # "eager" is not registered: it is the fallback of the modeling file.
        own = interface.get(name, scope.get("eager_attention_forward"))
        with _named(module, name) if "flash" in name else contextlib.nullcontext():
            return own(module, query, key, value, attention_mask, **kwargs)

    return attention


@contextlib.contextmanager
def _named(module: nn.Module, name: str) -> Iterator[None]:
    """Name the implementation in the config, from which flash attention loads its kernel."""
    config: Any = module.config
    twin = config._attn_implementation_internal
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = twin


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    impl: str,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """Run `interval_attention` in transformers' shapes: (B, H, N, D) in, (B, N, H, D) out."""
    layer = type(module).__name__
    if dropout:
        raise ValueError(
            f"attention dropout must be 0 to train on packs, {layer} has {dropout}: load the model "
            "with attention_dropout=0.0"
        )
    unknown = [
        name for name, value in kwargs.items() if value is not None and name not in BOOKKEEPING
    ]
    unknown += ["is_causal=False"] if is_causal is False else []
    unknown += ["output_attentions=True"] if output_attentions else []
    if unknown:
        raise NotImplementedError(
            f"{layer} passes {', '.join(unknown)} to its attention, which attention over packs "
            "does not support"
        )
    if sliding_window is None and _has_window(module):
        raise NotImplementedError(
            f"{layer} has a sliding window, but leaves it to the mask that a pack replaces"
        )
    visible_until, position_ids = _rows(mask)
    # Under autocast, rotary embeddings leave queries and keys, but not values, in float32.
    return interval_attention(
        query.transpose(1, 2).to(value.dtype),
        key.transpose(1, 2).to(value.dtype),
        value.transpose(1, 2),
        visible_until,
        scale=scaling,
        softcap=softcap,
        window=sliding_window,
        position_ids=position_ids,
        impl=impl,
    )


def _has_window(module: nn.Module) -> bool:
    """Return True if the config gives this layer a sliding window."""
    config: Any = module.config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return layer_types[module.layer_idx] == "sliding_attention"
    has_window = getattr(config, "sliding_window", None) is not None
    return has_window and getattr(config, "use_sliding_window", True)
