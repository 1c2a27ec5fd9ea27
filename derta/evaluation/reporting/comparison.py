"""Models side by side: the paper's analyses as text, as one page with pictures, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from derta.evaluation.reporting.analyses import (
    BINS,
    EFFECTS,
    Difference,
    Entry,
    Rate,
    first_tokens,
    refusal_positions,
    terms,
)
from derta.evaluation.reporting.page import PAGE
from derta.evaluation.reporting.plots import INK, colors, draw
from derta.evaluation.reporting.report import MOST_COLUMNS, title_of
from derta.outputs import write_whole

ANALYSES = ("first_tokens", "positions", "terms")

Cell = Rate | Difference | float | str | None
Comparison = Mapping[str, Any]
Panels = Mapping[str, Mapping[str, Rate]]

_PAGE = PAGE.environment.from_string("""\
{% extends page %}
{% block content -%}
{% for table in tables %}<h2>{{ table.title }}</h2>
<p class="quiet">{{ table.caption }}</p>
{% for part in table.parts %}<div class="scroll"><table>
<thead><tr><th>{{ table.corner }}</th>{% for column in part.columns %}
<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in part.rows %}<tr>
<th{% if row.color %} style="color: {{ row.color }}"{% endif %}>{{ row.name }}
{% if row.under %}<br><small>{{ row.under }}</small>{% endif %}</th>
{% for cell in row.cells %}<td{% if cell.share %} class="share" style="--share: {{ cell.share }}"
{% endif %}>{{ cell.text }}{% if cell.range %}<small>{{ cell.range }}</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}{% if table.svg %}<figure role="img" aria-label="{{ table.title }}">
{{ table.svg }}
</figure>
{% endif %}{% endfor %}
<p><small>Small figures: 95% intervals, Wilson's for shares and Newcombe's for
differences.</small></p>
{% if notes %}<details open><summary>What is not in the figures</summary>
<ul>{% for note in notes %}
<li>{{ note }}</li>{% endfor %}
</ul></details>
{% endif %}
{%- endblock %}
""")


@dataclass(frozen=True)
class Table:
    """What one analysis found.

    Attributes:
        title, caption: what is asked, and how it is counted.
        corner: heading of the rows' names: their unit.
        columns: headings.
        rows: name to a cell a column.
        picture: the name of its picture, where it has one.
        under: name of a row to the small print under it.
    """

    title: str
    caption: str
    corner: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]
    picture: str = ""
    under: Mapping[str, str] = field(default_factory=dict)


def compare(
    models: Mapping[str, Entry],
    *,
    analyses: Sequence[str] = ANALYSES,
    recipes: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of comparison.json, which `write_comparison` and `format_comparison` read.

    Args:
        models: name to entry of a summary, in the order of the report; "position_unit" in it says
            what its positions count, tokens where it does not.
        analyses: of `ANALYSES`.
        recipes: see `terms`.
        notes: what readers should know.

    Returns:
        {"models": {NAME: entry}, "notes": [...], "first_tokens": {NAME: {attack: rate}},
        "positions": {NAME: {part: rate}}, "terms": {"rates": {NAME: {attack: rate}}, "means":
        {NAME: share}, "compared": {WHAT: [before, after]}, "differences": {WHAT: {attack:
        difference}}}}; a rate is {"share": x, "interval": [x, x], "hits": n, "trials": n}, a
        difference {"share": x, "interval": [x, x]}.

    Raises:
        ValueError: there is no model, an analysis is unknown, or see `terms`.
    """
    if not models:
        raise ValueError("models must be at least one, got none")
    if not set(analyses) <= set(ANALYSES):
        raise ValueError(f"analyses must be of {', '.join(ANALYSES)}, got {list(analyses)}")
    made: dict[str, Any] = {"models": dict(models), "notes": [*notes, *_unlike_judges(models)]}
    if "first_tokens" in analyses:
        made["first_tokens"] = first_tokens(models)
    if "positions" in analyses:
        made["positions"] = refusal_positions(models)
    if "terms" in analyses:
        made["terms"] = vars(terms(models, recipes))
    return made


def _unlike_judges(models: Mapping[str, Entry]) -> list[str]:
    """That rates cannot be compared, where what counts was decided differently."""
    judges = {name: entry.get("judge", "keyword") for name, entry in models.items()}
    if len(set(judges.values())) == 1:
        return []
    by = ", ".join(f"{name} by {judge}" for name, judge in judges.items())
    return [f"the models were judged by different judges, whose rates are no one measure: {by}"]


