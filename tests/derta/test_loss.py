"""The objective: what it counts, what it divides by, and that it is the official one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from derta.labels import derta_labels
from derta.loss import (
    DertaLoss,
    RTOLoss,
    derta_loss,
    derta_loss_with_rows,
    linear_cross_entropy,
    rto_loss,
)
from derta_kernels.head_loss import Head, HeadLoss
from derta_kernels.testing import HostTransfers, equals_snippet

REFUSAL = 3
IMPLS = ["reference", "torch"]


def batch(**change: Any) -> dict[str, Any]:
    """Arguments of `derta_loss` in float64 with every kind of row: next, refusal, both, none."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(11, (3, 8), generator=generator)
    kind = torch.arange(24).reshape(3, 8) % 4
    arguments = dict(
        hidden=torch.randn(3, 8, 6, generator=generator, dtype=torch.float64, requires_grad=True),
        weight=torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True),
        target=target.masked_fill((kind == 1) | (kind == 3), -100),
        rto_mask=(kind == 1) | (kind == 2),
        refusal_token_id=REFUSAL,
    )
    return arguments | change


def loss_and_gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal in float64 up to the order of a few hundred additions."""
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 1e-13 * e.norm()


# Definition


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_items", [None, 37])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("refusal", [REFUSAL, (9, 1, 4)])
def test_derta_loss_equals_its_documented_equation(
    impl: str, num_items: int | None, softcap: float | None, refusal: int | tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(2)
    arguments = batch(
        refusal_token_id=refusal,
        rto_weight=0.3,
        loss_weight=torch.rand(3, 8, generator=generator, dtype=torch.float64),
        bias=torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True),
        softcap=softcap,
        logit_scale=0.5,
        ignore_index=-100,
        num_items=num_items,
    )
    names = arguments | dict(torch=torch, F=F)
    exec(equals_snippet(derta_loss).replace(".float()", ""), names)
    leaves = arguments["hidden"], arguments["weight"], arguments["bias"]
    assert_equal(
        loss_and_gradients(derta_loss(**arguments, impl=impl), *leaves),
        loss_and_gradients(names["loss"], *leaves),
    )


@pytest.mark.parametrize("refusal", [REFUSAL, (9, 1, 4)])
@pytest.mark.parametrize("impl", IMPLS)
def test_rto_loss_equals_its_documented_equation(impl: str, refusal: int | tuple[int, ...]) -> None:
    arguments = batch(
        refusal_token_id=refusal,
        loss_weight=torch.linspace(0, 1, 24, dtype=torch.float64).reshape(3, 8),
        bias=torch.linspace(-1, 1, 11, dtype=torch.float64),
        softcap=5.0,
        logit_scale=2.0,
        num_items=None,
    )
    del arguments["target"]
    names = arguments | dict(torch=torch, F=F)
    exec(equals_snippet(rto_loss).replace(".float()", ""), names)
    leaves = arguments["hidden"], arguments["weight"]
    assert_equal(
        loss_and_gradients(rto_loss(**arguments, impl=impl), *leaves),
        loss_and_gradients(names["loss"], *leaves),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_the_official_loss_on_200_random_cases(impl: str) -> None:
    """There, labels of an RTO row are rewritten to the refusal id, and the loss is their mean."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        rows, length = torch.randint(2, 9, (2,), generator=generator).tolist()
        hidden = torch.randn(rows, length, 6, generator=generator, dtype=torch.float64)
        weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        labels = torch.randint(11, (rows, length), generator=generator)
        labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
        labels[0, -1] = 5  # the official mean over no label is NaN
        is_rto = torch.rand(rows, generator=generator) < 0.5

        official = labels.clone()
        for row in range(rows):
            if is_rto[row]:
                official[row, labels[row] != -100] = REFUSAL
        logits = hidden @ weight.T
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), official[:, 1:].flatten())

        aligned, of_rto = labels[:, 1:], is_rto[:, None]
        actual = derta_loss(
            hidden[:, :-1],
            weight,
            aligned.masked_fill(of_rto, -100),
            of_rto & (aligned != -100),
            refusal_token_id=REFUSAL,
            impl=impl,
        )
        by_labels = linear_cross_entropy(
            hidden[:, :-1], weight, derta_labels(labels, is_rto, REFUSAL)[:, 1:], impl=impl
        )
        expected_values = loss_and_gradients(expected, *leaves)
        assert_equal(loss_and_gradients(actual, *leaves), expected_values)
        assert_equal(loss_and_gradients(by_labels, *leaves), expected_values)


# Normalisation


