"""The cost of one pass of a kernel's innermost loop for a multiprocessor, read from its PTX.

A walk over the text computes addresses for all threads of a program at once and counts what the
instructions of each innermost loop take: products of tensor cores, wavefronts of shared memory (128
bytes a cycle without bank conflicts), instructions, and sectors (32 bytes) of global memory.

What depends on memory is the same for all threads of an address (a tile's start, a stage of a
pipeline) and a multiple of the banks, so it is left out of sums; conditions on it count as true.
Pointers count as 0, integers of a call (strides, sizes) as 2^20. So these are the counts of a tile
that is full. They do not know time, caches or latency, and ptxas issues somewhat fewer instructions
than PTX has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

WARP = 32
SECTOR = 32
BANKS = 32
WORD = 4
# Dense products of 16-bit floats, summed in float32, a cycle of a multiprocessor, by compute
# capability: a data sheet's peak over multiprocessors and boost clock.
TENSOR_FLOPS = {80: 2048, 86: 1024, 89: 1024, 90: 4096, 100: 8192, 120: 1024}
SCHEDULERS = 4
ARGUMENT = 2**20

Values = NDArray[np.int64]


@dataclass
class Counts:
    """The cost of one pass of a loop for a multiprocessor, over all warps of a program.

    Attributes:
        tensor_flops: floating-point operations of tensor cores.
        instructions: instructions of all warps, moves excepted.
        wavefronts: cycles of shared memory, reads of asynchronous products included.
        wavefronts_needed: the same without bank conflicts.
        sectors: sectors of global memory that loads, copies and stores touch.
        sectors_needed: the bytes of these over those of a sector.
    """

    tensor_flops: int = 0
    instructions: int = 0
    wavefronts: int = 0
    wavefronts_needed: int = 0
    sectors: int = 0
    sectors_needed: int = 0

    def cycles(self, capability: int) -> dict[str, float]:
        """Return the cycles that tensor cores, shared memory and the schedulers take at least."""
        return {
            "tensor": self.tensor_flops / TENSOR_FLOPS[capability],
            "shared": self.wavefronts,
            "issue": self.instructions / SCHEDULERS,
        }


def total(counts: Iterable[Counts]) -> Counts:
    """Add counts up."""
    return Counts(*(sum(x) for x in zip(*(astuple(one) for one in counts), strict=True)))


_LINE = re.compile(r"\s*(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*?);")
_LABEL = re.compile(r"(\$L__BB\w+):")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+")
_WIDTH = re.compile(r"(?:\.v(\d))?\.[a-z]+(\d+)$")


def inner_loops(ptx: str, num_warps: int) -> list[Counts]:
    """Count every innermost loop of one kernel, in the order of its execution."""
    blocks = _blocks(ptx)
    order = _order(blocks)
    loops = _loops(blocks, order)
    innermost = [header for header in loops if not loops.keys() & (loops[header] - {header})]
    found = {header: Counts() for header in innermost}
    outside = Counts()
    walk = _Walk(num_warps)
    for name in order:
        own = next((found[header] for header in innermost if name in loops[header]), outside)
        for instruction in blocks[name].instructions:
            walk.step(instruction, own)
    return [found[name] for name in order if name in found]


class _Block(NamedTuple):
    """Instructions of a basic block, and the blocks that may follow it."""

    instructions: list[re.Match[str]]
    followers: list[str]


def _blocks(ptx: str) -> dict[str, _Block]:
    """Return the basic blocks of a kernel by their labels."""
    name, falls_through = "entry", True
    blocks = {name: _Block([], [])}
    for line in ptx.splitlines():
        if label := _LABEL.match(line):
            if falls_through:
                blocks[name].followers.append(label[1])
            name, falls_through = label[1], True
            blocks[name] = _Block([], [])
        elif (found := _LINE.match(line)) and falls_through:
            blocks[name].instructions.append(found)
            if found[3].startswith("bra") and found[4].startswith("$L__BB"):
                blocks[name].followers.append(found[4])
                if found[2] is None:
                    falls_through = False
                else:
                    after = f"{name}+"
                    blocks[name].followers.append(after)
                    name = after
                    blocks[name] = _Block([], [])
    return blocks


def _order(blocks: dict[str, _Block]) -> list[str]:
    """Return the blocks so that each comes before those it leads to, but for loops."""
    seen: set[str] = set()
    order: list[str] = []

    def visit(name: str) -> None:
        seen.add(name)
        for follower in blocks[name].followers:
            if follower not in seen:
                visit(follower)
        order.append(name)

    visit("entry")
    return order[::-1]


def _loops(blocks: dict[str, _Block], order: list[str]) -> dict[str, set[str]]:
    """Return the blocks of every loop by its header, which all ways into the loop pass."""
    before: dict[str, list[str]] = {name: [] for name in order}
    for name in order:
        for follower in blocks[name].followers:
            before[follower].append(name)
    passed = {name: set(order) for name in order} | {"entry": {"entry"}}
    changed = True
    while changed:
        changed = False
        for name in order[1:]:
            now = set.intersection(*(passed[one] for one in before[name])) | {name}
            changed |= now != passed[name]
            passed[name] = now
    loops: dict[str, set[str]] = {}
    for name in order:
        for header in passed[name].intersection(blocks[name].followers):
            body = loops.setdefault(header, {header})
            waiting = [name]
            while waiting:
                one = waiting.pop()
                if one not in body:
                    body.add(one)
                    waiting += before[one]
    return loops


class _Walk:
    """Registers of all threads along the text.

    `known` lacks those that depend on memory alone; `partial` names those that lack a term of it.
    """

    def __init__(self, num_warps: int) -> None:
        self.num_warps = num_warps
        self.thread = np.arange(num_warps * WARP)
        self.known: dict[str, Values] = {"%tid.x": self.thread}
        self.partial: set[str] = set()

    def step(self, match: re.Match[str], counts: Counts) -> None:
        negated, guard, opcode, text = match.groups()
        operands = _OPERAND.findall(text)
        kind = opcode.partition(".")[0]
        active = self.value(guard) if guard else None
        active = np.ones_like(self.thread) if active is None else active ^ bool(negated)
        if kind not in ("mov", "bra", "ret"):
            counts.instructions += self.num_warps
        if kind in ("mma", "wgmma", "tcgen05"):
            self.multiply(opcode, operands, counts)
        elif ".shared" in opcode and kind in ("ld", "st", "ldmatrix", "stmatrix", "cp"):
            self.share(opcode, operands, active != 0, counts)
        if ".global" in opcode and kind in ("ld", "st", "cp") and len(operands) > 1:
            self.load(opcode, operands, active != 0, counts)
        self.assign(opcode, operands)

    def value(self, operand: str) -> Values | None:
        """Return an operand's value for each thread; None: it depends on memory."""
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            return np.full_like(self.thread, int(operand, 0))
        return self.known.get(operand)

    def address(self, operand: str) -> Values:
        """Return an address, [register + offset] or a symbol, without what depends on memory."""
        name, offset = re.fullmatch(r"\[\s*([%\w.$]+)\s*(?:\+?\s*(-?\w+))?\s*\]", operand).groups()  # type: ignore[union-attr]
        base = self.value(name)
        return (np.zeros_like(self.thread) if base is None else base) + int(offset or "0", 0)

    def multiply(self, opcode: str, operands: list[str], counts: Counts) -> None:
        """Count a product, and what an asynchronous one reads of shared memory."""
        if shape := re.search(r"\.m(\d+)n(\d+)k(\d+)", opcode):
            m, n, k = map(int, shape.groups())
            warps = 4 if opcode.startswith("wgmma") else 1
            counts.tensor_flops += self.num_warps // warps * 2 * m * n * k
            if warps == 1:
                return
            read = (n + m * (not operands[1].startswith("{"))) * k * self.num_warps // warps
        elif opcode.startswith("tcgen05.mma."):
            word = self.value(operands[3])
            assert word is not None
            n, m, k = int(word[0]) >> 17 << 3 & 511, int(word[0]) >> 24 << 4 & 511, 16
            counts.tensor_flops += 2 * m * n * k
            # All threads are counted in step: one thread issues it.
            counts.instructions -= self.num_warps - 1
            read = (n + m * (not operands[1].startswith("["))) * k
        else:
            return
        counts.wavefronts += read * 2 // (BANKS * WORD)
        counts.wavefronts_needed += read * 2 // (BANKS * WORD)

    def share(
        self, opcode: str, operands: list[str], active: NDArray[np.bool_], counts: Counts
    ) -> None:
        """Count the wavefronts of an access to shared memory."""
        address = self.address(next(x for x in operands if x.startswith("[")))
        if "matrix" in opcode:  # lanes 8 i to 8 i + 7 have the rows of matrix i
            matrices = int(re.search(r"\.x(\d)", opcode)[1])  # type: ignore[index]
            active = active & (self.thread % WARP < 8 * matrices)
            width = 16
        else:
            width = _width(opcode, operands)
        lanes = min(WARP, BANKS * WORD // width)
        for rows, on in zip(address.reshape(-1, lanes), active.reshape(-1, lanes), strict=True):
            if not on.any():
                continue
            words = np.unique(rows[on][:, None] // WORD + np.arange(max(1, width // WORD)))
            counts.wavefronts += int(np.bincount(words % BANKS).max())
            counts.wavefronts_needed += -(-len(words) // BANKS)

    def load(
        self, opcode: str, operands: list[str], active: NDArray[np.bool_], counts: Counts
    ) -> None:
        """Count the sectors of an access to global memory."""
        copies = opcode.startswith("cp")
        address = self.address([x for x in operands if x.startswith("[")][1 if copies else 0])
        width = _width(opcode, operands)
        for rows, on in zip(address.reshape(-1, WARP), active.reshape(-1, WARP), strict=True):
            touched = np.unique(rows[on][:, None] + np.arange(width))
            counts.sectors += len(np.unique(touched // SECTOR))
            counts.sectors_needed += -(-len(touched) // SECTOR)

    def assign(self, opcode: str, operands: list[str]) -> None:
        """Give the destination of an instruction its value, or none."""
        if not operands or not operands[0].startswith("%"):
            return
        target, *sources = operands
        values = [self.value(x) for x in sources]
        partial = any(x in self.partial for x in sources) or any(x is None for x in values)
        result: Values | None
        if opcode.startswith("ld.param"):
            partial = False
            result = np.full_like(self.thread, 0 if opcode.endswith("64") else ARGUMENT)
        elif opcode.startswith("setp") and partial:
            result = None
        else:
            result = _result(opcode, values)
        for name in target.split("|"):
            self.known.pop(name, None)
            self.partial.discard(name)
            if result is not None:
                self.known[name] = result
                if partial:
                    self.partial.add(name)


def _width(opcode: str, operands: list[str]) -> int:
    """Return the bytes that one thread reads or writes."""
    if opcode.startswith("cp"):
        return int(operands[2], 0)
    vector, bits = _WIDTH.search(opcode).groups()  # type: ignore[union-attr]
    return int(vector or 1) * int(bits) // 8


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "neg": lambda a: -a,
    "min": np.minimum,
    "max": np.maximum,
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "bfe": lambda a, place, length: a >> place & (1 << length) - 1,
}
COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _result(opcode: str, sources: list[Values | None]) -> Values | None:
    """Compute an instruction of integers; None: it depends on memory, or is not one of integers."""
    kind, *modifiers = opcode.split(".")
    if any(one.startswith(("f", "bf")) and one[-1].isdigit() for one in modifiers):
        return None
    known = [x for x in sources if x is not None]
    if len(known) < len(sources):
        first, second = sources[0], sources[-1]
        if kind in ("mad", "selp"):
            return second if kind == "mad" else first
        if kind in ("add", "or", "xor"):
            return second if first is None else first
        if kind == "sub":
            return first if second is None else -second
        return None
    if kind == "selp":
        return np.where(known[2] != 0, known[0], known[1])
    if kind == "setp":
        compared: Values = COMPARISONS[modifiers[0].rstrip("u")](*known).astype(np.int64)
        return compared
    if kind == "not" and "pred" in modifiers:
        return 1 - known[0]
    if kind not in _ARITHMETIC:
        return None
    if "u32" in modifiers and kind in ("shr", "bfe"):
        known = [x & 0xFFFFFFFF for x in known]
    computed: Values = _ARITHMETIC[kind](*known)
    return computed
