"""Tables of the report and of the comparison, as text for the terminal and as HTML for the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jinja2
from markupsafe import Markup

from derta.evaluation.attacks import WHOLE
from derta.evaluation.reporting.analyses import Rate

# A table of more columns becomes several, one below the other.
MOST_COLUMNS = 12

# Levels of metrics whose heading differs from their name.
TITLES = {
    "multi_turn": "multi-turn",
    "over_refusal": "over-refusal",
    "template_prefill": "template prefill",
    "helpful_accuracy": "helpful accuracy",
    "refusal_banned": "refusal banned",
    "prefill_thinking": "prefill in thinking",
    "in_context": "in context",
    "forced": "by teacher forcing, prefill",
    "forced_over_refusal": "over-refusal by teacher forcing",
    "rank_assisted": "rank-assisted attack, top",
    "top_k": "harmful tokens, top",
}

_HTML = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""\
{% for table in tables %}<div class="scroll"><table>
<thead>{% if table.groups %}
<tr><th></th>{% for name, span in table.groups %}
<th colspan="{{ span }}"{% if name %} class="group"{% endif %}>{{ name }}</th>{% endfor %}</tr>
{%- endif %}
<tr><th>{{ table.corner }}</th>{% for column in table.columns %}
<th>{{ column.title }}</th>{% endfor %}</tr>
</thead>
<tbody>
{% for name, cells in table.rows.items() %}<tr>
<th{% if name in color %} style="color: {{ color[name] }}"{% endif %}>{{ name }}
{%- if name in table.under %}<br><small>{{ table.under[name] }}</small>{% endif %}</th>
{% for cell in cells %}<td{% if cell.bar %} class="share" style="--share: {{ "%.4f" % cell.bar }}"
{% endif %}>{{ cell.text.replace("-", "−") }}
{%- if cell.range %}<small>{{ cell.range.replace("-", "−") }}</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}""")


def title_of(metric: str) -> str:
    """Return the heading of a metric."""
    *above, last = metric.split(".")
    if above[-1:] == ["sampling"]:
        above[-1], last = draws_title(last), "drawn answer" + "s" * (last != "1")
    return " ".join(TITLES.get(level, level) for level in (*above, last))


def draws_title(count: str) -> str:
    """Return the heading of an attack with drawn answers, by the number that it has of each."""
    return "one" if count == "1" else f"worst of {count}"


def by_depth(name: str) -> float:
    """Return the place of a number among the columns of an attack; "whole" comes last."""
    return math.inf if name == WHOLE else int(name)


def attack_title(attack: str) -> str:
    """Return the heading of an attack."""
    return title_of(attack.removeprefix("file."))


@dataclass(frozen=True)
class Cell:
    """A figure of a table.

    Attributes:
        text: the figure.
        range: its interval, in small print on the page.
        bar: the length of the bar below the figure on the page, in 0..1.
        is_range_in_text: if True, the range is in the terminal's table too.
    """

    text: str
    range: str = ""
    bar: float = 0.0
    is_range_in_text: bool = False


MISSING = Cell("–")


def rate_cell(share: float, interval: Sequence[float]) -> Cell:
    """Return a share in percent, with its interval and a bar."""
    lower, upper = (f"{100 * end:.0f}" for end in interval)
    return Cell(f"{100 * share:.1f}", f"{lower} – {upper}", bar=share)


def rate_table(found: Mapping[str, Mapping[str, Rate]]) -> Table:
    """Return a table of the shares of each model, by attack or other metric."""
    names = list(dict.fromkeys(name for rates in found.values() for name in rates))
    return Table(
        [Column(attack_title(name.removeprefix("asr."))) for name in names],
        {
            model: [
                rate_cell(rates[name].share, rates[name].interval) if name in rates else MISSING
                for name in names
            ]
            for model, rates in found.items()
        },
    )


def difference_cell(share: float, interval: Sequence[float]) -> Cell:
    """Return a difference of two shares in points, with its interval."""
    # Rounded to whole numbers first, so that nothing is "-0".
    lower, upper = (f"{round(100 * end):d}" for end in interval)
    return Cell(f"{100 * share:+.1f}", f"{lower} to {upper}", is_range_in_text=True)


@dataclass(frozen=True)
class Column:
    """The headings of a column.

    Attributes:
        title: heading of the column.
        group: heading shared with its neighbours, above the title, or "".
    """

    title: str
    group: str = ""


@dataclass(frozen=True)
class Table:
    """Figures by row and column.

    Attributes:
        columns: headings.
        rows: name to cells, one per column.
        corner: heading of the rows' names: the unit of the figures.
        under: name of a row to the small print under it.
    """

    columns: Sequence[Column]
    rows: Mapping[str, Sequence[Cell]]
    corner: str = "%"
    under: Mapping[str, str] = field(default_factory=dict)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The headings above the columns, each with the number of columns below it."""
        if not any(column.group for column in self.columns):
            return []
        return [
            (name, len(list(group)))
            for name, group in itertools.groupby(column.group for column in self.columns)
        ]


def to_text(table: Table) -> str:
    """Return a table as aligned text, or several tables if the columns are many."""
    return "\n\n".join(map(_to_text, _parts(table)))


def to_html(table: Table, color: Mapping[str, str]) -> Markup:
    """Return a table as HTML, or several tables if the columns are many.

    Args:
        table: the table.
        color: name of a row to the CSS color of its name.
    """
    return Markup(_HTML.render(tables=_parts(table), color=color))


def _parts(table: Table) -> list[Table]:
    """Split a table between groups of columns, and within a group only if it is too wide."""
    parts: list[list[int]] = []
    places = range(len(table.columns))
    for _, group in itertools.groupby(places, key=lambda place: table.columns[place].group):
        members = list(group)
        for start in range(0, len(members), MOST_COLUMNS):
            added = members[start : start + MOST_COLUMNS]
            if not parts or len(parts[-1]) + len(added) > MOST_COLUMNS:
                parts.append([])
            parts[-1] += added
    return [
        replace(
            table,
            columns=[table.columns[place] for place in part],
            rows={name: [cells[place] for place in part] for name, cells in table.rows.items()},
        )
        for part in parts
    ]


def _to_text(table: Table) -> str:
    lines = [[table.corner, *(column.title for column in table.columns)]]
    for name, cells in table.rows.items():
        label = f"{name}: {table.under[name]}" if name in table.under else name
        lines.append([label, *map(_cell_to_text, cells)])
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    heading = _widen_for_groups(table.groups, widths)
    return "\n".join(
        [
            *([" " * first + heading] if heading else []),
            *(
                "  ".join([name.ljust(first), *map(str.rjust, cells, widths)])
                for name, *cells in lines
            ),
        ]
    )


def _cell_to_text(cell: Cell) -> str:
    return f"{cell.text} [{cell.range}]" if cell.is_range_in_text else cell.text


def _widen_for_groups(groups: Sequence[tuple[str, int]], widths: list[int]) -> str:
    """Widen columns in place until each group's heading fits, and return the line of headings."""
    heading, start = "", 0
    for group, span in groups:
        places = range(start, start + span)
        missing = len(group) - sum(widths[place] for place in places) - 2 * (span - 1)
        for place in itertools.islice(itertools.cycle(places), max(0, missing)):
            widths[place] += 1
        heading += "  " + group.ljust(sum(widths[place] for place in places) + 2 * (span - 1))
        start += span
    return heading.rstrip()