def test_the_mean_counts_a_row_with_both_targets_twice() -> None:
    arguments = batch()
    next_count, rto_count = 12, 12
    both = (arguments["target"] != -100) & arguments["rto_mask"]
    assert both.sum() == 6 and ((arguments["target"] != -100) | arguments["rto_mask"]).sum() == 18
    mean = derta_loss(**arguments)
    total = derta_loss(**arguments, reduction="sum")
    torch.testing.assert_close(mean, total / (next_count + rto_count))


@pytest.mark.parametrize("num_items", [24, torch.tensor(24), torch.tensor(24.0)])
def test_num_items_replaces_the_count(num_items: int | Tensor) -> None:
    assert torch.equal(derta_loss(**batch(), num_items=num_items), derta_loss(**batch()))
    half = derta_loss(**batch(), num_items=2 * num_items)
    torch.testing.assert_close(half, derta_loss(**batch()) / 2)


def test_parts_of_a_step_that_share_a_count_add_up_to_its_mean() -> None:
    arguments = batch()
    leaves = arguments["hidden"], arguments["weight"]
    whole = loss_and_gradients(derta_loss(**arguments), *leaves)
    rows = ("hidden", "target", "rto_mask")
    parts = [{name: arguments[name][part] for name in rows} for part in (slice(1), slice(1, 3))]
    split = sum(derta_loss(**arguments | part, num_items=24) for part in parts)
    assert isinstance(split, Tensor)
    assert_equal(loss_and_gradients(split, *leaves), whole)


def with_rows(weight: Tensor, **arguments: Any) -> HeadLoss:
    return derta_loss_with_rows(head=Head(weight), **arguments)


@pytest.mark.parametrize(
    "rto_weight", [0.25, torch.tensor(0.25), torch.full((3, 8), 0.25)], ids=["number", "()", "row"]
)
def test_rto_weight_scales_the_numerator_only(rto_weight: float | Tensor) -> None:
    rows = with_rows(**batch())
    refusals = rows.refusal_nll[batch()["rto_mask"]]
    expected = (rows.next_nll.sum() + 0.25 * refusals.sum()) / 24
    torch.testing.assert_close(derta_loss(**batch(), rto_weight=rto_weight).detach(), expected)


def test_loss_weight_scales_both_terms_of_a_row_in_the_numerator_only() -> None:
    loss_weight = torch.rand(3, 8)
    rows = with_rows(**batch())
    per_row = rows.next_nll + rows.refusal_nll.where(batch()["rto_mask"], 0)
    expected = (loss_weight * per_row).sum() / 24
    torch.testing.assert_close(derta_loss(**batch(), loss_weight=loss_weight).detach(), expected)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0), 7])
def test_without_a_live_row_it_is_zero_with_a_gradient(num_items: int | Tensor | None) -> None:
    nothing = dict(target=torch.full((3, 8), -100), rto_mask=torch.zeros(3, 8, dtype=torch.bool))
    arguments = batch(**nothing, num_items=num_items)
    leaves = arguments["hidden"], arguments["weight"]
    loss, *gradients = loss_and_gradients(derta_loss(**arguments), *leaves)
    assert loss == 0
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("weight", [0.25, torch.tensor(0.25), torch.full((3, 8), 0.25)])
def test_unlikelihood_adds_to_the_numerator_only(weight: float | Tensor) -> None:
    unlikely = torch.arange(24).reshape(3, 8) % 5 - 1
    unlikely = unlikely.where(unlikely >= 0, -100)
    rows = with_rows(**batch(), unlikely_target=unlikely, unlikelihood_weight=weight)
    p = torch.log_softmax(batch()["hidden"] @ batch()["weight"].T, -1).exp()
    own = -torch.log1p(-p.gather(-1, unlikely.clamp(min=0)[..., None])[..., 0])
    torch.testing.assert_close(rows.unlikelihood, own.where(unlikely != -100, 0).detach())
    expected = with_rows(**batch()).loss + 0.25 * rows.unlikelihood.sum() / 24
    torch.testing.assert_close(rows.loss, expected)
    loss = derta_loss(**batch(), unlikely_target=unlikely, unlikelihood_weight=weight)
    torch.testing.assert_close(loss, expected)


def test_rows_come_back_in_the_shape_they_came_in() -> None:
    rows = with_rows(**batch())
    has_next = batch()["target"] != -100
    assert torch.equal(rows.loss, derta_loss(**batch()))
    assert torch.equal(rows.next_nll != 0, has_next)
    assert torch.equal(rows.refusal_nll != 0, has_next | batch()["rto_mask"])
    assert rows.logsumexp.shape == (3, 8) and not rows.refusal_nll.requires_grad


