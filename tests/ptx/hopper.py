"""Products of warpgroups, of compute capability 9.0."""

from __future__ import annotations

import re

import numpy as np

from ptx.floats import bf16_or_f16
from ptx.machine import SHARED_BASE, WARP, Machine
from ptx.memory import Fault


class Hopper(Machine):
    """Warpgroup matrix products of sm_90."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.unfenced = np.zeros(len(self.shared.writer), np.bool_)
        self.busy = np.zeros(len(self.shared.writer), np.bool_)
        self.flying: list = []  # [group number, registers, warps by unit, units]
        self.committed = 0
        self.unready: set[str] = set()

    def get(self, arg, kind):
        if arg in self.unready:
            self.hazards[("reads a register that a product under way will write", arg, "")] += 1
        return super().get(arg, kind)

    def note(self, space, ins, a, size, warp, cta, write):
        super().note(space, ins, a, size, warp, cta, write)
        if write and space is self.shared:
            units = (a[:, None] // 2 + np.arange(max(1, size // 2))).ravel()
            self.unfenced[units] = True
            if self.busy[units].any():
                self.report("writes what a product under way reads", ins, self.busy[units].sum())

    def op_fence(self, ins, mask):
        if "proxy" in ins.mods:
            warps = np.arange(self.warps) if mask is None else np.unique(self.warp[mask])
            self.unfenced &= ~np.isin(self.shared.writer, warps)

    def _matrix(self, ins, name, length, transposed, groups):
        d = np.broadcast_to(self.get(name, "u64"), self.lanes).reshape(-1, 4 * WARP)[groups]
        if (d != d[:, :1]).any():
            raise Fault(f"threads of a warpgroup give different descriptors: {ins.text}")
        d = d[:, 0].astype(np.int64)
        start, lbo, sbo = ((d >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        mode = d >> 62 & 3
        assert (mode == mode[0]).all() and mode[0] in (1, 2, 3), ins.text
        width, bits = {1: (128, 7), 2: (64, 3), 3: (32, 1)}[int(mode[0])]
        start, lbo, sbo = (x[:, None, None] for x in (start, lbo, sbo))
        r, k = np.arange(length)[:, None], np.arange(16)[None, :]
        if transposed:
            each = width // 2
            a = start + r // each * lbo + k // 8 * sbo + k % 8 * width + r % each * 2
        else:
            a = start + r // 8 * sbo + r % 8 * width + k * 2
        a = a ^ ((a >> 7 & bits) << 4)
        a -= SHARED_BASE
        if (a < 0).any() or (a + 2 > self.shared_bytes).any():
            raise Fault(f"out of bounds: {ins.text} ({ins.line})")
        cta = self.cta.reshape(-1, 4 * WARP)[groups, 0]
        a = a + (cta * self.stride)[:, None, None]
        flat = a.reshape(len(groups), -1)
        if self.checks:
            warp = np.repeat(groups * 4, flat.shape[1]).astype(np.int32)
            units = flat.ravel() // 2
            self._read(ins, units, warp)
            if not self.shared.written[units].all():
                self.report("reads what nobody wrote", ins, 1)
            if self.unfenced[units].any():
                self.report(
                    "an asynchronous product reads what no fence.proxy.async made visible", ins, 1
                )
            self.busy[units] = True
            self.flying.append([self.committed, [], warp, units, ins])
        return bf16_or_f16(self.shared.data.view(np.uint16)[a // 2], ins.type).astype(np.float64)

    def _read(self, ins, units, warp):
        """A warpgroup reads: any of its four warps counts as the first."""
        s, per = self.shared, self.threads // WARP
        e = self.epoch[warp // per]
        bad = (s.writer[units] >= 0) & (s.writer[units] != warp) & (s.write_epoch[units] == e)
        if bad.any():
            self.report("write, then read", ins, bad.sum())
        if s.pending[units].any():
            self.report("touches an asynchronous copy under way", ins, s.pending[units].sum())
        s.reader[units], s.read_epoch[units] = -2, e

    def op_wgmma(self, ins, mask):
        groups = self._whole_warps(ins, mask).reshape(-1, 4)[:, 0] // 4
        if "fence" in ins.mods:
            return
        if "commit_group" in ins.mods:
            self.committed += 1
            return
        if "wait_group" in ins.mods:
            keep = int(ins.args[0], 0)
            left = []
            for one in self.flying:
                if one[0] < self.committed - keep:
                    self.busy[one[3]] = False
                    if len(one[3]):
                        self._read(ins, one[3], one[2])
                else:
                    left.append(one)
            self.flying = left
            self.unready = {r for one in left for r in one[1]}
            return
        m = re.match(r"m64n(\d+)k16", ins.mods[3])
        n = int(m[1])
        assert ins.mods[4:] in (["f32", "bf16", "bf16"], ["f32", "f16", "f16"]), ins.text
        d, a, b, keep = ins.args[:4]
        if isinstance(a, list):
            scale, flips = ins.args[4:6], [0, int(ins.args[6])]
            parts = []
            for name in a:
                x = np.ascontiguousarray(np.broadcast_to(self.get(name, "b32"), self.lanes))
                x = x.reshape(-1, 4, WARP)[groups].reshape(-1, WARP).copy().view(np.uint16)
                parts.append(bf16_or_f16(x, ins.type).reshape(-1, 8, 4, 2))
            left = np.stack(parts).reshape(2, 2, -1, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5)
            left = left.reshape(len(groups), 64, 16).astype(np.float64)
        else:
            scale, flips = ins.args[4:6], [int(x) for x in ins.args[6:8]]
            left = self._matrix(ins, a, 64, flips[0], groups)
        right = self._matrix(ins, b, n, flips[1], groups)
        assert [int(s) for s in scale] == [1, 1]
        out = left @ right.transpose(0, 2, 1)
        ready, self.unready = self.unready, set()
        if keep != "0":
            keep = np.broadcast_to(self.get(keep, "pred"), self.lanes).reshape(-1, 4 * WARP)[
                groups, 0
            ]
            start = np.stack([self.get(x, "f32").reshape(-1, 4, 8, 4)[groups] for x in d]).reshape(
                n // 8, 2, 2, len(groups), 4, 8, 4
            )
            start = start.transpose(3, 4, 1, 5, 0, 6, 2).reshape(len(groups), 64, n)
            out = out + np.where(keep[:, None, None], start, 0)
        out = out.astype(np.float32).reshape(len(groups), 4, 2, 8, n // 8, 4, 2)
        warps = (groups[:, None] * 4 + np.arange(4)).ravel()
        for i, name in enumerate(d):
            value = out[:, :, i // 2 % 2, :, i // 4, :, i % 2].reshape(-1, WARP)
            self._put_warps(name, np.ascontiguousarray(value), warps, mask)
        self.unready = ready | set(d)
        self.flying.append([self.committed, d, np.zeros(0, np.int32), np.zeros(0, np.int64), ins])
        self.traffic["tensor-core flops"] += len(groups) * 2 * 64 * n * 16
