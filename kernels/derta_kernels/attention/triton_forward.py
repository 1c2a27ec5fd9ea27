"""The forward pass of interval attention in Triton."""

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
    """Output and logsumexp of the flattened batch.

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
    q,
    k,
    v,
    out,
    logsumexp,
    tiles,
    until,
    until_extremes,
    positions,
    position_extremes,
    tokens,
    heads,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """One tile of queries of one head: out (tokens, heads, D) and logsumexp (heads, tokens)."""
    p_tile = tiles + 4 * (tl.program_id(0) // heads)
    start = tl.load(p_tile)
    example_start = tl.load(p_tile + 1)
    example_end = tl.load(p_tile + 2)
    first_tile = tl.load(p_tile + 3)
    end = tl.minimum(start + BLOCK_Q, example_end)
    head = (tl.program_id(0) % heads).to(tl.int64)
    k += head // GROUP * k_head_stride
    v += head // GROUP * v_head_stride

    o_query = start + tl.arange(0, BLOCK_Q)
    m_query = o_query < end
    b_q = load_rows(q + head * q_head_stride, start, q_stride, m_query, HEAD_DIM, BLOCK_D, True)
    b_position = o_query
    lowest_position = start
    highest_position = start
    if HAS_WINDOW:
        b_position = tl.load(positions + o_query, mask=m_query, other=0)
        lowest_position = tl.min(tl.where(m_query, b_position, 2147483647), 0)
        highest_position = tl.max(b_position, 0)

    b_highest = tl.full([BLOCK_Q], LOWEST, tl.float32)
    b_total = tl.zeros([BLOCK_Q], tl.float32)
    b_out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        for base in range(0, tl.cdiv(end - example_start, BLOCK_K), SCAN):
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
                    b_k = load_rows(k, key_start, k_stride, m_key, HEAD_DIM, BLOCK_D, MASKED == 1)
                    b_product = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
                    b_z, factor = pre_softmax(b_product, scale, softcap, HAS_SOFTCAP)
                    if MASKED == 1:
                        b_until = tl.load(until + o_key, mask=m_key, other=0)
                        b_seen = (o_key[None, :] <= o_query[:, None]) & (
                            o_query[:, None] < b_until[None, :]
                        )
                        if HAS_WINDOW:
                            b_key_position = tl.load(positions + o_key, mask=m_key, other=0)
                            b_seen &= b_position[:, None] - b_key_position[None, :] < window
                        b_z = tl.where(b_seen, b_z, float("-inf"))
                    b_new = tl.maximum(b_highest, tl.max(b_z, 1) * factor)
                    b_share = tl.exp2(b_z * factor - b_new[:, None])
                    b_keep = tl.exp2(b_highest - b_new)
                    b_total = b_total * b_keep + tl.sum(b_share, 1)
                    b_out *= b_keep[:, None]
                    b_v = load_rows(v, key_start, v_stride, m_key, HEAD_DIM, BLOCK_D, MASKED == 1)
                    b_out = tl.dot(b_share.to(b_v.dtype), b_v, b_out, input_precision="ieee")
                    b_highest = b_new
                run_start, run_end = next_run(b_wanted, o_tile, run_end, base + SCAN)

    b_total = tl.where(m_query, b_total, 1.0)
    stride = heads * HEAD_DIM
    store_rows(
        out + head * HEAD_DIM, start, stride, b_out / b_total[:, None], m_query, HEAD_DIM, BLOCK_D
    )
    b_logsumexp = b_highest * LN_2 + tl.log(b_total)
    tl.store(logsumexp + head * tokens + o_query, b_logsumexp, mask=m_query)
