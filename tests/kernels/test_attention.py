"""Interval attention, in which every key has an end of its visibility."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from derta_kernels.attention import choose, interval_attention, layout_of
from derta_kernels.testing import equals_snippet, error_budget, relative_error
from packs import (
    BRANCHED,
    PLAIN,
    Packed,
    distance,
    oracle,
    packed,
    results,
    rows,
    tensors,
    with_gradients,
)

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@given(
    row=rows(),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 2, 5, 100]),
    softcap=st.sampled_from([None, 1.5]),
    scale=st.sampled_from([None, 0.3]),
)
def test_sdpa_equals_the_definition(row, kv_heads, window, softcap, scale) -> None:
    arguments = tensors(row, kv_heads=kv_heads)
    options = dict(window=window, softcap=softcap, scale=scale)
    expected = results(arguments, impl="reference", **options)
    for actual, wanted in zip(results(arguments, impl="sdpa", **options), expected, strict=True):
        assert distance(actual, wanted) < 1e-13


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("window", [None, 3])
@given(row=rows())
def test_a_pack_gives_the_results_of_its_sequences_one_by_one(
    impl: str, window: int | None, row: Packed
) -> None:
    arguments = tensors(row, kv_heads=4)
    output = interval_attention(**arguments, window=window, impl=impl)
    for tokens, own in row.sequences:
        q, k, v = (arguments[name][0, tokens].transpose(0, 1) for name in "qkv")
        causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        seen = causal if window is None else causal.triu(1 - window)
        alone = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        assert distance(output[0, tokens[-own:]], alone.transpose(0, 1)[-own:]) < 1e-13


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("row", [BRANCHED, PLAIN], ids=["branched", "plain"])
def test_rounding_stays_within_twice_that_of_eager(row, options, dtype) -> None:
    arguments = tensors(row, dtype=dtype)
    inputs = [arguments[name] for name in "qkv"]
    output = eager_attention(*inputs, arguments, **options)
    eager = with_gradients(output, inputs)
    actual = results(arguments, **options)
    for ours, theirs, wanted in zip(actual, eager, oracle(arguments, **options), strict=True):
        ours, theirs, wanted = (x.flatten(0, 2) for x in (ours, theirs, wanted))
        assert relative_error(ours, wanted) <= error_budget(theirs, wanted, dtype)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    arguments: dict[str, Tensor],
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Run the documented lines in the inputs' own dtype, the softmax included."""
    names = dict(arguments, q=q, k=k, v=v, window=window, softcap=softcap, torch=torch)
    names["scale"] = q.shape[-1] ** -0.5
    exec(equals_snippet(interval_attention), names)
    return names["out"]


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 2.0}], ids=str)
def test_it_computes_the_documented_lines(options) -> None:
    arguments = tensors(BRANCHED)
    documented = eager_attention(*(arguments[name] for name in "qkv"), arguments, **options)
    assert distance(interval_attention(**arguments, **options), documented) < 1e-14


def test_each_batch_row_has_its_own_examples() -> None:
    first, second = tensors(BRANCHED), tensors(packed([(len(BRANCHED.visible_until), [])]))
    both = {name: torch.cat((first[name], second[name])) for name in first}
    bounds = (BRANCHED.bounds, ((0, len(BRANCHED.visible_until)),))
    apart = torch.cat([interval_attention(**one) for one in (first, second)])
    assert torch.equal(interval_attention(**both), apart)
    assert torch.equal(interval_attention(**both, example_bounds=bounds), apart)


# Of odd lengths, and long enough for a CPU's matrix unit.
LONG = packed([(65, [(33, 31), (12, 7)]), (37, [])])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("row", [BRANCHED, LONG], ids=["short", "long"])
def test_other_examples_change_no_bit(row: Packed, dtype: torch.dtype) -> None:
    clean, poisoned = tensors(row, dtype=dtype), tensors(row, dtype=dtype)
    start, end = row.bounds[0]
    with torch.no_grad():
        for name in "qkv":
            poisoned[name][:, start:end] = torch.nan
    for options in ({}, {"window": 3}, {"softcap": 2.0}):
        upstream = torch.ones_like(interval_attention(**clean))
        upstream[:, start:end] = 0
        for ours, theirs in zip(
            *(
                [
                    output,
                    *torch.autograd.grad(output, [case[name] for name in "qkv"], upstream),
                ]
                for case in (clean, poisoned)
                for output in [interval_attention(**case, **options)]
            ),
            strict=True,
        ):
            assert torch.equal(ours[:, end:], theirs[:, end:])


