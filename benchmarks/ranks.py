"""Count what ranks send each other in a training step, and time it, by engine and by head.

    python -m benchmarks.ranks --machine xeon-2-cores

Ranks are CPU processes of one machine, so bytes are what counts: they are those of a ring, see
`benchmarks.harness.traffic`, and the same on any device. Times tell only that a rank waits for
another. The last table is a projection: nothing of it was measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks.harness.measuring import ROOT, describe_machine
from benchmarks.harness.results import results_folder, results_parser, write_results
from benchmarks.harness.traffic import Traffic
from derta import DertaConfig, DertaTrainer
from derta.demo.model import train_tokenizer
from derta.demo.world import World, make_world, tuning_records
from derta.modeling.adapters import Method, adapt
from derta.modeling.sharding import without_zero3

MIB = 2**20
RANKS = 2
WARM_UP, STEPS = 1, 3
PACK, EXAMPLES = 512, 24
VOCABULARY, WIDTH, LAYERS = 32_000, 128, 4
ENGINES = (
    ("ddp", "full"),
    ("zero2", "full"),
    ("zero3", "full"),
    ("fsdp", "full"),
    ("ddp", "lora"),
    ("zero3", "lora"),
    ("fsdp", "lora"),
)


@dataclass(frozen=True)
class Record:
    """A step on one of several ranks.

    Attributes:
        what: the engine and the method, or the head.
        step_ms: median time.
        sent_mib: MiB that a rank sends.
        sent: MiB by kind of collective.
        packs: the packs of a step on a rank.
    """

    what: str
    step_ms: float
    sent_mib: float
    sent: dict[str, float]
    packs: int


class Counting(TrainerCallback):
    """Counts and times optimizer steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, Traffic]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        torch.distributed.barrier()
        self.traffic = Traffic(RANKS)
        self.begin = time.perf_counter()
        self.traffic.__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.traffic.__exit__(None, None, None)
        self.steps.append((time.perf_counter() - self.begin, self.traffic))


def step_of_engine(
    shard: Any, method: Any, world: World, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> Record:
    """Measure the steps of an engine on this rank."""
    args = DertaConfig(
        str(folder / f"{shard}-{method}"),
        shard=shard,
        max_tokens=PACK,
        examples_per_step=EXAMPLES,
        max_steps=WARM_UP + STEPS,
        use_cpu=True,
        ddp_backend="gloo",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    with without_zero3():
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=8,
                num_key_value_heads=4,
            )
        )
    triples, dialogues = tuning_records(world, seed=0)
    counting = Counting()
    trainer = DertaTrainer(
        model=adapt(model, Method(method=method)),
        args=args,
        train_dataset=[*triples, *dialogues],
        processing_class=tokenizer,
        callbacks=[counting],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    measured = counting.steps[WARM_UP:]
    sent = measured[-1][1].sent
    return Record(
        what=f"{shard}, {method}",
        step_ms=1e3 * statistics.median(seconds for seconds, _ in measured),
        sent_mib=sum(sent.values()) / MIB,
        sent={kind: size / MIB for kind, size in sorted(sent.items())},
        packs=len(trainer.train_dataset[len(trainer.train_dataset) - 1]),
    )


def run_rank(folder: Path) -> None:
    """Measure everything on this rank; the first one writes what it found."""
    world = make_world(seed=0, gadgets=64)
    tokenizer = train_tokenizer(world)
    records = [step_of_engine(*engine, world, tokenizer, folder) for engine in ENGINES]
    if torch.distributed.get_rank() == 0:
        text = json.dumps([asdict(record) for record in records])
        (folder / "records.json").write_text(text, encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)  # without Python's own ending, in which a thread of gloo may abort


def table(machine: dict[str, Any], records: Sequence[Record]) -> str:
    """Return Markdown tables of what was measured."""
    lines = [
        "# What ranks send each other\n",
        "[ranks.py](../../ranks.py) says how it is counted.\n",
        f"{machine['date']}, commit {machine['commit']}, {machine['processor']}, "
        f"{machine['cores']} cores, {RANKS} ranks.\n",
        f"A step of {EXAMPLES} examples in packs of {PACK:,} tokens; a Llama of {LAYERS} layers, "
        f"width {WIDTH} and {VOCABULARY:,} tokens, in float32.\n",
        "| engine | packs of a rank | MiB sent by a rank | of these | ms |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for record in records:
        kinds = ", ".join(f"{kind} {size:.1f}" for kind, size in record.sent.items())
        lines.append(
            f"| {record.what} | {record.packs} | {record.sent_mib:.1f} | {kinds} | "
            f"{record.step_ms:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write ranks.json and ranks.md."""
    if len(sys.argv) == 3 and sys.argv[1] == "--rank":
        run_rank(Path(sys.argv[2]))
    options = results_parser("ranks", __doc__).parse_args()
    folder = results_folder(options)
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}")
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(
            [sys.executable, "-m", *torchrun, "-m", "benchmarks.ranks", "--rank", temporary],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        found = json.loads(Path(temporary, "records.json").read_text(encoding="utf-8"))
    records = [Record(**values) for values in found]
    machine = describe_machine(torch.device("cpu"), 1)
    write_results(folder, "ranks", machine, found, table(machine, records))


if __name__ == "__main__":
    main()
