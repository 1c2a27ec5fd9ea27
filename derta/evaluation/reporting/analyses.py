"""The paper's analyses of refusals and attacks, for any number of models.

Each analysis reads the entries of models, which are those of a summary's variants, see `summarize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from derta.evaluation.measures.results import UNFILLED, leaves, with_own_answers
from derta.evaluation.measures.statistics import newcombe_interval, wilson_interval

Entry = Mapping[str, Any]

# The paper counts positions from 1, and its start is the first five; positions here count from 0.
FIRST = 5
BINS = {"1–5": (0, 5), "6–30": (5, 30), "after 30": (30, float("inf"))}

RECIPES = ("vanilla", "prefix_only", "rto_only", "derta")
# The effect of a term: the recipe without it, and the recipe with it.
EFFECTS = {
    "harmful prefix": ("vanilla", "prefix_only"),
    "RTO": ("vanilla", "rto_only"),
    "both": ("vanilla", "derta"),
    "harmful prefix, given RTO": ("rto_only", "derta"),
    "RTO, given harmful prefix": ("prefix_only", "derta"),
}

# Attacks that write the start of the response or forbid refusals there: none can start there.
_PREFILLED = ("prefill.", "prefilled", "template_prefill.", "refusal_banned.", "prefill_thinking.")


@dataclass(frozen=True)
class Rate:
    """A share of trials.

    Attributes:
        hits: number of trials that count, or the sum of their shares, in 0..trials.
        trials: number of trials, above 0; a fraction where several of one request count once.
        per_request: number of trials that the interval counts once: those of one request, times the
            dispersion of seeds; over several attacks, their mean number.
    """

    hits: float
    trials: float
    per_request: float = 1

    @property
    def share(self) -> float:
        return self.hits / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(*self.independent)

    @property
    def independent(self) -> tuple[float, float]:
        """Hits and trials, a request counting once."""
        return self.hits / self.per_request, self.trials / self.per_request


@dataclass(frozen=True)
class Difference:
    """A rate less another, with the interval of `newcombe_interval`."""

    before: Rate
    after: Rate

    @property
    def share(self) -> float:
        return self.after.share - self.before.share

    @property
    def interval(self) -> tuple[float, float]:
        return newcombe_interval(self.before.independent, self.after.independent)


@dataclass(frozen=True)
class Terms:
    """Success by attack, and the effect of each term of the objective on it.

    Attributes:
        rates: model to attack to share of successes.
        shared: attacks on all models, without those that repeat one of them, see `UNFILLED`.
        means: model to the mean of its rates over the shared attacks, as in the paper; empty if
            fewer than two are shared.
        compared: a term, see `EFFECTS`, or "before → after" to the two models compared.
        differences: the keys of `compared` to attack to difference.
        over_refusal: model to kind of harmless requests to share refused.
    """

    rates: Mapping[str, Mapping[str, Rate]]
    shared: Sequence[str]
    means: Mapping[str, float]
    compared: Mapping[str, tuple[str, str]]
    differences: Mapping[str, Mapping[str, Difference]]
    over_refusal: Mapping[str, Mapping[str, Rate]]


def first_tokens(models: Mapping[str, Entry]) -> dict[str, dict[str, Rate]]:
    """Count the refusals that start in the first five tokens of the response.

    Only attacks that leave the start of the response to the model count, and only refusals with a
    known start.

    Args:
        models: name to entry.

    Returns:
        model to attack to share of its refusals; "all" is over all attacks, see `_over_attacks`.
        Attacks without refusals are left out.

    Source: arXiv 2407.09121, table 1.
    """
    found = {}
    for name, entry in models.items():
        rates = _starting(entry, 0, FIRST)
        found[name] = rates | ({"all": _over_attacks(rates)} if rates else {})
    return found


def refusal_positions(models: Mapping[str, Entry]) -> dict[str, dict[str, Rate]]:
    """Count refusals by their start: in the response's first five tokens, in the next 25, or later.

    Args:
        models: name to entry.

    Returns:
        model to part of the response, see `BINS`, to share of the refusals that `first_tokens`
        counts in "all". Models without refusals are left out.

    Source: arXiv 2407.09121, figure 4.
    """
    return {
        name: {
            part: _over_attacks(rates)
            for part, (lowest, end) in BINS.items()
            if (rates := _starting(entry, lowest, end))
        }
        for name, entry in models.items()
        if any(_positions(entry).values())
    }


def terms(models: Mapping[str, Entry], recipes: Mapping[str, str] | None = None) -> Terms:
    """Compare success by attack between the models trained with and without each term.

    The intervals of differences assume independent samples. For models that answered the same
    requests, they are wider than necessary.

    Args:
        models: name to entry.
        recipes: recipe in `RECIPES` to the model trained with it; None: models named like recipes.
            Every other model is compared with the vanilla model, or with the first model if there
            is no vanilla one.

    Raises:
        ValueError: recipes name an unknown recipe or model, or the same model twice.

    Source: arXiv 2407.09121, table 4.
    """
    if recipes is None:
        recipes = {recipe: recipe for recipe in RECIPES if recipe in models}
    for recipe, name in recipes.items():
        if recipe not in RECIPES:
            raise ValueError(f"recipes must be among {', '.join(RECIPES)}, got {recipe!r}")
        if name not in models:
            raise ValueError(f"recipes: {recipe} must be one of {list(models)}, got {name!r}")
    if len(set(recipes.values())) < len(recipes):
        raise ValueError("recipes must name different models, got the same model twice")
    rates = {name: _rates(entry, "asr.") for name, entry in models.items()}
    everywhere = [
        attack
        for attack in next(iter(rates.values()), {})
        if all(attack in one for one in rates.values())
    ]
    shared = [attack for attack in everywhere if UNFILLED.get(attack) not in everywhere]
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


def empty_answers(models: Mapping[str, Entry]) -> dict[str, dict[str, Rate]]:
    """Count the empty answers to attacks and to harmless requests.

    Args:
        models: name to entry.

    Returns:
        model to metric to share of empty answers, for metrics that some model answers so.
    """
    found: dict[str, dict[str, Rate]] = {}
    for name, entry in models.items():
        found[name] = {}
        for metric, count in leaves(entry.get("counts", {})):
            answers = count.get("answers", count["trials"] + count.get("undecided", 0))
            if metric.startswith(("asr.", "over_refusal.")) and answers:
                found[name][metric] = Rate(count["empty"], answers, count.get("per_request", 1))
    some = {metric for rates in found.values() for metric, rate in rates.items() if rate.hits}
    return {
        name: {metric: rate for metric, rate in rates.items() if metric in some}
        for name, rates in found.items()
        if some
    }


def reach(models: Mapping[str, Entry]) -> dict[str, dict[str, dict[str, Rate]]]:
    """Return how many harmful tokens are among a model's top k, and what attackers make of it.

    Args:
        models: name to entry.

    Returns:
        "tokens" and "attacks", see `derta.evaluation.measures.ranks.RankAttack.outcomes`, each
        model to k to rate.

    Source: arXiv 2512.05518.
    """
    metrics = {"tokens": "top_k.", "attacks": "rank_assisted."}
    return {
        what: {name: _rates(entry, metric) for name, entry in models.items()}
        for what, metric in metrics.items()
    }


def names_of(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names that some model of an analysis has, in order of appearance."""
    return list(dict.fromkeys(name for one in found.values() for name in one))


