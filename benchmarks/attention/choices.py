"""The choice of attention's implementation, from the records of GPUs.

    python -m benchmarks.attention.choices

It writes measured.json, which `derta_kernels.attention.choose` reads: a row for each compute
capability, head dimension, and without or with a soft-cap, where an implementation is faster than
Triton's in every pack that Triton got right, and is right itself. Faster means by `MARGIN` at the
median, and its slow times (p80) below Triton's fast ones (p20). Windows make no rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.attention.question import QUESTION
from benchmarks.harness.measuring import ROOT
from benchmarks.harness.question import Values
from benchmarks.harness.records import figures, load_groups
from derta_kernels.attention.measured import TABLE

MARGIN = 0.05
TRITON = "derta triton"
OTHERS = ("derta flash_attn", "derta sdpa")
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*/attention.json"))

Row = dict[str, Any]


def choices(groups: Iterable[dict[str, Any]]) -> list[Row]:
    """Return the rows of measured.json, from groups of records of any machines."""
    cases = {
        case.name: case
        for pairs in QUESTION.groups("cuda").values()
        for case, _ in pairs
        if case.window is None
    }
    found: dict[tuple[str, int, bool], list[tuple[dict[str, Any], dict[str, Values]]]] = {}
    for group in groups:
        runs: dict[str, dict[str, Values]] = {}
        for (case_name, name), values in figures(group["records"]).items():
            runs.setdefault(case_name, {})[name] = values
        for case_name, by_name in runs.items():
            if "gpu" in group["machine"] and case_name in cases and _is_right(by_name, TRITON):
                case = cases[case_name]
                key = group["machine"]["compute_capability"], case.width, case.softcap is not None
                found.setdefault(key, []).append((group["machine"], by_name))
    best = (_fastest(*key, packs) for key, packs in sorted(found.items()))
    return [row for row in best if row is not None]


def _fastest(
    capability: str,
    head_dim: int,
    softcap: bool,
    packs: list[tuple[dict[str, Any], dict[str, Values]]],
) -> Row | None:
    """Return the row of the implementation that gains most in the pack where it gains least."""
    rows: list[Row] = []
    for name in OTHERS:
        versions = {
            machine["flash_attn"][str(head_dim)] if name == "derta flash_attn" else None
            for machine, _ in packs
        }
        if len(versions) == 1 and all(_is_faster(values, name) for _, values in packs):
            times = [v[name]["time_ms_p50"] / v[TRITON]["time_ms_p50"] for _, v in packs]
            rows.append(
                {
                    "capability": capability,
                    "head_dim": head_dim,
                    "softcap": softcap,
                    "implementation": name.removeprefix("derta "),
                    "version": versions.pop(),
                    "time": round(max(times), 3),
                    "gpu": ", ".join(sorted({machine["gpu"] for machine, _ in packs})),
                }
            )
    return min(rows, key=lambda row: row["time"], default=None)


def _is_right(values: dict[str, Values], name: str) -> bool:
    return bool(values.get(name, {}).get("right"))


def _is_faster(values: dict[str, Values], name: str) -> bool:
    """Tell if an implementation is right, and faster than Triton's by more than noise."""
    if not _is_right(values, name):
        return False
    own, triton = values[name], values[TRITON]
    by_margin = own["time_ms_p50"] <= (1 - MARGIN) * triton["time_ms_p50"]
    return by_margin and own["time_ms_p80"] < triton["time_ms_p20"]


def main() -> None:
    """Write the table and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention.choices")
    parser.add_argument(
        "records", nargs="*", type=Path, help="files of records; default: all of results/"
    )
    files = parser.parse_args().records or COMMITTED
    TABLE.write_text(text_of(files), encoding="utf-8")
    print(f"{TABLE.name}:\n{TABLE.read_text(encoding='utf-8')}", end="")


def text_of(files: Iterable[Path]) -> str:
    """Return the text of the table by files of records, one row to a line."""
    rows = choices(group for file in files for group in load_groups(file).values())
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f"[\n{lines}\n]\n" if rows else "[]\n"


if __name__ == "__main__":
    main()
