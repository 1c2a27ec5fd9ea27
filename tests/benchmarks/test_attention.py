"""The attention benchmark counts correctly, and its masks and answers match the definition."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.attention.cases import (
    DIALOGUES,
    FOUR,
    LONG,
    ONE,
    PATTERNS,
    PLAIN,
    RESULTS,
    Case,
    errors,
    make_inputs,
    make_mask,
    operations,
    right_answer,
    token_errors,
    visible_pairs,
)
from benchmarks.attention.peers import (
    DENSE,
    EAGER,
    FLASH,
    IMPLEMENTATIONS,
    Attention,
    block_mask,
    score_mod,
)
from benchmarks.attention.question import GPU_PLAIN, QUESTION, TFLOPS, Setup, groups_for
from benchmarks.harness import report
from benchmarks.harness.command import main
from benchmarks.harness.interleave import Job, Outcome
from benchmarks.harness.measuring import ROOT
from benchmarks.harness.question import NAMES
from benchmarks.harness.records import figures, load_groups, records_of, verdicts
from derta_kernels.attention import interval_attention

CPU = torch.device("cpu")
SMALL = Case(FOUR, 1024, "float32", heads=4, kv_heads=2, width=64)
SMALL_CASES = [
    *(replace(SMALL, pattern=pattern) for pattern in PATTERNS),
    replace(SMALL, pattern=LONG, window=100),
    replace(SMALL, softcap=3.0),
]
each = pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)


def dense(case: Case) -> Tensor:
    """Return the (N, N) bool mask documented by `interval_attention`."""
    mask = make_mask(case, CPU)
    i = torch.arange(case.tokens)
    seen = (i <= i[:, None]) & (i[:, None] < mask.visible_until)
    if case.window is not None:
        seen &= mask.position_ids[0, :, None] - mask.position_ids < case.window
    return seen


@each
def test_a_case_has_its_tokens_and_counts_visible_pairs(case: Case) -> None:
    mask = make_mask(case, CPU)
    assert mask.visible_until.shape == mask.position_ids.shape == (1, case.tokens)
    assert mask.bounds[0][0] == 0 and mask.bounds[-1][1] == case.tokens
    seen = dense(case)
    everything = slice(0, case.tokens)
    assert torch.equal(mask.rows(everything, everything), seen)
    assert visible_pairs(case) == int(seen.sum())
    per_pair = 2 * case.width * case.heads
    assert operations(case)["forward"] == 2 * per_pair * int(seen.sum())
    assert operations(case)["backward"] == 5 * per_pair * int(seen.sum())


def test_patterns_match_their_names() -> None:
    def branches(pattern: str) -> int:
        """Count the places where positions go back within an example."""
        mask = make_mask(Case(pattern, 8192), CPU)
        starts = [start for start, _ in mask.bounds]
        return int((mask.position_ids[0].diff() != 1).sum()) - len(starts) + 1

    assert branches(PLAIN) == branches(DIALOGUES) == 0
    assert branches(LONG) == 4 and len(make_mask(Case(LONG, 8192), CPU).bounds) == 1
    triples = {p: len(make_mask(Case(p, 8192), CPU).bounds) - 1 for p in (ONE, FOUR)}
    assert branches(ONE) == triples[ONE] > 10 and branches(FOUR) == 4 * triples[FOUR] > 40


@each
def test_the_right_answer_matches_the_definition(case: Case) -> None:
    inputs = make_inputs(case, CPU)
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = interval_attention(
        *leaves,
        inputs.mask.visible_until,
        position_ids=inputs.mask.position_ids,
        window=case.window,
        softcap=case.softcap,
        impl="reference",
    )
    gradients = torch.autograd.grad(out, leaves, inputs.d_out.double())
    answer = right_answer(case, inputs)
    assert list(answer) == list(RESULTS)
    found = errors([out.detach(), *gradients], answer)
    assert max(found.values()) < 1e-7, "but for the rounding to float32 that answers are kept in"


@each
def test_every_runnable_implementation_is_right(case: Case) -> None:
    answer = QUESTION.answer(case, CPU)
    baseline = QUESTION.setup(case, EAGER, CPU).errors(answer)
    ran = []
    for name in ("derta auto", "derta sdpa", FLASH, DENSE):
        try:
            found = QUESTION.setup(case, name, CPU).errors(answer)
        except NotImplementedError:
            continue
        ran.append(name)
        assert QUESTION.is_right(case, found, baseline), (name, found, baseline)
        assert not QUESTION.is_right(case, found, {}), "where nothing was compared"
    assert (FLASH in ran) == (case.pattern == PLAIN)
    assert (DENSE in ran) == (case.softcap is None)


@pytest.mark.parametrize("spoilt", RESULTS)
def test_one_wrong_token_makes_a_result_wrong(spoilt: str) -> None:
    case = replace(SMALL, dtype="bfloat16")
    answer = QUESTION.answer(case, CPU)
    baseline = QUESTION.setup(case, EAGER, CPU).errors(answer)
    ours = QUESTION.setup(case, QUESTION.ours, CPU)
    assert QUESTION.is_right(case, ours.errors(answer), baseline)
    answer[spoilt][0, 10, 1] *= 1.5
    assert not QUESTION.is_right(case, ours.errors(answer), baseline)


def test_rounding_of_a_zero_gradient_is_allowed() -> None:
    right = torch.randn(1, 8, 2, 16)
    right[0, 0] = 0
    wrong = right.clone()
    wrong[0, 0] = 1e-6
    assert token_errors(wrong, right).max() < 1e-5
    wrong[0, 3, 1, 2] = torch.nan
    assert not token_errors(wrong, right).max() <= 1


@each
def test_flex_attention_gets_the_same_mask_without_extra_blocks(case: Case) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    inputs = make_inputs(case, CPU)
    ours = block_mask(inputs.mask)
    blocks = dense(case).unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2)
    assert torch.equal(ours.to_dense()[0, 0].bool(), blocks.any(3).any(2))
    theirs = create_block_mask(ours.mask_mod, 1, 1, case.tokens, case.tokens, "cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    with torch.no_grad():
        out = flex_attention(
            *(x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)),
            score_mod=None if case.softcap is None else score_mod(case.softcap),
            block_mask=ours,
            enable_gqa=True,
        )
    assert token_errors(out.transpose(1, 2), right_answer(case, inputs)["out"]).max() < 1e-5


@pytest.mark.parametrize("heads_first", [True, False])
def test_a_peer_gets_its_own_layout(heads_first: bool) -> None:
    shapes = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.extend(x.shape for x in (q, k, v))
        assert all(x.is_contiguous() and x.requires_grad for x in (q, k, v))
        return q * 1

    case = replace(SMALL, pattern=PLAIN)
    setup = Setup(make_inputs(case, CPU), Attention(attend, heads_first))
    assert [name for name, _ in setup.phases()] == ["forward", "backward"]
    setup.forward()
    axes = (1, 2) if heads_first else (2, 1)
    assert [[shape[axis] for axis in axes] for shape in shapes] == [[4, 1024], *[[2, 1024]] * 2]
    setup.clear()
    assert setup.out is None and not setup.gradients


def test_implementations_are_known_and_case_names_are_unique_per_device() -> None:
    for device in ("cpu", "cuda"):
        for pairs in groups_for(device).values():
            assert {name for _, name in pairs} <= set(IMPLEMENTATIONS)
            assert len({(case.name, name) for case, name in pairs}) == len(pairs)
            assert all(case.tokens % 128 == 0 for case, _ in pairs), "blocks of FlexAttention"


@pytest.mark.parametrize(("share", "verdict"), [(0.99, "pass"), (1.01, "fail")])
def test_a_required_speed_is_judged_as_a_time(share: float, verdict: str) -> None:
    found = dict.fromkeys((f"{name}_error" for name in RESULTS), 1e-3)
    count = operations(GPU_PLAIN)
    spans = {
        f"{phase}_ms": [share * count[phase] / (1e9 * tflops)] for phase, tflops in TFLOPS.items()
    }
    turn = {"time_ms": [sum(ms for (ms,) in spans.values())], "peak_mib": 1.0, **spans}
    outcomes = [Outcome(Job(GPU_PLAIN, n), found, [turn]) for n in (QUESTION.ours, EAGER)]
    records = records_of(outcomes, QUESTION)
    judged = [v for r, v, _ in verdicts(records, QUESTION) if r.against is None]
    assert judged == [verdict] * 2
    values = figures(records)[GPU_PLAIN.name, QUESTION.ours]
    for phase, tflops in TFLOPS.items():
        assert values[f"{phase}_tflops"] == pytest.approx(tflops / share, rel=1e-4)


@pytest.mark.slow
def test_the_benchmark_runs_on_small_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (QUESTION.ours, "FlexAttention", EAGER)
    monkeypatch.setattr(
        QUESTION, "groups", lambda device: {"small": [(SMALL, name) for name in names]}
    )
    options = ["--machine", "here", "--out", str(tmp_path), "--repetitions", "2", "--threads", "1"]
    monkeypatch.setattr("sys.argv", [QUESTION.name, *options])
    main(QUESTION)
    records = report.records_file(tmp_path, QUESTION)
    known = figures(load_groups(records)["small"]["records"])
    for name in (QUESTION.ours, EAGER):
        values = known[SMALL.name, name]
        assert values["right"] == 1 and values["timings"] == 2 and values["peak_mib"] > 0
        assert values["forward_tflops"] > 0 and values["backward_tflops"] > 0
    text = records.with_suffix(".md").read_text()
    assert "| FlexAttention | did not run: NotImplementedError: it trains only on CUDA" in text


def test_the_gpu_script_runs_existing_questions() -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", "-n", script], check=True)
    asked = re.findall(r"^\w+\) ask (\w+) ;;$", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert "attention" in asked and set(asked) <= set(NAMES)


def test_the_kernels_tests_need_only_torch_and_pytest(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('hypothesis', 'transformers', 'datasets', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
    )
    few = "chunks_equal_the_definition or triton_equals_the_definition or linear_in_tokens"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "tests/kernels", "-k", few],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    skipped = done.stdout.count("hypothesis is not installed")
    assert skipped == (2 if find_spec("triton") else 1) and " passed" in done.stdout
