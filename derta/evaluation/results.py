"""What an evaluation found: per model and seed, pooled over seeds, and as a summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from derta.evaluation.curve import detector_auc, mean_curve
from derta.evaluation.statistics import wilson_interval

DIGITS = 6  # more than any evaluation can tell apart


@dataclass(frozen=True)
class Outcome:
    """What one scenario came to.

    Attributes:
        metric: see `Scenario.metric`.
        hits: trials that count.
        trials: trials run.
        left_out: records of which the scenario made no trial.
        empty: trials that the model answered with nothing.
        positions: where refusals start, in tokens of the response, a prefilled part included.
    """

    metric: str
    hits: int
    trials: int
    left_out: int = 0
    empty: int = 0
    positions: tuple[int, ...] = ()

    def __add__(self, other: Outcome) -> Outcome:
        assert self.metric == other.metric
        return Outcome(
            self.metric,
            self.hits + other.hits,
            self.trials + other.trials,
            self.left_out + other.left_out,
            self.empty + other.empty,
            self.positions + other.positions,
        )


@dataclass(frozen=True)
class Sample:
    """One answer, kept only if asked for.

    Attributes:
        metric: the scenario's.
        id: the record's.
        request: the last message.
        prefilled: the start of the answer that the model was given.
        answer: what the model wrote.
        counted: whether it counts for the metric.
    """

    metric: str
    id: str
    request: str
    prefilled: str
    answer: str
    counted: bool


@dataclass(frozen=True)
class VariantResult:
    """What `evaluate_model` found for one model.

    Attributes:
        outcomes: one a scenario that had a record.
        harmful_curves, benign_curves: see `refusal_curve`.
        perplexity: sum in nats and count of tokens, see `teacher_forcing.perplexity`.
        samples: answers, if asked for.
        seconds: how long it took.
    """

    outcomes: tuple[Outcome, ...] = ()
    harmful_curves: tuple[np.ndarray, ...] = ()
    benign_curves: tuple[np.ndarray, ...] = ()
    perplexity: tuple[float, int] = (0.0, 0)
    samples: tuple[Sample, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Rates, intervals and counts, each a tree with the levels of the metrics; and the rest.

        A figure that was not measured is left out.
        """
        rates: dict[str, Any] = {}
        intervals: dict[str, Any] = {}
        counts: dict[str, Any] = {}
        positions: dict[str, Any] = {}
        for one in self.outcomes:
            if one.trials:
                interval = wilson_interval(one.hits, one.trials)
                _place(rates, one.metric, _rounded(one.hits / one.trials))
                _place(intervals, one.metric, [_rounded(end) for end in interval])
                _place(positions, one.metric, sorted(one.positions))
            _place(
                counts,
                one.metric,
                {
                    "hits": one.hits,
                    "trials": one.trials,
                    "left_out": one.left_out,
                    "empty": one.empty,
                },
            )
        result = {
            **rates,
            "intervals": intervals,
            "counts": counts,
            "refusal_positions": positions,
            "seconds": round(self.seconds, 1),
        }
        nll, tokens = self.perplexity
        if tokens:
            result["helpful_perplexity"] = _rounded(math.exp(nll / tokens))
        curves = {"harmful": self.harmful_curves, "benign": self.benign_curves}
        means = {kind: mean_curve(curve) for kind, curve in curves.items() if curve}
        if means:
            result["refusal_curve"] = {
                kind: [_rounded(p) for p in mean] for kind, (mean, _) in means.items()
            }
            result["refusal_curve_counts"] = {kind: n.tolist() for kind, (_, n) in means.items()}
        if len(means) == 2:
            result["detector_auc"] = _rounded(detector_auc(self.harmful_curves, self.benign_curves))
        if self.samples:
            result["samples"] = [vars(sample) for sample in self.samples]
        return result


