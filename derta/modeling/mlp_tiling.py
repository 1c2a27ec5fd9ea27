"""Run MLPs by tiles of tokens: their activations grow with a tile, not with a pack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

ROUTED = ("experts", "router", "gate")  # submodules of a mixture of experts


def tile_mlp(model: nn.Module, tokens: int) -> nn.Module:
    """Run the MLP of every layer by tiles of tokens, in place; another call changes the tile size.

    Each tile is recomputed in the backward pass. The MLPs' inner activations, three to four times
    as wide as all others, therefore exist for one tile at a time. Gradients are equal up to the
    order of sums over tokens.

    Args:
        model: a transformers model whose layers have an `mlp` that treats each token separately.
        tokens: tokens of a tile; shorter sequences are not split.

    Returns:
        `model`.

    Raises:
        ValueError: its layers have no such MLP, or tokens is less than 1.
    """
    if tokens < 1:
        raise ValueError(f"an MLP's tile must be at least 1 token, got {tokens}")
    for mlp in [_mlp(layer) for layer in layers_of(model)]:
        if not isinstance(mlp, Tiled):
            mlp.__class__ = type(type(mlp).__name__, (Tiled, type(mlp)), {})
        mlp.tile_tokens = tokens
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that transformers checkpoints, one by one."""
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


class Tiled(nn.Module):
    """A module that runs on one tile of tokens at a time.

    The call is replaced, not `forward`, so that `forward` may still be replaced later: Liger does
    so when the training begins.
    """

    tile_tokens: int

    def __call__(self, hidden: Tensor) -> Tensor:
        forward = super().__call__
        if hidden.shape[-2] <= self.tile_tokens:
            return forward(hidden)
        tiles = hidden.split(self.tile_tokens, dim=-2)
        return torch.cat([checkpoint(forward, tile, use_reentrant=False) for tile in tiles], -2)


def _mlp(layer: nn.Module) -> Any:
    mlp = getattr(layer, "mlp", None)
    if mlp is None or any(hasattr(mlp, name) for name in ROUTED):
        kind = "no mlp" if mlp is None else f"a mixture of experts, {type(mlp).__name__}"
        raise ValueError(
            f"mlp_tile: {type(layer).__name__} has {kind}, only a plain MLP can be tiled"
        )
    return mlp
