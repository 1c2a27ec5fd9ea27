"""Time `derta data build` on many rows, of random words and of one template.

    python -m benchmarks.data_build --machine xeon-2-cores

Each case is a process of its own: reading, joining, dropping repeats, and leaving out training rows
that are near to held-out ones.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measuring import ROOT, describe_machine
from benchmarks.harness.results import results_folder, results_parser, write_results

WORDS = [
    f"{head}{tail}" for head in "bdfgklmnprstvz" for tail in ("alo", "enu", "iso", "oka", "ur")
]
TEMPLATE = "please paint fence number {} of the garden behind the old house near the river today"
BELOW = "please {} fence {} of the {} behind {} old house near the {} with {} brushes of colour {}"


def random_words(rng: random.Random, number: int) -> str:
    """Return a request of 12 words out of 3,136 that hardly shares a pair of words with another."""
    return " ".join(f"{rng.choice(WORDS)}{rng.choice(WORDS)}" for _ in range(12))


def near_identical(rng: random.Random, number: int) -> str:
    """Return a request that differs from the others in one number, and is near to all of them."""
    return TEMPLATE.format(number)


def below_threshold(rng: random.Random, number: int) -> str:
    """Return a request of one template that differs in so many words that none is near."""
    return BELOW.format(*(f"{rng.choice(WORDS)}{rng.choice(WORDS)}" for _ in range(7)))


@dataclass(frozen=True)
class Case:
    """A data set to build.

    Attributes:
        name: title of the case.
        request: function that writes a request from its number.
        eval_share: share of requests that is held out.
        random_share: share of rows with requests of random words instead.
    """

    name: str
    request: Callable[[random.Random, int], str]
    eval_share: float
    random_share: float = 0.0


CASES = (
    Case("random words", random_words, 0.05),
    Case("random words, half held out", random_words, 0.5),
    Case("near-identical, and 1% random", near_identical, 0.05, 0.01),
    Case("near-identical, and 1% random, half held out", near_identical, 0.5, 0.01),
    Case("one template, below the threshold", below_threshold, 0.05),
)


@dataclass(frozen=True)
class Record:
    """A build: rows read and written, seconds, and the largest size of the process."""

    case: str
    rows: int
    written: int
    wall_s: float
    cpu_s: float
    peak_mib: float


def rows(case: Case, count: int) -> Iterator[str]:
    """Yield the lines of a file of triples."""
    rng = random.Random(0)
    for number in range(count):
        make = random_words if rng.random() < case.random_share else case.request
        row = {"prompt": make(rng, number), "safe": "Sorry, no.", "harmful": f"Step {number}."}
        yield json.dumps(row) + "\n"


def measure(case: Case, count: int) -> Record:
    """Build a data set in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(rows(case, count))
        command = [
            *(sys.executable, "-m", "derta", "data", "build"),
            *("--sources", f"{{path: {folder / 'rows.jsonl'}, role: safety}}"),
            *("--output_dir", str(folder / "out"), "--eval_share", str(case.eval_share)),
        ]
        begin = time.perf_counter()
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=quiet, stderr=quiet, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
        if status:
            raise RuntimeError(f"{case.name}: derta data build ended with status {status}")
        summary = json.loads((folder / "out" / "build.json").read_text(encoding="utf-8"))
    written = sum(one["rows"] for one in summary["files"].values())
    return Record(case.name, count, written, wall, _cpu_s(usage), usage.ru_maxrss / 1024)


def _cpu_s(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def table(machine: dict[str, Any], records: Sequence[Record]) -> str:
    """Return a Markdown table with a row for each build."""
    lines = [
        "# Building a data set\n",
        "[data_build.py](../../data_build.py) says what the cases are.\n",
        f"{machine['date']}, commit {machine['commit']}, {machine['processor']}, "
        f"{machine['cores']} cores.\n",
        "| rows | read | written | wall s | processor s | peak MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in records:
        sizes = f"{r.rows:,} | {r.written:,} | {r.wall_s:.1f} | {r.cpu_s:.1f} | {r.peak_mib:.0f}"
        lines.append(f"| {r.case} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write data_build.json and data_build.md."""
    parser = results_parser("data_build", __doc__)
    parser.add_argument("--rows", type=int, default=300_000, help="rows of each case")
    options = parser.parse_args()
    folder = results_folder(options)
    records = []
    for case in CASES:
        records.append(measure(case, options.rows))
        print(records[-1], file=sys.stderr, flush=True)
    machine = describe_machine(torch.device("cpu"), 1)
    text = table(machine, records)
    write_results(folder, "data_build", machine, map(asdict, records), text)


if __name__ == "__main__":
    main()
