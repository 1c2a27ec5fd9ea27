"""Tensor memory and its products, of compute capability 10.0."""

from __future__ import annotations

import numpy as np

from ptx.floats import bf16_or_f16
from ptx.hopper import Hopper
from ptx.machine import SHARED_BASE, WARP
from ptx.memory import Fault


class Blackwell(Hopper):
    """Tensor memory and its products, of sm_100; products are done when they are issued."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tensor = np.full((self.grid, 128, 512), 0xFFFFFFFF, np.uint32)
        self.phases: dict[tuple[int, int], list[int]] = {}  # (CTA, address): phase, missing, count

    def op_elect(self, ins, mask):
        warps = self._whole_warps(ins, mask)
        first = np.zeros((self.warps, WARP), np.bool_)
        first[warps, 0] = True
        d, p = ins.args[0].split("|")
        self.put(p, first.reshape(-1), mask)

    def _barrier(self, ins, arg, mask):
        a = self._shared_address(arg)
        lanes = np.arange(self.lanes) if mask is None else np.nonzero(mask)[0]
        return sorted({(int(self.cta[x]), int(a[x])) for x in lanes})

    def op_mbarrier(self, ins, mask):
        if "init" in ins.mods:
            number = int(ins.args[1])
            for key in self._barrier(ins, ins.args[0], mask):
                self.phases[key] = [0, number, number]
        elif "inval" in ins.mods:
            for key in self._barrier(ins, ins.args[0], mask):
                if key not in self.phases:
                    raise Fault(f"invalidates what is no barrier: {ins.text}")
                del self.phases[key]
        elif "try_wait" in ins.mods:
            a = self._shared_address(ins.args[1])
            parity = np.broadcast_to(self.get(ins.args[2], "u32"), self.lanes)
            done = np.zeros(self.lanes, np.bool_)
            for x in np.nonzero(np.ones(self.lanes, np.bool_) if mask is None else mask)[0]:
                phase = self.phases.get((int(self.cta[x]), int(a[x])))
                if phase is None:
                    raise Fault(f"waits for what is no barrier: {ins.text} ({ins.line})")
                done[x] = phase[0] % 2 != parity[x]
            waiting = ~done if mask is None else ~done & mask
            if self.stalled is None:
                self.stalled = np.zeros(self.lanes, np.bool_)
            self.stalled |= waiting
            self.put(ins.args[0], done, mask)
        else:
            raise NotImplementedError(ins.text)

    def _column(self, arg, warps):
        a = self._per_warp(self.get(arg[1], "u32"), warps)
        if (a != a[:, :1]).any():
            raise Fault("threads of a warp give different tensor addresses")
        a = a[:, 0].astype(np.int64)
        return (a >> 16) & 0xFFFF, (a & 0xFFFF) + arg[2]

    def _tensor_index(self, ins, arg, offset, number, warps):
        row, column = self._column(arg, warps)
        lane, r = np.arange(WARP)[:, None], np.arange(number)[None, :]
        if "32x32b" in ins.mods:
            rows, columns = lane + 0 * r, r + 0 * lane
        elif "16x32bx2" in ins.mods:
            rows, columns = lane % 16 + 0 * r, r + lane // 16 * int(offset)
        else:
            raise NotImplementedError(ins.text)
        slab = warps % (self.threads // WARP) % 4
        if (row // 32 != slab).any():
            raise Fault(f"a warp reaches lanes of another: {ins.text} ({ins.line})")
        cta = warps * WARP // self.threads
        return cta[:, None, None], row[:, None, None] + rows, column[:, None, None] + columns

    def op_tcgen05(self, ins, mask):
        kind = ins.mods[0]
        if kind == "alloc":
            address = self._shared_address(ins.args[0])
            lanes = np.arange(self.lanes) if mask is None else np.nonzero(mask)[0]
            self.columns = int(ins.args[1])
            one = np.zeros(self.lanes, np.bool_)
            one[lanes[lanes % WARP == 0]] = True
            _, a = self._gather(self.shared, ins, address, 4, one, True, self.cta * self.stride)
            self.shared.data.view(np.uint32)[a // 4] = 0
        elif kind in ("dealloc", "relinquish_alloc_permit") or kind.startswith("wait"):
            return
        elif kind in ("ld", "st"):
            warps = self._whole_warps(ins, mask)
            names = ins.args[0] if kind == "ld" else ins.args[-1]
            place = ins.args[1] if kind == "ld" else ins.args[0]
            offset = ins.args[2 if kind == "ld" else 1] if "16x32bx2" in ins.mods else 0
            index = self._tensor_index(ins, place, offset, len(names), warps)
            if kind == "ld":
                got = self.tensor[index]
                for i, name in enumerate(names):
                    self._put_warps(name, np.ascontiguousarray(got[:, :, i]), warps, mask)
            else:
                values = [self._per_warp(self.get(n, "b32"), warps) for n in names]
                self.tensor[index] = np.stack(values, 2)
        elif kind == "commit":
            for key in self._barrier(ins, ins.args[0], mask):
                phase = self.phases[key]
                phase[1] -= 1
                if phase[1] == 0:
                    phase[0], phase[1] = phase[0] + 1, phase[2]
                    if self.stalled is not None:
                        self.stalled[:] = False
        elif kind == "mma":
            lanes = np.nonzero(np.ones(self.lanes, np.bool_) if mask is None else mask)[0]
            for x in lanes:
                self._product(ins, int(x))
        else:
            raise NotImplementedError(ins.text)

    def _one(self, arg, kind, lane):
        v = self.get(arg, kind)
        return int(v if np.ndim(v) == 0 else v[lane])

    def _operand(self, ins, descriptor, length, transposed, cta, lane, kind):
        start, lbo, sbo = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        width, bits = {2: (128, 7), 4: (64, 3), 6: (32, 1)}[descriptor >> 61 & 7]
        r, k = np.arange(length)[:, None], np.arange(16)[None, :]
        if transposed:
            each = width // 2
            a = start + r // each * lbo + k // 8 * sbo + k % 8 * width + r % each * 2
        else:
            a = start + r // 8 * sbo + r % 8 * width + k * 2
        a = (a ^ ((a >> 7 & bits) << 4)) - SHARED_BASE
        if (a < 0).any() or (a + 2 > self.shared_bytes).any():
            raise Fault(f"out of bounds: {ins.text} ({ins.line})")
        a = a + cta * self.stride
        if self.checks:
            units = a.ravel() // 2
            self._read(ins, units, np.full(len(units), lane // WARP, np.int32))
            if not self.shared.written[units].all():
                self.report("reads what nobody wrote", ins, 1)
            if self.unfenced[units].any():
                self.report(
                    "an asynchronous product reads what no fence.proxy.async made visible", ins, 1
                )
        return bf16_or_f16(self.shared.data.view(np.uint16)[a // 2], kind).astype(np.float64)

    def _product(self, ins, lane):
        d, a, b, idesc, keep = ins.args
        cta = int(self.cta[lane])
        word = self._one(idesc, "u32", lane)
        assert word >> 4 & 3 == 1 and word >> 7 & 7 == word >> 10 & 7, ins.text
        kind = "bf16" if word >> 7 & 7 == 1 else "f16"
        n, m = (word >> 17 & 63) * 8, (word >> 24 & 31) * 16
        rows = np.arange(m) if m == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16
        if isinstance(a, tuple):
            at = self._one(a[1], "u32", lane)
            half = self.tensor[cta, rows + (at >> 16), :]
            half = np.ascontiguousarray(half[:, (at & 0xFFFF) + a[2] : (at & 0xFFFF) + a[2] + 8])
            left = bf16_or_f16(half.view(np.uint16), kind).astype(np.float64)
        else:
            left = self._operand(ins, self._one(a, "u64", lane), m, word >> 15 & 1, cta, lane, kind)
        right = self._operand(ins, self._one(b, "u64", lane), n, word >> 16 & 1, cta, lane, kind)
        out = left @ right.T
        at = self._one(d[1], "u32", lane)
        columns = slice((at & 0xFFFF) + d[2], (at & 0xFFFF) + d[2] + n)
        assert columns.stop <= self.columns
        if self._one(keep, "pred", lane):
            old = np.ascontiguousarray(self.tensor[cta, rows + (at >> 16), columns]).view(
                np.float32
            )
            out = out + old
        self.tensor[cta, rows + (at >> 16), columns] = out.astype(np.float32).view(np.uint32)
        self.traffic["tensor-core flops"] += 2 * m * n * 16
