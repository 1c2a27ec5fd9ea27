"""Spoil one executed instruction of a kernel at a time: would anybody notice?

A mutation removes a barrier, a wait or the guard of an access to global memory, reverses a
comparison, moves the bound of one by 1, undoes a swizzle of shared memory, or shuffles over another
distance. It is noticed if a launch faults, does not end, has a hazard, leaves an output unwritten,
or ends with a row of a result that is off by more than two roundings. A survivor needs an
explanation in survivors.toml.

A bound that is moved changes a comparison only where both sides are that close. Most comparisons of
a tensor core's fragments never see it, so this kind takes those that some thread of a launch does.
"""

from __future__ import annotations

import itertools
import linecache
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ptx import launches
from ptx.equivalence import Footprint, Key, Proofs, union
from ptx.launches import MACHINES, Run
from ptx.machine import Machine
from ptx.memory import UNIT, Fault
from ptx.parse import WIDTHS, Instruction, Kernel, Operand
from ptx.processor import Mask

KINDS = ("barrier", "wait", "guard", "comparison", "bound", "swizzle", "shuffle")
OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
OPPOSITE |= {"lo": "hs", "ls": "hi", "hi": "ls", "hs": "lo"}
OPPOSITE |= {f"{name}u": f"{other}u" for name, other in OPPOSITE.items() if name[0] in "lgen"}
# With and without equality; and what to add to a bound so that it moves the other way.
ADJACENT = {"lt": ("le", -1), "le": ("lt", 1), "gt": ("ge", 1), "ge": ("gt", -1)}
MOVED = "%moved"  # a register for such a bound
KERNELS = Path(__file__).parents[2] / "kernels" / "derta_kernels"
ENDLESS = 4  # times as many blocks of instructions as the whole kernel executes


@dataclass(frozen=True)
class Mutation:
    """An instruction, and what stands in its place.

    Attributes:
        kind: one of `KINDS`.
        spoilt: the instruction.
        into: what is executed instead of it.
        apart: of a bound, the difference of both sides at which it changes the comparison.
    """

    kind: str
    spoilt: Instruction
    into: tuple[Instruction, ...]
    apart: int = 0

    def __str__(self) -> str:
        """Return the instruction, and which way its bound moves."""
        if self.kind != "bound":
            return self.spoilt.text
        name = self.into[-1].modifiers[0]
        return f"{self.spoilt.text}, {f'bound {self.apart:+}' if self.apart else f'as {name}'}"

    def of(self, kernel: Kernel) -> Kernel:
        """Return the kernel with this mutation."""
        count = itertools.count()
        blocks = [
            [
                replace(new, index=next(count))
                for old in block
                for new in (self.into if old is self.spoilt else (old,))
            ]
            for block in kernel.blocks
        ]
        widths = kernel.widths | {MOVED: WIDTHS.get(self.spoilt.type, 4)}
        return replace(kernel, blocks=blocks, widths=widths)


def is_bound(one: Instruction) -> bool:
    """Tell a comparison of whole numbers by size."""
    return one.op == "setp" and one.modifiers[0] in ADJACENT and one.type[0] in "su"


def _of_instruction(one: Instruction) -> Iterator[Mutation]:
    words = {one.op, *one.modifiers}
    if one.is_barrier or one.op == "fence" or words >= {"wgmma", "fence"}:
        yield Mutation("barrier", one, ())
    elif words & {"wait_group", "wait_all"} or any(x.startswith("wait::") for x in words):
        yield Mutation("wait", one, ())
    elif "try_wait" in words:
        # A wait that is passed at once: its predicate says that the phase is over.
        yield Mutation("wait", one, (_made(one, "setp.eq.u32", one.operands[0], "0", "0"),))
    elif one.op == "setp":
        name, *rest = one.modifiers
        reversed_ = _made(one, ".".join(["setp", OPPOSITE[name], *rest]))
        yield Mutation("comparison", one, (reversed_,))
        if is_bound(one):
            to, value, bound = one.operands
            other, step = ADJACENT[name]
            yield Mutation("bound", one, (_made(one, ".".join(["setp", other, *rest])),))
            moved = _made(one, f"add.{one.type}", MOVED, bound, str(step))
            compared = _made(one, f"setp.{one.suffix}", to, value, MOVED)
            yield Mutation("bound", one, (moved, compared), apart=step)
    elif one.op == "xor" and one.operands[2][0] != "%":
        yield Mutation("swizzle", one, (_made(one, "xor." + one.suffix, *one.operands[:2], "0"),))
    elif one.op in ("ldmatrix", "stmatrix"):
        plain = [x for x in one.modifiers if x != "trans"]
        other = plain if "trans" in words else [*plain[:-2], "trans", *plain[-2:]]
        yield Mutation("swizzle", one, (_made(one, ".".join([one.op, *other])),))
    elif one.op == "shfl" and "bfly" in words and one.operands[2][0] != "%":
        to, of, by, *rest = one.operands
        distance = str(int(by, 0) % 16 * 2 or 1)
        further = _made(one, "shfl." + one.suffix, to, of, distance, *rest)
        yield Mutation("shuffle", one, (further,))
    if one.guard is not None and "global" in words:
        yield Mutation("guard", one, (replace(one, guard=None, negated=False),))