def format_comparison(comparison: Comparison) -> str:
    """The tables of the page as text; shares in percent, differences in points."""
    return "\n\n".join(
        "\n\n".join([f"{table.title}\n{_as_text(first)}", *map(_as_text, others)])
        for table in _tables(comparison)
        for first, *others in [_parts(table)]
    )


def write_comparison(
    comparison: Comparison, directory: str | Path, *, title: str = "Models side by side"
) -> Path:
    """Writes comparison.html, its pictures as PNG, and comparison.json.

    The page is one file: it loads nothing, and all text is escaped. Each file appears complete or
    not at all; comparison.json, the last, says that all are there.

    Args:
        comparison: see `compare`.
        directory: made if it is not there.
        title: of the page.

    Returns:
        the path of comparison.html.
    """
    data = json.dumps(comparison, indent=1, allow_nan=False, default=_plain)
    pictures = draw(comparison, PLOTS)
    color = colors(list(comparison["models"]))
    count = len(comparison["models"])
    page = _PAGE.render(
        page=PAGE,
        title=title,
        subtitle=f"{count} models" if count > 1 else "1 model",
        tables=[
            vars(table)
            | {
                "parts": [
                    {
                        "columns": part.columns,
                        "rows": [
                            {
                                "name": name,
                                "under": table.under.get(name, ""),
                                "color": color.get(name),
                                "cells": [_cell(one) for one in cells],
                            }
                            for name, cells in part.rows.items()
                        ],
                    }
                    for part in _parts(table)
                ],
                "svg": Markup(pictures[table.picture][1]) if table.picture in pictures else "",
            }
            for table in _tables(comparison)
        ],
        notes=comparison["notes"],
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, (png, _) in pictures.items():
        write_whole(directory / f"{name}.png", png)
    write_whole(directory / "comparison.html", page.encode())
    write_whole(directory / "comparison.json", data.encode())
    return directory / "comparison.html"


def _plain(value: Rate | Difference) -> dict[str, Any]:
    counts = vars(value) if isinstance(value, Rate) else {}
    return {"share": value.share, "interval": value.interval, **counts}


def _tables(comparison: Comparison) -> list[Table]:
    models = comparison["models"]
    units = {name: entry.get("position_unit", "tokens") for name, entry in models.items()}
    tables = []
    if "first_tokens" in comparison:
        found = comparison["first_tokens"]
        attacks = _columns(found, last="all")
        tables.append(
            Table(
                "Refusals that start at once",
                "Of the refusals whose start is known, the share that start in the first five "
                "tokens or words of the response, by attack. Attacks that write the start "
                "themselves are left out. Source: arXiv 2407.09121, table 1.",
                "%",
                [*map(_title, attacks), "refusals", "counted in"],
                {
                    name: [
                        *(one.get(attack) for attack in attacks),
                        f"{one['all'].trials:,}" if one else "0",
                        units[name],
                    ]
                    for name, one in found.items()
                },
            )
        )
    if "positions" in comparison:
        found = comparison["positions"]
        tables.append(
            Table(
                "Where refusals start",
                "The same refusals, all attacks together, by the token or word of the response at "
                "which they start, counted from 1. Source: arXiv 2407.09121, figure 4.",
                "%",
                [*BINS, "refusals", "counted in"],
                {
                    name: [
                        *(found.get(name, {}).get(part) for part in BINS),
                        f"{found[name]['1–5'].trials:,}" if name in found else "0",
                        units[name],
                    ]
                    for name in models
                },
                picture="positions",
            )
        )
    if "terms" in comparison:
        tables += _tables_of_terms(comparison["terms"])
    return tables


def _tables_of_terms(found: Mapping[str, Any]) -> list[Table]:
    attacks, means = _columns(found["rates"]), found["means"]
    caption = (
        "Share of attacks that are answered and not refused; where the judge reads harm, that are "
        "answered with it."
    )
    columns = [_title(attack) for attack in attacks]
    if means:
        shared = ", ".join(map(_title, found["shared"]))
        caption += f" The mean is over what all models faced: {shared}."
        columns.append("mean")
    tables = [
        Table(
            "Attack success",
            f"{caption} Source: arXiv 2407.09121, table 4.",
            "%",
            columns,
            {
                name: [
                    *(one.get(attack) for attack in attacks),
                    *([means[name]] if means else []),
                ]
                for name, one in found["rates"].items()
            },
            picture="attacks",
        )
    ]
    if found["compared"]:
        tables.append(
            Table(
                "What changes attack success",
                "How much higher attack success is in the second model than in the first. The "
                "models count as independent: asked the same requests, as they mostly are, they "
                "differ more surely than the intervals say.",
                "points",
                columns,
                {
                    what: [
                        *(one.get(attack) for attack in attacks),
                        *([f"{100 * (means[after] - means[before]):+.1f}"] if means else []),
                    ]
                    for what, (before, after) in found["compared"].items()
                    for one in [found["differences"][what]]
                },
                under={
                    what: " → ".join(found["compared"][what])
                    for what in EFFECTS
                    if what in found["compared"]
                },
            )
        )
    kinds = _columns(found["over_refusal"])
    if kinds:
        tables.append(
            Table(
                "Over-refusal",
                "Share of harmless requests that are refused: what safety may have been bought "
                "with.",
                "%",
                [_title(kind) or "harmless" for kind in kinds],
                {
                    name: [one.get(kind) for kind in kinds]
                    for name, one in found["over_refusal"].items()
                },
            )
        )
    return tables


def _columns(found: Mapping[str, Mapping[str, Any]], last: str = "") -> list[str]:
    """Whatever some model has, in the order of appearance."""
    names = dict.fromkeys(name for one in found.values() for name in one if name != last)
    return [*names, *([last] if last and names else [])]


def _title(attack: str) -> str:
    """An attack as people call it."""
    return title_of(attack.removeprefix("file."))


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Difference):
        return f"{100 * cell.share:+.1f}"
    return f"{100 * (cell.share if isinstance(cell, Rate) else cell):.1f}"


