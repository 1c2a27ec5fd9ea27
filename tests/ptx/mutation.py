"""Spoil one executed instruction of a kernel at a time: would anybody notice?

A mutation removes a barrier, a wait or the guard of an access to global memory, reverses a
comparison, undoes a swizzle of shared memory, or shuffles over another distance. It is noticed if a
launch faults, does not end, has a hazard, leaves an output unwritten, or ends with a row of a
result that is off by more than two roundings. A survivor needs an explanation in survivors.toml.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ptx import launches
from ptx.launches import MACHINES, Run
from ptx.machine import Machine
from ptx.memory import Fault
from ptx.parse import WIDTHS, Instruction, Kernel, Operand

KINDS = ("barrier", "wait", "guard", "comparison", "swizzle", "shuffle")
OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
OPPOSITE |= {"lo": "hs", "ls": "hi", "hi": "ls", "hs": "lo"}
OPPOSITE |= {f"{name}u": f"{other}u" for name, other in OPPOSITE.items() if name[0] in "lgen"}
KERNELS = Path(__file__).parents[2] / "kernels" / "derta_kernels"
ENDLESS = 4  # times as many blocks of instructions as the whole kernel executes


@dataclass(frozen=True)
class Mutation:
    """An instruction, and what stands in its place."""

    kind: str
    spoilt: Instruction
    into: Instruction

    def of(self, kernel: Kernel) -> Kernel:
        """Return the kernel with this mutation."""
        blocks = [
            [self.into if one is self.spoilt else one for one in block] for block in kernel.blocks
        ]
        return replace(kernel, blocks=blocks)


def mutations(kernel: Kernel, executed: np.ndarray) -> Iterator[Mutation]:
    """Yield every mutation of the instructions that were executed."""
    for one in kernel.instructions:
        if executed[one.index]:
            yield from _of_instruction(one)


def _of_instruction(one: Instruction) -> Iterator[Mutation]:
    words = {one.op, *one.modifiers}
    if one.is_barrier or one.op == "fence" or words >= {"wgmma", "fence"}:
        yield Mutation("barrier", one, _made(one, "mov.b32", "_", "0"))
    elif words & {"wait_group", "wait_all"} or any(x.startswith("wait::") for x in words):
        yield Mutation("wait", one, _made(one, "mov.b32", "_", "0"))
    elif "try_wait" in words:
        # A wait that is passed at once: its predicate says that the phase is over.
        yield Mutation("wait", one, _made(one, "setp.eq.u32", one.operands[0], "0", "0"))
    elif one.op == "setp":
        name, *rest = one.modifiers
        yield Mutation("comparison", one, _made(one, ".".join(["setp", OPPOSITE[name], *rest])))
    elif one.op == "xor" and one.operands[2][0] != "%":
        yield Mutation("swizzle", one, _made(one, "xor." + one.suffix, *one.operands[:2], "0"))
    elif one.op in ("ldmatrix", "stmatrix"):
        plain = [x for x in one.modifiers if x != "trans"]
        other = plain if "trans" in words else [*plain[:-2], "trans", *plain[-2:]]
        yield Mutation("swizzle", one, _made(one, ".".join([one.op, *other])))
    elif one.op == "shfl" and "bfly" in words and one.operands[2][0] != "%":
        to, of, by, *rest = one.operands
        distance = str(int(by, 0) % 16 * 2 or 1)
        yield Mutation("shuffle", one, _made(one, "shfl." + one.suffix, to, of, distance, *rest))
    if one.guard is not None and "global" in words:
        yield Mutation("guard", one, replace(one, guard=None, negated=False))


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
    """

    given: dict[str, Any]
    run: Run
    results: dict[str, Tensor]
    blocks: int = 0

    def again(self, kernel: Kernel) -> tuple[Run, dict[str, Tensor]]:
        """Run another kernel on the same arguments.

        Raises:
            Fault: what `launches.execute` raises, and also at the first hazard, or because the
                kernel does not end.
        """
        limit = ENDLESS * self.blocks

        class Impatient(MACHINES.get(self.run.capability, Machine)):  # type: ignore[misc]
            steps = 0

            def _block(self, *given: Any) -> Any:
                type(self).steps += 1
                if limit and type(self).steps > limit:
                    raise Fault("the kernel does not end")
                return super()._block(*given)

            def report(self, what: str, one: Instruction, number: int) -> None:
                raise Fault(f"{what}: {one.text}")

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
    off = torch.where(expected.isfinite(), actual - expected, (actual != expected).double())
    return bool((off.norm(dim=1) <= band * expected.nan_to_num(0, 0, 0).norm(dim=1)).all())


@dataclass
class Subject:
    """A kernel, and the launches of it that a mutation has to get past."""

    kernel: Kernel
    capability: int
    launches: list[Launch] = field(default_factory=list)

    @property
    def executed(self) -> np.ndarray:
        """(instructions,) int64, by how many warps of all launches."""
        return np.sum([one.run.executed for one in self.launches], axis=0)

    def notices(self, mutation: Mutation) -> str | None:
        """Say how the first launch that notices a mutation does; None: no launch does."""
        spoilt = mutation.of(self.kernel)
        return next((why for x in self.launches if (why := x.notices(spoilt)) is not None), None)


@contextmanager
def recorded(kernel: str) -> Iterator[list[Launch]]:
    """Record every launch of a compiled kernel; a name that the PTX's only contains will do."""
    found: list[Launch] = []
    execute = launches.execute

    def recording(*args: Any, **kwargs: Any) -> Run:
        names = ("ptx", "capability", "grid", "shared_bytes", "arguments", "outputs", "options")
        given = dict(zip(names, args, strict=False)) | kwargs
        before = _copies(given["arguments"])
        run = execute(**given)
        if kernel in run.kernel.name:
            after = _tensors(_copies(given["arguments"]))
            found.append(Launch({**given, "arguments": before}, run, after))
        return run

    with mock.patch.object(launches, "execute", recording):
        yield found


def subjects(found: Sequence[Launch]) -> list[Subject]:
    """Gather launches by kernel, and repeat each to see that it gives the same again."""
    by_kernel: dict[int, Subject] = {}
    for one in found:
        kernel = one.run.kernel
        by_kernel.setdefault(id(kernel), Subject(kernel, one.run.capability)).launches.append(one)
    for subject in by_kernel.values():
        for one in subject.launches:
            noticed = one.notices(subject.kernel)
            assert noticed is None, f"{subject.kernel.name} itself: {noticed}"
    return list(by_kernel.values())


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
    for name, number in re.findall(r"(triton_\w+\.py|row_pass_triton\.py):(\d+)", one.line):
        (path,) = KERNELS.rglob(name)
        if text := linecache.getline(str(path), int(number)).strip():
            return text
    return ""
