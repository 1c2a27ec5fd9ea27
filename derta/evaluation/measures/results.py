"""Results of an evaluation: by model and seed, pooled over seeds, and as a summary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from derta.evaluation.measures.curve import detector_auc, mean_curve, passed, stopped
from derta.evaluation.measures.statistics import dispersion, wilson_interval

DIGITS = 6  # finer than the resolution of any evaluation
# Attacks that prefill nothing, and those with the same prompts, so that the answers are the same.
UNFILLED = {"prefill.0": "direct", "template_prefill.0": "template"}
SINGLE_DRAWS = "sampling.1"


@dataclass(frozen=True)
class Outcome:
    """The counts of one scenario.

    Attributes:
        metric: see `Scenario.metric`.
        hits: number of trials that count, or the sum of their shares in [0, 1]. Wilson's interval
            of the latter is too wide, if anything: shares vary no more than trials of their mean.
        trials: number of decided trials.
        left_out: number of records without a trial.
        empty: number of empty answers.
        positions: start of each refusal, in tokens of the response with its prefilled part.
        undecided: number of trials on which the judge is undecided, not included in `trials`.
        answers: number of all answers: `trials`, `undecided`, and empty ones unless these are
            trials; None: there are no such empty ones.
        per_request: number of trials of one request, which are not independent: intervals count a
            request once, and so do shares over several attacks.
        seeds: hits and trials of each seed, if several are pooled.
    """

    metric: str
    hits: float
    trials: int
    left_out: int = 0
    empty: int = 0
    positions: tuple[int, ...] = ()
    undecided: int = 0
    answers: int | None = None
    per_request: int = 1
    seeds: tuple[tuple[float, int], ...] = ()

    def __post_init__(self) -> None:
        if self.answers is None:
            object.__setattr__(self, "answers", self.trials + self.undecided)

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of the rate, see `wilson_interval`, as wide as seeds demand."""
        as_one = self.per_request * self.dispersion
        return wilson_interval(self.hits / as_one, self.trials / as_one)

    @property
    def dispersion(self) -> float:
        """The dispersion of the rates of seeds, see `statistics.dispersion`."""
        known = [(hits, trials) for hits, trials in self.seeds if trials]
        if not known:
            return 1.0
        hits, trials = ([x / self.per_request for x in of] for of in zip(*known, strict=True))
        return dispersion(hits, trials)

    def __add__(self, other: Outcome) -> Outcome:
        assert (self.metric, self.per_request) == (other.metric, other.per_request)
        return Outcome(
            self.metric,
            self.hits + other.hits,
            self.trials + other.trials,
            self.left_out + other.left_out,
            self.empty + other.empty,
            self.positions + other.positions,
            self.undecided + other.undecided,
            (self.answers or 0) + (other.answers or 0),
            self.per_request,
            self._by_seed() + other._by_seed(),
        )

    def _by_seed(self) -> tuple[tuple[float, int], ...]:
        return self.seeds or ((self.hits, self.trials),)


@dataclass(frozen=True)
class Sample:
    """One answer, kept only on request.

    Attributes:
        metric: metric of the scenario.
        id: id of the record.
        request: the last message.
        prefilled: the prefilled start of the answer.
        answer: the text that the model wrote.
        counted: if True, the answer counts for the metric; None if the judge is undecided.
    """

    metric: str
    id: str
    request: str
    prefilled: str
    answer: str
    counted: bool | None


