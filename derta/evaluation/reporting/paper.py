"""Figures of the paper, beside which ours are printed. People judged its attacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from derta.evaluation.reporting.analyses import Entry, Rate, terms
from derta.evaluation.reporting.tables import (
    MISSING,
    Cell,
    Column,
    Table,
    attack_title,
    rate_cell,
)

BLACK_BOX = ("codeattack", "pair", "jailbreakchat", "selfcipher")
WHITE_BOX = ("completionattack", "autodan")
ATTACKS = (*BLACK_BOX, *WHITE_BOX)
# Requests of each attack: 50 where every one takes a search, else 200.
REQUESTS = dict.fromkeys(ATTACKS, 200) | {"pair": 50, "autodan": 50}
# Attack success in percent, by recipe, in the order of ATTACKS. Its "Vanilla-" is not among ours.
TABLE_4 = {
    "vanilla": (86.0, 76.0, 41.0, 51.5, 95.0, 74.0),
    "prefix_only": (88.0, 78.0, 35.5, 21.5, 25.0, 36.0),
    "rto_only": (28.0, 36.0, 6.5, 0.0, 5.0, 12.0),
    "derta": (21.5, 24.0, 1.5, 0.0, 4.0, 2.0),
}


@dataclass(frozen=True)
class Reproduced:
    """Attack success of our models and of the paper's.

    Attributes:
        ours, paper: recipe to attack to share of successes; an attack that was not run is missing
            in ours.
    """

    ours: Mapping[str, Mapping[str, Rate]]
    paper: Mapping[str, Mapping[str, Rate]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: {"ours": {recipe: {attack: rate}}, "paper": ...}."""
        return {
            side: {
                recipe: {
                    attack: {"share": rate.share, "interval": rate.interval, **vars(rate)}
                    for attack, rate in rates.items()
                }
                for recipe, rates in found.items()
            }
            for side, found in vars(self).items()
        }

    def table(self) -> Table:
        """Return a table with two rows for each recipe, ours and the paper's."""
        rows = {}
        for recipe, rates in self.ours.items():
            rows[recipe] = _cells(rates)
            rows[f"{recipe}, paper"] = _cells(self.paper[recipe])
        titles = (*map(attack_title, BLACK_BOX), "mean"), (*map(attack_title, WHITE_BOX), "mean")
        groups = ("black box", "white box")
        columns = [
            Column(title, group) for group, own in zip(groups, titles, strict=True) for title in own
        ]
        return Table(columns, rows)


def table_4(variants: Mapping[str, Entry]) -> Reproduced:
    """Return attack success beside the paper's.

    Args:
        variants: recipe to entry of a summary.

    Source: arXiv 2407.09121, table 4: Llama-3-70B with adapters, judged by people.
    """
    rates = terms(variants).rates
    return Reproduced(
        ours={
            recipe: {
                attack: rates[recipe][f"file.{attack}"]
                for attack in ATTACKS
                if f"file.{attack}" in rates[recipe]
            }
            for recipe in TABLE_4
            if recipe in rates
        },
        paper={
            recipe: {
                attack: Rate(round(share * REQUESTS[attack] / 100), REQUESTS[attack])
                for attack, share in zip(ATTACKS, shares, strict=True)
            }
            for recipe, shares in TABLE_4.items()
        },
    )


def _cells(rates: Mapping[str, Rate]) -> list[Cell]:
    cells = []
    for attacks in (BLACK_BOX, WHITE_BOX):
        found = [rates.get(attack) for attack in attacks]
        cells += [MISSING if rate is None else _with_range(rate) for rate in found]
        shares = [rate.share for rate in found if rate is not None]
        is_whole = len(shares) == len(attacks)
        cells.append(Cell(f"{100 * sum(shares) / len(shares):.1f}") if is_whole else MISSING)
    return cells


def _with_range(rate: Rate) -> Cell:
    return replace(rate_cell(rate.share, rate.interval), is_range_in_text=True)
