"""The divergence from a frozen reference model in chunks of rows, gradients formed in the forward.

A chunk takes two products more than one of the head loss: the reference's logits in a scratch of
their own, and nothing for the reference afterwards. Its row pass is plain PyTorch.

Invariant: where p is near p0, the terms p0 (log p0 - log p) have either sign and cancel, so a sum
of them has no digits of a divergence below 1e-7 or so in float32. The terms here are those of the
same sum with p - p0 added, which sums to 0, and none of them is negative. Nor does an error of the
logarithms' normalisation matter then, but by its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import factorial

import torch
from torch import Tensor

from derta_kernels.head_loss.chunked import (
    Gradients,
    HeadCall,
    longest,
    new_scratch,
    product_dtype,
    put_logits,
    rows_of,
    working_bytes,
)
from derta_kernels.head_loss.chunks import Problem, chip_of, chunk_rows, split
from derta_kernels.head_loss.row_pass import SIZES
from derta_kernels.head_loss.row_pass_torch import WIDE_LOGITS, finish_logits, unfinish_gradient

SCRATCHES = 2  # of logits, which share the budget
NEAR = 0.5  # |log(p / p0)| below which p - p0 has lost digits
BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)


def kl_loss_chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    row_weight: Tensor,
    rows: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    scratch_mb: float | None,
    forms: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """Compute the divergence of the given rows, and gradients, without holding n x V logits.

    Memory and numerics: see `kl.kl_loss`.

    Args:
        hidden, weight, ..., reference_bias: see `kl.kl_loss`, a model's three in one dtype.
        row_weight: (n, 1) in the dtype to compute in.
        rows: (n,) int64, the rows of hidden and reference_hidden; None: all rows.
        softcap, logit_scale, scratch_mb: see `kl.kl_loss`.
        forms: for each of hidden, weight and bias, if True, its gradient is formed.

    Returns:
        kl (n,) in row_weight's dtype, and the gradients.
    """
    count, (vocabulary, width) = len(row_weight), weight.shape
    gradients = Gradients.of(hidden, weight, row_weight, logit_scale, forms)
    kl = row_weight.new_empty(count)
    if count == 0:
        return kl, gradients
    if hidden.dtype == torch.float16:
        row_weight = row_weight / gradients.unit

    device = hidden.device
    dtype = product_dtype(hidden.dtype, device.type)
    reference_dtype = product_dtype(reference_hidden.dtype, device.type)
    size = max(dtype.itemsize, reference_dtype.itemsize)
    problem = Problem(vocabulary, width, size, forms[1])
    chunks = split(count, chunk_rows(count, problem, chip_of(device), scratch_mb, SCRATCHES))
    scratch = new_scratch(longest(chunks), vocabulary, dtype, device)
    of_reference = new_scratch(longest(chunks), len(reference_weight), reference_dtype, device)
    for chunk in chunks:
        h = rows_of(reference_hidden, rows, chunk, reference_dtype)
        reference_logits = of_reference[: len(h)]
        put_logits(reference_logits, h, reference_weight, reference_bias)
        h = rows_of(hidden, rows, chunk, dtype)
        logits = scratch[: len(h)]
        put_logits(logits, h, weight, bias)
        kl[chunk] = row_pass(
            logits, reference_logits, row_weight[chunk], softcap, logit_scale, any(forms)
        )
        gradients.add_chunk(logits, h, weight, chunk, rows, forms)
    return kl, gradients


def kl_working_bytes(call: HeadCall) -> int:
    """Estimate the peak bytes, see `working_bytes`, with a reference of the model's shape."""
    device_type = call.chip.device_type
    slices = min(call.rows * call.vocabulary, max(call.vocabulary, _numbers(device_type)))
    wide = torch.promote_types(call.dtype, torch.float32)
    held = 5 if product_dtype(call.dtype, device_type) == wide else 7  # see `row_pass`
    return working_bytes(call, scratches=SCRATCHES) + held * slices * wide.itemsize


