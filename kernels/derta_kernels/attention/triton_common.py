"""The parts that the forward and the backward kernels of interval attention share.

A query i sees a key j where j <= i < visible_until[j], so the smallest and the largest
`visible_until` of a tile of keys decide what a tile of queries start <= i < end sees of it:

    largest <= start                           nothing: the tile is never loaded
    smallest >= end, last key <= start         all of it: the tile needs no mask
    else                                       a part: it is masked, score by score

A window adds the same test of the smallest and the largest positions. A kernel reads the extremes
of `SCAN` tiles in one load (`wanted_key_tiles`), finds runs of tiles of one kind by two reductions
(`next_run`), and walks each run in a pipelined loop. A tile that nobody sees costs 8 bytes of that
load.

Invariant: a tile without a mask is read to its last key, so it must end within the example. It
does, as its last key is not after the first query.

Names: p_ is a pointer, o_ offsets, m_ a mask, b_ the values of a block, i_ an index. T is the
number of tokens of the flattened batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from derta_kernels.attention import tiles
from derta_kernels.attention.launch_configs import AttentionLaunch, block_d
from derta_kernels.attention.layout import Layout

SCAN = tl.constexpr(128)  # tiles looked at in one load
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# A running maximum starts from it: no finite number lies below, and -inf - -inf is no number.
# Scores are in base 2 here: those below -2.36e38 overflow to -inf before they are compared.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def constants(
    head_dim: int, group: int, config: AttentionLaunch, has_softcap: bool, has_window: bool
) -> dict[str, Any]:
    """Return the constexpr arguments that every kernel takes."""
    return dict(
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        HAS_SOFTCAP=has_softcap,
        HAS_WINDOW=has_window,
    )


def key_constants(parts: int, form_d_k: bool, form_d_v: bool) -> dict[str, Any]:
    """Return the constexpr arguments that `backward_keys` takes besides."""
    return dict(PARTS=parts, FORM_D_K=form_d_k, FORM_D_V=form_d_v)


def positions_of(layout: Layout, block: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Return positions and their extremes by tile of `block` tokens."""
    if window is None:  # kernels without a window read neither: any int32 pointers do
        return layout.visible_until, layout.visible_until
    return tiles.positions(layout), tiles.position_extremes(layout, block)


def strides(*operands: Tensor) -> list[int]:
    """Return the strides of tokens and heads of (T, heads, D) operands, in elements."""
    return [stride for x in operands for stride in x.stride()[:2]]


@triton.jit
def load_rows(
    rows,  # (T, D) of one head, rows `stride` elements apart, D contiguous
    start,
    stride,
    m_row,  # (BLOCK,) bool, not read unless MASKED
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load (BLOCK, BLOCK_D) from row `start` on: 0 past HEAD_DIM and, if MASKED, outside m_row."""
    o_row = tl.arange(0, m_row.shape[0])[:, None]
    o_width = tl.arange(0, BLOCK_D)[None, :]
    p_block = rows + start.to(tl.int64) * stride + (o_row * stride + o_width)
    if MASKED:
        return tl.load(p_block, mask=m_row[:, None] & (o_width < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(p_block, mask=o_width < HEAD_DIM, other=0.0)
    else:
        return tl.load(p_block)


@triton.jit
def store_rows(
    rows,  # (T, D) of one head, rows `stride` elements apart, D contiguous, out
    start,
    stride,
    b_value,  # (BLOCK, BLOCK_D), rounded to the dtype of rows
    m_row,  # (BLOCK,) bool
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the rows that `load_rows` would load."""
    o_row = tl.arange(0, m_row.shape[0])[:, None]
    o_width = tl.arange(0, BLOCK_D)[None, :]
    p_block = rows + start.to(tl.int64) * stride + (o_row * stride + o_width)
    m_block = m_row[:, None] & (o_width < HEAD_DIM)
    tl.store(p_block, b_value.to(rows.dtype.element_ty), mask=m_block)


@triton.jit
def next_run(
    b_wanted,  # (SCAN,) bool
    o_tile,  # (SCAN,) int32, consecutive, the last one end - 1
    after,
    end,
):
    """Return start and end of the first run of wanted tiles from `after` on, or `end` twice."""
    run_start = tl.min(tl.where(b_wanted & (o_tile >= after), o_tile, end), 0)
    run_end = tl.min(tl.where(b_wanted | (o_tile < run_start), end, o_tile), 0)
    return run_start, run_end


@triton.jit
def wanted_key_tiles(
    o_tile,  # (SCAN,) int32, tiles of keys, counted from the example's first
    start,  # first query
    end,  # end of the queries
    example_start,
    first_tile,  # row of the example's first tile in the two tables
    until_extremes,  # (key tiles, 2) int32, smallest and largest visible_until
    position_extremes,  # (key tiles, 2) int32, not read without HAS_WINDOW
    lowest_position,  # of the queries
    highest_position,  # of the queries
    window,
    BLOCK_K: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Tell the tiles of keys that the queries start <= i < end see in part (MASKED), or whole.

    Returns:
        (SCAN,) bool.
    """
    o_key = example_start + o_tile * BLOCK_K
    m_tile = o_key < end  # a tile that begins after the last query is seen by none
    p_until = until_extremes + 2 * (first_tile + o_tile)
    # As the head of this file has it; `whole` counts only where `seen` holds.
    seen = m_tile & (tl.load(p_until + 1, mask=m_tile, other=0) > start)
    whole = (o_key + BLOCK_K <= start + 1) & (tl.load(p_until, mask=m_tile, other=0) >= end)
    if HAS_WINDOW:
        p_position = position_extremes + 2 * (first_tile + o_tile)
        lowest = tl.load(p_position, mask=m_tile, other=0)
        highest = tl.load(p_position + 1, mask=m_tile, other=0)
        seen = seen & (lowest_position - highest < window)
        whole = whole & (highest_position - lowest < window)
    return seen & (whole != MASKED)


@triton.jit
def pre_softmax(b_product, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return scores divided by a factor >= 0, and the factor: their product is in base 2.

    Base 2 is what the hardware's exponential takes. The factor is left to the caller, where it
    can be fused with the subtraction of the maximum or of the logsumexp.
    """
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (e^2x + 1), within 1e-7 in absolute terms, which is all that a score
        # needs. Triton's interpreter lacks libdevice and with it any other tanh.
        e = tl.exp2(b_product * (scale / softcap * 2 * LOG2_E))
        return 1 - 2 / (e + 1), softcap * LOG2_E
    else:
        return b_product, scale * LOG2_E
