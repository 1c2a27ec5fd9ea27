"""`derta data build`: many data sets joined into one, with a part held out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from derta.cli.settings.data import BuildConfig
from derta.data.records.building import build, read_sources
from derta.terminal import printable, say


def describe(summary: Mapping[str, Any], folder: Path) -> str:
    """Describe the files that were read and written, with the keys that train on them."""
    dropped = summary["dropped"]
    lines = ["read"]
    for source, kinds in summary["read"].items():
        counts = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds.items())
        lines.append(f"  {printable(source)}: {counts}")
    lines += [
        f"joined {summary['joined']:,} triples of halves, completed {summary['completed']:,}",
        "left out "
        + ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items()),
        "written",
    ]
    lines += [
        f"  {folder / name}: {file['rows']:,} rows" for name, file in summary["files"].items()
    ]
    for key, side in (("sources", "train"), ("eval_sources", "eval")):
        names = [name for name in summary["files"] if name.startswith(f"{side}.")]
        if names:
            lines.append(f"{key}:")
        for name in names:
            _, role, *rendered, _ = name.split(".")
            # A named format is read as it stands, even if texts seem to contradict their columns.
            form = ", format: triple" if role == "safety" and not rendered else ""
            lines.append(f"  - {{path: {folder / name}, role: {role}{form}}}")
    return "\n".join(lines)


def run(config: BuildConfig) -> None:
    """Write the data set.

    Raises:
        ValueError: as `read_records` and `build`.
        OSError: a file cannot be read or written.
    """
    folder = Path(config.output_dir)
    summary = build(
        read_sources(config.sources),
        folder,
        eval_share=config.eval_share,
        seed=config.seed,
        near=config.near,
        refusal_text=config.refusal_text,
    )
    say(describe(summary, folder))
