"""The harness measures correctly and gives no credit for a wrong result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import report
from benchmarks.harness.command import main
from benchmarks.harness.interleave import Job, Outcome, Settings, _search_path, run
from benchmarks.harness.measuring import (
    PRODUCT_FLAGS,
    ROOT,
    describe_machine,
    gpu_state,
    watch_other_processes,
    watch_resident_memory,
)
from benchmarks.harness.question import NAMES, Question, question_named
from benchmarks.harness.records import figures, load_groups, records_of, verdicts
from benchmarks.head_loss.cases import (
    HEADS,
    PROBABILITIES,
    Case,
    Head,
    errors,
    make_inputs,
    right_answer,
)
from benchmarks.head_loss.peers import EAGER, SKIPPING
from benchmarks.head_loss.question import OURS, QUESTION as HEAD_LOSS, TORCH_CHUNKED, Setup

CPU = torch.device("cpu")
TINY = Case("tiny", 256)
QUESTIONS = [question_named(name) for name in NAMES]


def outcome(case: Case, implementation: str, ms: float, mib: float, error: float) -> Outcome:
    found = dict.fromkeys(("loss_error", "d_hidden_error", "d_weight_error"), error)
    return Outcome(Job(case, implementation), found, [{"time_ms": [ms], "peak_mib": mib}] * 3)


@pytest.mark.parametrize("spoil", ["loss", "d_hidden", "d_weight", "nothing"])
def test_a_wrong_result_is_noticed(spoil: str) -> None:
    def spoilt(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        loss = eager.loss_function(
            hidden.detach() + 1.1 * (hidden - hidden.detach()) if spoil == "d_hidden" else hidden,
            weight.detach() + 1.1 * (weight - weight.detach()) if spoil == "d_weight" else weight,
            target,
        )
        return loss + 0.01 * loss.detach() if spoil == "loss" else loss

    eager = HEAD_LOSS.setup(TINY, EAGER, CPU)
    answer = right_answer(eager.inputs, None)
    found = Setup(make_inputs(TINY, CPU), spoilt).errors(answer)
    assert HEAD_LOSS.is_right(TINY, found, eager.errors(answer)) == (spoil == "nothing")
    assert not HEAD_LOSS.is_right(TINY, found, {}), "nothing is right where nothing was compared"


def test_no_speed_up_is_reported_for_a_wrong_result() -> None:
    case = Case("1024x64000", 2048)
    outcomes = [outcome(case, EAGER, 100, 10, 1e-3), outcome(case, OURS, 10, 1, 0.5)]
    records = records_of(outcomes, HEAD_LOSS)
    assert figures(records)[case.name, OURS]["right"] == 0
    line = next(
        s for s in report.table(group(records), HEAD_LOSS).splitlines() if s.startswith(f"| {OURS}")
    )
    assert "wrong result" in line and "0.10" not in line
    assert {verdict for _, verdict, _ in verdicts(records, HEAD_LOSS)} <= {"wrong", "not measured"}


def test_results_are_not_judged_without_the_baseline() -> None:
    case = Case("1024x64000", 2048)
    failed = Outcome(Job(case, EAGER), reason="out of memory")
    records = records_of([failed, outcome(case, OURS, 10, 1, 1e-5)], HEAD_LOSS)
    (right,) = [record for record in records if record["quantity"] == "right"]
    assert right["value"] is None and right["reason"].startswith(f"{EAGER} did not run")
    line = next(
        s for s in report.table(group(records), HEAD_LOSS).splitlines() if s.startswith(f"| {OURS}")
    )
    assert "not judged" in line
    judged = {verdict for _, verdict, _ in verdicts(records, HEAD_LOSS)}
    assert judged == {"not judged", "not measured"}


def group(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {"a group": {"machine": {"versions": {}, "python": "3"}, "records": records}}


@pytest.mark.parametrize(
    ("ms", "mib", "expected"),
    [(64, 44, {"pass"}), (66, 46, {"fail"}), (64, 46, {"pass", "fail"})],
)
def test_requirements_are_judged_from_records(ms: float, mib: float, expected: set[str]) -> None:
    case = Case("1024x64000", 2048)
    outcomes = [outcome(case, EAGER, 100, 100, 1e-5), outcome(case, OURS, ms, mib, 1e-5)]
    records = records_of(outcomes, HEAD_LOSS)
    judged = {r.what: verdict for r, verdict, _ in verdicts(records, HEAD_LOSS)}
    assert judged["time over torch's chunked op's"] == "not measured"
    assert {judged["time over full logits'"], judged["memory over full logits'"]} == expected


def test_ours_is_compared_with_the_fastest_torch() -> None:
    case = Case("1024x64000", 2048)
    newer = outcome(case, TORCH_CHUNKED, 300, 1, 0.5)
    newer.job = replace(newer.job, torch_version="9.0")
    outcomes = [
        outcome(case, EAGER, 100, 100, 1e-5),
        outcome(case, OURS, 100, 10, 1e-5),
        outcome(case, TORCH_CHUNKED, 500, 1, 0.5),
        newer,
    ]
    records = records_of(outcomes, HEAD_LOSS)
    judged = {r.what: (v, value) for r, v, value in verdicts(records, HEAD_LOSS)}
    assert judged["time over torch's chunked op's"] == ("fail", pytest.approx(1 / 3))


@pytest.mark.parametrize("question", QUESTIONS, ids=NAMES)
def test_every_requirement_is_on_a_case_that_runs(question: Question) -> None:
    run_cases = {
        (case.name, name)
        for device in ("cpu", "cuda")
        for pairs in question.groups(device).values()
        for case, name in pairs
    }
    assert question.requirements()
    for requirement in question.requirements():
        for name in (question.ours, question.baseline):  # without them, nothing is right
            assert (requirement.case.name, name) in run_cases
        if requirement.against is not None:
            against = requirement.case_against or requirement.case
            assert (against.name, requirement.against) in run_cases


def test_a_sparse_backward_pass_is_asked_of_gpus_alone_and_is_not_taken_for_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {
        device: {
            group
            for group, pairs in HEAD_LOSS.groups(device).items()
            if SKIPPING in (name for _, name in pairs)
        }
        for device in ("cpu", "cuda")
    }
    assert asked == {"cpu": set(), "cuda": {"frozen head", "trainable head"}}
    monkeypatch.setitem(HEADS, "long", Head(8, 100_000))  # so that tiles without a target are dead
    case = Case("long", 128, "float32", inputs="random")
    answer = HEAD_LOSS.answer(case, CPU)
    exact, ours, skipping = (
        HEAD_LOSS.setup(case, name, CPU).errors(answer) for name in (EAGER, OURS, SKIPPING)
    )
    assert skipping["loss_error"] == ours["loss_error"]
    assert HEAD_LOSS.is_right(case, ours, exact)
    assert not HEAD_LOSS.is_right(case, skipping, exact)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_right_answer_matches_autograd(softcap: float | None) -> None:
    inputs = make_inputs(replace(TINY, dtype="float64", live=0.4), CPU)
    answer = right_answer(inputs, softcap, chunk_rows=7)
    z = inputs.hidden @ inputs.weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = torch.nn.functional.cross_entropy(z, inputs.target)
    loss.backward()
    assert all(error < 1e-6 for error in errors(loss.detach(), inputs, answer).values())


@pytest.mark.parametrize("head", ["small", "1024x64000"])
def test_peaked_rows_have_the_intended_probabilities(head: str) -> None:
    hidden, weight, target = make_inputs(Case(head, 64, "float32"), CPU)
    log_p = (hidden @ weight.T).log_softmax(1).gather(1, target[:, None])[:, 0]
    odds = torch.tensor(PROBABILITIES).logit().repeat(8)
    assert (log_p.exp().clamp(max=1 - 1e-7).logit() - odds).abs().max() < 1.0


def test_memory_freed_before_the_end_counts() -> None:
    peak_mib = watch_resident_memory()
    torch.ones(64 * 2**18).sum()
    assert 60 < peak_mib() < 80


def test_a_busy_neighbour_is_noticed() -> None:
    others = watch_other_processes()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    assert others() > 0.1


def test_a_cpu_is_described_with_its_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    cpu = torch.device("cpu")
    named = describe_machine(cpu, 1)["instruction_sets"]
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert named.split() == [flag for flag in PRODUCT_FLAGS if flag in flags]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert describe_machine(cpu, 1)["instruction_sets"] == f"{named} (oneDNN limited to AVX2)"


def test_a_gpu_is_measured_without_nvidia_smi(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu_state() == {}


def test_peers_are_found_through_their_pth_files(tmp_path: Path) -> None:
    inside = tmp_path / "outer" / "python_packages"
    inside.mkdir(parents=True)
    (inside / "peer_inside.py").touch()
    (tmp_path / "outer.pth").write_text("# where it is\nimport sys\n\nouter/python_packages\n")
    environment = os.environ | {"PYTHONPATH": _search_path(str(tmp_path))}
    subprocess.run([sys.executable, "-c", "import peer_inside"], env=environment, check=True)


def test_a_process_without_an_answer_is_killed_and_reported(tmp_path: Path) -> None:
    settings = Settings("head_loss", "cpu", 1, None, 600)
    run([Job(TINY, OURS)], 1, settings, tmp_path, time.monotonic())
    hurried = replace(settings, seconds=0.05)
    (late,) = run([Job(TINY, OURS)], 1, hurried, tmp_path, time.monotonic())
    assert late.reason == "no answer within 0.05 s"


def test_a_run_writes_records_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("derta torch", EAGER, "liger")
    groups = {"a question": [(TINY, name) for name in names]}
    monkeypatch.setattr(HEAD_LOSS, "groups", lambda device: groups)
    options = ["--machine", "here", "--out", str(tmp_path), "--repetitions", "2", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["head_loss", *options])
    main(HEAD_LOSS)

    records = report.records_file(tmp_path, HEAD_LOSS)
    known = figures(load_groups(records)["a question"]["records"])
    for name in ("derta torch", EAGER):
        values = known[TINY.name, name]
        assert values["right"] == 1 and values["timings"] == 2 and values["loss_error"] < 0.1
        assert 0 < values["time_ms_p20"] <= values["time_ms_p50"] <= values["time_ms_p80"]
    assert known[TINY.name, "liger"] == {}
    text = records.with_suffix(".md").read_text()
    assert "| liger | did not run: NotImplementedError: its kernels run on CUDA" in text
    assert records.with_suffix(".png").stat().st_size > 10_000
    assert str(ROOT) not in text + (records).read_text()

    monkeypatch.setattr("sys.argv", ["head_loss", *options, "--resume"])
    capfd.readouterr()
    main(HEAD_LOSS)
    assert "ready" not in capfd.readouterr().err, "recorded groups must not run again"
    json.loads((records).read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("question", QUESTIONS, ids=NAMES)
def test_kept_results_match_their_records(question: Question) -> None:
    for folder in (ROOT / "benchmarks" / "results").iterdir():
        records = report.records_file(folder, question)
        groups = load_groups(records)
        assert not groups or records.with_suffix(".md").read_text() == report.table(
            groups, question
        )
        for group in groups.values():
            implementations = {record["implementation"] for record in group["records"]}
            assert implementations >= {question.ours, question.baseline}
