"""The head loss against its peers.

python -m benchmarks.head_loss.question --machine xeon-2-cores
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.measuring import MIB
from benchmarks.harness.question import (
    Column,
    Question,
    Values,
    error_of,
    number,
    number_of,
    ratio_to,
    within_budget,
)
from benchmarks.harness.requirements import Requirement
from benchmarks.head_loss.cases import Answer, Case, Inputs, errors, make_inputs, right_answer
from benchmarks.head_loss.peers import EAGER, IMPLEMENTATIONS, PRODUCTS, SKIPPING, LossFunction

OURS = "derta auto"
TORCH_CHUNKED = "torch chunked, auto"
LOSS_BAND = 1e-4
ALL_AND_SKIPPING = tuple(IMPLEMENTATIONS)
ALL = tuple(name for name in ALL_AND_SKIPPING if name != SKIPPING)
MOST = (OURS, "derta torch", EAGER, "full compiled", "torch chunked, 2048 rows", "trl", PRODUCTS)
FEW = (OURS, EAGER, TORCH_CHUNKED, PRODUCTS)
SHORT = (OURS, "derta torch", EAGER, TORCH_CHUNKED, "trl", PRODUCTS)
SPARSE = (OURS, "derta torch", EAGER, TORCH_CHUNKED, "liger", "cce default", "quack", "trl")


def groups_for(device: str) -> dict[str, list[tuple[Case, str]]]:
    """Return the groups to run in turns, by name: cases and implementations."""
    if device == "cpu":
        case = Case("1024x64000", 2048)
        frozen, random = replace(case, trainable=False), replace(case, inputs="random")
        return {
            "trainable head": _each(case, ALL),
            "frozen head": _each(frozen, MOST),
            "float32": _each(replace(case, dtype="float32"), MOST),
            "5% live": _sparse(case),
            "trainable head, random rows": _each(random, FEW),
            "in short": _each(Case("512x32000", 1024, dtype="float32"), SHORT),
        }
    case = Case("llama-3-8b", 8192)
    frozen = replace(case, trainable=False)
    odd = "llama-3-8b + 1 token"
    return {
        "frozen head": _each(frozen, ALL_AND_SKIPPING),
        "trainable head": _each(case, ALL_AND_SKIPPING),
        "frozen head, 128257": _each(replace(frozen, head=odd), ALL) + _each(frozen, FEW),
        "trainable head, 128257": _each(replace(case, head=odd), ALL) + _each(case, FEW),
        "5% live": _sparse(case),
        "trainable head, random rows": _each(replace(case, inputs="random"), ALL),
        "soft-capped head": _each(Case("gemma-2-2b", 8192), ALL),
        "soft-capped frozen head": _each(Case("gemma-2-2b", 8192, trainable=False), ALL),
        "frozen head, 32768 rows": _each(replace(frozen, rows=32768), ALL),
        "trainable head, 32768 rows": _each(replace(case, rows=32768), ALL),
        **{
            f"the {kind} head of {head}": _each(Case(head, 8192, trainable=trainable), ALL)
            for head in ("llama-3.2-1b", "qwen2.5-0.5b", "qwen2.5-7b", "mistral-7b")
            for kind, trainable in (("frozen", False), ("trainable", True))
        },
    }


def _each(case: Case, names: tuple[str, ...]) -> list[tuple[Case, str]]:
    return [(case, name) for name in names]


def _sparse(case: Case) -> list[tuple[Case, str]]:
    sparse = replace(case, live=0.05)
    return _each(sparse, SPARSE) + _each(replace(sparse, live_alone=True), (OURS, EAGER))


@dataclass(frozen=True)
class Setup:
    """One implementation of one case, ready to run: inputs, and a loss as a function of them."""

    inputs: Inputs
    loss_function: LossFunction

    @property
    def device(self) -> torch.device:
        return self.inputs.hidden.device

    def phases(self) -> list[tuple[str, Callable[[], Tensor]]]:
        return [("step", self.step)]

    def step(self) -> Tensor:
        """Run forward and backward; the gradients stay on the inputs until the next step."""
        self.clear()
        loss = self.loss_function(*self.inputs)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def clear(self) -> None:
        """Free the gradients."""
        self.inputs.hidden.grad = self.inputs.weight.grad = None

    def errors(self, answer: tuple[Any, ...]) -> Values:
        """Return the errors of one step; empty for products, which give no loss."""
        loss = self.step()
        if self.inputs.hidden.grad is None:
            return {}
        return errors(loss, self.inputs, Answer(*answer))


class HeadLossQuestion(Question):
    """Forward and backward of the vocabulary projection and its loss."""

    name = "head_loss"
    title = "The head loss"
    case_type = Case
    ours = OURS
    baseline = EAGER
    own_op = TORCH_CHUNKED
    columns = (
        ratio_to(EAGER, "time / full", "time_ms_p50"),
        Column("TFLOP/s", lambda own, _: number(own["tflops"]), of_right=True),
        Column("rate", lambda own, by_name: _rate(own, by_name.get(PRODUCTS, {})), of_right=True),
        number_of("peak MiB", "peak_mib"),
        Column("memory / full", lambda own, by_name: _memory(own, by_name), of_right=True),
        error_of("error of loss", "loss_error"),
        error_of("of d_hidden", "d_hidden_error"),
        error_of("of d_weight", "d_weight_error"),
    )

    def groups(self, device: str) -> dict[str, list[tuple[Case, str]]]:
        return groups_for(device)

    def setup(self, case: Case, implementation: str, device: torch.device) -> Setup:
        loss_function = IMPLEMENTATIONS[implementation](case, device)
        return Setup(make_inputs(case, device), loss_function)

    def answer_case(self, case: Case) -> Case:
        """Return the case of the trainable head, which shares the frozen head's answer."""
        return replace(case, trainable=True)

    def answer(self, case: Case, device: torch.device) -> tuple[Any, ...]:
        return tuple(right_answer(make_inputs(case, device), case.shape.softcap))

    def is_right(self, case: Case, errors: Values, baseline: Values) -> bool:
        """Return True within 2 x (full logits' error in the same dtype + one band).

        For gradients, the band is one rounding of that dtype, the tests' budget, see
        `derta_kernels.testing.error_budget`. A loss is a sum over thousands of rows and must be
        closer: its band is our requirement.
        """
        band = torch.finfo(case.torch_dtype).eps
        bands = {"loss_error": LOSS_BAND, "d_hidden_error": band, "d_weight_error": band}
        return within_budget(errors, baseline, bands)

    def derived(self, case: Case, implementation: str, values: Values) -> Values:
        """Return the operations of the products over live rows per second."""
        rows, shape = case.rows * case.live, case.shape
        count = (6 if case.trainable else 4) * rows * shape.vocabulary * shape.width
        return {"tflops": count / (1e9 * values["time_ms_p50"])}

    def requirements(self) -> list[Requirement]:
        return [*_on_a_cpu(), *_on_a_gpu()]


