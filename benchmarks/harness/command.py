"""Measure the groups of a question and record the results.

Groups of cases run one after another. The file of records is written after each group, so --resume
continues an interrupted run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import report
from benchmarks.harness.interleave import Job, Settings, machine_of, run
from benchmarks.harness.measuring import load
from benchmarks.harness.question import Question
from benchmarks.harness.records import load_groups, records_of, save_groups, verdicts
from benchmarks.harness.results import results_folder, results_parser

# An implementation that needs more time to compile its kernels is left out, with that reason.
ANSWER_SECONDS = {"cpu": 600.0, "cuda": 150.0}


def main(question: Question) -> None:
    """Run the command line of a benchmark."""
    options = _options(question)
    groups = question.groups(options.device)
    folder = results_folder(options)
    path = report.records_file(folder, question)
    done = load_groups(path)
    settings = Settings(
        question.name,
        options.device,
        options.threads,
        options.peers,
        ANSWER_SECONDS[options.device],
    )
    other = _torch_version(options.other_python) if options.other_python else None
    judged = {r.case for r in question.requirements() if r.against == question.own_op}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.groups or groups:
            if options.resume and name in done:
                continue
            if time.monotonic() - begin > options.seconds:
                print(f"out of time before {name!r}: continue with --resume", file=sys.stderr)
                break
            print(name, file=sys.stderr, flush=True)
            jobs = [Job(case, implementation) for case, implementation in groups[name]]
            if other is not None:
                jobs += [
                    replace(job, python=options.other_python, torch_version=other)
                    for job in jobs
                    if job.case in judged and job.implementation == question.own_op
                ]
            machine = machine_of(settings)
            outcomes = run(
                jobs, options.repetitions, settings, Path(scratch), begin + options.seconds
            )
            machine |= {f"{key} after": value for key, value in load().items()}
            done[name] = {"machine": machine, "records": records_of(outcomes, question)}
            save_groups(path, done)
            report.write(folder, question)
            for requirement, verdict, value in verdicts(done[name]["records"], question):
                said = f"{requirement.what} at most {requirement.limit:.4g}"
                print(f"{verdict}: {requirement.case.name}: {said}, measured {value}")


def _torch_version(python: str) -> str:
    code = "import torch; print(torch.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _options(question: Question) -> argparse.Namespace:
    parser = results_parser(question.name, f"{question.title}, measured.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch threads on a CPU")
    parser.add_argument("--groups", nargs="+", help="names of the groups to run")
    parser.add_argument("--repetitions", type=int, default=7, help="turns of each implementation")
    parser.add_argument("--peers", help="folder of other libraries")
    parser.add_argument(
        "--other-python",
        help="another Python, whose torch's own op is measured too if ours is judged by that op",
    )
    parser.add_argument("--resume", action="store_true", help="keep groups that have records")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="time limit to start new work"
    )
    return parser.parse_args()
