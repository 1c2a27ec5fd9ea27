"""Launches of Triton kernels on CPU tensors: compiled for a GPU, run by the interpreter.

`execute` runs any PTX of one entry, that of nvcc included. `Compiled` compiles a `triton.jit`
function and stands in for it, and appends a `Run` a launch to a list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptx.blackwell import Blackwell
from ptx.hopper import Hopper
from ptx.machine import Machine
from ptx.memory import GlobalMemory
from ptx.parse import Kernel, parse
from ptx.processor import Options

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
}
NUMBERS = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}
MACHINES: dict[int, type[Machine]] = {90: Hopper, 100: Blackwell}


@dataclass
class Run:
    """One launch.

    Attributes:
        kernel: its parsed PTX.
        capability: 90 for 9.0.
        grid: number of CTAs.
        executed: (instructions,) int64, by how many warps each was executed.
        hazards: how often, by (what, instruction, source line).
        unwritten: elements of outputs, in units of two bytes, that nobody wrote, by argument.
        traffic: bytes, sectors, wavefronts, tensor-core operations.
        shared_bytes: of a CTA.
        settings: of a Triton kernel, its constants, warps and stages.
    """

    kernel: Kernel
    capability: int
    grid: int
    executed: np.ndarray
    hazards: Counter[tuple[str, str, str]]
    unwritten: dict[str, int]
    traffic: Counter[str]
    shared_bytes: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Return the share of the kernel's instructions that a warp executed."""
        return float((self.executed > 0).mean())

    def faults(self) -> list[str]:
        """Return everything that is wrong, in a line each."""
        found = [
            f"{what}, {n} times: {text} ({line})" for (what, text, line), n in self.hazards.items()
        ]
        found += [f"{n} units of {name} are not written" for name, n in self.unwritten.items() if n]
        return [f"{self.kernel.name}, sm_{self.capability}: {one}" for one in found]


_parsed = cache(parse)


def execute(
    ptx: str,
    capability: int,
    grid: int,
    shared_bytes: int,
    arguments: Mapping[str, Tensor | np.generic],
    outputs: Collection[str],
    options: Options,
    *,
    threads: int | None = None,
    structure: Callable[[dict[str, int]], bytes] | None = None,
) -> Run:
    """Run a kernel on CPU tensors, which it changes as it would on a GPU.

    Args:
        ptx: with one entry.
        capability: 80, 86, 89, 90, 100 or 120.
        grid: number of CTAs.
        shared_bytes: dynamic shared memory of a CTA.
        arguments: in the order of the kernel's parameters; parameters after them are null pointers.
        outputs: names of tensors that the kernel writes in full and reads nothing of.
        threads: of a CTA; None: as the PTX says.
        structure: where the kernel has one parameter, its bytes from the tensors' addresses.

    Raises:
        Fault: a GPU would stop, or never end.
        NotImplementedError: an instruction that the interpreter does not know.
    """
    kernel = _parsed(options.edit(ptx) if options.edit else ptx)
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    full = [x for x in tensors.values() if x.numel()]
    memory = GlobalMemory(full)
    for tensor in full:
        memory.load(tensor)
    written = {name: memory.units(tensors[name]) for name in outputs}
    for units in written.values():
        memory.data.view(np.uint16)[units] = 0xFFFF
        memory.written[units] = False
    addresses = {name: memory.address(x) for name, x in tensors.items()}
    if structure is None:
        values = [
            np.uint64(addresses[name]).tobytes() if name in addresses else x.tobytes()
            for name, x in arguments.items()
        ]
    else:
        values = [structure(addresses)]
    names = [name for name, _ in kernel.params]
    params = dict.fromkeys(names, bytes(8)) | dict(zip(names, values, strict=False))
    machine = MACHINES.get(capability, Machine)(
        kernel,
        grid,
        shared_bytes,
        params,
        memory,
        options,
        threads=threads,
    )
    with np.errstate(all="ignore"):
        machine.run()
    for tensor in full:
        memory.store(tensor)
    return Run(
        kernel,
        capability,
        grid,
        machine.executed,
        machine.hazards,
        {name: int((~memory.written[units]).sum()) for name, units in written.items()},
        machine.traffic,
        shared_bytes,
    )


class Compiled:
    """A Triton kernel's place, `kernel[grid](...)`; launches are compiled and executed."""

    def __init__(
        self,
        kernel: Any,
        outputs: Callable[[Mapping[str, Any]], Collection[str]],
        capability: int,
        options: Options,
        runs: list[Run],
    ) -> None:
        """Stand in for `kernel`; `outputs` names what it writes, given its arguments."""
        self.kernel, self.outputs = kernel, outputs
        self.capability, self.options, self.runs = capability, options, runs

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        """Return the function that launches `grid[0]` programs."""
        (programs,) = grid

        def launch(*args: Any, num_warps: int = 4, num_stages: int = 3, **kwargs: Any) -> None:
            bound = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            signature, constants, attributes = _specialised(self.kernel, bound)
            ptx, shared = _compiled(
                self.kernel,
                tuple(signature.items()),
                tuple(constants.items()),
                tuple(attributes),
                self.capability,
                num_warps,
                num_stages,
            )
            arguments = {
                name: bound[name] if kind[0] == "*" else NUMBERS[kind](bound[name])
                for name, kind in signature.items()
                if kind != "constexpr"
            }
            run = execute(
                ptx,
                self.capability,
                programs,
                shared,
                arguments,
                self.outputs(bound),
                self.options,
            )
            run.settings = constants | dict(num_warps=num_warps, num_stages=num_stages)
            self.runs.append(run)

        return launch


def _specialised(
    kernel: Any, bound: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """Return signature, constants and places of multiples of 16, as Triton's launcher does."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, bound[parameter.name]
        free = not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(place)
        elif parameter.is_constexpr or (free and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if free and value % 16 == 0:
                divisible.append(place)
    return signature, constants, divisible


@cache
def _compiled(
    kernel: Any,
    signature: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    divisible: tuple[int, ...],
    capability: int,
    num_warps: int,
    num_stages: int,
) -> tuple[str, int]:
    """Return PTX and bytes of shared memory. Triton keeps them in its cache."""
    attributes = {(place,): [["tt.divisibility", 16]] for place in divisible}
    with _no_machine_code():
        made = triton.compile(
            ASTSource(kernel, dict(signature), dict(constants), attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
    return made.asm["ptx"], made.metadata.shared


@contextmanager
def _no_machine_code() -> Iterator[None]:
    """Leave out ptxas, which takes half of the time to compile; cached apart from what has it."""

    def hook(*arguments: Any) -> tuple[str, str] | None:
        if not arguments:
            return "no machine code", "no machine code"
        _, stages, *_ = arguments
        stages["cubin"] = lambda *_: b""
        return None

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.add_stages_inspection_hook = hook
        yield