def test_strides_do_not_matter() -> None:
    arguments = tensors(BRANCHED)
    strided = dict(arguments)
    for name in "qkv":
        strided[name] = arguments[name].detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(interval_attention(**strided), interval_attention(**arguments))


def test_one_token_attends_to_itself() -> None:
    arguments = tensors(packed([(1, [])]), kv_heads=4)
    for options in ({}, {"softcap": 2.0}, {"window": 1}, {"impl": "reference"}):
        assert torch.equal(interval_attention(**arguments, **options), arguments["v"])


def layers(arguments: dict[str, Tensor], count: int = 3, **options: object) -> Tensor:
    """Attend as several layers do with one batch, each through its own views."""
    views = dict(
        arguments,
        visible_until=arguments["visible_until"].detach(),
        position_ids=arguments["position_ids"].view(1, -1),
    )
    return torch.stack([interval_attention(**views, **options) for _ in range(count)])


def test_all_layers_share_one_layout_and_its_masks() -> None:
    arguments = tensors(BRANCHED)
    layout = layout_of(arguments["visible_until"], arguments["position_ids"], None)
    layers(arguments)
    layers(arguments, window=4)
    alias = arguments["visible_until"].detach()
    assert layout_of(alias, arguments["position_ids"], None) is layout
    example = layout.examples[0]
    for window in (None, 4):
        assert layout.mask(example, window, 0) is layout.mask(example, window, 0)
    assert layout.mask(example, 100, 0) is layout.mask(example, None, 0)


def test_a_device_is_read_once_and_not_at_all_when_bounds_are_given(monkeypatch) -> None:
    """The meta device has no values, so any other transfer is an error."""
    on_host = tensors(BRANCHED)
    values = torch.stack((on_host["visible_until"][0], on_host["position_ids"][0])).long()
    transfers = []

    def cpu(tensor: Tensor) -> Tensor:
        transfers.append(tensor.shape)
        return values

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    on_device = {name: tensor.detach().to("meta") for name, tensor in on_host.items()}
    assert layers(on_device, window=3, example_bounds=(BRANCHED.bounds,)).is_meta
    assert transfers == []
    on_device = {name: tensor.detach().to("meta") for name, tensor in on_host.items()}
    assert layers(on_device).is_meta
    assert layers(on_device, window=3).is_meta
    assert transfers == [values.shape]


def test_writing_to_a_batch_in_place_is_noticed() -> None:
    arguments = tensors(packed([(6, [(2, 3)])]))
    interval_attention(**arguments, window=3)
    arguments["visible_until"].fill_(9)
    arguments["position_ids"].copy_(torch.arange(9))
    fresh = {name: tensor.clone() for name, tensor in arguments.items()}
    assert torch.equal(
        interval_attention(**arguments, window=3), interval_attention(**fresh, window=3)
    )


def test_a_layout_is_freed_with_its_batch() -> None:
    arguments = tensors(BRANCHED)
    layout = weakref.ref(layout_of(arguments["visible_until"], arguments["position_ids"], None))
    results(arguments, window=3)
    assert layout() is not None
    del arguments
    gc.collect()
    assert layout() is None


def test_masks_made_while_evaluating_serve_training() -> None:
    arguments = tensors(BRANCHED)
    with torch.inference_mode():
        evaluated = interval_attention(**arguments, window=3)
    assert torch.equal(results(arguments, window=3)[0], evaluated)


def test_uncounted_writes_to_inference_tensors_are_noticed() -> None:
    """PyTorch does not count writes to inference tensors."""
    with torch.inference_mode():
        arguments = {name: x.clone() for name, x in tensors(packed([(6, [(2, 3)])])).items()}
        interval_attention(**arguments)
        arguments["visible_until"].fill_(9)
        written = interval_attention(**arguments)
        assert torch.allclose(written, interval_attention(**arguments, impl="reference"))


