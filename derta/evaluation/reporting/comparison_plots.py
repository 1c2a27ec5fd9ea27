"""Pictures of the comparison: a panel of bars for each column of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from derta.evaluation.reporting.analyses import BINS, Rate, names_of
from derta.evaluation.reporting.drawing import INK, colors
from derta.evaluation.reporting.tables import attack_title

Comparison = Mapping[str, Any]
Panels = Mapping[str, Mapping[str, Rate]]


def _bars(models: Sequence[str], panels: Panels, title: str, xlabel: str) -> Figure:
    """Draw a panel for each column of a table, with a bar and its interval for each model."""
    color = colors(models)
    names = [name for name in models if any(name in rates for rates in panels.values())]
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    left, width = 0.35 + 0.09 * max(map(len, names)), 2.15  # inches, as all that follows
    bars, step = 0.25 * len(names), 0.25 * len(names) + 0.35
    total, height = left + across * width, 0.35 + down * step + 0.5
    figure = Figure(figsize=(total, height))
    for nth, (panel, rates) in enumerate(panels.items()):
        row, column = divmod(nth, across)
        x, y = left + column * width, height - 0.35 - (row + 1) * step
        axes = figure.add_axes((x / total, y / height, (width - 0.45) / total, bars / height))
        for place, name in enumerate(names):
            if name in rates:
                _bar(axes, place, rates[name], color[name])
        axes.set_title(panel, pad=4, fontsize=9.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), [""] * len(names) if column else names)
        for label, name in zip(axes.get_yticklabels(), names, strict=True):
            label.set(color=color[name], fontweight="bold", fontsize=9.5)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.tick_params(axis="x", labelsize=8.5, labelbottom=nth + across >= len(panels))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
    figure.text(left / total, 1 - 0.12 / height, title, fontsize=10.5, va="top")
    figure.text(left / total, 0.06 / height, xlabel)
    return figure


def _bar(axes: Axes, place: int, rate: Rate, color: str) -> None:
    lower, upper = rate.interval
    axes.barh(place, rate.share, height=0.62, color=color)
    axes.plot([lower, upper], [place, place], color=INK, linewidth=0.9, alpha=0.6)
    axes.annotate(
        f"{100 * rate.share:.0f}",
        (upper, place),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
    )


def _positions(comparison: Comparison) -> Figure | None:
    """Draw the shares of refusals by where they start."""
    found = comparison.get("positions")
    if not found:
        return None
    panels = {part: {name: rates[part] for name, rates in found.items()} for part in BINS}
    return _bars(
        list(comparison["models"]),
        panels,
        "Token or word of the response where refusals start",
        "share of refusals",
    )


def _attacks(comparison: Comparison) -> Figure | None:
    """Draw the success of each attack."""
    rates = comparison["terms"]["rates"] if "terms" in comparison else {}
    panels = {
        attack_title(attack): {name: one[attack] for name, one in rates.items() if attack in one}
        for attack in names_of(rates)
    }
    if not panels:
        return None
    return _bars(list(comparison["models"]), panels, "Attack success", "share of attacks")


PLOTS: dict[str, Callable[[Comparison], Figure | None]] = {
    "positions": _positions,
    "attacks": _attacks,
}
