"""The vocabulary projection as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Head:
    """A vocabulary projection: logits are softcap(logit_scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: (V, d); with a group this rank's rows of it; or a DTensor of shards by row.
        bias: (V,), or None; sharded as weight is.
        softcap: bound of the logits, softcap * tanh(logits / softcap), or None (Gemma 2).
        logit_scale: factor of the logits, before the cap (Cohere, Granite).
        group: the ranks that hold weight and bias in shards, see `head_loss`; None: they are whole,
            or DTensors.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    group: ProcessGroup | None = None


def own_rows(
    weight: Tensor, bias: Tensor | None, group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None, ProcessGroup | None]:
    """Return weight and bias as plain tensors, this rank's rows, and the group that shares them.

    Plain tensors are returned as they are. The gradient of a DTensor's rows reaches the DTensor.

    Raises:
        ValueError: a DTensor that is not sharded by row over a mesh of one dimension; a bias that
            is not sharded as weight is; a DTensor and a group.
    """
    mesh = _mesh("weight", weight)
    if bias is not None and _mesh("bias", bias) != mesh:
        raise ValueError("bias must be sharded as weight is, over the same mesh")
    if mesh is None:
        return weight, bias, group
    if group is not None:
        raise ValueError("group must be None with a DTensor, whose mesh has the group")
    whole: Any = weight
    own_bias = None if bias is None else cast(Any, bias).to_local()
    return whole.to_local(), own_bias, mesh.get_group()


def _mesh(name: str, tensor: Tensor) -> Any:
    """Return the mesh of a DTensor, or None for a plain tensor."""
    placements: Any = getattr(tensor, "placements", None)
    if placements is None:
        return None
    mesh = cast(Any, tensor).device_mesh
    (first, *more) = placements
    if more or not first.is_shard() or first.dim % tensor.dim() != 0:
        raise ValueError(
            f"{name} must be a plain tensor or a DTensor with the placement Shard(0) on a mesh of "
            f"one dimension, got {tuple(placements)}"
        )
    return mesh
