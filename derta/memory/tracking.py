"""How many bytes tensors hold, by what they are for, counted as operations allocate them.

Works on tensors without storage (`FakeTensorMode`) as on real ones: what an operation allocates is
the storage of what it returns, and freed with it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class _Allocation:
    part: str
    size: int


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of storages that are alive, within its context.

    Args:
        part: what results belong to, given the operation's name (`aten::mm`).
        working: bytes that an operation holds while it runs, given its name and its arguments.

    Attributes:
        now: bytes by part.
        peaks: for each part, the same at the moment when their sum was largest of all moments at
            which an operation of that part ran.
    """

    def __init__(self, part: Callable[[str], str], working: Callable[..., int]) -> None:
        super().__init__()
        self.part = part
        self.working = working
        self.now: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._counts = True
        self._known: weakref.WeakKeyDictionary[UntypedStorage, _Allocation] = (
            weakref.WeakKeyDictionary()
        )

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Counts nothing of what is allocated within: it lies on another device."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def count(self, tensors: Iterable[Tensor], part: str) -> None:
        """Counts the tensors' storages as that part's, whatever they were counted as before."""
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
        part = self.part(name)
        made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        self.count([x for x in made if x.untyped_storage() not in self._known], part)
        working = self.working(name, *args)
        if part not in self.peaks or self.now.total() + working > self.peaks[part].total():
            self.peaks[part] = self.now + Counter({part: working})
        return results
