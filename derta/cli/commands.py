"""The commands: their summaries, their settings and their help."""

from __future__ import annotations

import dataclasses
import importlib
import textwrap
from dataclasses import dataclass
from typing import Any

from derta.settings import describe_keys, keys_of
from derta.settings.help import WIDTH

# Arguments that take all that are left.
LISTS = ("files", "data", "results")


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        summary: one line of the list of commands.
        settings: module and name of its settings class in `derta.cli.settings`, empty for a command
            of actions only. A subclass of that class builds the run.
        arguments: the keys that its first arguments stand for; None: a configuration file.
        about: paragraphs of its help.
        epilog: the last paragraph of its help.
        on_ranks: if True, several processes may run it together.
    """

    summary: str
    settings: str = ""
    arguments: tuple[str, ...] | None = None
    about: str = ""
    epilog: str = ""
    on_ranks: bool = False

    @property
    def config_class(self) -> Any:
        """The settings that help describes."""
        module, _, name = self.settings.partition(".")
        return getattr(importlib.import_module(f"derta.cli.settings.{module}"), name)


COMMANDS = {
    "init": Command(
        "write the configuration of a training run from four answers",
        "training.InitConfig",
        (),
        "Asks on a terminal for what no key gives. Memory keys are those that derta plan finds for "
        "the GPU, if the model's configuration is on this machine.",
    ),
    "train": Command(
        "tune a model on triples and dialogues",
        "training.TrainSettings",
        about="Every key may stand in CONFIG.yaml or on the command line, which wins. derta schema "
        "prints a JSON Schema of CONFIG.yaml for editors.",
        epilog="Every field of transformers' TrainingArguments is a key too: --lr_scheduler_type, "
        "--warmup_steps, --weight_decay, --max_steps, --logging_steps, --eval_strategy, "
        "--save_strategy, --save_total_limit, --metric_for_best_model, --load_best_model_at_end, "
        "--report_to, --use_cpu, ...",
        on_ranks=True,
    ),
    "plan": Command(
        "estimate the memory of a training step and the longest pack that fits",
        "training.PlanConfig",
        about="A training run's CONFIG.yaml serves as well: its other keys have no effect here.",
    ),
    "schema": Command(
        "print the JSON Schema of a training run's configuration",
        "training.SchemaConfig",
        (),
        "Editors with a YAML language server complete and check a file whose first line is: "
        "# yaml-language-server: $schema=derta.schema.json",
    ),
    "eval": Command(
        "measure attack success, over-refusal and refusal curves of a model",
        "evaluation.EvaluateConfig",
        on_ranks=True,
    ),
    "merge": Command(
        "fold adapters into their model, or join the shards of a checkpoint",
        "tools.MergeConfig",
        ("model",),
    ),
    "chat": Command(
        "ask a model, and see where it refuses",
        "tools.ChatConfig",
        ("model",),
        "A line is a message, /new starts a new conversation. Every answer is the most likely one.",
    ),
    "demo": Command(
        "train and compare models of a harmless policy",
        "tools.DemoConfig",
        (),
        "One base model is tuned in every way that is compared, on equally many tokens, and "
        "attacked. A seed's results stay in output_dir as soon as they are there: the same command "
        "goes on where a killed one stopped.",
    ),
    "bench": Command(
        "measure the resources of the kernels on every GPU, compiled here",
        "tools.BenchConfig",
        ("what",),
        "Compiles every Triton launch ahead of time, and fails if one does not fit its GPU. Needs "
        "no GPU.",
    ),
    "doctor": Command(
        "list the packages and devices of this machine, or verify a model folder",
        "tools.DoctorConfig",
        ("folder",),
        "With FOLDER, a model, adapters or a checkpoint is verified by its configuration and the "
        "headers of its files, and described. Exits with 1 at the first fault.",
    ),
    "reproduce": Command("run the paper's experiments from the authors' own files"),
    "reproduce data": Command(
        "write the training files of the paper's variants",
        "reproduce.ReproduceDataConfig",
        about="Does what the authors' generate_training_data.py does, with a seed, and adds the "
        "file of RTO alone, which it lacks.",
    ),
    "reproduce table4": Command(
        "train and attack the paper's variants, and print its table 4 beside ours",
        "reproduce.Table4Config",
        about="Renders the authors' training files, trains the four variants with one "
        "configuration, evaluates them with derta eval's preset official, and prints attack "
        "success beside the paper's, with intervals. With --models, nothing is trained.",
    ),
    "data": Command("check, count and build record files"),
    "data validate": Command(
        "list every bad row of record files, in one pass",
        "data.ValidateConfig",
        ("files",),
        "Prints the place, field and reason of every bad row, then the counts of each file. Exits "
        "with 1 if any row is bad.",
    ),
    "data stats": Command(
        "count lengths, duplicates, leaks into evaluation, and a run's tokens",
        "data.StatsConfig",
        about="Shows no text of any record. A training run's CONFIG.yaml serves as well: its other "
        "keys have no effect here.",
    ),
    "data build": Command(
        "join many data sets into one, with a part held out",
        "data.BuildConfig",
        about="Joins safe and harmful answers to one prompt, drops duplicates, holds a part out, "
        "and writes train.ROLE.jsonl, eval.ROLE.jsonl and build.json, readable by their owner "
        "only. Prints the sources that train on it.",
    ),
    "eval calibrate": Command(
        "measure how judges agree with people's labels",
        "evaluation.CalibrateConfig",
        ("files",),
        on_ranks=True,
    ),
    "eval compare": Command(
        "run the paper's analyses over result files of any number of models",
        "evaluation.CompareConfig",
        ("results",),
    ),
    "eval tamper": Command(
        "measure attack success before and after fine-tuning by an attacker",
        "evaluation.TamperConfig",
        about="Tunes a copy in memory on harmful or harmless examples, and evaluates it before and "
        "after given numbers of steps. Every scenario of derta eval may be measured.",
    ),
    "eval curve": Command(
        "measure refusal and rank of the next token after every token of given responses",
        "evaluation.CurveConfig",
        ("model", "data"),
        "Generates nothing: one forward pass reads both.",
        on_ranks=True,
    ),
}


def actions_of(command: str) -> dict[str, str]:
    """Return the actions of a command with their summaries."""
    return {
        name.partition(" ")[2]: entry.summary
        for name, entry in COMMANDS.items()
        if name.startswith(f"{command} ")
    }


def usage_of(command: str) -> str:
    """Return the line that shows how a command is called."""
    entry = COMMANDS[command]
    parts = ["usage: derta", command]
    if not entry.settings:
        return " ".join([*parts, "ACTION ..."])
    keys = keys_of(entry.config_class)
    if entry.arguments is None:
        parts.append("[CONFIG.yaml]")
    for name in entry.arguments or ():
        shown = f"{name.upper()} ..." if name in LISTS else name.upper()
        parts.append(shown if keys[name].required else f"[{shown}]")
    given = entry.arguments or ()
    if entry.arguments is not None:
        parts += [f"--{key} ..." for key in keys if keys[key].required and key not in given]
    return " ".join([*parts, "[--key value ...]"] if keys else parts)


def help_of(command: str) -> str:
    """Return the whole help of a command."""
    entry = COMMANDS[command]
    summary = entry.summary[0].upper() + entry.summary[1:] + "."
    parts = [usage_of(command), *map(_indented, filter(None, (summary, entry.about)))]
    if actions := actions_of(command):
        width = max(map(len, actions))
        parts.append(
            "\n".join(["actions:", *(f"  {name:{width}}  {one}" for name, one in actions.items())])
            + f"\n\nderta {command} ACTION --help describes an action."
        )
    if entry.settings and dataclasses.fields(entry.config_class):
        parts.append(describe_keys(entry.config_class))
    if entry.epilog:
        parts.append(textwrap.fill(entry.epilog, WIDTH, break_on_hyphens=False))
    return "\n\n".join(parts) + "\n"


def _indented(text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )
