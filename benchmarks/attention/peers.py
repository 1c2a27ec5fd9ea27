"""All measured implementations by name: ours, PyTorch's own, and flash-attn's.

An entry takes a case and its inputs, imports its packages, makes the mask as its users would, once
for all layers of a batch, and returns attention as a function of q, k and v. An implementation that
cannot run raises an error, which is recorded as the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention.cases import DIALOGUES, PLAIN, Case, Inputs, Mask, attention_by_chunks

EAGER = "eager, by chunks"
FLEX = "FlexAttention"
FLEX_TUNED = "FlexAttention, autotuned"
FLASH = "torch SDPA flash"
CUDNN = "torch SDPA cuDNN"
DENSE = "torch SDPA dense mask"
FLASH_ATTN = "flash-attn varlen"
BLOCK = 128  # default block of FlexAttention's masks


class Attention(NamedTuple):
    """An implementation, ready to run.

    Attributes:
        attend: function from q, k, v to the output, all in one layout.
        heads_first: if True, the layout is (1, H, N, D), else (1, N, H, D).
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    heads_first: bool


def derta(impl: str, case: Case, inputs: Inputs) -> Attention:
    """Set up ours, with the layout that the first layer of a patched model makes."""
    from derta_kernels.attention import choose, interval_attention, layout_of

    choose(impl, inputs.q.device, case.torch_dtype, case.width)
    mask = inputs.mask
    layout_of(mask.visible_until, mask.position_ids, (mask.bounds,))
    attend = partial(
        interval_attention,
        visible_until=mask.visible_until,
        position_ids=mask.position_ids,
        window=case.window,
        softcap=case.softcap,
        impl=impl,
    )
    return Attention(attend, heads_first=False)


def eager(case: Case, inputs: Inputs) -> Attention:
    """Set up the definition of attention over packs."""
    return Attention(partial(attention_by_chunks, case=case, mask=inputs.mask), heads_first=False)


def torch_causal(backend: SDPBackend, case: Case, inputs: Inputs) -> Attention:
    """Set up one of torch's kernels for plain causal attention, if the mask is causal."""
    if case.pattern != PLAIN or case.window is not None:
        raise NotImplementedError("it is plain causal attention, this mask is not")
    _no_softcap(case)
    if backend == SDPBackend.CUDNN_ATTENTION:
        _cuda_alone(inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=case.heads != case.kv_heads
            )

    return Attention(attend, heads_first=True)


def torch_dense(case: Case, inputs: Inputs) -> Attention:
    """Set up torch's attention with an N x N bool mask, and repeated keys and values."""
    _no_softcap(case)
    everything = slice(0, case.tokens)
    seen = inputs.mask.rows(everything, everything)
    groups = case.heads // case.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    return Attention(attend, heads_first=True)


def flash_attn(case: Case, inputs: Inputs) -> Attention:
    """Set up flash-attn's newest installed varlen kernels, with one sequence per example."""
    if case.pattern not in (PLAIN, DIALOGUES) or case.window is not None:
        raise NotImplementedError("it supports causal sequences, but no branches")
    _no_softcap(case)
    _cuda_alone(inputs)
    varlen = _flash_attn_varlen()
    bounds = inputs.mask.bounds
    edges = torch.tensor(
        [0, *(end for _, end in bounds)], dtype=torch.int32, device=inputs.q.device
    )
    longest = max(end - start for start, end in bounds)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = varlen(
            *(x[0] for x in (q, k, v)),
            cu_seqlens_q=edges,
            cu_seqlens_k=edges,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
        out = result[0] if isinstance(result, tuple) else result  # version 4 adds the logsumexp
        return out[None]

    return Attention(attend, heads_first=False)


def _flash_attn_varlen() -> Callable[..., Any]:
    """Return the varlen function of version 3, 4 or 2, in that order."""
    missing = []
    for module in ("flash_attn_interface", "flash_attn.cute", "flash_attn"):
        try:
            found: Callable[..., Any] = import_module(module).flash_attn_varlen_func
            return found
        except (ImportError, AttributeError) as error:
            missing.append(str(error))
    raise ModuleNotFoundError("; ".join(missing))


def flex(mode: str | None, case: Case, inputs: Inputs) -> Attention:
    """Set up compiled FlexAttention, with fully visible blocks marked as such."""
    _cuda_alone(inputs)  # on other devices it has no backward pass
    from torch.nn.attention.flex_attention import flex_attention

    attend = partial(
        torch.compile(flex_attention, dynamic=False, mode=mode),
        score_mod=None if case.softcap is None else score_mod(case.softcap),
        block_mask=block_mask(inputs.mask),
        enable_gqa=case.heads != case.kv_heads,
    )
    return Attention(attend, heads_first=True)


def score_mod(softcap: float) -> Callable[..., Tensor]:
    """Return the soft-cap as a FlexAttention score_mod."""

    def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def block_mask(mask: Mask) -> Any:
    """Make FlexAttention's exact mask, a row of blocks at a time; N is a multiple of `BLOCK`."""
    from torch.nn.attention.flex_attention import BlockMask

    visible_until, positions = mask.visible_until[0], mask.position_ids[0]
    count, window = len(visible_until), mask.window
    visible, whole = [], []
    for first in range(0, count, BLOCK):
        seen = mask.rows(slice(first, first + BLOCK), slice(0, count)).unflatten(1, (-1, BLOCK))
        visible.append(seen.any(2).any(0))
        whole.append(seen.all(2).all(0))
    any_of, all_of = torch.stack(visible), torch.stack(whole)

    def seen_by(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = (kv_idx <= q_idx) & (q_idx < visible_until[kv_idx])
        if window is not None:
            seen = seen & (positions[q_idx] - positions[kv_idx] < window)
        return seen

    return BlockMask.from_kv_blocks(
        *_listed(any_of & ~all_of),
        *_listed(all_of),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen_by,
        seq_lengths=(count, count),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's count of key blocks, (1, 1, rows), and their order, (1, 1, rows, all)."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]


def _no_softcap(case: Case) -> None:
    if case.softcap is not None:
        raise NotImplementedError("it has no soft-cap")


def _cuda_alone(inputs: Inputs) -> None:
    if not inputs.q.is_cuda:
        raise NotImplementedError(f"it trains only on CUDA, this is {inputs.q.device.type}")


IMPLEMENTATIONS: dict[str, Callable[[Case, Inputs], Attention]] = {
    "derta auto": partial(derta, "auto"),
    "derta triton": partial(derta, "triton"),
    "derta flash_attn": partial(derta, "flash_attn"),
    "derta sdpa": partial(derta, "sdpa"),
    FLEX: partial(flex, None),
    FLEX_TUNED: partial(flex, "max-autotune-no-cudagraphs"),
    FLASH: partial(torch_causal, SDPBackend.FLASH_ATTENTION),
    CUDNN: partial(torch_causal, SDPBackend.CUDNN_ATTENTION),
    FLASH_ATTN: flash_attn,
    DENSE: torch_dense,
    EAGER: eager,
}
