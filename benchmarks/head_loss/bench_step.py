"""Time a step of every implementation, on heads small enough to run with any change.

pytest benchmarks --benchmark-only --benchmark-group-by=group
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.head_loss.cases import Answer, Case, make_inputs, right_answer
from benchmarks.head_loss.peers import EAGER
from benchmarks.head_loss.question import ALL, QUESTION

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A CPU may multiply bfloat16 hundreds of times slower.
DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"
CASES = (
    Case("small", 512, DTYPE),
    Case("small", 512, DTYPE, trainable=False),
    Case("small", 512, DTYPE, live=0.05),
)


@cache
def answer(case: Case) -> Answer:
    return right_answer(make_inputs(case, DEVICE), case.shape.softcap)


@cache
def eager_errors(case: Case) -> dict[str, float]:
    return QUESTION.setup(case, EAGER, DEVICE).errors(answer(case))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark: Any, case: Case, implementation: str) -> None:
    try:
        ready = QUESTION.setup(case, implementation, DEVICE)
    except (ImportError, NotImplementedError, ValueError) as reason:
        pytest.skip(str(reason))
    found = ready.errors(answer(case))
    if not QUESTION.is_right(case, found, eager_errors(case)):
        assert not implementation.startswith("derta"), found
        pytest.skip(f"not timed, its results are wrong: {found}")

    def step() -> None:
        ready.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.extra_info.update(found)
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
