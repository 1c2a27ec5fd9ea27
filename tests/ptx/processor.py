"""What every instruction needs: lanes, registers, operands, and the order of execution.

Every thread of every CTA of a launch is a lane of one array. All lanes that stand at the same
block execute it together, those at the lowest one first, so that lanes which diverged meet again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ptx.memory import Fault, Space
from ptx.parse import WIDTHS, Address, Instruction, Kernel, Operand

WARP = 32
SHARED_BASE = 1024
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
SIGNED = {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64}
# bfloat16 and pairs are held as their bits.
TYPES = {name: UNSIGNED[width] for name, width in WIDTHS.items()} | FLOATS | SIGNED
TYPES["pred"] = np.bool_

Mask = np.ndarray | None  # (lanes,) bool; None: all lanes


@dataclass(frozen=True)
class Options:
    """How the interpreter runs a kernel.

    Attributes:
        checks: look for hazards; they are half of the time.
        stats: count bytes, sectors and wavefronts.
        contract: fuse products without a rounding mode into the sums that they go into, as ptxas
            may.
        approx_ulp: by so many units ex2, lg2, rcp and div.full are off, always by the same for the
            same result.
        seed: of those errors.
        late_copies: an asynchronous copy lands at its wait, and is NaN before; else at its issue.
        edit: a change of the PTX before it is parsed.
    """

    checks: bool = True
    stats: bool = False
    contract: bool = False
    approx_ulp: int = 0
    seed: int = 0
    late_copies: bool = True
    edit: Callable[[str], str] | None = None


class Processor:
    """One launch: `grid` CTAs of a kernel, with `shared_bytes` each.

    An instruction `name.suffix` is executed by the method `op_name` if one of `forms[name]` fits
    the suffix and the kinds of its operands, a letter each: d a register, v a value, D and V
    one or a list of them, s a register and perhaps a predicate's after a bar, p a predicate or its
    opposite, a an address, M any of V and a, i a number, l a label. What stands after ? may be
    missing.
    """

    forms: ClassVar[dict[str, dict[str, str]]] = {}

    def __init__(
        self,
        kernel: Kernel,
        grid: int,
        shared_bytes: int,
        params: Mapping[str, bytes],
        memory: Space,
        options: Options,
        *,
        threads: int | None = None,
    ) -> None:
        """Prepare a launch; see `launches.execute`.

        Raises:
            NotImplementedError: the kernel has an instruction that is not known in that form.
        """
        self.kernel, self.grid = kernel, grid
        self.threads = threads or kernel.threads
        self.params, self.memory = params, memory
        self.options = options
        self.shared_bytes = kernel.static_shared + shared_bytes
        self.stride = -(-max(self.shared_bytes, 16) // 128) * 128
        self.shared = Space(grid * self.stride, allowed=True)

        self.lanes = grid * self.threads
        self.warps = self.lanes // WARP
        self.warps_of_cta = self.threads // WARP
        self.lane = np.arange(self.lanes)
        self.cta = self.lane // self.threads
        self.warp = (self.lane // WARP).astype(np.int32)
        thread = (self.lane % self.threads).astype(np.uint32)
        zero = np.zeros(self.lanes, np.uint32)
        self.special = {
            "%tid.x": thread,
            "%ctaid.x": self.cta.astype(np.uint32),
            "%ntid.x": zero + np.uint32(self.threads),
            "%nctaid.x": zero + np.uint32(grid),
            "%laneid": thread % np.uint32(WARP),
        } | dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), zero)

        self.epoch = np.zeros(grid, np.int32)  # barriers of each CTA so far
        self.stalled = np.zeros(self.lanes, np.bool_)  # lanes that wait for an mbarrier
        self.registers: dict[str, np.ndarray] = {}
        self._constants: dict[tuple[str, str], np.generic] = {}
        count = len(kernel.instructions)
        self.executed = np.zeros(count, np.int64)  # by how many warps, by instruction
        self.traffic: Counter[str] = Counter()
        self.hazards: Counter[tuple[str, str, str]] = Counter()
        self._operations: list[Callable[[Instruction, Mask], None]] = []
        for instruction in kernel.instructions:
            self._check(instruction)
            self._operations.append(getattr(self, f"op_{instruction.op}"))
        self.fused: dict[int, tuple[Operand, ...]] = {}
        if options.contract:
            self._contract()

    def _check(self, ins: Instruction) -> None:
        for suffix, kinds in self.forms.get(ins.op, {}).items():
            if re.fullmatch(suffix, ins.suffix):
                least, _, more = kinds.partition("?")
                fits = len(least) <= len(ins.operands) <= len(least + more)
                if fits and all(map(_is, ins.operands, least + more)):
                    return
        raise NotImplementedError(f"the interpreter does not know this form: {ins}")

    # Operands

    def get(self, operand: Operand, kind: str) -> np.ndarray:
        """Return the value of a register or a number as a type, (lanes,), or (1,) of a number."""
        dtype = TYPES[kind]
        assert isinstance(operand, str)
        if operand[0] != "%":
            key = (operand, kind)
            if key not in self._constants:
                self._constants[key] = np.array([self._constant(operand, kind)])
            return self._constants[key]
        value = self.registers.get(operand)
        if value is None:
            value = self.special.get(operand)
        size = np.dtype(dtype).itemsize
        if value is None:
            if kind == "pred":
                raise Fault(f"{operand} is read before anything is in it")
            # LLVM leaves halves of pairs undefined that nothing uses: NaN in every float type.
            self.traffic["undefined registers read"] += 1
            return np.full(self.lanes, (1 << 8 * size) - 1, UNSIGNED[size]).view(dtype)
        if value.dtype == np.bool_ or kind == "pred":
            assert value.dtype == np.bool_ and kind == "pred", operand
            return value
        return (value if value.itemsize == size else value.astype(UNSIGNED[size])).view(dtype)

    def full(self, operand: Operand, kind: str) -> np.ndarray:
        """Return the value of `get` in every lane, (lanes,)."""
        return np.ascontiguousarray(np.broadcast_to(self.get(operand, kind), self.lanes))

    def _constant(self, text: str, kind: str) -> np.generic:
        dtype = np.dtype(TYPES[kind])
        if text in self.kernel.shared:
            return dtype.type(SHARED_BASE + self.kernel.shared[text])
        if text[:2] in ("0f", "0F", "0d", "0D"):
            assert len(text) == 2 + 2 * dtype.itemsize, text
            return UNSIGNED[dtype.itemsize](int(text[2:], 16)).view(dtype)
        number = int(text, 0)
        if kind == "pred":
            return np.bool_(number)
        size = dtype.itemsize
        return UNSIGNED[size](number & (2 ** (8 * size) - 1)).view(dtype)

    def put(self, register: Operand, value: np.ndarray, mask: Mask) -> None:
        """Set a register in the lanes of a mask."""
        assert isinstance(register, str)
        if register == "_":
            return
        width = self.kernel.width(register)
        if value.dtype != np.bool_:
            if value.itemsize < width and value.dtype.kind == "i":
                value = value.astype(f"i{width}")
            elif value.itemsize != width:
                value = value.view(UNSIGNED[value.itemsize]).astype(UNSIGNED[width])
            value = value.view(UNSIGNED[width])
        if value.shape != (self.lanes,):
            value = np.broadcast_to(value, self.lanes).copy()
        if mask is not None:
            old = self.registers.get(register)
            # What was never set is NaN in every float type, and not read as a predicate.
            unset = np.bool_(0) if value.dtype == np.bool_ else ~value.dtype.type(0)
            value = np.where(mask, value, unset if old is None else old)
        self.registers[register] = value

    def shared_address(self, address: Operand) -> np.ndarray:
        """Return offsets into a CTA's shared memory, (lanes,) int64."""
        assert isinstance(address, Address)
        base = self.full(address.base, "u32").astype(np.int64)
        return base + (address.offset - SHARED_BASE)

    def global_address(self, address: Operand) -> np.ndarray:
        """Return addresses in global memory, (lanes,) int64."""
        assert isinstance(address, Address)
        return self.full(address.base, "u64").view(np.int64) + address.offset

    def lanes_of(self, mask: Mask) -> np.ndarray:
        """Return the indices of a mask's lanes."""
        return self.lane if mask is None else np.nonzero(mask)[0]

    # Warps

    def whole_warps(self, ins: Instruction, mask: Mask) -> np.ndarray:
        """Return the indices of a mask's warps, which may not diverge at an instruction."""
        if mask is None:
            return np.arange(self.warps)
        lanes = mask.reshape(-1, WARP)
        if (lanes.any(1) != lanes.all(1)).any():
            raise Fault(f"a warp diverges at {ins}")
        return np.nonzero(lanes.all(1))[0]

    def per_warp(self, operand: Operand, kind: str, warps: np.ndarray) -> np.ndarray:
        """Return a value by warp and lane, (warps, 32)."""
        return self.full(operand, kind).reshape(-1, WARP)[warps]

    def put_warps(
        self, register: Operand, value: np.ndarray, warps: np.ndarray, mask: Mask
    ) -> None:
        """Set a register from (warps, 32)."""
        full = np.zeros((self.warps, WARP), value.dtype)
        full[warps] = value
        self.put(register, full.reshape(-1), mask)

    def report(self, what: str, ins: Instruction, number: int) -> None:
        """Note a hazard."""
        self.hazards[(what, ins.text, ins.line)] += int(number)

    # Execution

    def run(self) -> None:
        """Execute the kernel to its end.

        Raises:
            Fault: a GPU would stop, or never end.
        """
        blocks, labels = self.kernel.blocks, self.kernel.labels
        end = len(blocks)
        is_barrier = np.array([bool(b) and b[0].is_barrier for b in blocks] + [False])
        at = np.zeros(self.lanes, np.int64)
        while (at != end).any():
            mask = self._next(at, is_barrier)
            here = at[np.argmax(mask)]
            target, taken = self._block(blocks[here], None if mask.all() else mask)
            following = here + 1
            while following < end and not blocks[following]:
                following += 1
            if target is None:
                at[mask] = following
            else:
                to = end if target == "exit" else labels[target]
                at[mask] = to if taken is None else np.where(taken, to, following)[mask]

    def _next(self, at: np.ndarray, is_barrier: np.ndarray) -> np.ndarray:
        """Return the lanes to go on: those at the lowest block whose barrier, if any, is full."""
        end = len(is_barrier) - 1
        ready = (at != end) & ~self.stalled
        left = at[ready]
        while len(left):
            block = left.min()
            mask = ready & (at == block)
            if is_barrier[block]:
                gathered = ((at == block) | (at == end)).reshape(self.grid, -1).all(1)
                mask &= gathered[self.cta]
            if mask.any():
                return mask
            left = left[left > block]
        if ready.any():
            raise Fault("a barrier that not all threads reach")
        raise Fault("all threads that are left wait for an mbarrier")

    def _block(self, block: list[Instruction], mask: Mask) -> tuple[str | None, np.ndarray | None]:
        """Execute a block; return where it branches to, None if not, and the lanes that do."""
        warps = self.warps if mask is None else mask.reshape(-1, WARP).any(1).sum()
        for ins in block:
            m, number = mask, warps
            if ins.guard is not None:
                p = self.full(ins.guard, "pred")
                p = ~p if ins.negated else p
                if ins.op == "bra":
                    self.executed[ins.index] += warps
                    return str(ins.operands[0]), p
                m = p if mask is None else p & mask
                if not m.any():
                    continue
                number = m.reshape(-1, WARP).any(1).sum()
                m = None if m.all() else m
            self.executed[ins.index] += number
            if ins.op == "bra":
                return str(ins.operands[0]), None
            if ins.op in ("ret", "exit"):
                assert ins.guard is None, ins.text
                return "exit", None
            self._operations[ins.index](ins, m)
        return None, None

    def _contract(self) -> None:
        """Do what ptxas may do: a product without a rounding mode joins the sum that it goes into.

        `fused` holds destination, factors, summand and signs of such sums.
        """
        for block in self.kernel.blocks:
            products: dict[Operand, tuple[Operand, ...]] = {}
            for ins in block:
                written = ins.operands[0] if ins.operands else None
                if ins.op in ("add", "sub") and ins.suffix == "f32":
                    _, x, y = ins.operands
                    if x in products:
                        self.fused[ins.index] = (*products[x], y, "" if ins.op == "add" else "c")
                    elif y in products:
                        self.fused[ins.index] = (*products[y], x, "" if ins.op == "add" else "ab")
                gone = written if isinstance(written, list) else [written]
                products = {
                    name: factors
                    for name, factors in products.items()
                    if name not in gone and not set(factors) & set(gone)
                }
                if ins.op == "mul" and ins.suffix == "f32" and written not in ins.operands[1:]:
                    products[written] = ins.operands[1:]


def _is(operand: Operand, kind: str) -> bool:
    """Tell an operand of a kind; see `Processor`."""
    if kind == "M":
        return any(_is(operand, one) for one in "Va")
    if isinstance(operand, list):
        one = {"D": "d", "V": "v"}.get(kind)
        return one is not None and all(_is(x, one) for x in operand)
    if isinstance(operand, Address):
        return kind == "a"
    number = re.fullmatch(r"-?\d+|0[xX][\da-fA-F]+|0[fFdD][\da-fA-F]+", operand) is not None
    register = re.fullmatch(r"%[\w.]+", operand) is not None
    name = re.fullmatch(r"[A-Za-z_$][\w$]*", operand) is not None
    return {
        "d": register or operand == "_",
        "D": register or operand == "_",
        "v": register or number or name,
        "V": register or number or name,
        "s": re.fullmatch(r"(%[\w.]+|_)(\|%[\w.]+)?", operand) is not None,
        "p": re.fullmatch(r"!?(%[\w.]+)|[01]", operand) is not None,
        "i": number,
        "l": re.fullmatch(r"[$\w.]+", operand) is not None,
    }.get(kind, False)
