"""The public head loss: check the arguments and lay them out for an implementation."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from derta_kernels.head_loss.custom_op import head_loss_of_rows_op, head_loss_op
from derta_kernels.head_loss.head import own_rows
from derta_kernels.head_loss.live_rows import checked_rows, counted_rows, gathered, scattered
from derta_kernels.head_loss.reference import head_loss_reference
from derta_kernels.head_loss.shards import FLOATS
from derta_kernels.head_loss.token_set import check_in_vocabulary, checked_ids

_LAYOUT: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "hidden": ("(N, d)", FLOATS),
    "weight": ("(V, d)", FLOATS),
    "bias": ("(V,)", FLOATS),
    "target": ("(N,)", (torch.int64,)),
    "rto_mask": ("(N,)", (torch.bool,)),
    "second_target": ("(N,)", (torch.int64,)),
    "unlikely_target": ("(N,)", (torch.int64,)),
    "next_weight": ("(N,)", FLOATS),
    "rto_weight": ("(N,)", FLOATS),
    "unlikelihood_weight": ("(N,)", FLOATS),
    "live_rows": ("(n,)", (torch.int64,)),
    "reference_hidden": ("(N, d0)", FLOATS),
    "reference_weight": ("(V0, d0)", FLOATS),
    "reference_bias": ("(V0,)", FLOATS),
    "row_weight": ("(N,)", FLOATS),
    "rows": ("(n,)", (torch.int64,)),
}


class HeadLoss(NamedTuple):
    """The result of `head_loss` over N rows; float32, or float64 for float64 inputs.

    Attributes:
        loss: (), nats, the weighted sum over all targets; differentiable.
        logsumexp: (N,), log of the sum of exp(logits); detached; 0 on dead rows.
        next_nll: (N,), nats, -log p(target); detached; 0 where the row has no next token.
        refusal_nll: (N,), nats, -log p(refusal token) of every live row, in rto_mask or not, of a
            set -log of its probability, with second_target -log p of that; detached; 0 on dead
            rows, and everywhere if none of them was given.
        unlikelihood: (N,), nats, -log(1 - p(unlikely target)); detached; 0 where the row has none.
        gradient_mass: (N,), the sum of |dloss / dlogit| over a row's logits, before cap and scale;
            detached; 0 unless a sparse backward pass formed gradients.
        skipped_mass: (N,), the part of it that the sparse backward pass skipped; detached.
    """

    loss: Tensor
    logsumexp: Tensor
    next_nll: Tensor
    refusal_nll: Tensor
    unlikelihood: Tensor
    gradient_mass: Tensor
    skipped_mass: Tensor


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rto_mask: Tensor | None = None,
    *,
    refusal_token_id: int | Sequence[int] | None = None,
    second_target: Tensor | None = None,
    next_weight: Tensor | None = None,
    rto_weight: Tensor | None = None,
    unlikely_target: Tensor | None = None,
    unlikelihood_weight: Tensor | None = None,
    live_rows: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
    scratch_mb: float | None = None,
    group: dist.ProcessGroup | None = None,
    sparse_backward: float = 0.0,
) -> HeadLoss:
    """Compute the sum of the weighted losses of a vocabulary projection, without its logits.

    Row i is trained to say target[i], to say the refusal token if rto_mask[i], and not to say
    unlikely_target[i]; `ignore_index` means no target. A row without any target is dead: it is not
    read, and its gradient is zero. (A weight of 0 does not make a row dead.)

    Equals, up to rounding:

        z = logit_scale * F.linear(hidden, weight, bias).float()
        z = softcap * torch.tanh(z / softcap) if softcap else z
        nll, has_next = -torch.log_softmax(z, dim=1), target != ignore_index
        loss = (next_weight * nll.gather(1, target.clamp(min=0)[:, None])[:, 0])[has_next].sum()
        refusals = [refusal_token_id] if isinstance(refusal_token_id, int) else refusal_token_id
        refusal_nll = -torch.logsumexp(-nll[:, refusals], dim=1)  # of the sum of their p
        loss = loss + (rto_weight * refusal_nll)[rto_mask].sum()

    and with unlikely_target:

        has_unlikely = unlikely_target != ignore_index
        p = torch.exp(-nll).gather(1, unlikely_target.clamp(min=0)[:, None])[:, 0]
        loss = loss + (unlikelihood_weight * -torch.log1p(-p))[has_unlikely].sum()

    The ranks of `group` may share the vocabulary. Weight and bias are then this rank's rows of it:
    consecutive blocks in the order of ranks, of any sizes, 0 included. All else is the same on
    every rank, and so are the results, bit for bit. Gradients of weight and bias are those of this
    rank's rows, that of hidden is the whole one.

    With sparse_backward, products of the backward pass leave out tiles of 128 rows by 128 tokens in
    which no |dloss / dlogit| exceeds sparse_backward x |logit_scale| x the row's total weight.
    Gradients of hidden and weight are then approximate; skipped_mass says by how much. The loss and
    the gradient of bias stay exact.

    Memory: see `head_loss_chunked`. Under autocast also the cast weight; with a set of S refusal
        tokens about 8 S numbers for each row of a chunk.
    Numerics: logits and their gradient are rounded to hidden's dtype once each, all else is
        float32, or float64 for float64 inputs. Under autocast, the gradients of a float32 weight
        and bias are not rounded. No row's loss is negative. Deterministic.
    Synchronisation: on CUDA one transfer to the host, of the live count and the targets' range,
        and none if live_rows are given: a CUDA graph may then capture it. With a group one more, of
        what the ranks have to agree on. With sparse_backward one a chunk, of the live tiles, but
        for "triton".

    Args:
        hidden: (N, d) float16, bfloat16, float32 or float64, any strides.
        weight: (V, d) in hidden's dtype, any strides; under autocast any floating dtype. A DTensor
            must have the placement Shard(0) on a mesh of one dimension.
        target: (N,) int64 in [0, V), or `ignore_index` where the row has no next token.
        rto_mask: (N,) bool, rows with the refusal token as target; None: no such row.
        refusal_token_id: in [0, V), or several distinct ones, a set: its loss is -log of the sum of
            their probabilities, exact where that is near 1.
        second_target: (N,) int64 in [0, V), a token for each row, in rto_mask or not, that takes
            the place of the refusal token; None: it is refusal_token_id. One of the two is required
            with rto_mask.
        next_weight: (N,) floating point, factor of each row's next-token loss; None: ones. Weights
            may be negative, and then lower the probability of their token.
        rto_weight: (N,) floating point, factor of each row's refusal loss; None: ones.
        unlikely_target: (N,) int64 in [0, V), the token that the row is trained not to say, or
            `ignore_index`; None: no row has one. Its loss is -log(1 - p), exact where p is near 1.
        unlikelihood_weight: (N,) floating point, factor of that loss; None: ones.
        live_rows: (n,) int64, the rows with any target, ascending, where the caller knows them;
            None: they are counted. Given rows and their targets are checked on the device.
        bias: (V,) in hidden's dtype, added to the logits; None: no bias.
        softcap: > 0, logits become softcap * tanh(logits / softcap) (Gemma 2); None: no cap.
        logit_scale: factor of the logits, before the cap (Cohere, Granite).
        ignore_index: the value that means "no target".
        impl: "auto", or one that is taken or refused and never replaced: "reference" (all logits
            at once, plain autograd, differentiable twice); in chunks of rows, gradients formed in
            the forward pass, with a row pass in "torch" (everywhere), "native" (C++ and CUDA, where
            it was built) or "triton" (CUDA from 8.0 on, and CPU tensors in Triton's interpreter).
            `choose` says which one "auto" takes.
        scratch_mb: MiB that a chunk of logits may take; None: see `chunks.chunk_rows`.
        group: the ranks that share the vocabulary; None: weight is whole, or a DTensor.
        sparse_backward: in [0, 1), see above; 0: gradients are exact.

    Returns:
        `HeadLoss`. Gradients reach hidden, weight and bias, and are formed only for those that
        require one; a second derivative raises NotImplementedError unless impl is "reference".

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: a wrong shape, dtype, device or range; a target outside [0, V); rto_mask without
            refusal_token_id; that beside second_target; a refusal token given twice; weights that
            require a gradient; an unknown impl, or one that cannot run there; impl "reference" with
            a group; sparse_backward with either of them. On every rank of a group: ranks that
            differ in d, dtype, N, targets, weights, refusal tokens, softcap or logit_scale.
        RuntimeError: live_rows are not the rows with a target, or a target lies outside [0, V);
            on CUDA as a device-side assertion.

    Source: arXiv 2407.09121, equation 2; unlikelihood: arXiv 1908.04319, equation 3.
    """
    weight, bias, group = own_rows(weight, bias, group)
    optional = dict(
        rto_mask=rto_mask,
        second_target=second_target,
        next_weight=next_weight,
        rto_weight=rto_weight,
        unlikely_target=unlikely_target,
        unlikelihood_weight=unlikelihood_weight,
        live_rows=live_rows,
        bias=bias,
    )
    tensors = dict(hidden=hidden, weight=weight, target=target) | {
        name: tensor for name, tensor in optional.items() if tensor is not None
    }
    check_group(group, impl)
    _check_sparse(sparse_backward, group, impl)
    check_tensors(tensors, is_shard=group is not None)
    vocabulary = len(weight) if group is None else None
    check_numbers(softcap, logit_scale, ignore_index, scratch_mb)
    refusal_ids = () if refusal_token_id is None else checked_ids(refusal_token_id)
    if vocabulary is not None:  # with shards, no rank knows it yet
        check_in_vocabulary(refusal_ids, vocabulary)
    if second_target is not None and refusal_ids:
        raise ValueError("second_target takes the place of refusal_token_id: leave one out")
    has_second = bool(refusal_ids) or second_target is not None
    if rto_mask is not None and not has_second:
        raise ValueError("refusal_token_id is required with rto_mask, got None")
    hidden = as_in_autocast(hidden, weight, bias)

    has_next = target != ignore_index
    is_rto = torch.zeros_like(has_next) if rto_mask is None else rto_mask
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # One column a kind of target, in the order of `live_rows.COLUMNS`.
    refusals = second_target
    if refusals is None:
        refusals = torch.full_like(target, refusal_ids[0] if refusal_ids else 0)
    refusal_set = refusal_ids if len(refusal_ids) > 1 else ()
    columns = [
        (target.where(has_next, 0), has_next, next_weight),
        (refusals, is_rto, rto_weight),
    ]
    if unlikely_target is not None:
        is_unlikely = unlikely_target != ignore_index
        # A row without an unlikely target takes the refusal token instead, with weight 0.
        unlikely = unlikely_target.where(is_unlikely, refusals)
        columns.append((unlikely, is_unlikely, unlikelihood_weight))
    tokens = torch.stack([tokens for tokens, _, _ in columns], 1)
    has_target = torch.stack([has for _, has, _ in columns], 1)
    token_weight = torch.stack(
        [_target_weight(row_weight, has, wide) for _, has, row_weight in columns], 1
    )
    nothing = torch.zeros(len(target), dtype=wide, device=hidden.device)
    masses = (nothing, nothing)
    if impl == "reference":
        rows = (
            counted_rows(tokens, has_target, len(weight))
            if live_rows is None
            else checked_rows(live_rows, tokens, has_target, len(weight))
        )
        loss, logsumexp, nll = head_loss_reference(
            gathered(hidden, rows),
            weight.to(hidden.dtype),
            None if bias is None else bias.to(hidden.dtype),
            gathered(tokens, rows),
            gathered(token_weight, rows),
            softcap,
            logit_scale,
            refusal_set,
        )
        logsumexp = scattered(logsumexp, rows, len(target))
        nll = scattered(nll, rows, len(target))
    else:
        arguments = (
            hidden,
            weight,
            bias,
            tokens,
            has_target,
            token_weight,
            softcap,
            logit_scale,
            impl,
            scratch_mb,
            *(
                torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
                for tensor in (hidden, weight, bias)
            ),
            refusal_set,
        )
        if live_rows is None or group is not None or sparse_backward:
            name = None if group is None else group.group_name
            results = head_loss_op(*arguments, name, live_rows, sparse_backward)
        else:
            results = head_loss_of_rows_op(*arguments, live_rows)
        loss, logsumexp, nll, *_ = results
        if len(results[-1]):
            masses = results[-2:]
    return HeadLoss(
        loss=loss,
        logsumexp=logsumexp,
        next_nll=nll[:, 0].where(has_next, 0.0),
        refusal_nll=nll[:, 1] if has_second else nothing,
        unlikelihood=nothing if unlikely_target is None else nll[:, 2].where(is_unlikely, 0.0),
        gradient_mass=masses[0],
        skipped_mass=masses[1],
    )


def _target_weight(row_weight: Tensor | None, has_target: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight of each row's target, (N,), 0 where it has none."""
    weight = has_target if row_weight is None else row_weight.where(has_target, 0)
    return weight.to(dtype)


def as_in_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> Tensor:
    """Return hidden as `F.linear` would see it: in autocast's dtype where it is on.

    Weight and bias are cast to hidden's dtype later, beside their history, or their gradients would
    be rounded to that dtype.

    Args:
        prefix: opens the names of the three in an error.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(device_type))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{prefix}{name} must have {prefix}hidden's dtype {hidden.dtype}, got "
                f"{tensor.dtype}: cast one of them, or use torch.autocast"
            )
    return hidden


def check_group(group: dist.ProcessGroup | None, impl: str) -> None:
    """Check that a group can share the vocabulary."""
    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed.ProcessGroup that this rank is in, or None, got "
            f"{type(group).__name__}"
        )
    if impl == "reference":
        raise ValueError(
            'impl must not be "reference" with a group or a DTensor: it holds all logits of the '
            "whole vocabulary"
        )


def _check_sparse(tolerance: float, group: dist.ProcessGroup | None, impl: str) -> None:
    """Check the tolerance of a sparse backward pass, and that there can be one."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise TypeError(f"sparse_backward must be int or float, got {type(tolerance).__name__}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"sparse_backward must lie in [0, 1), got {tolerance}")
    if tolerance and group is not None:
        raise ValueError(
            f"sparse_backward must be 0 with a group or a DTensor, got {tolerance}: ranks that "
            "share a vocabulary form whole gradients"
        )
    if tolerance and impl == "reference":
        raise ValueError(
            f'sparse_backward must be 0 with impl "reference", got {tolerance}: autograd forms '
            "whole gradients"
        )


