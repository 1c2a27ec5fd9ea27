"""Memories of a launch, and what is known of every two bytes of them.

Memory is sparse: of an address space only the pages that a tensor's elements lie in take room, so
that a tensor whose strides span gigabytes costs no more than its elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

UNIT = 2  # bytes; no kernel here reads or writes single ones
PAGE = 4096  # bytes
GLOBAL_BASE = 1 << 32
BEFORE = -1  # in place of a warp: whoever wrote before the launch, or nobody
SEVERAL = -2  # in place of a warp: several warps


class Fault(Exception):
    """What a GPU would stop at, or would compute differently from run to run."""


class Space:
    """Bytes, and for every two of them who may touch them, wrote and read them.

    Attributes:
        data: (bytes,) uint8.
        allowed: (units,) bool, belongs to a tensor's elements.
        written: (units,) bool, holds what somebody wrote.
        writer: (units,) int32, the warp that wrote last, or `BEFORE`.
        write_epoch: (units,) int32, number of its CTA's barriers before that.
        reader: (units,) int32, the warp that read since, `BEFORE` if none did, or `SEVERAL`.
        read_epoch: (units,) int32.
        pending: (units,) bool, an asynchronous copy will write it.
    """

    def __init__(self, size: int, allowed: bool) -> None:
        units = -(-size // UNIT)
        self.data = np.full(size, 0xFF, np.uint8)
        self.allowed = np.full(units, allowed, np.bool_)
        self.written = np.zeros(units, np.bool_)
        self.writer = np.full(units, BEFORE, np.int32)
        self.write_epoch = np.full(units, -1, np.int32)
        self.reader = np.full(units, BEFORE, np.int32)
        self.read_epoch = np.full(units, -1, np.int32)
        self.pending = np.zeros(units, np.bool_)

    def touch(
        self, units: np.ndarray, warp: np.ndarray, epoch: np.ndarray, warps_of_cta: int, write: bool
    ) -> Counter[str]:
        """Note accesses, and return what is wrong with them and of how many units.

        Two accesses of which one writes are a race, unless one warp makes both or their CTA has a
        barrier between them.

        Args:
            units: (accesses,) that are touched.
            warp: (accesses,) by whom.
            epoch: (accesses,) barriers of its CTA so far.
            warps_of_cta: number of warps of a CTA.
        """
        found = Counter({"touches an asynchronous copy under way": self.pending[units].sum()})
        cta = warp // warps_of_cta
        writer, reader = self.writer[units], self.reader[units]
        unordered = (writer // warps_of_cta != cta) | (self.write_epoch[units] == epoch)
        race = (writer != BEFORE) & (writer != warp) & unordered
        found["write, then write" if write else "write, then read"] = race.sum()
        if write:
            unordered = (self.read_epoch[units] == epoch) | (
                (reader != SEVERAL) & (reader // warps_of_cta != cta)
            )
            found["read, then write"] = ((reader != BEFORE) & (reader != warp) & unordered).sum()
            self.writer[units], self.write_epoch[units] = warp, epoch
            self.reader[units] = BEFORE
            self.written[units] = True
        else:
            found["reads what nobody wrote"] = (~self.written[units]).sum()
            others = (reader != BEFORE) & (reader != warp) & (self.read_epoch[units] == epoch)
            self.reader[units] = warp
            others |= self.reader[units] != warp  # several in this access
            self.reader[units[others]] = SEVERAL
            self.read_epoch[units] = epoch
        return found


class GlobalMemory(Space):
    """The elements of tensors that have some, as far apart as in the tensors' own storages."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._start: dict[int, int] = {}  # of a storage, by its data pointer
        tensors = list(tensors)
        end = PAGE
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._start:
                self._start[storage.data_ptr()] = end
                end += -(-storage.nbytes() // PAGE) * PAGE + PAGE
        self._page = np.full(end // PAGE, -1, np.int32)
        used = [np.unique(self._elements(x) // PAGE) for x in tensors]
        pages = np.unique(np.concatenate(used)) if used else np.zeros(0, np.int64)
        self._page[pages] = np.arange(len(pages))
        super().__init__(len(pages) * PAGE, allowed=False)
        for tensor in tensors:
            self.allowed[self.units(tensor)] = True

    def address(self, tensor: Tensor) -> int:
        """Return the address of a tensor's first element; a null pointer if it has none."""
        if tensor.numel() == 0:
            return 0
        offset = tensor.storage_offset() * tensor.element_size()
        return GLOBAL_BASE + self._start[tensor.untyped_storage().data_ptr()] + offset

    def places(self, addresses: np.ndarray) -> np.ndarray:
        """Return where in `data` addresses lie; -1: in no page of any tensor."""
        offset = addresses - GLOBAL_BASE
        inside = (offset >= 0) & (offset < len(self._page) * PAGE)
        page = self._page[np.where(inside, offset // PAGE, 0)].astype(np.int64)
        return np.where(inside & (page >= 0), page * PAGE + offset % PAGE, -1)

    def units(self, tensor: Tensor) -> np.ndarray:
        """Return the units of a tensor's elements, in the order of the elements."""
        return self._placed(tensor) // UNIT

    def load(self, tensor: Tensor) -> None:
        """Copy the elements of a tensor, which has some, here."""
        self.data.view(np.uint16)[self.units(tensor)] = _host(tensor)
        self.written[self.units(tensor)] = True

    def store(self, tensor: Tensor) -> None:
        """Copy the elements of a tensor, which has some, back. Autograd is not told."""
        values = torch.from_numpy(self.data.view(np.int16)[self.units(tensor)])
        tensor.data.copy_(values.view(tensor.dtype).view(tensor.shape))

    def _elements(self, tensor: Tensor) -> np.ndarray:
        """Return the offsets of the units of a tensor's elements from `GLOBAL_BASE`, in bytes."""
        size = tensor.element_size()
        index = np.array([self.address(tensor) - GLOBAL_BASE])
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            index = (index[:, None] + np.arange(length) * (stride * size)).ravel()
        return (index[:, None] + np.arange(0, size, UNIT)).ravel()

    def _placed(self, tensor: Tensor) -> np.ndarray:
        return self.places(GLOBAL_BASE + self._elements(tensor))


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(-1).view(torch.int16).numpy().view(np.uint16)
