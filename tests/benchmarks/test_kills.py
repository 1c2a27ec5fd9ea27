"""Real kills of real processes: a run ends as if nothing had happened, wherever it was hit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import kills

# Kinds of the moments that each run is killed at, one after the other, by number of the run.
KILLED = {
    0: ["checkpoint", "checkpoint", "model", "step"],
    1: ["model", "checkpoint", "evaluation", "step"],
    3: ["checkpoint", "model", "evaluation", "step"],
}


@pytest.mark.promise(
    "A killed run that is started again ends bit for bit as one that was never killed."
)
@pytest.mark.parametrize(
    "number", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 3))]
)
def test_a_killed_run_ends_as_the_unbroken_one(
    tmp_path: Path, record_property: Callable[[str, object], None], number: int
) -> None:
    run, rng = kills.RUNS[number], random.Random(number)
    kills.prepare(tmp_path)
    assert not any(kills.start(run, tmp_path, "unbroken")), (tmp_path / "unbroken.log").read_text()
    met = kills.moments(run, tmp_path, "unbroken")
    moments = [kills.Moment(kind, rng.randrange(met[kind])) for kind in KILLED[number]]
    found = kills.survive(run, tmp_path, "killed", moments)
    assert found == [], (moments, (tmp_path / "killed.log").read_text())
    record_property("cases", len(moments))


def test_a_difference_is_a_fault_and_shows_in_the_table(tmp_path: Path) -> None:
    for name, data in (("unbroken", b"1"), ("killed", b"2")):
        (tmp_path / name / "checkpoint-2").mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(data)
    (tmp_path / "killed" / ".checkpoint-4.unfinished").mkdir()
    (tmp_path / "killed" / "extra").touch()
    found = kills.faults(tmp_path, "killed", "unbroken")
    for told in (
        "extra: only in one of the runs",
        "model.safetensors: other bytes",
        "it has no manifest.json",
        ".checkpoint-4.unfinished: left",
    ):
        assert any(told in fault for fault in found), told
    machine = {"date": "d", "commit": "c", "processor": "p", "versions": {"torch": "2"}}
    records = [
        {"run": "full", "kills": [{"kind": "model"}, {"kind": "step"}], "faults": []},
        {"run": "full", "kills": [{"kind": "model"}], "faults": found},
    ]
    text = kills.table(machine, records)
    assert "1 of 2 runs ended" in text and "| full |  | 1 of 2 | 1 of 1 |  |" in text
