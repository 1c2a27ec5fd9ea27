"""A PTX interpreter in numpy: every thread of every CTA of a launch is a lane of one array.

What it checks beside the result: accesses outside of a tensor's own elements, misaligned vectors,
reads of what nobody wrote, races between warps (shared and global) that no barrier orders, reads of
an asynchronous copy before its wait, warps that diverge at warp-wide instructions, barriers that
not all threads reach. It counts instructions, bytes, 32-byte sectors and shared-memory wavefronts.
"""

from __future__ import annotations

import copy
import re
from collections import Counter

import numpy as np

from ptx.floats import bf16_or_f16, bf16_to_f32, f32_to_bf16, fma
from ptx.memory import Fault, Space
from ptx.parse import TYPES, Instruction

WARP = 32
SHARED_BASE = 1024
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


class Machine:
    """One launch: `grid` CTAs of `kernel`, with `shared_bytes` each."""

    def __init__(
        self, kernel, grid, shared_bytes, params, memory: Space, *, checks=True, stats=True,
        contract=False, late_copies=True, approx_ulp=0, seed=0,
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.threads = kernel, grid, kernel.threads
        self.lanes = grid * kernel.threads
        self.warps = self.lanes // WARP
        self.params, self.memory = params, memory
        self.checks, self.stats, self.contract = checks, stats, contract
        self.late_copies, self.approx_ulp = late_copies, approx_ulp
        self.seed = seed
        self.stride = -(-max(shared_bytes, 16) // 128) * 128
        size = grid * self.stride
        self.shared_bytes = shared_bytes
        self.shared = Space(size, allowed=True)
        lane = np.arange(self.lanes)
        self.cta = (lane // self.threads).astype(np.int64)
        self.warp = (lane // WARP).astype(np.int32)
        self.lane = lane
        self.tid = (lane % self.threads).astype(np.uint32)
        self.epoch = np.zeros(grid, np.int32)
        self.regs: dict[str, np.ndarray] = {}
        self.groups = np.zeros(self.lanes, np.int32)
        self.copies: list = []
        self.constants: dict = {}
        self.executed = np.zeros(kernel.count, np.int64)  # warps, by instruction
        self.traffic = Counter()
        self.hazards: Counter = Counter()
        self.stalled = None
        self.zero_copy = np.zeros(0)
        if contract:
            self.kernel = copy.deepcopy(kernel)
            self._contract()

    # -------------------------------------------------------------- operands
    def get(self, arg: str, kind: str):
        dtype = TYPES[kind]
        if arg[0] == "%":
            if arg in self.regs:
                value = self.regs[arg]
                if value.dtype == np.bool_ or dtype == np.bool_:
                    return value
                if value.itemsize == np.dtype(dtype).itemsize:
                    return value.view(dtype)
                return value.astype(UINT[np.dtype(dtype).itemsize]).view(dtype)
            special = {
                "%tid.x": self.tid, "%ctaid.x": self.cta.astype(np.uint32),
                "%laneid": (self.lane % WARP).astype(np.uint32),
                "%ntid.x": np.full(self.lanes, self.threads, np.uint32),
                "%nctaid.x": np.full(self.lanes, self.grid, np.uint32),
            }  # fmt: skip
            if arg in special:
                return special[arg].view(dtype)
            if re.match(r"%(ctaid|tid)\.[yz]", arg):
                return np.zeros(self.lanes, dtype)
            # LLVM leaves halves of pairs undefined that nothing uses: NaN in every float type.
            self.traffic["undefined registers read"] += 1
            if dtype == np.bool_:
                raise Fault(f"{arg} is read before anything is in it")
            size = np.dtype(dtype).itemsize
            return np.full(self.lanes, (1 << 8 * size) - 1, UINT[size]).view(dtype)
        key = (arg, kind)
        if key not in self.constants:
            self.constants[key] = self._constant(arg, dtype)
        return self.constants[key]

    def _constant(self, arg: str, dtype):
        if arg.startswith(("0f", "0F")) and len(arg) == 10:
            bits = np.uint32(int(arg[2:], 16))
            return bits.view(dtype) if np.dtype(dtype).itemsize == 4 else bits.view(np.float32)
        if arg == "global_smem":
            return dtype(SHARED_BASE)
        number = int(arg, 0)
        size = np.dtype(dtype).itemsize
        if dtype == np.bool_:
            return np.bool_(number)
        return UINT[size](number & (2 ** (8 * size) - 1)).view(dtype)

    def put(self, name: str, value, mask) -> None:
        if name == "_":
            return
        m = re.match(r"%([a-z]+)", name)
        width = self.kernel.widths[m[1]]
        value = np.asarray(value)
        if m[1] == "p":
            value = value.astype(np.bool_)
        else:
            if value.dtype.kind == "i" and value.itemsize < width:
                value = value.astype(np.dtype(f"i{width}"))
            value = (value if value.itemsize == width else value.astype(UINT[width])).view(
                UINT[width]
            )
        if value.shape == ():
            value = np.full(self.lanes, value)
        if mask is not None:
            old = self.regs.get(name)
            value = np.where(mask, value, value.dtype.type(0) if old is None else old)
        self.regs[name] = value

    def report(self, what: str, ins: Instruction, number: int) -> None:
        self.hazards[(what, ins.text, ins.line)] += int(number)

    # -------------------------------------------------------------- running
    def run(self) -> None:
        blocks, labels = self.kernel.blocks, self.kernel.labels
        end = len(blocks)
        at = np.zeros(self.lanes, np.int32)
        barrier = np.array(
            [bool(b) and b[0].op in ("bar", "barrier") and "warp" not in b[0].mods for b in blocks]
            + [False]
        )
        while True:
            # lanes that wait for an mbarrier let others go on until one of them arrives at it
            low = (np.where(self.stalled, end, at) if self.stalled is not None else at).min()
            if low == end:
                if (at != end).any():
                    raise Fault("all threads that are left wait for an mbarrier")
                break
            mask = None if (at == low).all() else at == low
            if self.stalled is not None and self.stalled.any():
                mask = (at == low) & ~self.stalled
            if mask is not None and barrier[low]:
                # only CTAs that are there with all of their threads that are left may pass
                here = (at == low) | (at == end)
                whole = here.reshape(self.grid, -1).all(1)
                mask &= whole[self.cta]
                if not mask.any():
                    others = at[(at != low) & (at != end)]
                    nxt = next(
                        (
                            b
                            for b in np.unique(others)
                            if not barrier[b]
                            or ((at == b) | (at == end)).reshape(self.grid, -1).all(1).any()
                        ),
                        None,
                    )
                    if nxt is None:
                        raise Fault("a barrier that not all threads reach")
                    low, mask = nxt, at == nxt
                    if self.stalled is not None:
                        mask &= ~self.stalled
            target, taken = self.block(blocks[low], mask)
            following = low + 1
            while following < end and not blocks[following]:
                following += 1
            if target is None:
                new = np.int32(following)
                at = np.full_like(at, new) if mask is None else np.where(mask, new, at)
            else:
                to = np.int32(end if target == "exit" else labels[target])
                if taken is None:
                    new = to
                else:
                    new = np.where(taken, to, np.int32(following))
                at = np.where(True if mask is None else mask, new, at).astype(np.int32)

    def block(self, block, mask):
        active = self.warps if mask is None else mask.reshape(-1, WARP).any(1).sum()
        for ins in block:
            m = mask
            if ins.guard is not None:
                p = self.get(ins.guard, "pred")
                p = ~p if ins.negated else p
                if ins.op == "bra":
                    self.executed[ins.index] += active
                    return ins.args[0], p
                m = p if mask is None else p & mask
                if m.all():
                    m = None
                elif not m.any():
                    continue
                self.executed[ins.index] += (
                    m.reshape(-1, WARP).any(1).sum() if m is not None else active
                )
            else:
                self.executed[ins.index] += active
                if ins.op == "bra":
                    return ins.args[0], None
                if ins.op in ("ret", "exit"):
                    return "exit", None
            getattr(self, "op_" + ins.op)(ins, m)
        return None, None

    def _contract(self) -> None:
        """What ptxas may do: a product without a rounding mode joins the sum that it goes into."""
        for block in self.kernel.blocks:
            products = {}
            for ins in block:
                if ins.op in ("add", "sub") and ins.type == "f32" and "rn" not in ins.mods:
                    x, y = ins.args[1], ins.args[2]
                    if x in products:
                        ins.op, ins.args = (
                            "fused",
                            [ins.args[0], *products[x], y, ins.op == "sub", False],
                        )
                    elif y in products:
                        ins.op, ins.args = (
                            "fused",
                            [ins.args[0], *products[y], x, False, ins.op == "sub"],
                        )
                elif ins.op == "mul" and ins.type == "f32" and "rn" not in ins.mods:
                    products[ins.args[0]] = ins.args[1:]
                    continue
                for name in ins.args[:1]:
                    if isinstance(name, str):
                        products = {
                            k: v for k, v in products.items() if k != name and name not in v
                        }

    def op_fused(self, ins, mask):
        d, a, b, c, negate_c, negate_product = ins.args
        a, b, c = (np.broadcast_to(self.get(x, "f32"), self.lanes) for x in (a, b, c))
        self.put(d, fma(-a if negate_product else a, b, -c if negate_c else c), mask)

    # -------------------------------------------------------------- memory
    def _gather(self, space, ins, address, size, mask, write, cta_base):
        """Checks and notes accesses of `size` bytes at `address`, of the lanes in mask."""
        lanes = slice(None) if mask is None else np.nonzero(mask)[0]
        a = address[lanes]
        bad = a % size != 0
        if bad.any():
            raise Fault(f"misaligned by {set((a[bad] % size).tolist())}: {ins.text} ({ins.line})")
        warp, cta = self.warp[lanes], self.cta[lanes]
        if cta_base is not None:
            bad = (a < 0) | (a + size > self.shared_bytes)
            if bad.any():
                raise Fault(
                    f"out of bounds at {a[bad][:4]} of {self.shared_bytes}: {ins.text} ({ins.line})"
                )
            a = a + cta_base[lanes]
        else:
            a = space.places(a)
        units = a[:, None] // 2 + np.arange(size // 2)
        ok = (a >= 0) & space.allowed[units].all(1)
        if not ok.all():
            raise Fault(
                f"{(~ok).sum()} lanes of {len(a)} outside of any tensor's elements, first at "
                f"{address[lanes][~ok][0]:#x}: {ins.text} ({ins.line})"
            )
        if self.checks:
            self.note(space, ins, a, size, warp, cta, write)
            if write:
                space.written[units] = True
            elif not (known := space.written[units]).all():
                self.report("reads what nobody wrote", ins, (~known.all(1)).sum())
        return lanes, a

    def note(self, space, ins, a, size, warp, cta, write) -> None:
        units = (a[:, None] // 2 + np.arange(max(1, size // 2))).ravel()
        n = max(1, size // 2)
        w = np.repeat(warp, n)
        e = np.repeat(self.epoch[cta], n)
        per = self.threads // WARP
        lw, le = space.writer[units], space.write_epoch[units]
        unordered = (lw >= 0) & (lw != w) & ((lw // per != w // per) | (le == e))
        if unordered.any():
            self.report("write, then write" if write else "write, then read", ins, unordered.sum())
        if space.pending[units].any():
            self.report("touches an asynchronous copy under way", ins, space.pending[units].sum())
        if write:
            lr, le = space.reader[units], space.read_epoch[units]
            other_cta = (lr >= 0) & (lr // per != w // per)
            unordered = (lr != -1) & (lr != w) & ((le == e) | other_cta)
            if unordered.any():
                self.report("read, then write", ins, unordered.sum())
            space.writer[units] = w
            space.write_epoch[units] = e
            space.reader[units] = -1
        else:
            same = (
                (space.read_epoch[units] == e)
                & (space.reader[units] != w)
                & (space.reader[units] != -1)
            )
            space.reader[units] = w
            several = (space.reader[units] != w) | same
            space.reader[units[several]] = -2
            space.read_epoch[units] = e

    def _shared_address(self, arg):
        base, offset = arg[1], arg[2]
        a = self.get(base, "u32")
        a = np.full(self.lanes, a) if np.ndim(a) == 0 else a
        return a.astype(np.int64) + (offset - SHARED_BASE)

    def _global_address(self, arg):
        a = self.get(arg[1], "u64")
        a = np.full(self.lanes, a) if np.ndim(a) == 0 else a
        return a.view(np.int64) + arg[2]

    def _count(self, name, a, size, warp) -> None:
        if not self.stats:
            return
        self.traffic[f"{name} bytes"] += len(a) * size
        if name.startswith("global"):
            key = (warp.astype(np.int64) << 40) | (a >> 5)
            self.traffic[f"{name} sectors"] += len(np.unique(key))
        else:
            # 32 lanes of 4 bytes, 16 of 8 or 8 of 16 go at once; banks are 4 bytes wide
            self.traffic[f"{name} wavefronts"] += self._wavefronts(a, size, warp)
            per = max(1, size // 4)
            self.traffic[f"{name} wavefronts, at least"] += (
                len(np.unique(warp.astype(np.int64) * 8 + self._phase))
                if per > 1
                else len(np.unique(warp))
            )

    _phase = 0

    def _wavefronts(self, a, size, warp):
        per = max(1, size // 4)
        words = (a[:, None] // 4 + np.arange(per)).ravel()
        lane = np.repeat(self._lane_now, per)
        self._phase = self._lane_now * per // WARP
        phase = np.repeat(warp.astype(np.int64) * 8, per) + lane * per // WARP
        distinct = np.unique((phase << 34) | words)
        bank = ((distinct >> 34) << 5) | (distinct & 31)
        banks, times = np.unique(bank, return_counts=True)
        phases = banks >> 5
        first = np.unique(phases, return_index=True)[1]
        return int(np.maximum.reduceat(times, first).sum())

    def _is_shared(self, ins):
        return any(m.startswith("shared") for m in ins.mods)

    def op_ld(self, ins, mask):
        if "param" in ins.mods:
            raw = self.params[ins.args[1][1]]
            dtype = TYPES[ins.type]
            value = np.frombuffer(raw[: np.dtype(dtype).itemsize], dtype)[0]
            self.put(ins.args[0], np.full(self.lanes, value), mask)
            return
        names = ins.args[0] if isinstance(ins.args[0], list) else [ins.args[0]]
        dtype = TYPES[ins.type]
        each = np.dtype(dtype).itemsize
        size = each * len(names)
        if self._is_shared(ins):
            space, name = self.shared, "shared load"
            address, base = self._shared_address(ins.args[1]), self.cta * self.stride
        else:
            space, name = self.memory, "global load"
            address, base = self._global_address(ins.args[1]), None
        lanes, a = self._gather(space, ins, address, size, mask, False, base)
        self._lane_now = self.lane[lanes] % WARP
        self._count(name, a, size, self.warp[lanes])
        view = space.data.view(UINT[each])
        for i, n in enumerate(names):
            got = view[a // each + i].view(dtype)
            if mask is not None:
                full = np.zeros(self.lanes, dtype)
                full[lanes] = got
                got = full
            self.put(n, got, mask)

    def op_st(self, ins, mask):
        values = ins.args[1] if isinstance(ins.args[1], list) else [ins.args[1]]
        dtype = TYPES[ins.type]
        each = np.dtype(dtype).itemsize
        size = each * len(values)
        if self._is_shared(ins):
            space, name = self.shared, "shared store"
            address, base = self._shared_address(ins.args[0]), self.cta * self.stride
        else:
            space, name = self.memory, "global store"
            address, base = self._global_address(ins.args[0]), None
        lanes, a = self._gather(space, ins, address, size, mask, True, base)
        self._lane_now = self.lane[lanes] % WARP
        self._count(name, a, size, self.warp[lanes])
        view = space.data.view(UINT[each])
        for i, v in enumerate(values):
            value = np.broadcast_to(self.get(v, ins.type), self.lanes)[lanes].view(UINT[each])
            view[a // each + i] = value
            if self.checks and (lost := view[a // each + i] != value).any():
                self.report("lanes write different values to one place", ins, lost.sum())

    def op_cp(self, ins, mask):
        if "commit_group" in ins.mods:
            self.groups = self.groups + (1 if mask is None else mask.astype(np.int32))
            return
        if "wait_group" in ins.mods or "wait_all" in ins.mods:
            keep = int(ins.args[0], 0) if ins.args else -1
            self._land(keep, mask)
            return
        assert "async" in ins.mods and "bulk" not in ins.mods, ins.text
        size = int(ins.args[2], 0)
        lanes = np.arange(self.lanes) if mask is None else np.nonzero(mask)[0]
        if len(ins.args) > 3:
            taken = np.broadcast_to(self.get(ins.args[3], "u32"), self.lanes)[lanes].astype(
                np.int64
            )
        else:
            taken = np.full(len(lanes), size)
        dst = self._shared_address(ins.args[0])
        src = self._global_address(ins.args[1])
        data = np.zeros((len(lanes), size), np.uint8)
        for length in np.unique(taken[taken > 0]):
            some = np.zeros(self.lanes, np.bool_)
            some[lanes[taken == length]] = True
            if length not in (4, 8, 16):
                raise Fault(f"copies {length} bytes: {ins.text}")
            picked, a = self._gather(self.memory, ins, src, int(length), some, False, None)
            self._lane_now = self.lane[picked] % WARP
            self._count("global load", a, int(length), self.warp[picked])
            data[taken == length, :length] = self.memory.data[a[:, None] + np.arange(length)]
        full = np.zeros(self.lanes, np.bool_)
        full[lanes] = True
        picked, a = self._gather(self.shared, ins, dst, size, full, True, self.cta * self.stride)
        self._lane_now = self.lane[picked] % WARP
        self._count("shared store", a, size, self.warp[picked])
        b = a[:, None] + np.arange(size)
        if self.late_copies:
            self.shared.data[b] = 0xFF  # NaN in every type
            self.shared.written[(b // 2).ravel()] = False
            self.shared.pending[(b // 2).ravel()] = True
            self.copies.append([picked, self.groups[picked].copy(), b, data, ins])
        else:
            self.shared.data[b] = data

    def _land(self, keep, mask) -> None:
        left = []
        for lanes, group, b, data, ins in self.copies:
            done = group < self.groups[lanes] - max(keep, 0) if keep >= 0 else group < 1 << 30
            if mask is not None:
                done = done & mask[lanes]
            if done.any():
                d = b[done]
                self.shared.data[d] = data[done]
                units = (d // 2).ravel()
                self.shared.written[units] = True
                self.shared.pending[units] = False
                self.shared.writer[units] = np.repeat(self.warp[lanes[done]], d.shape[1])
                self.shared.write_epoch[units] = np.repeat(
                    self.epoch[self.cta[lanes[done]]], d.shape[1]
                )
            if not done.all():
                k = ~done
                left.append([lanes[k], group[k], b[k], data[k], ins])
        self.copies = left

    # -------------------------------------------------------------- warps and CTAs
    def _whole_warps(self, ins, mask):
        if mask is None:
            return np.arange(self.warps)
        w = mask.reshape(-1, WARP)
        if (w.any(1) != w.all(1)).any():
            raise Fault(f"a warp diverges at {ins.text} ({ins.line})")
        return np.nonzero(w.all(1))[0]

    def _per_warp(self, value, warps):
        return np.broadcast_to(value, self.lanes).reshape(-1, WARP)[warps]

    def _put_warps(self, name, value, warps, mask):
        if mask is None:
            self.put(name, value.reshape(-1), None)
            return
        full = np.zeros((self.warps, WARP), value.dtype)
        full[warps] = value
        self.put(name, full.reshape(-1), mask)

    def op_bar(self, ins, mask):
        if "warp" in ins.mods:
            self._whole_warps(ins, mask)
            return
        ctas = np.arange(self.grid) if mask is None else np.unique(self.cta[mask])
        self.epoch[ctas] += 1
        self.traffic["barriers"] += len(ctas)

    op_barrier = op_bar

    def op_shfl(self, ins, mask):
        warps = self._whole_warps(ins, mask)
        d, a, b, c = ins.args[:4]
        value = self._per_warp(self.get(a, "b32"), warps)
        amount = self._per_warp(self.get(b, "u32"), warps).astype(np.int64)
        assert int(c, 0) in (31, 0), ins.text
        lane = np.arange(WARP)
        kind = ins.mods[1]
        source = {
            "bfly": lambda: lane ^ amount, "idx": lambda: amount & 31,
            "up": lambda: lane - amount, "down": lambda: lane + amount,
        }[kind]()  # fmt: skip
        inside = (source >= 0) & (source < WARP)
        source = np.where(inside, source, lane)
        self._put_warps(d.split("|")[0], np.take_along_axis(value, source, 1), warps, mask)

    def op_redux(self, ins, mask):
        warps = self._whole_warps(ins, mask)
        value = self._per_warp(self.get(ins.args[1], ins.type), warps)
        f = {"min": np.min, "max": np.max, "add": np.sum}.get(ins.mods[1])
        if f is None:
            f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[
                ins.mods[1]
            ].reduce
            out = f(value, axis=1)
        else:
            out = f(value, axis=1).astype(value.dtype)
        self._put_warps(ins.args[0], np.repeat(out[:, None], WARP, 1), warps, mask)

    def op_vote(self, ins, mask):
        warps = self._whole_warps(ins, mask)
        p = self._per_warp(self.get(ins.args[1], "pred"), warps)
        if "ballot" in ins.mods:
            out = (p.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
        else:
            out = p.any(1) if "any" in ins.mods else p.all(1)
        self._put_warps(ins.args[0], np.repeat(out[:, None], WARP, 1), warps, mask)

    def op_ldmatrix(self, ins, mask):
        warps = self._whole_warps(ins, mask)
        names = ins.args[0]
        n = len(names)
        used = np.zeros((self.warps, WARP), np.bool_)
        used[warps, : 8 * n] = True
        address = self._shared_address(ins.args[1])
        lanes, a = self._gather(
            self.shared, ins, address, 16, used.reshape(-1), False, self.cta * self.stride
        )
        self._lane_now = self.lane[lanes] % WARP
        self._count("shared load", a, 16, self.warp[lanes])
        rows = self.shared.data.view(np.uint32)[a[:, None] // 4 + np.arange(4)]
        rows = rows.reshape(len(warps), n, 8, 4)
        for i, name in enumerate(names):
            m = rows[:, i]
            if "trans" in ins.mods:
                m = np.ascontiguousarray(np.ascontiguousarray(m).view(np.uint16).transpose(0, 2, 1))
                m = m.view(np.uint32)
            self._put_warps(name, m.reshape(len(warps), WARP), warps, mask)

    def op_stmatrix(self, ins, mask):
        warps = self._whole_warps(ins, mask)
        names = ins.args[1]
        n = len(names)
        used = np.zeros((self.warps, WARP), np.bool_)
        used[warps, : 8 * n] = True
        address = self._shared_address(ins.args[0])
        lanes, a = self._gather(
            self.shared, ins, address, 16, used.reshape(-1), True, self.cta * self.stride
        )
        self._lane_now = self.lane[lanes] % WARP
        self._count("shared store", a, 16, self.warp[lanes])
        rows = np.empty((len(warps), n, 8, 4), np.uint32)
        for i, name in enumerate(names):
            m = self._per_warp(self.get(name, "b32"), warps).reshape(-1, 8, 4)
            if "trans" in ins.mods:
                m = np.ascontiguousarray(m).view(np.uint16).transpose(0, 2, 1)
                m = np.ascontiguousarray(m).view(np.uint32)
            rows[:, i] = m
        self.shared.data.view(np.uint32)[a[:, None] // 4 + np.arange(4)] = rows.reshape(-1, 4)

    def op_mma(self, ins, mask):
        warps = self._whole_warps(ins, mask)
        shape = ins.mods[2]
        assert shape == "m16n8k16" and ins.mods[5:] in (
            ["f32", "bf16", "bf16", "f32"], ["f32", "f16", "f16", "f32"]
        ), ins.text  # fmt: skip
        kind = ins.mods[6]
        widen = bf16_to_f32 if kind == "bf16" else lambda x: x.view(np.float16).astype(np.float32)

        def halves(name):  # (warps, row of 8, 4 threads, 2)
            x = np.ascontiguousarray(self._per_warp(self.get(name, "b32"), warps))
            return widen(x.view(np.uint16)).reshape(-1, 8, 4, 2)

        d, a, b, c = ins.args
        left = np.stack([halves(x) for x in a]).reshape(2, 2, -1, 8, 4, 2)  # k, row, w, g, t, h
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16).astype(np.float64)
        right = np.stack([halves(x) for x in b])  # k, w, g, t, h
        right = right.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8).astype(np.float64)
        start = np.stack([self._per_warp(self.get(x, "f32"), warps).reshape(-1, 8, 4) for x in c])
        start = start.reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
        out = (left @ right + start).astype(np.float32)
        out = out.reshape(-1, 2, 8, 4, 2)
        for i, name in enumerate(d):
            value = np.ascontiguousarray(out[:, i // 2, :, :, i % 2]).reshape(-1, WARP)
            self._put_warps(name, value, warps, mask)
        self.traffic["tensor-core flops"] += len(warps) * 2 * 16 * 8 * 16

    # -------------------------------------------------------------- arithmetic
    def _binary(self, ins, mask, f, three=False):
        assert len(ins.args) == 3 or three, ins.text
        a, b, *more = (self.get(x, ins.type) for x in ins.args[1:])
        out = f(a, b)
        for c in more:
            out = f(out, c)
        self.put(ins.args[0], out, mask)

    def _pairs(self, ins, mask, f):
        parts = [np.broadcast_to(self.get(x, "b64"), self.lanes) for x in ins.args[1:]]
        parts = [np.ascontiguousarray(x).view(np.float32) for x in parts]
        self.put(ins.args[0], f(*parts).view(np.uint64), mask)

    def op_add(self, ins, mask):
        if ins.type == "f32x2":
            return self._pairs(ins, mask, np.add)
        self._binary(ins, mask, np.add)

    def op_sub(self, ins, mask):
        if ins.type == "f32x2":
            return self._pairs(ins, mask, np.subtract)
        self._binary(ins, mask, np.subtract)

    def op_max(self, ins, mask):
        f = np.fmax if ins.type[0] == "f" and "NaN" not in ins.mods else np.maximum
        self._binary(ins, mask, f, three=True)

    def op_min(self, ins, mask):
        f = np.fmin if ins.type[0] == "f" and "NaN" not in ins.mods else np.minimum
        self._binary(ins, mask, f, three=True)

    def _wide(self, ins):
        kind = {"s32": "s64", "u32": "u64", "s16": "s32", "u16": "u32"}[ins.type]
        a, b = (np.broadcast_to(self.get(x, ins.type), self.lanes) for x in ins.args[1:3])
        return a.astype(TYPES[kind]) * b.astype(TYPES[kind]), kind

    def op_mul(self, ins, mask):
        if ins.type == "f32x2":
            return self._pairs(ins, mask, np.multiply)
        if "wide" in ins.mods:
            self.put(ins.args[0], self._wide(ins)[0], mask)
        elif "hi" in ins.mods:
            self.put(ins.args[0], (self._wide(ins)[0] >> 32).astype(TYPES[ins.type]), mask)
        else:
            self._binary(ins, mask, np.multiply)

    def op_mad(self, ins, mask):
        if "wide" in ins.mods:
            product, kind = self._wide(ins)
            self.put(ins.args[0], product + self.get(ins.args[3], kind), mask)
        else:
            a, b, c = (self.get(x, ins.type) for x in ins.args[1:4])
            self.put(ins.args[0], a * b + c, mask)

    def op_fma(self, ins, mask):
        if ins.type == "f32x2":
            return self._pairs(ins, mask, fma)
        c = np.broadcast_to(self.get(ins.args[3], "f32"), self.lanes)
        if ins.type in ("bf16", "f16"):  # widened by the instruction, of sm_100 on
            assert ins.mods[-2:-1] == ["f32"], ins.text
            a, b = (bf16_or_f16(self.get(x, "b16"), ins.type) for x in ins.args[1:3])
        else:
            assert ins.type == "f32", ins.text
            a, b = (np.broadcast_to(self.get(x, "f32"), self.lanes) for x in ins.args[1:3])
        self.put(ins.args[0], fma(a, b, c), mask)

    def _approx(self, value):
        """Off by up to `approx_ulp` units, always the same for the same result, as hardware is."""
        value = value.astype(np.float32)
        if self.approx_ulp:
            mixed = value.view(np.uint32) * np.uint32(2654435761) + np.uint32(self.seed)
            mixed ^= mixed >> np.uint32(15)
            step = (mixed % np.uint32(2 * self.approx_ulp + 1)).astype(np.int32) - self.approx_ulp
            moved = (value.view(np.int32) + step.astype(np.int32)).view(np.float32)
            value = np.where(np.isfinite(value) & (value != 0) & (value != 1), moved, value)
        return value

    def op_div(self, ins, mask):
        a, b = (np.broadcast_to(self.get(x, ins.type), self.lanes) for x in ins.args[1:3])
        if ins.type[0] == "f":
            out = a.astype(np.float64) / b if ins.type == "f32" else a / b
            exact = "rn" in ins.mods
            self.put(ins.args[0], out.astype(np.float32) if exact else self._approx(out), mask)
        else:
            live = np.ones(self.lanes, np.bool_) if mask is None else mask
            if (b[live] == 0).any():
                raise Fault(f"division by 0: {ins.text}")
            b = np.where(b == 0, 1, b)
            q = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
            self.put(ins.args[0], np.where((a < 0) != (b < 0), -q, q).astype(a.dtype), mask)

    def op_rem(self, ins, mask):
        a, b = (np.broadcast_to(self.get(x, ins.type), self.lanes) for x in ins.args[1:3])
        b = np.where(b == 0, 1, b).astype(a.dtype)
        self.put(ins.args[0], np.fmod(a, b), mask)

    def op_neg(self, ins, mask):
        self.put(ins.args[0], -self.get(ins.args[1], ins.type), mask)

    def op_abs(self, ins, mask):
        self.put(ins.args[0], np.abs(self.get(ins.args[1], ins.type)), mask)

    def op_ex2(self, ins, mask):
        x = self.get(ins.args[1], "f32")
        if "ftz" in ins.mods:
            x = np.where(np.abs(x) < 2.0**-126, np.float32(0), x)
        y = self._approx(np.exp2(x.astype(np.float64)))
        if "ftz" in ins.mods:
            y = np.where(np.abs(y) < 2.0**-126, np.float32(0), y)
        self.put(ins.args[0], y.astype(np.float32), mask)

    def op_lg2(self, ins, mask):
        self.put(
            ins.args[0],
            self._approx(np.log2(self.get(ins.args[1], "f32").astype(np.float64))),
            mask,
        )

    def op_rcp(self, ins, mask):
        self.put(
            ins.args[0], self._approx(1 / self.get(ins.args[1], "f32").astype(np.float64)), mask
        )

    def op_and(self, ins, mask):
        self._binary(ins, mask, np.bitwise_and)

    def op_or(self, ins, mask):
        self._binary(ins, mask, np.bitwise_or)

    def op_xor(self, ins, mask):
        self._binary(ins, mask, np.bitwise_xor)

    def op_not(self, ins, mask):
        self.put(ins.args[0], ~self.get(ins.args[1], ins.type), mask)

    def _shift(self, ins, mask, f):
        x = np.broadcast_to(self.get(ins.args[1], ins.type), self.lanes)
        amount = np.broadcast_to(self.get(ins.args[2], "u32"), self.lanes)
        bits = 8 * x.itemsize
        if x.dtype.kind == "i":
            out = f(x, np.minimum(amount, bits - 1).astype(x.dtype))
        else:
            out = np.where(amount < bits, f(x, np.minimum(amount, bits - 1).astype(x.dtype)), 0)
        self.put(ins.args[0], out.astype(x.dtype), mask)

    def op_shl(self, ins, mask):
        self._shift(ins, mask, np.left_shift)

    def op_shr(self, ins, mask):
        self._shift(ins, mask, np.right_shift)

    def op_bfe(self, ins, mask):
        x = self.get(ins.args[1], ins.type.replace("s", "u"))
        position, length = (int(a, 0) for a in ins.args[2:4])
        out = (x >> np.uint32(position)) & np.uint32((1 << length) - 1)
        if ins.type == "s32":
            shift = np.int32(32 - length)
            out = (out.view(np.int32) << shift) >> shift
        self.put(ins.args[0], out, mask)

    def op_prmt(self, ins, mask):
        a, b, s = (np.broadcast_to(self.get(x, "b32"), self.lanes) for x in ins.args[1:4])
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        out = np.zeros(self.lanes, np.uint32)
        for i in range(4):
            pick = (s >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((pick & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(
                255
            )
            assert not (pick & 8).any()
            out |= byte.astype(np.uint32) << np.uint32(8 * i)
        self.put(ins.args[0], out, mask)

    def op_setp(self, ins, mask):
        a, b = (self.get(x, ins.type) for x in ins.args[1:3])
        name = ins.mods[0]
        if name.endswith("u") and ins.type[0] == "f":
            out = COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
        elif name == "nan":
            out = np.isnan(a) | np.isnan(b)
        else:
            out = COMPARE[name](a, b)
            if name == "ne" and ins.type[0] == "f":
                out = out & ~(np.isnan(a) | np.isnan(b))
        if ins.mods[1] in ("and", "or", "xor"):
            f = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[ins.mods[1]]
            out = f(out, self.get(ins.args[3].lstrip("!"), "pred") ^ (ins.args[3][0] == "!"))
        self.put(ins.args[0], out, mask)

    def op_selp(self, ins, mask):
        a, b = (self.get(x, ins.type) for x in ins.args[1:3])
        self.put(ins.args[0], np.where(self.get(ins.args[3], "pred"), a, b), mask)

    def op_mov(self, ins, mask):
        d, s = ins.args
        if isinstance(d, list):
            x = self.get(s, ins.type)
            each = x.itemsize // len(d)
            parts = np.ascontiguousarray(np.broadcast_to(x, self.lanes)).view(UINT[each])
            for i, name in enumerate(d):
                self.put(name, parts[i :: len(d)].copy(), mask)
        elif isinstance(s, list):
            each = np.dtype(TYPES[ins.type]).itemsize // len(s)
            kind = f"b{8 * each}"
            parts = [np.broadcast_to(self.get(x, kind), self.lanes) for x in s]
            self.put(
                d, np.ascontiguousarray(np.stack(parts, 1)).view(UINT[each * len(s)])[:, 0], mask
            )
        else:
            self.put(d, self.get(s, ins.type), mask)

    def op_cvt(self, ins, mask):
        to, of = [m for m in ins.mods if m in TYPES][-2:]
        xs = [self.get(a, of) for a in ins.args[1:]]
        if to in ("bf16x2", "f16x2"):
            f = f32_to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
            high, low = (f(np.broadcast_to(x, self.lanes)).astype(np.uint32) for x in xs)
            self.put(ins.args[0], (high << np.uint32(16)) | low, mask)
            return
        x = xs[0]
        if of == "bf16":
            x = bf16_to_f32(x)
        if to == "bf16":
            out = f32_to_bf16(x)
        elif to[0] == "f":
            out = x.astype(TYPES[to])
        elif of[0] in "fb" and of != "b32":
            f = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
            f = next(f[m] for m in ins.mods if m in f)
            info = np.iinfo(TYPES[to])
            out = np.clip(np.nan_to_num(f(x)).astype(np.float64), info.min, info.max).astype(
                TYPES[to]
            )
        else:
            out = x.astype(TYPES[to])
        self.put(ins.args[0], out, mask)

    def op_cvta(self, ins, mask):
        self.put(ins.args[0], self.get(ins.args[1], ins.type), mask)
