"""Settings from files and options, their help, and one sentence for every wrong one."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import TrainingArguments

from derta.cli import main, module_of, settings_of
from derta.cli.commands import COMMANDS, help_of
from derta.cli.doctor import DoctorConfig
from derta.cli.eval.evaluate import read_defences
from derta.cli.settings.data import StatsConfig
from derta.cli.settings.evaluation import EvaluateConfig
from derta.cli.settings.training import PlanConfig, SchemaConfig
from derta.cli.train import TrainConfig
from derta.data import Source
from derta.objectives.cuts import CUT_POLICIES, RTO_DEPTHS
from derta.objectives.defaults import CutPolicy, Recipe, RtoDepth
from derta.settings import build, keys_of, read_options, read_yaml, shared
from derta.settings.blame import blame
from derta.training.config import RECIPES, DertaConfig

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))


SOURCE = {"path": "t", "role": "safety"}
BASE = {"model": "m", "sources": [SOURCE], "output_dir": "o", "use_cpu": True}


def from_file(**values: object) -> TrainConfig:
    return build(TrainConfig, {"run.yaml": {**BASE, **values}})


def from_options(*arguments: str) -> TrainConfig:
    return build(TrainConfig, {"run.yaml": BASE, "command line": read_options(arguments)})


def test_options_are_yaml_values_and_a_bare_key_is_true() -> None:
    arguments = "--branches 2 --label_names=[x,y] --max_steps -1 --save_strategy no --dry-run"
    config = from_options(*arguments.split(), "--rto_keep", "1e-4", "--disable_tqdm", "false")
    assert config.branches == 2
    assert config.label_names == ["x", "y"]
    assert config.max_steps == -1
    assert config.save_strategy == "no"
    assert config.dry_run is True
    assert config.rto_keep == 1e-4
    assert config.disable_tqdm is False


def test_a_key_of_text_keeps_the_typed_text() -> None:
    template = "{{ bos_token }}{% for m in messages %}\n{{ m['content'] }} #{% endfor %}"
    assert from_options("--chat_template", template).chat_template == template
    assert from_options("--output_dir", "2024").output_dir == "2024"
    assert from_options("--run_name", "1e3").run_name == "1e3"
    assert from_options("--chat_template", "null").chat_template is None
    assert from_options("--refusal", "5").refusal == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stray"], "expected --key value, got 'stray'"),
        (
            ["--sources", "[1,"],
            "command line: sources: '[1,' is not a value that YAML can read",
        ),
        (
            ["--sources", "[" * 5000],
            f"command line: sources: '{'[' * 69} ... {'[' * 19}' is not a value that YAML can read",
        ),
        (["--max_step", "3"], "command line: unknown key 'max_step'; did you mean 'max_steps'?"),
        (["--max_steps", "few"], "command line: max_steps: expected int, got 'few'"),
        (["--output_dir"], "command line: output_dir: expected str, got True"),
        (["--refusal"], "command line: refusal: expected str | int, got True"),
        (["--refusal", "true"], "command line: refusal: expected str | int, got True"),
        (["--branches", "true"], "command line: branches: expected int, got True"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        from_options(*arguments)


def test_a_wrong_key_of_the_file_is_reported_as_the_files() -> None:
    with pytest.raises(ValueError, match=r"^run.yaml: unknown key 'max_step'; did you mean"):
        build(TrainConfig, {"run.yaml": {"max_step": 3}, "command line": {"max_steps": 3}})


# Ten anchors, each of ten aliases of the one before.
ALIASES = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [\n", ":3: "),
        ("a: 1\nb: 2\na: 3\n", ":3: the key 'a' is given twice"),
        ("a: 1\n{a: b}: c\n", ":2: found unhashable key"),
        ("a: 1\n[a, b]: c\n", ":2: found unhashable key"),
        ("a: 1\nb: x\x01y\n", ":2: U+0001 has no place in YAML"),
        ("a: 1\nb: \udcff\n", ":2: byte 0xff is not UTF-8"),
        ("\udcff\udcfea\0:\0", ":1: byte 0xff is not UTF-8"),  # UTF-16 with its mark
        ("- a\n", "expected `key: value` lines, got list"),
        ("a: &a\n- *a\n", ":1: the alias refers to the value that it stands in"),
        ("a: &a {b: {c: *a}}\n", ":1: the alias refers to the value that it stands in"),
        (ALIASES, ":6: with its aliases written out it has more than 100,000 values"),
        ("a: " + "[" * 5000, "values are nested too deeply"),
        ("a: 1\nb: 0x_\n", ":2: '0x_' is no int"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(
        ValueError, match=re.escape(f"{path}{message}" if message[0] == ":" else message)
    ):
        read_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such configuration file"):
        read_yaml(tmp_path / "none.yaml")


def test_words_and_dates_of_a_file_are_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("save_strategy: no\nrun_name: 2024-13-45\nuse_cpu: true\n")
    assert read_yaml(path) == {"save_strategy": "no", "run_name": "2024-13-45", "use_cpu": True}


def test_numbers_that_yaml_reads_as_text_become_numbers() -> None:
    config = from_file(learning_rate="1e-4", refusal=5, branches="3", rto_keep=1, max_steps=2.0)
    assert config.learning_rate == 1e-4
    assert config.refusal == 5
    assert config.branches == 3
    assert type(config.rto_keep) is float
    assert type(config.max_steps) is int


def test_a_single_value_for_a_list_is_a_list_of_one() -> None:
    assert from_options("--sources", "{path: a, role: helpful, limit: 3}").sources == [
        Source(path="a", role="helpful", limit=3)
    ]
    held_out = from_file(eval_sources=SOURCE, eval_strategy="epoch").eval_sources
    assert held_out == [Source(path="t", role="safety")]
    assert from_file(label_names="a").label_names == ["a"]
    assert from_file(lora_target_modules="q_proj").lora_target_modules == "q_proj"
    bench = settings_of(importlib.import_module("derta.cli.bench"))
    assert build(bench, {"": {"what": "resources", "capabilities": 90}}).capabilities == [90]
    assert build(bench, {"": {"what": "resources"}}).capabilities is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"learnign_rate": 1},
            "run.yaml: unknown key 'learnign_rate'; did you mean 'learning_rate'?",
        ),
        ({"branches": "two"}, "run.yaml: branches: expected int, got 'two'"),
        ({"cuts": "random"}, "run.yaml: cuts: expected"),
        ({"label_names": 5}, "run.yaml: label_names: expected list[str] | None, got 5"),
        ({"label_names": True}, "run.yaml: label_names: expected list[str] | None, got True"),
        (
            {"label_names": ["a", None]},
            "run.yaml: label_names: expected list[str] | None, got ['a', None]",
        ),
        ({1: 2}, "run.yaml: unknown key 1"),
        ({"refusal": True}, "run.yaml: refusal: expected str | int, got True"),
        ({"branches": True}, "run.yaml: branches: expected int, got True"),
        ({"rto_keep": False}, "run.yaml: rto_keep: expected float or official, got False"),
        ({"report_to": ["none", True]}, "run.yaml: report_to: expected"),
        ({"rto_keep": 1.5}, "rto_keep must lie in [0, 1], got 1.5"),
        ({"branches": -1}, "branches must lie in [0, 1000], got -1"),
        ({"branches": 0, "rto_keep": 0}, "a triple would train nothing"),
        ({"rto_weight": -1}, "rto_weight must lie in [0, 1000], got -1.0"),
        ({"rto_depth": "deep"}, "rto_depth: expected one of uniform, growing, got 'deep'"),
        (
            {"recipe": "sorry"},
            "recipe: expected one of vanilla, prefix_only, rto_only, derta or null, got 'sorry'",
        ),
        (
            {"eval_sources": SOURCE},
            "eval_sources: nothing would be reported of them while eval_strategy is no, expected",
        ),
        ({"eval_strategy": "epoch"}, "eval_strategy: epoch needs eval_sources"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "eval_sources": SOURCE},
            "load_best_model_at_end needs save_strategy to be as eval_strategy, or best, got steps",
        ),
        ({"over_refusal_weight": 2}, "over_refusal_weight must lie in [0, 1], got 2.0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience must be at least 1, got 0"),
        (
            {"early_stopping_patience": 2},
            "early_stopping_patience needs load_best_model_at_end: true",
        ),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps must stay 1, got 4"),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "liger_kernel_config must leave fused_linear_cross_entropy and cross_entropy off",
        ),
        ({"use_liger_kernel": True}, "use_liger_kernel needs a GPU that Triton knows, this run is"),
        ({"report_to": "nobody"}, "report_to: 'nobody' is not installed, or nothing that"),
        (
            {"output_dir": "none", "resume_from_checkpoint": True},
            "resume_from_checkpoint: there is no checkpoint in none yet",
        ),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size must stay 1, got 8"),
        ({"learning_rate": 1e30}, "learning_rate must lie in [0, 1], got 1e+30"),
        ({"weight_decay": -1}, "weight_decay must lie in [0, 100], got -1.0"),
        ({"logging_steps": -1}, "logging_steps must be above 0, got -1.0"),
        ({"seed": 2**32}, "seed must lie in [0, 4294967295], got 4294967296"),
        ({"rto_keep": float("nan")}, "run.yaml: rto_keep: expected finite numbers, got nan"),
        (
            {"lr_scheduler_kwargs": {"a": [float("inf")]}},
            "run.yaml: lr_scheduler_kwargs: expected finite numbers, got {'a': [inf]}",
        ),
        ({"run_name": ""}, "run.yaml: run_name: expected text that is not empty, got ''"),
        ({"model": "a\0b"}, "run.yaml: model: expected text without a null character, got 'a"),
        ({"max_steps": "x" * 999}, "xxx ... xxxxxxxxxxxxxxxxxxx'"),
        (
            {"save_strategy": "never"},
            "run.yaml: save_strategy: expected one of no, steps, epoch, best, got 'never'",
        ),
        ({"log_level": "x"}, "run.yaml: log_level: expected one of detail, debug, info,"),
        (
            {"parallelism_config": {"nope": 1}},
            "run.yaml: parallelism_config: expected a mapping of dp_replicate_size,",
        ),
        (
            {"accelerator_config": {"nope": 1}},
            "accelerator_config: {'nope': 1}: AcceleratorConfig.__init__() got an unexpected",
        ),
        ({"bf16": True, "fp16": True}, "bf16: True, fp16: True: At most one of fp16 and bf16"),
        ({"push_to_hub": True}, "push_to_hub must be false, got True: nothing is uploaded while"),
        (
            {"optim_target_modules": ["q_proj"]},
            "optim_target_modules: ['q_proj'] are for GaLore and APOLLO, expected optim to be one",
        ),
        ({"fsdp_config": {"a": 1}}, "fsdp_config needs shard: fsdp, or fsdp: true"),
        (
            {"include_num_input_tokens_seen": True},
            "include_num_input_tokens_seen must stay no, got True",
        ),
        (
            {"gradient_checkpointing_kwargs": {"nope": 1}},
            "gradient_checkpointing_kwargs: expected a mapping of context_fn, debug,",
        ),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": False, "context_fn": 1}},
            "gradient_checkpointing_kwargs: {'use_reentrant': False, 'context_fn': 1}: 'int' obj",
        ),
        (
            {"load_best_model_at_end": True, "save_strategy": "no"},
            "load_best_model_at_end needs eval_strategy to be steps or epoch, got no",
        ),
        (
            {"save_strategy": "best"},
            "save_strategy: best needs eval_strategy and metric_for_best_model, got no and None",
        ),
        ({"sources": []}, "sources: expected at least one source, got none"),
        ({"eval_on_start": True}, "eval_on_start needs eval_sources"),
        (
            {"metric_for_best_model": "accuracy"},
            "metric_for_best_model: expected one of loss, mle_loss, rto_loss, rto_targets,",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(TrainConfig, {"run.yaml": {**BASE, **values}})


def test_missing_settings_are_listed() -> None:
    with pytest.raises(ValueError, match="^missing output_dir, model$"):
        build(TrainConfig, {"run.yaml": {"sources": [SOURCE]}})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a.jsonl", "expected path, role, weight, format, columns, limit, got 'a.jsonl'"),
        ({"path": "a"}, "missing role"),
        ({**SOURCE, "rol": 1}, "unknown key 'rol'; did you mean 'role'?"),
        ({**SOURCE, "role": "x"}, ".role: expected one of safety, helpful, borderline, got 'x'"),
        ({**SOURCE, "path": 5}, ".path: expected str | list[str], got 5"),
        ({**SOURCE, "path": []}, ".path: is empty, expected the path of a file, or of several"),
        ({**SOURCE, "weight": "much"}, ".weight: expected float, got 'much'"),
        ({**SOURCE, "weight": True}, ".weight: expected float, got True"),
        ({**SOURCE, "weight": 0}, ".weight: is 0.0, expected a number above 0"),
        ({**SOURCE, "limit": 0}, ".limit: is 0, expected at least 1"),
    ],
)
def test_a_wrong_source_is_named_by_its_place_and_key(source: object, message: str) -> None:
    place = "run.yaml: sources[1]" + (": " if message[0] != "." else "")
    with pytest.raises(ValueError, match="^" + re.escape(place + message)):
        from_file(sources=[SOURCE, source])
    with pytest.raises(ValueError, match="^" + re.escape(place.replace("1", "0") + message)):
        from_file(sources=source)


def test_a_source_made_in_python_needs_a_known_role() -> None:
    with pytest.raises(ValueError, match="^role: is 'x', expected one of safety, helpful, border"):
        Source(path="a", role="x")  # type: ignore[arg-type]
    assert Source(path=["a", "b"], role="safety").paths == ["a", "b"]


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        (None, {}, (1, "uniform", 1.0)),
        ("vanilla", {}, (1, "zero", 0.0)),
        ("vanilla", {"cuts": "zero", "rto_keep": 0}, (1, "zero", 0.0)),
        ("prefix_only", {"cuts": "official", "branches": 4}, (4, "official", 0.0)),
        ("rto_only", {"rto_keep": 0.5}, (1, "zero", 0.5)),
        ("derta", {"rto_keep": 0.05}, (1, "uniform", 0.05)),
    ],
)
def test_a_recipe_sets_the_keys_that_are_not_given(
    recipe: object, given: dict, expected: tuple
) -> None:
    config = from_file(**({"recipe": recipe} if recipe else {}), **given)
    assert (config.branches, config.cuts, config.rto_keep) == expected


@pytest.mark.parametrize(
    ("recipe", "key", "value"),
    [
        ("vanilla", "cuts", "uniform"),
        ("vanilla", "rto_keep", 1.0),
        ("prefix_only", "cuts", "zero"),
        ("rto_only", "cuts", "deep"),
        ("derta", "rto_keep", 0.0),
        ("derta", "branches", 0),
    ],
)
def test_a_key_that_contradicts_its_recipe_is_refused_by_name(
    recipe: str, key: str, value: object
) -> None:
    ours = getattr(RECIPES[recipe], key)
    message = f"{key} is {value}, which contradicts recipe: {recipe} ({key}: {ours})"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        from_file(recipe=recipe, **{key: value})


def test_a_plan_of_a_training_run_follows_its_recipe() -> None:
    given = {"model": "m", "gpu": 8}
    vanilla = build(PlanConfig, {"": {**given, "recipe": "vanilla"}})
    assert (vanilla.branches, vanilla.rto_keep) == (1, 0.0)
    assert build(PlanConfig, {"": {**given, "recipe": "derta", "rto_keep": 0.05}}).rto_keep == 0.05
    with pytest.raises(ValueError, match="refusal_tokens must be left out with red_flag"):
        build(PlanConfig, {"": {**given, "red_flag": "auto", "refusal_tokens": "auto"}})
    with pytest.raises(ValueError, match="^rto_keep is 1.0, which contradicts recipe: vanilla"):
        build(PlanConfig, {"": {**given, "recipe": "vanilla", "rto_keep": 1.0}})


def test_plan_and_stats_ignore_only_known_keys_of_training() -> None:
    values = {"model": "m", "learning_rate": 1e-5, "probe": True, "max_tokns": 3}
    assert shared(values, PlanConfig, TrainConfig) == {"model": "m", "max_tokns": 3}
    held = [{**SOURCE, "weight": 2.0, "limit": 3, "weigth": 1}]
    found = shared({"eval_sources": held}, StatsConfig, TrainConfig)
    assert found == {"eval_sources": [{**SOURCE, "weigth": 1}]}


@pytest.mark.promise("A bad setting ends in one line with its key, mostly before a model loads.")
@pytest.mark.parametrize(
    ("command", "key", "value", "message"),
    [
        ("eval", "batch_size", 0, "batch_size must be at least 1, got 0"),
        ("eval", "samples", -1, "samples must be at least 0, got -1"),
        ("eval", "max_new_tokens", 0, "max_new_tokens must be at least 1, got 0"),
        ("eval", "max_tokens", 0, "max_tokens must be at least 1, got 0"),
        ("eval", "judges", {"a": {"b": float("nan")}}, "file: judges: expected finite numbers,"),
        ("eval", "keywords", ["no", ""], "file: keywords: expected text that is not empty,"),
        ("eval calibrate", "files", [""], "file: files: expected text that is not empty, got ['']"),
        ("eval compare", "recipes", {"derta": ""}, "file: recipes: expected text that is not emp"),
        ("eval curve", "max_tokens", -1, "max_tokens must be at least 1, got -1"),
        ("chat", "max_new_tokens", 0, "max_new_tokens must be at least 1, got 0"),
        ("merge", "model", "a\0b", "file: model: expected text without a null character, got"),
        ("data build", "seed", -1, "seed must be at least 0, got -1"),
        ("data build", "eval_share", float("nan"), "file: eval_share: expected finite numbers,"),
        ("data stats", "output", "none/a.json", "output: none/a.json: none is no folder"),
        ("schema", "output", "none/a.json", "output: none/a.json: none is no folder"),
        ("plan", "gpu", float("inf"), "file: gpu: expected finite numbers, got inf"),
        ("init", "gpu", 1e30, "gpu must lie in [0, 100000], got 1e+30"),
    ],
)
def test_bad_settings_of_every_command_are_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    key: str,
    value: Any,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    required = {
        "eval": {"model": "m", "output_dir": "o", "harmful": "h"},
        "eval calibrate": {"output_dir": "o"},
        "eval compare": {"results": "r", "output_dir": "o"},
        "eval curve": {"model": "m", "data": "d"},
        "chat": {"model": "m"},
        "merge": {"output_dir": "o"},
        "data build": {"sources": SOURCE, "output_dir": "o"},
        "data stats": {"sources": SOURCE},
        "plan": {"model": "m"},
    }
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        build(settings_of(module_of(command)), {"file": {**required.get(command, {}), key: value}})


def test_the_nearest_key_of_another_part_is_named_for_a_file_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nlearning_rte: 1e-5\n")
    assert main(["plan", str(path), "--gpu", "8"]) == 1
    assert "unknown key 'learning_rte'; did you mean 'learning_rate'?" in capsys.readouterr().err
    assert main(["plan", "--gpu", "8", "--learning_rte", "1e-5"]) == 1
    assert "learning_rate" not in capsys.readouterr().err


def test_an_error_of_the_operating_system_follows_its_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: SchemaConfig) -> None:
        raise PermissionError(13, "Permission denied", "out/a/b.json")

    monkeypatch.setattr("derta.cli.schema.run", run)
    assert main(["schema", "--output", "out"]) == 1
    said = "derta schema: output: out/a/b.json: permission denied\n"
    assert capsys.readouterr().err == said
    assert main(["schema"]) == 1
    assert capsys.readouterr().err == "derta schema: out/a/b.json: permission denied\n"


def test_no_key_is_to_blame_for_ranks_that_do_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def alone(_: TrainingArguments) -> None:
        calls.append(1)
        raise torch.distributed.DistNetworkError("the client socket has timed out")

    monkeypatch.setattr(TrainingArguments, "__post_init__", alone)
    with pytest.raises(torch.distributed.DistNetworkError):
        DertaConfig(str(tmp_path), seed=1)
    assert len(calls) == 1  # each would wait for ddp_timeout


def test_keys_to_blame_are_those_without_which_a_trial_succeeds() -> None:
    def trial(values: Mapping[str, int]) -> None:
        if values["a"] and values["b"]:
            raise KeyError("a and b")
        if values["c"]:
            raise TypeError("c")

    def blamed(**given: int) -> str:
        with pytest.raises((KeyError, TypeError)) as caught:
            trial(given)
        return str(blame(caught.value, given, dict.fromkeys("abc", 0), trial))

    assert blamed(a=1, b=2, c=0) == "a: 1, b: 2: KeyError: 'a and b'"
    assert blamed(a=0, b=2, c=3) == "c: 3: c"
    assert blamed(a=1, b=2, c=3) == "a: 1, b: 2: KeyError: 'a and b'"


def test_lower_is_better_for_watched_metrics() -> None:
    best = {
        "eval_sources": [SOURCE, {"path": "h", "role": "helpful"}],
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_steps": 5,
    }
    for metric in ("trade_off", "eval_asr"):
        assert from_file(metric_for_best_model=metric, **best).greater_is_better is False
    assert from_file(metric_for_best_model="live_rows", **best).greater_is_better is True


def test_missing_packages_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "derta.training.config.get_available_reporting_integrations", lambda: ["wandb"]
    )
    assert from_file(report_to="wandb").report_to == ["wandb"]
    with pytest.raises(ValueError, match="^report_to: 'tensorboard' is not installed, or nothing"):
        from_file(report_to=["wandb", "tensorboard"])
    monkeypatch.setattr(TrainConfig, "device", torch.device("cuda"))
    monkeypatch.setattr("derta.training.settings.find_spec", lambda name: True)
    config = from_file(use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert config.liger_kernel_config == {
        "rope": False,
        "fused_linear_cross_entropy": False,
        "cross_entropy": False,
    }
    monkeypatch.setattr("derta.training.settings.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^use_liger_kernel needs Liger: pip install .derta\[liger\]"
    ):
        from_file(use_liger_kernel=True)


def test_true_resumes_from_the_latest_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    given = {"output_dir": str(tmp_path), "resume_from_checkpoint": True}
    assert from_file(**given).resume_from_checkpoint == str(tmp_path / "checkpoint-10")
    bare = from_options("--output_dir", str(tmp_path), "--resume_from_checkpoint")
    assert bare.resume_from_checkpoint == str(tmp_path / "checkpoint-10")
    assert from_options("--resume_from_checkpoint", "a/b").resume_from_checkpoint == "a/b"
    assert not from_options("--resume_from_checkpoint", "false").resume_from_checkpoint


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    values = read_yaml(path)
    # bf16 is refused by transformers where there is no GPU and use_cpu is not set, and shards where
    # one process trains.
    alone = {"use_cpu": True, "dry_run": True}
    config = build(TrainConfig, {str(path): values, "command line": alone})
    assert config.refusal in ("Sorry", 19701, 23166)


def test_the_example_of_an_evaluation_is_valid() -> None:
    (path,) = (EXAMPLES[0].parent / "evaluation").glob("*.yaml")
    config = build(EvaluateConfig, {str(path): read_yaml(path)})
    assert config.prefill_depths[-1] == "whole"
    assert read_defences(config)["header"].reinsert_header


# What an installed `derta` does, interrupted where it first needs a module.
INTERRUPTED = """
import sys

