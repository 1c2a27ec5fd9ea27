"""Errors on several ranks: one sentence, of one rank, and all ranks end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from derta.cli import main
from derta.launch import RENDEZVOUS
from ranks import TORCHRUN, environment, launch
from tiny import tiny_model, tiny_tokenizer

PROMISE = "An error on one of several ranks is said once, with its reason, and ends all of them."

# Ranks that meet in a collective, with a fault of one rank before the second one.
WORK = """
import ctypes, datetime, os, signal, sys, tempfile, time
from derta.cli import ranks

def hang():
    time.sleep(600)

def work():
    import torch
    from torch import distributed
    limit = datetime.timedelta(seconds=float(os.environ.get("LIMIT_S", "600")))
    distributed.init_process_group("gloo", timeout=limit)
    ranks.enter("step 3")
    distributed.all_reduce(torch.ones(1))
    if distributed.get_rank() == 1:
        print("ready", flush=True)
    exec(os.environ.get(f"FAULT_{distributed.get_rank()}", ""))
    distributed.all_reduce(torch.ones(1))

# A rank waits like this for a collective of NCCL: neither a signal nor an error ends that.
def stick():
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)

kept = tempfile.TemporaryDirectory(prefix=".derta-")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
ranks.run("derta try", work, lambda error: str(error) if isinstance(error, ValueError) else None)
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def said(errors: str, title: str) -> list[str]:
    """Return the lines of an error output that a command says, not torchrun about them."""
    return [line for line in errors.splitlines() if line.startswith(title)]


@pytest.fixture
def work(tmp_path: Path) -> str:
    path = tmp_path / "work.py"
    path.write_text(WORK, encoding="utf-8")
    return str(path)


