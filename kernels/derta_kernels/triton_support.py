"""Checks of what Triton does on a device; importing this module does not import Triton."""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch
from torch.torch_version import TorchVersion

MIN_CAPABILITY = (8, 0)
FIRST_FENCED = TorchVersion("3.7.1")


@cache
def no_triton(device: torch.device) -> str | None:
    """Say why Triton's kernels cannot run on tensors of a device, in a clause; None: they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is not None:
            rocm = f"PyTorch is built for ROCm {torch.version.hip}"
            return f"its launches are chosen for NVIDIA's GPUs, and {rocm}"
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return "Triton needs compute capability 8.0, this is {}.{}".format(*capability)
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "Triton needs a C compiler to build its launchers, and found none"
        return None
    import triton

    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    return (
        f"Triton runs on {device.type} tensors only in its interpreter: set TRITON_INTERPRET=1 "
        "before Python starts"
    )


def omits_fence(capability: int) -> bool:
    """Tell if Triton's code for a compute capability (90 for 9.0) reads copies too early.

    Before 3.7.1 no fence orders the writes of cp.async before the reads of wgmma (9.0) and tcgen05
    (10.x, 11.x), which go through another proxy. mma.sync, on 8.x and 12.x, needs none.

    Source: https://github.com/triton-lang/triton/pull/10537.
    """
    import triton

    return 90 <= capability < 120 and _predates_fences(triton.__version__)


@cache
def _predates_fences(version: str) -> bool:
    return TorchVersion(version) < FIRST_FENCED
