"""The one place that chooses between implementations of interval attention."""

from __future__ import annotations

import warnings

import torch

from derta_kernels import Choice
from derta_kernels.attention import flash_attn
from derta_kernels.attention.launch_configs import MAX_HEAD_DIM
from derta_kernels.triton_support import no_triton, omits_fence

IMPLEMENTATIONS = ("reference", "sdpa", "triton", "flash_attn")


@torch.compiler.assume_constant_result
def choose(
    impl: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    value_dim: int | None = None,
) -> Choice:
    """Choose the implementation that `interval_attention` takes for `dtype` on `device`.

    Args:
        impl: "auto", or the name of an implementation, which is never replaced by another.
        head_dim: D.
        value_dim: Dv; None: D.

    Warns:
        UserWarning: Triton is asked for by name where "auto" does not trust its compiler.

    Raises:
        ValueError: there is no implementation of that name, or it cannot run there.
    """
    if impl == "auto":
        # flash-attn has not been measured to be faster anywhere.
        why_not = unavailable("triton", device, dtype, head_dim, value_dim)
        why_not = why_not or _unfenced(device, dtype)
        if device.type == "cuda" and why_not is None:
            return Choice("triton", "one launch for all packed examples")
        reason = "torch's kernels, one packed example at a time"
        return Choice("sdpa", reason + f"; not triton, as {why_not}" * (device.type == "cuda"))
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
