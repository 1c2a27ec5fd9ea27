"""The table and the plot, made from records: `python -m benchmarks.report FOLDER` redoes both."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.peers import EAGER, PRODUCTS
from benchmarks.records import ERRORS, Record, figures, load_groups
from benchmarks.requirements import OURS, verdicts

RECORDS, TABLE, PLOT = "head_loss.json", "head_loss.md", "head_loss.png"
HEADER = """\
# The head loss, measured

Made from [the records](head_loss.json) by `python -m benchmarks.report`; what the columns mean is
in [the benchmarks' page](../../README.md). ![time and memory](head_loss.png)
"""
COLUMNS = (
    "implementation",
    "ms p50 (p20, p80)",
    "time / full",
    "rate",
    "peak MiB",
    "memory / full",
    "error of loss",
    "of d_hidden",
    "of d_weight",
    "machine",
)


def write(folder: Path) -> None:
    """Table and, where matplotlib is installed, plot of the records in a folder."""
    groups = load_groups(folder / RECORDS)
    (folder / TABLE).write_text(table(groups), encoding="utf-8")
    if find_spec("matplotlib") is not None:
        _plot(groups, folder / PLOT)


def table(groups: dict[str, Any]) -> str:
    """Markdown: requirements first, then every case with every implementation."""
    parts = [HEADER, "## Requirements\n", _requirements(groups)]
    for name, group in groups.items():
        parts += [f"## {name[0].upper()}{name[1:]}\n", _machine(group["machine"])]
        for case in dict.fromkeys(record["case"] for record in group["records"]):
            records = [record for record in group["records"] if record["case"] == case]
            parts += [f"### {case}\n", _case(records)]
    return "\n".join(parts)


def _requirements(groups: dict[str, Any]) -> str:
    rows = [
        (
            requirement.case.name,
            requirement.what,
            f"{requirement.limit:.4g}",
            "-" if value is None else f"{value:.3g}",
            verdict if verdict == "pass" else f"**{verdict}**",
        )
        for group in groups.values()
        for requirement, verdict, value in verdicts(group["records"])
    ]
    return _markdown(("case", f"of {OURS}", "at most", "measured", "verdict"), rows)


def _case(records: list[Record]) -> str:
    known = figures(records)
    reasons = {r["implementation"]: r["reason"] for r in records if r["quantity"] == "failure"}
    by_name = {implementation: values for (_, implementation), values in known.items()}
    eager, products = by_name.get(EAGER, {}), by_name.get(PRODUCTS, {})
    rows = []
    for name, values in by_name.items():
        if name in reasons:
            rows.append((name, f"did not run: {reasons[name]}", *[""] * (len(COLUMNS) - 2)))
            continue
        time_ms, peak_mib = values["time_ms_p50"], values["peak_mib"]
        right = bool(values["right"])
        low, high = _number(values["time_ms_p20"]), _number(values["time_ms_p80"])
        rows.append(
            (
                name,
                f"{_number(time_ms)} ({low}, {high})",
                _ratio(time_ms, eager.get("time_ms_p50")) if right else "wrong result",
                _percent(products.get("time_ms_p50"), time_ms) if right else "",
                _number(peak_mib),
                _ratio(peak_mib, eager.get("peak_mib")) if right and name != PRODUCTS else "",
                *(f"{values[q]:.1e}" if q in values else "-" for q in ERRORS),
                _condition(values),
            )
        )
    return _markdown(COLUMNS, rows)


def _condition(values: dict[str, float]) -> str:
    """What state the machine was in."""
    if "sm_clock_mhz" in values:
        return f"{values['sm_clock_mhz']:.0f} MHz"
    return f"{values['others_share']:.0%} taken" if "others_share" in values else "-"


def _number(value: float) -> str:
    """Three digits, or all of an integer's."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(value: float, other: float | None) -> str:
    return "-" if other is None else f"{value / other:.2f}"


def _percent(part: float | None, whole: float) -> str:
    return "-" if part is None else f"{part / whole:.0%}"


def _machine(machine: dict[str, Any]) -> str:
    versions = machine["versions"]
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    skipped = ("versions", "python")
    rest = (f"{key} {value}" for key, value in machine.items() if key not in skipped)
    return f"{', '.join(rest)}; Python {machine['python']}, {installed}.\n"


def _markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _plot(groups: dict[str, Any], path: Path) -> None:
    """A row of panels a case, time and peak memory; a bar an implementation."""
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
    for ((_, case), bars), (times, memories) in zip(rows.items(), panels, strict=True):
        names = [name if values["right"] else f"{name} (wrong)" for name, values in bars.items()]
        colors = ["tab:blue" if name.startswith("derta") else "silver" for name in bars]
        for panel, quantity in ((times, "time_ms_p50"), (memories, "peak_mib")):
            drawn = panel.barh(names, [values[quantity] for values in bars.values()], color=colors)
            panel.bar_label(drawn, fmt=_number, padding=2, fontsize=7)
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
    write(Path(sys.argv[1]))
