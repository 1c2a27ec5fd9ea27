"""The row pass of the head loss as one Triton kernel: two reads and one write of the logits.

One program walks one row twice. The first walk finds the highest logit and the sum of
exp(z - highest), from which the losses of the row's tokens follow. The second walk, which is left
out without FORM_GRADIENT, reads the logits again and writes their gradient in their place. It has
to read them again: no gradient is known before the whole row is summed, and a row of 128k bfloat16
logits takes 256 KiB, more than the shared memory of a multiprocessor.

A shard of the vocabulary takes two launches, one a walk, since the summaries of all shards are
merged between them (`row_pass`). STAGE says which part a launch is; a whole row is one launch.

Memory: logsumexp and nll. There are no atomics, so every run gives the same bits.

Invariants:
    - The first walk, the tokens' own loads and the second walk must see the same z to the last bit,
      or a loss could be negative. All three go through `_final_logit`, whose products the compiler
      may not fuse with the subtraction that follows.
    - Ones and the rest are kept apart until `_log1p`, since a row that is sure of its token has all
      its loss and gradient in the rest.
    - The tokens' logits are read before any thread writes a gradient: hence the barrier.
    - Rows are addressed in int64, since C x row_stride may pass 2^31; within a row int32 is enough.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from derta_kernels.head_loss.row_pass import TILE

# A running maximum starts from the lowest finite number, since -inf - -inf is NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
# Values of STAGE. Both walks, or one of them over a shard.
WHOLE = tl.constexpr(0)
FIRST_WALK = tl.constexpr(1)
SECOND_WALK = tl.constexpr(2)
TILE_COLUMNS = tl.constexpr(TILE)
# The least block whose next round is loaded early: with more registers, others would spill.
LOADS_AHEAD_FROM = tl.constexpr(8192)


class RowLaunch(NamedTuple):
    """A walk over a row, `block` logits at a time by `num_warps` warps."""

    block: int
    num_warps: int


# By the largest row of each, in bytes. Eight logits per thread are one 16-byte load of bfloat16.
# The second walk finds its row in the L2 cache if all rows in flight fit. So a multiprocessor
# takes one of the longest at a time (32 warps of more than 32 registers), and loads a round ahead.
LAUNCH_CONFIGS = {
    2 * 2**10: RowLaunch(1024, 4),
    32 * 2**10: RowLaunch(2048, 8),
    96 * 2**10: RowLaunch(4096, 16),
    2**40: RowLaunch(8192, 32),
}
# With an unlikely token or figures of blocks it spills; with 32 warps, fewer registers suffice.
SPILLING_WARPS = 16


def launch_config(row_bytes: int, forms_more: bool) -> RowLaunch:
    """Return the row of `LAUNCH_CONFIGS` for a row of the logits, on every architecture.

    forms_more: if True, there is an unlikely token, or the figures of blocks are formed.
    """
    return next(
        config
        for most, config in LAUNCH_CONFIGS.items()
        if row_bytes <= most and not (forms_more and config.num_warps == SPILLING_WARPS)
    )


def row_pass_triton(
    logits: Tensor,
    tokens: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    form_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `row_pass_torch` does for float16, bfloat16 and float32 logits, in float32.

    Memory: only the results. Deterministic: one program per row, no atomics.
    """
    return _with_results(
        WHOLE.value, logits, tokens, token_weight, None, softcap, logit_scale, form_gradient
    )


