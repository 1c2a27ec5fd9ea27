"""Launches as ahead-of-time compilation takes them, and the shared memory of each chip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Shared memory that a program may take, in KiB, by compute capability (CUDA C++ programming guide,
# "Technical specifications per compute capability").
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

# Threads of a multiprocessor; multiprocessors and MiB of L2 cache of an A100, RTX 4090, H100, B200
# and RTX 5090. Chips of 8.6 have 6 MiB at most, which hold no long row of each multiprocessor.
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
L2 = {80: (108, 40), 89: (128, 72), 90: (132, 50), 100: (148, 126), 120: (170, 96)}
REGISTERS = 2**16  # of a multiprocessor, given out to a warp by 256


@dataclass(frozen=True)
class Launch:
    """One way to launch a kernel.

    Attributes:
        name: unique name.
        kernel: the `triton.jit` function.
        signature: type of every argument, in Triton's notation ("*bf16", "i32", "constexpr").
        constants: value of every constexpr argument.
        divisible: arguments that are multiples of 16; Triton compiles wider loads for them.
        num_warps: warps of a program.
        num_stages: iterations of a loop whose loads are in flight.
        tile_flops: floating-point operations of the products that a pass of the loop over tiles
            needs; 16-bit types leave them to tensor cores.
        twice_read: bytes of memory that each program reads twice; 0: none.
        capabilities: compute capabilities that the launch is for (90 for 9.0).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: frozenset[str]
    num_warps: int
    num_stages: int = 3
    tile_flops: int = 0
    twice_read: int = 0
    capabilities: Sequence[int] = tuple(SHARED_KIB)
