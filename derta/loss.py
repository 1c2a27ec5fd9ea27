"""The objective of decoupled refusal training as a loss on hidden states.

Every function here lays its arguments out as rows for `derta_kernels.head_loss` and normalises the
sum that comes back; logits never exist as a whole. Counts stay on the device: nothing here waits
for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from derta.labels import IGNORE_INDEX
from derta_kernels.head_loss import HeadLoss, head_loss

REDUCTIONS = ("mean", "sum")


def derta_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rto_mask: Tensor | None = None,
    *,
    refusal_token_id: int | None = None,
    rto_weight: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    loss_weight: Tensor | None = None,
    impl: str = "auto",
    scratch_mb: float | None = None,
) -> Tensor:
    """Next-token and refusal loss of a vocabulary projection, without its logits.

    Nothing is shifted: target[i] is what hidden[i] predicts. A row may carry a next token, the
    refusal token, both, or neither.

    Equals, up to rounding:

        z = logit_scale * F.linear(hidden, weight, bias).float()
        z = softcap * torch.tanh(z / softcap) if softcap else z
        nll, has_next = -torch.log_softmax(z, dim=-1), target != ignore_index
        next_nll = nll.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        loss = (loss_weight * next_nll)[has_next].sum()
        loss = loss + (loss_weight * rto_weight * nll[..., refusal_token_id])[rto_mask].sum()
        loss = loss / (has_next.sum() + rto_mask.sum() if num_items is None else num_items)

    Memory, numerics, synchronisation: those of `derta_kernels.head_loss.head_loss`.

    Args:
        hidden: (..., d) float16, bfloat16, float32 or float64.
        weight: (V, d) in hidden's dtype; under autocast any floating dtype.
        target: (...) int64 in [0, V), or `ignore_index` where a row has no next token.
        rto_mask: (...) bool, rows that are trained to say the refusal token; None: none.
        refusal_token_id: in [0, V); required with rto_mask.
        rto_weight: factor of the refusal losses, a number or a tensor of shape () or (...).
        bias: (V,) in hidden's dtype, or None.
        softcap: logits become softcap * tanh(logits / softcap), or None.
        logit_scale: factor of the logits, before the cap.
        ignore_index: the value in target that means "none".
        num_items: what "mean" divides by, an int or a tensor of shape () (the targets of a whole
            accumulated step, say); None: the number of targets in this call, of which a row with
            both kinds has two. 0 divides by 1.
        reduction: "mean" or "sum". Neither weight changes what "mean" divides by. There is no
            "none", as gradients are formed in the forward pass; `derta_loss_with_rows` gives each
            row's loss as a by-product.
        loss_weight: (...) floating point, factor of both losses of a row; None: ones.
        impl, scratch_mb: see `derta_kernels.head_loss.head_loss`.

    Returns:
        (), nats, float32 (float64 for float64 inputs). Without a live row it is 0, with gradients
        of zero.

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: a wrong shape, dtype, device or range, named with what was expected; rto_mask
            without refusal_token_id; num_items with reduction "sum".

    Source: arXiv 2407.09121, equation 2.
    """
    return derta_loss_with_rows(
        hidden,
        weight,
        target,
        rto_mask,
        refusal_token_id=refusal_token_id,
        rto_weight=rto_weight,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        num_items=num_items,
        reduction=reduction,
        loss_weight=loss_weight,
        impl=impl,
        scratch_mb=scratch_mb,
    ).loss


def derta_loss_with_rows(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rto_mask: Tensor | None = None,
    *,
    refusal_token_id: int | None = None,
    rto_weight: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    loss_weight: Tensor | None = None,
    impl: str = "auto",
    scratch_mb: float | None = None,
) -> HeadLoss:
    """`derta_loss` together with every row's own, unweighted losses.

    Takes and raises what `derta_loss` does.

    Returns:
        `HeadLoss`: loss as `derta_loss` returns it; logsumexp, next_nll and refusal_nll in target's
        shape, nats, detached. refusal_nll is there for every live row, RTO or not.
    """
    _check_rows(hidden, target=target, rto_mask=rto_mask, loss_weight=loss_weight)
    _check_weights(target, rto_weight, loss_weight)
    _check_normalisation(reduction, num_items)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if loss_weight is None:
        loss_weight = torch.ones(target.shape, dtype=dtype, device=hidden.device)

    rows = head_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        target.reshape(-1),
        None if rto_mask is None else rto_mask.reshape(-1),
        refusal_token_id=refusal_token_id,
        next_weight=loss_weight.reshape(-1),
        rto_weight=(loss_weight.to(dtype) * rto_weight).reshape(-1),
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        impl=impl,
        scratch_mb=scratch_mb,
    )
    if reduction == "sum":
        loss = rows.loss
    else:
        if num_items is None:
            num_items = (target != ignore_index).sum()
            if rto_mask is not None:
                num_items = num_items + rto_mask.sum()
        count = torch.as_tensor(num_items)
        loss = rows.loss / count.where(count != 0, 1)
    return HeadLoss(loss, *(values.reshape(target.shape) for values in rows[1:]))


def rto_loss(
    hidden: Tensor,
    weight: Tensor,
    rto_mask: Tensor,
    *,
    refusal_token_id: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    loss_weight: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Reinforced transition optimization alone: -log p(refusal token) at every row of rto_mask.

    Equals, up to rounding:

        z = logit_scale * F.linear(hidden, weight, bias).float()
        z = softcap * torch.tanh(z / softcap) if softcap else z
        nll = -torch.log_softmax(z, dim=-1)[..., refusal_token_id]
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
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        num_items=num_items,
        reduction=reduction,
        loss_weight=loss_weight,
        impl=impl,
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
    """`torch.nn.functional.linear_cross_entropy` of class indices, without the logits.

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
        weight, label_smoothing, options: only their defaults are supported.
        reduction: "mean" over the targets that are not ignored, or "sum".
        ignore_index: the value in target that means "none"; None: -100.
        impl: see `derta_kernels.head_loss.head_loss`.

    Returns:
        (), nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: a wrong shape, dtype, device or range, or anything of torch's that is not
            supported here.
    """
    for name, value, supported in (
        ("weight", weight, None),
        ("label_smoothing", label_smoothing, 0.0),
        ("options", options, None),
    ):
        if value != supported:
            raise ValueError(
                f"{name} must be {supported}, got {value!r}: use torch's own linear_cross_entropy"
            )
    _check_rows(input, name="input", target=target)
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
        refusal_token_id: int,
        *,
        rto_weight: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.refusal_token_id = refusal_token_id
        self.rto_weight = rto_weight
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.impl = impl

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        rto_mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        num_items: int | Tensor | None = None,
        loss_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss, ()."""
        return derta_loss(
            hidden,
            weight,
            target,
            rto_mask,
            refusal_token_id=self.refusal_token_id,
            rto_weight=self.rto_weight,
            bias=bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            ignore_index=self.ignore_index,
            num_items=num_items,
            reduction=self.reduction,
            loss_weight=loss_weight,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"refusal_token_id={self.refusal_token_id}, rto_weight={self.rto_weight}, "
            f"reduction={self.reduction!r}, impl={self.impl!r}"
        )


