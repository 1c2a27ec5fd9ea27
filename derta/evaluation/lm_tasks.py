"""Tasks of EleutherAI's lm-eval, run by that library on a loaded model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from derta.modeling.introspection import evaluating
from derta.modeling.shared_work import ranks

SUFFIXES = (".yaml", ".yml")


def check_tasks(tasks: Sequence[str]) -> None:
    """Check that lm-eval knows every task.

    Raises:
        ValueError: lm-eval is not installed, or has no task of that name.
        FileNotFoundError: a task's file does not exist.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError:
        raise ValueError(
            "lm_eval needs the lm-eval package: pip install 'derta[lm-eval]'"
        ) from None
    for task in tasks:
        if task.endswith(SUFFIXES):
            if not Path(task).is_file():
                raise FileNotFoundError(f"lm_eval: {task}: no such task file")
        elif task not in _manager(with_defaults=True).all_tasks:
            raise ValueError(f"lm_eval: expected a task of lm-eval or a task file, got {task!r}")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Run tasks at lm-eval's own settings, without the chat template.

    For a task by name, lm-eval downloads the data set unless it is in the local cache. A task file
    may name local data. Inside `over_ranks`, the first rank runs all tasks: lm-eval forms batches
    across them.

    Args:
        model: a causal language model, plain or under PEFT.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups, or YAML files of tasks.
        batch_size: requests a batch.

    Returns:
        name of each task or group to its figures, under lm-eval's names
        ("exact_match,strict-match"), without the filter if there is none ("acc").

    Raises:
        ValueError, FileNotFoundError: as `check_tasks`.
    """
    if not tasks:
        return {}
    check_tasks(tasks)
    return ranks().from_first(lambda: _run_tasks(model, tokenizer, tasks, batch_size))


def _run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int,
) -> dict[str, dict[str, float]]:
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    by_name = any(not task.endswith(SUFFIXES) for task in tasks)
    # lm-eval asks git for the current commit, and git complains outside of a repository.
    no_commit = mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
    with evaluating(model), no_commit:
        found: Any = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=_manager(with_defaults=by_name),
            log_samples=False,
            bootstrap_iters=0,
        )
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in figures.items()
            if _is_figure(name, value)
        }
        for task, figures in (found["results"] | found.get("groups", {})).items()
    }


def _is_figure(name: str, value: Any) -> bool:
    """Tell figures from the names, counts and standard errors beside them."""
    return "," in name and "_stderr," not in name and isinstance(value, int | float)


@functools.cache
def _manager(*, with_defaults: bool) -> Any:
    """Return lm-eval's task manager; listing the default tasks takes half a minute."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_defaults)
