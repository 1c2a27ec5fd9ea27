"""The keys of several GPUs, in one process: what is refused, and what Accelerate is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from derta import apply_derta
from derta.training import sharding
from derta.training.config import DertaConfig
from derta.training.sharding import (
    engine_keys,
    forget_earlier_runs,
    running_engine,
    with_exact_sums,
)
from runs import RECORDS, trainer


def config(folder: Path, **keys: Any) -> DertaConfig:
    return DertaConfig(str(folder), use_cpu=True, **keys)


@pytest.mark.parametrize("shard", ["ddp", "fsdp", "zero2", "zero3"])
def test_an_engine_needs_processes(tmp_path: Path, shard: str) -> None:
    with pytest.raises(ValueError, match=f"shard: {shard} needs a process for each GPU, got one"):
        config(tmp_path, shard=shard)


@pytest.mark.parametrize("keys", [dict(fsdp=True), dict(deepspeed={"zero_optimization": {}})])
def test_transformers_own_keys_need_processes_too(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(keys))} needs a process for each GPU, got"):
        config(tmp_path, **keys)


REFUSED = {
    "shard": (dict(shard="tp"), "shard must be one of none, ddp, fsdp, zero2, zero3, got 'tp'"),
    "nothing to offload": (
        dict(offload_parameters=True),
        "offload_parameters needs shard: fsdp or zero3, got none",
    ),
    "two engines": (
        dict(shard="fsdp", deepspeed={"zero_optimization": {"stage": 3}}),
        "shard: fsdp and deepspeed name two engines: leave one out",
    ),
    "two engines, the other way": (
        dict(shard="zero2", fsdp=True),
        "shard: zero2 and fsdp name two engines: leave one out",
    ),
    "keys of another engine": (
        dict(shard="ddp", fsdp_config={"version": 2}),
        "fsdp_config needs shard: fsdp",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_keys_that_contradict_each_other_are_refused(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, message = REFUSED[case]
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **keys)


@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_another_engine_of_the_launcher_is_refused(
    tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(sharding.AT_LAUNCH, "ACCELERATE_USE_DEEPSPEED", value)
    with pytest.raises(ValueError, match="shard: fsdp, but accelerate launch chose DeepSpeed"):
        config(tmp_path, shard="fsdp")


def test_an_earlier_run_of_the_process_does_not_choose_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as Accelerate leaves it
    forget_earlier_runs()
    assert "ACCELERATE_USE_FSDP" not in sharding.os.environ


def test_own_keys_of_fsdp_take_precedence(tmp_path: Path) -> None:
    keys = engine_keys("fsdp", False, {"version": 3}, only_model=False)
    assert keys["fsdp"] is True
    assert keys["fsdp_config"]["version"] == 3
    assert keys["fsdp_config"]["state_dict_type"] == "SHARDED_STATE_DICT"


def test_settings_of_deepspeed_are_json() -> None:
    for shard in ("zero2", "zero3"):
        stage = json.loads(json.dumps(engine_keys(shard, True, None, only_model=False)))[
            "deepspeed"
        ]
        assert stage["zero_optimization"]["stage"] == int(shard[-1])


def test_mixed_precision_of_fsdp_rounds_no_sums() -> None:
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    wide = with_exact_sums(narrow)
    assert wide.param_dtype == torch.bfloat16
    assert wide.reduce_dtype == torch.float32
    assert wide.output_dtype is None and not wide.cast_forward_inputs


@pytest.mark.parametrize(
    ("ranks", "fsdp", "zero_stage", "engine"),
    [
        (1, None, None, "none"),
        (2, None, None, "ddp"),
        (2, "plugin", None, "fsdp"),
        (2, None, 2, "zero2"),
        (2, None, 3, "zero3"),
    ],
)
def test_the_engine_that_runs_is_known(
    ranks: int, fsdp: str | None, zero_stage: int | None, engine: str
) -> None:
    deepspeed = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    state = SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed)
    assert running_engine(SimpleNamespace(state=state, num_processes=ranks)) == engine


def test_a_model_that_awaits_its_self_check_is_not_evaluated(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    apply_derta(run.model, 1, check=False)  # as under an engine that train prepares
    with pytest.raises(ValueError, match="evaluate needs the engine of a sharded model: call tra"):
        run.evaluate(RECORDS)
