"""The one place that chooses between implementations of interval attention."""

from __future__ import annotations

import warnings

import torch

from derta_kernels import Choice
from derta_kernels.attention import flash_attn, measured
from derta_kernels.attention.launch_configs import MAX_HEAD_DIM
from derta_kernels.attention.measured import Measured
from derta_kernels.triton_support import no_triton, omits_fence

IMPLEMENTATIONS = ("reference", "sdpa", "triton", "flash_attn")


@torch.compiler.assume_constant_result
def choose(
    impl: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    value_dim: int | None = None,
    has_softcap: bool = False,
    has_window: bool = False,
) -> Choice:
    """Choose the implementation that `interval_attention` takes for `dtype` on `device`.

    It depends on nothing within a batch, so that a run and its resumption take the same kernels.

    Args:
        impl: "auto", or the name of an implementation, which is never replaced by another.
        head_dim: D.
        value_dim: Dv; None: D.
        has_softcap, has_window: if True, the call has that option.

    Warns:
        UserWarning: Triton is asked for by name where "auto" does not trust its compiler.

    Raises:
        ValueError: there is no implementation of that name, or it cannot run there.
    """
    if impl == "auto":
        faster, why_not = _faster(device, dtype, head_dim, value_dim, has_softcap, has_window)
        if faster is not None and why_not is None:
            return Choice(faster.implementation, _said(faster))
        name, reason = _unmeasured(device, dtype, head_dim, value_dim)
        if faster is not None:
            reason += f"; not {faster.implementation}, {_said(faster)}, as {why_not}"
        return Choice(name, reason)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    why_not = unavailable(impl, device, dtype, head_dim, value_dim)
    if why_not is not None:
        raise ValueError(f"impl {impl!r} cannot be used: {why_not}")
    flaw = _unfenced(device, dtype) if impl == "triton" else None
    if flaw is not None:
        warnings.warn(
            f"impl 'triton' runs without asynchronous copies, slower: {flaw}", stacklevel=2
        )
    return Choice(impl, "asked for by name")


def unavailable(
    impl: str, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int | None
) -> str | None:
    """Say why an implementation cannot run there, in a clause; None: it can."""
    if impl in ("reference", "sdpa"):
        return None
    if value_dim not in (None, head_dim):
        return f"v must have q's head dimension {head_dim} for it, not {value_dim}"
    if impl == "flash_attn":
        return flash_attn.unavailable(device, dtype, head_dim)
    name = str(dtype).removeprefix("torch.")
    if dtype not in MAX_HEAD_DIM:
        return f"its kernels compute in float32, not {name}"
    if head_dim > MAX_HEAD_DIM[dtype]:
        return (
            f"its kernels take {name} head dimensions up to {MAX_HEAD_DIM[dtype]}, not {head_dim}"
        )
    return no_triton(device)


def _unmeasured(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int | None
) -> Choice:
    """Choose where nothing was measured to be faster than Triton."""
    why_not = unavailable("triton", device, dtype, head_dim, value_dim) or _unfenced(device, dtype)
    if device.type == "cuda" and why_not is None:
        return Choice("triton", "one launch for all packed examples")
    reason = "torch's kernels, one packed example at a time"
    return Choice("sdpa", reason + f"; not triton, as {why_not}" * (device.type == "cuda"))


def _faster(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None,
    has_softcap: bool,
    has_window: bool,
) -> tuple[Measured | None, str | None]:
    """Return the implementation that was measured to be the fastest there, and why it is not taken.

    Windows are left out, as flash-attn refuses some, and so are deterministic algorithms, for which
    it has slower kernels. float16 takes the time of bfloat16, which was measured.
    """
    if device.type != "cuda" or dtype.itemsize != 2 or has_window:
        return None, None
    if torch.are_deterministic_algorithms_enabled():
        return None, None
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    for row in measured.table(measured.TABLE):
        if (row.capability, row.head_dim, row.softcap) == (capability, head_dim, has_softcap):
            why_not = unavailable(row.implementation, device, dtype, head_dim, value_dim)
            if why_not is None and row.implementation == "flash_attn":
                version = flash_attn.version(device, dtype, head_dim)
                if version != row.version:
                    why_not = f"flash-attn {version} is installed, not {row.version}"
            return row, why_not
    return None, None


def _said(row: Measured) -> str:
    """Say what was measured, in a clause."""
    return f"measured at {row.time:.2f} x triton's time on {row.gpu}"


def _unfenced(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why Triton's compiler is not trusted with products there, in a clause; None: it is."""
    if device.type != "cuda" or dtype == torch.float32:  # no tensor cores, no copies
        return None
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    if not omits_fence(10 * major + minor):
        return None
    return (
        f"Triton {triton.__version__} omits fences between copies and products on compute "
        f"capability {major}.{minor}: 3.7.1 has them"
    )
