"""The command line: `derta COMMAND ...`, see `derta.cli.usage`.

Nothing heavy is imported before a command has its arguments, and nothing that takes any time before
`main` is there to answer an interrupt.
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
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from derta._version import __version__
from derta.cli.usage import ACTIONS, SUMMARY, USAGE

if TYPE_CHECKING:
    import argparse

# Modules of commands that have actions beside.
MODULES = {"eval": "eval.evaluate"}
# What the first arguments of a command are, where they are not a configuration file.
BARE = {
    "bench": ("what",),
    "merge": ("model",),
    "chat": ("model",),
    "data validate": ("files",),
    "eval calibrate": ("files",),
    "eval compare": ("results",),
    "eval curve": ("model", "data"),
}
# Which of those take all that are left.
LISTS = {"files", "data", "results"}
# transformers and PEFT import torchao and bitsandbytes where these are installed, which then say
# what they lack on this machine or will change; lm-eval says which defaults it takes.
TALKATIVE = ("bitsandbytes.backends.cpu.ops", "lm_eval", "torchao", "torch.utils._pytree")


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="derta",
        description="Decoupled refusal training (arXiv 2407.09121).",
        epilog="commands:\n"
        + "".join(f"  {name:8}{summary}\n" for name, summary in SUMMARY.items())
        + "\nderta COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"derta {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    parser.add_argument("command", choices=list(SUMMARY), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    return parser


def _with_action(command: str, arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """A first argument that names one of a command's actions becomes part of the command."""
    if arguments and arguments[0] in ACTIONS.get(command, ()):
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
    from pathlib import Path

    from derta.settings import build, read_options, read_yaml

    module = module_of(command)
    bare = list(itertools.takewhile(lambda part: not part.startswith("--"), arguments))
    if not hasattr(module, "run"):
        found = bare[0] if bare else ""
        raise ValueError(f"expected one of {', '.join(ACTIONS[command])}, got {found!r}")
    sources: dict[str, dict[str, Any]] = {}
    if command in BARE:
        sources["arguments"], count = _by_key(BARE[command], bare)
    elif bare:
        sources[bare[0]], count = read_yaml(Path(bare[0])), 1
    else:
        count = 0
    arguments = arguments[count:]
    if command in ("plan", "data stats"):
        sources = {name: module.of_training(values) for name, values in sources.items()}
    sources["command line"] = read_options(arguments)
    module.run(build(settings_of(module), sources))


def _by_key(keys: Sequence[str], bare: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Values of the keys, and how many of the arguments they are."""
    from derta.settings import Text

    values: dict[str, Any] = {key: Text(text) for key, text in zip(keys, bare, strict=False)}
    if keys[-1] not in LISTS or len(bare) < len(keys):
        return values, len(values)
    values[keys[-1]] = list(bare[len(keys) - 1 :])
    return values, len(bare)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        the exit status: 0, 1 after an error that was the user's to mend, 130 when interrupted.
    """
    try:
        return _main(_parser().parse_args(argv))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _main(options: argparse.Namespace) -> int:
    command, arguments = _with_action(options.command, options.arguments)
    if {"-h", "--help"} & set(arguments):
        print(USAGE[command], end="")
        return 0
    # Nothing is reported to anybody, unless the user has decided otherwise.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Packs differ in length: segments that grow leave fewer gaps in a GPU's memory.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name, which would be passed over
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    # Temporary files, of millions of examples, go only where Python ends by itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _run(command, arguments)
    except (ValueError, NotImplementedError, OSError, FloatingPointError, MemoryError) as error:
        if options.traceback:
            raise
        print(f"derta {command}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from derta.modeling.offloading import ran_out_of_memory

        if options.traceback or not ran_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0]
        print(f"derta {command}: memory does not suffice: {said}", file=sys.stderr)
        return 1
    return 0