def pool(results: Sequence[VariantResult]) -> VariantResult:
    """One result of several models of a variant (its seeds): every trial counts the same.

    Where the models had equal numbers of trials, each rate is the mean of theirs.
    """
    outcomes: dict[str, Outcome] = {}
    for result in results:
        for one in result.outcomes:
            known = outcomes.get(one.metric)
            outcomes[one.metric] = one if known is None else known + one
    return VariantResult(
        outcomes=tuple(outcomes.values()),
        harmful_curves=tuple(curve for result in results for curve in result.harmful_curves),
        benign_curves=tuple(curve for result in results for curve in result.benign_curves),
        perplexity=(
            math.fsum(result.perplexity[0] for result in results),
            sum(result.perplexity[1] for result in results),
        ),
        samples=results[0].samples,
        seconds=math.fsum(result.seconds for result in results),
    )


Row = Mapping[str, float]


def summarize(
    variants: Mapping[str, Sequence[VariantResult]],
    *,
    seconds: float,
    seeds: Sequence[int] = (),
    tokens: Mapping[str, int] | None = None,
    loss: Mapping[str, Sequence[Sequence[Row]]] | None = None,
    checkpoints: Mapping[str, Sequence[Sequence[Row]]] | None = None,
) -> dict[str, Any]:
    """The content of summary.json, which `write_report` and `format_table` read.

    Args:
        variants: name to results, one a seed; names in the order of the report.
        seconds: how long everything took.
        seeds: of the results.
        tokens: name to tokens that it was tuned on.
        loss: name to a training's history for every seed, as in `trainer.state.log_history`: rows
            with "step", "loss" and, if there, "mle_loss" and "rto_loss".
        checkpoints: name to rows for every seed, each with "tokens", "asr" and "over_refusal", see
            `forced_rates`.

    Returns:
        {"variants": {NAME: {"asr": {"direct": x, "prefill": {"0": x, ...}, "completion": x},
        "over_refusal": x, "helpful_accuracy": x, "refusal_curve": {"harmful": [...], "benign":
        [...]}, ...}}, "seeds": [...], "tokens": {...}, "seconds": x}. Of several seeds, rates are
        pooled, with those of each in "by_seed"; rows of "loss" and "checkpoints" are means.
    """
    entries = {}
    for name, results in variants.items():
        entry = pool(results).to_dict()
        if len(results) > 1:
            entry["by_seed"] = [_rates_alone(result) for result in results]
        if loss and name in loss:
            histories = [[row for row in history if "loss" in row] for history in loss[name]]
            entry["loss"] = _mean_rows(
                histories, "step", ("loss", "mle_loss", "rto_loss"), origin=f"loss of {name}"
            )
        if checkpoints and name in checkpoints:
            entry["checkpoints"] = _mean_rows(
                checkpoints[name],
                "tokens",
                ("asr", "over_refusal"),
                origin=f"checkpoints of {name}",
            )
        entries[name] = entry
    return {
        "variants": entries,
        "seeds": list(seeds),
        "tokens": dict(tokens or {}),
        "seconds": round(seconds, 1),
    }


def _rates_alone(result: VariantResult) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for one in result.outcomes:
        if one.trials:
            _place(rates, one.metric, _rounded(one.hits / one.trials))
    return rates


def _mean_rows(
    histories: Sequence[Sequence[Row]], x: str, names: Sequence[str], *, origin: str
) -> list[dict[str, float]]:
    """Row by row over seeds; x is what seeds share, and its mean where they differ a little."""
    lengths = sorted({len(history) for history in histories})
    if len(lengths) > 1:
        raise ValueError(f"{origin} must have equally many rows for every seed, got {lengths}")
    rows = []
    for seeds in zip(*histories, strict=True):
        shared = [name for name in (x, *names) if all(name in row for row in seeds)]
        rows.append({name: _rounded(np.mean([row[name] for row in seeds])) for name in shared})
    return rows


def _place(tree: dict[str, Any], metric: str, value: Any) -> None:
    *levels, leaf = metric.split(".")
    for level in levels:
        tree = tree.setdefault(level, {})
    tree[leaf] = value


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)