def test_one_vector_is_a_row() -> None:
    arguments = batch()
    single = derta_loss_with_rows(
        arguments["hidden"][0, 0], Head(arguments["weight"]), torch.tensor(5)
    )
    expected = F.cross_entropy(arguments["hidden"][0, 0] @ arguments["weight"].T, torch.tensor(5))
    torch.testing.assert_close(single.loss, expected)
    assert single.next_nll.shape == ()


def test_counting_targets_never_waits_for_the_device() -> None:
    for arguments in (batch(), batch(num_items=torch.tensor(24)), batch(num_items=24)):
        with HostTransfers() as transfers:
            derta_loss(**arguments).backward()
        assert transfers.count == 0  # the one of head_loss is hidden within its operator


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_loss_is_never_narrower_than_float32(dtype: torch.dtype) -> None:
    arguments = batch(hidden=batch()["hidden"].to(dtype), weight=batch()["weight"].to(dtype))
    rows = with_rows(**arguments)
    assert {value.dtype for value in rows} == {torch.promote_types(dtype, torch.float32)}


# Modules and torch's counterpart


def test_modules_are_the_functions_with_settings() -> None:
    settings: dict[str, Any] = dict(softcap=4.0, logit_scale=0.5, reduction="sum")
    tensors = batch(bias=torch.linspace(-1, 1, 11, dtype=torch.float64))
    del tensors["refusal_token_id"]
    module = DertaLoss(REFUSAL, rto_weight=0.5, ignore_index=4, impl="reference", **settings)
    tensors["target"] = tensors["target"].where(tensors["target"] != -100, 4)
    expected = derta_loss(
        **tensors, refusal_token_id=REFUSAL, rto_weight=0.5, ignore_index=4, **settings
    )
    torch.testing.assert_close(module(**tensors), expected)
    del tensors["target"]
    torch.testing.assert_close(
        RTOLoss(REFUSAL, **settings)(**tensors),
        rto_loss(**tensors, refusal_token_id=REFUSAL, **settings),
    )
    for setting in ("refusal_token_id=3", "rto_weight=0.5", "reduction='sum'", "impl='reference'"):
        assert setting in repr(module)
    assert "refusal_token_id=3" in repr(RTOLoss(REFUSAL))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [None, -100, 4])
def test_linear_cross_entropy_is_torchs(
    impl: str, reduction: str, ignore_index: int | None
) -> None:
    hidden, weight = batch()["hidden"], batch()["weight"]
    target = torch.randint(11, (3, 8))
    target[0] = -100 if ignore_index is None else ignore_index
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64, requires_grad=True)
    leaves = hidden, weight, bias
    names = dict(
        input=hidden.flatten(0, 1), linear_weight=weight, linear_bias=bias, target=target.flatten()
    )
    options = dict(reduction=reduction, ignore_index=ignore_index)
    actual = loss_and_gradients(
        linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options, impl=impl),
        *leaves,
    )
    documented = names | options | dict(F=F, ignore_index=ignore_index or -100)
    exec(equals_snippet(linear_cross_entropy).replace(".float()", ""), documented)
    assert_equal(actual, loss_and_gradients(documented["loss"], *leaves))
    if hasattr(F, "linear_cross_entropy"):
        torchs = F.linear_cross_entropy(**names, **options)
        assert_equal(actual, loss_and_gradients(torchs, *leaves))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="new in torch 2.13")
def test_linear_cross_entropy_takes_torchs_options_unless_they_ask_for_a_wider_dtype() -> None:
    hidden, weight = (batch()[name].detach().float() for name in ("hidden", "weight"))
    target = torch.arange(24).reshape(3, 8) % 11
    plain = linear_cross_entropy(hidden, weight, target)
    for chosen in (
        dict(batch_chunk_size=2),
        dict(chunking_method="aspect_ratio:4", allow_retain_graph=True),
        dict(acc_policy="compact", acc_dtype=torch.float32),
    ):
        options = nn.LinearCrossEntropyOptions(**chosen)
        assert torch.equal(linear_cross_entropy(hidden, weight, target, options=options), plain)
    wider = nn.LinearCrossEntropyOptions(acc_dtype=torch.float64)
    with pytest.raises(ValueError, match="acc_dtype must be at most torch.float32, got torch.floa"):
        linear_cross_entropy(hidden, weight, target, options=wider)
    doubles = hidden.double(), weight.double(), target
    linear_cross_entropy(*doubles, options=wider)
    with pytest.raises(TypeError, match="options must be None or torch.nn.LinearCross.*got dict"):
        linear_cross_entropy(*doubles, options=dict(batch_chunk_size=2))


