"""Count what ranks send each other in a training step, and time it, by engine and by head.

    python -m benchmarks.ranks --machine xeon-2-cores

Ranks are CPU processes of one machine, so bytes are what counts: they are those of a ring, see
`benchmarks.harness.traffic`, and the same on any device. The head is either gathered, for the rows
of each rank, or stays in shards, for the rows of all of them: both multiply equally much. The last
table is a projection: nothing of it was measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
from derta.demo.gadgets import Guild, make_guild, tuning_records, vocabulary
from derta.demo.model import train_tokenizer
from derta.modeling.adapters import Method, adapt
from derta.modeling.sharding import without_zero3
from derta_kernels.head_loss import head_loss, sent_bytes

MIB = 2**20
RANKS = 2
WARM_UP, STEPS = 1, 5
PACK, EXAMPLES = 512, 24
VOCABULARY, WIDTH, LAYERS = 32_000, 128, 4
HEAD_ROWS, HEAD_WIDTH = 512, 1024
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
    """

    what: str
    step_ms: float
    sent_mib: float
    sent: dict[str, float]


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
    shard: Any, method: Any, guild: Guild, tokenizer: PreTrainedTokenizerFast, folder: Path
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
    triples, dialogues = tuning_records(guild, 320, seed=0)[:2]
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
    seconds = [seconds for seconds, _ in counting.steps[WARM_UP:]]
    return _record(f"{shard}, {method}", seconds, counting.steps[-1][1].sent)


def gathered_head(hidden: Tensor, shard: Tensor, target: Tensor) -> Tensor:
    """Return the loss of this rank's rows over the head, gathered from its shards."""
    rank = torch.distributed.get_rank()
    head = shard.new_empty(RANKS * len(shard), shard.shape[1])
    torch.distributed.all_gather_into_tensor(head, shard)
    rows = slice(rank * len(hidden) // RANKS, (rank + 1) * len(hidden) // RANKS)
    return head_loss(hidden[rows], head, target[rows]).loss


def head_in_shards(hidden: Tensor, shard: Tensor, target: Tensor) -> Tensor:
    """Return the loss of all rows, this rank multiplying its shard of the head."""
    return head_loss(hidden, shard, target, group=torch.distributed.group.WORLD).loss


def step_of_head(what: str, loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Record:
    """Measure forward and backward of a frozen head on this rank."""
    torch.manual_seed(0)
    hidden = torch.randn(HEAD_ROWS, HEAD_WIDTH, requires_grad=True)
    shard = torch.randn(VOCABULARY // RANKS, HEAD_WIDTH) / HEAD_WIDTH**0.5
    target = torch.randint(VOCABULARY, (HEAD_ROWS,))
    seconds = []
    for _ in range(WARM_UP + STEPS):
        torch.distributed.barrier()
        begin = time.perf_counter()
        with Traffic(RANKS) as traffic:
            loss_of(hidden, shard, target).backward()
        seconds.append(time.perf_counter() - begin)
    sent = dict(traffic.sent)
    if loss_of is head_in_shards:  # whose collectives are within the operator
        sent = {"by formula": sent_bytes(HEAD_ROWS, HEAD_WIDTH, 2, RANKS, torch.float32, True)}
    return _record(what, seconds[WARM_UP:], sent)


def _record(what: str, seconds: Sequence[float], sizes: Mapping[str, float]) -> Record:
    sent = {kind: size / MIB for kind, size in sorted(sizes.items())}
    return Record(what, 1e3 * statistics.median(seconds), sum(sent.values()), sent)


def run_rank(folder: Path) -> None:
    """Measure everything on this rank; the first one writes what it found."""
    guild = make_guild(seed=0, gadgets=64)
    tokenizer = train_tokenizer(vocabulary(guild))
    records = [step_of_engine(*engine, guild, tokenizer, folder) for engine in ENGINES]
    records += [step_of_head(*head) for head in HEADS]
    if torch.distributed.get_rank() == 0:
        text = json.dumps([asdict(record) for record in records])
        (folder / "records.json").write_text(text, encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)  # without Python's own ending, in which a thread of gloo may abort


HEADS = (("head, gathered", gathered_head), ("head, in shards", head_in_shards))


@dataclass(frozen=True)
class Large:
    """A model and a pack whose traffic is projected.

    Attributes:
        name: its name.
        layers: parameters of its layers.
        vocabulary, width: the size of its head, and of its embedding.
    """

    name: str
    layers: float
    vocabulary: int
    width: int


LARGE = (Large("Llama-3-8B", 7.0e9, 128_256, 4096), Large("Llama-3-70B", 68.5e9, 128_256, 8192))
GPUS, LARGE_PACK = 8, 8192
LINK_GB_S = 450  # NVLink of an H100, one way, by its data sheet


def projections() -> Iterator[str]:
    """Yield rows of a table: bytes that each of 8 GPUs sends for a pack, and their time."""
    share = (GPUS - 1) / GPUS
    for model in LARGE:
        head = model.vocabulary * model.width
        weights = model.layers + 2 * head
        in_shards = sent_bytes(GPUS * LARGE_PACK, model.width, 2, GPUS, torch.bfloat16, True)
        for what, size in (
            # In bfloat16: gathered for both passes, the embedding and the head for one; gradients
            # in float32.
            ("fsdp, full", share * (2 * 2 * model.layers + 2 * 2 * head + 4 * weights)),
            ("fsdp, lora", share * (2 * 2 * model.layers + 2 * 2 * head)),
            ("its frozen head, gathered", share * 2 * head),
            ("its frozen head, in shards", in_shards),
        ):
            yield f"| {model.name} | {what} | {size / 1e9:.2f} | {size / 1e6 / LINK_GB_S:.0f} |"


def table(machine: dict[str, Any], records: Sequence[Record]) -> str:
    """Return Markdown tables of what was measured, and of the projection."""
    lines = [
        "# What ranks send each other\n",
        "[ranks.py](../../ranks.py) says how it is counted.\n",
        f"{machine['date']}, commit {machine['commit']}, {machine['processor']}, "
        f"{machine['cores']} cores, {RANKS} ranks.\n",
        f"A step of {EXAMPLES} examples in packs of {PACK:,} tokens; a Llama of {LAYERS} layers, "
        f"width {WIDTH} and {VOCABULARY:,} tokens, in float32. The head alone: {HEAD_ROWS:,} rows "
        f"of width {HEAD_WIDTH:,}.\n",
        "| what | MiB sent by a rank | of these | ms |",
        "| --- | ---: | --- | ---: |",
    ]
    for record in records:
        kinds = ", ".join(f"{kind} {size:.1f}" for kind, size in record.sent.items())
        lines.append(f"| {record.what} | {record.sent_mib:.1f} | {kinds} | {record.step_ms:.0f} |")
    lines += [
        f"\n**Projected, not measured**: {GPUS} H100, each with a pack of {LARGE_PACK:,} tokens, "
        f"all of them live rows. The time is that of the bytes at {LINK_GB_S} GB/s, unhidden.\n",
        "| model | what | GB sent by a GPU | ms |",
        "| --- | --- | ---: | ---: |",
        *projections(),
    ]
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
