"""The objective of decoupled refusal training as a loss on hidden states.

Every function here lays its arguments out as rows for `derta_kernels.head_loss` and normalises the
sum that comes back; logits never exist as a whole. Counts stay on the device: nothing here waits
for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
from torch import Tensor, nn

from derta.labels import IGNORE_INDEX
from derta_kernels.head_loss import Head, HeadLoss, head_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "sum")


def derta_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rto_mask: Tensor | None = None,
    *,
    refusal_token_id: int | Sequence[int] | None = None,
    rto_weight: float | Tensor = 1.0,
    unlikely_target: Tensor | None = None,
    unlikelihood_weight: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    loss_weight: Tensor | None = None,
    live_rows: Tensor | None = None,
    impl: str = "auto",
    scratch_mb: float | None = None,
    group: ProcessGroup | None = None,
    sparse_backward: float = 0.0,
) -> Tensor:
    """Compute the next-token and refusal loss of a vocabulary projection, without its logits.

    Nothing is shifted: target[i] is what hidden[i] predicts. A row may carry a next token, the
    refusal token, a token to make unlikely, several of them, or none.

    Equals, up to rounding:

        z = logit_scale * F.linear(hidden, weight, bias).float()
        z = softcap * torch.tanh(z / softcap) if softcap else z
        nll, has_next = -torch.log_softmax(z, dim=-1), target != ignore_index
        next_nll = nll.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        loss = (loss_weight * next_nll)[has_next].sum()
        refusals = [refusal_token_id] if isinstance(refusal_token_id, int) else refusal_token_id
        refusal_nll = -torch.logsumexp(-nll[..., refusals], dim=-1)  # of the sum of their p
        loss = loss + (loss_weight * rto_weight * refusal_nll)[rto_mask].sum()
        loss = loss / (has_next.sum() + rto_mask.sum() if num_items is None else num_items)

    and with unlikely_target, before the division:

        has_unlikely = unlikely_target != ignore_index
        p = torch.exp(-nll).gather(-1, unlikely_target.clamp(min=0)[..., None])[..., 0]
        unlikelihood = -torch.log1p(-p)
        loss = loss + (loss_weight * unlikelihood_weight * unlikelihood)[has_unlikely].sum()

    Memory, numerics, synchronisation: those of `derta_kernels.head_loss.head_loss`.

    Args:
        hidden: (..., d) float16, bfloat16, float32 or float64.
        weight: (V, d) in hidden's dtype; under autocast any floating dtype. With a group this
            rank's rows of it; a DTensor that is sharded by row brings its group itself.
        target: (...) int64 in [0, V), or `ignore_index` where a row has no next token.
        rto_mask: (...) bool, rows that are trained to say a refusal token; None: no row.
        refusal_token_id: in [0, V), or several distinct ones, a set: its loss is -log of the sum of
            their probabilities. Required with rto_mask.
        rto_weight: factor of the refusal losses, a number or a tensor of shape () or (...).
        unlikely_target: (...) int64 in [0, V), the token that a row is trained not to say, or
            `ignore_index`; None: no row has one.
        unlikelihood_weight: factor of the unlikelihood losses, a number or a tensor of shape () or
            (...). These losses add nothing to the number of targets.
        bias: (V,) in hidden's dtype, or None.
        softcap: logits become softcap * tanh(logits / softcap), or None.
        logit_scale: factor of the logits, before the cap.
        ignore_index: the value that means "no target".
        num_items: the divisor of "mean", an int or a tensor of shape () (the targets of a whole
            accumulated step, say); None: the number of targets in this call, where a row with both
            a next and a refusal token counts twice. 0 divides by 1.
        reduction: "mean" or "sum". Weights do not change the divisor of "mean". There is no
            "none", as gradients are formed in the forward pass; `derta_loss_with_rows` returns each
            row's losses as a by-product.
        loss_weight: (...) floating point, factor of all losses of a row; None: ones.
        live_rows: (n,) int64, the rows with any target, of (...) as one dimension, ascending, where
            the caller knows them.
        impl, scratch_mb, group, sparse_backward: see `derta_kernels.head_loss.head_loss`.

    Returns:
        (), nats, float32 (float64 for float64 inputs). Without a live row it is 0, with gradients
        of zero.

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: a wrong shape, dtype, device or range, named with what was expected; rto_mask
            without refusal_token_id; num_items with reduction "sum".

    Source: arXiv 2407.09121, equation 2; unlikelihood: arXiv 1908.04319.
    """
    return derta_loss_with_rows(
        hidden,
        Head(weight, bias, softcap, logit_scale, group),
        target,
        rto_mask,
        refusal_token_id=refusal_token_id,
        rto_weight=rto_weight,
        unlikely_target=unlikely_target,
        unlikelihood_weight=unlikelihood_weight,
        ignore_index=ignore_index,
        num_items=num_items,
        reduction=reduction,
        loss_weight=loss_weight,
        live_rows=live_rows,
        impl=impl,
        scratch_mb=scratch_mb,
        sparse_backward=sparse_backward,
    ).loss


def derta_loss_with_rows(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    rto_mask: Tensor | None = None,
    *,
    refusal_token_id: int | Sequence[int] | None = None,
    rto_weight: float | Tensor = 1.0,
    unlikely_target: Tensor | None = None,
    unlikelihood_weight: float | Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    loss_weight: Tensor | None = None,
    live_rows: Tensor | None = None,
    impl: str = "auto",
    scratch_mb: float | None = None,
    sparse_backward: float = 0.0,
) -> HeadLoss:
    """Compute `derta_loss` together with every row's own, unweighted losses.

    Args:
        hidden, target, ...: as `derta_loss`.
        head: the vocabulary projection, `derta_kernels.head_loss.Head`.

    Returns:
        `HeadLoss`: loss as `derta_loss` returns it; logsumexp, next_nll, refusal_nll and
        unlikelihood in target's shape, nats, detached. refusal_nll is there for every live row.
        gradient_mass and skipped_mass in target's shape, of the sum before it is divided.

    Raises:
        TypeError, ValueError: as `derta_loss`.
    """
    _check_rows(
        hidden,
        target=target,
        rto_mask=rto_mask,
        unlikely_target=unlikely_target,
        loss_weight=loss_weight,
    )
    _check_weights(
        target,
        loss_weight,
        rto_weight=rto_weight,
        unlikelihood_weight=unlikelihood_weight,
    )
    _check_normalisation(reduction, num_items)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if loss_weight is None:
        loss_weight = torch.ones(target.shape, dtype=dtype, device=hidden.device)
    wide_weight = loss_weight.to(dtype)

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(-1)

    found = head_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        head.weight,
        target.reshape(-1),
        flat(rto_mask),
        refusal_token_id=refusal_token_id,
        next_weight=flat(loss_weight),
        rto_weight=flat(wide_weight * rto_weight),
        unlikely_target=flat(unlikely_target),
        unlikelihood_weight=(
            None if unlikely_target is None else flat(wide_weight * unlikelihood_weight)
        ),
        live_rows=live_rows,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=ignore_index,
        impl=impl,
        scratch_mb=scratch_mb,
        group=head.group,
        sparse_backward=sparse_backward,
    )
    if reduction == "sum":
        loss = found.loss
    else:
        if num_items is None:
            num_items = (target != ignore_index).sum()
            if rto_mask is not None:
                num_items = num_items + rto_mask.sum()
        loss = mean_over(found.loss, num_items)
    return HeadLoss(loss, *(values.reshape(target.shape) for values in found[1:]))


def mean_over(total: Tensor, count: int | Tensor) -> Tensor:
    """Return a sum divided by the number of items that it is over, the sum if there are none."""
    count = torch.as_tensor(count)
    return total / count.where(count != 0, 1)


class HeldOptions(TypedDict, total=False):
    """Settings of `derta_loss` that a loss module holds."""

    softcap: float | None
    logit_scale: float
    reduction: str
    impl: str
    sparse_backward: float


class CallOptions(TypedDict, total=False):
    """Arguments of `derta_loss` that differ from call to call of a loss module."""

    bias: Tensor | None
    num_items: int | Tensor | None
    loss_weight: Tensor | None
    group: ProcessGroup | None


class LossOptions(HeldOptions, CallOptions, total=False):
    """Keywords of `derta_loss` that its narrower forms pass on."""

    scratch_mb: float | None


def rto_loss(
    hidden: Tensor,
    weight: Tensor,
    rto_mask: Tensor,
    *,
    refusal_token_id: int | Sequence[int],
    **options: Unpack[LossOptions],
) -> Tensor:
    """Compute only the RTO term, -log p of the refusal token or set, at every row of rto_mask.

    Equals, up to rounding:

        z = logit_scale * F.linear(hidden, weight, bias).float()
        z = softcap * torch.tanh(z / softcap) if softcap else z
        refusals = [refusal_token_id] if isinstance(refusal_token_id, int) else refusal_token_id
        nll = -torch.logsumexp(torch.log_softmax(z, dim=-1)[..., refusals], dim=-1)
        loss = (loss_weight * nll)[rto_mask].sum()
        loss = loss / (rto_mask.sum() if num_items is None else num_items)

    Takes, returns and raises what `derta_loss` does; rto_mask is (...) bool.

    Source: arXiv 2407.09121, the second term of equation 2.
    """
    _check_rows(hidden, rto_mask=rto_mask)
    return derta_loss(
        hidden,
        weight,
        torch.full(rto_mask.shape, IGNORE_INDEX, device=hidden.device),
        rto_mask,
        refusal_token_id=refusal_token_id,
        **options,
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute `torch.nn.functional.linear_cross_entropy` of class indices, without the logits.

    Equals, up to rounding:

        logits = F.linear(input, linear_weight, linear_bias).float()
        loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    The names and their meaning are torch's (2.13), with two differences: leading dimensions may be
    any number, and a "mean" over no target is 0 with a gradient where torch gives NaN.

    Args:
        input: (..., in_features) float16, bfloat16, float32 or float64.
        linear_weight: (C, in_features) in input's dtype; under autocast any floating dtype.
        target: (...) int64 class indices in [0, C), or `ignore_index`.
        linear_bias: (C,) in input's dtype, or None.
        weight, label_smoothing: only their defaults are supported.
        options: None, or torch's `LinearCrossEntropyOptions`, which has no effect: it chooses
            chunks and what is accumulated in a wider dtype, and here all of it always is.
        reduction: "mean" over the targets that are not ignored, or "sum".
        ignore_index: the value that means "no target"; None: -100.
        impl: see `derta_kernels.head_loss.head_loss`.

    Returns:
        (), nats, float32 (float64 for float64 inputs).

    Raises:
        TypeError: options of another class.
        ValueError: a wrong shape, dtype, device or range, or anything of torch's that is not
            supported here.
    """
    for name, value, supported in (
        ("weight", weight, None),
        ("label_smoothing", label_smoothing, 0.0),
    ):
        if value != supported:
            raise ValueError(
                f"{name} must be {supported}, got {value!r}: use torch's own linear_cross_entropy"
            )
    _check_rows(input, name="input", target=target)
    _check_options(options, torch.promote_types(input.dtype, torch.float32))
    autocast = torch.is_autocast_enabled(input.device.type)
    for name, parameter, shape in (
        ("linear_weight", linear_weight, (len(linear_weight), input.shape[-1])),
        ("linear_bias", linear_bias, (len(linear_weight),)),
    ):
        if parameter is None:
            continue
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} for {len(linear_weight)} classes of an input of "
                f"shape {tuple(input.shape)}, got {tuple(parameter.shape)}"
            )
        if parameter.device != input.device or (parameter.dtype != input.dtype and not autocast):
            raise ValueError(
                f"{name} must be {input.dtype} on {input.device} as input is, "
                f"got {parameter.dtype} on {parameter.device}"
            )
    return derta_loss(
        input,
        linear_weight,
        target,
        bias=linear_bias,
        ignore_index=IGNORE_INDEX if ignore_index is None else ignore_index,
        reduction=reduction,
        impl=impl,
    )


