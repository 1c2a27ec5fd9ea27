"""Records of results, one per number, and their files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.harness.interleave import Outcome
from benchmarks.harness.question import Question
from benchmarks.harness.requirements import Figures, Requirement

Record = dict[str, Any]


def records_of(outcomes: Iterable[Outcome], question: Question) -> list[Record]:
    """Return a record for each number: case, implementation, quantity, value; a reason if null."""
    outcomes = list(outcomes)
    baseline = {
        o.job.case: o.errors
        for o in outcomes
        if o.job.name == question.baseline and o.reason is None
    }
    records = []
    for outcome in outcomes:
        about = {"case": outcome.job.case.name, "implementation": outcome.job.name}
        if outcome.reason is not None:
            records.append(about | _record("failure", None, outcome.reason))
            continue
        case = outcome.job.case
        values = outcome.errors | _of_turns(outcome.turns)
        values |= question.derived(case, outcome.job.implementation, values)
        if case in baseline:
            values["right"] = question.is_right(case, outcome.errors, baseline[case])
        else:
            reason = f"{question.baseline} did not run, by which it is judged"
            records.append(about | _record("right", None, reason))
        records += [about | _record(quantity, value) for quantity, value in values.items()]
    return records


def _record(quantity: str, value: float | None, reason: str | None = None) -> Record:
    if value is None or not math.isfinite(value):
        return {"quantity": quantity, "value": None, "reason": reason or f"it is {value}"}
    return {"quantity": quantity, "value": float(f"{value:.6g}")}


def _of_turns(turns: list[dict[str, Any]]) -> dict[str, float]:
    """Return quantiles of the times, the largest memory, and the machine's state."""
    values: dict[str, float] = {}
    for quantity in (name for name in turns[0] if name.endswith("_ms")):
        times = [ms for turn in turns for ms in turn[quantity]]
        tenths = quantiles(times, n=10, method="inclusive") if times[1:] else times * 9
        values |= {f"{quantity}_p{p}": tenths[p // 10 - 1] for p in (20, 50, 80)}
    values |= {"timings": len(times), "peak_mib": max(turn["peak_mib"] for turn in turns)}
    for quantity, taken in (("others_share", median), ("sm_clock_mhz", min)):
        if quantity in turns[0]:
            values[quantity] = taken(turn[quantity] for turn in turns)
    return values


def figures(records: Iterable[Record]) -> Figures:
    """Return all numbers by case and implementation, in order; failures have no number."""
    found: Figures = {}
    for record in records:
        quantities = found.setdefault((record["case"], record["implementation"]), {})
        if record["value"] is not None:
            quantities[record["quantity"]] = record["value"]
    return found


def verdicts(
    records: list[Record], question: Question
) -> list[tuple[Requirement, str, float | None]]:
    """Return the requirements on the recorded cases, with verdicts and values."""
    known = figures(records)
    cases = {case for case, _ in known}
    return [
        (requirement, *requirement.judge(known, question.ours))
        for requirement in question.requirements()
        if requirement.case.name in cases
    ]


def load_groups(path: Path) -> dict[str, Any]:
    """Load groups by name, each with its machine and records; empty without a file."""
    return json.loads(path.read_text(encoding="utf-8"))["groups"] if path.exists() else {}


def save_groups(path: Path, groups: dict[str, Any]) -> None:
    """Write a file for `load_groups`, with one record to a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, group in groups.items():
        lines = ",\n".join(json.dumps(record, allow_nan=False) for record in group["records"])
        parts.append(
            f'{json.dumps(name)}: {{\n"machine": {json.dumps(group["machine"])},\n'
            f'"records": [\n{lines}\n]}}'
        )
    path.write_text('{"groups": {\n' + ",\n".join(parts) + "\n}}\n", encoding="utf-8")
