"""Bytes that a rank sends, counted by the collectives that it calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The kind of each collective, and the argument that holds the whole tensor.
COLLECTIVES = {
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
}
# Times that a ring sends a tensor's (W - 1) / W from each rank.
TURNS = {"all-reduce": 2}


class Traffic(TorchDispatchMode):
    """Counts, while it is entered, what this thread's collectives send.

    A ring is assumed: each of W ranks sends (W - 1) / W of a tensor that is gathered or scattered,
    and twice as much of one that is reduced for all. gloo and NCCL may send otherwise.

    Attributes:
        calls: the number of collectives by kind.
        sent: the bytes sent by kind.
        whole: the number of collectives by kind and bytes of the whole tensor.

    Args:
        world_size: W.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.whole: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d" and (known := COLLECTIVES.get(func._opname)):
            kind, place = known
            size = _bytes(args[place])
            self.calls[kind] += 1
            self.whole[kind, size] += 1
            share = (self.world_size - 1) / self.world_size
            self.sent[kind] += round(TURNS.get(kind, 1) * share * size)
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(one) for one in tensors)
