"""A check that Triton runs on a device; importing this module does not import Triton."""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch

MIN_CAPABILITY = (8, 0)


@cache
def no_triton(device: torch.device) -> str | None:
    """Say why Triton's kernels cannot run on tensors of a device, in a clause; None: they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
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