def _rates(entry: Entry, start: str) -> dict[str, Rate]:
    """Return the rates of metrics that start with `start`, by the rest of their names."""
    return {
        metric.removeprefix(start).removeprefix("."): Rate(
            count["hits"],
            count["trials"],
            count.get("per_request", 1) * count.get("dispersion", 1),
        )
        for metric, count in leaves(entry.get("counts", {}))
        if metric.startswith(start) and count["trials"]
    }


def _positions(entry: Entry) -> dict[str, Sequence[int]]:
    """Return the starts of refusals, by attack, for attacks that leave the start to the model."""
    return {
        attack: positions
        for attack, positions in leaves(entry.get("refusal_positions", {}).get("asr", {}))
        if attack in UNFILLED or not attack.startswith(_PREFILLED)
    }


def _starting(entry: Entry, lowest: float, end: float) -> dict[str, Rate]:
    """Return the share of refusals that start in [lowest, end), by attack that has refusals."""
    counts = dict(leaves(entry.get("counts", {}).get("asr", {})))
    return {
        attack: Rate(
            sum(lowest <= at < end for at in positions),
            len(positions),
            counts.get(attack, {}).get("per_request", 1),
        )
        for attack, positions in _positions(entry).items()
        if positions
    }


def _over_attacks(rates: Mapping[str, Rate]) -> Rate:
    """Return the share over several attacks.

    Answers that two attacks have in common count once, and so do all that were drawn for a request.
    Attacks share their requests, so the interval counts as many trials as the attack with most has.
    """
    own = [rates[attack].independent for attack in with_own_answers(rates)]
    hits, trials = (sum(part) for part in zip(*own, strict=True))
    return Rate(hits, trials, trials / max(of for _, of in own))
