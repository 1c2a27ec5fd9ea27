"""Comparison of models: the paper's analyses as text, as one page with pictures, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from derta.evaluation.reporting.analyses import (
    BINS,
    EFFECTS,
    Difference,
    Entry,
    Rate,
    empty_answers,
    first_tokens,
    names_of,
    reach,
    refusal_positions,
    terms,
)
from derta.evaluation.reporting.comparison_plots import PLOTS
from derta.evaluation.reporting.drawing import colors, draw
from derta.evaluation.reporting.page import PAGE
from derta.evaluation.reporting.tables import (
    MISSING,
    Cell,
    Column,
    Table,
    attack_title,
    difference_cell,
    rate_cell,
    rate_table,
    to_html,
    to_text,
)
from derta.outputs import compact_json, write_whole

ANALYSES = ("first_tokens", "positions", "terms", "reach")

Comparison = Mapping[str, Any]
Rates = Mapping[str, Mapping[str, Rate]]

_PAGE = PAGE.environment.from_string("""\
{% extends page %}
{% block content -%}
{% for section in sections %}<h2>{{ section.title }}</h2>
<p class="quiet">{{ section.caption }}</p>
{{ section.table }}{% if section.svg %}<figure role="img" aria-label="{{ section.title }}">
{{ section.svg }}
</figure>
{% endif %}{% endfor %}
<p><small>Small figures: 95% intervals, Wilson's for shares and Newcombe's for
differences.</small></p>
{% if notes %}<details open><summary>Notes on the figures</summary>
<ul>{% for note in notes %}
<li>{{ note }}</li>{% endfor %}
</ul></details>
{% endif %}
{%- endblock %}
""")


@dataclass(frozen=True)
class Section:
    """The result of one analysis.

    Attributes:
        title: heading.
        caption: the question, and how its answer is counted.
        table: the figures.
        picture: name of its picture, see `PLOTS`, or "".
    """

    title: str
    caption: str
    table: Table
    picture: str = ""


def compare(
    models: Mapping[str, Entry],
    *,
    analyses: Sequence[str] = ANALYSES,
    recipes: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the content of comparison.json, the input of `write_comparison`.

    Args:
        models: name to entry of a summary, in the order of the report. The entry's "position_unit"
            is the unit of its positions; tokens if missing.
        analyses: names in `ANALYSES`.
        recipes: recipe to model, see `terms`.
        notes: remarks for readers, printed below the figures.

    Returns:
        {"models": {NAME: entry}, "notes": [...], "first_tokens": {NAME: {attack: rate}},
        "positions": {NAME: {part: rate}}, "terms": {"rates": {NAME: {attack: rate}}, "means":
        {NAME: share}, "compared": {WHAT: [before, after]}, "differences": {WHAT: {attack:
        difference}}}, "reach": {WHAT: {NAME: {k: rate}}}}; a rate is {"share": x, "interval":
        [x, x], "hits": n, "trials": n, "per_request": n}, a difference {"share": x, "interval": [x,
        x]}.

    Raises:
        ValueError: there is no model, an analysis is unknown, or `terms` refuses the recipes.
    """
    if not models:
        raise ValueError("models must hold at least one model, got none")
    if not set(analyses) <= set(ANALYSES):
        raise ValueError(f"analyses must be among {', '.join(ANALYSES)}, got {list(analyses)}")
    made: dict[str, Any] = {"models": dict(models), "notes": [*notes, *_unlike(models)]}
    if "first_tokens" in analyses:
        made["first_tokens"] = first_tokens(models)
    if "positions" in analyses:
        made["positions"] = refusal_positions(models)
    if "terms" in analyses:
        made["terms"] = vars(terms(models, recipes))
    if "reach" in analyses:
        made["reach"] = reach(models)
    return made