class RTOLoss(nn.Module):
    """`rto_loss` with its settings held; the head's tensors are arguments of every call.

    Args, shapes, returns and raises: those of `rto_loss` under the same names.
    """

    def __init__(
        self,
        refusal_token_id: int,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.refusal_token_id = refusal_token_id
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.reduction = reduction
        self.impl = impl

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        rto_mask: Tensor,
        *,
        bias: Tensor | None = None,
        num_items: int | Tensor | None = None,
        loss_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss, ()."""
        return rto_loss(
            hidden,
            weight,
            rto_mask,
            refusal_token_id=self.refusal_token_id,
            bias=bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            num_items=num_items,
            reduction=self.reduction,
            loss_weight=loss_weight,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"refusal_token_id={self.refusal_token_id}, reduction={self.reduction!r}, "
            f"impl={self.impl!r}"
        )


def _check_rows(hidden: Tensor, *, name: str = "hidden", **rows: Tensor | None) -> None:
    """One value for every row of hidden: tensors of its leading shape, on its device."""
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


def _check_weights(target: Tensor, rto_weight: float | Tensor, loss_weight: Tensor | None) -> None:
    """Row weights of a type, shape and dtype that can multiply losses."""
    if isinstance(rto_weight, Tensor):
        if rto_weight.shape not in ((), target.shape):
            raise ValueError(
                "rto_weight must be a number or a tensor of shape () or target's "
                f"{tuple(target.shape)}, got {tuple(rto_weight.shape)}"
            )
    elif isinstance(rto_weight, bool) or not isinstance(rto_weight, int | float):
        raise TypeError(f"rto_weight must be a number or a tensor, got {type(rto_weight).__name__}")
    for name, values in (("rto_weight", rto_weight), ("loss_weight", loss_weight)):
        if isinstance(values, Tensor):
            if not values.is_floating_point():
                raise ValueError(f"{name} must be floating point, got {values.dtype}")
            if values.requires_grad:
                raise ValueError(f"{name} must not require a gradient, none is formed: detach it")


def _check_normalisation(reduction: str, num_items: int | Tensor | None) -> None:
    """A reduction that exists and a count that it uses."""
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