def _made(one: Instruction, name: str, *operands: Operand) -> Instruction:
    """Return an instruction in the place of another; without operands, with its own."""
    op, *modifiers = name.split(".")
    return replace(
        one,
        op=op,
        suffix=".".join(modifiers),
        modifiers=tuple(modifiers),
        type=next((m for m in reversed(modifiers) if m in WIDTHS), ""),
        operands=operands or one.operands,
    )


@dataclass
class Launch:
    """A launch that can be repeated.

    Attributes:
        given: what `launches.execute` was called with; tensors as they were before.
        run: what it said of the launch.
        results: the tensors after it.
        blocks: how many blocks of instructions were run.
        apart: the differences -1, 0 and 1 of both sides of each comparison that `is_bound`.
        touched: what each instruction reads or writes of memory.
    """

    given: dict[str, Any]
    run: Run
    results: dict[str, Tensor]
    blocks: int = 0
    apart: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    touched: dict[Key, Footprint] = field(default_factory=dict)

    def again(self, kernel: Kernel) -> tuple[Run, dict[str, Tensor]]:
        """Run another kernel on the same arguments.

        Raises:
            Fault: what `launches.execute` raises, and also at the first hazard, or because the
                kernel does not end.
        """
        limit, apart, touched = ENDLESS * self.blocks, self.apart, self.touched

        class Impatient(MACHINES.get(self.run.capability, Machine)):  # type: ignore[misc]
            steps = 0

            def _block(self, *given: Any) -> Any:
                type(self).steps += 1
                if limit and type(self).steps > limit:
                    raise Fault("the kernel does not end")
                return super()._block(*given)

            def report(self, what: str, one: Instruction, number: int) -> None:
                raise Fault(f"{what}: {one.text}")

            def op_setp(self, one: Instruction, mask: Mask) -> None:
                if not limit and is_bound(one):
                    value, bound = (self.full(x, one.type) for x in one.operands[1:])
                    difference = (value.astype(np.int64) - bound.astype(np.int64))[mask]
                    apart[one.index].update(x for x in (-1, 0, 1) if (difference == x).any())
                super().op_setp(one, mask)

            def touch(self, shared: bool, one: Instruction, units: Any, *given: Any) -> None:
                if not limit:
                    lanes, write = given
                    warps = np.repeat(self.warp[lanes], units.shape[1])
                    by = 1 << warps % self.warps_of_cta
                    self.note(shared, (one.index, write), units.ravel(), warps, by)
                super().touch(shared, one, units, *given)

            def check_read(self, one: Instruction, units: Any, warps: Any) -> None:
                if not limit:  # of a product, which any of the warps may have asked for
                    everybody = np.full(len(units), 2**self.warps_of_cta - 1)
                    self.note(True, (one.index, False), units, warps, everybody)
                super().check_read(one, units, warps)

            def note(self, shared: bool, key: Key, units: Any, warps: Any, by: Any) -> None:
                """Note which warps of a block touch which place of its memories."""
                block = warps.astype(np.int64) // self.warps_of_cta
                if shared:
                    places = units - block * (self.stride // UNIT)
                else:
                    places = (1 + block) << 40 | units
                old = [touched[key]] if key in touched else []
                touched[key] = union([*old, (places, by.astype(np.int64))])

        arguments = _copies(self.given["arguments"])
        with (
            mock.patch.dict(MACHINES, {self.run.capability: Impatient}),
            mock.patch.object(launches, "_parsed", lambda _: kernel),
        ):
            run = launches.execute(**{**self.given, "arguments": arguments})
        self.blocks = self.blocks or Impatient.steps
        return run, _tensors(arguments)

    def notices(self, kernel: Kernel) -> str | None:
        """Say how a spoilt kernel is noticed; None: it is not."""
        try:
            run, results = self.again(kernel)
        except Fault as fault:
            return str(fault)
        except (AssertionError, IndexError, KeyError, ValueError, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}"
        if run.hazards:
            return next(iter(run.hazards))[0]
        if any(run.unwritten.values()):
            return "an output is not written"
        dtypes = [x.dtype for x in self.results.values() if x.is_floating_point()]
        band = 2 * max(torch.finfo(dtype).eps for dtype in dtypes)
        for name, expected in self.results.items():
            if not _equal(results[name], expected, band):
                return f"{name} differs"
        return None


def _equal(actual: Tensor, expected: Tensor, band: float) -> bool:
    """Compare row by row; a row is the last dimension of anything with two, or one number."""
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    width = expected.shape[-1] if expected.dim() > 1 else 1
    actual, expected = (x.double().reshape(-1, width) for x in (actual, expected))
    unlike = (actual != expected) & ~(actual.isnan() & expected.isnan())
    off = torch.where(expected.isfinite(), actual - expected, unlike.double())
    return bool((off.norm(dim=1) <= band * expected.nan_to_num(0, 0, 0).norm(dim=1)).all())


@dataclass
class Subject:
    """A kernel, and the launches of it that a mutation has to get past."""

    kernel: Kernel
    launches: list[Launch] = field(default_factory=list)

    @property
    def executed(self) -> np.ndarray:
        """(instructions,) int64, by how many warps of all launches."""
        return np.sum([one.run.executed for one in self.launches], axis=0)

    def mutations(self) -> Iterator[Mutation]:
        """Yield every mutation of what was executed, of bounds those that change a comparison."""
        executed = self.executed
        for one in self.kernel.instructions:
            if executed[one.index]:
                for mutation in _of_instruction(one):
                    if mutation.kind != "bound" or self.is_met(one, mutation.apart):
                        yield mutation

    def is_met(self, one: Instruction, apart: int) -> bool:
        """Tell if both sides of a comparison were that far apart in some thread."""
        return any(apart in launch.apart[one.index] for launch in self.launches)

    def notices(self, mutation: Mutation) -> str | None:
        """Say how the first launch that notices a mutation does; None: no launch does."""
        spoilt = mutation.of(self.kernel)
        return next((why for x in self.launches if (why := x.notices(spoilt)) is not None), None)

    @cached_property
    def proofs(self) -> Proofs:
        """The proofs that a mutation changes nothing, from what all launches touched."""
        keys = {key for one in self.launches for key in one.touched}
        return Proofs(
            self.kernel,
            {key: union(x.touched[key] for x in self.launches if key in x.touched) for key in keys},
        )


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record every launch of a compiled kernel."""
    found: list[Launch] = []
    execute = launches.execute

    def recording(*args: Any, **kwargs: Any) -> Run:
        names = ("ptx", "capability", "grid", "shared_bytes", "arguments", "outputs", "options")
        given = dict(zip(names, args, strict=False)) | kwargs
        before = _copies(given["arguments"])
        run = execute(**given)
        after = _tensors(_copies(given["arguments"]))
        found.append(Launch({**given, "arguments": before}, run, after))
        return run

    with mock.patch.object(launches, "execute", recording):
        yield found


def subjects(found: Sequence[Launch]) -> list[Subject]:
    """Gather launches by kernel: of those with the same name and outputs, the longest kernel.

    Its launches are repeated, to see that they give the same again.
    """
    by_kernel: dict[int, Subject] = {}
    for one in found:
        by_kernel.setdefault(id(one.run.kernel), Subject(one.run.kernel)).launches.append(one)
    longest: dict[tuple[str, ...], Subject] = {}
    for subject in sorted(by_kernel.values(), key=lambda one: len(one.kernel.instructions)):
        outputs = subject.launches[0].given["outputs"]
        longest[(subject.kernel.name, *outputs)] = subject
    for subject in longest.values():
        for one in subject.launches:
            noticed = one.notices(subject.kernel)
            assert noticed is None, f"{subject.kernel.name} itself: {noticed}"
    return list(longest.values())


def _copies(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Copy tensors with their strides, those that share storage too."""
    storages: dict[int, Any] = {}
    found = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            copy = storages.setdefault(storage.data_ptr(), storage.clone())
            value = torch.empty(0, dtype=value.dtype).set_(
                copy, value.storage_offset(), value.shape, value.stride()
            )
        found[name] = value
    return found


def _tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor)}


def line_of(one: Instruction) -> str:
    """Return the text of the innermost line of our own kernels that an instruction comes from."""
    for name, number in re.findall(r"(triton_\w+\.py|\w+_triton\.py):(\d+)", one.line):
        (path,) = KERNELS.rglob(name)
        if text := linecache.getline(str(path), int(number)).strip():
            return text
    return ""
