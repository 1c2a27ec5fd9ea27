"""The rank of a token among a row's logits, in chunks of live rows, without N x V logits.

An attacker who sees the most likely tokens takes any of them (arXiv 2512.05518). How far down the
list a token is says how much that attacker has to see.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from derta_kernels.head_loss.chunked import (
    SLICE_ELEMENTS,
    longest,
    new_scratch,
    product_dtype,
    put_logits,
    rows_of,
    shard_chunk_rows,
)
from derta_kernels.head_loss.chunks import Problem, chip_of, chunk_rows, split
from derta_kernels.head_loss.head import own_rows
from derta_kernels.head_loss.live_rows import counted_rows, gathered
from derta_kernels.head_loss.op import as_in_autocast, check_group, check_numbers, check_tensors
from derta_kernels.head_loss.shards import Shards, agree

NO_RANK = -1
# Added to the rank of a row whose logits are broken. Less than any count, and no sum over the ranks
# of a group makes it positive.
BROKEN = -(2**40)


@torch.no_grad()
def token_ranks(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    scratch_mb: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Count the tokens of the vocabulary that are likelier than each row's target.

    0 is the likeliest token, and a target is among the top k if its rank is below k. Tokens of the
    same logit have the same rank, the lowest that any order of them gives. A cap of the logits
    keeps their order, so there is no argument for one.

    Equals, up to rounding:

        z = logit_scale * F.linear(hidden, weight, bias).float()
        own = z.gather(1, target.clamp(min=0)[:, None])
        ranks = (z > own).sum(1).where(target != ignore_index, -1)

    Memory: C V p bytes of scratch, with p = bytes of `product_dtype` and C = `chunk_rows`, and
        2^20 numbers of float32 beside it on a CPU. Under autocast also the cast weight.
    Numerics: exact for the logits as `head_loss` rounds them, to hidden's dtype, before scale and
        cap; deterministic. No gradient reaches an input.
    Synchronisation: on CUDA two transfers to the host, of the live count and the targets' range,
        and of the number of broken rows. With a group one more, and two small messages: n and,
        chunk by chunk, n numbers.

    Args:
        hidden, weight, bias, group: see `head_loss`; the ranks of a group all get the result.
        target: (N,) int64 in [0, V), or `ignore_index` where the row has no target.
        logit_scale: factor of the logits; only its sign counts.
        ignore_index: the value that means "no target".
        scratch_mb: MiB that a chunk of logits may take; None: see `chunks.chunk_rows`.

    Returns:
        (N,) int64 in [0, V), -1 where the row has no target.

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: a wrong shape, dtype, device or range; a target outside [0, V). On every rank of
            a group: ranks that differ in d, dtype, N, targets or logit_scale.
        FloatingPointError: a row with a target has a logit that is NaN or above all numbers, so no
            token of it has a rank. On every rank of a group.

    Source: arXiv 2512.05518.
    """
    weight, bias, group = own_rows(weight, bias, group)
    check_group(group, "auto")
    tensors = dict(hidden=hidden, weight=weight, target=target)
    check_tensors(tensors if bias is None else {**tensors, "bias": bias}, group is not None)
    check_numbers(None, logit_scale, ignore_index, scratch_mb)
    hidden = as_in_autocast(hidden, weight, bias)
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)

    has_target = target != ignore_index
    tokens, flags = target.where(has_target, 0)[:, None], has_target[:, None]
    shards = None
    if group is not None:
        no_weight = flags.to(torch.promote_types(hidden.dtype, torch.float32))
        shards = agree(
            group.group_name,
            hidden,
            weight,
            tokens,
            flags,
            no_weight,
            None,
            logit_scale,
            False,
            shard_chunk_rows(hidden, weight, scratch_mb, False),
            (),
        )
    vocabulary = len(weight) if shards is None else shards.vocabulary
    rows = counted_rows(tokens, flags, vocabulary)
    live_tokens = gathered(tokens, rows)
    if shards is None:
        size = product_dtype(hidden.dtype, hidden.device.type).itemsize
        problem = Problem(vocabulary, weight.shape[1], size, False)
        most = chunk_rows(len(live_tokens), problem, chip_of(hidden.device), scratch_mb)
    else:
        live_tokens = shards.own(live_tokens, len(weight))
        most = shards.chunk_rows
    # Products are in hidden's dtype, whatever autocast would make of them.
    with torch.autocast(hidden.device.type, enabled=False):
        ranks = _ranks(hidden, weight, bias, live_tokens, rows, logit_scale < 0, most, shards)
    if broken := int((ranks < 0).sum()):
        raise FloatingPointError(
            f"logits must be numbers for a token to have a rank, got NaN or infinity in {broken} "
            f"of {len(ranks)} rows: look at the model's weights, or choose a wider dtype"
        )
    found = torch.full_like(target, NO_RANK)
    return ranks if rows is None else found.index_copy_(0, rows, ranks)


def _ranks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    rows: Tensor | None,
    is_reversed: bool,
    most: int,
    shards: Shards | None,
) -> Tensor:
    """Return the ranks (n,) of tokens (n, 1) of the live rows, in chunks of `most` rows.

    A token that is a row of another rank's shard is -1. Ranks of broken rows are negative.
    """
    ranks = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    if len(tokens) == 0:
        return ranks
    dtype = product_dtype(hidden.dtype, hidden.device.type)
    chunks = split(len(tokens), most)
    scratch = new_scratch(longest(chunks), len(weight), dtype, hidden.device)
    for chunk in chunks:
        h = rows_of(hidden, rows, chunk, dtype)
        logits = scratch[: len(h)]
        put_logits(logits, h, weight, bias)
        if is_reversed:
            logits.neg_()
        own = _own_logits(logits, tokens[chunk], shards)
        if logits.shape[1] > 0:  # a comparison with NaN is false, and would rank the token first
            are_numbers = logits.amax(1) < torch.inf
            ranks[chunk].masked_fill_(~are_numbers, BROKEN)
        for part, own_part, into in zip(
            *(values.split(_step(logits)) for values in (logits, own, ranks[chunk])), strict=True
        ):
            # Ones and zeros in the place of logits; their sum is exact below 2^24.
            above = part.gt_(own_part).sum(1, dtype=torch.promote_types(dtype, torch.float32))
            into.add_(above.long())
    if shards is not None:
        shards.add(ranks)()
    return ranks


def _own_logits(logits: Tensor, tokens: Tensor, shards: Shards | None) -> Tensor:
    """Return the logits (C, 1) of tokens, whichever rank has them."""
    if shards is None:
        return logits.gather(1, tokens)
    wide = torch.promote_types(logits.dtype, torch.float32)
    own = torch.full_like(tokens, -torch.inf, dtype=wide)
    if logits.shape[1] > 0:
        own = logits.gather(1, tokens.clamp(min=0)).to(wide).masked_fill(tokens < 0, -torch.inf)
    dist.all_reduce(own, dist.ReduceOp.MAX, group=shards.group)
    return own.to(logits.dtype)


def _step(logits: Tensor) -> int:
    """Return the rows to sum at a time: a CPU holds them as float32, a GPU does not."""
    count, vocabulary = logits.shape
    return max(1, SLICE_ELEMENTS // max(1, vocabulary)) if logits.device.type == "cpu" else count