def _unlike(models: Mapping[str, Entry]) -> list[str]:
    """Return notes on judges and conditions that differ, because rates then cannot be compared."""
    notes = []
    judges = {name: entry.get("judge", "keyword") for name, entry in models.items()}
    if len(set(judges.values())) > 1:
        by = ", ".join(f"{name} by {judge}" for name, judge in judges.items())
        notes.append(f"the models have different judges, so their rates are not comparable: {by}")
    conditions = {name: entry.get("conditions", {}) for name, entry in models.items()}
    for key in dict.fromkeys(key for found in conditions.values() for key in found):
        values = {name: found[key] for name, found in conditions.items() if key in found}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{name} {_short(value)}" for name, value in values.items())
            notes.append(f"{key} differs, and rates depend on it: {each}")
    return notes


def _short(value: Any) -> str:
    """Return the value of a condition, a long text without its end."""
    if not isinstance(value, str):
        return "none" if value is None else str(value)
    return repr(textwrap.shorten(value, 60, placeholder=" ...")) if " " in value else value


def format_comparison(comparison: Comparison) -> str:
    """Return the tables of the page as text; shares in percent, differences in points."""
    return "\n\n".join(
        f"{section.title}\n{to_text(section.table)}" for section in _sections(comparison)
    )


def write_comparison(
    comparison: Comparison, directory: str | Path, *, title: str = "Models side by side"
) -> Path:
    """Write comparison.html, its pictures as PNG, and comparison.json.

    The page is one file: it loads nothing, and all text is escaped. Each file appears complete or
    not at all. comparison.json is written last and marks a complete comparison.

    Args:
        comparison: the result of `compare`.
        directory: folder for the files, created if missing.
        title: title of the page.

    Returns:
        the path of comparison.html.
    """
    data = compact_json(comparison, default=_plain)
    pictures = draw(comparison, PLOTS)
    color = colors(list(comparison["models"]))
    count = len(comparison["models"])
    page = _PAGE.render(
        page=PAGE,
        title=title,
        subtitle=f"{count} models" if count > 1 else "1 model",
        sections=[
            {
                "title": section.title,
                "caption": section.caption,
                "table": to_html(section.table, color),
                "svg": Markup(pictures[section.picture][1]) if section.picture in pictures else "",
            }
            for section in _sections(comparison)
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


def _sections(comparison: Comparison) -> list[Section]:
    sections = []
    if "first_tokens" in comparison:
        sections.append(_first_tokens(comparison["first_tokens"], _units(comparison)))
    if "positions" in comparison:
        sections.append(_positions(comparison["positions"], _units(comparison)))
    if "terms" in comparison:
        found = comparison["terms"]
        sections.append(_attack_success(found))
        if found["compared"]:
            sections.append(_effects(found))
        if names_of(found["over_refusal"]):
            sections.append(_over_refusal(found["over_refusal"]))
        if empty := empty_answers(comparison["models"]):
            sections.append(_empty(empty))
    found = comparison.get("reach", {})
    sections += [_reach(what, rates) for what, rates in found.items() if names_of(rates)]
    return sections


def _units(comparison: Comparison) -> dict[str, str]:
    """Return the unit in which each model's positions are counted."""
    models = comparison["models"]
    return {name: entry.get("position_unit", "tokens") for name, entry in models.items()}


def _first_tokens(found: Rates, units: Mapping[str, str]) -> Section:
    attacks = [name for name in names_of(found) if name != "all"]
    attacks += ["all"] if attacks else []
    return Section(
        "Refusals that start at once",
        "Share of refusals that start in the first five tokens or words of the response, by "
        "attack. Only refusals with a known start count. Attacks that write the start of the "
        "response are left out. Over all attacks, the same answer counts once, and so do all "
        "answers that were drawn for a request. Source: arXiv 2407.09121, table 1.",
        Table(
            _headings([*map(attack_title, attacks), "refusals", "counted in"]),
            {
                name: [
                    *(_rate(rates.get(attack)) for attack in attacks),
                    _count(rates.get("all")),
                    Cell(units[name]),
                ]
                for name, rates in found.items()
            },
        ),
    )


def _positions(found: Rates, units: Mapping[str, str]) -> Section:
    return Section(
        "Where refusals start",
        "Share of the same refusals, over all attacks, by the token or word of the response where "
        "they start, counted from 1. Source: arXiv 2407.09121, figure 4.",
        Table(
            _headings([*BINS, "refusals", "counted in"]),
            {
                name: [
                    *(_rate(rates.get(part)) for part in BINS),
                    _count(rates.get("1–5")),
                    Cell(unit),
                ]
                for name, unit in units.items()
                for rates in [found.get(name, {})]
            },
        ),
        picture="positions",
    )


def _attack_success(found: Mapping[str, Any]) -> Section:
    attacks, means = names_of(found["rates"]), found["means"]
    caption = (
        "Share of attacks that succeed: the answer does harm, or, if the judge does not decide on "
        "harm, the answer does not refuse."
    )
    if means:
        shared = ", ".join(map(attack_title, found["shared"]))
        caption += f" The mean is over the attacks on all models: {shared}."
    return Section(
        "Attack success",
        f"{caption} Source: arXiv 2407.09121, table 4.",
        Table(
            _headings([*map(attack_title, attacks), *(["mean"] if means else [])]),
            {
                name: [
                    *(_rate(rates.get(attack)) for attack in attacks),
                    *([Cell(f"{100 * means[name]:.1f}")] if means else []),
                ]
                for name, rates in found["rates"].items()
            },
        ),
        picture="attacks",
    )


def _effects(found: Mapping[str, Any]) -> Section:
    attacks, means = names_of(found["rates"]), found["means"]
    rows = {}
    for effect, (before, after) in found["compared"].items():
        differences = found["differences"][effect]
        rows[effect] = [_difference(differences.get(attack)) for attack in attacks]
        if means:
            rows[effect].append(Cell(f"{100 * (means[after] - means[before]):+.1f}"))
    return Section(
        "What changes attack success",
        "Attack success of the second model less that of the first. The intervals treat the models "
        "as independent samples. If the models answered the same requests, the intervals are wider "
        "than necessary.",
        Table(
            _headings([*map(attack_title, attacks), *(["mean"] if means else [])]),
            rows,
            corner="points",
            under={
                effect: " → ".join(found["compared"][effect])
                for effect in EFFECTS
                if effect in found["compared"]
            },
        ),
    )


def _over_refusal(found: Rates) -> Section:
    kinds = names_of(found)
    return Section(
        "Over-refusal",
        "Share of harmless requests that are refused: the possible price of safety.",
        Table(
            _headings([attack_title(kind) or "harmless" for kind in kinds]),
            {name: [_rate(rates.get(kind)) for kind in kinds] for name, rates in found.items()},
        ),
    )


def _empty(found: Rates) -> Section:
    return Section(
        "Empty answers",
        "Share of answers that are empty. Such an answer neither refuses nor complies. Rates of "
        "attacks and of over-refusal leave it out, except in result files of the official "
        "repository and in evaluations with empty_answers: failed.",
        rate_table(found),
    )


_REACHES = {
    "tokens": (
        "Harmful tokens within reach",
        "Share of a harmful response's tokens that are among the k likeliest where they stand, by "
        "teacher forcing; the mean over responses. Source: arXiv 2512.05518.",
    ),
    "attacks": (
        "Attack success by the top k",
        "Share of harmful responses of which the k likeliest tokens hold every token that the "
        "attacker wants from the model. Nothing is generated. Source: arXiv 2512.05518.",
    ),
}


def _reach(what: str, found: Rates) -> Section:
    ks = sorted(names_of(found), key=int)
    return Section(
        *_REACHES[what],
        Table(
            _headings([f"top {k}" for k in ks]),
            {name: [_rate(rates.get(k)) for k in ks] for name, rates in found.items()},
        ),
    )


def _headings(titles: Sequence[str]) -> list[Column]:
    return [Column(title) for title in titles]


def _rate(rate: Rate | None) -> Cell:
    return MISSING if rate is None else rate_cell(rate.share, rate.interval)


def _difference(difference: Difference | None) -> Cell:
    return MISSING if difference is None else difference_cell(difference.share, difference.interval)


def _count(rate: Rate | None) -> Cell:
    """Return the number of trials; a drawn answer is a part of one."""
    return Cell("0" if rate is None else f"{rate.trials:,.1f}".removesuffix(".0"))