def test_linear_cross_entropy_without_a_target_is_zero_and_not_nan() -> None:
    loss = linear_cross_entropy(batch()["hidden"], batch()["weight"], torch.full((3, 8), -100))
    assert loss == 0 and loss.requires_grad


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hidden=[0.0]), TypeError, "hidden must be a tensor, got list"),
        (
            dict(hidden=torch.tensor(0.0)),
            ValueError,
            r"hidden must have shape \(..., d\), got \(\)",
        ),
        (dict(target=7), TypeError, "target must be a tensor, got int"),
        (
            dict(target=torch.zeros(3, 7).long()),
            ValueError,
            r"target must have shape \(3, 8\), that of hidden without its last .* got \(3, 7\)",
        ),
        (dict(target=torch.full((3, 8), 11)), ValueError, r"target must lie in \[0, V\) = \[0, 11"),
        (dict(rto_mask=torch.ones(24).bool()), ValueError, r"rto_mask must have shape \(3, 8\)"),
        (
            dict(rto_mask=torch.ones(3, 8, dtype=torch.bool, device="meta")),
            ValueError,
            "rto_mask must be on cpu as hidden is, got meta",
        ),
        (dict(refusal_token_id=None), ValueError, "refusal_token_id is required with rto_mask"),
        (
            dict(rto_weight=torch.ones(8)),
            ValueError,
            r"rto_weight must be a number or a tensor of shape \(\) or target's \(3, 8\), got",
        ),
        (dict(rto_weight="1"), TypeError, "rto_weight must be a number or a tensor, got str"),
        (dict(rto_weight=torch.tensor(1)), ValueError, "rto_weight must be floating point"),
        (
            dict(rto_weight=torch.tensor(1.0, requires_grad=True)),
            ValueError,
            "rto_weight must not require a gradient",
        ),
        (dict(loss_weight=torch.ones(3)), ValueError, r"loss_weight must have shape \(3, 8\)"),
        (dict(loss_weight=torch.ones(3, 8).long()), ValueError, "loss_weight must be floating"),
        (
            dict(loss_weight=torch.ones(3, 8, requires_grad=True)),
            ValueError,
            "loss_weight must not require a gradient",
        ),
        (
            dict(reduction="none"),
            ValueError,
            'reduction must be "mean" or "sum", got .none.; derta',
        ),
        (dict(num_items=-1), ValueError, "num_items must be at least 0, got -1"),
        (dict(num_items=2.5), TypeError, "num_items must be an int or a tensor, got float"),
        (dict(num_items=torch.ones(2)), ValueError, r"num_items must be .* shape \(\), got \(2,\)"),
        (
            dict(num_items=3, reduction="sum"),
            ValueError,
            'num_items must be None with reduction "sum"',
        ),
        (dict(impl="fast"), ValueError, "impl must be one of"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        derta_loss(**batch(**change))


def test_rto_loss_names_its_mask_when_the_shape_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"rto_mask must have shape \(3, 8\)"):
        rto_loss(
            batch()["hidden"], batch()["weight"], torch.ones(3).bool(), refusal_token_id=REFUSAL
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.ones(11)), "weight must be None, got"),
        (dict(label_smoothing=0.1), "label_smoothing must be 0.0, got 0.1: use torch's own"),
        (dict(reduction="none"), 'reduction must be "mean" or "sum"'),
        (dict(target=torch.rand(3, 11)), r"target must have shape \(3,\), that of input"),
        (dict(target=torch.rand(3)), "target must be int64, got torch.float32"),
        (dict(linear_weight=torch.ones(11, 5)), r"linear_weight must have shape \(11, 6\) for 11"),
        (dict(linear_weight=torch.ones(11, 2, 6)), r"linear_weight must have shape \(11, 6\)"),
        (dict(linear_weight=torch.ones(11, 6).half()), "linear_weight must be torch.float32 on"),
        (dict(linear_bias=torch.ones(3)), r"linear_bias must have shape \(11,\) for 11 classes"),
        (dict(linear_bias=torch.ones(11, device="meta")), "linear_bias must be torch.float32 on"),
    ],
)
def test_linear_cross_entropy_refuses_what_it_does_not_support(
    change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = dict(
        input=torch.ones(3, 6), linear_weight=torch.ones(11, 6), target=torch.arange(3)
    )
    assert math.isclose(linear_cross_entropy(**arguments).item(), math.log(11), rel_tol=1e-6)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments | change)