def _rate(own: Values, products: Values) -> str:
    if not products:
        return "-"
    return f"{products['time_ms_p50'] / own['time_ms_p50']:.0%}"


def _memory(own: Values, by_name: dict[str, Values]) -> str:
    """Format the memory ratio; empty for products, which keep no result."""
    if own is by_name.get(PRODUCTS):
        return ""
    return ratio_to(EAGER, "", "peak_mib").show(own, by_name)


def _on_a_cpu() -> list[Requirement]:
    found = []
    for inputs in ("peaked", "random"):
        case = Case("1024x64000", 2048, inputs=inputs)
        found += [
            Requirement("time over full logits'", case, "time_ms_p50", 0.65, None, EAGER),
            Requirement("memory over full logits'", case, "peak_mib", 0.45, None, EAGER),
            Requirement(
                "time over torch's chunked op's", case, "time_ms_p50", 0.25, None, TORCH_CHUNKED
            ),
            Requirement("relative error of the loss", case, "loss_error", LOSS_BAND),
        ]
    frozen = Case("1024x64000", 2048, trainable=False)
    sparse = Case("1024x64000", 2048, live=0.05)
    return [
        *found,
        Requirement("time over full logits'", frozen, "time_ms_p50", 0.55, None, EAGER),
        Requirement("memory over full logits'", frozen, "peak_mib", 0.15, None, EAGER),
        Requirement(
            "time over full logits'",
            Case("1024x64000", 2048, "float32"),
            "time_ms_p50",
            1.0,
            None,
            EAGER,
        ),
        _live_rows_alone(sparse),
    ]


def _on_a_gpu() -> list[Requirement]:
    frozen = Case("llama-3-8b", 8192, trainable=False)
    trainable = Case("llama-3-8b", 8192)
    d_hidden_mib = 8192 * frozen.shape.width * 2 / MIB
    d_weight_mib = frozen.shape.vocabulary * frozen.shape.width * 4 / MIB
    mb = 1e6 / MIB
    return [
        Requirement("ms", frozen, "time_ms_p50", 23.4),
        Requirement("ms", trainable, "time_ms_p50", 35.5),
        Requirement("time over the products'", frozen, "time_ms_p50", 1 / 0.92, None, PRODUCTS),
        Requirement("time over the products'", trainable, "time_ms_p50", 1 / 0.92, None, PRODUCTS),
        Requirement(
            "MiB of scratch: without the gradient of hidden",
            frozen,
            "peak_mib",
            300 * mb,
            allowance=d_hidden_mib,
        ),
        Requirement(
            "MiB of scratch: without the gradient of hidden and the float32 one of weight",
            trainable,
            "peak_mib",
            600 * mb,
            allowance=d_hidden_mib + d_weight_mib,
        ),
        *(
            Requirement(
                "time over that of one token less",
                replace(case, head="llama-3-8b + 1 token"),
                "time_ms_p50",
                1.02,
                case,
                OURS,
            )
            for case in (frozen, trainable)
        ),
        _live_rows_alone(Case("llama-3-8b", 8192, live=0.05)),
    ]


def _live_rows_alone(case: Case) -> Requirement:
    alone = replace(case, live_alone=True)
    return Requirement("time over the live rows' alone", case, "time_ms_p50", 1.3, alone, OURS)


QUESTION = HeadLossQuestion()
