"""Time of a step of every implementation, on heads small enough to be run with any change.

pytest benchmarks --benchmark-only --benchmark-group-by=group
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.cases import Answer, Case, make_inputs, right_answer
from benchmarks.harness import setup
from benchmarks.peers import EAGER, IMPLEMENTATIONS
from benchmarks.records import is_right

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = (
    Case("small", 512),
    Case("small", 512, trainable=False),
    Case("small", 512, "float32"),
    Case("small", 512, live=0.05),
)


@cache
def answer(case: Case) -> Answer:
    return right_answer(make_inputs(case, DEVICE), case.shape.softcap)


@cache
def eager_errors(case: Case) -> dict[str, float]:
    return setup(case, EAGER, DEVICE).errors(answer(case))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark: Any, case: Case, implementation: str) -> None:
    try:
        ready = setup(case, implementation, DEVICE)
    except (ImportError, NotImplementedError, ValueError) as reason:
        pytest.skip(str(reason))
    found = ready.errors(answer(case))
    if not is_right(found, eager_errors(case), case.torch_dtype):
        assert not implementation.startswith("derta"), found
        pytest.skip(f"not timed, its results are wrong: {found}")

    def step() -> None:
        ready.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.extra_info.update(found)
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
