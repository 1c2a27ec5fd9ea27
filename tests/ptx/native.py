"""The CUDA row pass on CPU tensors: nvcc's PTX of kernels/csrc/row_pass_cuda.cu, interpreted."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from derta_kernels.head_loss import row_pass_native
from derta_kernels.head_loss.row_pass_native import FIRST_WALK
from ptx import launches
from ptx.launches import Run
from ptx.processor import Options

SOURCE = Path(__file__).parents[2] / "kernels" / "csrc" / "row_pass_cuda.cu"
# Of the template's argument, as the compiler mangles it.
LOGITS = {torch.float32: "f", torch.bfloat16: r"\w*BFloat16E", torch.float16: r"\w*[^B]Float16E"}


def missing() -> str | None:
    """Say why there is no PTX, in a clause; None: there is."""
    return None if shutil.which("nvcc") else "nvcc was not found"


@cache
def module(capability: int) -> str:
    """Return nvcc's PTX, compiled as CMakeLists.txt compiles."""
    command = ["nvcc", "-ptx", f"-arch=sm_{capability}", "--fmad=false", "-std=c++17", "-O3"]
    return subprocess.run(
        [*command, "-o", "-", str(SOURCE)], capture_output=True, text=True, check=True
    ).stdout


@cache
def kernel(capability: int, stage: int, softcap: bool, dtype: torch.dtype) -> str:
    """Return PTX with the one entry, and the shared memory that it uses."""
    whole = module(capability)
    name = rf"\w*row_passILi{stage}ELb{int(softcap)}E{LOGITS[dtype]}EE?v\w*"
    (entry,) = re.findall(rf"^(?:\.visible )?(\.entry {name}\(.*?^\}})", whole, re.M | re.S)
    entry = re.sub(r"\{\s*([a-z][^{}]*;)\s*\}", r"\1", entry)  # scopes of inline assembly
    declared = re.findall(r"^\.shared [^;]*?(\w+)\[\d+\];", whole, re.M)
    lines = [one for one in whole.splitlines() if one.startswith(".shared ")]
    used = [line for line, one in zip(lines, declared, strict=True) if one in entry]
    return "\n".join([*used, entry, ""])


@contextmanager
def row_pass(capability: int, **options: Any) -> Iterator[list[Run]]:
    """Run `row_pass_native` and its two walks as compiled for a compute capability (90 for 9.0).

    The yielded list grows by a `Run` a launch; `options` are those of `processor.Options`.
    """
    runs: list[Run] = []

    def walk(
        stage: int,
        logits: Tensor,
        tokens: Tensor,
        softcap: float | None,
        logit_scale: float,
        numbers: dict[str, Tensor],
        form_gradient: bool = False,
    ) -> None:
        if len(logits) == 0:
            return

        head = (softcap, logit_scale, form_gradient)

        def structure(addresses: dict[str, int]) -> bytes:
            return bytes(row_pass_native._rows(stage, logits, tokens, *head, addresses))

        threads = 32 * min(logits.shape[1] // 256 + 1, 16)  # as row_pass_cuda.cu has it
        ptx = kernel(capability, stage, bool(softcap), logits.dtype)
        runs.append(
            launches.execute(
                ptx,
                capability,
                len(logits),
                0,
                dict(logits=logits, tokens=tokens, **numbers),
                ("summary",) if stage == FIRST_WALK else ("logsumexp", "nll"),
                Options(**options),
                threads=threads,
                structure=structure,
            )
        )

    with mock.patch.object(row_pass_native, "_walk", walk):
        yield runs
