"""The backward pass of interval attention in Triton: a kernel for queries and one for keys.

With s the scores before the softmax, p the shares and g the upstream gradient of the output o:

    delta_i = g_i . o_i                   ds_ij = p_ij (g_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j          dk_j = scale sum_i ds_ij q_i
                                          dv_j = sum_i p_ij g_i

A soft-cap multiplies ds_ij by 1 - (s_ij / softcap)^2. Shares are recomputed from the logsumexp,
p_ij = exp(s_ij - logsumexp_i), so that none are kept from the forward pass.

`backward_queries` walks the keys that a tile of queries sees, as the forward pass does, and sums
dq. `backward_keys` walks the queries that see a tile of keys, for each query head that shares the
key head, and sums dk and dv. If that makes fewer programs than GPUs have multiprocessors, the query
heads are dealt to several (`key_parts`), whose float32 sums are added afterwards. Each sum has one
program, in a fixed order: there are no atomics, and every run gives the same bits.

Work: 6 D and 8 D operations for each loaded pair of a query and a key, since both kernels recompute
s_ij and g_i . v_j. A single kernel would take 10 D and add to dq or dk from many programs. Where dk
and dv do not fit the registers together, they take a launch each, 10 D in place of 8 D.
Memory: the gradients, 4 bytes of delta for each query and head, and the parts (`parts_bytes`).

Invariants:
    - `backward_queries` is launched first, on the same stream: it writes the delta that
      `backward_keys` reads.
    - Rows of q and of g past an example's end are loaded as 0. Their shares are not 0, but all that
      these shares are multiplied by is.
    - The scores must be those of the forward pass, or shares would not sum to 1: both passes
      multiply in the inputs' dtype, accumulate in float32 and share `pre_softmax`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from derta_kernels.attention.launch_configs import key_parts, launch_config
from derta_kernels.attention.layout import Layout
from derta_kernels.attention.tiles import key_tiles, query_tiles, visible_until_extremes
from derta_kernels.attention.triton_common import (
    LOG2_E,
    SCAN,
    constants,
    key_constants,
    load_rows,
    next_run,
    positions_of,
    pre_softmax,
    store_rows,
    strides,
    wanted_key_tiles,
)


def backward_triton(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    layout: Layout,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v in their dtype, contiguous; deterministic.

    Args: those of `forward_triton`, its two results, and
        d_out: (T, Hq, D) in q's dtype, contiguous.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(logsumexp)
    numbers = (*strides(q, k, v), scale, softcap or 0.0, window or 0)
    group, has_softcap, has_window = heads // kv_heads, softcap is not None, window is not None
    with torch.cuda.device_of(q):
        config = launch_config("backward_queries", q.dtype, head_dim, has_softcap, q.device)
        tiles = query_tiles(layout, config.block_q, config.block_k)
        backward_queries[(len(tiles) * heads,)](
            q,
            k,
            v,
            out,
            d_out,
            logsumexp,
            delta,
            d_q,
            tiles,
            layout.visible_until,
            visible_until_extremes(layout, config.block_k),
            *positions_of(layout, config.block_k, window),
            tokens,
            heads,
            *numbers,
            **constants(head_dim, group, config, has_softcap, has_window),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        config = launch_config("backward_keys", q.dtype, head_dim, has_softcap, q.device)
        tiles = key_tiles(layout, config.block_k, config.block_q)
        parts = key_parts(tokens, kv_heads, group, config.block_k)
        sums = [x.new_empty(parts, *x.shape, dtype=torch.float32) for x in (k, v) if parts > 1]
        into_k, into_v = sums or (d_k, d_v)
        for forms in ((True, False), (False, True)) if config.apart else ((True, True),):
            backward_keys[(len(tiles) * kv_heads * parts,)](
                q,
                k,
                v,
                d_out,
                logsumexp,
                delta,
                into_k,
                into_v,
                tiles,
                layout.visible_until,
                *positions_of(layout, config.block_q, window),
                tokens,
                kv_heads,
                *numbers,
                **constants(head_dim, group, config, has_softcap, has_window),
                **key_constants(parts, *forms),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
        for gradient, partial in zip((d_k, d_v), sums, strict=False):
            gradient.copy_(partial.sum(0))
    return d_q, d_k, d_v


@triton.jit(do_not_specialize=("tokens", "window"))
def backward_queries(
    q,  # (T, Hq, D), tokens q_stride and heads q_head_stride apart
    k,  # (T, Hkv, D), tokens k_stride and heads k_head_stride apart
    v,  # (T, Hkv, D), tokens v_stride and heads v_head_stride apart
    out,  # (T, Hq, D) in q's dtype, contiguous
    d_out,  # (T, Hq, D) in q's dtype, contiguous
    logsumexp,  # (Hq, T) float32, natural logarithm
    delta,  # (Hq, T) float32, out
    d_q,  # (T, Hq, D) in q's dtype, contiguous, out
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
    """Compute d_q and delta of one tile of queries of one head."""
    p_tile = tiles + 4 * (tl.program_id(0) // heads)
    start = tl.load(p_tile)
    example_start = tl.load(p_tile + 1)
    example_end = tl.load(p_tile + 2)
    first_tile = tl.load(p_tile + 3)
    end = tl.minimum(start + BLOCK_Q, example_end)
    head = (tl.program_id(0) % heads).to(tl.int64)  # its product with a stride may pass 2^31
    stride = heads * HEAD_DIM
    k += head // GROUP * k_head_stride
    v += head // GROUP * v_head_stride

    o_query = start + tl.arange(0, BLOCK_Q)
    m_query = o_query < end
    b_q = load_rows(q + head * q_head_stride, start, q_stride, m_query, HEAD_DIM, BLOCK_D, True)
    b_out = load_rows(out + head * HEAD_DIM, start, stride, m_query, HEAD_DIM, BLOCK_D, True)
    b_d_out = load_rows(d_out + head * HEAD_DIM, start, stride, m_query, HEAD_DIM, BLOCK_D, True)
    # delta_i = g_i . o_i, for this kernel and for the keys' kernel after it.
    b_delta = tl.sum(b_out.to(tl.float32) * b_d_out.to(tl.float32), 1)
    tl.store(delta + head * tokens + o_query, b_delta, mask=m_query)
    b_logsumexp = tl.load(logsumexp + head * tokens + o_query, mask=m_query, other=0.0) * LOG2_E
    # Without a window positions are not read, and what stands for them here is not used.
    b_position = o_query
    lowest_position = start
    highest_position = start
    if HAS_WINDOW:
        b_position = tl.load(positions + o_query, mask=m_query, other=0)
        lowest_position = tl.min(tl.where(m_query, b_position, 2147483647), 0)
        highest_position = tl.max(b_position, 0)

    # The walk of the forward kernel: tiles of keys seen whole, then those seen in part.
    b_d_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
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
                    b_v = load_rows(v, key_start, v_stride, m_key, HEAD_DIM, BLOCK_D, MASKED == 1)
                    # ds, (BLOCK_Q, BLOCK_K): the share times the cap's slope times g . v - delta.
                    b_product = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
                    b_z, factor = pre_softmax(b_product, scale, softcap, HAS_SOFTCAP)
                    b_d_z = tl.exp2(b_z * factor - b_logsumexp[:, None])
                    if HAS_SOFTCAP:
                        b_d_z *= 1 - b_z * b_z
                    b_d_share = tl.dot(b_d_out, tl.trans(b_v), input_precision="ieee")
                    b_d_z *= b_d_share - b_delta[:, None]
                    if MASKED == 1:
                        b_until = tl.load(until + o_key, mask=m_key, other=0)
                        b_seen = (o_key[None, :] <= o_query[:, None]) & (
                            o_query[:, None] < b_until[None, :]
                        )
                        if HAS_WINDOW:
                            b_key_position = tl.load(positions + o_key, mask=m_key, other=0)
                            b_seen &= b_position[:, None] - b_key_position[None, :] < window
                        b_d_z = tl.where(b_seen, b_d_z, 0.0)
                    b_d_q = tl.dot(b_d_z.to(b_k.dtype), b_k, b_d_q, input_precision="ieee")
                run_start, run_end = next_run(b_wanted, o_tile, run_end, base + SCAN)
    # ds is the gradient of the scaled score: the scale is left for the sum.
    store_rows(d_q + head * HEAD_DIM, start, stride, b_d_q * scale, m_query, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=("tokens", "window"))
def backward_keys(
    q,  # (T, Hq, D), tokens q_stride and heads q_head_stride apart
    k,  # (T, Hkv, D), tokens k_stride and heads k_head_stride apart
    v,  # (T, Hkv, D), tokens v_stride and heads v_head_stride apart
    d_out,  # (T, Hq, D) in q's dtype, contiguous
    logsumexp,  # (Hq, T) float32, natural logarithm
    delta,  # (Hq, T) float32, as backward_queries left it
    d_k,  # (PARTS, T, Hkv, D), contiguous, out; float32 if there are several parts, else k's dtype
    d_v,  # (PARTS, T, Hkv, D), as d_k
    tiles,  # (key tiles, 4) int32: start, example's start and end, its first query tile
    until,  # (T,) int32, visible_until as an index into the T tokens
    positions,  # (T,) int32, not read without HAS_WINDOW
    position_extremes,  # (query tiles, 2) int32, not read without HAS_WINDOW
    tokens,  # T
    kv_heads,  # Hkv
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
    PARTS: tl.constexpr,  # a divisor of GROUP
    FORM_D_K: tl.constexpr,  # d_k is not written without it
    FORM_D_V: tl.constexpr,  # d_v is not written without it
):
    """Compute d_k and d_v of one tile of keys of one key head, over a part of its query heads."""
    p_tile = tiles + 4 * (tl.program_id(0) // PARTS // kv_heads)
    start = tl.load(p_tile)
    example_start = tl.load(p_tile + 1)
    example_end = tl.load(p_tile + 2)
    first_tile = tl.load(p_tile + 3)
    kv_head = (tl.program_id(0) // PARTS % kv_heads).to(tl.int64)
    part = (tl.program_id(0) % PARTS).to(tl.int64)

    # The keys and their extremes stay for the whole program; queries are loaded tile by tile.
    o_key = start + tl.arange(0, BLOCK_K)
    m_key = o_key < example_end
    b_k = load_rows(k + kv_head * k_head_stride, start, k_stride, m_key, HEAD_DIM, BLOCK_D, True)
    if FORM_D_K:
        p_v = v + kv_head * v_head_stride
        b_v = load_rows(p_v, start, v_stride, m_key, HEAD_DIM, BLOCK_D, True)
    b_until = tl.load(until + o_key, mask=m_key, other=0)
    lowest_until = tl.min(tl.where(m_key, b_until, 2147483647), 0)
    highest_until = tl.max(b_until, 0)
    b_position = o_key
    lowest_position = start
    highest_position = start
    if HAS_WINDOW:
        b_position = tl.load(positions + o_key, mask=m_key, other=0)
        lowest_position = tl.min(tl.where(m_key, b_position, 2147483647), 0)
        highest_position = tl.max(b_position, 0)

    b_d_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_d_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    d_stride = kv_heads * GROUP * HEAD_DIM
    # The query heads of the part one after the other, into the same sums.
    for i_head in range(GROUP // PARTS):
        head = kv_head * GROUP + part * (GROUP // PARTS) + i_head
        p_q = q + head * q_head_stride
        p_d_out = d_out + head * HEAD_DIM
        p_logsumexp = logsumexp + head * tokens
        p_delta = delta + head * tokens
        for MASKED in tl.static_range(2):
            # Queries before the tile's first key see none of it, nor do those from the largest
            # `visible_until` on.
            first = (start - example_start) // BLOCK_Q
            last = tl.cdiv(highest_until - example_start, BLOCK_Q)
            for base in range(first, last, SCAN):
                o_tile = base + tl.arange(0, SCAN)
                o_start = example_start + o_tile * BLOCK_Q
                # Seen whole: the first query is at or after the last key, the last one before any
                # key's visibility ends.
                b_whole = o_start + 1 >= start + BLOCK_K
                b_whole &= tl.minimum(o_start + BLOCK_Q, example_end) <= lowest_until
                b_wanted = o_tile < last
                if HAS_WINDOW:
                    p_position = position_extremes + 2 * (first_tile + o_tile)
                    lowest = tl.load(p_position, mask=o_tile < last, other=0)
                    highest = tl.load(p_position + 1, mask=o_tile < last, other=0)
                    b_wanted &= lowest - highest_position < window
                    b_whole &= highest - lowest_position < window
                b_wanted &= b_whole != (MASKED == 1)
                run_start, run_end = next_run(b_wanted, o_tile, base, base + SCAN)
                while run_start < base + SCAN:
                    for i_tile in range(run_start, run_end):
                        query_start = example_start + i_tile * BLOCK_Q
                        o_query = query_start + tl.arange(0, BLOCK_Q)
                        m_query = o_query < example_end
                        # A tile without a mask may still be the example's last, ragged one.
                        b_q = load_rows(
                            p_q, query_start, q_stride, m_query, HEAD_DIM, BLOCK_D, True
                        )
                        b_d_out = load_rows(
                            p_d_out, query_start, d_stride, m_query, HEAD_DIM, BLOCK_D, True
                        )
                        b_logsumexp = tl.load(p_logsumexp + o_query, mask=m_query, other=0.0)
                        if FORM_D_K:
                            b_delta = tl.load(p_delta + o_query, mask=m_query, other=0.0)
                        # Shares, (BLOCK_K, BLOCK_Q): keys are the rows here.
                        b_product = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
                        b_z, factor = pre_softmax(b_product, scale, softcap, HAS_SOFTCAP)
                        b_share = tl.exp2(b_z * factor - (b_logsumexp * LOG2_E)[None, :])
                        if MASKED == 1:
                            b_seen = (o_key[:, None] <= o_query[None, :]) & (
                                o_query[None, :] < b_until[:, None]
                            )
                            if HAS_WINDOW:
                                b_query_position = tl.load(
                                    positions + o_query, mask=m_query, other=0
                                )
                                b_seen &= b_query_position[None, :] - b_position[:, None] < window
                            b_share = tl.where(b_seen, b_share, 0.0)
                        # dv takes the shares as they are, dk takes ds.
                        if FORM_D_K:
                            b_d_z = b_share
                            if HAS_SOFTCAP:
                                b_d_z *= 1 - b_z * b_z
                        if FORM_D_V:
                            b_d_v = tl.dot(
                                b_share.to(b_d_out.dtype), b_d_out, b_d_v, input_precision="ieee"
                            )
                        if FORM_D_K:
                            b_d_share = tl.dot(b_v, tl.trans(b_d_out), input_precision="ieee")
                            b_d_z *= b_d_share - b_delta[None, :]
                            b_d_k = tl.dot(b_d_z.to(b_q.dtype), b_q, b_d_k, input_precision="ieee")
                    run_start, run_end = next_run(b_wanted, o_tile, run_end, base + SCAN)

    stride = kv_heads * HEAD_DIM
    d_offset = part * tokens * stride + kv_head * HEAD_DIM
    if FORM_D_K:
        store_rows(d_k + d_offset, start, stride, b_d_k * scale, m_key, HEAD_DIM, BLOCK_D)
    if FORM_D_V:
        store_rows(d_v + d_offset, start, stride, b_d_v, m_key, HEAD_DIM, BLOCK_D)
