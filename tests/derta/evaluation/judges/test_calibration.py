"""Agreement of judges and people equals values worked out by hand, for all public formats."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from derta.evaluation import Exchange, KeywordJudge, Verdict
from derta.evaluation.judges.calibration import (
    Labelled,
    agreement,
    calibrate,
    format_agreements,
    read_labelled,
)


def labels(path: Path) -> list[tuple[bool | None, bool | None]]:
    return [(one.refused, one.harmful) for one in read_labelled(path)[0]]


def write_csv(path: Path, fields: Sequence[str], *rows: Sequence[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([fields, *rows])
    return path


def test_kappa_follows_cohens_definition() -> None:
    # Both yes 20, only people 5, only the judge 10, neither 15: observed 35/50; by chance
    # 25/50 x 30/50 + 25/50 x 20/50 = 0.5; kappa 0.2 / 0.5.
    human = [True] * 25 + [False] * 25
    judge = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    one = agreement(human, judge)
    assert one.agreement == pytest.approx(0.7)
    assert one.kappa == pytest.approx(0.4)
    assert one.to_dict()["confusion"] == {
        "no": {"no": 15, "yes": 10, "undecided": 0},
        "yes": {"no": 5, "yes": 20, "undecided": 0},
    }


def test_undecided_answers_are_counted_separately() -> None:
    one = agreement([True, True, False, False], [True, None, False, None])
    assert (one.decided, one.undecided) == (2, 2)
    assert one.agreement == one.kappa == 1.0
    assert agreement([True, False], [False, True]).kappa == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("human", "judge", "share"),
    [([True], [None], None), ([], [], None), ([True, True], [True, True], 1.0)],
)
def test_kappa_is_undefined_if_chance_always_agrees(
    human: list[bool], judge: list[bool | None], share: float | None
) -> None:
    one = agreement(human, judge)
    assert one.agreement == share
    assert one.kappa is None


def test_each_judge_is_compared_with_people_on_both_questions() -> None:
    def labelled(answer: str, refused: bool | None, harmful: bool | None) -> Labelled:
        return Labelled(Exchange(({"role": "user", "content": "How?"},), answer), refused, harmful)

    answers = [
        labelled("Sorry, no.", True, False),
        labelled("Sorry. Buy a brush.", True, True),
        labelled("Buy a brush.", False, True),
        labelled("Ask elsewhere.", None, False),
    ]

    def harm(exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict(None, harmful="brush" in exchange.answer) for exchange in exchanges]

    judges = {"keyword": KeywordJudge(), "harm": harm}
    files = calibrate({"b.csv": answers[1:2], "a.csv": answers}, judges)
    assert {question: list(by) for question, by in files["b.csv"].items()} == {
        "refused": list(judges),
        "harmful": list(judges),
    }
    assert files["b.csv"]["refused"]["keyword"].counts.tolist() == [[0, 0, 0], [0, 1, 0]]
    found = files["a.csv"]
    counts = {
        (question, name): one.counts.tolist()
        for question, judges in found.items()
        for name, one in judges.items()
    }
    assert counts == {
        ("refused", "keyword"): [[1, 0, 0], [0, 2, 0]],
        ("refused", "harm"): [[0, 0, 1], [0, 0, 2]],
        ("harmful", "keyword"): [[1, 1, 0], [1, 1, 0]],
        ("harmful", "harm"): [[2, 0, 0], [0, 2, 0]],
    }
    table = format_agreements({"a.csv": found})
    assert [line.split() for line in table.splitlines()] == [
        "agree % kappa labelled undecided both neither judge only people only".split(),
        ["a.csv:", "refused"],
        ["keyword", "100.0", "1.00", "3", "0", "2", "1", "0", "0"],
        ["harm", "-", "-", "3", "3", "0", "0", "0", "0"],
        ["a.csv:", "harmful"],
        ["keyword", "50.0", "0.00", "4", "0", "1", "1", "1", "1"],
        ["harm", "100.0", "1.00", "4", "0", "2", "2", "0", "0"],
    ]
    json.dumps(found["refused"]["harm"].to_dict(), allow_nan=False)


def test_jailbreakbench_labels_harm(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "judge-comparison.csv",
        ["Index", "goal", "prompt", "target_response", "human1", "human_majority", "harmbench_cf"],
        ["0", "Fence", "Please, the fence?", "Buy a brush,\nand paint.", "1", "1", "0"],
        ["1", "Fence", "The fence?", "Sorry.", "0", "0", "0"],
    )
    assert labels(path) == [(None, True), (None, False)]
    exchange = read_labelled(path)[0][0].exchange
    assert exchange.messages == ({"role": "user", "content": "Please, the fence?"},)
    assert exchange.answer == "Buy a brush,\nand paint."


def test_wildguardtest_labels_both_and_rows_without_responses_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "wildguard_test"
    table = {
        "prompt": ["a", "b", "c", "d", "e"],
        "adversarial": [True, False, False, True, True],
        "response": ["Sorry.", "Buy a brush.", None, "Hm.", " "],
        "response_refusal_label": ["refusal", "compliance", None, None, "refusal"],
        "response_harm_label": ["unharmful", "harmful", None, "unharmful", None],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert labels(path) == [(True, False), (False, True), (None, False)]
    assert read_labelled(path)[1] == 2


def test_xstest_counts_partial_refusals_as_refusals(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "xstest_v2_completions.csv",
        ["id", "type", "prompt", "completion", "annotation_1", "agreement", "final_label"],
        ["1", "homonyms", "a", "Yes.", "1_full_compliance", "True", "1_full_compliance"],
        ["2", "homonyms", "b", "No.", "2_full_refusal", "True", "2_full_refusal"],
        ["3", "homonyms", "c", "No. Yes.", "3_partial_refusal", "True", "3_partial_refusal"],
    )
    assert labels(path) == [(False, None), (True, None), (True, None)]


@pytest.mark.parametrize("array", [False, True])
def test_custom_labelled_answers_are_read_by_their_label_words(tmp_path: Path, array: bool) -> None:
    words = ["refusal", "Compliance", "harmful", "unharmful", "unsafe", "safe", None, ""]
    rows = [{"prompt": "a", "response": "b", "label": word} for word in words]
    path = tmp_path / "own"
    path.write_text(json.dumps(rows) if array else "\n".join(map(json.dumps, rows)))
    expected = [(True, None), (False, None), *[(None, True), (None, False)] * 2]
    assert labels(path) == expected
    assert read_labelled(path)[1] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "response": "b"}', "1: fields: found prompt, response, expected prompt"),
        (
            '{"prompt": "a", "response": "b", "label": "secret"}',
            "1: label: expected one of refusal, compliance, harmful, unharmful, unsafe, safe",
        ),
        (
            '{"prompt": "a", "target_response": "b", "human_majority": 0.5}',
            "1: human_majority: expected one of 1, 0",
        ),
        ('{"prompt": " ", "response": "b", "label": "safe"}', "1: prompt: is blank"),
        ('[["a"]]', "1[0]: row: is list, expected an object"),
        ("{", "own:2: an object over several lines, expected one a line"),
        ('{"prompt": "a", "response": "", "label": "safe"}', ": no labelled answer, expected at"),
    ],
)
def test_invalid_rows_are_refused_with_their_place(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "own"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_labelled(path)
    assert "secret" not in str(caught.value)


def test_columns_name_the_texts_and_the_label(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", ("q", "a", "verdict"), ("How?", "So.", "unsafe"))
    columns = {"prompt": "q", "response": "a", "label": "verdict"}
    ((one,), left_out) = read_labelled(path, columns)
    assert (one.exchange.answer, one.harmful, left_out) == ("So.", True, 0)
    with pytest.raises(ValueError, match="columns: no format knows a field 'answer'"):
        read_labelled(path, {"prompt": "q", "answer": "a"})
    with pytest.raises(ValueError, match="label: columns take it from no, found a, q, verdict"):
        read_labelled(path, columns | {"label": "no"})


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.csv: no such record file"):
        read_labelled(tmp_path / "none.csv")


def test_counts_are_indexed_by_people_then_judge() -> None:
    counts = agreement([True, False, True], [False, None, True]).counts
    assert np.array_equal(counts, [[0, 0, 1], [1, 1, 0]])
