"""The head loss in chunks of live rows, gradients formed in the forward pass.

product -> row pass, in place -> products: what a chunk does. The row pass is an argument, so every
implementation but the reference is this file and one of the `row_pass_*`. The mathematics is in
kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RowPass = Callable[
    [Tensor, Tensor, Tensor, float | None, float, bool], tuple[Tensor, Tensor]
]  # see `row_pass_torch`

MIB = 2**20
SCRATCH_MB = {"cpu": 64, "cuda": 256}
# A chunk reads all of weight twice and all of its gradient once: from this many rows on, both hide
# under the products.
WIDE_CHUNK_ROWS = 1024
ROW_MULTIPLE = 128
# cuBLAS takes its fast kernels only where rows start on 16 bytes; 128 keeps them on cache lines.
ROW_ALIGNMENT_BYTES = 128
# Compute capability from which on torch multiplies bfloat16 into a float32 sum.
WIDE_PRODUCTS_SINCE = (8, 0)
SLICE_ELEMENTS = 2**22


class Gradients(NamedTuple):
    """What the forward pass stores: the gradients for an upstream gradient of 1, divided by `unit`.

    Those that are not required are empty.

    Attributes:
        hidden: (N, d) in hidden's dtype; 0 on dead rows.
        weight: (V, d) in the dtype computed in.
        bias: (V,) in the dtype computed in.
        unit: () in the dtype computed in; 1 unless hidden is float16, see `_unit`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    unit: Tensor


def head_loss_chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    token_weight: Tensor,
    rows: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    row_pass: RowPass,
    scratch_mb: float | None,
    forms: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Gradients]:
    """Logsumexp, nll and gradients of the live rows, never holding n x V logits.

    Memory, in bytes, with b = bytes of hidden's dtype, C = `chunk_rows` and w = 4, or 8 for
    float64:
        C V b          scratch, rows padded to 128 bytes, and what the row pass takes or, for
                       weight's gradient on a CPU, 2^22 (b + w)
        N d b          gradient of hidden, if required; 2 C d b more if any row is dead
        w V (d + 1)    gradients of weight and bias, only for those that are required

    Numerics: logits and their gradient are rounded to hidden's dtype once each. The gradients of
        weight and bias are summed over chunks in float32 (float64 for float64 inputs), in order:
        deterministic. On a CPU, and on a GPU before compute capability 8.0, a bfloat16 chunk's
        product is rounded first, as no product there gives a wider result.

    Args:
        hidden, weight, bias, softcap, logit_scale: see `head_loss`.
        tokens: (n, 2) int64, the tokens that each live row is trained to say, within [0, V).
        token_weight: (n, 2) in the dtype to compute in, the weight of each of them.
        rows: (n,) int64, the live rows of hidden; None: all are.
        row_pass: one of the `row_pass_*`.
        scratch_mb: MiB of the scratch; None: see `chunk_rows`.
        forms: whether to form the gradients of hidden, weight and bias.

    Returns:
        logsumexp (n,) and nll (n, 2) in token_weight's dtype, and the gradients.
    """
    count, (vocabulary, width) = len(tokens), weight.shape
    wide = token_weight.dtype
    form_hidden, form_weight, form_bias = forms
    unit = _unit(token_weight, logit_scale, hidden.dtype)
    gradients = Gradients(
        hidden=hidden.new_zeros(hidden.shape if form_hidden else 0),
        weight=token_weight.new_zeros((vocabulary, width) if form_weight else 0),
        bias=token_weight.new_zeros(vocabulary if form_bias else 0),
        unit=unit,
    )
    logsumexp = token_weight.new_empty(count)
    nll = torch.empty_like(token_weight)
    if count == 0:
        return logsumexp, nll, gradients

    step = chunk_rows(count, vocabulary, hidden.dtype, hidden.device, scratch_mb)
    scratch = _scratch(step, vocabulary, hidden)
    for start in range(0, count, step):
        chunk = slice(start, min(start + step, count))
        h = hidden[chunk] if rows is None else hidden.index_select(0, rows[chunk])
        logits = scratch[: len(h)]
        if bias is None:
            torch.mm(h, weight.T, out=logits)
        else:
            torch.addmm(bias, h, weight.T, out=logits)

        logsumexp[chunk], nll[chunk] = row_pass(
            logits, tokens[chunk], token_weight[chunk] / unit, softcap, logit_scale, any(forms)
        )
        gradient = logits

        if form_weight:
            _add_product(gradients.weight, gradient, h)
        if form_bias:
            gradients.bias.add_(gradient.sum(0, dtype=wide))
        if form_hidden:
            if rows is None:
                torch.mm(gradient, weight, out=gradients.hidden[chunk])
            else:
                gradients.hidden.index_copy_(0, rows[chunk], gradient @ weight)
    return logsumexp, nll, gradients


def chunk_rows(
    count: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    scratch_mb: float | None,
) -> int:
    """Rows of a chunk: what `scratch_mb` holds, in multiples of 128, and at most `count`.

    The default is 64 MiB on a CPU and 256 MiB on a device, or 1024 rows where those are more and
    leave three quarters of the device's memory free. At least 128 rows, whatever the budget.
    """
    row_bytes = vocabulary * dtype.itemsize
    if scratch_mb is not None:
        budget = int(scratch_mb * MIB)
    elif device.type == "cuda":
        budget = max(SCRATCH_MB["cuda"] * MIB, WIDE_CHUNK_ROWS * row_bytes)
        budget = min(budget, _free_bytes(device) // 4)
    else:
        budget = SCRATCH_MB["cpu"] * MIB
    return min(count, max(1, budget // row_bytes // ROW_MULTIPLE) * ROW_MULTIPLE)


def _free_bytes(device: torch.device) -> int:
    """What an allocation may still take: the device's free memory and the allocator's own."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _scratch(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """(rows, V) uninitialised, each row starting on `ROW_ALIGNMENT_BYTES`."""
    multiple = ROW_ALIGNMENT_BYTES // like.dtype.itemsize
    padded = -(-vocabulary // multiple) * multiple
    return like.new_empty(rows, padded)[:, :vocabulary]


def _add_product(total: Tensor, gradient: Tensor, h: Tensor) -> None:
    """total (V, d) += gradient (C, V)^T @ h (C, d), the sum in total's dtype."""
    if total.dtype == h.dtype:
        total.addmm_(gradient.T, h)
        return
    if total.is_cuda and torch.cuda.get_device_capability(total.device) >= WIDE_PRODUCTS_SINCE:
        torch.addmm(total, gradient.T, h, out_dtype=total.dtype, out=total)
        return
    product_dtype = torch.bfloat16 if h.dtype == torch.bfloat16 else total.dtype  # or it overflows
    h = h.to(product_dtype)
    step = max(1, SLICE_ELEMENTS // h.shape[1])
    for part, columns in zip(total.split(step), gradient.split(step, 1), strict=True):
        part += columns.T.to(product_dtype) @ h


def _unit(token_weight: Tensor, logit_scale: float, dtype: torch.dtype) -> Tensor:
    """() what gradients are stored in units of: it puts float16's well inside 6e-8 to 65504.

    A row's gradient sums to at most twice its weight in absolute value. At 1024 times the heaviest
    row, one of p = 0.99999 still has a full significand, and the product with a head whose weights
    are below 32 does not overflow.
    """
    if dtype != torch.float16 or len(token_weight) == 0:
        return token_weight.new_ones(())
    heaviest = token_weight.abs().sum(1).amax()
    return (heaviest * abs(logit_scale)).clamp_min(1e-30) / 1024