@dataclass(frozen=True)
class VariantResult:
    """The result of `evaluate_model` for one model.

    Attributes:
        outcomes: outcomes of the scenarios with records, by the first judge.
        judge: name of the first judge.
        judges: name of every other judge to its outcomes, for scenarios that need a judge.
        harmful_curves, benign_curves, borderline_curves: see `refusal_curve`.
        refusals: number of refusal tokens that the curves add up.
        harmful_ranks: see `derta.evaluation.teacher_forcing.ResponseCurves`.
        top_k: the values of k that rank curves are of.
        perplexity: sum in nats and count of tokens, see `teacher_forcing.perplexity`.
        lm_eval: task to figures, see `derta.evaluation.lm_tasks`.
        conditions: settings on which the rates depend, see `EvaluationSettings.conditions`.
        refusal_starts: tokens, as text, that attacks forbade at the start of an answer.
        samples: answers, if requested.
        seconds: duration without the judges, which read the answers of all models at once.
    """

    outcomes: tuple[Outcome, ...] = ()
    judge: str = "keyword"
    judges: Mapping[str, tuple[Outcome, ...]] = field(default_factory=dict)
    harmful_curves: tuple[np.ndarray, ...] = ()
    benign_curves: tuple[np.ndarray, ...] = ()
    borderline_curves: tuple[np.ndarray, ...] = ()
    refusals: int = 1
    harmful_ranks: tuple[np.ndarray, ...] = ()
    top_k: tuple[int, ...] = ()
    perplexity: tuple[float, int] = (0.0, 0)
    lm_eval: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    refusal_starts: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return rates, intervals and counts as trees with the levels of the metrics, and the rest.

        Figures that were not measured are left out.
        """
        result = {
            **_tree(self.outcomes),
            "judge": self.judge,
            "seconds": round(self.seconds, 1),
        }
        if self.judges:
            result["judges"] = {name: _tree(outcomes) for name, outcomes in self.judges.items()}
        nll, tokens = self.perplexity
        if tokens:
            result["helpful_perplexity"] = _rounded(math.exp(nll / tokens))
        curves = {
            "harmful": self.harmful_curves,
            "benign": self.benign_curves,
            "borderline": self.borderline_curves,
        }
        means = {kind: mean_curve(curve) for kind, curve in curves.items() if curve}
        if means:
            result["refusal_curve"] = {
                kind: [_rounded(p) for p in mean] for kind, (mean, _) in means.items()
            }
            result["refusal_curve_counts"] = {kind: n.tolist() for kind, (_, n) in means.items()}
            result["refusal_tokens"] = self.refusals
        if self.harmful_ranks:
            result |= rank_curves("harmful", self.harmful_ranks, self.top_k)
        if self.harmful_curves and self.benign_curves:
            result["detector_auc"] = _rounded(detector_auc(self.harmful_curves, self.benign_curves))
        if self.lm_eval:
            result["lm_eval"] = {task: dict(figures) for task, figures in self.lm_eval.items()}
        if self.conditions:
            result["conditions"] = dict(self.conditions)
        if self.refusal_starts:
            result["refusal_starts"] = list(self.refusal_starts)
        if self.samples:
            result["samples"] = [vars(sample) for sample in self.samples]
        return result


def rank_curves(kind: str, ranks: Sequence[np.ndarray], top_k: Sequence[int]) -> dict[str, Any]:
    """Return a summary's entries of the rank curves of one kind of responses.

    Args:
        kind: kind of the responses.
        ranks: (|h|,) each, see `derta.evaluation.teacher_forcing.ResponseCurves`.
        top_k: values of k.

    Returns:
        {"rank_curve": {kind: {k: [...]}}, "rank_curve_counts": {kind: [...]}}: at each depth, the
        share of the responses long enough whose next token is among the top k, and their number.
    """
    means = {str(k): mean_curve([one < k for one in ranks])[0] for k in top_k}
    _, counts = mean_curve(ranks)
    return {
        "rank_curve": {kind: {k: [_rounded(share) for share in mean] for k, mean in means.items()}},
        "rank_curve_counts": {kind: counts.tolist()},
    }


def _tree(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return rates, intervals, counts and positions, with the levels of the metrics.

    "empty" holds the shares of answers to attacks and to harmless requests that are empty. Answers
    that two attacks have in common count once, see `with_own_answers`, and so do all that were
    drawn for a request. Attacks share their requests, so the interval of the former counts as many
    answers as there are requests of the attack with most. A count has its "dispersion" if that of
    seeds is above 1.
    """
    tree: dict[str, Any] = _rates(outcomes)
    intervals: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    positions: dict[str, Any] = {}
    for one in outcomes:
        if one.trials:
            _place(intervals, one.metric, [_rounded(end) for end in one.interval])
            _place(positions, one.metric, sorted(one.positions))
        names = ("trials", "left_out", "empty", "undecided", "answers", "per_request")
        hits = one.hits if isinstance(one.hits, int) else _rounded(one.hits)
        count = {"hits": hits, **{name: getattr(one, name) for name in names}}
        if one.dispersion > 1:
            count["dispersion"] = _rounded(one.dispersion)
        _place(counts, one.metric, count)
    for kind, independent in (("asr", max), ("over_refusal", sum)):
        named = {
            one.metric.removeprefix(f"{kind}."): one
            for one in outcomes
            if one.metric.startswith(f"{kind}.") and one.answers
        }
        own = [named[name] for name in with_own_answers(named)]
        answers = [(one.answers or 0) / one.per_request for one in own]
        if answers:
            share = sum(one.empty / one.per_request for one in own) / sum(answers)
            _place(tree, f"empty.{kind}", _rounded(share))
            requests = independent(answers)
            interval = wilson_interval(share * requests, requests)
            _place(intervals, f"empty.{kind}", [_rounded(end) for end in interval])
    return {**tree, "intervals": intervals, "counts": counts, "refusal_positions": positions}


def with_own_answers(attacks: Collection[str]) -> list[str]:
    """Return the attacks without those whose answers are all those of another one among them.

    The worst of several draws has the answers of the single ones.
    """

    def same(attack: str) -> str | None:
        if attack.startswith("sampling.") and attack != SINGLE_DRAWS:
            return SINGLE_DRAWS
        return UNFILLED.get(attack)

    return [attack for attack in attacks if same(attack) not in attacks]


