"""Packs through flash-attn's varlen interface, with a stand-in in plain PyTorch for its kernels."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from derta_kernels.attention import flash_attn, interval_attention, layout_of
from derta_kernels.attention.segments import segments
from packs import BRANCHED, PLAIN, Packed, distance, packed, rows, tensors, with_gradients

# Dao-AILab/flash-attention at 0251105: flash_attn/flash_attn_interface.py (2.8.4),
# hopper/flash_attn_interface.py, flash_attn/cute/interface.py.
SIGNATURES = {
    "flash_attn": """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None""",
    "flash_attn_interface": """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
        k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False""",
    "flash_attn.cute": """q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
        gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
        scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False""",
}
# The copy of version 4 in flash-attn 2.8.3, and version 3 of 2.7.4.
OUTDATED = {
    "flash_attn.cute": """q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None,
        seqused_k=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, pack_gqa=None""",
    "flash_attn_interface": """q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, q_descale=None,
        k_descale=None, v_descale=None, window_size=(-1, -1), sink_token_length=0, softcap=0.0,
        num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0""",
}


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    **rest: Any,
) -> Tensor:
    """Attend as flash-attn documents it: causal, windows aligned to the bottom right."""
    for edges, longest, x in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert edges.dtype == torch.int32 and edges.dim() == 1 and edges[0] == 0
        assert type(longest) is int and longest == edges.diff().max()
        assert len(x) == edges[-1] and x.dim() == 3 and x.stride(2) == 1
    assert causal and q.shape[2] == k.shape[2] == v.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    outputs = []
    for own_q, own_k, own_v in zip(
        q.split(cu_seqlens_q.diff().tolist()),
        k.split(cu_seqlens_k.diff().tolist()),
        v.split(cu_seqlens_k.diff().tolist()),
        strict=True,
    ):
        j = torch.arange(len(own_k))
        i = j[len(own_k) - len(own_q) :, None]
        seen = j <= i
        if window_size not in ((-1, -1), (None, None)):
            assert window_size[1] == 0
            seen &= i - window_size[0] <= j
        scores = softmax_scale * torch.einsum("ihd,jhd->hij", own_q, own_k)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", shares, own_v))
    return torch.cat(outputs)


def attend(
    arguments: dict[str, Tensor],
    *,
    scale: float = 0.4,
    softcap: float | None = None,
    window: int | None = None,
    varlen: Callable[..., Tensor] = varlen,
) -> Tensor:
    q, k, v, visible_until, position_ids = arguments.values()
    layout = layout_of(visible_until, position_ids, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_attn, "_varlen_func", lambda *_: varlen)
        return flash_attn.interval_attention_flash_attn(
            q, k, v, layout, scale=scale, softcap=softcap, window=window
        )


def assert_is_the_definition(
    arguments: dict[str, Tensor], varlen: Callable[..., Any] = varlen, **options: Any
) -> None:
    inputs = [arguments[name] for name in "qkv"]
    actual = with_gradients(attend(arguments, varlen=varlen, **options), inputs)
    reference = interval_attention(**arguments, scale=0.4, impl="reference", **options)
    for ours, wanted in zip(actual, with_gradients(reference, inputs), strict=True):
        assert distance(ours, wanted) < 1e-13


@given(
    row=rows(),
    batch=st.integers(1, 2),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 2, 5, 100]),
    softcap=st.sampled_from([None, 1.5]),
)
def test_it_equals_the_definition(row, batch, kv_heads, window, softcap) -> None:
    one = tensors(row, kv_heads=kv_heads, value_width=6)
    other = {name: 0.7 * x if name in "qkv" else x for name, x in one.items()}
    arguments = {name: torch.cat((one[name], other[name])[:batch]) for name in one}
    assert_is_the_definition(arguments, window=window, softcap=softcap)


@st.composite
def intervals(draw: st.DrawFn) -> list[int]:
    """Draw any example that `visible_until` can express, a pack or not."""
    count = draw(st.integers(1, 9))
    return [count, *(draw(st.integers(token + 1, count)) for token in range(1, count))]


@given(until=intervals())
def test_it_equals_the_definition_beyond_packs(until: list[int]) -> None:
    row = Packed(until, list(range(len(until))), ((0, len(until)),), [])
    assert_is_the_definition(tensors(row, value_width=6))


def test_only_branches_and_what_they_see_are_copied() -> None:
    calls: list[tuple[Tensor, ...]] = []

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q, k, v))
        return varlen(q, k, v, **options)

    for row, copied in ((PLAIN, []), (BRANCHED, [(1 + 5 + 4, 6 + 1 + 6 + 5 + 3 + 4)])):
        calls.clear()
        arguments = tensors(row, value_width=6)
        for name in "qkv":  # as transformers has them: heads before tokens
            x = arguments[name].detach().transpose(1, 2).contiguous().transpose(1, 2)
            arguments[name] = x.requires_grad_()
        attend(arguments, varlen=recorded)
        for name, x in zip("qkv", calls[0], strict=True):
            assert x.data_ptr() == arguments[name].data_ptr()
            assert x.stride() == arguments[name].stride()[1:]
        assert [(len(q), len(k)) for q, k, _ in calls[1:]] == copied


def test_all_layers_share_one_table() -> None:
    arguments = tensors(BRANCHED, value_width=6)
    layout = layout_of(arguments["visible_until"], arguments["position_ids"], None)
    attend(arguments)
    assert segments(layout) is segments(layout)


def test_gradients_of_many_branches_are_not_rounded_away() -> None:
    """Added one by one in bfloat16, 600 halves would stop at 128."""
    arguments = tensors(packed([(1, [(1, 1)] * 600)]), value_width=6, dtype=torch.bfloat16)
    arguments["q"] = torch.zeros_like(arguments["q"])
    (d_v,) = torch.autograd.grad(attend(arguments).sum(), arguments["v"])
    wanted = 2 * (1 + 600 / 2)  # two query heads per key head
    assert torch.allclose(d_v[0, 0].float(), torch.tensor(wanted), rtol=2**-7, atol=0)


def test_windows_refuse_positions_that_are_not_consecutive() -> None:
    arguments = tensors(packed([(6, [(3, 2)])]), value_width=6)
    arguments["position_ids"] += torch.tensor([0, 0, 0, 0, 0, 0, 2, 2])
    assert_is_the_definition(arguments)
    assert_is_the_definition(arguments, window=7)
    with pytest.raises(ValueError, match="window must be at least 7 for flash-attn, .* got 6"):
        attend(arguments, window=6)


def test_values_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="v must have q's head dimension 6 .*, got 5"):
        attend(tensors(PLAIN))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Install versions of flash-attn on a GPU of some capability; return the calls they get."""

    def install(capability: tuple[int, int], modules: dict[str, str]) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        flash_attn._taken.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for name in SIGNATURES:
            monkeypatch.setitem(sys.modules, name, None)
        for name in {name.partition(".")[0] for name in modules} | modules.keys():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        for name, signature in modules.items():
            scope = dict(given=lambda given, name=name: calls.append(given) or answer(name, given))
            exec(f"def flash_attn_varlen_func({signature}): return given(locals())", scope)
            sys.modules[name].flash_attn_varlen_func = scope["flash_attn_varlen_func"]
        return calls

    def answer(name: str, given: dict[str, Any]) -> Any:
        output = varlen(**given)
        return (output, None) if name == "flash_attn.cute" else output

    yield install
    flash_attn._taken.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("module", SIGNATURES)
