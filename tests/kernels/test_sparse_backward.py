"""A sparse backward pass leaves out exactly the tiles under its tolerance, and says what they were.

Expected gradients are products of the definition's gradient of the logits, in float64, with the
dead tiles set to 0. That gradient is the reference's own: with an identity as the head, hidden
states are logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from derta_kernels.head_loss import chunked, custom_op, head_loss
from derta_kernels.head_loss.row_pass import TILE
from derta_kernels.head_loss.sparse import rectangles
from derta_kernels.testing import (
    HeadCase,
    error_budget,
    head_case,
    relative_error,
)
from heads import DEVICE, LOW_PRECISION, row_passes

# MiB of the scratch: all rows, and 128 rows.
ONE_CHUNK, TWO_CHUNKS = 1.0, 1e-3
ROWS = 190
HEADS: dict[str, tuple[float, dict[str, Any]]] = {
    "plain": (TWO_CHUNKS, dict()),
    "bias, softcap and scale": (ONE_CHUNK, dict(bias=True, softcap=60.0, logit_scale=2.0)),
    "unlikely": (TWO_CHUNKS, dict(unlikely=True)),
    "set": (TWO_CHUNKS, dict(refusals=5)),
}


@pytest.fixture(autouse=True)
def products_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "product_dtype", lambda dtype, _: dtype)


def sorted_case(**head: Any) -> HeadCase:
    """Make rows in the order of their tokens, so that a tile of rows knows few tiles of tokens.

    Two tiles of live rows by four of tokens; the last of both are ragged.
    """
    case = head_case(
        rows=ROWS, vocabulary=450, width=96, probabilities=(0.9, 0.99, 0.999), **head
    ).on(DEVICE)
    order = case.target.argsort()
    rows = {n: t[order] for n, t in vars(case).items() if isinstance(t, Tensor) and len(t) == ROWS}
    return replace(case, **rows)


def gradients(case: HeadCase, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return the op's result and its gradients."""
    case = case.requiring_gradients()
    out = head_loss(**case.arguments(), **options)
    leaves = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(out.loss, list(leaves.values()))
    return out, dict(zip(leaves, found, strict=True))


def logit_gradient(case: HeadCase) -> Tensor:
    """Return dloss / dlogit, (N, V), as the reference has it in the case's dtype."""
    logits = F.linear(case.hidden, case.weight, case.bias).requires_grad_()
    eye = torch.eye(len(case.weight), dtype=logits.dtype, device=logits.device)
    of_logits = replace(case, hidden=logits, weight=eye, bias=None)
    loss = head_loss(**of_logits.arguments(), impl="reference").loss
    return torch.autograd.grad(loss, logits)[0]


def by_tile(values: Tensor) -> Tensor:
    """Return (I, J, TILE, TILE) tiles of the live rows' values, filled up with 0."""
    rows, columns = values.shape
    filled = F.pad(values, (0, -columns % TILE, 0, -rows % TILE))
    return filled.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2)


class Expected(NamedTuple):
    """A tolerance half-way between two tiles, and what it leaves."""

    tolerance: float
    is_skipped: Tensor  # (N, V) bool
    gradient: Tensor  # (N, V) float64, of the logits


def expected(case: HeadCase) -> Expected:
    case = case.to(torch.float64)
    gradient = logit_gradient(case)
    has_next = case.target != -100
    weight = case.next_weight.where(has_next, 0) + case.rto_weight.where(case.rto_mask, 0)
    live = has_next | case.rto_mask
    if case.unlikely_target is not None:
        assert case.unlikelihood_weight is not None
        is_unlikely = case.unlikely_target != -100
        weight = weight + case.unlikelihood_weight.where(is_unlikely, 0)
        live = live | is_unlikely
    share = gradient.abs() / (weight * abs(case.logit_scale))[:, None]
    peaks = by_tile(share[live]).amax((2, 3))
    ordered = peaks.flatten().sort().values
    middle = ordered[1:-1]
    gap = int((middle[1:] / middle[:-1]).argmax())
    tolerance = (middle[gap] * middle[gap + 1]).sqrt().item()
    assert middle[gap + 1] / middle[gap] > 1.1  # no rounding moves a tile to the other side
    dead = (peaks <= tolerance).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    is_skipped = torch.zeros_like(gradient, dtype=torch.bool)
    is_skipped[live] = dead[: int(live.sum()), : gradient.shape[1]]
    return Expected(tolerance, is_skipped, gradient)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("impl", "dtype"), row_passes(*LOW_PRECISION))
def test_it_leaves_out_the_tiles_under_the_tolerance_and_no_other(
    impl: str, dtype: torch.dtype, head: str
) -> None:
    scratch_mb, options = HEADS[head]
    case = sorted_case(**options).to(dtype)
    wide = case.to(torch.float64)
    tolerance, is_skipped, gradient = expected(case)
    eager = logit_gradient(case).masked_fill(is_skipped, 0)
    exact = gradient.masked_fill(is_skipped, 0)
    out, found = gradients(case, impl=impl, scratch_mb=scratch_mb, sparse_backward=tolerance)
    dense, whole = gradients(case, impl=impl, scratch_mb=scratch_mb)
    assert torch.equal(out.loss, dense.loss)
    if case.bias is not None:
        assert torch.equal(found["bias"], whole["bias"])
    for name, actual, in_dtype, oracle in (
        ("hidden", found["hidden"], eager @ case.weight, exact @ wide.weight),
        ("weight", found["weight"], eager.T @ case.hidden, exact.T @ wide.hidden),
        ("gradient", out.gradient_mass, logit_gradient(case).abs().sum(1), gradient.abs().sum(1)),
        (
            "skipped",
            out.skipped_mass,
            logit_gradient(case).abs().where(is_skipped, 0).sum(1),
            gradient.abs().where(is_skipped, 0).sum(1),
        ),
    ):
        budget = error_budget(in_dtype, oracle, dtype)
        assert budget < 0.5, name
        assert relative_error(actual, oracle) <= budget, name