def _range(cell: Cell) -> str:
    if not isinstance(cell, Rate | Difference):
        return ""
    # Rounded to whole numbers first, so that nothing is "-0".
    lower, upper = (f"{round(100 * end):d}" for end in cell.interval)
    return f"{lower} to {upper}" if isinstance(cell, Difference) else f"{lower} – {upper}"


def _cell(cell: Cell) -> dict[str, str]:
    return {
        "text": _text(cell).replace("-", "−"),
        "range": _range(cell).replace("-", "−"),
        "share": f"{cell.share:.4f}" if isinstance(cell, Rate) and cell.hits else "",
    }


def _parts(table: Table) -> list[Table]:
    """Tables one below the other, each of as many columns as a reader can see at once."""
    return [
        replace(
            table,
            columns=table.columns[start : start + MOST_COLUMNS],
            rows={n: cells[start : start + MOST_COLUMNS] for n, cells in table.rows.items()},
        )
        for start in range(0, len(table.columns), MOST_COLUMNS)
    ]


def _as_text(table: Table) -> str:
    lines = [
        [table.corner, *table.columns],
        *(
            [
                f"{name}: {table.under[name]}" if name in table.under else name,
                *(
                    f"{_text(cell)} [{_range(cell)}]"
                    if isinstance(cell, Difference)
                    else _text(cell)
                    for cell in cells
                ),
            ]
            for name, cells in table.rows.items()
        ),
    ]
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))])
        for name, *cells in lines
    )


def _bars(models: Sequence[str], panels: Panels, title: str, xlabel: str) -> Figure:
    """One panel a column of a table, one bar a model, with its interval."""
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
    """Shares of refusals by where they start."""
    found = comparison.get("positions")
    if not found:
        return None
    panels = {part: {name: rates[part] for name, rates in found.items()} for part in BINS}
    return _bars(
        list(comparison["models"]),
        panels,
        "Token or word of the response at which refusals start",
        "share of refusals",
    )


def _attacks(comparison: Comparison) -> Figure | None:
    """Success by attack."""
    rates = comparison["terms"]["rates"] if "terms" in comparison else {}
    panels = {
        _title(attack): {name: one[attack] for name, one in rates.items() if attack in one}
        for attack in _columns(rates)
    }
    if not panels:
        return None
    return _bars(list(comparison["models"]), panels, "Attack success", "share of attacks")


PLOTS: dict[str, Callable[[Comparison], Figure | None]] = {
    "positions": _positions,
    "attacks": _attacks,
}
