"""The command line: `derta train | plan | eval | merge | chat | demo | bench | doctor`.

Nothing heavy is imported before a command has its arguments, and nothing that takes any time before
`main` is there to answer an interrupt.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from derta._version import __version__
from derta.cli.usage import SUMMARY, USAGE

if TYPE_CHECKING:
    import argparse

# What the first argument of a command is, where it is not a configuration file.
BARE = {"bench": "--what", "merge": "--model", "chat": "--model"}
# transformers and PEFT import torchao and bitsandbytes where these are installed, which then say
# what they lack on this machine or will change.
TALKATIVE = ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree")


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


def _run(command: str, arguments: Sequence[str]) -> None:
    from pathlib import Path

    from derta.cli.arguments import build, read_options, read_yaml

    module = importlib.import_module(f"derta.cli.{command}")
    sources: dict[str, dict[str, Any]] = {}
    if arguments and not arguments[0].startswith("--"):
        first, *arguments = arguments
        if command in BARE:
            arguments = [BARE[command], first, *arguments]
        else:
            sources[first] = read_yaml(Path(first))
    if command == "plan":
        sources = {name: module.of_training(values) for name, values in sources.items()}
    sources["command line"] = read_options(arguments)
    module.run(build(module.Config, sources))


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
    if {"-h", "--help"} & set(options.arguments):
        print(USAGE[options.command], end="")
        return 0
    # Nothing is reported to anybody, unless the user has decided otherwise.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Packs differ in length: segments that grow leave fewer gaps in a GPU's memory.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    try:
        _run(options.command, options.arguments)
    except (ValueError, NotImplementedError, OSError, FloatingPointError, MemoryError) as error:
        if options.traceback:
            raise
        print(f"derta {options.command}: {error}", file=sys.stderr)
        return 1
    return 0
