"""The row pass of the head loss in C++ and CUDA: one source for both, behind a plain C interface.

setup.py builds the libraries from kernels/csrc into `_native`, next to this file. It also leaves a
report there of the libraries that it could not build, with the reasons. This module only fills in
the C structure and calls the library; csrc/one_row.h has the row pass itself.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "_native"
# row_pass.h has the same
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
WHOLE, FIRST_WALK, SECOND_WALK = range(3)


class _Rows(ctypes.Structure):
    """`DertaRows` of kernels/csrc/row_pass.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("token_weight", ctypes.c_void_p),
        ("logsumexp", ctypes.c_void_p),
        ("nll", ctypes.c_void_p),
        ("summary", ctypes.c_void_p),
        ("softcap", ctypes.c_float),
        ("logit_scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("form_gradient", ctypes.c_int32),
        ("stage", ctypes.c_int32),
    ]


def row_pass_native(
    logits: Tensor,
    tokens: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    form_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `row_pass_torch` does for float16, bfloat16 and float32 logits, in float32.

    Without `form_gradient`, logits are left as they are. On a CPU the row pass takes
    `torch.get_num_threads()` threads and the best instruction set that the machine runs. The
    environment variable DERTA_INSTRUCTION_SET selects another of `instruction_sets`.

    Memory: only the results. Deterministic: one thread, or one thread block, computes a row.

    Raises:
        ValueError: DERTA_INSTRUCTION_SET names no instruction set that the machine runs.
        RuntimeError: CUDA refused the launch.
    """
    logsumexp = token_weight.new_empty(len(logits))
    nll = torch.empty_like(token_weight)
    _walk(
        WHOLE,
        logits,
        tokens,
        softcap,
        logit_scale,
        dict(token_weight=token_weight, logsumexp=logsumexp, nll=nll),
        form_gradient,
    )
    return logsumexp, nll


def first_walk_native(
    logits: Tensor, tokens: Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """Do what `first_walk_torch` does, for the dtypes of `row_pass_native`, in float32.

    Memory: only the results. Raises what `row_pass_native` raises.
    """
    summary = logits.new_empty(len(tokens), 3 + tokens.shape[1], dtype=torch.float32)
    _walk(FIRST_WALK, logits, tokens, softcap, logit_scale, dict(summary=summary))
    return summary


def second_walk_native(
    logits: Tensor,
    tokens: Tensor,
    token_weight: Tensor,
    summary: Tensor,
    softcap: float | None,
    logit_scale: float,
    form_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `second_walk_torch` does, for the dtypes of `row_pass_native`, in float32.

    Memory: only the results. Raises what `row_pass_native` raises.
    """
    logsumexp = token_weight.new_empty(len(logits))
    nll = torch.empty_like(token_weight)
    _walk(
        SECOND_WALK,
        logits,
        tokens,
        softcap,
        logit_scale,
        dict(token_weight=token_weight, summary=summary, logsumexp=logsumexp, nll=nll),
        form_gradient,
    )
    return logsumexp, nll


def _walk(
    stage: int,
    logits: Tensor,
    tokens: Tensor,
    softcap: float | None,
    logit_scale: float,
    numbers: dict[str, Tensor],
    form_gradient: bool = False,
) -> None:
    """Call the library of logits' device, with the float32 tensors that the stage needs."""
    assert logits.stride(1) == 1 and tokens.is_contiguous()
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in numbers.values())
    tensors = dict(logits=logits, tokens=tokens, **numbers)
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    rows = _rows(stage, logits, tokens, softcap, logit_scale, form_gradient, addresses)
    if logits.is_cuda:
        with torch.cuda.device_of(logits):
            stream = torch.cuda.current_stream().cuda_stream
            error = _library("cuda").derta_row_pass_cuda(
                ctypes.byref(rows), logits.device.index, ctypes.c_void_p(stream)
            )
    else:
        error = _library("cpu").derta_row_pass(
            ctypes.byref(rows), _forced_instruction_set(), torch.get_num_threads()
        )
    if error is not None:
        raise RuntimeError(f"the native row pass failed: {error.decode()}")