class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

sys.modules.pop(sys.argv[1], None)
sys.meta_path.insert(0, Interrupt())
from derta.cli import main
sys.exit(main(["doctor"]))
"""


SETTINGS = sorted(COMMANDS.keys() - {"data", "reproduce"})


@pytest.mark.parametrize("command", SETTINGS)
def test_help_names_keys_that_exist_and_all_of_ours(command: str) -> None:
    config = settings_of(module_of(command))
    inherited = {field.name for field in fields(TrainingArguments)} if command == "train" else set()
    known = {field.name for field in fields(config)}
    named = set(re.findall(r"--(\w+)", help_of(command))) - {"key", "help"}
    assert named <= known
    assert known - inherited <= named


@pytest.mark.parametrize("command", SETTINGS)
def test_help_tells_type_range_and_default_of_every_key_in_100_columns(command: str) -> None:
    described = COMMANDS[command].config_class
    assert issubclass(settings_of(module_of(command)), described)
    page = help_of(command)
    assert max(map(len, page.splitlines())) <= 100
    for name, key in keys_of(described).items():
        told = page.partition(f"\n  --{name} ")[2].partition("\n  --")[0]
        entry = " ".join(told.split())
        assert " ".join(key.about.help.split()) in entry
        assert ("required" if key.required else "default: ") in entry
        assert key.about.range is None or key.about.range in entry


def test_help_of_a_setting_is_exact() -> None:
    page = help_of("plan")
    assert (
        "  --mlp_tile integer                Tokens of a tile by which the layers' MLPs run; null: "
        "the whole\n" + " " * 36 + "pack. Saves the activations of all tiles but one."
    ) in page
    assert "(in [0, 1); default: 0.05)" in page and "(at least 1; default: 4096)" in page
    assert "usage: derta eval curve MODEL DATA ... [--key value ...]" in help_of("eval curve")
    assert "usage: derta merge MODEL --output_dir ... [--key value ...]" in help_of("merge")


def test_defaults_agree_with_the_library() -> None:
    from derta.data import DertaCollator
    from derta.demo.run import VARIANTS
    from derta.objectives.defaults import DERTA
    from derta.training.settings import RECIPES as recipes

    collator = DertaCollator()
    assert all(getattr(collator.objective, name) == value for name, value in vars(DERTA).items())
    assert recipes["derta"] is DERTA
    assert build(settings_of(module_of("demo")), {}).variants == list(VARIANTS)


def test_choices_agree_with_the_library() -> None:
    assert set(get_args(CutPolicy)) == set(CUT_POLICIES)
    assert set(get_args(RtoDepth)) == set(RTO_DEPTHS)
    assert set(get_args(Recipe)) == set(RECIPES)


def test_settings_made_in_python_are_checked_too() -> None:
    with pytest.raises(ValueError, match="^cuts must be one of zero, uniform, official, deep, got"):
        DertaConfig(output_dir="o", use_cpu=True, cuts="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^unlikelihood_weight must lie in \[0, 1000\], got -0.5"):
        DertaConfig(output_dir="o", use_cpu=True, unlikelihood_weight=-0.5)
    with pytest.raises(ValueError, match=r"^rto_keep must lie in \[0, 1\], got nan"):
        DertaConfig(output_dir="o", use_cpu=True, rto_keep=float("nan"))
    with pytest.raises(ValueError, match="^lr_scheduler_kwargs must be finite, got {'a': nan}"):
        DertaConfig("o", use_cpu=True, lr_scheduler_kwargs={"a": float("nan")})
    assert DertaConfig("o", use_cpu=True).unlikelihood_weight == 0.0


# Help, which ends with an error where torch was imported for it.
LIGHT = """
import sys
from derta.cli import main
try:
    main(sys.argv[1:])
