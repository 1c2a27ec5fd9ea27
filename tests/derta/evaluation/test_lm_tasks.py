"""lm-eval's tasks run on a loaded model, without a network if their data are local."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from derta.cli import main
from derta.evaluation import lm_tasks
from derta.evaluation.lm_tasks import check_tasks, run_tasks
from tiny import tiny_model, tiny_tokenizer

TASK = """\
task: fences
dataset_path: json
dataset_kwargs: {data_files: {test: "DATA"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["red", "blue"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a task file with its data beside it, and return its path."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"Fence number {n} is", "label": n % 2} for n in range(6)]
    data = tmp_path / "fences.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "fences.yaml"
    path.write_text(TASK.replace("DATA", str(data)))
    return str(path)


def test_a_local_task_is_scored_by_lm_eval(task: str) -> None:
    model = tiny_model("llama").train()
    figures = run_tasks(model, tiny_tokenizer(), [task], batch_size=4)
    assert figures.keys() == {"fences"}
    assert figures["fences"].keys() == {"acc"}
    assert figures["fences"]["acc"] * 6 == pytest.approx(round(figures["fences"]["acc"] * 6))
    assert model.training


def test_lm_eval_prints_nothing_to_the_terminal(
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # which is no git repository
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    arguments = ["--model", "model", "--lm_eval", task, "--output_dir", "out", "--device", "cpu"]
    assert main(["eval", *arguments]) == 0
    assert "fatal" not in capfd.readouterr().err
    assert not [said for said in caplog.records if said.name.startswith("lm_eval")]


def test_lm_eval_is_needed_only_for_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_tasks(tiny_model("llama"), tiny_tokenizer(), [], batch_size=4) == {}
    with pytest.raises(
        ValueError, match=r"lm_eval needs the lm-eval package: pip install 'derta\["
    ):
        check_tasks(["fences.yaml"])


def test_a_missing_task_file_is_refused_by_name() -> None:
    with pytest.raises(FileNotFoundError, match="lm_eval: none.yaml: no such task file"):
        check_tasks(["none.yaml"])


def test_an_unknown_task_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # Listing the default tasks takes half a minute.
    bare = TaskManager(include_defaults=False)
    monkeypatch.setattr(lm_tasks, "_manager", lambda with_defaults: bare)
    with pytest.raises(ValueError, match="lm_eval: expected a task .*, got 'fences'"):
        check_tasks(["fences"])
