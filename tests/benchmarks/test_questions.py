"""Every question runs on a CPU with small cases, counts correctly, and notices a wrong result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import report
from benchmarks.harness.command import main
from benchmarks.harness.examples import draw_triples, in_batches, in_packs, samples
from benchmarks.harness.question import Question
from benchmarks.harness.records import figures, load_groups
from benchmarks.one_pass import question as one_pass
from derta.data import count_tokens

CPU = torch.device("cpu")
SMALL = [
    (one_pass.QUESTION, one_pass.Case(2, 2)),
]
each = pytest.mark.parametrize(("question", "case"), SMALL, ids=[q.name for q, _ in SMALL])


@pytest.mark.slow
@each
def test_a_question_runs_on_small_cases(
    question: Question, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"small": [(case, question.ours), (case, question.baseline)]}
    monkeypatch.setattr(question, "groups", lambda device: groups)
    options = ["--machine", "here", "--out", str(tmp_path), "--repetitions", "2", "--threads", "1"]
    monkeypatch.setattr("sys.argv", [question.name, *options])
    main(question)
    records = report.records_file(tmp_path, question)
    known = figures(load_groups(records)["small"]["records"])
    for name in (question.ours, question.baseline):
        values = known[case.name, name]
        assert values["right"] == 1 and values["timings"] == 2 and values["peak_mib"] > 0
        phases = [q for q in values if q.endswith("_ms_p50") and q != "time_ms_p50"]
        whole = pytest.approx(values["time_ms_p50"], rel=1e-4)
        assert not phases or sum(values[q] for q in phases) == whole
    text = records.with_suffix(".md").read_text()
    assert f"# {question.title}, measured" in text and f"| {question.ours} |" in text


@each
def test_a_wrong_result_is_noticed(question: Question, case: Any) -> None:
    answer = question.answer(question.answer_case(case), CPU)
    baseline = question.setup(case, question.baseline, CPU).errors(answer)
    ours = question.setup(case, question.ours, CPU)
    assert question.is_right(case, ours.errors(answer), baseline)
    last = list(answer)[-1] if isinstance(answer, dict) else -1
    answer[last] = 1.01 * answer[last]
    assert not question.is_right(case, ours.errors(answer), baseline)


def test_both_recipes_have_equal_targets_and_the_reported_tokens() -> None:
    drawn = draw_triples(40, 3, 500)
    packs, found = in_packs(drawn, 4096), samples(drawn)
    assert max(batch.input_ids.shape[1] for batch in packs) <= 4096
    targets = sum(batch.totals["mle"].targets + batch.totals["rto"].targets for batch in packs)
    assert targets == sum(int((sample.labels >= 0).sum()) for sample in found)
    tokens = count_tokens(drawn)
    assert tokens.one_pass == sum(batch.input_ids.shape[1] for batch in packs)
    closing = len(drawn)  # harmful responses' closing tokens, only in the official recipe
    assert tokens.apart == sum(len(sample.input_ids) for sample in found) - closing
    batches = in_batches(found)
    assert [len(batch["labels"]) for batch in batches] == [16] * 10
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == tokens.apart + closing
