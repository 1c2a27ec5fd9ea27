"""The head loss against its peers: records, table and plot of one machine.

    python -m benchmarks.head_loss --machine xeon-2-cores

Groups of cases run one after another. After each, the file of records is written, so a run that was
ended can be taken up with --resume.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import report
from benchmarks.cases import Case
from benchmarks.harness import ROOT, load
from benchmarks.interleave import Job, Settings, machine_of, run
from benchmarks.peers import EAGER, IMPLEMENTATIONS, PRODUCTS
from benchmarks.records import load_groups, records_of, save_groups
from benchmarks.requirements import OURS, TORCH_CHUNKED, requirements, verdicts

# What cannot compile its kernels in the minutes of a GPU's turn is left out, with that reason.
ANSWER_SECONDS = {"cpu": 600.0, "cuda": 150.0}
ALL = tuple(IMPLEMENTATIONS)
MOST = (OURS, "derta torch", EAGER, "full compiled", "torch chunked, 2048 rows", "trl", PRODUCTS)
FEW = (OURS, EAGER, TORCH_CHUNKED, PRODUCTS)
SPARSE = (OURS, "derta torch", EAGER, TORCH_CHUNKED, "liger", "cce default", "quack", "trl")


def groups_for(device: str) -> dict[str, list[tuple[Case, str]]]:
    """What runs interleaved, by name: cases and implementations."""
    if device == "cpu":
        case = Case("1024x64000", 2048)
        frozen, random = replace(case, trainable=False), replace(case, inputs="random")
        return {
            "trainable head": _each(case, ALL),
            "frozen head": _each(frozen, MOST),
            "float32": _each(replace(case, dtype="float32"), MOST),
            "5% live": _sparse(case),
            "trainable head, random rows": _each(random, FEW),
        }
    case = Case("llama-3-8b", 8192)
    frozen = replace(case, trainable=False)
    odd = "llama-3-8b + 1 token"
    return {
        "frozen head": _each(frozen, ALL),
        "trainable head": _each(case, ALL),
        "frozen head, 128257": _each(replace(frozen, head=odd), ALL) + _each(frozen, FEW),
        "trainable head, 128257": _each(replace(case, head=odd), ALL) + _each(case, FEW),
        "5% live": _sparse(case),
        "trainable head, random rows": _each(replace(case, inputs="random"), ALL),
        "soft-capped head": _each(Case("gemma-2-2b", 8192), ALL),
        "soft-capped frozen head": _each(Case("gemma-2-2b", 8192, trainable=False), ALL),
        "frozen head, 32768 rows": _each(replace(frozen, rows=32768), ALL),
        "trainable head, 32768 rows": _each(replace(case, rows=32768), ALL),
    }


def _each(case: Case, names: tuple[str, ...]) -> list[tuple[Case, str]]:
    return [(case, name) for name in names]


def _sparse(case: Case) -> list[tuple[Case, str]]:
    sparse = replace(case, live=0.05)
    return _each(sparse, SPARSE) + _each(replace(sparse, live_alone=True), (OURS, EAGER))


def main() -> None:
    options = _options()
    groups = groups_for(options.device)
    folder = options.out or ROOT / "benchmarks" / "results" / options.machine
    done = load_groups(folder / report.RECORDS)
    settings = Settings(
        options.device, options.threads, options.peers, ANSWER_SECONDS[options.device]
    )
    other = _torch_version(options.other_python) if options.other_python else None
    judged = {r.case for r in requirements() if r.against == TORCH_CHUNKED}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.groups or groups:
            if options.resume and name in done:
                continue
            if time.monotonic() - begin > options.seconds:
                print(f"out of time before {name!r}: take it up with --resume", file=sys.stderr)
                break
            print(name, file=sys.stderr, flush=True)
            jobs = [Job(case, implementation) for case, implementation in groups[name]]
            if other is not None:
                jobs += [
                    replace(job, python=options.other_python, torch_version=other)
                    for job in jobs
                    if job.case in judged and job.implementation == TORCH_CHUNKED
                ]
            machine = machine_of(settings)
            outcomes = run(
                jobs, options.repetitions, settings, Path(scratch), begin + options.seconds
            )
            machine |= {f"{key} after": value for key, value in load().items()}
            done[name] = {"machine": machine, "records": records_of(outcomes)}
            save_groups(folder / report.RECORDS, done)
            report.write(folder)
            for requirement, verdict, value in verdicts(done[name]["records"]):
                said = f"{requirement.what} at most {requirement.limit:.4g}"
                print(f"{verdict}: {requirement.case.name}: {said}, measured {value}")


def _torch_version(python: str) -> str:
    code = "import torch; print(torch.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--machine", required=True, help="folder of results/ to write into")
    parser.add_argument("--out", type=Path, help="another folder to write into")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch's, on a CPU")
    parser.add_argument("--groups", nargs="+", help="some of the groups, by name")
    parser.add_argument("--repetitions", type=int, default=7, help="turns of each implementation")
    parser.add_argument("--peers", help="a folder to import other libraries from")
    parser.add_argument(
        "--other-python",
        help="where ours is judged by torch's own op, measure that of this Python's torch too",
    )
    parser.add_argument("--resume", action="store_true", help="keep groups that have records")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing after that long"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
