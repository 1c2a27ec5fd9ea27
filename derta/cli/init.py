"""`derta init`: the configuration of a training run, from four answers."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig
from transformers.utils import logging

from derta.cli.plan import planned_step, read_config
from derta.cli.settings.training import InitConfig, PlanConfig, TrainSettings
from derta.data.records.sources import Source
from derta.memory.plan import MLP_TILE, Triples, longest_pack, needed, turns
from derta.memory.step import StepMemory, StepSettings
from derta.modeling.introspection import context_of
from derta.objectives.defaults import DERTA, MAX_LENGTH, MAX_TOKENS
from derta.outputs import write_new
from derta.settings import Text, build, keys_of, read_text
from derta.settings.help import WIDTH
from derta.terminal import say

QUESTIONS = {
    "model": "model (a folder, or a name on the model hub)",
    "data": "data (path:role, path:role, ...; roles: safety, helpful, borderline)",
    "method": "method (full, lora or qlora)",
    "gpu": "memory of the GPU in GiB (0: no GPU)",
}
LARGE = 40  # GiB of a GPU on which MLPs of an unknown model run untiled


def ask(config: InitConfig) -> InitConfig:
    """Ask on the terminal for the answers that no key gives.

    Raises:
        ValueError: answers are missing and there is no terminal, or the input ends.
    """
    answers = {name: getattr(config, name) for name in QUESTIONS}
    missing = [name for name, answer in answers.items() if answer is None]
    if missing and not sys.stdin.isatty():
        given = " ".join(f"--{name} ..." for name in missing)
        raise ValueError(f"missing {', '.join(missing)}: give {given}, or run on a terminal")
    for name in missing:
        while answers[name] is None:
            try:
                typed = input(f"{QUESTIONS[name]}: ").strip()
            except EOFError:
                raise ValueError(f"missing {name}: the input ended") from None
            try:
                if typed:
                    one = build(InitConfig, {"": {name: Text(typed), "output": config.output}})
                    if name == "data":
                        read_sources(one.data or [])
                    answers[name] = getattr(one, name)
            except ValueError as error:
                say(str(error).removeprefix(": "), error=True)
    return dataclasses.replace(config, **answers)


def read_sources(data: list[str]) -> list[Source]:
    """Return the sources of `path:role` texts, several of which may be joined by commas.

    Raises:
        ValueError: there is none, or one has no path or no known role.
    """
    sources = []
    for text in filter(None, (part.strip() for one in data for part in one.split(","))):
        path, _, role = text.rpartition(":")
        try:
            sources.append(Source(path=path, role=role))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"data: expected path:role, got {text!r}: {error}") from error
        if not path:
            raise ValueError(f"data: expected path:role, got {text!r}")
    if not sources:
        raise ValueError("data: expected at least one path:role, got none")
    return sources


def memory_keys(step: StepSettings, triples: Triples) -> dict[str, Any]:
    """Return max_tokens and the keys that make packs of so many tokens fit.

    Keys are set in the order of `derta plan`, as long as packs of the default size do not fit. If
    they do not fit with all of them, max_tokens is the longest pack that does.

    Raises:
        ValueError: no pack fits.
    """
    keys: dict[str, Any] = {}
    tried: set[str] = set()
    peak = needed(StepMemory(step), MAX_TOKENS, triples).total()
    while peak > step.capacity:
        left = [
            (line, turn)
            for line, turn in turns(step)
            if line not in tried and not line.startswith("method:")
        ]
        if not left:
            break
        line, turn = left[0]
        tried.add(line)
        with contextlib.suppress(ValueError):  # experts are not tiled
            less = needed(StepMemory(turn(step)), MAX_TOKENS, triples).total()
            if less < peak:
                step, peak = turn(step), less
                keys |= read_text(line)
    tokens = MAX_TOKENS if peak <= step.capacity else longest_pack(StepMemory(step), triples)
    if triples.harmful(tokens) <= triples.branches:
        raise ValueError(
            f"gpu: no pack of method: {step.method.method} fits, choose another method or a larger "
            "GPU"
        )
    return {"max_tokens": tokens, **keys}


def chosen_keys(config: InitConfig, model_config: PreTrainedConfig | None) -> dict[str, Any]:
    """Return the keys that depend on method, GPU and model.

    Args:
        config: the answers, complete.
        model_config: the model's configuration, if it is on this machine.

    Raises:
        ValueError: no pack fits the GPU.
    """
    assert config.model is not None and config.method is not None and config.gpu is not None
    full = config.method == "full"
    keys: dict[str, Any] = {"method": config.method, "learning_rate": 2e-5 if full else 1e-4}
    if model_config is not None:
        keys["max_length"] = min(MAX_LENGTH, context_of(model_config))
    if config.gpu == 0:
        return keys | {"dtype": "float32", "use_cpu": True}
    keys["dtype"] = "float32" if full else "bfloat16"
    if config.method != "lora":
        keys["bf16"] = True
    if model_config is None:
        tile = {} if config.gpu >= LARGE else {"mlp_tile": MLP_TILE}
        return keys | {"gradient_checkpointing": True, **tile}
    given = {name: keys[name] for name in ("method", "dtype", "bf16") if name in keys}
    plan = PlanConfig(model=config.model, gpu=config.gpu, **given)
    triples = Triples(DERTA.branches, DERTA.rto_keep)
    return keys | memory_keys(planned_step(model_config, plan), triples)


# Keys that people change first. They are written with their defaults.
DEFAULTS = (
    "refusal",
    "examples_per_step",
    "max_length",
    "max_tokens",
    "num_train_epochs",
    "seed",
)
GROUPS = {
    "": ("model", "sources", "output_dir"),
    "Objective": ("recipe", "refusal"),
    "Batches: lower max_tokens if memory runs out, the gradient stays the same": (
        "examples_per_step",
        "max_length",
        "max_tokens",
    ),
    "Tuning method": ("method", "lora_r", "lora_dropout", "dtype", "bf16"),
    "Memory": (
        "gradient_checkpointing",
        "mlp_tile",
        "offload_checkpoints",
        "use_liger_kernel",
        "optim",
    ),
    "Schedule": (
        "learning_rate",
        "num_train_epochs",
        "logging_steps",
        "save_strategy",
        "seed",
        "use_cpu",
    ),
}


def yaml_text(values: dict[str, Any], header: str) -> str:
    """Return a configuration with a comment for every key of ours.

    Args:
        values: value by key; each has its place in `GROUPS`.
        header: the lines of the first comment.
    """
    described = keys_of(TrainSettings)
    lines = [f"# {line}" for line in header.splitlines()]
    for title, names in GROUPS.items():
        present = [name for name in names if name in values]
        if present and title:
            lines += ["", f"# {title}."]
        for name in present:
            line = _line(name, values[name])
            told = described[name].about.help if name in described else ""
            told = re.split(r"[.:;](?= |$)", told)[0]
            if told and "\n" not in line and len(line) + len(told) + 4 <= WIDTH:
                line += f"  # {told}"
            elif told:
                lines.append(f"# {told}")
            lines.append(line)
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    """Return a key and its value as YAML, a list by lines."""
    dumped = yaml.safe_dump(value, default_flow_style=None, width=2**20, allow_unicode=True)
    text = dumped.removesuffix("...\n").rstrip()
    between = f"\n{textwrap.indent(text, '  ')}" if isinstance(value, list) else f" {text}"
    return f"{name}:{between}"


def run(config: InitConfig) -> None:
    """Write the configuration.

    Raises:
        ValueError: answers are missing or wrong, or no pack fits the GPU.
        OSError: the file cannot be written.
    """
    logging.set_verbosity_error()
    config = ask(config)
    assert config.model is not None and config.data is not None
    sources = read_sources(config.data)
    model_config = None
    with contextlib.suppress(OSError):  # a model that is not on this machine yet
        model_config = read_config(config.model, local_files_only=True)
    described = keys_of(TrainSettings)
    defaults = [*DEFAULTS, *([] if config.method == "full" else ["lora_r"])]
    values = {
        "model": config.model,
        "sources": [{"path": one.path, "role": one.role} for one in sources],
        "output_dir": f"outputs/{Path(config.model).resolve().name}-derta",
        "resume": "auto",
        "recipe": "derta",
        "logging_steps": 10,
        "save_strategy": "epoch",
        **{name: described[name].default for name in defaults},
        **chosen_keys(config, model_config),
    }
    gpu = f"{config.gpu:g} GiB of GPU memory" if config.gpu else "a machine without a GPU"
    header = (
        f"Written by derta init for {gpu}. derta train --help describes every key.\n"
        f"  derta train {config.output} --dry_run    shows a pack\n"
        f"  derta train {config.output}              begins the run, or continues it after a kill"
    )
    if model_config is None:
        header += (
            "\nThe model's configuration was not on this machine. Check the memory keys with\n"
            f"  derta plan {config.output} --gpu {config.gpu:g}"
        )
    write_new("output", config.output, yaml_text(values, header).encode())
    say(f"configuration: {config.output}; next: derta train {config.output} --dry_run")
