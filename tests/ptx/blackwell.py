"""The machine of compute capability 10.0: tensor memory and its products (`tcgen05`).

A CTA has 128 rows (called lanes) of 512 columns of 32 bits beside its shared memory. One thread
issues a product; an mbarrier tells when it has finished. Products are computed when they are
issued, here, and races within tensor memory are not looked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.floats import widened
from ptx.hopper import DEPTH, Hopper, element_places
from ptx.machine import Machine
from ptx.memory import Fault
from ptx.parse import Address, Instruction, Operand
from ptx.processor import WARP, Mask

ROWS, COLUMNS = 128, 512
# The layouts of a descriptor (bits 61 to 63) that have a swizzle, in bytes.
WIDTHS = {2: 128, 4: 64, 6: 32}
TYPES = {0: "f16", 1: "bf16"}  # of an instruction's descriptor


class Barrier:
    """An mbarrier: a phase ends with as many arrivals as it was made for."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.phase = 0

    def arrive(self) -> bool:
        """Count an arrival; tell if it ends the phase."""
        self.missing -= 1
        if self.missing:
            return False
        self.missing, self.phase = self.count, self.phase + 1
        return True


class Blackwell(Hopper):
    """One launch; see `Processor`."""

    forms = {
        **Machine.forms,
        "fence": Hopper.forms["fence"],
        "mbarrier": {
            r"init\.shared::cta\.b64": "ai",
            r"inval\.shared::cta\.b64": "a",
            r"try_wait\.parity\.shared(::cta)?\.b64": "dav",
        },
        "tcgen05": {
            r"alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32": "ai",
            r"dealloc\.cta_group::1\.sync\.aligned\.b32": "vi",
            r"relinquish_alloc_permit\.cta_group::1\.sync\.aligned": "",
            r"ld\.sync\.aligned\.(32x32b|16x32bx2)\.x\d+\.b32": "Da?i",
            r"st\.sync\.aligned\.32x32b\.x\d+\.b32": "aV",
            r"st\.sync\.aligned\.16x32bx2\.x\d+\.b32": "aiV",
            r"wait::(ld|st)\.sync\.aligned": "",
            # Triton 3.6 names no state space, and gives the address in shared memory all the same.
            r"commit\.cta_group::1\.mbarrier::arrive::one(\.shared::cluster)?\.b64": "a",
            r"mma\.cta_group::1\.kind::f16": "aMvvp",
        },
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Prepare a launch; see `Processor`."""
        super().__init__(*args, **kwargs)
        self.tensor = np.full((self.grid, ROWS, COLUMNS), 0xFFFFFFFF, np.uint32)
        self.columns = np.zeros(self.grid, np.int64)  # of each CTA, allocated
        self.barriers: dict[tuple[int, int], Barrier] = {}  # by CTA and offset
        self.loading: set[Operand] = set()  # registers of loads that no wait::ld has awaited

    def get(self, operand: Operand, kind: str) -> np.ndarray:
        """Return the value of an operand, which no load of tensor memory may still set."""
        if isinstance(operand, str) and operand in self.loading:
            self.hazards[("reads a register that a load under way will set", operand, "")] += 1
        return super().get(operand, kind)

    # mbarriers

    def op_mbarrier(self, ins: Instruction, mask: Mask) -> None:
        """Make a barrier, end it, or try to wait for the end of a phase."""
        kind = ins.modifiers[0]
        if kind == "init":
            address, count = ins.operands
            for key in self._barriers_at(address, mask):
                self.barriers[key] = Barrier(int(str(count)))
        elif kind == "inval":
            for key in self._barriers_at(ins.operands[0], mask):
                self._barrier(ins, key)
                del self.barriers[key]
        else:
            to, address, parity = ins.operands
            offset, parities = self.shared_address(address), self.full(parity, "u32")
            done = np.ones(self.lanes, np.bool_)
            for lane in self.lanes_of(mask):
                barrier = self._barrier(ins, (int(self.cta[lane]), int(offset[lane])))
                done[lane] = barrier.phase % 2 != parities[lane]
            self.stalled |= ~done
            self.put(to, done, mask)

    def _barriers_at(self, address: Operand, mask: Mask) -> list[tuple[int, int]]:
        offset = self.shared_address(address)
        return sorted({(int(self.cta[x]), int(offset[x])) for x in self.lanes_of(mask)})

    def _barrier(self, ins: Instruction, key: tuple[int, int]) -> Barrier:
        if key not in self.barriers:
            raise Fault(f"no mbarrier was made there: {ins}")
        return self.barriers[key]

    # Tensor memory

    def op_tcgen05(self, ins: Instruction, mask: Mask) -> None:
        """Allocate, load, store, multiply, or let an mbarrier tell when products are done."""
        kind = ins.modifiers[0]
        if kind == "alloc":
            self._allocate(ins, mask)
        elif kind == "dealloc":
            self.columns[np.unique(self.cta[self.lanes_of(mask)])] = 0
        elif kind in ("ld", "st"):
            self._move(ins, mask)
        elif kind == "wait::ld":
            self.loading.clear()
        elif kind == "commit":
            for key in self._barriers_at(ins.operands[0], mask):
                if self._barrier(ins, key).arrive():
                    self.stalled[self.cta == key[0]] = False
        elif kind == "mma":
            for lane in self.lanes_of(mask):
                self._product(ins, int(lane))

    def _allocate(self, ins: Instruction, mask: Mask) -> None:
        """Allocate columns from 0 on, and store that address in shared memory."""
        address, count = ins.operands
        warps = self.whole_warps(ins, mask)
        first = np.zeros(self.lanes, np.bool_)
        first[warps * WARP] = True
        _, places = self.access(ins, address, 4, first, True, shared=True)
        self.shared.data.view(np.uint32)[places // 4] = 0
        ctas = warps // self.warps_of_cta
        if len(ctas) != len(np.unique(ctas)) or self.columns[ctas].any():
            raise NotImplementedError(f"several allocations of a CTA: {ins}")
        self.columns[ctas] = int(str(count), 0)

    def _move(self, ins: Instruction, mask: Mask) -> None:
        """Load or store: register r of lane l is column r of a row of its warp's 32.

        With 16x32bx2 lanes 0 to 15 and 16 to 31 share 16 rows, and the latter's columns are so
        many further on as a number says.
        """
        warps = self.whole_warps(ins, mask)
        load, halves = ins.modifiers[0] == "ld", ins.modifiers[3] == "16x32bx2"
        operands = list(ins.operands)
        names = operands.pop(0 if load else -1)
        place, *further = operands
        names = names if isinstance(names, list) else [names]
        if f"x{len(names)}" != ins.modifiers[4] or len(further) != halves:
            raise NotImplementedError(f"{len(names)} registers, {len(operands)} operands: {ins}")
        row, column = self._tensor_address(ins, place, warps)
        lane, r = np.arange(WARP)[:, None], np.arange(len(names))[None, :]
        rows, columns = lane + 0 * r, r + 0 * lane
        if halves:
            rows, columns = lane % 16 + 0 * r, r + lane // 16 * int(str(further[0]), 0)
        if (row // WARP != warps % self.warps_of_cta % 4).any():
            raise Fault(f"a warp reaches rows of another: {ins}")
        cta = warps // self.warps_of_cta
        columns = column[:, None, None] + columns
        if (columns >= self.columns[cta][:, None, None]).any():
            raise Fault(f"columns that are not allocated: {ins}")
        index = cta[:, None, None], row[:, None, None] + rows, columns
        if load:
            values = self.tensor[index]
            for i, name in enumerate(names):
                self.put_warps(name, np.ascontiguousarray(values[:, :, i]), warps, mask)
            self.loading.update(x for x in names if isinstance(x, str))
        else:
            self.tensor[index] = np.stack([self.per_warp(x, "b32", warps) for x in names], 2)

    def _tensor_address(
        self, ins: Instruction, place: Operand, warps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return row and column of an address, (warps,) each."""
        assert isinstance(place, Address), ins.text
        address = self.per_warp(place.base, "u32", warps).astype(np.int64)
        if (address != address[:, :1]).any():
            raise Fault(f"threads of a warp give different addresses: {ins}")
        return address[:, 0] >> 16, (address[:, 0] & 0xFFFF) + place.offset

    # Products

    def _number(self, operand: Operand, kind: str, lane: int) -> int:
        return int(self.full(operand, kind)[lane])

    def _product(self, ins: Instruction, lane: int) -> None:
        """Multiply m x 16 by 16 x n elements into m x n float32 of tensor memory.

        The instruction descriptor holds types (bits 4 to 12), transpositions (15, 16), n / 8 (17 to
        22) and m / 16 (24 to 28). With m = 64 the rows are the first 16 of each 32.
        """
        d, a, b, descriptor, keep = ins.operands
        assert isinstance(d, Address), ins.text
        cta = int(self.cta[lane])
        word = self._number(descriptor, "u32", lane)
        left_type, right_type = (TYPES.get(word >> at & 7) for at in (7, 10))
        known = sum(field << at for at, field in ((4, 1), (7, 63), (15, 3), (17, 63), (24, 31)))
        if word & ~known or not word >> 4 & 1 or None in (left_type, right_type):
            raise NotImplementedError(f"the instruction descriptor {word:#x}: {ins}")
        if left_type != right_type:
            raise NotImplementedError(f"factors of two types: {ins}")
        kind = str(left_type)
        n, m = (word >> 17 & 63) * 8, (word >> 24 & 31) * 16
        if m not in (64, 128):
            raise NotImplementedError(f"a product of {m} rows: {ins}")
        rows = np.arange(m) if m == ROWS else np.arange(m) // 16 * WARP + np.arange(m) % 16
        if isinstance(a, Address):
            at = self._number(a.base, "u32", lane)
            column = (at & 0xFFFF) + a.offset
            bits = self.tensor[cta, rows + (at >> 16), column : column + DEPTH // 2]
            left = widened(np.ascontiguousarray(bits).view(np.uint16), kind).astype(np.float64)
        else:
            left = self._operand(ins, self._number(a, "u64", lane), m, word >> 15 & 1, lane, kind)
        right = self._operand(ins, self._number(b, "u64", lane), n, word >> 16 & 1, lane, kind)
        at = self._number(d.base, "u32", lane)
        column = (at & 0xFFFF) + d.offset
        if column + n > self.columns[cta]:
            raise Fault(f"columns that are not allocated: {ins}")
        index = cta, rows + (at >> 16), slice(column, column + n)
        out = left @ right.T
        if self._number(keep, "pred", lane):
            out = out + np.ascontiguousarray(self.tensor[index]).view(np.float32)
        self.tensor[index] = out.astype(np.float32).view(np.uint32)
        self.traffic["tensor-core operations"] += 2 * m * n * DEPTH

    def _operand(
        self, ins: Instruction, descriptor: int, length: int, transposed: int, lane: int, kind: str
    ) -> np.ndarray:
        """Return a matrix in shared memory, (length, 16) float64."""
        width = WIDTHS.get(descriptor >> 61 & 7)
        if width is None or descriptor >> 46 & 7 != 1 or descriptor >> 49 & 7:
            raise NotImplementedError(f"the matrix descriptor {descriptor:#x}: {ins}")
        one = np.array([descriptor & (1 << 46) - 1])
        places = element_places(one, length, width, bool(transposed))
        return self.read_matrix(ins, places, self.warp[lane : lane + 1], kind)[0]
