"""Every implementation that is measured, by name: ours, PyTorch's own, and flash-attn's.

An entry takes a case and its inputs, imports what it needs, makes the mask as its users would, once
for all layers of a batch, and gives attention as a function of q, k and v. One that cannot run
there raises, and the reason is what gets recorded.
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
BLOCK = 128  # of FlexAttention's masks, its default


class Attention(NamedTuple):
    """What runs.

    Attributes:
        attend: q, k, v -> output, of one layout.
        heads_first: whether that is (1, H, N, D), else (1, N, H, D).
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    heads_first: bool


def derta(impl: str, case: Case, inputs: Inputs) -> Attention:
    """Ours, with the layout that the first layer of a patched model makes."""
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
    """The definition."""
    return Attention(partial(attention_by_chunks, case=case, mask=inputs.mask), heads_first=False)


def torch_causal(backend: SDPBackend, case: Case, inputs: Inputs) -> Attention:
    """One of torch's kernels for plain causal attention, where that is right."""
    if case.pattern != PLAIN or case.window is not None:
        raise NotImplementedError("it is plain causal attention, and this mask is not")
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
    """A bool mask of N x N, with keys and values repeated as transformers repeats them."""
    _no_softcap(case)
    everything = slice(0, case.tokens)
    seen = inputs.mask.rows(everything, everything)
    groups = case.heads // case.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    return Attention(attend, heads_first=True)


def flash_attn(case: Case, inputs: Inputs) -> Attention:
    """flash-attn's varlen kernels, an example a sequence; the newest version that is there."""
    if case.pattern not in (PLAIN, DIALOGUES) or case.window is not None:
        raise NotImplementedError("it knows causal sequences, and no branches")
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
        out = result[0] if isinstance(result, tuple) else result  # 4: and the logsumexp
        return out[None]

    return Attention(attend, heads_first=False)


def _flash_attn_varlen() -> Callable[..., Any]:
    """Of version 3, 4 or 2, in that order."""
    missing = []
    for module in ("flash_attn_interface", "flash_attn.cute", "flash_attn"):
        try:
            found: Callable[..., Any] = import_module(module).flash_attn_varlen_func
            return found
        except (ImportError, AttributeError) as error:
            missing.append(str(error))
    raise ModuleNotFoundError("; ".join(missing))


def flex(mode: str | None, case: Case, inputs: Inputs) -> Attention:
    """FlexAttention, compiled, blocks that are seen whole marked as such."""
    _cuda_alone(inputs)  # elsewhere it has no backward pass
    from torch.nn.attention.flex_attention import flex_attention

    attend = partial(
        torch.compile(flex_attention, dynamic=False, mode=mode),
        score_mod=None if case.softcap is None else score_mod(case.softcap),
        block_mask=block_mask(inputs.mask),
        enable_gqa=case.heads != case.kv_heads,
    )
    return Attention(attend, heads_first=True)


def score_mod(softcap: float) -> Callable[..., Tensor]:
    """The soft-cap, for FlexAttention."""

    def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def block_mask(mask: Mask) -> Any:
    """FlexAttention's mask, exact, made by a row of blocks at a time; N a multiple of `BLOCK`."""
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
    """How many key blocks each row has, (1, 1, rows), and which come first, (1, 1, rows, all)."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]


def _no_softcap(case: Case) -> None:
    if case.softcap is not None:
        raise NotImplementedError("it has no soft-cap")


def _cuda_alone(inputs: Inputs) -> None:
    if not inputs.q.is_cuda:
        raise NotImplementedError(f"it trains on CUDA alone, this is {inputs.q.device.type}")


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
