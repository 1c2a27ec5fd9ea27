"""The one place that chooses between implementations of the head loss."""

from __future__ import annotations

import torch

from derta_kernels import Choice
from derta_kernels.head_loss import row_pass_native
from derta_kernels.head_loss.row_pass import RowPass, then_blocks
from derta_kernels.head_loss.row_pass_torch import (
    first_walk_torch,
    row_pass_torch,
    second_walk_torch,
)
from derta_kernels.triton_support import no_triton

ROW_PASSES = ("torch", "native", "triton")
PREFERRED = {"cpu": ("native",), "cuda": ("triton", "native")}


def choose(impl: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Choice:
    """Choose the implementation that `head_loss` takes for hidden states of `dtype` on `device`.

    Raises:
        ValueError: there is no implementation of that name, or it cannot run there.
    """
    if impl == "reference":
        return Choice(impl, "asked for by name")
    if impl in ROW_PASSES:
        why_not = unavailable(impl, device, dtype)
        if why_not is not None:
            raise ValueError(f"impl {impl!r} cannot be used: {why_not}")
        return Choice(impl, "asked for by name")
    if impl != "auto":
        names = ", ".join(("auto", "reference", *ROW_PASSES))
        raise ValueError(f"impl must be one of {names}, got {impl!r}")

    passed_over: list[str] = []
    for name in PREFERRED.get(device.type, ()):
        why_not = unavailable(name, device, dtype)
        if why_not is None:
            return Choice(name, "; ".join(["the fastest here", *passed_over]))
        passed_over.append(f"not {name}, as {why_not}")
    return Choice("torch", "; ".join(["it runs everywhere", *passed_over]))


def unavailable(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a row pass cannot run there, in a clause; None: it can."""
    if impl == "native":
        return row_pass_native.unavailable(device, dtype)
    if impl == "triton":
        if dtype == torch.float64:
            return "its row pass computes in float32"
        return no_triton(device)
    return None


def row_pass(impl: str) -> RowPass:
    """Return the row pass of a name that `choose` has found to be available."""
    if impl == "native":
        return RowPass(
            row_pass_native.row_pass_native,
            row_pass_native.first_walk_native,
            row_pass_native.second_walk_native,
            then_blocks(row_pass_native.row_pass_native),
        )
    if impl == "triton":
        from derta_kernels.head_loss.row_pass_triton import (
            first_walk_triton,
            row_pass_triton,
            row_pass_with_blocks_triton,
            second_walk_triton,
        )

        return RowPass(
            row_pass_triton, first_walk_triton, second_walk_triton, row_pass_with_blocks_triton
        )
    return RowPass(row_pass_torch, first_walk_torch, second_walk_torch, then_blocks(row_pass_torch))
