"""Loads, stores and asynchronous copies, checked, and counted as the hardware serves them.

Memory is served in sectors of 32 bytes from global memory, and from shared memory in wavefronts: 32
lanes of 4 bytes, 16 of 8 or 8 of 16 at once, as long as no two words lie in one of the 32 banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx.memory import UNIT, Fault
from ptx.parse import Address, Instruction, Operand
from ptx.processor import TYPES, UNSIGNED, WARP, Mask, Processor

SECTOR = 32  # bytes
BANKS = 32  # of 4 bytes


@dataclass
class Copy:
    """Asynchronous copies of one instruction that have not landed.

    Attributes:
        lanes: (copies,) who issued them.
        group: (copies,) number of groups that each lane had committed before.
        places: (copies, bytes) where they go in shared memory.
        data: (copies, bytes) uint8.
    """

    lanes: np.ndarray
    group: np.ndarray
    places: np.ndarray
    data: np.ndarray


class Transfers(Processor):
    """`ld`, `st`, `cp.async`, `ldmatrix`, `stmatrix`."""

    forms = Processor.forms | {
        "ld": {
            r"(param|global|shared)(\.v[24])?\.(b16|u16|b32"
            r"|u32|s32|f32|b64|u64|s64|f64)": "Da"
        },
        "st": {r"(global|shared)(\.v[24])?\.(b16|u16|b32|u32|s32|f32|b64|u64|s64|f64)": "aV"},
        "cp": {
            r"async\.(ca|cg)\.shared\.global": "aai?v",
            r"async\.(commit_group|wait_all)": "",
            r"async\.wait_group": "i",
        },
        "ldmatrix": {r"sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16": "Da"},
        "stmatrix": {r"sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16": "aV"},
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Prepare a launch; see `Processor`."""
        super().__init__(*args, **kwargs)
        self.groups = np.zeros(self.lanes, np.int64)  # of asynchronous copies, committed
        self.copies: list[Copy] = []

    # Access

    def access(
        self, ins: Instruction, address: Operand, size: int, mask: Mask, write: bool, shared: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Check and note accesses of `size` bytes, and return their lanes and places in the data.

        Raises:
            Fault: an address is misaligned or belongs to nobody.
        """
        lanes = self.lanes_of(mask)
        if shared:
            space, name = self.shared, "shared"
            wanted = self.shared_address(address)[lanes]
            places = wanted + self.cta[lanes] * self.stride
            outside = (wanted < 0) | (wanted + size > self.shared_bytes)
        else:
            space, name = self.memory, "global"
            wanted = self.global_address(address)[lanes]
            places = space.places(wanted)
            outside = places < 0
        if (wanted % size).any():
            raise Fault(f"misaligned by {wanted[wanted % size != 0][0] % size}: {ins}")
        units = places[:, None] // UNIT + np.arange(size // UNIT)
        outside |= ~space.allowed[np.where(outside[:, None], 0, units)].all(1)
        if outside.any():
            raise Fault(
                f"{outside.sum()} of {len(lanes)} lanes outside of any tensor's elements, first at "
                f"{wanted[outside][0]:#x}: {ins}"
            )
        if self.options.checks:
            self.touch(shared, ins, units, lanes, write)
        if self.options.stats:
            kind = f"{name} {'store' if write else 'load'}"
            self.traffic[f"{kind} bytes"] += len(lanes) * size
            if shared:
                self._count_wavefronts(kind, wanted, size, lanes)
            else:
                sectors = (self.warp[lanes].astype(np.int64) << 48) | wanted // SECTOR
                self.traffic[f"{kind} sectors"] += len(np.unique(sectors))
        return lanes, places

    def touch(
        self, shared: bool, ins: Instruction, units: np.ndarray, lanes: np.ndarray, write: bool
    ) -> None:
        """Note accesses, (lanes, units each), and report what is wrong with them."""
        number = units.shape[1]
        warp = np.repeat(self.warp[lanes], number)
        epoch = np.repeat(self.epoch[self.cta[lanes]], number)
        space = self.shared if shared else self.memory
        found = space.touch(units.ravel(), warp, epoch, self.warps_of_cta, write)
        for what in filter(found.get, found):
            self.report(what, ins, found[what])

    def _count_wavefronts(
        self, kind: str, wanted: np.ndarray, size: int, lanes: np.ndarray
    ) -> None:
        words = max(1, size // 4)
        phase = (lanes // WARP).astype(np.int64) * 8 + lanes % WARP * words // WARP
        word = (wanted[:, None] // 4 + np.arange(words)).ravel()
        distinct = np.unique(np.repeat(phase, words) << 32 | word)
        bank, times = np.unique(distinct >> 32 << 5 | distinct % BANKS, return_counts=True)
        first = np.unique(bank >> 5, return_index=True)[1]
        self.traffic[f"{kind} wavefronts"] += int(np.maximum.reduceat(times, first).sum())
        self.traffic[f"{kind} wavefronts, at least"] += len(first)

    # Loads and stores

    def op_ld(self, ins: Instruction, mask: Mask) -> None:
        """Load one value or a vector."""
        to, address = ins.operands
        names, dtype = _vector(ins, to), TYPES[ins.type]
        if ins.modifiers[0] == "param":
            assert isinstance(address, Address), ins.text
            raw = self.params[address.base]
            for name, value in zip(
                names, np.frombuffer(raw, dtype, len(names), address.offset), strict=True
            ):
                self.put(name, np.full(self.lanes, value), mask)
            return
        each = np.dtype(dtype).itemsize
        shared = ins.modifiers[0] == "shared"
        lanes, places = self.access(ins, address, each * len(names), mask, False, shared)
        data = (self.shared if shared else self.memory).data.view(UNSIGNED[each])
        for i, name in enumerate(names):
            value = np.zeros(self.lanes, dtype)
            value[lanes] = data[places // each + i].view(dtype)
            self.put(name, value, mask)

    def op_st(self, ins: Instruction, mask: Mask) -> None:
        """Store one value or a vector."""
        address, of = ins.operands
        values = _vector(ins, of)
        each = np.dtype(TYPES[ins.type]).itemsize
        shared = ins.modifiers[0] == "shared"
        lanes, places = self.access(ins, address, each * len(values), mask, True, shared)
        data = (self.shared if shared else self.memory).data.view(UNSIGNED[each])
        for i, name in enumerate(values):
            value = self.full(name, ins.type)[lanes].view(UNSIGNED[each])
            data[places // each + i] = value
            if self.options.checks and (lost := data[places // each + i] != value).any():
                self.report("lanes write different values to one place", ins, lost.sum())

    # Asynchronous copies

    def op_cp(self, ins: Instruction, mask: Mask) -> None:
        """Copy asynchronously from global to shared memory, or wait for that."""
        kind = ins.modifiers[1]
        if kind == "commit_group":
            self.groups += 1 if mask is None else mask
            return
        if kind in ("wait_group", "wait_all"):
            self._land(int(ins.operands[0]) if kind == "wait_group" else None, mask)
            return
        to, of, size, *taken = ins.operands
        size = int(size, 0)
        if size not in (4, 8, 16) or (kind == "cg" and size != 16):
            raise NotImplementedError(f"the interpreter does not know this form: {ins}")
        lanes = self.lanes_of(mask)
        data = np.zeros((len(lanes), size), np.uint8)
        bytes_read = self.full(taken[0], "u32")[lanes] if taken else np.full(len(lanes), size)
        if not np.isin(bytes_read, (0, size)).all():
            raise NotImplementedError(f"a copy of a part of its bytes: {ins}")
        reads = np.zeros(self.lanes, np.bool_)
        reads[lanes[bytes_read == size]] = True
        if reads.any():
            _, places = self.access(ins, of, size, reads, False, shared=False)
            data[bytes_read == size] = self.memory.data[places[:, None] + np.arange(size)]
        lanes, places = self.access(ins, to, size, mask, True, shared=True)
        places = places[:, None] + np.arange(size)
        copy = Copy(lanes, self.groups[lanes].copy(), places, data)
        if self.options.late_copies:
            units = (places // UNIT).ravel()
            self.shared.data[places] = 0xFF  # NaN in every type
            self.shared.written[units] = False
            self.shared.pending[units] = True
            self.copies.append(copy)
        else:
            self.shared.data[places] = data

    def _land(self, keep: int | None, mask: Mask) -> None:
        """Let copies land but those of each lane's last `keep` groups; None: all of its copies."""
        left = []
        for copy in self.copies:
            done = np.ones(len(copy.lanes), np.bool_)
            if keep is not None:
                done = copy.group < self.groups[copy.lanes] - keep
            if mask is not None:
                done &= mask[copy.lanes]
            places, lanes = copy.places[done], copy.lanes[done]
            units = places[:, ::UNIT].ravel() // UNIT
            self.shared.data[places] = copy.data[done]
            self.shared.written[units] = True
            self.shared.pending[units] = False
            self.shared.writer[units] = np.repeat(self.warp[lanes], places.shape[1] // UNIT)
            epoch = self.epoch[self.cta[lanes]]
            self.shared.write_epoch[units] = np.repeat(epoch, places.shape[1] // UNIT)
            if not done.all():
                k = ~done
                left.append(Copy(copy.lanes[k], copy.group[k], copy.places[k], copy.data[k]))
        self.copies = left

    # Matrices of 8 x 8 elements of 16 bits, whose rows of 16 bytes lie anywhere

    def _rows(
        self, ins: Instruction, address: Operand, number: int, mask: Mask, write: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the warps and the places of their rows as words, (8 warps number, 4)."""
        warps = self.whole_warps(ins, mask)
        used = np.zeros((self.warps, WARP), np.bool_)
        used[warps, : 8 * number] = True  # lane l gives the address of row l
        _, places = self.access(ins, address, 16, used.ravel(), write, shared=True)
        return warps, places[:, None] // 4 + np.arange(4)

    def op_ldmatrix(self, ins: Instruction, mask: Mask) -> None:
        """Give lane l elements 2 l and 2 l + 1 of each matrix."""
        names = _matrices(ins, ins.operands[0])
        warps, places = self._rows(ins, ins.operands[1], len(names), mask, False)
        rows = self.shared.data.view(np.uint32)[places].reshape(len(warps), len(names), 8, 4)
        for i, name in enumerate(names):
            matrix = _transposed(rows[:, i]) if "trans" in ins.modifiers else rows[:, i]
            self.put_warps(name, matrix.reshape(len(warps), WARP), warps, mask)

    def op_stmatrix(self, ins: Instruction, mask: Mask) -> None:
        """Store what `op_ldmatrix` loads."""
        names = _matrices(ins, ins.operands[1])
        warps, places = self._rows(ins, ins.operands[0], len(names), mask, True)
        rows = np.empty((len(warps), len(names), 8, 4), np.uint32)
        for i, name in enumerate(names):
            matrix = self.per_warp(name, "b32", warps).reshape(-1, 8, 4)
            rows[:, i] = _transposed(matrix) if "trans" in ins.modifiers else matrix
        self.shared.data.view(np.uint32)[places] = rows.reshape(-1, 4)


def _vector(ins: Instruction, operand: Operand) -> list[Operand]:
    """Return the elements of a vector, as many as the instruction says."""
    names = operand if isinstance(operand, list) else [operand]
    number = next((int(m[1]) for m in ins.modifiers if m in ("v2", "v4")), 1)
    if len(names) != number:
        raise NotImplementedError(f"{len(names)} operands instead of {number}: {ins}")
    return names


def _matrices(ins: Instruction, operand: Operand) -> list[Operand]:
    names = operand if isinstance(operand, list) else [operand]
    if f"x{len(names)}" not in ins.modifiers:
        raise NotImplementedError(f"{len(names)} matrices instead of those named: {ins}")
    return names


def _transposed(matrix: np.ndarray) -> np.ndarray:
    """Transpose (matrices, 8, 4) uint32, which hold two elements each."""
    halves = np.ascontiguousarray(matrix).view(np.uint16).transpose(0, 2, 1)
    return np.ascontiguousarray(halves).view(np.uint32)
