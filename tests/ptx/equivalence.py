"""Prove that no input can tell a mutation from its kernel: it spoils nothing.

Two proofs read the kernel's code. A barrier is needless if, on every path, no two accesses of which
one writes, by different warps, to the same two bytes, stand on its two sides with no other barrier
between them. Places in shared memory are functions of the thread and of the pipeline's stage, so
that those of all launches are all that there are. Of what runs on asynchronously, a wait counts as
the access of everything that it may have waited for.

A guard that is computed from the thread's number alone lets one of several threads through that
hold the same element: Triton's layouts leave such threads to a predicate of their own. All of them
would store the same value, or copy the same bytes, to the same place. That also goes for a
comparison with 0 that such a guard is, reversed: the threads that it lets through then are the
others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from ptx.parse import Address, Instruction, Kernel, Operand

# (bytes' places, the warps of a block that touch them as bits), sorted by place.
Footprint = tuple[np.ndarray, np.ndarray]
Key = tuple[int, bool]  # an instruction's index, and if it writes
Access = tuple[Footprint | None, bool]  # None: not known; and if it writes
OF_THREADS = {"%tid.x", "%laneid"}
PURE = {"mov", "and", "or", "xor", "not", "shl", "shr", "bfe", "bfi", "add", "sub", "setp", "selp"}
# What orders by other means than memory: it is not proved that a barrier beside two is needless.
ELSEWHERE = {"mbarrier", "tcgen05"}


def union(footprints: Iterable[Footprint]) -> Footprint:
    """Return all places, with all warps that touch them."""
    some = list(footprints)
    if not some:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    places, warps = (np.concatenate(x) for x in zip(*some, strict=True))
    order = np.argsort(places, kind="stable")
    unique, first = np.unique(places[order], return_index=True)
    return unique, np.bitwise_or.reduceat(warps[order], first) if len(unique) else warps


class Proofs:
    """The proofs of one kernel.

    Args:
        kernel: as compiled.
        touched: the footprint of each executed instruction that reads memory, or writes it.
    """

    def __init__(self, kernel: Kernel, touched: dict[Key, Footprint]) -> None:
        self.kernel, self.touched = kernel, touched

    def of(self, kind: str, spoilt: Instruction) -> str:
        """Return why a mutation of an instruction changes nothing; empty: not proved."""
        if kind == "barrier" and spoilt.is_barrier and self.is_needless(spoilt):
            return "no accesses that conflict stand on both sides of it without another barrier"
        if kind == "barrier" and spoilt.op == "wgmma" and self.orders_nothing(spoilt):
            return "another wgmma.fence stands between the product and all that touches its sums"
        if kind == "guard" and spoilt.op != "ld" and self._chooses_thread(spoilt.guard):
            return "the other threads would write the same to the same place"
        if kind == "comparison" and self._chooses_thread(next(_registers(spoilt.operands))):
            return "chooses others of the threads that write the same to the same place"
        return ""

    def unmodelled(self, kind: str, spoilt: Instruction) -> str:
        """Return what nothing here would show of a mutation; empty: nothing of that is known."""
        if kind == "barrier" and spoilt.is_barrier and self.is_needless(spoilt, elsewhere=False):
            return "orders tensor memory or an mbarrier alone, whose races are not modelled"
        if kind == "wait" and spoilt.op in ELSEWHERE:
            return "waits for tcgen05, which is done here when it is issued"
        return ""

    # Barriers

    def is_needless(self, barrier: Instruction, elsewhere: bool = True) -> bool:
        """Tell if all accesses, or all but those of `ELSEWHERE`, are in order without a barrier."""
        (start,) = (i for i, block in enumerate(self.kernel.blocks) if barrier in block[:1])
        before = self._until_barrier(self._predecessors[start], True)
        after = self._until_barrier([start], False)
        later = list(self._accesses(after, elsewhere))
        return not any(_conflict(x, y) for x in self._accesses(before, elsewhere) for y in later)

    @cached_property
    def _successors(self) -> list[list[int]]:
        blocks, found = self.kernel.blocks, []
        for i, block in enumerate(blocks):
            last = block[-1] if block else None
            following = [i + 1] if i + 1 < len(blocks) else []
            if last is not None and last.op in ("ret", "exit"):
                following = []
            elif last is not None and last.op == "bra":
                target = self.kernel.labels[str(last.operands[0])]
                following = [target, *(following if last.guard is not None else [])]
            found.append(following)
        return found

    @cached_property
    def _predecessors(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.kernel.blocks]
        for i, following in enumerate(self._successors):
            for j in following:
                found[j].append(i)
        return found

    def _until_barrier(self, starts: list[int], backwards: bool) -> set[int]:
        """Return the blocks that are reached from some without another barrier.

        A barrier is the first instruction of its block.
        """
        blocks, seen, left = self.kernel.blocks, set[int](), list(starts)
        while left:
            i = left.pop()
            if i in seen:
                continue
            seen.add(i)
            if backwards:
                if not (blocks[i] and blocks[i][0].is_barrier):
                    left += self._predecessors[i]
            else:
                left += [
                    j for j in self._successors[i] if not (blocks[j] and blocks[j][0].is_barrier)
                ]
        return seen

    def _accesses(self, blocks: Iterable[int], elsewhere: bool) -> Iterator[Access]:
        """Yield what the instructions of some blocks touch, or may have under way until then."""
        for one in (one for i in blocks for one in self.kernel.blocks[i]):
            words = {one.op, *one.modifiers}
            if one.op in ELSEWHERE:
                if elsewhere:
                    yield None, True
            elif words & {"wait_group", "wait_all"}:
                yield self._under_way[one.op]
            elif words & {"ld", "st", "cp", "ldmatrix", "stmatrix", "mma_async"}:
                found = [(i, w) for i, w in self.touched if i == one.index]
                yield from ((self.touched[key], key[1]) for key in found)
                if not found and not words & {"param", "commit_group"}:
                    yield None, True

    @cached_property
    def _under_way(self) -> dict[str, Access]:
        """What asynchronous copies write, and products read, of shared memory: all of them."""
        found = {}
        for op, writes in (("cp", True), ("wgmma", False)):
            indices = {one.index for one in self.kernel.instructions if one.op == op}
            some = [x for (i, w), x in self.touched.items() if i in indices and w == writes]
            found[op] = union(some), writes
        return found

    def orders_nothing(self, fence: Instruction) -> bool:
        """Tell if another `wgmma.fence` lies on all ways from what touches sums to the products.

        The first product of a kernel needs one too.
        """
        is_fence = {one.index for one in self.kernel.instructions if _is_fence(one)}
        after = self._up_to(fence, is_fence, 1)
        products = [one for one in after if "mma_async" in one.modifiers]
        sums = {name for one in products for name in _registers(one.operands[:1])}
        before = self._up_to(fence, is_fence, -1)
        return self.kernel.instructions[0] not in before and not any(
            sums.intersection(_registers(one.operands)) for one in before if one.op != "wgmma"
        )

    def _up_to(self, start: Instruction, ends: set[int], step: int) -> list[Instruction]:
        """Return what can be executed after an instruction, or before it, with no end between."""
        near = self._successors if step > 0 else self._predecessors
        blocks = [block[::step] for block in self.kernel.blocks]
        (first,) = (i for i, block in enumerate(blocks) if start in block)
        found: list[Instruction] = []
        seen = set[int]()
        left = [(first, blocks[first].index(start) + 1)]
        while left:
            i, place = left.pop()
            for one in blocks[i][place:]:
                if one.index in ends:
                    break
                found.append(one)
            else:
                left += [(j, 0) for j in near[i] if j not in seen]
                seen.update(near[i])
        return found

    # Predicates

    @cached_property
    def _setters(self) -> dict[str, list[Instruction]]:
        found = defaultdict(list)
        for one in self.kernel.instructions:
            for name in _registers(one.operands[:1]):
                found[name].append(one)
        return found

    @cached_property
    def _of_threads(self) -> dict[str, bool]:
        return dict.fromkeys(OF_THREADS, True)

    def is_of_threads(self, register: str) -> bool:
        """Tell if a register is computed from the thread's number and constants alone."""
        known = self._of_threads
        if register not in known:
            known[register] = False  # of a loop
            known[register] = bool(setters := self._setters[register]) and all(
                one.op in PURE
                and one.guard is None
                and all(map(self.is_of_threads, _registers(one.operands[1:])))
                for one in setters
            )
        return known[register]

    def _chooses_thread(self, predicate: str | None) -> bool:
        """Tell if a predicate compares bits of the thread's number with 0, and only guards writes.

        It is of the form in which Triton chooses one of the threads that hold the same element.
        """
        if predicate is None or not self.is_of_threads(predicate):
            return False
        same_form = all(
            one.op == "setp" and one.modifiers[0] in ("eq", "ne") and one.operands[2] == "0"
            for one in self._setters[predicate]
        )
        return same_form and self._only_guards_writes(predicate)

    def _only_guards_writes(self, predicate: str) -> bool:
        """Tell if nothing depends on a predicate but stores and copies, by others too."""
        instructions = self.kernel.instructions
        guarded = [one for one in instructions if one.guard == predicate]
        used = [one for one in instructions if predicate in _registers(one.operands[1:])]
        return all(one.op in ("st", "cp") for one in guarded) and all(
            one.op == "and" and self._only_guards_writes(str(one.operands[0])) for one in used
        )


def _is_fence(one: Instruction) -> bool:
    return one.op == "wgmma" and one.modifiers[0] == "fence"


def _registers(operands: Iterable[Operand]) -> Iterator[str]:
    for one in operands:
        if isinstance(one, Address):
            one = one.base
        if isinstance(one, list):
            yield from _registers(one)
        else:
            yield from (x.lstrip("!") for x in one.split("|") if x.lstrip("!")[:1] == "%")


def _conflict(one: Access, other: Access) -> bool:
    """Tell if two accesses, of which one writes, touch a place by different warps."""
    (a, writes), (b, writes_too) = one, other
    if not (writes or writes_too):
        return False
    if a is None or b is None:
        return True
    _, i, j = np.intersect1d(a[0], b[0], assume_unique=True, return_indices=True)
    both = a[1][i] | b[1][j]
    return bool(((both & (both - 1)) != 0).any())