class DertaLoss(nn.Module):
    """`derta_loss` with its settings held; the head's tensors are arguments of every call.

    Args, shapes, returns and raises: those of `derta_loss` under the same names.
    """

    def __init__(
        self,
        refusal_token_id: int | Sequence[int],
        *,
        rto_weight: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
        **options: Unpack[HeldOptions],
    ) -> None:
        super().__init__()
        self.refusal_token_id = refusal_token_id
        self.rto_weight = rto_weight
        self.ignore_index = ignore_index
        self.options = options

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        rto_mask: Tensor | None = None,
        **options: Unpack[CallOptions],
    ) -> Tensor:
        """Return the loss, ()."""
        return derta_loss(
            hidden,
            weight,
            target,
            rto_mask,
            refusal_token_id=self.refusal_token_id,
            rto_weight=self.rto_weight,
            ignore_index=self.ignore_index,
            **self.options,
            **options,
        )

    def extra_repr(self) -> str:
        """Return the settings as `print` shows them."""
        return _as_arguments(
            refusal_token_id=self.refusal_token_id, rto_weight=self.rto_weight, **self.options
        )


class RTOLoss(nn.Module):
    """`rto_loss` with its settings held; the head's tensors are arguments of every call.

    Args, shapes, returns and raises: those of `rto_loss` under the same names.
    """

    def __init__(self, refusal_token_id: int, **options: Unpack[HeldOptions]) -> None:
        super().__init__()
        self.refusal_token_id = refusal_token_id
        self.options = options

    def forward(
        self, hidden: Tensor, weight: Tensor, rto_mask: Tensor, **options: Unpack[CallOptions]
    ) -> Tensor:
        """Return the loss, ()."""
        return rto_loss(
            hidden,
            weight,
            rto_mask,
            refusal_token_id=self.refusal_token_id,
            **self.options,
            **options,
        )

    def extra_repr(self) -> str:
        """Return the settings as `print` shows them."""
        return _as_arguments(refusal_token_id=self.refusal_token_id, **self.options)


