"""What tests of the head loss share: its row passes, its results, and comparisons of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from derta_kernels.head_loss import head_loss
from derta_kernels.head_loss.choice import ROW_PASSES, unavailable
from derta_kernels.testing import HeadCase, error_budget, relative_error
from interpreted import INTERPRETED, TRUNCATES

LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [torch.float64, *LOW_PRECISION]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def row_passes(*dtypes: torch.dtype) -> list[Any]:
    """Return every row pass in every dtype as parameters; skip those that cannot run here."""

    def why_not(impl: str, dtype: torch.dtype) -> str | None:
        if impl == "triton" and dtype == torch.bfloat16 and INTERPRETED:
            return TRUNCATES
        return unavailable(impl, DEVICE, dtype)

    return [
        pytest.param(
            impl,
            dtype,
            marks=pytest.mark.skipif(
                why_not(impl, dtype) is not None, reason=f"{impl}: {why_not(impl, dtype)}"
            ),
        )
        for impl in ROW_PASSES
        for dtype in dtypes
    ]


def results(case: HeadCase, impl: str, upstream: float = 1.0) -> dict[str, Tensor]:
    """Return every result of the op: the rows' numbers, the loss and all gradients."""
    case = case.on(DEVICE).requiring_gradients()
    out = head_loss(**case.arguments(), impl=impl)
    leaves = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(upstream * out.loss, list(leaves.values()))
    named = {f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {**out._asdict(), "loss": out.loss.detach(), **named}


def assert_within_budget(
    case: HeadCase, impl: str, dtype: torch.dtype, upstream: float = 1.0
) -> None:
    rounded = case.to(dtype)
    oracle = results(rounded.to(torch.float64), "reference", upstream)
    eager = results(rounded, "reference", upstream)
    actual = results(rounded, impl, upstream)
    for name in oracle:
        budget = error_budget(eager[name], oracle[name], dtype)
        assert budget < 0.5, (
            f"{name}: eager itself is off by {budget / 2:.2g}, too much for a budget"
        )
        assert relative_error(actual[name], oracle[name]) <= budget, name


def assert_close_as_a_whole(case: HeadCase, impl: str) -> None:
    """Compare in the norm of each result, as random weights may cancel in a single row."""
    expected, actual = results(case.to(torch.float64), "reference"), results(case, impl)
    eager = results(case, "reference")
    for name in expected:
        size, band = expected[name].norm(), torch.finfo(case.hidden.dtype).eps
        error, eager_error = (
            (other[name].double() - expected[name]).norm() for other in (actual, eager)
        )
        assert error <= 2 * eager_error + 8 * band * (size + 1), name
