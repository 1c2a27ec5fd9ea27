"""The plan of each rank is held against torch's allocator, on two ranks that train."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import planned
from derta.memory import StepMemory, StepSettings
from derta.modeling.adapters import Method
from ranks import run_ranks

SCRIPT = "import planned\nplanned.main()\n"


def step_of(case: str) -> StepSettings:
    given = planned.CASES[case]
    return StepSettings(
        config=AutoConfig.for_model("llama", **planned.SIZES),
        method=Method(method=given.get("method", "full")),
        dtype=torch.float32,
        autocast=given.get("bf16", False),
        checkpointing=given.get("gradient_checkpointing", False),
        gpus=2,
        shard=given["shard"],
        device_type="cpu",
    )


def test_the_plan_of_a_rank_is_within_a_tenth_of_its_allocated_memory(tmp_path: Path) -> None:
    cases = [name for name in planned.CASES if name != "zero3" or find_spec("deepspeed")]
    run_ranks(SCRIPT, tmp_path, *cases)
    for rank in range(2):
        taken = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for case in cases:
            step = taken[case]
            assert step["packs"] == 2  # the second meets the gradients of the first
            peak = StepMemory(step_of(case)).peak(step["tokens"], step["live"])
            assert peak.total() == pytest.approx(step["peak"], rel=0.1), (case, rank, peak)
    if len(cases) < len(planned.CASES):
        pytest.skip("DeepSpeed is not installed: the other engines are within a tenth")
