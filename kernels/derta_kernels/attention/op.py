"""The public interval attention: check the arguments and choose the implementation."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from derta_kernels.attention.choice import choose
from derta_kernels.attention.custom_op import attention_op
from derta_kernels.attention.flash_attn import interval_attention_flash_attn
from derta_kernels.attention.layout import Bounds, layout_of
from derta_kernels.attention.reference import interval_attention_reference
from derta_kernels.attention.sdpa import interval_attention_sdpa


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    position_ids: Tensor | None = None,
    example_bounds: Bounds | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute causal attention in which every key has an end of its visibility.

    Query i sees key j iff j <= i < visible_until[j], which expresses packed examples and branches
    that continue a shared prefix. With a window, the key must also be less than `window` positions
    before the query: positions, not indices, so that a branch sees what it would see by itself.

    Equals, up to rounding:

        i = torch.arange(q.shape[1])
        seen = (i <= i[:, None]) & (i[:, None] < visible_until[:, None, :])
        if window is not None:
            seen &= position_ids[:, :, None] - position_ids[:, None, :] < window
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        shares = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        out = torch.einsum("bhij,bjhd->bihd", shares, v)

    Memory, numerics: those of the implementation, see `interval_attention_sdpa`,
        `interval_attention_flash_attn` and kernels/README.md. "triton" accumulates in float32,
        rounds shares and gradients of scores to q's dtype for their products, is deterministic and
        holds nothing larger than its results.
    Synchronisation: on a device one transfer to the host per batch, none if example_bounds are
        given; all later calls on the same visible_until share the batch's layout (`layout_of`).

    Args:
        q: (B, N, Hq, D) floating point, N at least 1, any strides.
        k: (B, N, Hkv, D) in q's dtype; Hkv divides Hq, each for Hq / Hkv consecutive heads.
        v: (B, N, Hkv, Dv) in q's dtype.
        visible_until: (B, N) int32, in (j, N]: the first token that no longer sees token j. A
            token sees nothing before its example, which starts at s and ends at visible_until[s].
        scale: factor of the scores; None: D ** -0.5.
        softcap: > 0, scores become softcap * tanh(scores / softcap) (Gemma 2); None: no cap.
        window: >= 1, number of positions that a query sees, its own included; None: all.
        position_ids: (B, N) integer, position of each token in its sequence; required with
            window.
        example_bounds: (start, end) of the examples of each batch row, on the host, tiling
            [0, N); on a device they are trusted. None: read from visible_until.
        impl: "auto"; "reference" (the lines above, float32 or wider); "sdpa" (torch's kernels,
            example by example); "triton" (one launch, D up to 256); "flash_attn" (its varlen
            kernels). See `choose`; a name is never replaced by another.

    Returns:
        (B, N, Hq, Dv) in q's dtype, differentiable in q, k and v.

    Raises:
        TypeError: an argument is of the wrong Python type.
        ValueError: a wrong shape, dtype, device or range, or an impl that is unknown or cannot run.
    """
    _check_tensors(q, k, v, visible_until, position_ids)
    _check_numbers(scale, softcap, window)
    if window is not None and position_ids is None:
        raise ValueError("position_ids are required with window, got None")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    options = (softcap is not None, window is not None)
    name = choose(impl, q.device, q.dtype, q.shape[-1], v.shape[-1], *options).name
    if name == "reference":
        return interval_attention_reference(
            q, k, v, visible_until, position_ids, scale=scale, softcap=softcap, window=window
        )
    if name == "triton":
        if not torch.compiler.is_compiling():
            layout_of(visible_until, position_ids, example_bounds)  # found again by the operator
        if scale <= 0:  # the kernels take the maximum of the scores before they scale them
            q, scale = (q * 0, 1.0) if scale == 0 else (-q, -scale)
        out, _ = attention_op(q, k, v, visible_until, position_ids, scale, softcap, window)
        return out
    attend = interval_attention_sdpa if name == "sdpa" else interval_attention_flash_attn
    layout = layout_of(visible_until, position_ids, example_bounds)
    return attend(q, k, v, layout, scale=scale, softcap=softcap, window=window)


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, position_ids: Tensor | None
) -> None:
    """Check types, shapes, dtypes and devices; no host transfer."""
    tensors = dict(q=q, k=k, v=v, visible_until=visible_until)
    if position_ids is not None:
        tensors["position_ids"] = position_ids
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {tensor.device}")
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must have shape (B, N, Hq, D), all at least 1, got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q must be floating point, got {q.dtype}")

    batch, count, heads, width = q.shape
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != width:
        raise ValueError(
            f"k must have shape (B, N, Hkv, D) = ({batch}, {count}, Hkv, {width}), "
            f"got {tuple(k.shape)}"
        )
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(
            f"k must have a number of heads that divides q's {heads}, got {k.shape[2]}"
        )
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must have shape (B, N, Hkv, Dv) = ({batch}, {count}, {k.shape[2]}, Dv), "
            f"got {tuple(v.shape)}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} as q is, got {tensor.dtype}")
    for name in tensors.keys() - {"q", "k", "v"}:
        if tensors[name].shape != (batch, count):
            raise ValueError(
                f"{name} must have shape (B, N) = ({batch}, {count}), "
                f"got {tuple(tensors[name].shape)}"
            )
    if visible_until.dtype != torch.int32:
        raise ValueError(f"visible_until must be torch.int32, got {visible_until.dtype}")
    if position_ids is not None and position_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"position_ids must be int32 or int64, got {position_ids.dtype}")


def _check_numbers(scale: float | None, softcap: float | None, window: int | None) -> None:
    """Check types and ranges of the arguments that are not tensors."""
    for name, number, kinds in (
        ("scale", scale, (int, float, type(None))),
        ("softcap", softcap, (int, float, type(None))),
        ("window", window, (int, type(None))),
    ):
        if isinstance(number, bool) or not isinstance(number, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{name} must be {names}, got {type(number).__name__}")
    if scale is not None and not isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if softcap is not None and not (isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be finite and > 0, or None, got {softcap}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None, got {window}")