def test_every_version_is_called_by_its_own_signature(
    install, module: str, deterministic: bool
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    calls = install((9, 0), {module: SIGNATURES[module]})
    varlen_func = flash_attn._varlen_func(GPU, torch.bfloat16, 128)
    for options in ({}, {"window": 3}, {"softcap": 2.0}):
        calls.clear()
        arguments = tensors(BRANCHED, value_width=6)
        assert_is_the_definition(arguments, varlen=varlen_func, **options)
        assert [call["deterministic"] for call in calls] == [deterministic] * 2


@pytest.mark.parametrize(
    ("capability", "installed", "head_dim", "taken"),
    [
        ((9, 0), [*SIGNATURES], 256, "flash_attn_interface"),
        ((9, 0), ["flash_attn", "flash_attn.cute"], 128, "flash_attn.cute"),
        ((10, 0), [*SIGNATURES], 128, "flash_attn.cute"),
        ((10, 0), [*SIGNATURES], 256, "flash_attn"),
        ((8, 0), [*SIGNATURES], 64, "flash_attn"),
        ((12, 0), [*SIGNATURES], 64, "flash_attn"),
    ],
)
def test_the_chosen_version_trains_on_the_gpu(
    install, capability, installed, head_dim, taken
) -> None:
    install(capability, {name: SIGNATURES[name] for name in installed})
    assert flash_attn.unavailable(GPU, torch.bfloat16, head_dim) is None
    varlen_func = flash_attn._varlen_func(GPU, torch.bfloat16, head_dim)
    assert varlen_func is sys.modules[taken].flash_attn_varlen_func


def test_a_version_with_an_unknown_interface_is_skipped(install) -> None:
    install((9, 0), {**SIGNATURES, **OUTDATED})
    varlen_func = flash_attn._varlen_func(GPU, torch.float16, 64)
    assert varlen_func is sys.modules["flash_attn"].flash_attn_varlen_func


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "installed", "why"),
    [
        ("cpu", "bfloat16", 64, {}, "flash-attn runs on CUDA devices, not on cpu"),
        ("cuda", "float32", 64, {}, "flash-attn takes bfloat16 and float16, not float32"),
        ("cuda", "float16", 68, {}, "flash-attn takes head .* multiples of 8, not 68"),
        ("cuda", "float16", 64, {}, "flash-attn is not installed"),
        ("cuda", "float16", 264, SIGNATURES, "flash-attn 2 takes head dimensions up to 256"),
        (
            "cuda",
            "float16",
            64,
            {"flash_attn_interface": SIGNATURES["flash_attn_interface"]},
            r"flash-attn 3 does not train on capability 8\.6",
        ),
        (
            "cuda",
            "float16",
            64,
            {"flash_attn.cute": OUTDATED["flash_attn.cute"]},
            "flash-attn 4 has no known interface .*max_seqlen_q.*; flash-attn 2 has",
        ),
    ],
)
def test_it_says_why_it_cannot_be_used(install, device, dtype, head_dim, installed, why) -> None:
    install((8, 6), installed)
    clause = flash_attn.unavailable(torch.device(device), getattr(torch, dtype), head_dim)
    assert clause is not None
    assert re.search(why, clause)
