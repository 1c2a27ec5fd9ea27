"""`derta data build`: one data set out of many, with a part held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derta.data.records.building import build, check_new, read_sources
from derta.data.records.duplicates import NEAR, check_near
from derta.data.records.sources import Source
from derta.outputs import check_folder


@dataclass(kw_only=True)
class BuildConfig:
    """A build.

    Args:
        sources: what it is made of, as in training; a source's weight is written into its rows.
        output_dir: a folder that is not there yet, or is empty.
        eval_share: share of requests that are held out, in [0, 1).
        seed: another one holds out others.
        near: training examples whose request is as near as this to one that is held out are left
            out, in [0.5, 1]; null leaves them.
        refusal_text: what completes harmful responses without a safe one, for trying things out;
            they are left out otherwise.

    Raises:
        ValueError: output_dir holds something, or a number is out of its range.
    """

    sources: list[Source]
    output_dir: str
    eval_share: float = 0.05
    seed: int = 0
    near: float | None = NEAR
    refusal_text: str | None = None

    def __post_init__(self) -> None:
        check_folder("output_dir", self.output_dir)
        check_new(Path(self.output_dir))
        check_near(self.near)


def describe(summary: Mapping[str, Any], folder: Path) -> str:
    """What was made of what, and the keys of a configuration that trains on it."""
    dropped = summary["dropped"]
    lines = ["read"]
    for source, kinds in summary["read"].items():
        counts = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds.items())
        lines.append(f"  {source}: {counts}")
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
            # Named, it is read as it stands, also where its texts seem to contradict its columns.
            form = ", format: triple" if role == "safety" and not rendered else ""
            lines.append(f"  - {{path: {folder / name}, role: {role}{form}}}")
    return "\n".join(lines)


def run(config: BuildConfig) -> None:
    """Writes the data set.

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
    print(describe(summary, folder))
