"""Two runs are compared by ratios, so a slower machine is not a regression."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.harness.records import save_groups

CASE = "16 triples, 1 branch each, float32"


def write(
    folder: Path, *, ours: float, baseline: float, right: bool = True, case: str = CASE
) -> str:
    records = [
        {"case": case, "implementation": name, "quantity": quantity, "value": value}
        for name, time in (("one pass", ours), ("apart, padded", baseline))
        for quantity, value in (("time_ms_p50", time), ("peak_mib", 5.0), ("right", float(right)))
    ]
    path = folder / "one_pass.json"
    save_groups(path, {"one branch": {"machine": {}, "records": records}})
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["compare", *arguments])
    return compare.main()


@pytest.mark.parametrize(
    ("new", "status"),
    [
        (dict(ours=100.0, baseline=200.0), 0),
        (dict(ours=500.0, baseline=1000.0), 0),  # a slower machine
        (dict(ours=119.0, baseline=200.0), 0),  # noise
        (dict(ours=122.0, baseline=200.0), 1),
        (dict(ours=40.0, baseline=60.0), 1),  # faster, but less so than the baseline
        (dict(ours=100.0, baseline=200.0, right=False), 2),
        (dict(ours=100.0, baseline=200.0, case="another"), 2),
    ],
    ids=str,
)
def test_growth_of_a_ratio_beyond_the_band_fails(
    new, status, tmp_path: Path, monkeypatch, capsys
) -> None:
    old = write(tmp_path / "old", ours=100.0, baseline=200.0)
    assert run(monkeypatch, old, write(tmp_path / "new", **new)) == status
    printed = capsys.readouterr()
    if status < 2:
        assert f"{CASE}: one pass: time_ms_p50 over apart, padded: 0.500 -> " in printed.out
        assert ("worse" in printed.out) == bool(status)
    else:
        assert "share no case" in printed.err


def test_the_band_is_configurable(tmp_path: Path, monkeypatch) -> None:
    old = write(tmp_path / "old", ours=100.0, baseline=200.0)
    new = write(tmp_path / "new", ours=145.0, baseline=200.0)
    assert run(monkeypatch, old, new, "--band", "0.5") == 0
    assert run(monkeypatch, old, new, "--band", "0.4") == 1


def test_incomparable_files_are_refused_with_the_reason(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    new = write(tmp_path, ours=1.0, baseline=1.0)
    missing = str(tmp_path / "nowhere" / "one_pass.json")
    assert run(monkeypatch, missing, new) == 2
    assert f"{missing}: no records" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, str(tmp_path / "head_loss.json"), new)
    assert "expected two files of one question" in capsys.readouterr().err
