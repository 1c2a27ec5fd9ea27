"""The machine of compute capability 9.0: matrix products of warpgroups (`wgmma`).

A product reads shared memory through the asynchronous proxy, for which generic writes need a
`fence.proxy.async` by those who made them, and then a barrier. Its sums, also where they start from
zero, are not touched between the last `wgmma.fence` and it (PTX ISA, "wgmma.fence"), nor until a
`wgmma.wait_group`, up to which operands in shared memory may not change. Factors in registers are
not held to the fence: LLVM moves their arithmetic across it, and ptxas orders what reads a register
after what sets it.

Products are computed when they are issued, here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.floats import widened
from ptx.machine import Machine
from ptx.memory import BEFORE, SEVERAL, UNIT, Fault
from ptx.parse import Instruction, Operand
from ptx.processor import SHARED_BASE, WARP, Mask

GROUP = 4  # warps of a warpgroup
DEPTH = 16  # of a product of 16-bit elements
# Bytes of a row of a swizzled block of eight rows.
WIDTHS = {1: 128, 2: 64, 3: 32}
# By that width: as many bits of the row's number are added to that of the 16 bytes, without carry.
SWIZZLED_BITS = {128: 7, 64: 3, 32: 1}


@dataclass
class Product:
    """A product under way.

    Attributes:
        group: number of groups committed before it.
        sums: registers that it will set.
        operands: (warps, units) that it reads of shared memory.
    """

    group: int
    sums: list[Operand]
    operands: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


class Hopper(Machine):
    """One launch; see `Processor`."""

    forms = {
        **Machine.forms,
        "fence": {r"proxy\.async(\.shared::cta)?": ""},
        "wgmma": {
            r"(fence|commit_group)\.sync\.aligned": "",
            r"wait_group\.sync\.aligned": "i",
            r"mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16\.bf16|f16\.f16)": "DVvviii?i",
        },
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Prepare a launch; see `Processor`."""
        super().__init__(*args, **kwargs)
        units = len(self.shared.writer)
        self.unfenced = np.zeros(units, np.bool_)  # written, and no fence.proxy.async since
        self.busy = np.zeros(units, np.bool_)  # read by a product under way
        self.flying: list[Product] = []
        self.committed = 0
        self.unready: set[Operand] = set()  # sums of products under way
        self.fenced = np.zeros(self.warps, np.bool_)  # warps that had a wgmma.fence
        self.touched: set[Operand] = set()  # registers read or set since the last wgmma.fence

    def get(self, operand: Operand, kind: str) -> np.ndarray:
        """Return the value of an operand, which no product under way may set."""
        if isinstance(operand, str) and operand[0] == "%":
            if operand in self.unready:
                what = "reads a register that a product under way will set"
                self.hazards[(what, operand, "")] += 1
            self.touched.add(operand)
        return super().get(operand, kind)

    def put(self, register: Operand, value: np.ndarray, mask: Mask) -> None:
        """Set a register, which products may then not take for sums until a `wgmma.fence`."""
        assert isinstance(register, str)
        if register in self.unready:
            self.hazards[("sets a register that a product under way will set", register, "")] += 1
        self.touched.add(register)
        super().put(register, value, mask)

    def touch(
        self, shared: bool, ins: Instruction, units: np.ndarray, lanes: np.ndarray, write: bool
    ) -> None:
        """Note accesses; writes need a fence before products may read them."""
        super().touch(shared, ins, units, lanes, write)
        if write and shared:
            self.unfenced[units] = True
            if (busy := self.busy[units]).any():
                self.report("writes what a product under way reads", ins, busy.sum())

    def op_fence(self, ins: Instruction, mask: Mask) -> None:
        """Make writes of these warps visible to the asynchronous proxy."""
        warps = np.unique(self.warp[self.lanes_of(mask)])
        self.unfenced &= ~np.isin(self.shared.writer, warps)

    # Operands of products

    def read_matrix(
        self, ins: Instruction, places: np.ndarray, warps: np.ndarray, kind: str
    ) -> np.ndarray:
        """Return elements at offsets into the memory of CTAs, (products, length, 16) float64.

        Args:
            places: (products, length, 16) offsets in bytes.
            warps: (products,) who asks for them.
        """
        if (places < 0).any() or (places + UNIT > self.shared_bytes).any():
            raise Fault(f"outside of the shared memory: {ins}")
        cta = warps // self.warps_of_cta
        units = (places + (cta * self.stride)[:, None, None]) // UNIT
        if self.options.checks:
            flat = units.reshape(len(warps), -1)
            self.check_read(ins, flat.ravel(), warps.repeat(flat.shape[1]))
            if (unwritten := ~self.shared.written[flat]).any():
                self.report("reads what nobody wrote", ins, unwritten.sum())
            if (unfenced := self.unfenced[flat]).any():
                self.report(
                    "a product reads what no fence.proxy.async made visible to it",
                    ins,
                    unfenced.sum(),
                )
        return widened(self.shared.data.view(np.uint16)[units], kind).astype(np.float64)

    def check_read(self, ins: Instruction, units: np.ndarray, warp: np.ndarray) -> None:
        """Note that products read; only a barrier orders other warps' writes before that."""
        space = self.shared
        epoch = self.epoch[warp // self.warps_of_cta]
        writer = space.writer[units]
        race = (writer != BEFORE) & (writer != warp) & (space.write_epoch[units] == epoch)
        if race.any():
            self.report("write, then read", ins, race.sum())
        if (pending := space.pending[units]).any():
            self.report("touches an asynchronous copy under way", ins, pending.sum())
        space.reader[units], space.read_epoch[units] = SEVERAL, epoch

    def _matrix(
        self, ins: Instruction, operand: Operand, length: int, transposed: bool, groups: np.ndarray
    ) -> np.ndarray:
        """Return the matrix that a descriptor describes, (groups, length, 16) float64."""
        descriptor = self.full(operand, "u64").reshape(-1, GROUP * WARP)[groups]
        if (descriptor != descriptor[:, :1]).any():
            raise Fault(f"threads of a warpgroup give different descriptors: {ins}")
        one = descriptor[:, 0].astype(np.int64)
        width = WIDTHS.get(int(one[0] >> 62 & 3))
        if width is None or (one >> 62 != one[0] >> 62).any() or (one >> 49 & 7).any():
            raise NotImplementedError(f"a matrix without a swizzle, or with an offset: {ins}")
        places = element_places(one, length, width, transposed)
        warps = groups * GROUP
        values = self.read_matrix(ins, places, warps, ins.type)
        if self.options.checks:
            cta = warps // self.warps_of_cta
            units = ((places + (cta * self.stride)[:, None, None]) // UNIT).reshape(len(warps), -1)
            self.busy[units] = True
            self.flying[-1].operands.append((warps.repeat(units.shape[1]), units.ravel()))
        return values

    def _fragments(self, ins: Instruction, names: list[Operand], groups: np.ndarray) -> np.ndarray:
        """Return a left matrix held in registers as `op_mma` has it, (groups, 64, 16) float64."""
        bits = np.stack([self.full(x, "b32").reshape(-1, GROUP, WARP)[groups] for x in names])
        parts = widened(bits.view(np.uint16), ins.type).reshape(2, 2, len(groups), GROUP, 8, 4, 2)
        return parts.transpose(2, 3, 1, 4, 0, 5, 6).reshape(-1, 64, DEPTH).astype(np.float64)

    # Products

    def op_wgmma(self, ins: Instruction, mask: Mask) -> None:
        """Multiply, order registers, commit products to a group, or wait for groups."""
        kind = ins.modifiers[0]
        warps = self.whole_warps(ins, mask).reshape(-1, GROUP)
        if kind == "mma_async":
            self._multiply(ins, warps[:, 0] // GROUP, mask)
        elif kind == "fence":
            self.touched.clear()
            self.fenced[warps] = True
        elif kind == "commit_group":
            self.committed += 1
        else:
            self._wait(ins, int(str(ins.operands[0])))

    def _wait(self, ins: Instruction, keep: int) -> None:
        done = [one for one in self.flying if one.group < self.committed - keep]
        self.flying = [one for one in self.flying if one.group >= self.committed - keep]
        for _, units in (part for one in done for part in one.operands):
            self.busy[units] = False
        for warp, units in (part for one in done for part in one.operands):
            # They read until now: whoever writes needs a barrier after this wait.
            self.shared.reader[units] = SEVERAL
            self.shared.read_epoch[units] = self.epoch[warp // self.warps_of_cta]
        for _, units in (part for one in self.flying for part in one.operands):
            self.busy[units] = True
        self.unready = {name for one in self.flying for name in one.sums}

    def _multiply(self, ins: Instruction, groups: np.ndarray, mask: Mask) -> None:
        """Set or increase 64 x n sums, spread over the lanes as those of `op_mma` are."""
        d, a, b, keep, *scales = ins.operands
        found = re.fullmatch(r"m64n(\d+)k16", ins.modifiers[3])
        assert found and isinstance(d, list)
        n = int(found[1])
        in_registers = isinstance(a, list)
        flips = [int(str(x)) for x in scales[2:]]
        if (
            n % 8
            or len(d) != n // 2
            or scales[:2] != ["1", "1"]
            or len(flips) != (1 if in_registers else 2)
            or (in_registers and len(a) != 4)
        ):
            raise NotImplementedError(f"operands of another form: {ins}")
        # Sums of earlier products are in order for this one.
        unready, self.unready = self.unready, set()
        if late := self.touched.intersection(d):
            self.report("sums were touched after the last wgmma.fence", ins, len(late))
        if (early := ~self.fenced[groups * GROUP]).any():
            self.report("a product before the first wgmma.fence", ins, early.sum())
        self.flying.append(Product(self.committed, d))
        if isinstance(a, list):
            left = self._fragments(ins, a, groups)
        else:
            left = self._matrix(ins, a, 64, bool(flips[0]), groups)
        right = self._matrix(ins, b, n, bool(flips[-1]), groups)
        out = left @ right.transpose(0, 2, 1)
        if keep != "0":
            keeps = self.full(keep, "pred").reshape(-1, GROUP * WARP)[groups, 0]
            sums = np.stack([self.full(x, "f32").reshape(-1, GROUP, 8, 4)[groups] for x in d])
            sums = sums.reshape(n // 8, 2, 2, len(groups), GROUP, 8, 4)
            sums = sums.transpose(3, 4, 1, 5, 0, 6, 2).reshape(len(groups), 64, n)
            out = out + np.where(keeps[:, None, None], sums, 0)
        out = out.astype(np.float32).reshape(len(groups), GROUP, 2, 8, n // 8, 4, 2)
        warps = (groups[:, None] * GROUP + np.arange(GROUP)).ravel()
        for i, name in enumerate(d):
            value = out[:, :, i // 2 % 2, :, i // 4, :, i % 2].reshape(-1, WARP)
            self.put_warps(name, np.ascontiguousarray(value), warps, mask)
        self.touched.difference_update(d)
        self.unready = unready | set(d)
        self.traffic["tensor-core operations"] += len(groups) * 2 * 64 * n * DEPTH


def element_places(
    descriptors: np.ndarray, length: int, width: int, transposed: bool
) -> np.ndarray:
    """Return offsets into shared memory of a matrix's elements, (descriptors, length, 16).

    A matrix of 16-bit elements is cut into blocks of eight rows of `width` bytes, one after the
    other. Within a block 16 bytes at row r and column c of them lie at column c ^ s (the swizzle),
    with s = r for rows of 128 bytes, r / 2 of 64 and r / 4 of 32. Descriptors hold, in units of 16
    bytes: where the matrix starts (bits 0 to 13), and how far apart blocks are along the rows (bits
    16 to 29) and across them (32 to 45). A transposed matrix has the depth of the product across
    the rows.
    """
    start, along, across = (
        ((descriptors >> at & 0x3FFF) << 4)[:, None, None] for at in (0, 16, 32)
    )
    i, k = np.arange(length)[:, None], np.arange(DEPTH)[None, :]
    if transposed:
        per_row = width // 2
        place = start + i // per_row * along + k // 8 * across + k % 8 * width + i % per_row * 2
    else:
        place = start + i // 8 * across + i % 8 * width + k * 2
    # Blocks start at multiples of their size, so the address itself holds the row.
    return (place ^ (place >> 7 & SWIZZLED_BITS[width]) << 4) - SHARED_BASE