def row_pass(
    logits: Tensor,
    reference_logits: Tensor,
    row_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    form_gradient: bool,
) -> Tensor:
    """Return the divergence of rows, (C,), and overwrite their logits by its gradient.

    It passes about forty times over the numbers, a few rows at a time, which stay in a CPU's cache.

    Memory: five times 2^18 numbers in row_weight's dtype on a CPU, 2^22 elsewhere, or one row if
        that is more; six times with a softcap, and twice more where logits are narrower.

    Args:
        logits: (C, V) floating point, as the product left them, any row stride. On return the
            gradient of sum(row_weight * kl), or undefined without `form_gradient`.
        reference_logits: (C, V0), V0 <= V, undefined on return.
        row_weight: (C, 1) in the dtype to compute in.
        softcap, logit_scale: see `row_pass_torch`, the same for both.
        form_gradient: if False, no gradient is formed.
    """
    kl = row_weight.new_empty(len(logits))
    known = reference_logits.shape[1]
    for part in _slices(logits):
        z, z0 = (x[part].to(row_weight.dtype) for x in (logits, reference_logits))
        slope = finish_logits(z, softcap, logit_scale, form_gradient)
        finish_logits(z0, softcap, logit_scale, False)
        _put_log_softmax(z)
        _put_log_softmax(z0)
        # A token without a reference has p0 = 0: its term and its gradient are p.
        kl[part] = z[:, known:].exp_().sum(1) + _diverge(z[:, :known], z0)
        if form_gradient:
            z.mul_(row_weight[part])
            unfinish_gradient(z, slope, logit_scale)
            if z.dtype != logits.dtype:
                logits[part] = z
    return kl


def _slices(logits: Tensor) -> Iterator[slice]:
    """Yield the rows to compute at a time."""
    count, vocabulary = logits.shape
    step = max(1, _numbers(logits.device.type) // vocabulary)
    yield from (slice(start, start + step) for start in range(0, count, step))


def _numbers(device_type: str) -> int:
    """Return the logits of one model that are passed over at a time, unless a row has more."""
    return SIZES if device_type == "cpu" else WIDE_LOGITS


def _put_log_softmax(z: Tensor) -> None:
    """Set z (C, V) to log p; that of a token of p = 1 - 1e-10 is -1e-10."""
    highest, place = z.max(1, keepdim=True)
    z.sub_(highest)
    # The highest term is 1; the others would lose their digits if they were added to it.
    rest = z.exp().scatter_(1, place, 0.0).sum(1, keepdim=True)
    z.sub_(rest.log1p_())


def _diverge(log_p: Tensor, log_p0: Tensor) -> Tensor:
    """Return the sum of the terms of log p and log p0 (C, V0), and set log p to p - p0."""
    ratio = log_p - log_p0
    is_near = ratio.abs() < NEAR
    p, p0 = log_p.exp_(), log_p0.exp_()
    difference = p.sub_(p0)
    torch.where(is_near, ratio.expm1().mul_(p0), difference, out=difference)
    # With r = log(p / p0), a term is p0 (exp(r) - 1 - r), which is (p - p0) - p0 r, and where r is
    # near 0 (p - p0) r (1/2 - sum_k B_2k r^(2k - 1) / (2k)!), from r / (exp(r) - 1).
    far = ratio.mul(p0).masked_fill_(p0 == 0, 0.0).neg_().add_(difference)
    near = _half_minus_series(ratio).mul_(ratio).mul_(difference)
    return torch.where(is_near, near, far).sum(1)


def _half_minus_series(r: Tensor) -> Tensor:
    """Return 1/2 - sum_k B_2k r^(2k - 1) / (2k)! to r's precision where |r| < NEAR."""
    last = 7 if r.dtype == torch.float64 else 3
    *others, highest = (BERNOULLI[k - 1] / factorial(2 * k) for k in range(1, last + 1))
    square = r.square()
    series = square * highest
    for coefficient in reversed(others[1:]):
        series.add_(coefficient).mul_(square)
    return series.add_(others[0]).mul_(r).neg_().add_(0.5)
