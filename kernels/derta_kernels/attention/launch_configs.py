"""How the Triton kernels of interval attention are launched: tiles, warps and stages."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

ROOMY_KIB = 160
# The least and the largest head dimension that a tile is wide; float32 tiles are twice as large.
MIN_BLOCK_D = 32
MAX_HEAD_DIM = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}


class LaunchConfig(NamedTuple):
    """Tiles of `block_q` queries and `block_k` keys, by `num_warps` warps, with `num_stages` loads
    under way."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Target(NamedTuple):
    """What a configuration depends on.

    Attributes:
        kernel: "forward", "backward_queries" or "backward_keys".
        itemsize: bytes of an element, 2 or 4.
        block_d: head dimension, rounded up to a power of two.
        roomy: whether a program may have `ROOMY_KIB` of shared memory, else it is 99.
    """

    kernel: str
    itemsize: int
    block_d: int
    roomy: bool


LAUNCH_CONFIGS = {
    Target("forward", 2, 32, True): LaunchConfig(128, 64, 4, 3),
    Target("forward", 2, 64, True): LaunchConfig(128, 64, 4, 3),
    Target("forward", 2, 128, True): LaunchConfig(128, 64, 8, 3),
    Target("forward", 2, 256, True): LaunchConfig(64, 64, 8, 2),
    Target("forward", 4, 32, True): LaunchConfig(64, 32, 4, 2),
    Target("forward", 4, 64, True): LaunchConfig(64, 32, 4, 2),
    Target("forward", 4, 128, True): LaunchConfig(32, 32, 4, 2),
}
for t, c in list(LAUNCH_CONFIGS.items()):
    for kk in ("backward_queries", "backward_keys"):
        LAUNCH_CONFIGS[t._replace(kernel=kk)] = c


def block_d(head_dim: int) -> int:
    """How wide the tiles of a head dimension are."""
    return max(MIN_BLOCK_D, 1 << (head_dim - 1).bit_length())


def launch_config(
    kernel: str, dtype: torch.dtype, head_dim: int, device: torch.device
) -> LaunchConfig:
    """The row of `LAUNCH_CONFIGS` for a kernel on a device; Triton's interpreter has room."""
    roomy = True
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        roomy = properties.shared_memory_per_block_optin >= ROOMY_KIB * 1024
    return LAUNCH_CONFIGS[Target(kernel, dtype.itemsize, block_d(head_dim), roomy)]
