"""`derta eval compare`: the paper's analyses over result files of any number of models."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from derta.cli.settings.evaluation import CompareConfig, ResultFiles
from derta.evaluation import KeywordJudge
from derta.evaluation.measures.results import leaves
from derta.evaluation.reporting.comparison import (
    ANALYSES,
    compare,
    format_comparison,
    write_comparison,
)
from derta.evaluation.reporting.official_results import official_entry, read_prompts
from derta.modeling.loading import load_tokenizer
from derta.terminal import printable, say


def find_files(source: str) -> list[Path]:
    """Return the files of a path or a pattern. A folder stands for its summary, or for its JSON.

    Raises:
        FileNotFoundError: no file matches.
    """
    path = Path(source)
    if (path / "summary.json").is_file():
        return [path / "summary.json"]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".jsonl"))
    else:
        found = [path] if path.is_file() else sorted(map(Path, glob.glob(source)))
    if not found:
        raise FileNotFoundError(f"{source}: no such result file, nor a folder with any")
    return found


def by_attack(source: ResultFiles) -> dict[str, Path]:
    """Return result files by their attack.

    Raises:
        ValueError: two files have one attack, or a pattern in a mapping matches several files.
        FileNotFoundError: as `find_files`.
    """
    files: dict[str, Path] = {}
    if isinstance(source, dict):
        for attack, path in source.items():
            file, *others = find_files(path)
            if others:
                raise ValueError(f"results: {attack}: expected one file, got {path}: {file}, ...")
            files[attack] = file
        return files
    for path in [source] if isinstance(source, str) else source:
        for file in find_files(path):
            attack = file.resolve().parent.name
            if attack in files:
                raise ValueError(
                    f"results: {files[attack]} and {file} lie in one folder, after which attacks "
                    "are called; name attack or model: '{model: {attack: file}}'"
                )
            files[attack] = file
    if not files:
        raise ValueError("results: expected at least one file of every model, got none")
    return files


def read_variants(path: Path) -> dict[str, dict[str, Any]] | None:
    """Return the variants of a summary.json, None if the file is something else.

    Raises:
        ValueError: no evaluation writes such variants.
    """
    try:
        summary = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    if not isinstance(summary, dict) or "variants" not in summary:
        return None
    variants = summary["variants"]
    if not isinstance(variants, dict) or not all(map(_is_counted, variants.values())):
        raise ValueError(f"{path}: variants: expected those of derta eval, each with its counts")
    return variants


def _is_counted(entry: Any) -> bool:
    """Decide if an entry of a summary has the counts that figures are made of."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("counts"), dict)
        and all(
            isinstance(count, dict) and {"hits", "trials", "empty"} <= count.keys()
            for _, count in leaves(entry["counts"])
        )
    )


def read_results(config: CompareConfig) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the entries of all models, see `compare`, and notes on what they leave out.

    Raises:
        ValueError: two models have one name, a summary stands beside other files, or as
            `by_attack`, `read_variants` and `official_entry`.
        OSError: a file cannot be read.
    """
    judge, prompts = KeywordJudge(config.keywords), read_prompts(*config.prompts)
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer, None, local_files_only=True)
    models: dict[str, dict[str, Any]] = {}
    notes = []
    for name, source in _named(config):
        files = by_attack(source)
        first = next(iter(files.values()))
        variants = read_variants(first)
        if variants is None:
            own = name or (Path(source).stem if isinstance(source, str) else first.stem)
            entry, left = official_entry(
                files,
                judge,
                prompts=prompts,
                tokenizer=tokenizer,
                keep_repeats=config.keep_repeats,
            )
            found = {own: entry}
            notes += [f"{own}, {note}" for note in left]
        elif len(files) > 1:
            raise ValueError(f"results: {first} is a summary, which stands for a model by itself")
        else:
            alone = len(variants) == 1
            found = {
                variant if name is None else name if alone else f"{name} {variant}": entry
                for variant, entry in variants.items()
            }
        for own in found:
            if own in models:
                raise ValueError(
                    f"results: two models are called {own}; name them: --results '{{before: "
                    "a/summary.json, after: b/summary.json}'"
                )
        models |= found
    return models, notes


def _named(config: CompareConfig) -> list[tuple[str | None, ResultFiles]]:
    if isinstance(config.results, dict):
        return list(config.results.items())
    names: Sequence[str | None] = config.names or [None] * len(config.results)
    return list(zip(names, config.results, strict=True))


def run(config: CompareConfig) -> None:
    """Read every model's results, print the tables, and write the page to `output_dir`."""
    models, notes = read_results(config)
    comparison = compare(
        models,
        analyses=ANALYSES if config.analysis == "all" else [config.analysis],
        recipes=config.recipes,
        notes=notes,
    )
    page = write_comparison(comparison, config.output_dir)
    say(format_comparison(comparison))
    for note in comparison["notes"]:
        say(f"note: {printable(note)}")
    say(f"page: {page}")
