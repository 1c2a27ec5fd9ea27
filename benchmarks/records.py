"""Results as records, one a number; whether a result is right; records in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.interleave import Outcome
from benchmarks.peers import EAGER

Record = dict[str, Any]
Figures = dict[tuple[str, str], dict[str, float]]  # (case, implementation) -> quantity -> value
LOSS_BAND = 1e-4
ERRORS = ("loss_error", "d_hidden_error", "d_weight_error")


def is_right(errors: dict[str, float], eager: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether errors are within 2 x (full logits' error in the same dtype + one band).

    For gradients, the band is one rounding of that dtype: the budget is that of the tests, see
    `derta_kernels.testing.error_budget`. A loss is summed over thousands of rows and has to be
    closer: its band is what is required of ours. Without full logits to compare with, nothing is
    known to be right.
    """
    bands = dict.fromkeys(ERRORS, torch.finfo(dtype).eps) | {"loss_error": LOSS_BAND}
    return all(
        value <= 2 * (eager.get(quantity, math.nan) + bands[quantity])
        for quantity, value in errors.items()
    )


def records_of(outcomes: Iterable[Outcome]) -> list[Record]:
    """One record a number: case, implementation, quantity, value, and a reason if that is null."""
    outcomes = list(outcomes)
    eager = {o.job.case: o.errors for o in outcomes if o.job.name == EAGER}
    records = []
    for outcome in outcomes:
        about = {"case": outcome.job.case.name, "implementation": outcome.job.name}
        if outcome.reason is not None:
            records.append(about | _record("failure", None, outcome.reason))
            continue
        case = outcome.job.case
        right = is_right(outcome.errors, eager.get(case, {}), case.torch_dtype)
        values = outcome.errors | {"right": right} | _of_turns(outcome.turns)
        records += [about | _record(quantity, value) for quantity, value in values.items()]
    return records


def _record(quantity: str, value: float | None, reason: str | None = None) -> Record:
    if value is None or not math.isfinite(value):
        return {"quantity": quantity, "value": None, "reason": reason or f"it is {value}"}
    return {"quantity": quantity, "value": float(f"{value:.6g}")}


def _of_turns(turns: list[dict[str, Any]]) -> dict[str, float]:
    """Spread of the times, interpolated; the most memory; the machine's state meanwhile."""
    time_ms = [ms for turn in turns for ms in turn["time_ms"]]
    tenths = quantiles(time_ms, n=10, method="inclusive") if time_ms[1:] else time_ms * 9
    values = {f"time_ms_p{p}": tenths[p // 10 - 1] for p in (20, 50, 80)}
    values |= {"timings": len(time_ms), "peak_mib": max(turn["peak_mib"] for turn in turns)}
    for quantity, taken in (("others_share", median), ("sm_clock_mhz", min)):
        if quantity in turns[0]:
            values[quantity] = taken(turn[quantity] for turn in turns)
    return values


def figures(records: Iterable[Record]) -> Figures:
    """The numbers of all records, by case and implementation in their order; failures have none."""
    found: Figures = {}
    for record in records:
        quantities = found.setdefault((record["case"], record["implementation"]), {})
        if record["value"] is not None:
            quantities[record["quantity"]] = record["value"]
    return found


def load_groups(path: Path) -> dict[str, Any]:
    """Groups by name, each with the machine it ran on and its records; none if there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["groups"] if path.exists() else {}


def save_groups(path: Path, groups: dict[str, Any]) -> None:
    """Writes what `load_groups` reads, a record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, group in groups.items():
        lines = ",\n".join(json.dumps(record, allow_nan=False) for record in group["records"])
        parts.append(
            f'{json.dumps(name)}: {{\n"machine": {json.dumps(group["machine"])},\n'
            f'"records": [\n{lines}\n]}}'
        )
    path.write_text('{"groups": {\n' + ",\n".join(parts) + "\n}}\n", encoding="utf-8")
