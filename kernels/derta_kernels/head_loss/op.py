"""The public head loss: checks its arguments, drops dead rows, chooses the implementation."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from derta_kernels import Choice
from derta_kernels.head_loss.chunked import head_loss_chunked
from derta_kernels.head_loss.reference import head_loss_reference

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "reference": head_loss_reference,
    "torch": head_loss_chunked,
}


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LAYOUT: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "hidden": ("(N, d)", _FLOATS),
    "weight": ("(V, d)", _FLOATS),
    "bias": ("(V,)", _FLOATS),
    "target": ("(N,)", (torch.int64,)),
    "rto_mask": ("(N,)", (torch.bool,)),
    "next_weight": ("(N,)", _FLOATS),
    "rto_weight": ("(N,)", _FLOATS),
}


class HeadLoss(NamedTuple):
    """Result of `head_loss` over N rows; float32, or float64 for float64 inputs.

    Attributes:
        loss: (), nats, the weighted sum over all targets; differentiable.
        logsumexp: (N,), log of the sum of exp(logits); detached; 0 on dead rows.
        next_nll: (N,), nats, -log p(target); detached; 0 where the row has no next token.
        refusal_nll: (N,), nats, -log p(refusal token) of every live row, whether RTO or not;
            detached; 0 on dead rows, and everywhere if no refusal token was given.
    """

    loss: Tensor
    logsumexp: Tensor
    next_nll: Tensor
    refusal_nll: Tensor


def choose(impl: str, device: torch.device) -> Choice:
    """The implementation that `head_loss` takes for tensors on `device`.

    Raises:
        ValueError: there is no implementation of that name.
    """
    if impl == "auto":
        return Choice("torch", "the one that never holds all logits")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return Choice(impl, "asked for by name")


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rto_mask: Tensor | None = None,
    *,
    refusal_token_id: int | None = None,
    next_weight: Tensor | None = None,
    rto_weight: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> HeadLoss:
    """Sum of the weighted next-token and refusal losses of a vocabulary projection.

    Row i is trained to say target[i], unless that is `ignore_index`, and the refusal token where
    rto_mask[i]. A row with neither is dead: it is not read, and its gradient is zero. (A weight of
    0 does not make a row dead.)

    Equals, up to rounding:

        z = logit_scale * F.linear(hidden, weight, bias).float()
        z = softcap * torch.tanh(z / softcap) if softcap else z
        nll, has_next = -torch.log_softmax(z, dim=1), target != ignore_index
        loss = (next_weight * nll.gather(1, target.clamp(min=0)[:, None])[:, 0])[has_next].sum()
        loss = loss + (rto_weight * nll[:, refusal_token_id])[rto_mask].sum()

    Memory: that of the implementation, see `head_loss_chunked`, and n d numbers in hidden's dtype
        for a copy of the n live rows, if any row is dead. Under autocast also the cast weight.
    Numerics: logits and their gradient are rounded to hidden's dtype once each, all else is
        float32, or float64 for float64 inputs. No row's loss is negative. Deterministic.
    Synchronisation: on CUDA one transfer to the host, of the live count and the targets' range.

    Args:
        hidden: (N, d) float16, bfloat16, float32 or float64, any strides.
        weight: (V, d) in hidden's dtype, any strides; under autocast any floating dtype.
        target: (N,) int64 in [0, V), or `ignore_index` where the row has no next token.
        rto_mask: (N,) bool, rows with the refusal token as target; None: no such row.
        refusal_token_id: in [0, V); required with rto_mask.
        next_weight: (N,) floating point, factor of each row's next-token loss; None: ones.
        rto_weight: (N,) floating point, factor of each row's refusal loss; None: ones.
        bias: (V,) in hidden's dtype, added to the logits; None: no bias.
        softcap: > 0, logits become softcap * tanh(logits / softcap) (Gemma 2); None: no cap.
        logit_scale: factor of the logits, before the cap (Cohere, Granite).
        ignore_index: the value in target that means "none".
        impl: "auto", "reference" (all logits at once, plain autograd, differentiable twice) or
            "torch" (chunks of rows, gradients formed in the forward pass). "auto" is "torch".

    Returns:
        `HeadLoss`. Gradients reach hidden, weight and bias, and are formed only for those that
        require one; a second derivative raises NotImplementedError unless impl is "reference".

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: a wrong shape, dtype, device or range; a target outside [0, V); rto_mask
            without refusal_token_id; weights that require a gradient; an unknown impl.

    Source: arXiv 2407.09121, equation 2.
    """
    optional = dict(rto_mask=rto_mask, next_weight=next_weight, rto_weight=rto_weight, bias=bias)
    tensors = dict(hidden=hidden, weight=weight, target=target) | {
        name: tensor for name, tensor in optional.items() if tensor is not None
    }
    _check_tensors(tensors)
    _check_numbers(refusal_token_id, softcap, logit_scale, ignore_index, len(weight))
    if rto_mask is not None and refusal_token_id is None:
        raise ValueError("refusal_token_id is required with rto_mask, got None")
    implementation = IMPLEMENTATIONS[choose(impl, hidden.device).name]
    hidden, weight, bias = _autocast(hidden, weight, bias)

    has_next = target != ignore_index
    is_rto = torch.zeros_like(has_next) if rto_mask is None else rto_mask
    rows = _live_rows(target, has_next, is_rto, len(weight))
    all_live = len(rows) == len(target)

    def gathered(values: Tensor) -> Tensor:
        return values if all_live else values.index_select(0, rows)

    def scattered(values: Tensor) -> Tensor:
        return values if all_live else values.new_zeros(target.shape).index_copy(0, rows, values)

    wide = torch.promote_types(hidden.dtype, torch.float32)
    tokens = torch.stack(
        (target.where(has_next, 0), torch.full_like(target, refusal_token_id or 0)), 1
    )
    token_weight = torch.stack(
        (_target_weight(next_weight, has_next, wide), _target_weight(rto_weight, is_rto, wide)), 1
    )
    loss, logsumexp, nll = implementation(
        gathered(hidden),
        weight,
        bias,
        gathered(tokens),
        gathered(token_weight),
        softcap,
        logit_scale,
    )
    next_nll, refusal_nll = (scattered(column) for column in nll.unbind(1))
    return HeadLoss(
        loss=loss,
        logsumexp=scattered(logsumexp),
        next_nll=next_nll.where(has_next, 0.0),
        refusal_nll=torch.zeros_like(refusal_nll) if refusal_token_id is None else refusal_nll,
    )


def _target_weight(row_weight: Tensor | None, has_target: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) weight of each row's target, 0 where it has none."""
    weight = has_target if row_weight is None else row_weight.where(has_target, 0)
    return weight.to(dtype)