def check_tensors(tensors: dict[str, Tensor], is_shard: bool) -> None:
    """Check types, shapes, dtypes and devices of the given tensors; no host transfer."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if hasattr(tensor, "placements"):
            raise ValueError(f"{name} must be a plain tensor, got a DTensor: take its local part")
    for name in ("hidden", "weight", "reference_hidden", "reference_weight"):
        if name in tensors and tensors[name].dim() != 2:
            letters = _LAYOUT[name][0]
            raise ValueError(f"{name} must have shape {letters}, got {_shape(tensors[name])}")
    hidden, weight = tensors["hidden"], tensors["weight"]
    reference_weight = tensors.get("reference_weight", weight)
    rows = tensors.get("live_rows", tensors.get("rows", hidden))
    (count, width), vocabulary = hidden.shape, len(weight)
    for name, tensor in (("weight", weight), ("reference_weight", reference_weight)):
        if len(tensor) == 0 and not is_shard:
            raise ValueError(f"{name} must have at least one row, got shape {_shape(tensor)}")
    shapes = {
        "(N, d)": (count, width),
        "(V, d)": (vocabulary, width),
        "(V,)": (vocabulary,),
        "(N,)": (count,),
        "(n,)": tuple(rows.shape[:1]),
        "(N, d0)": (count, reference_weight.shape[1]),
        "(V0, d0)": _shape(reference_weight),
        "(V0,)": (len(reference_weight),),
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
        is_constant = name.endswith("_weight") or name.startswith("reference_")
        if is_constant and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient, none is formed: detach it")


def check_numbers(
    softcap: float | None,
    logit_scale: float,
    ignore_index: int = -100,
    scratch_mb: float | None = None,
) -> None:
    """Check types and ranges of the arguments that are not tensors."""
    for name, number, kinds in (
        ("softcap", softcap, (int, float, type(None))),
        ("logit_scale", logit_scale, (int, float)),
        ("ignore_index", ignore_index, (int,)),
        ("scratch_mb", scratch_mb, (int, float, type(None))),
    ):
        if isinstance(number, bool) or not isinstance(number, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{name} must be {names}, got {type(number).__name__}")
    if softcap is not None and not 0 < softcap < inf:
        raise ValueError(f"softcap must be finite and > 0, or None, got {softcap}")
    if not 0 < abs(logit_scale) < inf:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")
    if scratch_mb is not None and not scratch_mb > 0:
        raise ValueError(f"scratch_mb must be > 0, or None, got {scratch_mb}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