def _rows(
    stage: int,
    logits: Tensor,
    tokens: Tensor,
    softcap: float | None,
    logit_scale: float,
    form_gradient: bool,
    addresses: Mapping[str, int],
) -> _Rows:
    """Return the library's argument; `addresses` are those of its tensors, by name."""
    return _Rows(
        count=logits.shape[0],
        vocabulary=logits.shape[1],
        columns=tokens.shape[1],
        row_stride=logits.stride(0),
        softcap=softcap or 0.0,
        logit_scale=logit_scale,
        dtype=DTYPES[logits.dtype],
        form_gradient=form_gradient,
        stage=stage,
        **addresses,
    )


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the row pass cannot run there, in a clause; None: it can."""
    if dtype not in DTYPES:
        return f"it takes bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if device.type not in ("cpu", "cuda"):
        return f"it runs on CPUs and CUDA devices, not on {device.type}"
    why_not = _not_built(device.type)
    if why_not is not None:
        return why_not
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if _is_of_other_sources(device.type):
        return "the native library is older than its sources: run `pip install -e .` there"
    if device.type == "cpu":
        return None
    with torch.cuda.device(device):  # the library sets the device, this restores it
        error = _library("cuda").derta_row_pass_cuda_unavailable(torch.cuda.current_device())
    return None if error is None else error.decode()


def instruction_sets() -> list[str]:
    """Return the instruction sets that both this CPU and the library have, the best one last."""
    return _library("cpu").derta_row_pass_instruction_sets().decode().split()


def _forced_instruction_set() -> bytes | None:
    """Return the instruction set that DERTA_INSTRUCTION_SET names; None: the best one.

    Raises:
        ValueError: this machine does not run that instruction set.
    """
    name = os.environ.get("DERTA_INSTRUCTION_SET")
    if name is None:
        return None
    if name not in instruction_sets():
        raise ValueError(
            f"DERTA_INSTRUCTION_SET must be one of {', '.join(instruction_sets())} on this "
            f"machine, got {name!r}"
        )
    return name.encode()


def _not_built(kind: str) -> str | None:
    """Say why there is no library for "cpu" or "cuda", in a clause; None: there is one."""
    if _path(kind).exists():
        return None
    report = FOLDER / "report.json"
    if not report.exists():
        return "the native library was not built: run `pip install -e .` in the sources"
    reasons = json.loads(report.read_text(encoding="utf-8"))
    if reasons["cpu"] is not None:
        return f"the native library was not built: {reasons['cpu']}"
    return f"the native library was built without CUDA: {reasons['cuda']}"


def _is_of_other_sources(kind: str) -> bool:
    """Return whether the library has another `DertaRows`, as one from before a pull may have."""
    size = getattr(_library(kind), "derta_row_pass_rows_bytes", None)
    return size is None or size() != ctypes.sizeof(_Rows)


def _path(kind: str) -> Path:
    return FOLDER / {"cpu": "libderta_row_pass.so", "cuda": "libderta_row_pass_cuda.so"}[kind]


@cache
def _library(kind: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(_path(kind)))
    if kind == "cpu":
        library.derta_row_pass.argtypes = (ctypes.POINTER(_Rows), ctypes.c_char_p, ctypes.c_int)
        library.derta_row_pass.restype = ctypes.c_char_p
        library.derta_row_pass_instruction_sets.restype = ctypes.c_char_p
    else:
        library.derta_row_pass_cuda.argtypes = (
            ctypes.POINTER(_Rows),
            ctypes.c_int,
            ctypes.c_void_p,
        )
        library.derta_row_pass_cuda.restype = ctypes.c_char_p
        library.derta_row_pass_cuda_unavailable.argtypes = (ctypes.c_int,)
        library.derta_row_pass_cuda_unavailable.restype = ctypes.c_char_p
    return library
