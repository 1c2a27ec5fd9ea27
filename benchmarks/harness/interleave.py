"""Run implementations side by side, in separate processes that take turns.

A process builds its inputs once, shows that its results are right, and then waits for its turns.
The allocations, caches and compiled code of one process do not affect another, and a temporary
slowdown of the machine affects all of them. `run` starts `python -m benchmarks.harness.interleave`
as such a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from benchmarks.harness.measuring import ROOT, describe_machine, measure
from benchmarks.harness.question import Case, question_named

WARM_UP_TURNS = 1


@dataclass(frozen=True)
class Job:
    """The work of one process: a case, an implementation, and the Python that runs it."""

    case: Case
    implementation: str
    python: str = sys.executable
    torch_version: str | None = None

    @property
    def name(self) -> str:
        """Name of the implementation in records."""
        if self.torch_version is None:
            return self.implementation
        return f"{self.implementation} (torch {self.torch_version})"


@dataclass(frozen=True)
class Settings:
    """The settings shared by all processes of a run.

    Attributes:
        question: name of the question.
        device: "cpu" or "cuda".
        threads: torch threads on the CPU.
        peers: folder to import other libraries from, or None.
        seconds: time limit for one answer; a process that exceeds it is killed.
    """

    question: str
    device: str
    threads: int
    peers: str | None
    seconds: float


@dataclass
class Outcome:
    """The results of a job: errors and measurements by turn, or the reason for a failure."""

    job: Job
    errors: dict[str, float] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None


class Process:
    """A job's process; every message is one line of JSON."""

    def __init__(self, job: Job, answer: Path, settings: Settings) -> None:
        self.outcome = Outcome(job)
        self.seconds = settings.seconds
        request = {**asdict(settings), "implementation": job.implementation}
        request |= {"case": asdict(job.case), "answer": str(answer)}
        environment = os.environ | {"PYTHONPATH": _search_path(settings.peers)}
        environment.pop("TRITON_INTERPRET", None)  # the interpreter's time is meaningless
        self.process = subprocess.Popen(
            [job.python, "-m", "benchmarks.harness.interleave", json.dumps(request)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._listen()

    def check(self) -> None:
        """Compute the errors, which also compiles the implementation."""
        self.outcome.errors = self._ask("check").get("errors", {})

    def turn(self, counts: bool) -> None:
        """Run one turn; warm-up turns do not count."""
        measured = self._ask("turn")
        if counts and measured:
            self.outcome.turns.append(measured)

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.communicate()

    def _ask(self, request: str) -> dict[str, Any]:
        """Return the answer to a request; an empty one if the process has failed."""
        assert self.process.stdin is not None
        if self.outcome.reason is not None:
            return {}
        with contextlib.suppress(BrokenPipeError):  # it has ended; `_listen` finds the reason
            print(request, file=self.process.stdin, flush=True)
        return self._listen()

    def _listen(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        watchdog = threading.Timer(self.seconds, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        late = not watchdog.is_alive()
        watchdog.cancel()
        if line:
            answer = json.loads(line)
            self.outcome.reason = answer.get("reason")
            return answer
        code = self.process.wait()
        self.outcome.reason = (
            f"no answer within {self.seconds:g} s" if late else f"the process ended with {code}"
        )
        return {}


def run(
    jobs: Sequence[Job], repetitions: int, settings: Settings, scratch: Path, deadline: float
) -> list[Outcome]:
    """Time jobs in turns.

    Args:
        jobs: the jobs to compare.
        repetitions: number of turns for each job.
        settings: see `Settings`.
        scratch: folder for the right answers, which cases share across calls.
        deadline: end by `time.monotonic`; no turns start after it, except the first.
    """
    answers = {job.case: _answer_file(job.case, settings, scratch) for job in jobs}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        processes = list(pool.map(lambda job: Process(job, answers[job.case], settings), jobs))
    try:
        for process in processes:
            process.check()
            said = process.outcome.reason or "ready"
            print(f"  {process.outcome.job.name}: {said}", file=sys.stderr, flush=True)
        for turn in range(WARM_UP_TURNS + repetitions):
            if turn > WARM_UP_TURNS and time.monotonic() > deadline:
                break
            for process in processes:
                process.turn(counts=turn >= WARM_UP_TURNS)
    finally:
        for process in processes:
            process.end()
    return [process.outcome for process in processes]


def machine_of(settings: Settings) -> dict[str, Any]:
    """Return `describe_machine` with the peers in the search path."""
    return _in_a_process("describe_machine", settings)


def _answer_file(case: Case, settings: Settings, scratch: Path) -> Path:
    """Return the file of the case's right answer; cases may share one."""
    case = question_named(settings.question).answer_case(case)
    path = scratch / (re.sub(r"\W+", "-", case.name) + ".pt")
    if not path.exists():
        _in_a_process("save_answer", settings, asdict(case), str(path))
    return path


def _in_a_process(function: str, settings: Settings, *arguments: Any) -> Any:
    """Return the answer of `serve` to a call, in a process that frees its memory at its end."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.harness.interleave",
            json.dumps({"call": function, "arguments": arguments} | asdict(settings)),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": _search_path(settings.peers)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)["result"]


def _search_path(peers: str | None) -> str:
    inherited = os.environ.get("PYTHONPATH")
    folders = [str(ROOT), str(ROOT / "kernels"), inherited, *_folders(peers)]
    return os.pathsep.join(folder for folder in folders if folder)


def _folders(peers: str | None) -> list[str]:
    """Return the folder of peers and the folders its .pth files name, which Python would not read.

    QuACK and Liger import nvidia-cutlass-dsl from such a folder.
    """
    if peers is None:
        return []
    files = sorted(Path(ROOT, peers).glob("*.pth"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    inside = [line for line in lines if not re.match(r"import\b|#|$", line)]
    return [peers, *(str(Path(peers, line)) for line in inside)]


def serve(request: dict[str, Any], talk: IO[str]) -> None:
    """Answer one call, or serve a job's turns until the process is killed."""

    def say(**message: Any) -> None:
        print(json.dumps(message), file=talk, flush=True)

    sys.excepthook = partial(_say_why, talk)
    device = torch.device(request["device"])
    torch.set_num_threads(request["threads"])
    question = question_named(request["question"])
    if request.get("call") == "describe_machine":
        return say(result=describe_machine(device, request["threads"]))
    if request.get("call") == "save_answer":
        fields, path = request["arguments"]
        torch.save(question.answer(question.case_type(**fields), device), path)
        return say(result=None)

    case = question.case_type(**request["case"])
    ready = question.setup(case, request["implementation"], device)
    _leave_the_rest(device)
    say()
    for line in sys.stdin:  # until the parent ends
        if line.strip() == "check":
            say(errors=ready.errors(torch.load(request["answer"], mmap=True)))
        else:
            say(**measure(ready, question.gpu_steps))
        _leave_the_rest(device)


def _leave_the_rest(device: torch.device) -> None:
    """Release unused GPU memory, which other processes need."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _say_why(
    talk: IO[str], kind: type[BaseException], error: BaseException, _: TracebackType | None
) -> None:
    """Report the exception in one line, without the paths of this machine."""
    said = " ".join(f"{kind.__name__}: {error}".split())
    said = re.sub(r"/(?:[\w.+-]+/)+", "", said)
    print(json.dumps({"reason": said[:200]}), file=talk, flush=True)
    os._exit(1)


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not be read as an answer
    serve(json.loads(sys.argv[1]), channel)