def test_zero_is_the_dense_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    case = sorted_case().to(torch.float32)
    dense, whole = gradients(case, impl="torch")
    monkeypatch.delattr(custom_op, "SparseBackward")
    zero, found = gradients(case, impl="torch", sparse_backward=0)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert not zero.gradient_mass.any() and not zero.skipped_mass.any()


@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32))
def test_a_tolerance_below_and_one_above_everything(impl: str, dtype: torch.dtype) -> None:
    case = sorted_case().to(dtype)
    _, whole = gradients(case, impl=impl)
    all_live, found = gradients(case, impl=impl, sparse_backward=1e-30)
    assert not all_live.skipped_mass.any() and all_live.gradient_mass.any()
    for name in whole:
        assert relative_error(found[name], whole[name]) <= 8 * torch.finfo(dtype).eps
    all_dead, found = gradients(case, impl=impl, sparse_backward=1 - 1e-6)
    assert torch.equal(all_dead.skipped_mass, all_dead.gradient_mass)
    assert not found["hidden"].any() and not found["weight"].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32))
def test_a_gradient_that_is_not_finite_is_not_left_out(
    impl: str, dtype: torch.dtype, value: float
) -> None:
    case = sorted_case().to(dtype)
    case.hidden[7, 0] = value
    out, found = gradients(case, impl=impl, sparse_backward=0.5)
    assert not found["hidden"][7].isfinite().any()
    assert not found["weight"].isfinite().any()
    assert found["hidden"][150:].isfinite().all()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float16))
def test_odd_sizes_strides_and_no_dead_row(impl: str, dtype: torch.dtype, strided: bool) -> None:
    case = head_case(rows=130, vocabulary=257, width=37, probabilities=(0.9,)).on(DEVICE).to(dtype)
    case = replace(case, target=case.target.clamp(min=0))
    if strided:
        case = replace(case, weight=case.weight.T.contiguous().T)
    _, whole = gradients(case, impl=impl)
    _, found = gradients(case, impl=impl, sparse_backward=1e-30)
    for name in whole:
        assert relative_error(found[name], whole[name]) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("required", ["hidden", "weight"])
@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32))
def test_a_gradient_alone_is_the_same(impl: str, dtype: torch.dtype, required: str) -> None:
    case = sorted_case().to(dtype)
    tolerance = expected(case).tolerance
    _, both = gradients(case, impl=impl, sparse_backward=tolerance)
    leaf = getattr(case, required).detach().requires_grad_()
    alone = replace(case, **{required: leaf})
    loss = head_loss(**alone.arguments(), impl=impl, sparse_backward=tolerance).loss
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], both[required])


@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32))
def test_without_gradients_nothing_is_skipped(impl: str, dtype: torch.dtype) -> None:
    case = sorted_case().to(dtype)
    with torch.no_grad():
        out = head_loss(**case.arguments(), impl=impl, sparse_backward=0.5)
    assert not out.gradient_mass.any() and not out.skipped_mass.any()


def test_rectangles_cover_every_live_tile_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, most in ((1, 1, 1), (128, 300, 128), (515, 1400, 256), (300, 1280, 10**6)):
        shape = (-(-rows // TILE), -(-columns // TILE))
        for share in (0.0, 0.3, 0.9, 1.0):
            live = torch.rand(shape, generator=generator) < share
            times = torch.zeros(rows, columns, dtype=torch.int64)
            for across, down in rectangles(live, rows, columns, most):
                assert 0 < down.stop - down.start <= max(most, TILE)
                times[across, down] += 1
            whole = live.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
            assert torch.equal(times, whole[:rows, :columns].long())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(sparse_backward=1.0), ValueError, r"sparse_backward must lie in \[0, 1\), got 1.0"),
        (dict(sparse_backward=-0.1), ValueError, r"sparse_backward must lie in \[0, 1\), got -0.1"),
        (dict(sparse_backward=torch.nan), ValueError, "sparse_backward must lie in"),
        (dict(sparse_backward=True), TypeError, "sparse_backward must be int or float, got bool"),
        (
            dict(sparse_backward=0.1, impl="reference"),
            ValueError,
            'sparse_backward must be 0 with impl "reference", got 0.1',
        ),
    ],
)
def test_wrong_tolerances_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        head_loss(**head_case().arguments(), **options)


def test_a_vocabulary_over_several_ranks_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="sparse_backward must be 0 with a group or a DTensor"):
            head_loss(**head_case().arguments(), group=dist.group.WORLD, sparse_backward=0.1)
    finally:
        dist.destroy_process_group()


def test_the_tolerance_knows_no_scale_of_logits() -> None:
    case = sorted_case().to(torch.float32)
    tolerance = expected(case).tolerance
    scaled = replace(case, weight=1024 * case.weight, logit_scale=1 / 1024)
    one, other = (gradients(c, impl="torch", sparse_backward=tolerance)[0] for c in (case, scaled))
    assert one.skipped_mass.any()
    assert torch.equal(one.skipped_mass, 1024 * other.skipped_mass)
