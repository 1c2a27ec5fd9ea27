"""Streams without a device that run as late as a device's stream may."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LateStream:
    """A substitute for a `torch.Stream` that copies only when somebody waits.

    Pending copies keep no tensor alive. On a device, memory that is freed too early would have
    other contents by then.

    Attributes:
        waits: streams that this one waited for, in order.
    """

    def __init__(self) -> None:
        self.waits: list[LateStream] = []
        self._work: list[Callable[[], None]] = []
        self._within = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._within.enter_context(_Copies(self._work))

    def __exit__(self, *_: Any) -> None:
        self._within.close()

    def record_event(self) -> Callable[[], None]:
        work = self._work

        def finish() -> None:
            while work:
                work.pop(0)()

        return finish

    def wait_event(self, event: Callable[[], None]) -> None:
        event()

    def wait_stream(self, other: LateStream) -> None:
        self.waits.append(other)


class _Copies(TorchDispatchMode):
    """A mode that postpones copies."""

    def __init__(self, work: list[Callable[[], None]]) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        target, source = map(_weak, args[:2])
        self.work.append(lambda: target().copy_(source()))
        return args[0]


def _weak(tensor: Tensor) -> Callable[[], Tensor]:
    storage = weakref.ref(tensor.untyped_storage())
    dtype, place = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())

    def again() -> Tensor:
        alive = storage()
        assert alive is not None, "memory was freed during a copy"
        return torch.empty(0, dtype=dtype).set_(alive, *place)

    return again
