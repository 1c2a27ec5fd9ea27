"""Offload tensors for the backward pass to the host, with copies that overlap the computation.

torch's `save_on_cpu` copies on the computing stream, which stands still meanwhile. Here copies have
their own stream. In the forward pass, a layer's input is copied while the layer is computed; in the
backward pass, the previous layer's input is fetched while a layer is computed. Only streams wait
for each other; the host never waits.
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

LEAST_BYTES = 2**20  # smaller copies cost more than they save


@dataclass(eq=False)
class Kept:
    """A tensor offloaded to the host.

    Attributes:
        host: the copy on the host.
        before: the tensor offloaded before it, which the backward pass needs after it.
        device: the tensor on the device, while a copy reads or writes it.
        copied: event at the end of that copy.
    """

    host: Tensor
    before: weakref.ref[Kept] | None
    device: Tensor | None = None
    copied: Any = None


class Lane:
    """A stream of copies between a device and the host, with at most one copy in flight.

    Device memory that a copy reads or writes is freed only after the computing stream has been told
    to wait for the end of that copy. Later users of the memory therefore run after the copy.

    Args:
        device: the computing device.
        stream: a `torch.Stream` of the device for the copies.
        computing: function that returns the current computing stream.
    """

    def __init__(self, device: torch.device, stream: Any, computing: Callable[[], Any]) -> None:
        self.device = device
        self.stream = stream
        self.computing = computing
        self.under_way: Kept | None = None

    def send(self, tensor: Tensor, before: weakref.ref[Kept] | None) -> Kept:
        """Start to copy a tensor to the host; the tensor stays on the device until `land`."""
        kept = Kept(self.empty_on_host(tensor), before)
        self._begin(kept, tensor, kept.host, tensor)
        return kept

    def fetch(self, kept: Kept) -> None:
        """Start to copy a tensor back to the device."""
        tensor = self.empty_on_device(kept.host)
        self._begin(kept, tensor, tensor, kept.host)

    def take(self, kept: Kept) -> Tensor:
        """Return the tensor, ready for the computing stream; copy nothing if it never left.

        Also start to fetch the tensor before it.
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
        """Make later work on the device wait for the copy in flight."""
        if self.under_way is not None:
            self.computing().wait_event(self.under_way.copied)
            self.under_way.device = None
            self.under_way = None

    def empty_on_host(self, tensor: Tensor) -> Tensor:
        """Allocate host memory for a copy; pinned for a GPU, so that copies are asynchronous."""
        return torch.empty_like(tensor, device="cpu", pin_memory=self.device.type != "cpu")

    def empty_on_device(self, host: Tensor) -> Tensor:
        """Allocate device memory for a copy, from the computing stream."""
        return torch.empty_like(host, device=self.device)

    def _begin(self, kept: Kept, device: Tensor, target: Tensor, source: Tensor) -> None:
        self.land()
        self.stream.wait_stream(self.computing())  # it writes the source, or still uses the target
        with self.stream:
            target.copy_(source, non_blocking=True)
        kept.device, kept.copied = device, self.stream.record_event()
        self.under_way = kept


class Offloading(saved_tensors_hooks):
    """A context that offloads the tensors of the backward pass to the host and brings them back.

    These stay on the device: the model's parameters and their views, tensors of other devices, and
    small tensors.

    Memory: on the device, at most one tensor (the one in flight) beyond what the computation uses;
    on the host, all offloaded tensors, pinned, in blocks that torch rounds up to powers of two and
    reuses in the next step.

    Args:
        model: model whose parameters stay on the device.
        lane: see `Lane`.
        least_bytes: size in bytes below which a tensor stays on the device.
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
    """Return True if the device or the host, pinned memory included, ran out of memory."""
    said = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in said)


def offloading(model: nn.Module, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return `Offloading` for the model's computation on a GPU; no offloading on a CPU."""
    return contextlib.nullcontext() if device.type == "cpu" else Offloading(model, _lane(device))


@functools.cache
def _lane(device: torch.device) -> Lane:
    # One for the process: a failed pass leaves a copy in flight, and the next one waits for it.
    stream = torch.Stream(device)
    return Lane(device, stream, lambda: torch.accelerator.current_stream(device))
