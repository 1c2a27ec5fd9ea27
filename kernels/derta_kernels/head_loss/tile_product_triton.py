"""The products of a sparse backward pass in Triton: dead tiles of the gradient are never loaded.

One kernel forms both. A program owns one tile of the result and walks the live tiles of the
gradient that lie across from it, which a list names: for d_hidden those of its rows, for d_weight
those of its columns. d_weight is added up over chunks, so a program without a live tile there
neither reads nor writes it.

Memory: the lists, 4 bytes a tile, and d_hidden of a chunk. There are no atomics and the order of a
list is that of the tiles, so every run gives the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from derta_kernels.head_loss.row_pass import TILE
from derta_kernels.triton_support import omits_fence


class TileLaunch(NamedTuple):
    """A product of tiles: `width` columns of the result a program, `depth` of a tile at a time."""

    width: int
    depth: int
    num_warps: int
    num_stages: int


# By the bytes of a number. Half of the stages load the place of a tile, which its copies wait for;
# the others take 64 KiB of bfloat16 on compute capability 8.x and 96 KiB on 9.0. float32 is
# multiplied without tensor cores, exactly, where wider tiles would spill.
LAUNCH_CONFIGS = {2: TileLaunch(128, 64, 8, 5), 4: TileLaunch(32, 32, 8, 1)}


def launch_config(itemsize: int, capability: int) -> TileLaunch:
    """Return the launch for numbers of `itemsize` bytes and a compute capability (90 for 9.0)."""
    config = LAUNCH_CONFIGS[itemsize]
    # Without stages there are no copies that a fence would have to order.
    return config._replace(num_stages=1) if omits_fence(capability) else config


def constants_of(itemsize: int, is_weight: bool) -> dict[str, Any]:
    """Return the constants of a launch for numbers of `itemsize` bytes."""
    config = LAUNCH_CONFIGS[itemsize]
    return {
        "IS_WEIGHT": is_weight,
        "PRECISION": "ieee" if itemsize == 4 else "tf32",
        "TILE": TILE,
        "WIDTH": config.width,
        "DEPTH": config.depth,
    }


def times_weight(gradient: Tensor, weight: Tensor, live: Tensor) -> Tensor:
    """Return gradient (C, V) @ weight (V, d) over live tiles, (C, d) in gradient's dtype.

    Args:
        live: (ceil(C / TILE), ceil(V / TILE)) bool.
    """
    product = gradient.new_empty(len(gradient), weight.shape[1])
    _launch(gradient, weight, product, live, is_weight=False)
    return product


def add_product(total: Tensor, gradient: Tensor, hidden: Tensor, live: Tensor) -> None:
    """Add gradient (C, V)^T @ hidden (C, d) over live tiles to total (V, d) float32.

    Args:
        live: (ceil(C / TILE), ceil(V / TILE)) bool.
    """
    _launch(gradient, hidden, total, live.T, is_weight=True)


@cache
def _capability(device: torch.device) -> int:
    """Return the compute capability, 90 for 9.0; the interpreter's CPU counts as 8.0."""
    if device.type == "cpu":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _launch(
    gradient: Tensor, other: Tensor, product: Tensor, live: Tensor, *, is_weight: bool
) -> None:
    """Launch the kernel; live is (tiles of the result's rows, tiles across)."""
    config = launch_config(gradient.itemsize, _capability(gradient.device))
    (rows, vocabulary), stride, width = gradient.shape, gradient.stride(0), product.shape[1]
    # Live tiles first, in their order.
    places = live.to(torch.int8, memory_format=torch.contiguous_format)
    places = places.argsort(dim=1, descending=True, stable=True).to(torch.int32)
    other = other.to(gradient.dtype)  # on CPU tensors, which the interpreter takes, see `chunked`
    other = other if other.stride(1) == 1 else other.contiguous()
    if width == 0:
        return
    with torch.cuda.device_of(gradient):
        tile_product[(len(live) * triton.cdiv(width, config.width),)](
            gradient.as_strided((rows, stride), (stride, 1)),  # with its padding
            other,
            product,
            places,
            live.sum(1, dtype=torch.int32),
            rows,
            vocabulary,
            width,
            stride,
            other.stride(0),
            live.shape[1],
            **constants_of(gradient.itemsize, is_weight),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


@triton.jit
def tile_product(
    gradient,  # (C, V), rows gradient_stride apart, 0 between them
    other,  # (V, d), or (C, d) with IS_WEIGHT, rows other_stride apart
    product,  # (C, d), overwritten; with IS_WEIGHT (V, d) float32, added to
    places,  # (I, across) int32, the tiles across from each tile of the product's rows, live first
    counts,  # (I,) int32, how many of them are live
    rows,  # C
    vocabulary,  # V
    width,  # d
    gradient_stride,
    other_stride,
    across,
    IS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of the product of a program
    DEPTH: tl.constexpr,  # of a tile that is multiplied at a time
):
    # Programs of one tile are neighbours: they read the same gradient.
    widths = tl.cdiv(width, WIDTH)
    i_tile = tl.program_id(0) // widths
    count = tl.load(counts + i_tile)
    if IS_WEIGHT:
        if count == 0:
            return
    o_row = i_tile * TILE + tl.arange(0, TILE)
    o_width = tl.program_id(0) % widths * WIDTH + tl.arange(0, WIDTH)
    m_row = o_row < (vocabulary if IS_WEIGHT else rows)
    m_width = o_width < width
    p_place = places + i_tile.to(tl.int64) * across
    STEPS: tl.constexpr = TILE // DEPTH
    b_product = tl.zeros([TILE, WIDTH], tl.float32)
    for step in range(0, count * STEPS):
        place = tl.load(p_place + step // STEPS)
        o_depth = place * TILE + step % STEPS * DEPTH + tl.arange(0, DEPTH)
        m_depth = o_depth < (rows if IS_WEIGHT else vocabulary)
        o_far = o_depth.to(tl.int64)
        # The padding of a row is 0. A mask that ends with the vocabulary, which may be odd, would
        # forbid 16-byte copies.
        if IS_WEIGHT:
            p_gradient = gradient + o_far[None, :] * gradient_stride + o_row[:, None]
            m_gradient = (o_row < gradient_stride)[:, None] & m_depth[None, :]
        else:
            p_gradient = gradient + o_row.to(tl.int64)[:, None] * gradient_stride + o_depth[None, :]
            m_gradient = m_row[:, None] & (o_depth < gradient_stride)[None, :]
        b_gradient = tl.load(p_gradient, mask=m_gradient, other=0.0)
        p_other = other + o_far[:, None] * other_stride + o_width[None, :]
        b_other = tl.load(p_other, mask=m_depth[:, None] & m_width[None, :], other=0.0)
        b_product = tl.dot(b_gradient, b_other, b_product, input_precision=PRECISION)
    p_product = product + o_row.to(tl.int64)[:, None] * width + o_width[None, :]
    m_product = m_row[:, None] & m_width[None, :]
    if IS_WEIGHT:
        b_product += tl.load(p_product, mask=m_product, other=0.0)
    tl.store(p_product, b_product.to(product.dtype.element_ty), mask=m_product)
