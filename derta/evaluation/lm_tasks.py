"""Tasks of EleutherAI's lm-eval, run by that library on a model that is loaded already."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from derta.modeling.introspection import evaluating

SUFFIXES = (".yaml", ".yml")


def check_tasks(tasks: Sequence[str]) -> None:
    """Makes sure that lm-eval knows every task.

    Raises:
        ValueError: lm-eval is not installed, or knows no task of that name.
        FileNotFoundError: a task's file is not there.
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
                raise FileNotFoundError(f"lm_eval: {task}: no such file of a task")
        elif task not in _manager(with_defaults=True).all_tasks:
            raise ValueError(
                f"lm_eval: {task!r} is none of lm-eval's tasks, expected one or a file"
            )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """What lm-eval finds, at its own settings: requests are not put into the chat template.

    A task by name has lm-eval fetch its data set, unless that is in the local cache; a task's file
    may name local data.

    Args:
        model: a causal language model, plain or under PEFT.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups, or YAML files of tasks.
        batch_size: requests a batch.

    Returns:
        name of each task or group to its figures, which are called as lm-eval does it
        ("exact_match,strict-match"), or without their filter where there is none ("acc").

    Raises:
        ValueError, FileNotFoundError: as `check_tasks`.
    """
    if not tasks:
        return {}
    check_tasks(tasks)
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    by_name = any(not task.endswith(SUFFIXES) for task in tasks)
    # It asks git of what commit the working directory is, and git complains where it is of none.
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
    """lm-eval keeps names, counts and standard errors beside what a task measures."""
    return "," in name and "_stderr," not in name and isinstance(value, int | float)


@functools.cache
def _manager(*, with_defaults: bool) -> Any:
    """Knows the tasks; those that lm-eval brings take it half a minute to list."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_defaults)
