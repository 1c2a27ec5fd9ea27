"""Settings from files and options: every wrong one is named, with the nearest right one."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from derta.cli import main
from derta.cli.arguments import build, read_options, read_yaml
from derta.cli.train import Config
from derta.cli.usage import SUMMARY, USAGE

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def test_options_are_yaml_values_and_a_bare_key_is_true() -> None:
    arguments = "--a 1 --b=[x,y] --max_steps -1 --save_strategy no --use_cpu false --dry-run"
    assert read_options(arguments.split()) == {
        "a": 1,
        "b": ["x", "y"],
        "max_steps": -1,
        "save_strategy": "no",
        "use_cpu": False,
        "dry_run": True,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stray"], "expected --key value, got 'stray'"),
        (["--a", "[1,"], "--a: '[1,' is not a value that YAML can read"),
    ],
)
def test_malformed_options_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_options(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [\n", ":3: "),
        ("a: 1\nb: 2\na: 3\n", ":3: the key 'a' is given twice"),
        ("- a\n", "expected `key: value` lines, got list"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=re.escape(f"{path}{message}" if message[0] == ":" else message)
    ):
        read_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such configuration file"):
        read_yaml(tmp_path / "none.yaml")


BASE = {"model": "m", "train_files": ["t"], "output_dir": "o", "use_cpu": True}


def test_numbers_that_yaml_reads_as_text_become_numbers() -> None:
    config = build(Config, {**BASE, "learning_rate": "1e-4", "refusal": 5}, "run.yaml")
    assert config.learning_rate == 1e-4
    assert config.refusal == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"learnign_rate": 1},
            "run.yaml: unknown key 'learnign_rate'; did you mean 'learning_rate'?",
        ),
        ({"branches": "two"}, "run.yaml: branches: expected int, got 'two'"),
        ({"cuts": "random"}, "run.yaml: cuts: expected"),
        ({"train_files": "a.jsonl"}, "run.yaml: train_files: expected list[str], got 'a.jsonl'"),
        ({"rto_keep": 1.5}, "rto_keep must lie in [0, 1], got 1.5"),
        ({"branches": -1}, "branches must be at least 0, got -1"),
        ({"branches": 0, "rto_keep": 0}, "a triple would train nothing"),
        ({"rto_weight": -1}, "rto_weight must be at least 0, got -1.0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps must stay 1, got 4"),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "liger_kernel_config must leave fused_linear_cross_entropy and cross_entropy off",
        ),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size must stay 1, got 8"),
    ],
)
def test_wrong_settings_are_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(Config, {**BASE, **values}, "run.yaml")


def test_missing_settings_are_listed() -> None:
    with pytest.raises(ValueError, match="run.yaml: missing output_dir, model$"):
        build(Config, {"train_files": ["t"]}, "run.yaml")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    values = read_yaml(path)
    # bf16 is refused by transformers where there is no GPU and use_cpu is not set.
    config = build(Config, {**values, "use_cpu": True}, str(path))
    assert config.refusal == "Sorry"


@pytest.mark.parametrize("command", SUMMARY)
def test_help_names_keys_that_exist_and_all_of_ours(command: str) -> None:
    config = importlib.import_module(f"derta.cli.{command}").Config
    inherited = {field.name for field in fields(TrainingArguments)} if command == "train" else set()
    known = {field.name for field in fields(config)}
    named = set(re.findall(r"--(\w+)", USAGE[command])) - {"key"}
    named |= {"what"} if command == "bench" else set()  # which stands there without its name
    assert named <= known
    assert known - inherited <= named


def test_help_needs_no_torch_and_less_than_a_second() -> None:
    for arguments in (["--help"], ["--version"], *([name, "--help"] for name in SUMMARY)):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "derta", *arguments], check=True, capture_output=True)
        assert time.perf_counter() - started < 1.0


def test_a_wrong_call_is_one_sentence_and_a_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "safe": "b", "harmful": "c"}\n{"prompt": "a", "safe": "b"}\n')
    missing = tmp_path / "none"
    train = ["--model", "m", "--output_dir", str(tmp_path), "--use_cpu", "--train_files"]
    for arguments, message in (
        ([f"{missing}.yaml"], f"{missing}.yaml: no such configuration file\n"),
        ([*train, f"[{missing}]"], f"{missing}: no such record file\n"),
        ([*train, f"[{rows}]"], f"{rows}:2: fields: found prompt, safe, which is no known format"),
    ):
        assert main(["train", *arguments]) == 1
        assert capsys.readouterr().err.startswith(f"derta train: {message}")
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "train", f"{missing}.yaml"])


def test_an_interrupted_run_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("derta.cli.doctor.run", interrupt)
    assert main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err
