"""The machine of compute capability 8.0 to 8.9 and 12.0: warps, barriers, `mma.sync`."""

from __future__ import annotations

import numpy as np

from ptx.arithmetic import Arithmetic
from ptx.floats import widened
from ptx.parse import Instruction, Operand
from ptx.processor import WARP, Mask
from ptx.transfers import Transfers

REDUCE = {
    "min": np.fmin,
    "max": np.fmax,
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
ALL = 0xFFFFFFFF


class Machine(Arithmetic, Transfers):
    """One launch; see `Processor`."""

    forms = {
        **Arithmetic.forms,
        **Transfers.forms,
        "bra": {r"|uni": "l"},
        "ret": {r"": ""},
        "exit": {r"": ""},
        "bar": {r"sync|warp\.sync": "v"},
        "shfl": {r"sync\.(bfly|idx|up|down)\.b32": "svvvv"},
        "redux": {r"sync\.((min|max|add)\.[su]32|(min|max)\.f32|(and|or|xor)\.b32)": "dvv"},
        "vote": {r"sync\.(any|all)\.pred|sync\.ballot\.b32": "dpv"},
        "elect": {r"sync": "sv"},
        "mma": {r"sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32": "DVVV"},
    }

    def op_bra(self, ins: Instruction, mask: Mask) -> None:
        """Branch; `Processor.run` does it."""
        raise AssertionError(ins.text)

    op_ret = op_exit = op_bra

    def op_bar(self, ins: Instruction, mask: Mask) -> None:
        """Order what a CTA's threads did before all that they do after."""
        if ins.modifiers[0] == "warp":
            self._all_lanes(ins, mask, ins.operands[0])
            return
        if ins.operands[0] != "0":
            raise NotImplementedError(f"a barrier of a part of the threads: {ins}")
        ctas = np.unique(self.cta[self.lanes_of(mask)])
        self.epoch[ctas] += 1
        self.traffic["barriers"] += len(ctas)

    def _all_lanes(self, ins: Instruction, mask: Mask, members: Operand) -> np.ndarray:
        """Return the warps of an instruction that takes part with all of their lanes."""
        warps = self.whole_warps(ins, mask)
        if (self.per_warp(members, "u32", warps) != ALL).any():
            raise NotImplementedError(f"a part of a warp: {ins}")
        return warps

    def op_shfl(self, ins: Instruction, mask: Mask) -> None:
        """Read another lane's register; a lane out of reach reads its own."""
        to, of, by, clamp, members = ins.operands
        warps = self._all_lanes(ins, mask, members)
        value = self.per_warp(of, "b32", warps)
        amount = self.per_warp(by, "u32", warps).astype(np.int64) & 31
        kind = ins.modifiers[1]
        if (self.per_warp(clamp, "u32", warps) != (0 if kind == "up" else 31)).any():
            raise NotImplementedError(f"segments of a warp: {ins}")
        lane = np.arange(WARP)
        source = {
            "bfly": lane ^ amount,
            "idx": amount,
            "up": lane - amount,
            "down": lane + amount,
        }[kind]
        inside = (source >= 0) & (source < WARP)
        value = np.take_along_axis(value, np.where(inside, source, lane), 1)
        register, predicate = _and_predicate(to)
        self.put_warps(register, value, warps, mask)
        if predicate:
            self.put_warps(predicate, inside, warps, mask)

    def op_redux(self, ins: Instruction, mask: Mask) -> None:
        """Reduce over the lanes of a warp; NaN only if all are."""
        to, of, members = ins.operands
        warps = self._all_lanes(ins, mask, members)
        value = self.per_warp(of, ins.type, warps)
        out = REDUCE[ins.modifiers[1]].reduce(value, axis=1, dtype=value.dtype)
        self.put_warps(to, out[:, None].repeat(WARP, 1), warps, mask)

    def op_vote(self, ins: Instruction, mask: Mask) -> None:
        """Tell all lanes of a warp if any or all say yes, or which ones do."""
        to, of, members = ins.operands
        warps = self._all_lanes(ins, mask, members)
        assert isinstance(of, str)
        says = self.per_warp(of.lstrip("!"), "pred", warps) ^ (of[0] == "!")
        if ins.modifiers[1] == "ballot":
            bits = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
            out = (says * bits).sum(1, dtype=np.uint32)
        else:
            out = says.any(1) if ins.modifiers[1] == "any" else says.all(1)
        self.put_warps(to, out[:, None].repeat(WARP, 1), warps, mask)

    def op_elect(self, ins: Instruction, mask: Mask) -> None:
        """Elect the first lane of each warp."""
        to, members = ins.operands
        warps = self._all_lanes(ins, mask, members)
        register, predicate = _and_predicate(to)
        first = np.zeros((len(warps), WARP), np.bool_)
        first[:, 0] = True
        self.put_warps(register, np.zeros(first.shape, np.uint32), warps, mask)
        if predicate:
            self.put_warps(predicate, first, warps, mask)

    def op_mma(self, ins: Instruction, mask: Mask) -> None:
        """Multiply a warp's 16 x 16 by 16 x 8 elements, and add 16 x 8 sums in float32.

        Lane 4 g + t holds of the left matrix the pairs at rows g and g + 8, columns 2 t and
        2 t + 8; of the right one those at rows 2 t and 2 t + 8, column g; and of the sums those at
        rows g and g + 8, columns 2 t (PTX ISA, "Matrix fragments for mma.m16n8k16"). Sums are
        exact here and rounded once; tensor cores truncate on the way.
        """
        d, a, b, c = (x if isinstance(x, list) else [x] for x in ins.operands)
        if [len(x) for x in (d, a, b, c)] != [4, 4, 2, 4]:
            raise NotImplementedError(f"fragments of another size: {ins}")
        warps, kind = self.whole_warps(ins, mask), ins.modifiers[6]

        def pairs(names: list[Operand]) -> np.ndarray:
            bits = np.stack([self.per_warp(x, "b32", warps) for x in names])
            return widened(bits.view(np.uint16), kind).reshape(len(names), -1, 8, 4, 2)

        left = pairs(a).reshape(2, 2, -1, 8, 4, 2)  # column half, row half, warp, g, t, pair
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16).astype(np.float64)
        right = pairs(b)  # row half, warp, g, t, pair
        right = right.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8).astype(np.float64)
        sums = np.stack([self.per_warp(x, "f32", warps) for x in c])
        sums = sums.reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
        out = (left @ right + sums).astype(np.float32).reshape(-1, 2, 8, 4, 2)
        for i, name in enumerate(d):
            value = np.ascontiguousarray(out[:, i // 2, :, :, i % 2]).reshape(-1, WARP)
            self.put_warps(name, value, warps, mask)
        self.traffic["tensor-core operations"] += len(warps) * 2 * 16 * 8 * 16


def _and_predicate(operand: Operand) -> tuple[str, str | None]:
    """Split `register|predicate`."""
    assert isinstance(operand, str)
    register, _, predicate = operand.partition("|")
    return register, predicate or None
