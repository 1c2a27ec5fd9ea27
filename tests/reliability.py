"""Run the tests that keep a promise, and write the table of promises from their records.

    python tests/reliability.py [pytest's options]

Fails if a promise was not kept, or a test of one did not run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "reliability.md"


@dataclass
class Kept:
    """The cases of one promise, and the files of its tests."""

    cases: int = 0
    passed: int = 0
    files: set[str] = field(default_factory=set)


def promises(report: ElementTree.Element) -> dict[str, Kept]:
    """Return the promises of a report of pytest (JUnit's XML), in the order of their texts."""
    found: dict[str, Kept] = {}
    for test in report.iter("testcase"):
        values = {one.get("name"): str(one.get("value")) for one in test.iter("property")}
        if "promise" not in values:
            continue
        kept = found.setdefault(values["promise"], Kept())
        cases = int(values.get("cases", 1))
        kept.cases += cases
        kept.passed += (
            0 if [*test.iter("failure"), *test.iter("error"), *test.iter("skipped")] else cases
        )
        module = str(test.get("classname")).removeprefix("tests.").replace(".", "/")
        kept.files.add(f"tests/{module}.py")
    return dict(sorted(found.items()))


def table(found: dict[str, Kept], machine: dict[str, Any], kills: Iterable[dict[str, Any]]) -> str:
    """Return the table in Markdown, with the machine that it was measured on.

    Args:
        found: the result of `promises`.
        machine: see `benchmarks.harness.measuring.describe_machine`.
        kills: the records of `benchmarks.kills`.
    """
    kills = list(kills)
    good = sum(not record["faults"] for record in kills)
    lines = [
        "| promise | cases | kept | tested by |",
        "| --- | ---: | ---: | --- |",
        *(
            f"| {promise} | {kept.cases:,} | {kept.passed:,} | "
            f"{', '.join(f'[{Path(one).stem}](../{one})' for one in sorted(kept.files))} |"
            for promise, kept in found.items()
        ),
        f"| The same, of runs killed at drawn moments, once or twice. | {len(kills)} | {good} | "
        "[kills](../benchmarks/kills.py) |",
        "",
        f"{machine['date']}, {machine['processor']}, Python {machine['python']}, torch "
        f"{machine['versions']['torch']}, transformers {machine['versions']['transformers']}.",
    ]
    return "\n".join(lines) + "\n"


def main(options: Sequence[str]) -> int:
    """Run the tests, write the table, and return the exit status."""
    import torch

    from benchmarks.harness.measuring import describe_machine

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "promise",
            f"--junitxml={report}",
            *options,
        ]
        status = subprocess.run(command, cwd=ROOT).returncode
        found = promises(ElementTree.parse(report).getroot())
    (newest,) = sorted(ROOT.glob("benchmarks/results/*/kills.json"))[-1:]
    kills = json.loads(newest.read_text(encoding="utf-8"))["records"]
    text = table(found, describe_machine(torch.device("cpu"), 1), kills)
    TABLE.write_text(text, encoding="utf-8")
    print(text)
    broken = [promise for promise, kept in found.items() if kept.passed < kept.cases]
    print("\n".join(f"not kept: {promise}" for promise in broken), end="", file=sys.stderr)
    return status or bool(broken)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    raise SystemExit(main(sys.argv[1:]))
