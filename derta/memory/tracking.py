"""Track the memory of tensors by purpose, as operations allocate them.

Tensors may have storage or not (`FakeTensorMode`): an operation allocates the storage of its
results, which is freed with them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class _Allocation:
    part: str
    size: int


class MemoryTracker(TorchDispatchMode):
    """A context that counts the bytes of live storages.

    Args:
        part: function from an operation's name (`aten::mm`) to the part its results belong to.
        working: function from an operation's name and arguments to the bytes that it holds while it
            runs.

    Attributes:
        now: bytes by part.
        moment: name of the part of the pass that runs; an engine sets it.
        peaks: for each part, and moment if it has a name, the bytes by part when their sum was
            largest while an operation of that part ran.
    """

    def __init__(self, part: Callable[[str], str], working: Callable[..., int]) -> None:
        super().__init__()
        self.part = part
        self.working = working
        self.now: Counter[str] = Counter()
        self.moment = ""
        self.peaks: dict[str, Counter[str]] = {}
        self._counts = True
        self._override: str | None = None
        self._known: weakref.WeakKeyDictionary[UntypedStorage, _Allocation] = (
            weakref.WeakKeyDictionary()
        )

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Ignore allocations inside: they are on another device."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def allocate(self, values: int, dtype: torch.dtype, part: str) -> Tensor:
        """Allocate a tensor of that many values, which belongs to a part."""
        self._override = part
        try:
            return torch.empty(values, dtype=dtype)
        finally:
            self._override = None

    def count(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count the tensors' storages under a part, also if they were counted under another."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._known.get(storage)
            if known is None:
                known = self._known[storage] = _Allocation(part, 0)
                weakref.finalize(storage, self._free, known)
            self._free(known)
            known.part, known.size = part, storage.nbytes() if self._counts else 0
            self.now[part] += known.size

    def _free(self, allocation: _Allocation) -> None:
        self.now[allocation.part] -= allocation.size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        part = self._override or self.part(name)
        made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        self.count([x for x in made if x.untyped_storage() not in self._known], part)
        working = self.working(name, *args)
        running = f"{part} {self.moment}".strip()
        if running not in self.peaks or self.now.total() + working > self.peaks[running].total():
            self.peaks[running] = self.now + Counter({part: working})
        return results
