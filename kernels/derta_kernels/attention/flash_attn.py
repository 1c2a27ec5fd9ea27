"""Interval attention through flash-attn, with every segment a causal sequence of varlen kernels.

The kernels run twice. The first run covers all tokens in place, and each segment sees only itself,
which completes trunks and dialogues. The second run covers the segments with a prefix, the
branches, on gathered copies of their queries and of all keys that they see. Its rows replace those
of the first run, whose work on branches is wasted. That work is small: a branch over itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from derta_kernels.attention.layout import Layout
from derta_kernels.attention.segments import Sequences, segments


class _Version(NamedTuple):
    """One version of flash-attn.

    Attributes:
        number: its major version.
        module: name of the module with `flash_attn_varlen_func`.
        head_dims: the largest head dimension of forward and backward, with soft-cap and window, by
            major compute capability.
    """

    number: int
    module: str
    head_dims: dict[int, int]


# In order of preference. Version 4 has no backward below 9.0, nor a soft-cap with 256 from 10.0 on.
_VERSIONS = (
    _Version(3, "flash_attn_interface", {9: 256}),
    _Version(4, "flash_attn.cute", {9: 256, 10: 128, 11: 128}),
    _Version(2, "flash_attn", {8: 256, 9: 256, 10: 256, 11: 256, 12: 256}),
)
_ARGUMENTS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
    "deterministic",
)


def interval_attention_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Compute `interval_attention` segment by segment (`segments`).

    Memory: linear in tokens. Segments with a prefix take copies of their queries and of all keys
        and values that they see, twice as much in float32 for a moment of the backward pass, and a
        second output.
    Numerics: those of flash-attn. The gradients that segments with a prefix add to a key are summed
        in float32 and rounded once. Deterministic under torch.use_deterministic_algorithms, with
        which some of flash-attn's kernels refuse to run.
    Synchronisation: that of `segments`.

    Args and returns: those of `interval_attention`, with a scale, with Dv equal to D, and where
        `unavailable` returns None.

    Raises:
        ValueError: Dv is not D, or a window would cut a sequence whose positions are not
            consecutive: flash-attn's windows compare indices.
    """
    if v.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"v must have q's head dimension {q.shape[-1]} for flash-attn, got {v.shape[-1]}"
        )
    table = segments(layout)
    if window is not None and window < table.least_window:
        raise ValueError(
            f"window must be at least {table.least_window} for flash-attn, whose windows compare "
            f"indices, where position_ids are not consecutive in a sequence, got {window}"
        )
    varlen = _varlen_func(q.device, q.dtype, q.shape[-1])
    assert not isinstance(varlen, str)
    options: dict[str, Any] = dict(
        softmax_scale=scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    if softcap is not None:
        options["softcap"] = softcap
    if window is not None:
        options["window_size"] = (window - 1, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        result = varlen(
            q,
            k,
            v,
            cu_seqlens_q=sequences.query_edges,
            cu_seqlens_k=sequences.key_edges,
            max_seqlen_q=sequences.most_queries,
            max_seqlen_k=sequences.most_keys,
            **options,
        )
        return result[0] if isinstance(result, tuple) else result  # version 4 adds the logsumexp

    shape = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    output = attend(q, k, v, table.alone)
    if table.gathered is not None:
        queries, keys, sequences = table.gathered
        with_prefix = attend(q.index_select(0, queries), _rows(k, keys), _rows(v, keys), sequences)
        output = output.index_copy(0, queries, with_prefix)
    return output.unflatten(0, shape)


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why flash-attn cannot run there, forward and backward, in a clause; None: it can."""
    varlen = _varlen_func(device, dtype, head_dim)
    return varlen if isinstance(varlen, str) else None


def version(device: torch.device, dtype: torch.dtype, head_dim: int) -> int | None:
    """Return the major version of flash-attn that is taken there; None: it cannot run there."""
    taken = _taken(device, dtype, head_dim)
    return None if isinstance(taken, str) else taken[0]


def _varlen_func(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> Callable[..., Any] | str:
    """Return the `flash_attn_varlen_func` of the version to take, or a clause why there is none."""
    taken = _taken(device, dtype, head_dim)
    return taken if isinstance(taken, str) else taken[1]


@cache
def _taken(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[int, Callable[..., Any]] | str:
    """Return the version and its `flash_attn_varlen_func`, or a clause why there is none."""
    if device.type != "cuda":
        return f"flash-attn runs on CUDA devices, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8:
        return f"flash-attn takes head dimensions that are multiples of 8, not {head_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    reasons = []
    for number, module, head_dims in _VERSIONS:
        if find_spec(module.partition(".")[0]) is None:
            continue
        try:
            varlen = import_module(module).flash_attn_varlen_func
            inspect.signature(varlen).bind("q", "k", "v", **dict.fromkeys(_ARGUMENTS))
        except (ImportError, AttributeError, TypeError) as error:
            # Version 2 comes with an old copy of 4; 4 installed by itself has no module of 2.
            reasons.append(f"flash-attn {number} has no known interface ({error})")
            continue
        if major not in head_dims:
            reasons.append(f"flash-attn {number} does not train on capability {major}.{minor}")
        elif head_dim > head_dims[major]:
            reasons.append(f"flash-attn {number} takes head dimensions up to {head_dims[major]}")
        else:
            return number, varlen
    return "; ".join(reasons) or "flash-attn is not installed"


class _Rows(torch.autograd.Function):
    """Row selection x[rows], whose gradient sums repeated rows in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, d_taken: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        wide = d_taken.to(torch.promote_types(d_taken.dtype, torch.float32))
        d_x = wide.new_zeros(ctx.count, *wide.shape[1:]).index_add_(0, rows, wide)
        return d_x.to(d_taken.dtype), None


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    taken: Tensor = _Rows.apply(x, rows)
    return taken