def _rates(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for one in outcomes:
        if one.trials:
            _place(rates, one.metric, _rounded(one.hits / one.trials))
    return rates


def pool(results: Sequence[VariantResult]) -> VariantResult:
    """Pool the results of a variant's seeds; every trial has the same weight.

    If the seeds have equal numbers of trials, each rate is the mean of theirs. Figures of lm-eval
    are means over the seeds that have them.
    """
    judges = dict.fromkeys(name for result in results for name in result.judges)
    return VariantResult(
        outcomes=_added(result.outcomes for result in results),
        judge=results[0].judge,
        judges={name: _added(result.judges.get(name, ()) for result in results) for name in judges},
        harmful_curves=tuple(curve for result in results for curve in result.harmful_curves),
        benign_curves=tuple(curve for result in results for curve in result.benign_curves),
        borderline_curves=tuple(curve for result in results for curve in result.borderline_curves),
        refusals=max(result.refusals for result in results),
        harmful_ranks=tuple(one for result in results for one in result.harmful_ranks),
        top_k=results[0].top_k,
        perplexity=(
            math.fsum(result.perplexity[0] for result in results),
            sum(result.perplexity[1] for result in results),
        ),
        lm_eval=_mean_figures([result.lm_eval for result in results]),
        conditions=results[0].conditions,
        refusal_starts=results[0].refusal_starts,
        samples=results[0].samples,
        seconds=math.fsum(result.seconds for result in results),
    )


def _added(several: Iterable[tuple[Outcome, ...]]) -> tuple[Outcome, ...]:
    added: dict[str, Outcome] = {}
    for one in itertools.chain.from_iterable(several):
        known = added.get(one.metric)
        added[one.metric] = one if known is None else known + one
    return tuple(added.values())


def _mean_figures(
    several: Sequence[Mapping[str, Mapping[str, float]]],
) -> dict[str, dict[str, float]]:
    values: dict[str, dict[str, list[float]]] = {}
    for tasks in several:
        for task, figures in tasks.items():
            for name, value in figures.items():
                values.setdefault(task, {}).setdefault(name, []).append(value)
    return {
        task: {name: _rounded(math.fsum(found) / len(found)) for name, found in figures.items()}
        for task, figures in values.items()
    }


def forced_outcomes(result: VariantResult, prefill_depths: Sequence[int]) -> tuple[Outcome, ...]:
    """Return the rates of `forced_rates` as outcomes, each prefill depth by itself.

    Args:
        result: has refusal curves.
        prefill_depths: numbers of prefilled tokens.

    Returns:
        `forced.{depth}`, attack success, and `forced_over_refusal` of benign responses; those
        without responses are left out.
    """
    seen = {
        f"forced.{depth}": passed(result.harmful_curves, depth, result.refusals)
        for depth in prefill_depths
    }
    seen["forced_over_refusal"] = stopped(result.benign_curves, result.refusals)
    return tuple(Outcome(metric, sum(of), len(of)) for metric, of in seen.items() if of)


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
    """Return the content of summary.json, the input of `write_report` and `format_table`.

    Args:
        variants: name to results, one per seed; names in the order of the report.
        seconds: total duration.
        seeds: seeds of the results.
        tokens: name to number of tuning tokens.
        loss: name to a training history for every seed, as in `trainer.state.log_history`: rows
            with "step", "loss" and optionally "mle_loss" and "rto_loss".
        checkpoints: name to rows for every seed, each with "tokens", "asr", "over_refusal" and
            optionally "over_refusal_borderline", see `forced_rates`.

    Returns:
        {"variants": {NAME: {"asr": {"direct": x, "prefill": {"0": x, ...}, "file": {NAME: x, ...},
        ...}, "over_refusal": {"benign": x, "borderline": x}, "empty": {"asr": x, "over_refusal":
        x}, "helpful_accuracy": x, "accuracy": {NAME: x}, "refusal_curve": {"harmful": [...],
        "benign": [...]}, "judges": {NAME: {"asr": ..., "over_refusal": ...}}, "lm_eval": {TASK:
        {FIGURE: x}}, ...}}, "seeds": [...], "tokens": {...}, "seconds": x}. With several seeds,
        rates are pooled, the rates of each seed are in "by_seed", and rows of "loss" and
        "checkpoints" are means.
    """
    entries = {}
    for name, results in variants.items():
        entry = pool(results).to_dict()
        if len(results) > 1:
            entry["by_seed"] = [_rates(result.outcomes) for result in results]
        if loss and name in loss:
            histories = [[row for row in history if "loss" in row] for history in loss[name]]
            entry["loss"] = _mean_rows(
                histories, "step", ("loss", "mle_loss", "rto_loss"), origin=f"loss of {name}"
            )
        if checkpoints and name in checkpoints:
            entry["checkpoints"] = _mean_rows(
                checkpoints[name],
                "tokens",
                ("asr", "over_refusal", "over_refusal_borderline"),
                origin=f"checkpoints of {name}",
            )
        entries[name] = entry
    return {
        "variants": entries,
        "seeds": list(seeds),
        "tokens": dict(tokens or {}),
        "seconds": round(seconds, 1),
    }


def _mean_rows(
    histories: Sequence[Sequence[Row]], x: str, names: Sequence[str], *, origin: str
) -> list[dict[str, float]]:
    """Return the mean of each row over seeds, including the mean of `x`."""
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


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each metric of a tree and its figure; a mapping with "trials" is a figure."""
    for name, below in tree.items():
        if isinstance(below, Mapping) and not isinstance(below.get("trials"), int):
            yield from leaves(below, f"{above}{name}.")
        else:
            yield above + name, below


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)
