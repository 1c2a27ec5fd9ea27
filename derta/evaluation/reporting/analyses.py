"""The paper's questions of refusals and attacks, asked of any number of models.

Each analysis reads entries of models, as a summary has them for its variants, see `summarize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from derta.evaluation.measures.results import leaves
from derta.evaluation.measures.statistics import newcombe_interval, wilson_interval

Entry = Mapping[str, Any]

# The paper counts from 1 and takes the first five for the start; positions here count from 0.
FIRST = 5
BINS = {"1–5": (0, 5), "6–30": (5, 30), "after 30": (30, float("inf"))}

RECIPES = ("vanilla", "prefix_only", "rto_only", "derta")
# What a term does: the recipe without it, and the one with it.
EFFECTS = {
    "harmful prefix": ("vanilla", "prefix_only"),
    "RTO": ("vanilla", "rto_only"),
    "both": ("vanilla", "derta"),
    "harmful prefix, given RTO": ("rto_only", "derta"),
    "RTO, given harmful prefix": ("prefix_only", "derta"),
}

# Where an attack has written the start of the response, a refusal cannot start there.
_PREFILLED = ("prefill.", "prefilled", "template_prefill.")
_UNFILLED = ("prefill.0", "template_prefill.0")


@dataclass(frozen=True)
class Rate:
    """A share of trials.

    Attributes:
        hits: in 0..trials.
        trials: at least 1.
    """

    hits: int
    trials: int

    @property
    def share(self) -> float:
        return self.hits / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.hits, self.trials)


@dataclass(frozen=True)
class Difference:
    """How much higher a rate is than another: see `newcombe_interval`."""

    before: Rate
    after: Rate

    @property
    def share(self) -> float:
        return self.after.share - self.before.share

    @property
    def interval(self) -> tuple[float, float]:
        return newcombe_interval(
            (self.before.hits, self.before.trials), (self.after.hits, self.after.trials)
        )


@dataclass(frozen=True)
class Terms:
    """Success by attack, and what it changes by.

    Attributes:
        rates: model to attack to share of successes.
        shared: the attacks that all models faced.
        means: model to the mean of its rates over these, as in the paper; none over a single one.
        compared: a term, see `EFFECTS`, or "before → after" to the two models compared.
        differences: the same names to attack to difference.
        over_refusal: model to kind of harmless requests to share refused: what success was bought
            with.
    """

    rates: Mapping[str, Mapping[str, Rate]]
    shared: Sequence[str]
    means: Mapping[str, float]
    compared: Mapping[str, tuple[str, str]]
    differences: Mapping[str, Mapping[str, Difference]]
    over_refusal: Mapping[str, Mapping[str, Rate]]


def first_tokens(models: Mapping[str, Entry]) -> dict[str, dict[str, Rate]]:
    """How many refusals start in the first five tokens of the response.

    Only attacks count that leave the start to the model, and only refusals whose start is known.

    Args:
        models: name to entry.

    Returns:
        model to attack to share of its refusals; "all" is over all of them. What has no refusal is
        left out.

    Source: arXiv 2407.09121, table 1.
    """
    found = {}
    for name, entry in models.items():
        positions = _positions(entry)
        positions["all"] = [at for one in positions.values() for at in one]
        found[name] = {
            attack: Rate(sum(at < FIRST for at in one), len(one))
            for attack, one in positions.items()
            if one
        }
    return found


def refusal_positions(models: Mapping[str, Entry]) -> dict[str, dict[str, Rate]]:
    """Where refusals start: in the first five tokens of the response, in the next 25, or later.

    Args:
        models: name to entry.

    Returns:
        model to part of the response, see `BINS`, to share of the refusals that `first_tokens`
        counts. A model without any is left out.

    Source: arXiv 2407.09121, figure 4.
    """
    found = {}
    for name, entry in models.items():
        positions = [at for one in _positions(entry).values() for at in one]
        if positions:
            found[name] = {
                part: Rate(sum(lowest <= at < end for at in positions), len(positions))
                for part, (lowest, end) in BINS.items()
            }
    return found


def terms(models: Mapping[str, Entry], recipes: Mapping[str, str] | None = None) -> Terms:
    """Success by attack, and what each term of the objective changes of it.

    Differences are between independent samples: where models were asked the same, they are known
    better than their intervals say.

    Args:
        models: name to entry.
        recipes: a recipe of `RECIPES` to the model that it made; None: models named like recipes.
            Every other model is compared with the vanilla one, or the first where there is none.

    Raises:
        ValueError: recipes name an unknown recipe or model, or two recipes one model.

    Source: arXiv 2407.09121, table 4.
    """
    if recipes is None:
        recipes = {recipe: recipe for recipe in RECIPES if recipe in models}
    for recipe, name in recipes.items():
        if recipe not in RECIPES:
            raise ValueError(f"recipes must be of {', '.join(RECIPES)}, got {recipe!r}")
        if name not in models:
            raise ValueError(f"recipes: {recipe} must be one of {list(models)}, got {name!r}")
    if len(set(recipes.values())) < len(recipes):
        raise ValueError("recipes must name a model each, got one model twice")
    rates = {name: _rates(entry, "asr.") for name, entry in models.items()}
    shared = [
        attack
        for attack in next(iter(rates.values()), {})
        if all(attack in one for one in rates.values())
    ]
    compared = {
        effect: (recipes[before], recipes[after])
        for effect, (before, after) in EFFECTS.items()
        if before in recipes and after in recipes
    }
    baseline = recipes.get("vanilla", next(iter(models), ""))
    compared |= {
        f"{baseline} → {name}": (baseline, name)
        for name in models
        if name != baseline and name not in recipes.values()
    }
    return Terms(
        rates=rates,
        shared=shared,
        means={
            name: sum(one[attack].share for attack in shared) / len(shared)
            for name, one in rates.items()
            if len(shared) > 1
        },
        compared=compared,
        differences={
            effect: {
                attack: Difference(rates[before][attack], after_rate)
                for attack, after_rate in rates[after].items()
                if attack in rates[before]
            }
            for effect, (before, after) in compared.items()
        },
        over_refusal={name: _rates(entry, "over_refusal") for name, entry in models.items()},
    )


def names_of(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names that some model of an analysis has, in order of appearance."""
    return list(dict.fromkeys(name for one in found.values() for name in one))


def _rates(entry: Entry, start: str) -> dict[str, Rate]:
    """Of metrics that start so, under the rest of them."""
    return {
        metric.removeprefix(start).removeprefix("."): Rate(count["hits"], count["trials"])
        for metric, count in leaves(entry.get("counts", {}))
        if metric.startswith(start) and count["trials"]
    }


def _positions(entry: Entry) -> dict[str, Sequence[int]]:
    """Attacks that leave the start to the model, and where refusals of each start."""
    return {
        attack: positions
        for attack, positions in leaves(entry.get("refusal_positions", {}).get("asr", {}))
        if attack in _UNFILLED or not attack.startswith(_PREFILLED)
    }
