"""Kill training runs at drawn moments, start them again, and compare them with an unbroken run.

    python -m benchmarks.kills --machine xeon-2-cores

A process sends itself SIGKILL at a moment that is drawn beforehand: at one of its operations on
files while something is saved, before a pack, or within an evaluation. Then the same command starts
again, is killed again in half of the cases, and runs to its end. A case passes if weights,
optimizer, figures and the best checkpoint are those of the unbroken run, bit for bit, if all
checkpoints verify, and if nothing half-written is left.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.measuring import describe_machine
from benchmarks.harness.results import results_folder, results_parser, write_results

KINDS = ("checkpoint", "model", "step", "evaluation")
# Files that are the same bytes in every run; what else there is holds times or paths.
EXACT = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
# Figures of one start, which no other start repeats.
OF_A_START = ("tokens_per_s", "eval_tokens_per_s", "train_runtime", "train_loss", "total_flos")


@dataclass(frozen=True)
class Moment:
    """A moment at which a process kills itself.

    Attributes:
        kind: "checkpoint" or "model": an operation on files while one is saved; "step": before a
            pack; "evaluation": before a pack that is evaluated.
        count: the number of such moments before it.
        rank: the process; the others are killed after it.
    """

    kind: str
    count: int
    rank: int = 0


@dataclass(frozen=True)
class Run:
    """A training run of six steps.

    Attributes:
        name: title of the run.
        options: options of `derta train`.
        ranks: number of processes.
    """

    name: str
    options: tuple[str, ...]
    ranks: int = 1


_ALL = (
    *("--max_steps", "6", "--examples_per_step", "4", "--save_steps", "2", "--logging_steps", "3"),
    *("--refusal", "auto", "--learning_rate", "1e-2", "--max_tokens", "48", "--max_length", "48"),
    *("--use_cpu", "true", "--disable_tqdm", "true", "--resume"),
)
_LORA = ("--lora_r", "2", "--lora_dropout", "0.2")
_WATCHED = (
    *("--eval_strategy", "steps", "--eval_steps", "2"),
    *("--eval_sources", "{path: data/held-out.jsonl, role: safety}"),
    *("--metric_for_best_model", "loss", "--load_best_model_at_end", "true"),
)
RUNS = (
    Run("full", (*_ALL, "--save_total_limit", "1")),
    Run("LoRA, evaluated", (*_ALL, *_LORA, *_WATCHED, "--method", "lora")),
    Run(
        "QLoRA, 8-bit optimizer",
        (*_ALL, *_LORA, "--method", "qlora", "--optim", "adamw_bnb_8bit"),
    ),
    Run("two ranks", (*_ALL, *_WATCHED, "--ddp_backend", "gloo"), ranks=2),
    Run("FSDP", (*_ALL, *_WATCHED, "--ddp_backend", "gloo", "--shard", "fsdp"), ranks=2),
)


def prepare(folder: Path) -> None:
    """Write a small model and records of the demo's harmless world into a folder."""
    from derta.demo.gadgets import held_out_records, make_guild, tuning_records, vocabulary
    from derta.demo.model import new_model, train_tokenizer

    guild = make_guild(gadgets=6, seed=0)
    tokenizer = train_tokenizer(vocabulary(guild))
    new_model(tokenizer, hidden_size=64, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for name, triples in (
        ("tuning", tuning_records(guild, 32, seed=0).triples),
        ("held-out", held_out_records(guild, 16, seed=0).harmful),
    ):
        rows = [
            {"prompt": one.prompt, "safe": one.safe, "harmful": one.harmful, "id": one.id}
            for one in triples
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")


class _Counted:
    """Counts the moments of each kind in this process, and ends it at one of them."""

    def __init__(self, until: Moment | None) -> None:
        self.until = until
        self.seen: Counter[str] = Counter()

    def __call__(self, kind: str) -> None:
        if self.until is not None and (kind, self.seen[kind]) == (
            self.until.kind,
            self.until.count,
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen[kind] += 1

    def install(self) -> None:
        """Meet every moment of this process from now on."""
        from derta.training.trainer import DertaTrainer

        def on_files(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" or event.startswith(("os.", "shutil.")):
                paths = [str(one) for one in arguments if isinstance(one, str | bytes | Path)]
                for kind in ("checkpoint", "model"):
                    if any(f"/.{kind}" in path for path in paths):
                        self(kind)

        sys.addaudithook(on_files)
        pack, evaluate = DertaTrainer._pack_loss, DertaTrainer.evaluate

        def with_pack(*args: Any, **kwargs: Any) -> Any:
            self("step")
            return pack(*args, **kwargs)

        def with_evaluation(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            hook = trainer.model_wrapped.register_forward_pre_hook(lambda *_: self("evaluation"))
            try:
                return evaluate(trainer, *args, **kwargs)
            finally:
                hook.remove()

        DertaTrainer._pack_loss = with_pack  # type: ignore[method-assign]
        DertaTrainer.evaluate = with_evaluation  # type: ignore[method-assign, assignment]


def _start(run: Run, folder: Path, output: str, rank: int, port: int, until: Moment | None) -> None:
    """Run `derta train` in this process, and write the moments that it met."""
    os.chdir(folder)
    log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if run.ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(run.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import torch

    from derta.cli import main

    torch.set_num_threads(1)
    counted = _Counted(until if until is not None and until.rank == rank else None)
    counted.install()

    @atexit.register
    def tell() -> None:
        if rank == 0:
            Path(f"{output}.moments.json").write_text(json.dumps(counted.seen), encoding="utf-8")

    sources = ("--sources", "{path: data/tuning.jsonl, role: safety}")
    status = main(["train", "--model", "model", *sources, "--output_dir", output, *run.options])
    sys.stdout.flush()  # of a process that is alone; one of several ranks has ended by now
    tell()
    os._exit(status)


def start(run: Run, folder: Path, output: str, until: Moment | None = None) -> list[int | None]:
    """Run the command of a run once, on all its ranks.

    Args:
        run: the run.
        folder: the folder of model and data.
        output: the name of the run's folder in it.
        until: the moment at which it is killed; None: it runs to its end.

    Returns:
        the exit codes of its processes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["derta.cli.train", "bitsandbytes"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_start, args=(run, folder, output, rank, port, until))
        for rank in range(run.ranks)
    ]
    for process in processes:
        process.start()
    (processes[until.rank] if until else processes[0]).join()
    for process in processes:
        if until is not None:
            process.kill()  # as a launcher does it
        process.join()
    return [process.exitcode for process in processes]


def moments(run: Run, folder: Path, output: str) -> Counter[str]:
    """Return the number of moments of each kind that an unbroken run has met."""
    return Counter(json.loads((folder / f"{output}.moments.json").read_text(encoding="utf-8")))


def draw(run: Run, met: Counter[str], rng: random.Random) -> Moment:
    """Draw a moment: its kind first, of those that the run has."""
    kind = rng.choice([kind for kind in KINDS if met[kind]])
    all_write = "--shard" in run.options
    rank = rng.randrange(run.ranks) if all_write or kind in ("step", "evaluation") else 0
    return Moment(kind, rng.randrange(met[kind]), rank)


def faults(folder: Path, output: str, unbroken: str) -> list[str]:
    """Return the differences of a run from the unbroken one, and what it left half-written."""
    from derta.manifest import DamagedError, verify

    found = []
    ours, theirs = folder / output, folder / unbroken
    names = [
        {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
        for place in (ours, theirs)
    ]
    found += [f"{name}: only in one of the runs" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if (
            name.endswith((".safetensors", "optimizer.pt", "scheduler.pt"))
            and "running" not in name
        ):
            if (ours / name).read_bytes() != (theirs / name).read_bytes():
                found.append(f"{name}: other bytes")
        if name.endswith("trainer_state.json") and _history(ours / name) != _history(theirs / name):
            found.append(f"{name}: other figures")
    for place in [ours, *ours.glob("checkpoint-*")]:
        try:
            verify(place)
        except DamagedError as error:
            found.append(str(error))
    return found + [f"{path.name}: left" for path in ours.glob(".*")]


def _history(path: Path) -> list[Any]:
    state = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        {key: value for key, value in row.items() if not key.startswith(OF_A_START)}
        for row in state["log_history"]
    ]
    kept = [{key: value for key, value in row.items() if "per_second" not in key} for row in rows]
    return [kept, state["best_global_step"], state["best_metric"], state["global_step"]]


def survive(run: Run, folder: Path, output: str, kills: Sequence[Moment]) -> list[str]:
    """Kill a run at each of the moments, start it a last time, and return its faults.

    A moment that a later start no longer meets lets it run to its end, which must change nothing.
    """
    for until in kills:
        start(run, folder, output, until)
    codes = start(run, folder, output)
    return [f"exit codes {codes}" for _ in range(any(codes))] or faults(folder, output, "unbroken")


def main() -> None:
    """Write kills.json and kills.md."""
    parser = results_parser("kills", __doc__)
    parser.add_argument("--kills", type=int, default=60, help="number of runs to kill")
    options = parser.parse_args()
    import torch

    target = results_folder(options)
    rng = random.Random(0)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for run in RUNS:
            folder = Path(name, run.name.replace(" ", "-"))
            folder.mkdir()
            prepare(folder)
            assert not any(start(run, folder, "unbroken")), (folder / "unbroken.log").read_text()
            met = moments(run, folder, "unbroken")
            for number in range(options.kills // len(RUNS)):
                kills = [draw(run, met, rng) for _ in range(1 + number % 2)]
                found = survive(run, folder, f"killed-{number}", kills)
                records.append(
                    {"run": run.name, "kills": [asdict(kill) for kill in kills], "faults": found}
                )
                print(records[-1], file=sys.stderr, flush=True)
    machine = describe_machine(torch.device("cpu"), 1)
    write_results(target, "kills", machine, records, table(machine, records))


def table(machine: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: runs down, kinds of moments across, passed of all in each cell."""
    counts: dict[str, Counter[str]] = {}
    passed: dict[str, Counter[str]] = {}
    for record in records:
        for kill in record["kills"]:
            counts.setdefault(record["run"], Counter())[kill["kind"]] += 1
            passed.setdefault(record["run"], Counter())[kill["kind"]] += not record["faults"]
    good = sum(not record["faults"] for record in records)
    lines = [
        "# Runs killed and started again\n",
        f"{good} of {len(records)} runs ended as the unbroken one, bit for bit; "
        "[kills.py](../../kills.py) says what was done.\n",
        f"{machine['date']}, commit {machine['commit']}, {machine['processor']}, "
        f"torch {machine['versions']['torch']}.\n",
        "| run | " + " | ".join(f"killed in a {kind}" for kind in KINDS) + " |",
        "| --- |" + " ---: |" * len(KINDS),
    ]
    for run, cells in counts.items():
        told = [f"{passed[run][kind]} of {cells[kind]}" if cells[kind] else "" for kind in KINDS]
        lines.append(f"| {run} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
