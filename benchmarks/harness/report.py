"""Make tables and plots from records; `python -m benchmarks.harness.report FOLDER` remakes all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness.question import NAMES, Question, Values, number, question_named
from benchmarks.harness.records import Record, figures, load_groups, verdicts

HEADER = """\
# {title}, measured

Made from [the records]({name}.json) by `python -m benchmarks.harness.report`;
what the columns mean is in [the benchmarks' page](../../README.md). ![time and memory]({name}.png)
"""


def records_file(folder: Path, question: Question) -> Path:
    """Return the path of the question's records in a folder of results."""
    return folder / f"{question.name}.json"


def write(folder: Path, question: Question) -> None:
    """Write the table and, if matplotlib is installed, the plot of a folder's records."""
    path = records_file(folder, question)
    groups = load_groups(path)
    path.with_suffix(".md").write_text(table(groups, question), encoding="utf-8")
    if find_spec("matplotlib") is not None:
        _plot(groups, question, path.with_suffix(".png"))


def table(groups: dict[str, Any], question: Question) -> str:
    """Return Markdown: requirements first, then every case with every implementation."""
    header = HEADER.format(title=question.title, name=question.name)
    parts = [header, "## Requirements\n", _requirements(groups, question)]
    for name, group in groups.items():
        parts += [f"## {name[0].upper()}{name[1:]}\n", _machine(group["machine"])]
        for case in dict.fromkeys(record["case"] for record in group["records"]):
            records = [record for record in group["records"] if record["case"] == case]
            parts += [f"### {case}\n", _case(records, question)]
    return "\n".join(parts)


def _requirements(groups: dict[str, Any], question: Question) -> str:
    rows = [
        (
            requirement.case.name,
            requirement.what,
            f"{requirement.limit:.4g}",
            "-" if value is None else f"{value:.3g}",
            verdict if verdict == "pass" else f"**{verdict}**",
        )
        for group in groups.values()
        for requirement, verdict, value in verdicts(group["records"], question)
    ]
    return _markdown(("case", f"of {question.ours}", "at most", "measured", "verdict"), rows)


def _case(records: list[Record], question: Question) -> str:
    known = figures(records)
    reasons = {r["implementation"]: r["reason"] for r in records if r["quantity"] == "failure"}
    by_name = {implementation: values for (_, implementation), values in known.items()}
    columns = question.columns
    header = ("implementation", "ms p50 (p20, p80)", *(c.header for c in columns), "machine")
    rows = []
    for name, values in by_name.items():
        if name in reasons:
            rows.append((name, f"did not run: {reasons[name]}", *[""] * (len(header) - 2)))
            continue
        middle, low, high = (number(values[f"time_ms_p{p}"]) for p in (50, 20, 80))
        right = values.get("right")
        shown = [
            column.show(values, by_name) if right or not column.of_right else ""
            for column in columns
        ]
        if not right:
            said = "not judged" if right is None else "wrong result"
            shown[[column.of_right for column in columns].index(True)] = said
        rows.append((name, f"{middle} ({low}, {high})", *shown, _condition(values)))
    return _markdown(header, rows)


def _condition(values: Values) -> str:
    """Describe the machine's state during the turns."""
    if "sm_clock_mhz" in values:
        return f"{values['sm_clock_mhz']:.0f} MHz"
    return f"{values['others_share']:.0%} taken" if "others_share" in values else "-"


def _machine(machine: dict[str, Any]) -> str:
    versions = machine["versions"]
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    skipped = ("versions", "python", "flash_attn")
    rest = (f"{key} {value}" for key, value in machine.items() if key not in skipped)
    return f"{', '.join(rest)}; Python {machine['python']}, {installed}.\n"


def _markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _plot(groups: dict[str, Any], question: Question, path: Path) -> None:
    """Plot a row of panels for each case, time and peak memory; a bar for each implementation."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for group_name, group in groups.items():
        for (case, implementation), values in figures(group["records"]).items():
            if "time_ms_p50" in values:
                rows.setdefault((group_name, case), {})[implementation] = values
    heights = [0.7 + 0.22 * len(bars) for bars in rows.values()]
    figure, panels = pyplot.subplots(
        len(rows),
        2,
        figsize=(11, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    own = question.ours.split()[0]
    for ((_, case), bars), (times, memories) in zip(rows.items(), panels, strict=True):
        names = [
            name if values.get("right", True) else f"{name} (wrong)"
            for name, values in bars.items()
        ]
        colors = ["tab:blue" if name.split()[0] == own else "silver" for name in bars]
        for panel, quantity in ((times, "time_ms_p50"), (memories, "peak_mib")):
            drawn = panel.barh(names, [values[quantity] for values in bars.values()], color=colors)
            panel.bar_label(drawn, fmt=number, padding=2, fontsize=7)
            panel.invert_yaxis()
            panel.margins(x=0.12)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
        memories.set_yticklabels([])
        times.set_title(f"{case}: ms", fontsize=8, loc="left")
        memories.set_title("peak MiB over the inputs", fontsize=8, loc="left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    for question in map(question_named, NAMES):
        if records_file(Path(sys.argv[1]), question).exists():
            write(Path(sys.argv[1]), question)
