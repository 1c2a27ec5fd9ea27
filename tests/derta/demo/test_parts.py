"""A killed run goes on: what is finished is kept, by the settings that made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from derta.demo.parts import Parts, from_plain, to_plain
from derta.demo.run import Tuned
from derta.evaluation import VariantResult, summarize
from derta.evaluation.measures.results import Outcome, Sample


@dataclass(frozen=True)
class Places:
    ranks: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Made:
    value: int
    more: tuple[float, ...] = (1.0,)


def test_a_part_is_made_once_for_equal_settings_and_anew_for_others(tmp_path: Path) -> None:
    calls = []

    def make() -> Made:
        calls.append(1)
        return Made(len(calls))

    parts = Parts(tmp_path / "parts")
    assert parts.kept("one", {"steps": 1}, Made, make) == Made(1)
    assert parts.kept("one", {"steps": 1}, Made, make) == Made(1)
    assert parts.kept("one", {"steps": 2}, Made, make) == Made(2)
    assert parts.kept("other", {"steps": 1}, Made, make) == Made(3)
    assert len(list((tmp_path / "parts").iterdir())) == 3


def test_a_result_comes_back_from_its_file_as_it_was() -> None:
    curve = np.random.default_rng(0).random(7, dtype=np.float32)
    result = VariantResult(
        outcomes=(Outcome("asr.prefill.4", 1, 3, empty=1, positions=(4, 9)),),
        judges={"other": (Outcome("asr.direct", 0, 2),)},
        harmful_curves=(curve, curve[:3]),
        benign_curves=(curve[1:],),
        perplexity=(2.5, 3),
        samples=(Sample("asr.direct", "a", "Make it?", "", "Bend it.", None),),
    )
    tuned = Tuned(tokens=5, history=[{"step": 1, "loss": 0.1}], checkpoints=[], result=result)
    read = from_plain(Tuned, to_plain(tuned))
    assert read.history == tuned.history
    assert {one.dtype for one in read.result.harmful_curves} == {np.dtype(np.float32)}
    assert read.result.outcomes == result.outcomes and read.result.judges == result.judges
    assert all(map(np.array_equal, read.result.harmful_curves, result.harmful_curves))
    assert summarize({"one": [read.result]}, seconds=1.0) == summarize(
        {"one": [result]}, seconds=1.0
    )


def test_whole_numbers_stay_whole() -> None:
    read = from_plain(Places, to_plain(Places((np.array([3, 2**30 + 1]),))))
    assert read.ranks[0].tolist() == [3, 2**30 + 1] and read.ranks[0].dtype == np.int64
