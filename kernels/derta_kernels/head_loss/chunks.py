"""The rows of a chunk, a fixed function of the problem, the device and the budget.

It reads nothing that changes from call to call, least of all free memory: the gradient of weight is
a sum over chunks, so other chunks would give it other bits, and a run that resumes on a fuller
device would leave the path of the one that was interrupted. kernels/README.md has the counts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

MIB = 2**20
GIB = 2**30
SCRATCH_MB = {"cpu": 96, "cuda": 1024}
SCRATCH_MB_A_GIB = 32  # of a GPU's memory, where that is less
ROW_MULTIPLE = 128
# What a GPU's products are counted by. Libraries choose their tiles by themselves; this is the
# largest that they use, in rows and columns of the result.
TILE = (128, 256)
# Operations of the tensor cores in the time of a byte of memory: an H100's, the most of any GPU
# with memory of its class, so that what hides there hides elsewhere.
OPERATIONS_A_BYTE = 300
# The launches of a chunk and the ramps of its products, in steps (see `_steps`): 20 us of an H100.
RAMP_STEPS = 2048
# A smaller scratch is taken where it costs no more than this.
NEARLY = 1.02


class Chip(NamedTuple):
    """The properties of a device that chunks depend on.

    Attributes:
        device_type: "cuda", or another type, which is treated as a CPU.
        processors: multiprocessors of a GPU.
        memory: bytes of a GPU; whole GiB count.
    """

    device_type: str
    processors: int = 1
    memory: int = 0


class Problem(NamedTuple):
    """The products of a head.

    Attributes:
        vocabulary, width: V and d.
        size: bytes of a logit in the scratch.
        trainable: if True, the gradient of weight is formed.
    """

    vocabulary: int
    width: int
    size: int
    trainable: bool


def chip_of(device: torch.device) -> Chip:
    """Return the properties of a device that chunks depend on."""
    if device.type != "cuda":
        return Chip(device.type)
    properties: Any = torch.cuda.get_device_properties(device)
    return Chip("cuda", properties.multi_processor_count, properties.total_memory)


def chunk_rows(
    count: int, problem: Problem, chip: Chip, scratch_mb: float | None, scratches: int = 1
) -> int:
    """Return the most rows of a chunk of `count` rows, a multiple of 128; see `split`.

    On a CPU it is what the budget holds. On a GPU it is the number, within the budget, for which
    all products of all chunks take the least time by count (`_steps`), or one within 2% of that
    with less memory.

    Args:
        scratch_mb: MiB that `scratches` buffers may take together, never below 128 rows of them;
            None: 96 on a CPU; on a GPU 1024, or 32 for each GiB of its memory where that is less.
    """
    if scratch_mb is None:
        scratch_mb = SCRATCH_MB["cpu"]
        if chip.device_type == "cuda":
            scratch_mb = min(SCRATCH_MB["cuda"], SCRATCH_MB_A_GIB * (chip.memory // GIB))
    tile_bytes = max(1, problem.vocabulary * scratches) * problem.size * ROW_MULTIPLE
    most = max(1, int(scratch_mb * MIB) // tile_bytes)  # an empty shard of the vocabulary fits
    if chip.device_type == "cuda" and count > 0:
        most = _fastest(_tiles(count, ROW_MULTIPLE), most, problem, chip.processors)
    return most * ROW_MULTIPLE


def split(count: int, most: int) -> list[slice]:
    """Cut `count` rows into as few chunks as `most` rows allow, as equal as whole tiles allow."""
    unit = min(ROW_MULTIPLE, most)
    tiles = _tiles(count, unit)
    chunks = _tiles(tiles, _tiles(most, unit))
    starts = [unit * (tiles * i // chunks) for i in range(chunks)]
    return [slice(*ends) for ends in zip(starts, [*starts[1:], count], strict=True)]


@lru_cache(maxsize=1024)
def _fastest(tiles: int, most: int, problem: Problem, processors: int) -> int:
    """Return the tiles of a chunk's rows, at most `most`, of which `tiles` take the least time."""
    steps = {}
    for chunks in range(_tiles(tiles, most), tiles + 1):
        small, larger = divmod(tiles, chunks)
        size = _tiles(tiles, chunks)
        if size not in steps:  # fewer chunks of the same size come first
            steps[size] = (chunks - larger) * _steps(small, problem, processors)
            steps[size] += larger * _steps(small + 1, problem, processors)
    fewest = min(steps.values())
    return min(size for size in steps if steps[size] <= NEARLY * fewest)


def _steps(tiles: int, problem: Problem, processors: int) -> float:
    """Count the time of a chunk of so many tiles of rows.

    A step is the time in which a multiprocessor multiplies a column by a row into one `TILE`, about
    9 ns on an H100. A product takes a wave of its tiles after the other, or the time of its bytes
    where that is longer.
    """
    vocabulary, width, size, trainable = problem
    rows = tiles * ROW_MULTIPLE
    steps_a_byte = OPERATIONS_A_BYTE / (2 * TILE[0] * TILE[1] * processors)

    def product(m: int, n: int, k: int, result_bytes: int) -> float:
        waves = _tiles(_tiles(m, TILE[0]) * _tiles(n, TILE[1]), processors)
        return max(waves * k, steps_a_byte * (size * k * (m + n) + result_bytes * m * n))

    steps = RAMP_STEPS + product(rows, vocabulary, width, size)
    steps += product(rows, width, vocabulary, size)
    if trainable:
        steps += product(vocabulary, width, rows, 2 * max(4, size))  # read and written
    return steps


def _tiles(count: int, size: int) -> int:
    return -(-count // size)
