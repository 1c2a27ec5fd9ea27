"""Ahead-of-time compilation of every launch that the Triton kernels make; needs no GPU.

It finds a kernel that spills registers or takes more shared memory than a chip has, on any machine
and for every architecture that the kernel may run on.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from derta_kernels.attention.launches import attention_launches
from derta_kernels.head_loss.launches import head_loss_launches
from derta_kernels.launch import L2, REGISTERS, SHARED_KIB, THREADS, Launch
from derta_kernels.ptx_counts import Counts, inner_loops, total


class Resources(NamedTuple):
    """Registers and bytes of local memory per thread, and bytes of shared memory, of a launch."""

    registers: int
    local_bytes: int
    shared_bytes: int


@cache
def launches() -> tuple[Launch, ...]:
    """Return every launch that a kernel of this package can make."""
    return *head_loss_launches(), *attention_launches()


def kernel_of(launch: Launch, capability: int) -> Any:
    """Compile a launch for a compute capability (90 for 9.0) and return Triton's result.

    Raises:
        ValueError: Triton's interpreter is on, so there is nothing to compile.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, so there is nothing to compile: unset it")
    # In the order of the arguments: a set's order changes, and Triton's cache would miss.
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(launch.signature)
        if name in launch.divisible
    }
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), divisible)
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


def compiled(launch: Launch, capability: int) -> Resources:
    """Compile a launch to machine code and read its resources; see `kernel_of`."""
    kernel = kernel_of(launch, capability)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        report = subprocess.run(
            [cuobjdump, "-res-usage", binary], capture_output=True, text=True, check=True
        ).stdout

    def used(what: str) -> int:
        return int(re.findall(rf"{what}:(\d+)", report)[-1])

    return Resources(used("REG"), used("STACK") + used("LOCAL"), kernel.metadata.shared)


def loop_counts(launch: Launch, capability: int) -> Counts:
    """Count what a pass of a launch's loop over tiles asks of a multiprocessor, see `ptx_counts`.

    The loop over tiles that need no mask, which are most; of a row pass, both walks together.
    """
    loops = inner_loops(kernel_of(launch, capability).asm["ptx"], launch.num_warps)
    # Others find the tiles. Only those over tiles have products, or read memory in each pass.
    over_tiles = [one for one in loops if one.tensor_flops] or [one for one in loops if one.sectors]
    return over_tiles[0] if launch.tile_flops else total(over_tiles)


def redundancy(launch: Launch, counts: Counts) -> float | None:
    """Return products that are issued over those needed; None: tensor cores have none."""
    first_factor = next(iter(launch.signature.values()))
    if not launch.tile_flops or first_factor == "*fp32":
        return None
    return counts.tensor_flops / launch.tile_flops


class InFlight(NamedTuple):
    """Programs of a multiprocessor, and what all programs read twice over the bytes of L2."""

    programs: int
    share: float


def in_flight(launch: Launch, resources: Resources, capability: int) -> InFlight | None:
    """Count what a launch has in flight, at most; None: it reads nothing twice, or has no L2.

    A program that reads its bytes again finds them in a cache that replaces what was used least
    recently, if the bytes of all programs fit into it.
    """
    if not launch.twice_read or capability not in L2:
        return None
    threads = 32 * launch.num_warps
    by_warp = -(-32 * resources.registers // 256) * 256
    # A program takes 1 KiB of shared memory for itself.
    shared = (SHARED_KIB[capability] + 1) * 1024 // (resources.shared_bytes + 1024)
    programs = min(
        THREADS[capability] // threads, REGISTERS // (by_warp * launch.num_warps), shared
    )
    multiprocessors, mib = L2[capability]
    return InFlight(programs, programs * multiprocessors * launch.twice_read / (mib * 2**20))


def excess(launch: Launch, resources: Resources, capability: int) -> str | None:
    """Describe the resource that a launch exceeds on a chip, in a clause; None: it fits.

    A launch may exceed the L2 cache if it has one program on each multiprocessor, the fewest.
    """
    if resources.local_bytes:
        return f"{resources.local_bytes} bytes of local memory per thread, 0 allowed"
    flight = in_flight(launch, resources, capability)
    if flight is not None and flight.programs > 1 and flight.share > 1:
        return f"{flight.share:.2f} of the L2 cache in flight, by {flight.programs} programs"
    limit_kib = SHARED_KIB[capability]
    if resources.shared_bytes > limit_kib * 1024:
        return f"{resources.shared_bytes} bytes of shared memory, the chip has {limit_kib} KiB"
    return None


def compile_all(capabilities: Sequence[int]) -> Iterator[tuple[Launch, int, Resources, Counts]]:
    """Compile every launch for those of `capabilities` that it is meant for, in order.

    Triton caches the results. Counts are those of `loop_counts`.
    """
    every = launches()
    jobs = [
        (index, capability)
        for index, launch in enumerate(every)
        for capability in capabilities
        if capability in launch.capabilities
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for (index, capability), found in zip(jobs, pool.map(_job, jobs, chunksize=8), strict=True):
            yield every[index], capability, *found


def _job(job: tuple[int, int]) -> tuple[Resources, Counts]:
    """Compile the launch of that index: a kernel cannot be pickled, its index can."""
    index, capability = job
    launch = launches()[index]
    return compiled(launch, capability), loop_counts(launch, capability)
