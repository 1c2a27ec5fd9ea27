"""What ahead-of-time compilation is told of a launch, and what chips have for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Shared memory that a program may have, in KiB, by compute capability (CUDA C++ programming guide,
# "Technical specifications per compute capability").
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@dataclass(frozen=True)
class Launch:
    """One way to launch a kernel.

    Attributes:
        name: of the launch, unique.
        kernel: the `triton.jit` function.
        signature: type of every argument, in Triton's words ("*bf16", "i32", "constexpr").
        constants: value of every constexpr argument.
        divisible: the arguments that are multiples of 16, which Triton makes use of.
        num_warps: warps of a program.
        num_stages: loads of a loop under way.
        capabilities: that it is for.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: frozenset[str]
    num_warps: int
    num_stages: int = 3
    capabilities: Sequence[int] = tuple(SHARED_KIB)