def test_an_explicit_implementation_is_the_one_that_runs() -> None:
    device = torch.device("cpu")
    assert choose("auto", device).name == "sdpa"
    assert choose("reference", device) == ("reference", "asked for by name")
    arguments = tensors(BRANCHED, dtype=torch.bfloat16)
    exact = {name: x.double() if name in "qkv" else x for name, x in arguments.items()}
    wanted = interval_attention(**exact, impl="reference").bfloat16()
    assert torch.equal(interval_attention(**arguments, impl="reference"), wanted)
    with pytest.raises(
        ValueError, match="impl must be one of auto, reference, sdpa, triton, flash_attn, got"
    ):
        interval_attention(**arguments, impl="flash")


N = len(BRANCHED.visible_until)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=[1.0]), TypeError, "q must be a tensor, got list"),
        (dict(q=torch.ones(3, 4)), ValueError, r"q must have shape \(B, N, Hq, D\), all at least"),
        (
            dict(q=torch.ones(1, 0, 4, 6)),
            ValueError,
            r"q must have shape \(B, N, Hq, D\), all at least 1, got \(1, 0, 4, 6\)",
        ),
        (
            dict(q=torch.ones(1, N, 4, 6, dtype=torch.int64)),
            ValueError,
            "q must be floating point, got torch.int64",
        ),
        (
            dict(k=torch.ones(1, N + 1, 2, 6)),
            ValueError,
            rf"k must have shape \(B, N, Hkv, D\) = \(1, {N}, Hkv, 6\), got \(1, {N + 1}, 2, 6\)",
        ),
        (
            dict(k=torch.ones(1, N, 3, 6)),
            ValueError,
            "k must have a number of heads that divides q's 4, got 3",
        ),
        (
            dict(v=torch.ones(1, N, 4, 6)),
            ValueError,
            rf"v must have shape \(B, N, Hkv, Dv\) = \(1, {N}, 2, Dv\), got \(1, {N}, 4, 6\)",
        ),
        (
            dict(k=torch.ones(1, N, 2, 6)),
            ValueError,
            "k must be torch.float64 as q is, got torch.float32",
        ),
        (
            dict(v=torch.ones(1, N, 2, 6, device="meta")),
            ValueError,
            "v must be on cpu as q is, got meta",
        ),
        (
            dict(visible_until=torch.ones(N, dtype=torch.int32)),
            ValueError,
            rf"visible_until must have shape \(B, N\) = \(1, {N}\), got \({N},\)",
        ),
        (
            dict(visible_until=torch.ones(1, N, dtype=torch.int64)),
            ValueError,
            "visible_until must be torch.int32, got torch.int64",
        ),
        (
            dict(position_ids=torch.ones(1, N)),
            ValueError,
            "position_ids must be int32 or int64, got torch.float32",
        ),
        (
            dict(position_ids=None, window=3),
            ValueError,
            "position_ids are required with window, got None",
        ),
        (dict(window=0), ValueError, "window must be at least 1, or None, got 0"),
        (dict(window=2.0), TypeError, "window must be int or NoneType, got float"),
        (dict(softcap=0.0), ValueError, "softcap must be finite and > 0, or None, got 0.0"),
        (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
        (
            dict(example_bounds=(((0, 3), (4, N)),)),
            ValueError,
            rf"example_bounds must cut \[0, N\) = \[0, {N}\) into consecutive \(start, end\)",
        ),
        (
            dict(example_bounds=()),
            ValueError,
            "example_bounds must hold one sequence of .* for each of the 1 batch rows, got 0",
        ),
        (
            dict(example_bounds=(((0, 3), (3, N)),)),
            ValueError,
            "visible_until must lie above its own index and within its example, got 19 for token 0",
        ),
        (
            dict(visible_until=torch.arange(N, dtype=torch.int32)[None]),
            ValueError,
            "visible_until must lie above its own index and within the batch, got 0 for token 0",
        ),
        (
            dict(visible_until=torch.tensor([[N, 1] + [N] * (N - 2)], dtype=torch.int32)),
            ValueError,
            "visible_until must lie above its own index and within its example, got 1 for token 1",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, message) -> None:
    with pytest.raises(error, match=message):
        interval_attention(**{**tensors(BRANCHED), **change})