@pytest.mark.promise(PROMISE)
@pytest.mark.parametrize(
    ("fault", "limit_s", "sentence"),
    [
        (KILL, "600", "step 3: rank 1 ended without a word, as a killed process does"),
        (
            "hang()",
            "2",
            "step 3: all_reduce of all ranks timed out after 2 s (ddp_timeout): rank 1 was in "
            "step 3, in hang (",
        ),
        pytest.param(
            "raise TypeError('a bug')",
            "600",
            "rank 1: TypeError: a bug",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_is_named_with_the_reason_why_the_others_end(
    tmp_path: Path, work: str, fault: str, limit_s: str, sentence: str
) -> None:
    done = launch(work, temporary=tmp_path, FAULT_1=fault, LIMIT_S=limit_s)
    assert done.returncode == 1
    (line,) = said(done.stderr, "derta try")
    assert line.startswith(f"derta try: {sentence}")
    assert done.stderr.count("a bug\n") == (3 if "bug" in fault else 0)  # torchrun repeats it
    assert f"traceback : {line}" in done.stderr


def test_a_rank_that_waits_for_no_other_names_a_killed_one_too(tmp_path: Path, work: str) -> None:
    done = launch(work, temporary=tmp_path, FAULT_0="hang()", FAULT_1=KILL)
    sentence = "step 3: rank 1 ended without a word, as a killed process does"
    assert said(done.stderr, "derta try") == [f"derta try: {sentence}"]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_torchrun_ends_all_ranks_with_one_line(
    tmp_path: Path, work: str, number: signal.Signals
) -> None:
    run = subprocess.Popen(
        [*TORCHRUN, "--nproc_per_node=2", work],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path, FAULT_1="hang()"),
    )
    assert run.stdout is not None
    run.stdout.readline()  # rank 1 is ready
    begin = time.monotonic()
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert time.monotonic() - begin < 20
    reason = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    assert said(errors, "derta try") == [f"derta try: {reason}"]


@contextmanager
def by_hand(
    work: str, temporary: Path, **changes: str
) -> Iterator[tuple[subprocess.Popen[str], ...]]:
    """Start two ranks as srun does, of which none ends the other."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = tuple(
        subprocess.Popen(
            [sys.executable, work],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(temporary, RANK=str(rank), LOCAL_RANK=str(rank), **place, **changes),
        )
        for rank in range(2)
    )
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.promise(PROMISE)
@pytest.mark.parametrize(
    ("faults", "sentence"),
    [
        (
            {"FAULT_0": "stick()", "FAULT_1": "raise ValueError('an odd row')"},
            f"rank 1 ({socket.gethostname()}): an odd row",
        ),
        ({"FAULT_0": KILL}, "rank 0 ended without a word, as a killed process does"),
    ],
)
def test_ranks_without_a_launcher_end_within_a_minute_of_one_that_fails(
    tmp_path: Path, work: str, faults: dict[str, str], sentence: str
) -> None:
    with by_hand(work, tmp_path, **faults) as ranks:
        errors = "".join(rank.communicate(timeout=120)[1] for rank in ranks)
    assert all(rank.returncode for rank in ranks)
    assert said(errors, "derta try") == [f"derta try: {sentence}"]
    assert len(list(tmp_path.glob(".derta-*"))) == sum(KILL in fault for fault in faults.values())


@pytest.mark.slow
def test_ranks_without_a_launcher_end_well_one_after_the_other(tmp_path: Path, work: str) -> None:
    slow = "atexit.register(time.sleep, 15)"  # longer than rank 0 waits
    with by_hand(work, tmp_path, FAULT_1=f"import atexit; {slow}") as ranks:
        for rank in ranks:
            assert rank.communicate(timeout=120)[1] == ""
            assert rank.returncode == 0


def test_tasks_of_srun_that_would_train_apart_are_refused_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert main(["train", "run.yaml"]) == 1
    expected = "derta train: srun has started 8 tasks without RANK: start torchrun in one task of"
    assert capsys.readouterr().err.startswith(expected)
    monkeypatch.setenv("SLURM_PROCID", "7")
    with pytest.raises(SystemExit, match="1"):
        main(["train", "run.yaml"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("started", [dict.fromkeys(RENDEZVOUS, "0"), {}])
def test_a_command_of_one_process_refuses_several_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], started: dict[str, str]
) -> None:
    count, place = ("WORLD_SIZE", "RANK") if started else ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    for name, value in (started | {count: "8"}).items():
        monkeypatch.setenv(name, value)
    assert main(["eval", "tamper", "run.yaml"]) == 1
    expected = "derta eval tamper: it runs in one process, got 8: start it without torchrun or srun"
    assert capsys.readouterr().err == f"{expected}\n"
    monkeypatch.setenv(place, "7")
    with pytest.raises(SystemExit, match="0"):
        main(["eval", "tamper", "run.yaml"])
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(count, "1")
    assert main(["eval", "tamper", "run.yaml"]) == 1
    assert "no such configuration file" in capsys.readouterr().err


# Training in which rank 1 fails in its second step.
TRAIN = """
import os, sys
from derta.cli import main
from derta.training.trainer import DertaTrainer

step = DertaTrainer.training_step

def fails(self, *arguments):
    if self.state.global_step == 1:
        raise ValueError("rows.jsonl:2: this row is odd")
    return step(self, *arguments)

if os.environ["RANK"] == "1":
    DertaTrainer.training_step = fails
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.promise(PROMISE)
def test_training_says_an_error_and_a_warning_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    row = {"prompt": "How?", "safe": "Sorry, no.", "harmful": "Step one, step two. " * 6}
    long = {**row, "safe": "Sorry. " * 500}
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, (row, row, long))), encoding="utf-8")
    script = tmp_path / "train.py"
    script.write_text(TRAIN, encoding="utf-8")
    Path("run.yaml").write_text(
        "model: model\nsources: [{path: rows.jsonl, role: safety}]\noutput_dir: out\n"
        "refusal: Sorry\nmax_length: 256\nmax_steps: 3\nlogging_steps: 1\nsave_strategy: 'no'\n"
        "use_cpu: true\nddp_backend: gloo\n",
        encoding="utf-8",
    )
    everyone = launch("-m", "derta", "train", "run.yaml", "--branches=-3", temporary=tmp_path)
    one = launch(str(script), "train", "run.yaml", temporary=tmp_path)
    assert everyone.returncode == one.returncode == 1
    assert said(everyone.stderr, "derta") == [
        "derta train: branches must lie in [0, 1000], got -3",
        "derta FAILED",  # torchrun's heading
    ]
    assert said(one.stderr, "derta train") == ["derta train: rank 1: rows.jsonl:2: this row is odd"]
    assert one.stderr.count("1 of 3 examples skipped") == 1
    assert one.stderr.count("Traceback") == everyone.stderr.count("Traceback") == 1  # torchrun's
    assert not list(tmp_path.glob(".derta-*"))
