"""What the backward pass needs waits on the host; copies run beside the computation.

torch's own `save_on_cpu` copies on the stream that computes, which stands still meanwhile. Here
copies have a stream of their own. Forward, a layer's input is copied while that layer is computed;
backward, the input of the layer before is fetched while one is computed. Only streams wait for one
another, the host for nothing.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 2**20  # a copy of less costs more than it saves


@dataclass(eq=False)
class Kept:
    """A tensor that waits on the host.

    Attributes:
        host: the copy of it.
        before: what was kept before it, and will be needed after it.
        device: the tensor itself, while it is copied from or to it.
        copied: event at the end of that copy.
    """

    host: Tensor
    before: weakref.ref[Kept] | None
    device: Tensor | None = None
    copied: Any = None


class Lane:
    """The stream of copies between a device and the host, with at most one tensor under way.

    Memory of the device that a copy reads or writes is not given back before the computing stream
    waits for the end of that copy: whatever uses the memory next comes after it.

    Args:
        device: what is computed on.
        stream: a `torch.Stream` of it for the copies.
        computing: the stream that computes, asked for each time.
    """

    def __init__(self, device: torch.device, stream: Any, computing: Callable[[], Any]) -> None:
        self.device = device
        self.stream = stream
        self.computing = computing
        self.under_way: Kept | None = None

    def send(self, tensor: Tensor, before: weakref.ref[Kept] | None) -> Kept:
        """Begins to copy a tensor to the host, which keeps it on the device until `land`."""
        kept = Kept(self.empty_on_host(tensor), before)
        self._begin(kept, tensor, kept.host, tensor)
        return kept

    def fetch(self, kept: Kept) -> None:
        """Begins to copy a tensor back."""
        tensor = self.empty_on_device(kept.host)
        self._begin(kept, tensor, tensor, kept.host)

    def take(self, kept: Kept) -> Tensor:
        """The tensor, there when the computing stream gets to it; without a copy if it never left.

        The one before it is fetched from now on.
        """
        if kept.device is None:
            self.fetch(kept)
        tensor = kept.device
        assert tensor is not None and self.under_way is kept
        self.land()
        before = None if kept.before is None else kept.before()
        if before is not None:
            self.fetch(before)
        return tensor

    def land(self) -> None:
        """Puts what the device does from now on behind the copy that is under way."""
        if self.under_way is not None:
            self.computing().wait_event(self.under_way.copied)
            self.under_way.device = None
            self.under_way = None

    def empty_on_host(self, tensor: Tensor) -> Tensor:
        """Room for a copy; pinned where the device is not the host, or copies would wait."""
        return torch.empty_like(tensor, device="cpu", pin_memory=self.device.type != "cpu")

    def empty_on_device(self, host: Tensor) -> Tensor:
        """Room for a copy, of the computing stream's memory."""
        return torch.empty_like(host, device=self.device)

    def _begin(self, kept: Kept, device: Tensor, target: Tensor, source: Tensor) -> None:
        self.land()
        self.stream.wait_stream(self.computing())  # which makes the source, or has used the room
        with self.stream:
            target.copy_(source, non_blocking=True)
        kept.device, kept.copied = device, self.stream.record_event()
        self.under_way = kept


class Offloading(saved_tensors_hooks):
    """Within its context, tensors that the backward pass needs go to the host and come back.

    Left where they are: the model's parameters and views of them, tensors of other devices, and
    small ones.

    Memory: at most one tensor more on the device than the computation itself uses, the one that is
    copied; on the host all of them, pinned, in blocks that torch rounds up to powers of two and
    uses again in the next step.

    Args:
        model: whose parameters stay.
        lane: see `Lane`.
        least_bytes: what is smaller stays.
    """

    def __init__(self, model: nn.Module, lane: Lane, least_bytes: int = LEAST_BYTES) -> None:
        super().__init__(self._pack, self._unpack)
        self.lane = lane
        self.least_bytes = least_bytes
        self.parameters = weakref.WeakSet(p.untyped_storage() for p in model.parameters())
        self.last: weakref.ref[Kept] | None = None

    def _pack(self, tensor: Tensor) -> Tensor | Kept:
        if (
            tensor.device != self.lane.device
            or tensor.nbytes < self.least_bytes
            or tensor.untyped_storage() in self.parameters
        ):
            return tensor
        kept = self.lane.send(tensor, self.last)
        self.last = weakref.ref(kept)
        return kept

    def _unpack(self, packed: Tensor | Kept) -> Tensor:
        return self.lane.take(packed) if isinstance(packed, Kept) else packed


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the host, had no more memory to give, pinned memory included."""
    said = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in said)


def offloading(model: nn.Module, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """`Offloading` for what the model computes on that device; nothing on a CPU."""
    return contextlib.nullcontext() if device.type == "cpu" else Offloading(model, _lane(device))


@functools.cache
def _lane(device: torch.device) -> Lane:
    # Of the process: a pass that fails leaves a copy under way, which the next one waits for.
    stream = torch.Stream(device)
    return Lane(device, stream, lambda: torch.accelerator.current_stream(device))
