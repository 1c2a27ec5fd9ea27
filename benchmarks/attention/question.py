"""Attention over packs against its peers.

python -m benchmarks.attention.question --machine xeon-2-cores
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.attention.cases import (
    DIALOGUES,
    FOUR,
    LONG,
    ONE,
    PLAIN,
    Case,
    Inputs,
    errors,
    make_inputs,
    operations,
    right_answer,
)
from benchmarks.attention.peers import (
    CUDNN,
    DENSE,
    EAGER,
    FLASH,
    FLASH_ATTN,
    FLEX,
    FLEX_TUNED,
    IMPLEMENTATIONS,
    Attention,
)
from benchmarks.harness.measuring import MIB
from benchmarks.harness.question import (
    Column,
    Question,
    Values,
    error_of,
    number_of,
    ratio_to,
    within_budget,
)
from benchmarks.harness.requirements import Requirement

OURS = "derta auto"
BY_NAME = ("derta triton", "derta flash_attn", "derta sdpa")
MASKED = (OURS, *BY_NAME, FLEX, DENSE, EAGER)
CAUSAL = (*MASKED, FLASH, CUDNN, FLASH_ATTN)
LINEAR = (OURS, "derta triton", "derta flash_attn", FLEX, EAGER)
TFLOPS = {"forward": 400.0, "backward": 300.0}  # our required rates
# The host's head start over the GPU in a step: two milliseconds of an H200.
HEAD_START_CYCLES = 4_000_000

SMALL = Case(FOUR, 2048, "float32", heads=8, kv_heads=4, width=64)
# Longer than the examples that ours computes in one piece.
LONGER = Case(LONG, 18432, "float32", heads=2, kv_heads=1, width=64)
HALF_AS_LONG = replace(LONGER, tokens=9216)
GPU_PLAIN, GPU_LONG, GPU_ONE, GPU_FOUR = (Case(p, 8192) for p in (PLAIN, LONG, ONE, FOUR))
MEMORY = Case(FOUR, 65536)


def groups_for(device: str) -> dict[str, list[tuple[Case, str]]]:
    """Return the groups to run in turns, by name: cases and implementations."""
    if device == "cpu":
        plain, long = replace(SMALL, pattern=PLAIN), replace(SMALL, pattern=LONG)
        return {
            "short branches": _each(SMALL, (OURS, *BY_NAME, FLEX, DENSE, EAGER)),
            "long branches": _each(long, (OURS, DENSE, EAGER)),
            "one sequence": _each(plain, (OURS, FLASH, DENSE, EAGER)),
            "long examples": _each(HALF_AS_LONG, (OURS, EAGER)) + _each(LONGER, (OURS, EAGER)),
        }
    one, four = (replace(case, tokens=32768) for case in (GPU_ONE, GPU_FOUR))
    # Too few tiles of keys for the chip: the query heads of a tile are split among programs.
    few_keys = Case(LONG, 2048, heads=16, kv_heads=2)
    gemma = Case(LONG, 8192, heads=8, kv_heads=4, width=256, softcap=50.0)
    return {
        "one sequence": _each(GPU_PLAIN, CAUSAL),
        "long branches": _each(GPU_LONG, (*MASKED, FLEX_TUNED)),
        "short branches": _each(GPU_FOUR, (*MASKED, FLEX_TUNED)),
        "short branches, 1 each": _each(GPU_ONE, MASKED),
        "short branches, 32768 tokens": _each(one, LINEAR) + _each(four, LINEAR),
        "65536 tokens": _each(MEMORY, LINEAR),
        "dialogues": _each(Case(DIALOGUES, 8192), (*MASKED, FLASH_ATTN)),
        "long branches, 2048 tokens": _each(few_keys, MASKED),
        "a sliding window": _each(replace(GPU_LONG, window=1024), MASKED),
        "a soft-cap": _each(gemma, LINEAR),
    }


def _each(case: Case, names: tuple[str, ...]) -> list[tuple[Case, str]]:
    return [(case, name) for name in names]


class Setup:
    """Attention of one layer: its inputs, and the results of the phases."""

    def __init__(self, inputs: Inputs, attention: Attention) -> None:
        def laid_out(x: Tensor) -> Tensor:
            return x.transpose(1, 2).contiguous() if attention.heads_first else x

        self.attention = attention
        self.d_out = laid_out(inputs.d_out)
        self.leaves = [laid_out(x).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        self.out: Tensor | None = None
        self.gradients: tuple[Tensor, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.d_out.device

    def phases(self) -> list[tuple[str, Callable[[], None]]]:
        return [("forward", self.forward), ("backward", self.backward)]

    def forward(self) -> None:
        self.out = self.attention.attend(*self.leaves)

    def backward(self) -> None:
        assert self.out is not None
        self.gradients = torch.autograd.grad(self.out, self.leaves, self.d_out)

    def clear(self) -> None:
        """Free output and gradients.

        A GPU is kept busy for a while, so that it never waits for the step's launches, as within a
        model: launching a layer's kernels takes longer than running them.
        """
        self.out, self.gradients = None, ()
        if self.device.type == "cuda":
            torch.cuda._sleep(HEAD_START_CYCLES)

    def errors(self, answer: dict[str, Tensor]) -> Values:
        """Return the errors of one step."""
        self.forward()
        self.backward()
        assert self.out is not None
        results = [self.out.detach(), *self.gradients]
        if self.attention.heads_first:
            results = [x.transpose(1, 2) for x in results]
        return errors(results, answer)


class PackedAttention(Question):
    """Forward and backward of one layer's attention over one pack."""

    name = "attention"
    title = "Attention over packs"
    case_type = Case
    ours = OURS
    baseline = EAGER
    columns = (
        Column("forward TFLOP/s", lambda own, _: f"{own['forward_tflops']:.3g}", of_right=True),
        Column("backward TFLOP/s", lambda own, _: f"{own['backward_tflops']:.3g}", of_right=True),
        ratio_to(FLEX, "time / FlexAttention", "time_ms_p50"),
        ratio_to(DENSE, "time / dense mask", "time_ms_p50"),
        number_of("peak MiB", "peak_mib"),
        error_of("error of out", "out_error"),
        error_of("of d_q", "d_q_error"),
        error_of("of d_k", "d_k_error"),
        error_of("of d_v", "d_v_error"),
    )

    def groups(self, device: str) -> dict[str, list[tuple[Case, str]]]:
        return groups_for(device)

    def setup(self, case: Case, implementation: str, device: torch.device) -> Setup:
        inputs = make_inputs(case, device)
        return Setup(inputs, IMPLEMENTATIONS[implementation](case, inputs))

    def answer(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        return right_answer(case, make_inputs(case, device))

    def is_right(self, case: Case, errors: Values, baseline: Values) -> bool:
        """Return True within 2 x (eager's error in the same dtype + one rounding of that dtype)."""
        bands = dict.fromkeys(errors, torch.finfo(case.torch_dtype).eps)
        return within_budget(errors, baseline, bands)

    def derived(self, case: Case, implementation: str, values: Values) -> Values:
        """Return the operations over visible pairs per second."""
        return {
            f"{phase}_tflops": count / (1e9 * values[f"{phase}_ms_p50"])
            for phase, count in operations(case).items()
        }

    def requirements(self) -> list[Requirement]:
        return [*_on_a_cpu(), *_on_a_gpu()]


def _on_a_cpu() -> list[Requirement]:
    return [
        Requirement("time over the dense mask's", SMALL, "time_ms_p50", 1.0, None, DENSE),
        Requirement(
            "memory over that of half as many tokens", LONGER, "peak_mib", 2.2, HALF_AS_LONG, OURS
        ),
    ]


def _on_a_gpu() -> list[Requirement]:
    rates = [
        Requirement(
            f"ms, {phase}, as {tflops:g} TFLOP/s take",
            case,
            f"{phase}_ms_p50",
            operations(case)[phase] / (1e9 * tflops),
        )
        for case in (GPU_PLAIN, GPU_LONG, GPU_ONE, GPU_FOUR)
        for phase, tflops in TFLOPS.items()
    ]
    ratios = [
        Requirement(f"time over {against}'s", case, "time_ms_p50", 1 / speed, None, against)
        for case, against, speed in (
            (GPU_PLAIN, FLASH, 0.9),
            (GPU_LONG, FLEX, 0.9),
            (GPU_LONG, FLEX_TUNED, 0.9),
            (GPU_ONE, FLEX, 1.2),
            (GPU_FOUR, FLEX, 1.2),
            (GPU_FOUR, FLEX_TUNED, 1.2),
        )
    ]
    return [*rates, *ratios, Requirement("MiB", MEMORY, "peak_mib", 1.5e9 / MIB)]


QUESTION = PackedAttention()