def _as_arguments(**settings: object) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _check_rows(hidden: Tensor, *, name: str = "hidden", **rows: Tensor | None) -> None:
    """Check that tensors have one value for every row of hidden: its leading shape and device."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(hidden).__name__}")
    if hidden.dim() == 0:
        raise ValueError(f"{name} must have shape (..., d), got ()")
    leading = tuple(hidden.shape[:-1])
    for row_name, values in rows.items():
        if values is None:
            continue
        if not isinstance(values, Tensor):
            raise TypeError(f"{row_name} must be a tensor, got {type(values).__name__}")
        if tuple(values.shape) != leading:
            raise ValueError(
                f"{row_name} must have shape {leading}, that of {name} without its last dimension, "
                f"got {tuple(values.shape)}"
            )
        if values.device != hidden.device:
            raise ValueError(
                f"{row_name} must be on {hidden.device} as {name} is, got {values.device}"
            )


def _check_weights(target: Tensor, loss_weight: Tensor | None, **factors: float | Tensor) -> None:
    """Check that row weights have a type, shape and dtype that can multiply losses."""
    for name, factor in factors.items():
        if isinstance(factor, Tensor):
            if factor.shape not in ((), target.shape):
                raise ValueError(
                    f"{name} must be a number or a tensor of shape () or target's "
                    f"{tuple(target.shape)}, got {tuple(factor.shape)}"
                )
        elif isinstance(factor, bool) or not isinstance(factor, int | float):
            raise TypeError(f"{name} must be a number or a tensor, got {type(factor).__name__}")
    for name, values in (*factors.items(), ("loss_weight", loss_weight)):
        if isinstance(values, Tensor):
            if not values.is_floating_point():
                raise ValueError(f"{name} must be floating point, got {values.dtype}")
            if values.requires_grad:
                raise ValueError(f"{name} must not require a gradient, none is formed: detach it")


def _check_options(options: object | None, computed_in: torch.dtype) -> None:
    """Check that torch's options are such, and ask for no dtype wider than the one computed in."""
    if options is None:
        return
    kind = getattr(nn, "LinearCrossEntropyOptions", None)  # torch has it from 2.13 on
    if kind is None or not isinstance(options, kind):
        raise TypeError(
            "options must be None or torch.nn.LinearCrossEntropyOptions, got "
            f"{type(options).__name__}"
        )
    asked = getattr(options, "acc_dtype", None)
    if asked is not None and torch.promote_types(asked, computed_in) != computed_in:
        raise ValueError(
            f"options.acc_dtype must be at most {computed_in}, got {asked}: use torch's own "
            "linear_cross_entropy"
        )


def _check_normalisation(reduction: str, num_items: int | Tensor | None) -> None:
    """Check that the reduction exists and uses the count."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f'reduction must be "mean" or "sum", got {reduction!r}; derta_loss_with_rows gives the '
            "losses of single rows"
        )
    if num_items is None:
        return
    if reduction == "sum":
        raise ValueError('num_items must be None with reduction "sum", which divides by nothing')
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(
                f"num_items must be an int or a tensor of shape (), got {tuple(num_items.shape)}"
            )
    elif isinstance(num_items, bool) or not isinstance(num_items, int):
        raise TypeError(f"num_items must be an int or a tensor, got {type(num_items).__name__}")
    elif num_items < 0:
        raise ValueError(f"num_items must be at least 0, got {num_items}")
