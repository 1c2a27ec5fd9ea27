"""Long examples through torch's kernels: in chunks of queries, with linear memory."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from derta_kernels.attention import interval_attention, sdpa
from packs import packed, rows, tensors, with_gradients


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "LONGEST_WHOLE", 64)
    monkeypatch.setattr(sdpa, "QUERY_CHUNK", 32)


@given(
    row=rows(),
    kv_heads=st.sampled_from([1, 2, 4]),
    value_width=st.sampled_from([5, 6]),
    window=st.sampled_from([None, 1, 2, 5, 100]),
    softcap=st.sampled_from([None, 1.5]),
)
def test_chunks_equal_the_definition(row, kv_heads, value_width, window, softcap) -> None:
    arguments = tensors(row, kv_heads=kv_heads, value_width=value_width)
    inputs = [arguments[name] for name in "qkv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "LONGEST_WHOLE", 4)
        patch.setattr(sdpa, "QUERY_CHUNK", 3)
        options = dict(window=window, softcap=softcap)
        actual = with_gradients(interval_attention(**arguments, impl="sdpa", **options), inputs)
    reference = interval_attention(**arguments, impl="reference", **options)
    for ours, wanted in zip(actual, with_gradients(reference, inputs), strict=True):
        assert (ours - wanted).norm() < 1e-13 * wanted.norm().clamp_min(1)  # some are 0


class PeakMemory(TorchDispatchMode):
    """A mode that records the peak bytes of the tensors made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.live: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def peak_bytes(length: int, *, value_width: int = 6, branch: int = 10, **options: Any) -> int:
    branches = [(length // 2, branch)] if branch else []
    arguments = tensors(
        packed([(length - branch, branches)]),
        heads=2,
        kv_heads=1,
        value_width=value_width,
        dtype=torch.float32,
    )
    inputs = [arguments[name] for name in "qkv"]
    with PeakMemory() as memory:
        with_gradients(interval_attention(**arguments, impl="sdpa", **options), inputs)
    return memory.peak


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"window": 100},
        {"softcap": 2.0},
        {"branch": 0},
        {"branch": 0, "value_width": 5},
        {"branch": 0, "window": 100},
        {"branch": 0, "softcap": 2.0},
    ],
    ids=str,
)
def test_memory_is_linear_in_a_long_example(case) -> None:
    """Twice the tokens: a mask or scores of all pairs would take four times the memory."""
    assert peak_bytes(1200, **case) < 2.1 * peak_bytes(600, **case)


def test_examples_of_more_than_8192_tokens_get_no_whole_mask() -> None:
    length = 8193
    assert peak_bytes(length) < length**2


@pytest.mark.usefixtures("short_chunks")
def test_gradients_are_summed_over_chunks_in_float32() -> None:
    """In bfloat16, the late chunks' part of the first value's gradient would be rounded away."""
    length = 3000
    arguments = tensors(packed([(length, [])]), kv_heads=4, dtype=torch.bfloat16)
    arguments["q"] = torch.zeros_like(arguments["q"])
    output = interval_attention(**arguments, softcap=1.0, impl="sdpa")
    (d_v,) = torch.autograd.grad(output.sum(), arguments["v"])
    wanted = (1 / torch.arange(1, length + 1)).sum()
    assert torch.allclose(d_v[0, 0].float(), wanted, rtol=2**-7, atol=0)


@pytest.mark.usefixtures("short_chunks")
def test_chunks_keep_their_dtype_under_autocast() -> None:
    arguments = tensors(packed([(70, [(30, 5)])]), dtype=torch.float32)
    inputs = [arguments[name] for name in "qkv"]
    expected = with_gradients(interval_attention(**arguments), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = interval_attention(**arguments)
    for ours, wanted in zip(with_gradients(output, inputs), expected, strict=True):
        assert torch.equal(ours, wanted)
