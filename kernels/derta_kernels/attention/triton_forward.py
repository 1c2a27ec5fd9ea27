"""The forward pass of interval attention in Triton: one launch for all examples and heads.

A program takes one tile of queries of one head. It walks the tiles of keys of the same example, up
to the queries' own, and keeps three running values for each query: the highest score m, the sum l
and the output o that is not yet divided by the sum. With scores z in base 2, a tile of keys turns
them into

    m' = max(m, max_j z_j)
    l' = l 2^(m - m') + sum_j 2^(z_j - m')
    o' = o 2^(m - m') + sum_j 2^(z_j - m') v_j

and in the end out = o / l and logsumexp = m log 2 + log l, which is all that the backward pass
needs to recompute the shares. Neither scores nor a mask ever reach memory.

Work: 4 D operations for each loaded pair of a query and a key. Tiles of keys that no query of the
tile sees are not loaded, and only tiles that are seen in part are masked, see `triton_common`.
Memory: out and 4 bytes of logsumexp for each query and head. There are no atomics, and a tile's
keys are summed in a fixed order, so every run gives the same bits.

Invariants:
    - Every query sees itself (visible_until[j] > j), so its sum is positive in the end. A query may
      still have seen nothing of the tiles walked so far: m starts from a finite number, as
      2^(-inf - -inf) would be NaN.
    - scale > 0, as the maximum is taken before the scores are scaled. `interval_attention` negates
      q where it is not.
    - The layout starts every tile with its example, so that no tile has tokens of two examples.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from derta_kernels.attention.launch_configs import launch_config
from derta_kernels.attention.layout import Layout
from derta_kernels.attention.tiles import query_tiles, visible_until_extremes
from derta_kernels.attention.triton_common import (
    LN_2,
    LOWEST,
    SCAN,
    constants,
    load_rows,
    next_run,
    positions_of,
    pre_softmax,
    store_rows,
    strides,
    wanted_key_tiles,
)


def forward_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute output and logsumexp of the flattened batch.

    Args:
        q: (T, Hq, D), the last dimension contiguous, as in k and v.
        k, v: (T, Hkv, D).
        scale: > 0.

    Returns:
        out: (T, Hq, D) in q's dtype, contiguous.
        logsumexp: (Hq, T) float32, of the scores that each query sees.
    """
    tokens, heads, head_dim = q.shape
    has_softcap, has_window = softcap is not None, window is not None
    config = launch_config("forward", q.dtype, head_dim, has_softcap, q.device)
    out = q.new_empty(q.shape)
    logsumexp = q.new_empty(heads, tokens, dtype=torch.float32)
    tiles = query_tiles(layout, config.block_q, config.block_k)
    with torch.cuda.device_of(q):
        forward[(len(tiles) * heads,)](
            q,
            k,
            v,
            out,
            logsumexp,
            tiles,
            layout.visible_until,
            visible_until_extremes(layout, config.block_k),
            *positions_of(layout, config.block_k, window),
            tokens,
            heads,
            *strides(q, k, v),
            scale,
            softcap or 0.0,
            window or 0,
            **constants(head_dim, heads // k.shape[1], config, has_softcap, has_window),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, logsumexp


@triton.jit(do_not_specialize=("tokens", "window"))
def forward(
    q,  # (T, Hq, D), tokens q_stride and heads q_head_stride apart
    k,  # (T, Hkv, D), tokens k_stride and heads k_head_stride apart
    v,  # (T, Hkv, D), tokens v_stride and heads v_head_stride apart
    out,  # (T, Hq, D) in q's dtype, contiguous, out
    logsumexp,  # (Hq, T) float32, natural logarithm, out
    tiles,  # (query tiles, 4) int32: start, example's start and end, its first key tile
    until,  # (T,) int32, visible_until as an index into the T tokens
    until_extremes,  # (key tiles, 2) int32, smallest and largest visible_until
    positions,  # (T,) int32, not read without HAS_WINDOW
    position_extremes,  # (key tiles, 2) int32, not read without HAS_WINDOW
    tokens,  # T
    heads,  # Hq
    q_stride,  # strides are in elements
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    scale,  # > 0
    softcap,  # > 0, or 0 without HAS_SOFTCAP
    window,  # >= 1, or 0 without HAS_WINDOW
    GROUP: tl.constexpr,  # Hq / Hkv
    HEAD_DIM: tl.constexpr,  # D
    BLOCK_D: tl.constexpr,  # D rounded up to a power of two, at least 32
    BLOCK_Q: tl.constexpr,  # queries of a tile
    BLOCK_K: tl.constexpr,  # keys of a tile
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Compute out and logsumexp of one tile of queries of one head."""
    # The heads of a tile are neighbours in the grid: those of a group read the same keys.
    p_tile = tiles + 4 * (tl.program_id(0) // heads)
    start = tl.load(p_tile)
    example_start = tl.load(p_tile + 1)
    example_end = tl.load(p_tile + 2)
    first_tile = tl.load(p_tile + 3)
    end = tl.minimum(start + BLOCK_Q, example_end)
    head = (tl.program_id(0) % heads).to(tl.int64)  # its product with a stride may pass 2^31
    k += head // GROUP * k_head_stride
    v += head // GROUP * v_head_stride

    o_query = start + tl.arange(0, BLOCK_Q)
    m_query = o_query < end
    b_q = load_rows(q + head * q_head_stride, start, q_stride, m_query, HEAD_DIM, BLOCK_D, True)
    # Without a window positions are not read, and what stands for them here is not used.
    b_position = o_query
    lowest_position = start
    highest_position = start
    if HAS_WINDOW:
        b_position = tl.load(positions + o_query, mask=m_query, other=0)
        lowest_position = tl.min(tl.where(m_query, b_position, 2147483647), 0)
        highest_position = tl.max(b_position, 0)

    # The running values of the head of this file: m, l and o.
    b_highest = tl.full([BLOCK_Q], LOWEST, tl.float32)
    b_total = tl.zeros([BLOCK_Q], tl.float32)
    b_out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    # The tiles seen whole first, then those seen in part. Two copies of the loop are compiled, and
    # the first has neither the mask's loads nor its comparisons.
    for MASKED in tl.static_range(2):
        for base in range(0, tl.cdiv(end - example_start, BLOCK_K), SCAN):
            # Find the wanted ones among SCAN tiles at once, and walk them run by run.
            o_tile = base + tl.arange(0, SCAN)
            b_wanted = wanted_key_tiles(
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
                BLOCK_K,
                HAS_WINDOW,
                MASKED == 1,
            )
            run_start, run_end = next_run(b_wanted, o_tile, base, base + SCAN)
            while run_start < base + SCAN:
                for i_tile in range(run_start, run_end):
                    key_start = example_start + i_tile * BLOCK_K
                    o_key = key_start + tl.arange(0, BLOCK_K)
                    m_key = o_key < end
                    # Scores: (BLOCK_Q, BLOCK_K), b_z * factor in base 2.
                    b_k = load_rows(k, key_start, k_stride, m_key, HEAD_DIM, BLOCK_D, MASKED == 1)
                    b_product = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
                    b_z, factor = pre_softmax(b_product, scale, softcap, HAS_SOFTCAP)
                    if MASKED == 1:
                        # m_key is in it too: a key past the end has an `until` of 0.
                        b_until = tl.load(until + o_key, mask=m_key, other=0)
                        b_seen = (o_key[None, :] <= o_query[:, None]) & (
                            o_query[:, None] < b_until[None, :]
                        )
                        if HAS_WINDOW:
                            b_key_position = tl.load(positions + o_key, mask=m_key, other=0)
                            b_seen &= b_position[:, None] - b_key_position[None, :] < window
                        b_z = tl.where(b_seen, b_z, float("-inf"))
                    # The online softmax: a higher maximum shrinks what was summed before it.
                    b_new = tl.maximum(b_highest, tl.max(b_z, 1) * factor)
                    b_share = tl.exp2(b_z * factor - b_new[:, None])
                    b_keep = tl.exp2(b_highest - b_new)
                    b_total = b_total * b_keep + tl.sum(b_share, 1)
                    b_out *= b_keep[:, None]
                    # Shares are rounded to v's dtype for the product, and summed in float32.
                    b_v = load_rows(v, key_start, v_stride, m_key, HEAD_DIM, BLOCK_D, MASKED == 1)
                    b_out = tl.dot(b_share.to(b_v.dtype), b_v, b_out, input_precision="ieee")
                    b_highest = b_new
                run_start, run_end = next_run(b_wanted, o_tile, run_end, base + SCAN)

    # Rows past the end are not stored. They may have seen nothing: divide them by 1 and not by 0.
    b_total = tl.where(m_query, b_total, 1.0)
    stride = heads * HEAD_DIM
    store_rows(
        out + head * HEAD_DIM, start, stride, b_out / b_total[:, None], m_query, HEAD_DIM, BLOCK_D
    )
    b_logsumexp = b_highest * LN_2 + tl.log(b_total)
    tl.store(logsumexp + head * tokens + o_query, b_logsumexp, mask=m_query)
