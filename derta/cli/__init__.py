"""The command line: `derta COMMAND ...`, see `derta.cli.commands`.

Nothing heavy is imported before a command has its arguments, and nothing slow before `main` can
answer an interrupt.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import signal
import sys
import typing
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from derta._version import __version__
from derta.terminal import guard, printable, say

if TYPE_CHECKING:
    import argparse

# The modules of commands that have actions as well.
MODULES = {"eval": "eval.evaluate"}
# transformers and PEFT import torchao and bitsandbytes if they are installed. These then report
# what they lack on this machine, or what will change; lm-eval reports its defaults.
TALKATIVE = ("bitsandbytes.backends.cpu.ops", "lm_eval", "torchao", "torch.utils._pytree")


def _parser() -> argparse.ArgumentParser:
    import argparse

    from derta.cli.commands import COMMANDS

    commands = {name: entry.summary for name, entry in COMMANDS.items() if " " not in name}
    parser = argparse.ArgumentParser(
        prog="derta",
        description="Decoupled refusal training (arXiv 2407.09121).",
        epilog="commands:\n"
        + "".join(f"  {name:8}{summary}\n" for name, summary in commands.items())
        + "\nderta COMMAND --help describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"derta {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    parser.add_argument("command", choices=list(commands), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    return parser


def _with_action(command: str, arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Join a command and its action, if the first argument names one."""
    from derta.cli.commands import actions_of

    if arguments and arguments[0] in actions_of(command):
        return f"{command} {arguments[0]}", arguments[1:]
    return command, arguments


def module_of(command: str) -> ModuleType:
    """Return the module of a command, with its action if it has one."""
    name = command.replace(" ", ".")
    return importlib.import_module(f"derta.cli.{MODULES.get(name, name)}")


def settings_of(module: ModuleType) -> Any:
    """Return the dataclass that the module's `run` takes."""
    return typing.get_type_hints(module.run)["config"]


def _run(command: str, arguments: Sequence[str]) -> None:
    import dataclasses
    from pathlib import Path

    from derta.cli.commands import COMMANDS, actions_of
    from derta.settings import build, read_options, read_yaml, shared

    entry = COMMANDS[command]
    bare = list(itertools.takewhile(lambda part: not part.startswith("--"), arguments))
    if not entry.settings:
        found = bare[0] if bare else ""
        raise ValueError(f"expected one of {', '.join(actions_of(command))}, got {found!r}")
    module = module_of(command)
    config_class = settings_of(module)
    sources: dict[str, dict[str, Any]] = {}
    near: dict[str, list[str]] = {}
    count = 0
    if entry.arguments is not None:
        sources["arguments"], count = _by_key(entry.arguments, bare)
    elif bare:
        values, count = read_yaml(Path(bare[0])), 1
        if (whole := _whole_run(config_class)) is not None:
            near[bare[0]] = [field.name for field in dataclasses.fields(whole)]
            values = values if whole is config_class else shared(values, config_class, whole)
        sources[bare[0]] = values
    sources["command line"] = read_options(arguments[count:])
    if hasattr(config_class, "filled"):
        given = {key: value for values in sources.values() for key, value in values.items()}
        sources = {"preset": config_class.filled(given), **sources}
    try:
        module.run(build(config_class, sources, near=near))
    except OSError as error:
        raise _with_key(error, sources) from error


def _with_key(error: OSError, sources: Mapping[str, Mapping[str, Any]]) -> OSError:
    """Return an error of the operating system as a sentence, after the key that led to the file."""
    if error.strerror is None or error.filename is None:
        return error
    from derta.settings.fields import leaves

    path = os.fsdecode(error.filename)
    keys = {key: value for values in sources.values() for key, value in values.items()}
    led = (key for key, value in keys.items() if any(_leads_to(one, path) for one in leaves(value)))
    place = next((f"{key}: " for key in led), "")
    return OSError(f"{place}{path}: {error.strerror.lower()}")


def _leads_to(value: Any, path: str) -> bool:
    """Return True for a path, and for a folder above it."""
    return isinstance(value, str) and (path == value or path.startswith(value.rstrip("/") + "/"))


def _whole_run(config_class: Any) -> Any:
    """Return the settings of a training run if the command's are a part of them, else None."""
    from derta.training.settings import RecipeSettings

    if not issubclass(config_class, RecipeSettings):
        return None
    from derta.cli.train import TrainConfig

    return TrainConfig


def _by_key(keys: Sequence[str], bare: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Return the values of the keys, and the number of arguments that they are."""
    from derta.cli.commands import LISTS
    from derta.settings import Text

    values: dict[str, Any] = {key: Text(text) for key, text in zip(keys, bare, strict=False)}
    if not keys or keys[-1] not in LISTS or len(bare) < len(keys):
        return values, len(values)
    values[keys[-1]] = list(bare[len(keys) - 1 :])
    return values, len(bare)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit status: 0, 1 after an error that the user can fix, 130 after an interrupt.
    """
    try:
        return _main(_parser().parse_args(argv))
    except KeyboardInterrupt:
        say("\ninterrupted", error=True)
        return 130


def _main(options: argparse.Namespace) -> int:
    command, arguments = _with_action(options.command, options.arguments)
    if {"-h", "--help"} & set(arguments):
        from derta.cli.commands import help_of

        say(help_of(command), end="")
        return 0
    from derta.cli import ranks
    from derta.cli.commands import COMMANDS

    # Nothing is reported to anybody, unless the user decides otherwise.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Packs differ in length: segments that grow leave fewer gaps in a GPU's memory.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which it overrides
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    guard()
    # Only a regular exit of Python removes temporary files, which may hold millions of examples.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    title = f"derta {command}"
    try:
        if not COMMANDS[command].on_ranks:
            ranks.refuse_several()
        elif ranks.several():
            ranks.run(
                title,
                lambda: _run(command, arguments),
                lambda error: None if options.traceback else _sentence_of(error),
            )
        _run(command, arguments)
    except Exception as error:
        sentence = _sentence_of(error)
        if options.traceback or sentence is None:
            raise
        say(f"{title}: {sentence}", error=True)
        return 1
    return 0


def _sentence_of(error: Exception) -> str | None:
    """Return what is said of an error that the user can fix, None of any other."""
    if isinstance(error, (ValueError, NotImplementedError, OSError, FloatingPointError)):
        return printable(str(error))
    if isinstance(error, MemoryError):  # the plan that follows has several lines
        return printable(str(error), lines=True)
    if isinstance(error, RuntimeError):
        from derta.modeling.offloading import ran_out_of_memory

        if ran_out_of_memory(error):
            return "memory does not suffice: " + printable(str(error).partition("\n")[0])
    return None
