"""Compare two files of records of one question by ratios.

    python -m benchmarks.compare OLD.json NEW.json --band 0.2

A ratio is the time or peak memory of one of our implementations over that of the question's
baseline in the same run, so the machines may differ. The exit status is 1 if a ratio has grown by
more than the band.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.question import NAMES, Question, question_named
from benchmarks.harness.records import figures, load_groups
from benchmarks.harness.requirements import Figures

QUANTITIES = ("time_ms_p50", "peak_mib")


class Ratio(NamedTuple):
    """The time or memory of one of ours over the baseline's, before and now."""

    case: str
    implementation: str
    quantity: str
    old: float
    new: float

    @property
    def growth(self) -> float:
        return self.new / self.old - 1


def ratios(question: Question, old: Figures, new: Figures) -> Iterator[Ratio]:
    """Yield the ratios of all results that are right in both runs."""
    own = question.ours.split()[0]
    for (case, name), now in new.items():
        before = old.get((case, name), {})
        baselines = [of_run.get((case, question.baseline), {}) for of_run in (old, new)]
        if name.split()[0] != own or not (before.get("right") and now.get("right")):
            continue
        for quantity in QUANTITIES:
            if all(quantity in values for values in (before, now, *baselines)):
                then, today = (
                    values[quantity] / baseline[quantity]
                    for values, baseline in zip((before, now), baselines, strict=True)
                )
                yield Ratio(case, name, quantity, then, today)


def load(path: Path) -> Figures:
    """Load the numbers of all groups of a file.

    Raises:
        ValueError: there is no such file, or it has no records.
    """
    records = [record for group in load_groups(path).values() for record in group["records"]]
    if not records:
        raise ValueError(f"{path}: no records")
    return figures(records)


def main() -> int:
    """Print every ratio and return the exit status."""
    options = _options()
    question = question_named(options.new.stem)
    try:
        found = list(ratios(question, load(options.old), load(options.new)))
        if not found:
            raise ValueError(f"{options.old} and {options.new} share no case")
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    for ratio in found:
        verdict = "worse" if ratio.growth > options.band else "as good"
        print(
            f"{verdict}: {ratio.case}: {ratio.implementation}: {ratio.quantity} over "
            f"{question.baseline}: {ratio.old:.3f} -> {ratio.new:.3f}"
        )
    return int(any(ratio.growth > options.band for ratio in found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path, help=f"a file of {', '.join(f'{n}.json' for n in NAMES)}")
    parser.add_argument("new", type=Path, help="another file of the same question")
    parser.add_argument(
        "--band",
        type=float,
        default=0.2,
        help="growth of a ratio that counts as noise; default 0.2",
    )
    options = parser.parse_args()
    if options.old.stem != options.new.stem or options.new.stem not in NAMES:
        parser.error(f"expected two files of one question, got {options.old} and {options.new}")
    return options


if __name__ == "__main__":
    sys.exit(main())
