"""The divergence of a model from a frozen reference model: check the arguments, form gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from derta_kernels.head_loss.custom_op import save_gradients, scaled_gradients
from derta_kernels.head_loss.kl_chunked import kl_loss_chunked
from derta_kernels.head_loss.live_rows import gathered, scattered
from derta_kernels.head_loss.op import as_in_autocast, check_numbers, check_tensors


class KlLoss(NamedTuple):
    """The result of `kl_loss` over N rows; float32, or float64 for float64 inputs.

    Attributes:
        loss: (), nats, the weighted sum over rows; differentiable.
        kl: (N,), nats, each row's divergence; detached; 0 on rows that were not asked for.
    """

    loss: Tensor
    kl: Tensor


def kl_loss(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    row_weight: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    scratch_mb: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> KlLoss:
    """Compute the weighted sum of KL(reference || model) over rows, without all of their logits.

    The divergence is that of next-token distributions. The model's vocabulary may be longer than
    the reference's: its last tokens are new, and their probability in the reference is 0.

    Equals, up to rounding:

        z = logit_scale * F.linear(hidden, weight, bias).float()
        z0 = logit_scale * F.linear(reference_hidden, reference_weight, reference_bias).float()
        z, z0 = (softcap * torch.tanh(x / softcap) if softcap else x for x in (z, z0))
        log_p, log_p0 = torch.log_softmax(z, dim=1), torch.log_softmax(z0, dim=1)
        kl = (log_p0.exp() * (log_p0 - log_p[:, : z0.shape[1]])).sum(1)
        loss = (row_weight * kl)[rows].sum()

    Memory, in bytes, with b = bytes of hidden's dtype, p = bytes of `product_dtype`, w = 4, or 8
        for float64, and C = `chunk_rows` for two scratches, about half of a head loss's:
            C (V + V0) p   scratch, rows padded to 128 bytes, and the memory of `row_pass`
            2^20 w         as in `head_loss_chunked`
            N d b          gradient of hidden, if required, and C (2 d + d0) p more
            w V (d + 1)    gradients of weight and bias, each only if required
        Under autocast also the cast weights.
    Cost: two products of a row and the vocabulary, one more for each of the gradients of hidden and
        weight, and some forty passes of plain PyTorch over its logits. On a GPU a pass is a launch
        for every 2^22 of them.
    Numerics: logits and their gradient are rounded as those of `head_loss`, all else is float32, or
        float64 for float64 inputs. No row is negative. A row is exactly 0, and so is its gradient,
        where the logits of both are the same bits, and keeps its digits where they are nearly the
        same. It is finite where p0 is 0 or p underflows, and infinite only where the model forbids
        a token (a logit of -inf) that the reference may say. Deterministic.
    Synchronisation: none; a CUDA graph may capture it.

    Args:
        hidden: (N, d) float16, bfloat16, float32 or float64, any strides.
        weight: (V, d) in hidden's dtype, any strides; under autocast any floating dtype.
        reference_hidden: (N, d0) floating point, the reference's hidden states of the same rows, in
            a dtype of their own. The reference's tensors must not require a gradient.
        reference_weight: (V0, d0), V0 <= V, in reference_hidden's dtype as weight in hidden's.
        row_weight: (N,) floating point, factor of each row; None: ones.
        rows: (n,) int64 in [0, N), the rows to compute, ascending; None: all. No other is read.
        bias: (V,) in hidden's dtype, added to the logits; None: no bias.
        reference_bias: (V0,) in reference_hidden's dtype, likewise.
        softcap, logit_scale: see `head_loss`, the same for both models.
        scratch_mb: MiB that a chunk of both models' logits may take; None: see `chunks.chunk_rows`.
        group: must be None.

    Returns:
        `KlLoss`. Gradients reach hidden, weight and bias, and are formed only for those that
        require one; a second derivative raises NotImplementedError.

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: a wrong shape, dtype, device or range; a reference or weights that require a
            gradient; a group or a DTensor.
        RuntimeError: rows are not ascending or outside [0, N); on CUDA as a device-side assertion.
    """
    optional = dict(bias=bias, reference_bias=reference_bias, row_weight=row_weight, rows=rows)
    tensors = dict(
        hidden=hidden,
        weight=weight,
        reference_hidden=reference_hidden,
        reference_weight=reference_weight,
    ) | {name: tensor for name, tensor in optional.items() if tensor is not None}
    shards = [name for name, tensor in tensors.items() if hasattr(tensor, "placements")]
    if group is not None or shards:
        got = f"a DTensor as {shards[0]}" if shards else "a group"
        raise ValueError(
            f"kl_loss must have the whole vocabulary on each rank, as the reference has, got {got}"
        )
    check_tensors(tensors, is_shard=False)
    if len(reference_weight) > len(weight):
        raise ValueError(
            f"reference_weight must have at most V = {len(weight)} rows, as weight has, got "
            f"{len(reference_weight)}"
        )
    check_numbers(softcap, logit_scale, scratch_mb=scratch_mb)
    hidden = as_in_autocast(hidden, weight, bias)
    reference_hidden = as_in_autocast(
        reference_hidden, reference_weight, reference_bias, "reference_"
    )
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if row_weight is None:
        row_weight = torch.ones(len(hidden), dtype=wide, device=hidden.device)
    loss, kl, *_ = kl_loss_op(
        hidden,
        weight,
        bias,
        reference_hidden,
        reference_weight,
        reference_bias,
        row_weight.to(wide),
        rows,
        softcap,
        logit_scale,
        scratch_mb,
        *(
            torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
            for tensor in (hidden, weight, bias)
        ),
    )
    return KlLoss(loss, kl)


def loss_and_gradients(
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
    form_hidden: bool,
    form_weight: bool,
    form_bias: bool,
) -> tuple[Tensor, ...]:
    """Return loss (), kl (N,) and `chunked.Gradients`; the arguments of `kl_loss`, checked.

    Weights and biases are cast to the dtype of their hidden states.
    """
    count = len(hidden)
    if rows is not None:
        in_range = (rows >= 0) & (rows < count)
        torch._assert_async(
            in_range.all() & (rows.diff() > 0).all(),
            f"rows must be ascending and lie in [0, N) = [0, {count})",
        )
    row_weight = gathered(row_weight, rows)
    # The wrapper has already cast as autocast would; float32 products must stay float32.
    with torch.autocast(hidden.device.type, enabled=False):
        kl, gradients = kl_loss_chunked(
            hidden,
            weight.to(hidden.dtype),
            None if bias is None else bias.to(hidden.dtype),
            reference_hidden,
            reference_weight.to(reference_hidden.dtype),
            None if reference_bias is None else reference_bias.to(reference_hidden.dtype),
            row_weight[:, None],
            rows,
            softcap,
            logit_scale,
            scratch_mb,
            (form_hidden, form_weight, form_bias),
        )
    loss = (row_weight * kl.where(row_weight != 0, 0.0)).sum()
    return loss, scattered(kl, rows, count), *gradients


FORMS = slice(11, 14)  # form_hidden, form_weight and form_bias among the arguments

kl_loss_op = torch.library.custom_op(
    "derta::kl_loss",
    loss_and_gradients,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor reference_hidden, "
    "Tensor reference_weight, Tensor? reference_bias, Tensor row_weight, Tensor? rows, "
    "float? softcap, float logit_scale, float? scratch_mb, bool form_hidden, bool form_weight, "
    f"bool form_bias) -> ({', '.join(['Tensor'] * 6)})",
)


@kl_loss_op.register_fake
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    row_weight, (form_hidden, form_weight, form_bias) = arguments[4], arguments[-3:]
    return (
        row_weight.new_empty(()),
        row_weight.new_empty(len(hidden)),
        hidden.new_empty(hidden.shape if form_hidden else 0),
        row_weight.new_empty(weight.shape if form_weight else 0),
        row_weight.new_empty(len(weight) if form_bias else 0),
        row_weight.new_empty(()),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, kl, *gradients = output
    ctx.mark_non_differentiable(kl)
    save_gradients(ctx, inputs, gradients, inputs[FORMS])


kl_loss_op.register_autograd(scaled_gradients, setup_context=_setup_context)
