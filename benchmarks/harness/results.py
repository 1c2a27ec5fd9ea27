"""Results of a script that is a question of its own: its options, its records and its table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.measuring import ROOT


def results_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that say where results go, see `results_folder`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--machine", required=True, help="folder of results/ to write into")
    parser.add_argument("--out", type=Path, help="another folder to write into")
    return parser


def results_folder(options: argparse.Namespace) -> Path:
    """Return the folder that the options name, made if it does not exist."""
    folder: Path = options.out or ROOT / "benchmarks" / "results" / options.machine
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_results(
    folder: Path,
    name: str,
    machine: Mapping[str, Any],
    records: Iterable[Mapping[str, Any]],
    table: str,
) -> None:
    """Write NAME.json, with one record to a line, and NAME.md."""
    lines = ",\n".join(json.dumps(record) for record in records)
    text = f'{{"machine": {json.dumps(machine)},\n"records": [\n{lines}\n]}}\n'
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / f"{name}.md").write_text(table, encoding="utf-8")