finally:
    sys.exit("torch" if {"torch", "transformers"} & sys.modules.keys() else 0)
"""


def test_help_needs_no_torch_and_less_than_a_second() -> None:
    for arguments in (["--help"], ["--version"], *([*name.split(), "--help"] for name in COMMANDS)):
        before = processor_s()
        subprocess.run([sys.executable, "-c", LIGHT, *arguments], check=True, capture_output=True)
        assert processor_s() - before < 1.0


def processor_s() -> float:
    """Return the processor time of all children that have ended; other work does not add to it."""
    used = os.times()
    return used.children_user + used.children_system


def test_a_lack_of_gpu_memory_is_reported_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB."

    def run(config: DoctorConfig) -> None:
        raise torch.OutOfMemoryError(f"{said}\nOf the allocated memory")

    monkeypatch.setattr("derta.cli.doctor.run", run)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == f"derta doctor: memory does not suffice: {said}\n"
    with pytest.raises(torch.OutOfMemoryError):
        main(["--traceback", "doctor"])


def test_environment_variables_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # restored afterwards
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert main(["doctor"]) == 0
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    assert main(["doctor"]) == 0
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"


def test_a_wrong_call_is_one_sentence_and_a_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "safe": "b", "harmful": "c"}\n{"prompt": "a", "safe": "b"}\n')
    missing = tmp_path / "none"
    train = ["--model", "m", "--output_dir", str(tmp_path), "--use_cpu", "--sources"]
    for arguments, message in (
        ([f"{missing}.yaml"], f"{missing}.yaml: no such configuration file\n"),
        ([*train, f"{{path: {missing}, role: safety}}"], f"{missing}: no such record file\n"),
        (
            [*train, f"{{path: {rows}, role: safety}}"],
            f"{rows}:2: fields: found prompt, safe, which is no known format",
        ),
    ):
        assert main(["train", *arguments]) == 1
        assert capsys.readouterr().err.startswith(f"derta train: {message}")
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "train", f"{missing}.yaml"])


def test_an_interrupt_is_reported_with_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: DoctorConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("derta.cli.doctor.run", interrupt)
    assert main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["argparse", "pathlib", "pydantic", "yaml", "torch"])
def test_an_interrupt_while_modules_load_prints_no_traceback(module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, module]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")
