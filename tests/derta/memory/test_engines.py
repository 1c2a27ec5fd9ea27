"""The memory of one of several GPUs, by engine; `tests/distributed/test_plans.py` measures it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from benchmarks.plans import MODELS
from derta.cli import main
from derta.cli.plan import planned_step
from derta.cli.settings.training import PlanConfig
from derta.cli.train import TrainConfig
from derta.memory import StepMemory, StepSettings
from derta.memory.plan import GIB, Triples, describe, needed, turns
from derta.modeling.adapters import Method
from derta.settings import build, read_yaml, shared
from tiny import ARCHITECTURES, tiny_model

EXAMPLES = Path(__file__).parents[3] / "examples"
TINY: dict[str, Any] = dict(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
LLAMA_70B = MODELS["Llama-3-8B"] | dict(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)
TRIPLES = Triples(branches=1, rto_keep=1.0, prompt=40, safe=70)


def step_of(**changes: Any) -> StepSettings:
    config = AutoConfig.for_model("llama", **TINY)
    return StepSettings(
        **{
            "config": config,
            "dtype": torch.float32,
            "checkpointing": True,
            "gpus": 8,
            "capacity": GIB,
            **changes,
        }
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_each_engine_divides_what_it_shards(autocast: bool) -> None:
    """All sizes are multiples of 8, so no shard is padded."""
    one = StepMemory(step_of(gpus=1, autocast=autocast)).peak(256)
    shared_out = {
        "none": (1, 1, 1),
        "ddp": (1, 1, 1),
        "fsdp": (1 / 8, 1 / 8, 1 / 8),
        # With a float32 copy of the weights to step, also beside float32 ones.
        "zero2": (9 / 8, 1 / 8, 1 / 8) if not autocast else (1 / 2 + 1 / 8, 1 / 16, 1 / 8),
        "zero3": (2 / 8, 1 / 8, 1 / 8) if not autocast else (1 / 16 + 1 / 8, 1 / 16, 1 / 8),
    }
    for shard, shares in shared_out.items():
        peak = StepMemory(step_of(shard=shard, autocast=autocast)).peak(256)
        for part, share in zip(("weights", "gradients", "optimizer"), shares, strict=True):
            # ZeRO-3 never releases small weights.
            assert peak[part] == pytest.approx(share * one[part], rel=0.03), (shard, part)
        assert (peak["buckets"] == one["gradients"]) == (shard in ("none", "ddp"))


def test_two_layers_are_whole_at_a_time_however_many_there_are() -> None:
    few, many = (
        StepMemory(
            step_of(
                config=AutoConfig.for_model("llama", **TINY | dict(num_hidden_layers=layers)),
                shard="fsdp",
                method=Method(method="lora"),
            )
        ).peak(256)
        for layers in (5, 50)
    )
    layer = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128)
    # Two, with their adapters.
    assert 2 * layer < many["gathered"] < 2.5 * layer
    assert many["gathered"] == few["gathered"]


def test_a_frozen_head_is_whole_for_the_loss_alone() -> None:
    step = step_of(shard="fsdp", method=Method(method="lora"))
    head = 4 * 2048 * 128
    memory = StepMemory(step)
    peaks = memory._whole(256, 1.0)
    assert max(peak["embeddings"] for peak in peaks.values()) == pytest.approx(2 * head, rel=0.01)
    assert peaks["layers last"]["embeddings"] < 0.01 * head


def test_shards_on_the_host_take_no_memory() -> None:
    step = step_of(shard="fsdp")
    here, there = (
        StepMemory(replace(step, offload_parameters=offload)).peak(256) for offload in (False, True)
    )
    assert there["optimizer"] == there["gradients"] == 0
    assert there["weights"] < 0.01 * here["weights"]  # buffers
    assert there["gathered"] + there["embeddings"] > 0


def test_the_scales_of_4_bit_weights_are_not_sharded() -> None:
    weights = {
        gpus: StepMemory(
            step_of(gpus=gpus, shard="fsdp", method=Method(method="qlora"), dtype=torch.bfloat16)
        ).peak(256)["weights"]
        for gpus in (2, 4, 8)
    }
    linear = 5 * (2 * 128 * 128 + 2 * 64 * 128 + 2 * 352 * 128)  # 352 inputs are no whole blocks
    whole = 2 * weights[4] - weights[2]  # what no number of GPUs divides
    assert whole == pytest.approx(linear / 64, rel=0.05)
    assert 2 * weights[8] - weights[4] == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("shard", ["fsdp", "zero3"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_is_gathered(family: str, method: Any, shard: str) -> None:
    step = step_of(
        config=tiny_model(family).config,
        method=Method(method=method, lora_dropout=0.0),
        dtype=torch.bfloat16,
        shard=shard,
        gpus=2,
    )
    peaks = StepMemory(step)._whole(64, 1.0)
    assert all(size >= 0 for peak in peaks.values() for size in peak.values())
    if shard == "fsdp":  # to ZeRO-3, such weights are too small to release
        assert max(peak["gathered"] for peak in peaks.values()) > 0


def test_engines_are_advised_on_several_gpus() -> None:
    assert "shard: fsdp" not in dict(turns(step_of(gpus=1)))
    advised = dict(turns(step_of()))
    assert "offload_parameters: true" not in advised
    sharded = advised["shard: fsdp"](step_of())
    assert sharded.shard == "fsdp"
    advised = dict(turns(sharded))
    assert "shard: fsdp" not in advised and "optim: adamw_8bit" not in advised
    assert advised["offload_parameters: true"](sharded).offload_parameters
    small = AutoConfig.for_model("llama", **TINY | dict(num_hidden_layers=1))
    said = describe(step_of(config=small), 256, TRIPLES)
    assert re.match(r"a step with packs of 256 tokens takes [\d.]+ GiB on each GPU at its", said)
    assert re.search(r"^  shard: fsdp +[\d.]+ GiB$", said, re.M)


def test_a_plan_of_several_gpus_needs_neither_ranks_nor_deepspeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[StepSettings] = []
    monkeypatch.setattr("derta.cli.plan.describe", lambda step, *_: planned.append(step) or "")
    monkeypatch.setattr("derta.training.settings.find_spec", lambda name: None)
    AutoConfig.for_model("llama", **TINY).save_pretrained(tmp_path)
    given = ["--model", str(tmp_path / "config.json"), "--gpu", "8", "--gpus", "8"]
    engines = ["none", "ddp", "fsdp", "zero2", "zero3"]
    for shard in engines:
        assert main(["plan", *given, "--shard", shard]) == 0
    assert [step.shard for step in planned] == engines
    assert {step.gpus for step in planned} == {8}
    assert main(["plan", *given, "--shard", "zero3", "--offload_parameters"]) == 0
    assert planned[-1].offload_parameters


STATED = re.compile(r"packs of ([\d,]+) tokens takes ([\d.]+) GiB on each GPU at its peak")


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(EXAMPLES.glob("*.yaml")) if STATED.search(path.read_text())],
    ids=lambda path: path.stem,
)
def test_examples_state_their_own_plan(path: Path) -> None:
    values = shared(read_yaml(path), PlanConfig, TrainConfig)
    config = build(PlanConfig, {"": {**values, "gpu": 80, "gpus": 8}})
    model = AutoConfig.for_model(**(LLAMA_70B if "70b" in path.stem else MODELS["Llama-3-8B"]))
    step = planned_step(model, config)
    triples = Triples(config.branches, config.rto_keep)
    peak = needed(StepMemory(step), config.max_tokens, triples).total()
    tokens, stated = STATED.search(path.read_text()).groups()
    assert (tokens, float(stated)) == (
        f"{config.max_tokens:,}",
        pytest.approx(peak / GIB, abs=0.01),
    )
    assert peak < step.capacity