def row_pass_with_blocks_triton(
    logits: Tensor,
    tokens: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `row_pass.then_blocks` does, in the same pass over the logits.

    Memory: only the results. Deterministic: as `row_pass_triton`.
    """
    count, vocabulary = logits.shape
    blocks = token_weight.new_empty(count, 2, triton.cdiv(vocabulary, TILE))
    found = _with_results(
        WHOLE.value, logits, tokens, token_weight, None, softcap, logit_scale, True, blocks
    )
    return *found, blocks


def first_walk_triton(
    logits: Tensor, tokens: Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """Do what `first_walk_torch` does, for the dtypes of `row_pass_triton`, in float32.

    Memory: only the results.
    """
    summary = logits.new_empty(len(tokens), 3 + tokens.shape[1], dtype=torch.float32)
    unused = (summary, summary, summary)
    _launch(FIRST_WALK.value, logits, (tokens, *unused, summary), softcap, logit_scale, False)
    return summary


def second_walk_triton(
    logits: Tensor,
    tokens: Tensor,
    token_weight: Tensor,
    summary: Tensor,
    softcap: float | None,
    logit_scale: float,
    form_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `second_walk_torch` does, for the dtypes of `row_pass_triton`, in float32.

    Memory: only the results.
    """
    return _with_results(
        SECOND_WALK.value,
        logits,
        tokens,
        token_weight,
        summary,
        softcap,
        logit_scale,
        form_gradient,
    )


def _with_results(
    stage: int,
    logits: Tensor,
    tokens: Tensor,
    token_weight: Tensor,
    summary: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    form_gradient: bool,
    blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch a stage that writes logsumexp and nll, and return both."""
    logsumexp = token_weight.new_empty(len(logits))
    nll = torch.empty_like(token_weight)
    unread = logsumexp if summary is None else summary
    numbers = (tokens, token_weight, logsumexp, nll, unread)
    _launch(stage, logits, numbers, softcap, logit_scale, form_gradient, blocks)
    return logsumexp, nll


def _launch(
    stage: int,
    logits: Tensor,
    numbers: tuple[Tensor, ...],
    softcap: float | None,
    logit_scale: float,
    form_gradient: bool,
    blocks: Tensor | None = None,
) -> None:
    """Launch the kernel, with the tensors that it takes after the logits."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    has_unlikely = numbers[0].shape[1] == 3
    row_bytes = vocabulary * logits.itemsize
    config = launch_config(row_bytes, has_unlikely or blocks is not None)
    with torch.cuda.device_of(logits):
        row_pass[(rows,)](
            logits,
            *numbers,
            numbers[2] if blocks is None else blocks,
            vocabulary,
            logits.stride(0),
            softcap or 0.0,
            logit_scale,
            STAGE=stage,
            HAS_SOFTCAP=softcap is not None,
            HAS_UNLIKELY=has_unlikely,
            FORM_GRADIENT=form_gradient,
            FORM_BLOCKS=blocks is not None,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )


@triton.jit
def row_pass(
    logits,  # (C, V), rows row_stride apart; overwritten by the gradient
    tokens,  # (C, K) int64, K = 3 with HAS_UNLIKELY, else 2; -1 for a token of another shard
    token_weight,  # (C, K) float32; not read in FIRST_WALK
    logsumexp,  # (C,) float32, out; not written in FIRST_WALK
    nll,  # (C, K) float32, out; not written in FIRST_WALK
    summary,  # (C, 3 + K) float32; out in FIRST_WALK, read in SECOND_WALK
    blocks,  # (C, 2, ceil(V / TILE)) float32, out; written with FORM_BLOCKS only
    vocabulary,  # V; of a shard its own logits, may be 0
    row_stride,  # in logits
    softcap,  # > 0, or 0 without HAS_SOFTCAP
    logit_scale,
    STAGE: tl.constexpr,  # WHOLE, FIRST_WALK or SECOND_WALK
    HAS_SOFTCAP: tl.constexpr,
    HAS_UNLIKELY: tl.constexpr,
    FORM_GRADIENT: tl.constexpr,
    FORM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,  # logits a round
):
    COLUMNS: tl.constexpr = 3 if HAS_UNLIKELY else 2
    i_row = tl.program_id(0).to(tl.int64)
    p_row = logits + i_row * row_stride
    p_summary = summary + (3 + COLUMNS) * i_row
    # Each thread owns runs of eight neighbours. Their maximum needs no other thread, and the sum is
    # rescaled once per eight logits instead of once per logit.
    LANES: tl.constexpr = BLOCK // 8
    o_block = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    # Whole blocks come first, without a mask: a mask that may end anywhere forbids 16-byte loads.
    whole = vocabulary - vocabulary % BLOCK

    # The first walk: the highest logit, and the sum of exp(z - highest) as a count of ones and the
    # rest. In a row that is sure of its token the sum is 1 and a small rest, which is all that loss
    # and gradient consist of; added to 1 the rest would lose its digits.
    if STAGE == SECOND_WALK:
        highest = tl.load(p_summary)
        ones = tl.load(p_summary + 1)
        others_rest = tl.load(p_summary + 2)
    else:
        b_highest = tl.full([LANES], LOWEST, tl.float32)
        b_ones = tl.zeros([LANES], tl.float32)
        b_rest = tl.zeros([LANES], tl.float32)
        AHEAD: tl.constexpr = BLOCK if BLOCK >= LOADS_AHEAD_FROM else 0
        if AHEAD:
            b_next = tl.load(p_row + o_block, mask=0 < whole, other=0.0)
        for start in range(AHEAD, whole + AHEAD, BLOCK):
            if AHEAD:
                b_logit = b_next
                b_next = tl.load(p_row + start + o_block, mask=start < whole, other=0.0)
            else:
                b_logit = tl.load(p_row + start + o_block)
            b_z, _ = _final_logit(b_logit, softcap, logit_scale, HAS_SOFTCAP)
            b_highest, b_ones, b_rest = _with_block(b_highest, b_ones, b_rest, b_z)
        if whole < vocabulary:
            m_tail = whole + o_block < vocabulary
            b_logit = tl.load(p_row + whole + o_block, mask=m_tail, other=0.0)
            b_z, _ = _final_logit(b_logit, softcap, logit_scale, HAS_SOFTCAP)
            b_z = tl.where(m_tail, b_z, float("-inf"))
            b_highest, b_ones, b_rest = _with_block(b_highest, b_ones, b_rest, b_z)
        highest = tl.max(b_highest, 0)
        b_ones, b_rest = _rescaled(b_ones, b_rest, tl.exp(b_highest - highest))
        ones = tl.sum(b_ones, 0)
        others_rest = tl.sum(b_rest, 0)

    rest = (ones - 1) + others_rest
    log_total = _log1p(rest)

    # The tokens' logits, from the same z as the sum. Had the walk begun with this address, it would
    # hold registers throughout, and ptxas would spill with a softcap on compute capability 12.0.
    p_tokens = tokens + COLUMNS * i_row
    next_token = tl.load(p_tokens)
    refusal_token = tl.load(p_tokens + 1)
    next_z = _token_z(p_row, next_token, p_summary + 3, softcap, logit_scale, STAGE, HAS_SOFTCAP)
    refusal_z = _token_z(
        p_row, refusal_token, p_summary + 4, softcap, logit_scale, STAGE, HAS_SOFTCAP
    )
    unlikely_place = next_token
    unlikely_z = next_z
    if HAS_UNLIKELY:
        unlikely_place = tl.load(p_tokens + 2)
        unlikely_z = _token_z(
            p_row, unlikely_place, p_summary + 5, softcap, logit_scale, STAGE, HAS_SOFTCAP
        )
    if STAGE == FIRST_WALK:
        tl.store(p_summary, highest)
        tl.store(p_summary + 1, ones)
        tl.store(p_summary + 2, others_rest)
        tl.store(p_summary + 3, next_z)
        tl.store(p_summary + 4, refusal_z)
        if HAS_UNLIKELY:
            tl.store(p_summary + 5, unlikely_z)
        return

    # The losses. Both terms of a loss are at least 0 as computed.
    p_weight = token_weight + COLUMNS * i_row
    p_nll = nll + COLUMNS * i_row
    tl.store(logsumexp + i_row, highest + log_total)
    tl.store(p_nll, (highest - next_z) + log_total)
    tl.store(p_nll + 1, (highest - refusal_z) + log_total)
    # The third token's part of the gradient: unlikely_own at its own logit, -others_push times
    # exp(z - highest) at any other.
    unlikely_token = -1
    unlikely_own = 0.0
    others_push = 0.0
    if HAS_UNLIKELY:
        unlikely_token = unlikely_place.to(tl.int32)
        term = tl.exp(unlikely_z - highest)
        p = term / (1 + rest)
        # others / (1 + rest) is 1 - p. For a row that is sure of the token, others is the rest.
        others = tl.where(term == 1, rest, (1 + rest) - term)
        others = tl.maximum(others, SMALLEST)
        # Near p = 1, where 1 - p has lost its digits, take the logarithms of both parts.
        unlikelihood = tl.where(p < 0.5, _log1p(-p), tl.log(others) - log_total)
        tl.store(p_nll + 2, -unlikelihood)
        unlikely_own = tl.load(p_weight + 2) * p
        others_push = tl.minimum(unlikely_own / others, -LOWEST)

    if FORM_GRADIENT:
        if STAGE == WHOLE:
            tl.debug_barrier()  # no thread writes a token's logit before all have read it
        # The second walk: every logit's gradient, in its place.
        next_weight = tl.load(p_weight)
        refusal_weight = tl.load(p_weight + 1)
        share = next_weight + refusal_weight
        # int32 within a row: comparing every logit's place in int64 would cost twice as much
        next_token = next_token.to(tl.int32)
        refusal_token = refusal_token.to(tl.int32)
        for start in range(0, whole, BLOCK):
            o_logit = start + o_block
            b_z, b_slope = _final_logit(tl.load(p_row + o_logit), softcap, logit_scale, HAS_SOFTCAP)
            b_own = tl.where(o_logit == next_token, next_weight, 0.0)
            b_own += tl.where(o_logit == refusal_token, refusal_weight, 0.0)
            b_term = tl.exp(b_z - highest)
            b_gradient = _gradient(b_term, rest, share, b_own)
            if HAS_UNLIKELY:
                b_unlikely = -(others_push * b_term)
                b_gradient += tl.where(o_logit == unlikely_token, unlikely_own, b_unlikely)
            b_gradient *= b_slope
            tl.store(p_row + o_logit, b_gradient.to(logits.dtype.element_ty))
            if FORM_BLOCKS:
                _store_blocks(blocks, i_row, vocabulary, start, b_gradient, BLOCK)
        # One round at most. With an `if`, offsets from the first walk would stay live until here,
        # and ptxas 12.9, of Triton 3.6, spills them.
        for start in range(whole, vocabulary, BLOCK):
            o_logit = start + o_block
            m_tail = o_logit < vocabulary
            b_z, b_slope = _final_logit(
                tl.load(p_row + o_logit, mask=m_tail, other=0.0), softcap, logit_scale, HAS_SOFTCAP
            )
            b_own = tl.where(o_logit == next_token, next_weight, 0.0)
            b_own += tl.where(o_logit == refusal_token, refusal_weight, 0.0)
            b_term = tl.exp(b_z - highest)
            b_gradient = _gradient(b_term, rest, share, b_own)
            if HAS_UNLIKELY:
                b_unlikely = -(others_push * b_term)
                b_gradient += tl.where(o_logit == unlikely_token, unlikely_own, b_unlikely)
            b_gradient *= b_slope
            tl.store(p_row + o_logit, b_gradient.to(logits.dtype.element_ty), mask=m_tail)
            if FORM_BLOCKS:
                b_gradient = tl.where(m_tail, b_gradient, 0.0)
                _store_blocks(blocks, i_row, vocabulary, start, b_gradient, BLOCK)


@triton.jit
def _with_block(b_highest, b_ones, b_rest, b_z):
    """Add eight logits to each lane's running maximum, count of ones and sum of the rest."""
    b_new = tl.maximum(b_highest, tl.max(b_z, 1))
    b_ones, b_rest = _rescaled(b_ones, b_rest, tl.exp(b_highest - b_new))
    b_term = tl.exp(b_z - b_new[:, None])
    b_ones += tl.sum(tl.where(b_term == 1, 1.0, 0.0), 1)
    b_rest += tl.sum(tl.where(b_term == 1, 0.0, b_term), 1)
    return b_new, b_ones, b_rest


@triton.jit
def _rescaled(b_ones, b_rest, b_factor):
    """Rescale to a new maximum; if it is higher, the ones shrink too and join the rest."""
    return (
        tl.where(b_factor == 1, b_ones, 0.0),
        tl.where(b_factor == 1, b_rest, (b_ones + b_rest) * b_factor),
    )


@triton.jit
def _store_blocks(blocks, i_row, vocabulary, start, b_gradient, BLOCK: tl.constexpr):
    """Store the largest |gradient| of each block of a round's columns, and their sum."""
    ROUND: tl.constexpr = BLOCK // TILE_COLUMNS
    # First the eight of a thread, then the threads of a block.
    b_size = tl.abs(b_gradient)
    b_peak = tl.max(tl.reshape(tl.max(b_size, 1), (ROUND, TILE_COLUMNS // 8)), 1)
    b_mass = tl.sum(tl.reshape(tl.sum(b_size, 1), (ROUND, TILE_COLUMNS // 8)), 1)
    count = tl.cdiv(vocabulary, TILE_COLUMNS)
    o_block = start // TILE_COLUMNS + tl.arange(0, ROUND)
    p_peak = blocks + i_row * (2 * count) + o_block
    tl.store(p_peak, b_peak, mask=o_block < count)
    tl.store(p_peak + count, b_mass, mask=o_block < count)


@triton.jit
def _gradient(term, rest, share, own):
    """Return share * p - own for p = term / (1 + rest), exact for p near 1 and share = own."""
    return ((share * term - own) - own * rest) / (1 + rest)


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x > -0.5, exact where 1 + x has lost x's digits.

    libdevice has it, but Triton's interpreter lacks libdevice.
    """
    total = 1 + x
    return tl.where(total == 1, x, tl.log(total) * (x / (total - 1)))


@triton.jit
def _final_logit(logit, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    """Return the scaled and capped logit, and its derivative by the logit of the product.

    Products are written as sums with 0, so that they are rounded here. If the compiler fused one
    with a later subtraction, the highest logit minus itself would be a rounding error and not 0.
    """
    z = tl.fma(logit.to(tl.float32), logit_scale, 0.0)
    slope = logit_scale
    if HAS_SOFTCAP:
        bounded = _tanh(z / softcap)
        z = tl.fma(bounded, softcap, 0.0)
        slope = (1 - bounded * bounded) * logit_scale
    return z, slope


@triton.jit
def _token_z(
    p_row, token, p_z, softcap, logit_scale, STAGE: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """Return a token's z, of another shard -inf in the first walk and the merged one in the second.

    p_z is its place in the summary.
    """
    if STAGE == SECOND_WALK:
        z = tl.load(p_z)
    elif STAGE == FIRST_WALK:
        z, _ = _final_logit(
            tl.load(p_row + token, mask=token >= 0, other=0.0), softcap, logit_scale, HAS_SOFTCAP
        )
        z = tl.where(token >= 0, z, float("-inf"))
    else:
        z, _ = _final_logit(tl.load(p_row + token), softcap, logit_scale, HAS_SOFTCAP)
    return z


@triton.jit
def _tanh(x):
    """Return tanh(x) without libdevice, which Triton's interpreter lacks.

    Near 0, where 1 - e cancels, it is the Taylor series to x^13: below 0.4 the error is under 2e-8
    of the result.
    """
    magnitude = tl.abs(x)
    e = tl.exp(-2 * magnitude)
    far = (1 - e) / (1 + e)
    far = tl.where(x < 0, -far, far)
    s = x * x
    near = 21844 / 6081075
    near = near * s - 1382 / 155925
    near = near * s + 62 / 2835
    near = near * s - 17 / 315
    near = near * s + 2 / 15
    near = near * s - 1 / 3
    near = near * s * x + x
    return tl.where(magnitude < 0.4, near, far)