def _live_rows(target: Tensor, has_next: Tensor, is_rto: Tensor, vocabulary: int) -> Tensor:
    """(n,) indices of the rows with a target, ascending; checks the targets on the way."""
    live = has_next | is_rto
    out_of_range = has_next & ((target < 0) | (target >= vocabulary))
    # The op's one host transfer: a check of its own would be a second one.
    live_count, bad_count = torch.stack((live.sum(), out_of_range.sum())).tolist()
    if bad_count:
        raise ValueError(
            f"target must lie in [0, V) = [0, {vocabulary}) or be ignore_index, "
            f"got {target[out_of_range][0].item()} ({bad_count} such rows)"
        )
    return torch.nonzero_static(live, size=live_count).squeeze(1)


def _autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments as `F.linear` would see them: in autocast's dtype where it is on."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{name} must have hidden's dtype {hidden.dtype}, got {tensor.dtype}: cast one of "
                "them, or use torch.autocast"
            )
    return hidden, weight, bias


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    """Types, shapes, dtypes and devices of the given tensors by name; no host transfer."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    hidden, weight = tensors["hidden"], tensors["weight"]
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have shape {_LAYOUT[name][0]}, got {_shape(tensor)}")
    (count, width), vocabulary = hidden.shape, len(weight)
    if vocabulary == 0:
        raise ValueError(f"weight must have at least one row, got shape {_shape(weight)}")
    shapes = {
        "(N, d)": (count, width),
        "(V, d)": (vocabulary, width),
        "(V,)": (vocabulary,),
        "(N,)": (count,),
    }
    for name, tensor in tensors.items():
        letters, dtypes = _LAYOUT[name]
        if _shape(tensor) != shapes[letters]:
            raise ValueError(
                f"{name} must have shape {letters} = {shapes[letters]}, got {_shape(tensor)}"
            )
        if tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must be {names}, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} as hidden is, got {tensor.device}")
        if name.endswith("_weight") and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient, none is formed: detach it")


def _check_numbers(
    refusal_token_id: int | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    vocabulary: int,
) -> None:
    """Types and ranges of the arguments that are not tensors."""
    for name, number, kinds in (
        ("refusal_token_id", refusal_token_id, (int, type(None))),
        ("softcap", softcap, (int, float, type(None))),
        ("logit_scale", logit_scale, (int, float)),
        ("ignore_index", ignore_index, (int,)),
    ):
        if isinstance(number, bool) or not isinstance(number, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{name} must be {names}, got {type(number).__name__}")
    if refusal_token_id is not None and not 0 <= refusal_token_id < vocabulary:
        raise ValueError(
            f"refusal_token_id must lie in [0, V) = [0, {vocabulary}), got {refusal_token_id}"
        )
    if softcap is not None and not (isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be finite and > 0, or None, got {softcap}")
    if not isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
