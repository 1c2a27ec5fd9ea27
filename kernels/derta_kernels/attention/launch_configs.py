"""Launch configurations of the Triton kernels of interval attention: tiles, warps and stages.

They are chosen so that nothing spills on any chip and no product is computed twice, and then by
what bounds them (`derta bench resources` prints both). They are not tuned on a GPU yet.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from derta_kernels.triton_support import omits_fence

MIN_BLOCK_D = 32
MAX_HEAD_DIM = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}


# The largest number of multiprocessors of the GPUs of large models (a B200 has 148, an H100 132).
MULTIPROCESSORS = 148


class AttentionLaunch(NamedTuple):
    """Tiles of `block_q` queries and `block_k` keys, and Triton's options for them.

    If `apart`, dk and dv take a launch each.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    apart: bool = False


class Target(NamedTuple):
    """The conditions that a configuration depends on.

    Attributes:
        kernel: "forward", "backward_queries" or "backward_keys".
        itemsize: bytes of an element, 2 or 4.
        block_d: head dimension, rounded up to a power of two.
        chip: 80, 90, 100, or 86 for all chips that give a program 99 KiB of shared memory.
        has_softcap: if True, the row is for a soft-cap, whose temporaries need smaller tiles.
    """

    kernel: str
    itemsize: int
    block_d: int
    chip: int
    has_softcap: bool = False


CHIPS = (80, 86, 90, 100)


# (itemsize, block_d): the fields of `AttentionLaunch` for each of `CHIPS`. float32 runs
# without tensor cores, which would round its inputs.
_TABLE: dict[str, dict[tuple[int, int], list[tuple[Any, ...]]]] = {
    "forward": {
        (2, 32): [(128, 64, 8, 3)] * 4,
        (2, 64): [(128, 64, 8, 3)] * 4,
        (2, 128): [(128, 32, 8, 3), (64, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3)],
        (2, 256): [(64, 64, 8, 1), (64, 64, 8, 1), (128, 32, 8, 2), (64, 64, 8, 1)],
        (4, 32): [(16, 16, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)],
        (4, 64): [(16, 16, 4, 1)] * 4,
        (4, 128): [(16, 16, 8, 1)] * 4,
    },
    "backward_queries": {
        (2, 32): [(128, 64, 8, 3)] * 4,
        (2, 64): [(128, 32, 8, 3), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2)],
        (2, 128): [(64, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)],
        (2, 256): [(32, 64, 8, 2), (32, 64, 8, 1), (128, 16, 8, 2), (64, 32, 8, 1)],
        (4, 32): [(16, 16, 8, 1)] * 4,
        (4, 64): [(16, 16, 4, 1)] * 4,
        (4, 128): [(16, 16, 8, 1)] * 4,
    },
    "backward_keys": {
        (2, 32): [(64, 128, 8, 3)] * 4,
        (2, 64): [(16, 128, 8, 2), (16, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2)],
        (2, 128): [(64, 64, 8, 2), (64, 64, 8, 1), (32, 128, 8, 2), (32, 64, 8, 3)],
        (2, 256): [(32, 32, 4, 1, True)] * 4,
        (4, 32): [(32, 32, 4, 1)] * 4,
        (4, 64): [(16, 16, 4, 1)] * 4,
        (4, 128): [(16, 16, 8, 1)] * 4,
    },
}
LAUNCH_CONFIGS = {
    Target(kernel, itemsize, block_d, chip): AttentionLaunch(*config)
    for kernel, rows in _TABLE.items()
    for (itemsize, block_d), configs in rows.items()
    for chip, config in zip(CHIPS, configs, strict=True)
} | {
    Target("backward_keys", 2, 128, 80, True): AttentionLaunch(64, 64, 8, 1),
    Target("backward_keys", 2, 128, 90, True): AttentionLaunch(16, 128, 8, 2),
}


def key_parts(tokens: int, kv_heads: int, group: int, block_k: int) -> int:
    """Return how many programs share the query heads of a tile of keys.

    It is the least divisor of the group that gives every multiprocessor a program, or the group.
    It does not depend on the GPU, nor on how a batch is cut into examples, so that all sum alike.

    Args:
        tokens: T of the flattened batch.
        kv_heads: Hkv.
        group: Hq / Hkv.
        block_k: keys of a tile.
    """
    programs = -(-tokens // block_k) * kv_heads
    parts = (one for one in range(1, group) if not group % one)
    return next((one for one in parts if programs * one >= MULTIPROCESSORS), group)


def parts_bytes(dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Return the bytes of the float32 parts of dk and dv and of one sum, at most on any chip."""
    parts = max(
        key_parts(tokens, kv_heads, heads // kv_heads, config.block_k)
        for target, config in LAUNCH_CONFIGS.items()
        if target[:3] == ("backward_keys", dtype.itemsize, block_d(head_dim))
    )
    return 4 * tokens * kv_heads * head_dim * (2 * parts + 1) if parts > 1 else 0


def block_d(head_dim: int) -> int:
    """Return the width of the tiles of a head dimension."""
    return max(MIN_BLOCK_D, 1 << (head_dim - 1).bit_length())


def chip(capability: int, shared_bytes: int) -> int:
    """Return the one of `CHIPS` that stands for a compute capability (90 for 9.0)."""
    if shared_bytes < 160 * 1024:
        return 86
    return max(one for one in (80, 90, 100) if one <= capability)


def launch_config(
    kernel: str, dtype: torch.dtype, head_dim: int, has_softcap: bool, device: torch.device
) -> AttentionLaunch:
    """Return the launch of a kernel; Triton's interpreter counts as an 80."""
    target = Target(kernel, dtype.itemsize, block_d(head_dim), _chip_of(device), has_softcap)
    config = LAUNCH_CONFIGS.get(target) or LAUNCH_CONFIGS[target._replace(has_softcap=False)]
    return fenced(config, target.chip)


def fenced(config: AttentionLaunch, chip: int) -> AttentionLaunch:
    """Return the configuration without the copies that Triton leaves unfenced (`omits_fence`)."""
    return config._replace(num_stages=1) if omits_fence(chip) else config


@cache
def _chip_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    properties: Any = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return chip(capability, properties.shared_memory_per_block_optin)
