"""Five hundred settings of `derta train`, most of them wrong: each runs, or ends in one line."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.utils import logging

from derta.cli import main
from derta.cli.train import TrainConfig, load_model
from tiny import tiny_model, tiny_tokenizer

CASES = 500
SECONDS = 5
HELD_OUT = {
    "eval_sources": {"path": "rows.jsonl", "role": "safety"},
    "eval_strategy": "steps",
    "eval_steps": 1,
}
BASE = {
    "model": "model",
    "sources": {"path": "rows.jsonl", "role": "safety"},
    "output_dir": "out",
    "overwrite": True,
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
}
# Values that are wrong for most keys of a type, and right for some.
NUMBERS = (math.nan, math.inf, -math.inf, -1, -0.5, 10**30, "nope", "", True, [1, None], {"a": 1})
FLAGS = ("nope", "", 2, 0.5, [], {"nope": 1}, math.nan)
TEXTS = ("", "nope", "a\0b", "x" * 5000, "none.json", ".", [None], {"nope": 1}, True, math.inf)
LISTS = (5, [""], [None], ["nope", math.nan], {"nope": ["a"]}, "", True)
MAPPINGS = ("", "none.json", ".", {"nope": 1}, {"nope": math.nan}, {"": 1}, [1], 5, True)
# A compilation takes longer than a case may, and checkpoints have tests of their own.
LEFT_OUT = {"torch_compile", "resume_from_checkpoint"}
# What the encoded records decide, whose longest may be the model's context.
AFTER_LOADING = {"max_length", "max_tokens", "branches", "refusal", "chat_template"}

COMBINED: list[dict[str, Any]] = [
    {"learning_rate": 1e30},
    {"weight_decay": -0.1},
    {"max_grad_norm": -1.0},
    {"logging_steps": -5},
    {"logging_steps": 2.5},
    {"log_level": "nope"},
    {"push_to_hub": True},
    {"optim_target_modules": ["nope"]},
    {"optim": "galore_adamw", "optim_target_modules": ["nope"]},
    {"optim": "nope"},
    {"optim_args": "nope"},
    {"optim_args": "a=b=c"},
    {"optim": "sgd", "optim_args": "momentum=nope"},
    {"lr_scheduler_kwargs": {"nope": 1}},
    {"lr_scheduler_type": "cosine_with_min_lr"},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}},
    {"lr_scheduler_type": "reduce_lr_on_plateau"},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 2}, **HELD_OUT},
    {"accelerator_config": {"nope": 1}},
    {"accelerator_config": "none.json"},
    {"accelerator_config": "rows.jsonl"},
    {"parallelism_config": {"nope": 1}},
    {"deepspeed": "none.json"},
    {"deepspeed": {"zero_optimization": {"stage": 3}}},
    {"fsdp": "full_shard"},
    {"fsdp": "nope"},
    {"fsdp": "full_shard", "fsdp_config": "none.json"},
    {"fsdp_config": {"nope": 1}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"nope": 1}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"context_fn": 1}},
    {"torch_compile_backend": "nope"},
    {"torch_compile_mode": "nope"},
    {"debug": "nope"},
    {"bf16": True, "use_cpu": False},
    {"bf16": True, "fp16": True},
    {"tf32": True},
    {"report_to": "nope"},
    {"dataloader_prefetch_factor": 2},
    {"include_num_input_tokens_seen": "all"},
    {"metric_for_best_model": "accuracy", **HELD_OUT},
    {"metric_for_best_model": "trade_off", **HELD_OUT},
    {"metric_for_best_model": "rto_loss", **HELD_OUT},
    {"load_best_model_at_end": True},
    {"save_strategy": "best", **HELD_OUT},
    {"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": True, **HELD_OUT}
    | {"eval_steps": 2},
    {"eval_on_start": True},
    {"eval_on_start": True, **HELD_OUT},
    {"method": "lora"},
    {"method": "lora", "lora_target_modules": "nope"},
    {"method": "lora", "lora_target_modules": ["q_proj", "nope"]},
    {"method": "lora", "lora_target_modules": "(["},
    {"method": "lora", "lora_target_modules": "lm_head"},
    {"method": "lora", "lora_modules_to_save": ["nope"]},
    {"shard": "none"},
    {"shard": "none", "offload_parameters": False},
    {"sparse_backward": 0.01},
    {"sparse_backward": 1},
    {"head_impl": "nope"},
    {"attention_impl": "flash_attn"},
    {"seed": 2**32},
    {"branches": 1000},
    {"chat_template": "{{ nope"},
    {"sources": []},
    {"sources": {"path": "none.json", "role": "safety"}},
    {"sources": {"path": "rows.jsonl", "role": "safety", "weight": math.inf}},
    {"sources": {"path": "rows.jsonl", "role": "safety", "limit": 10**30}},
    {"sources": {"path": "x" * 400, "role": "safety"}},
    {"sources": {"path": ["rows.jsonl", ""], "role": "safety"}},
    {"model": "nobody/nothing"},
    {"model": "rows.jsonl"},
    {"model": "model/config.json"},
    {"model": "x" * 400},
    {"output_dir": "rows.jsonl"},
    {"output_dir": "x" * 400},
    {"output_dir": "/dev/null/x"},
]


def wrong_values(hint: str) -> tuple[Any, ...]:
    for part, values in (
        ("dict", MAPPINGS),
        ("Config", MAPPINGS),
        ("list", LISTS),
        ("str", TEXTS),
        ("Literal", TEXTS),
        ("float", NUMBERS),
        ("int", NUMBERS),
        ("bool", FLAGS),
    ):
        if part in hint:
            return values
    return TEXTS


def generated(count: int) -> Iterator[dict[str, Any]]:
    """Yield wrong values of every key in turn, drawn from a fixed seed."""
    rng = random.Random(0)
    keys = [field for field in fields(TrainConfig) if field.init and field.name not in LEFT_OUT]
    drawn = {
        key.name: rng.sample(values := wrong_values(str(key.type)), len(values)) for key in keys
    }
    for turn in range(count):
        name = keys[turn % len(keys)].name
        yield {name: drawn[name][turn // len(keys)]}


def told(values: dict[str, Any], line: str) -> bool:
    """Return True if a line names one of the keys, or a text within a value: a file, a format."""
    names = set(values)
    for value in values.values():
        within = value if isinstance(value, dict) else {}
        names |= within.keys() | {
            text for text in (value, *within.values()) if isinstance(text, str)
        }
    return any(name in line for name in names if name)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    row = {"prompt": "How?", "safe": "Sorry, no.", "harmful": "Step one, step two. " * 6}
    Path("rows.jsonl").write_text((json.dumps(row) + "\n") * 2, encoding="utf-8")
    verbosity, environment = logging.get_verbosity(), dict(os.environ)
    yield
    logging.set_verbosity(verbosity)
    os.environ.clear()
    os.environ.update(environment)


PROMISE = pytest.mark.promise(
    "A bad setting ends in one line with its key, mostly before a model loads."
)


@pytest.mark.parametrize("count", [150, pytest.param(CASES, marks=[pytest.mark.slow, PROMISE])])
def test_a_setting_runs_or_ends_in_one_line_that_names_it(
    count: int,
    workplace: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    record_property: Any,
) -> None:
    loaded: list[str] = []

    def loads(config: TrainConfig, tokenizer: Any) -> Any:
        loaded.append(config.model)
        return load_model(config, tokenizer)

    monkeypatch.setattr("derta.cli.train.load_model", loads)
    cases = [*COMBINED, *generated(count - len(COMBINED))]
    faults, ran = [], 0
    for values in cases:
        Path("run.yaml").write_text(yaml.safe_dump({**BASE, **values}), encoding="utf-8")
        loaded.clear()
        started = time.perf_counter()
        try:
            status = main(["train", "run.yaml"])
        except Exception as error:  # whatever would be a traceback for a user
            status = repr(error)
        seconds = time.perf_counter() - started
        said = capfd.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("derta train: ")]
        is_one_line = len(lines) == 1 and said.endswith(lines[0] + "\n")
        early = not loaded or values.keys() & AFTER_LOADING
        ran += status == 0
        right = status == 0 or (status == 1 and is_one_line and told(values, lines[0]) and early)
        if not right or seconds > SECONDS:
            faults.append((values, status, said[-300:], f"{seconds:.1f} s"))
    assert not faults, "\n".join(map(str, faults))
    assert len(cases) == count and count // 20 < ran < count // 2
    record_property("cases", count)
