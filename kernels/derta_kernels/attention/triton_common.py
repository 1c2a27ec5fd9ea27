"""What the forward and the backward kernels of interval attention share.

A tile of scores belongs to one of three kinds: nobody sees any of it, and it is never loaded; all
of it is seen, and it needs no mask; or it is masked. Which it is follows from the smallest and the
largest `visible_until` (and position, with a window) of its keys. Kernels find runs of tiles of one
kind by looking at `SCAN` of them at once, and walk each run in a loop of its own.
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

SCAN = tl.constexpr(128)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# A running maximum starts from it: no finite number lies below, and -inf - -inf is no number.
# Scores are in base 2 here: those below -2.36e38 overflow to -inf before they are compared.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def constants(
    head_dim: int, group: int, config: AttentionLaunch, has_softcap: bool, has_window: bool
) -> dict[str, Any]:
    """The constexpr arguments of every kernel."""
    return dict(
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        HAS_SOFTCAP=has_softcap,
        HAS_WINDOW=has_window,
    )


def positions_of(layout: Layout, block: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Positions and their extremes by tile of `block` tokens; something unread without a window."""
    if window is None:
        return layout.visible_until, layout.visible_until
    return tiles.positions(layout), tiles.position_extremes(layout, block)


def strides(*operands: Tensor) -> list[int]:
    """Strides of tokens and heads of (tokens, heads, D) operands."""
    return [stride for x in operands for stride in x.stride()[:2]]


@triton.jit
def load_rows(
    rows, start, stride, m_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """(rows, BLOCK_D) from row `start` on, 0 past HEAD_DIM and, if MASKED, where m_row is not."""
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
def store_rows(rows, start, stride, b_value, m_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores what `load_rows` would load."""
    o_row = tl.arange(0, m_row.shape[0])[:, None]
    o_width = tl.arange(0, BLOCK_D)[None, :]
    p_block = rows + start.to(tl.int64) * stride + (o_row * stride + o_width)
    m_block = m_row[:, None] & (o_width < HEAD_DIM)
    tl.store(p_block, b_value.to(rows.dtype.element_ty), mask=m_block)


@triton.jit
def next_run(b_wanted, o_tile, after, end):
    """Start and end of the first run of wanted tiles from `after` on; both `end` without one."""
    run_start = tl.min(tl.where(b_wanted & (o_tile >= after), o_tile, end), 0)
    run_end = tl.min(tl.where(b_wanted | (o_tile < run_start), end, o_tile), 0)
    return run_start, run_end


@triton.jit
def wanted_key_tiles(
    o_tile,
    start,
    end,
    example_start,
    first_tile,
    until_extremes,
    position_extremes,
    lowest_position,
    highest_position,
    window,
    BLOCK_K: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Which tiles of keys the queries start <= i < end see in part (MASKED), or whole.

    Args:
        o_tile: tiles of keys, counted from their example's first one, `first_tile`.
        lowest_position, highest_position: of the queries.
    """
    o_key = example_start + o_tile * BLOCK_K
    m_tile = o_key < end
    p_until = until_extremes + 2 * (first_tile + o_tile)
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
    """Scores over their factor, and the factor (>= 0) in base 2: exp2 is what the hardware has."""
    if HAS_SOFTCAP:
        # tanh, exact to 1e-7 of 1, which is all that a score needs; the interpreter has no other.
        e = tl.exp2(b_product * (scale / softcap * 2 * LOG2_E))
        return 1 - 2 / (e + 1), softcap * LOG2_E
    else:
        return b_product, scale * LOG2_E
