"""Find the longest harmful response that fits into a given memory.

    python -m benchmarks.longest --machine h200 --device cuda

On a GPU, the answer is measured: one triple with one branch, forward and backward, with the
allocator limited to the given GiB. It is also projected by `derta plan`; without a GPU, it is only
projected. Each record is written at once, so --resume continues an interrupted run.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from benchmarks.harness.examples import MEAN_LENGTHS, REFUSAL, in_batches, samples
from benchmarks.harness.measuring import describe_machine
from benchmarks.harness.results import results_folder, results_parser, write_results
from benchmarks.step.question import (
    LARGE,
    LLAMA_3_8B,
    LORA,
    OFFICIAL,
    OURS,
    RUNGS,
    loss_of,
    make_model,
)
from derta.data import Drawn, EncodedTriple, pack

MEMORIES_GIB = (8, 16, 24, 48, 80)
METHODS: tuple[Literal["lora", "qlora"], ...] = ("lora", "qlora")
CASE = replace(LARGE, model="Llama-3-8B")
MLP_TILE = 2048
LEAST, LONGEST = 64, 2**19
PRECISION = 0.03  # relative precision of an answer


@dataclass(frozen=True)
class Record:
    """The longest harmful response that fits, in tokens; 0 if no response fits."""

    memory_gib: int
    method: str
    recipe: str
    tokens: int
    source: Literal["measured", "projected"]


def longest(fits: Callable[[int], bool], most: int, guess: int = LEAST) -> int:
    """Return the largest n up to `most` that fits, to `PRECISION`; 0 if 64 do not fit.

    The search starts at `guess` and widens, because a trial of a long response takes a minute.
    """
    low, high, share = min(max(guess, LEAST), most), most, PRECISION
    if fits(low):
        while (above := int(low * (1 + share))) < most:
            if not fits(above):
                high = above
                break
            low, share = above, 2 * share
    else:
        while low > LEAST:
            low, high, share = max(int(low / (1 + share)), LEAST), low, 2 * share
            if fits(low):
                break
        else:
            return 0
    while high - low > PRECISION * low:
        middle = math.isqrt(low * high) + 1
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def triple(harmful: int) -> Drawn:
    """Return one triple with mean lengths except for its harmful response, cut halfway."""
    prompt, _, safe = MEAN_LENGTHS
    ids = np.arange(prompt + harmful + safe, dtype=np.int32) % 1000 + REFUSAL + 1
    q, h, r = np.split(ids, [prompt, prompt + harmful])
    rows = np.ones(harmful + 1, bool)
    return Drawn(EncodedTriple("triple", q, h, r, harmful), np.array([harmful // 2]), rows)


def step(model: Any, recipe: str, harmful: int, device: torch.device) -> None:
    """Run forward and backward of one triple; the gradients stay."""
    one = triple(harmful)
    if recipe == OURS:
        batch: Any = pack([one]).to(device)
    else:
        (padded,) = in_batches(samples([one]))
        batch = {name: tensor.to(device) for name, tensor in padded.items()}
    with torch.autocast(device.type, torch.bfloat16):
        loss = loss_of(model, RUNGS[recipe].head, batch, targets=harmful + MEAN_LENGTHS[2])
    loss.backward()


def measured(
    method: str, recipe: str, guesses: Mapping[int, int], device: torch.device
) -> Iterator[Record]:
    """Find the longest response by trials, in growing memory.

    A trial also fails if the host has no memory left for offloading.

    Args:
        guesses: the first number of tokens to try, by GiB; sizes beyond the device's are skipped.
    """
    from derta.memory.plan import CONTEXT_BYTES, GIB
    from derta.modeling.mlp_tiling import tile_mlp
    from derta.modeling.offloading import ran_out_of_memory
    from derta.modeling.patch import apply_derta

    total = torch.cuda.get_device_properties(device).total_memory
    _let_go()  # frees the previous method's model
    model = make_model(CASE, RUNGS[recipe], device)
    inner = model.get_base_model()
    if method == "qlora":
        quantize(inner)
    if recipe == OURS:
        tile_mlp(inner, MLP_TILE)
        apply_derta(inner, REFUSAL, offload=True)

    def fits(harmful: int) -> bool:
        try:
            step(inner, recipe, harmful, device)
            return True
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            return False
        finally:
            _let_go()

    for memory, guess in sorted(guesses.items()):
        share = (memory * GIB - CONTEXT_BYTES) / total
        if share <= 1:
            torch.cuda.set_per_process_memory_fraction(share)
            yield Record(memory, method, recipe, longest(fits, LONGEST, guess), "measured")
    torch.cuda.set_per_process_memory_fraction(1.0)


def _let_go() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def quantize(model: nn.Module) -> None:
    """Quantize the frozen linear layers except the head, as `method: qlora` loads them."""
    from peft.tuners.lora import LoraLayer

    from derta.memory.probe import quantized

    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        layer.base_layer = quantized(layer.base_layer)  # type: ignore[arg-type]


def projected(
    method: Literal["lora", "qlora"], recipe: str, memories: Sequence[int]
) -> Iterator[Record]:
    """Project ours as `derta plan` does, and the official recipe by the same method."""
    from transformers import LlamaConfig

    from derta.memory import StepMemory, StepSettings
    from derta.memory.plan import GIB, Triples, longest_pack
    from derta.modeling.adapters import Method

    class OfficialMemory(StepMemory):
        """Two samples, padded to one length, through transformers' attention and loss."""

        def loss(self, model: Any, tokens: int, offloading: Any) -> torch.Tensor:
            model.set_attn_implementation("sdpa")
            ids = torch.zeros(2, tokens, dtype=torch.long)
            return model(
                input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False
            ).loss

    settings = StepSettings(
        config=LlamaConfig(**LLAMA_3_8B),
        method=Method(method=method, lora_r=LORA["r"], lora_dropout=LORA["lora_dropout"]),
        autocast=True,
        optim="sgd",  # no optimizer states: a step is forward and backward
        checkpointing=True,
        offload=recipe == OURS,
        mlp_tile=MLP_TILE if recipe == OURS else None,
    )
    prompt, _, safe = MEAN_LENGTHS
    if recipe == OURS:
        memory, triples = StepMemory(settings), Triples(1, 1.0, prompt, safe)
    else:  # the longer sample has no safe response, but a closing token
        memory, triples = OfficialMemory(settings), Triples(0, 1.0, prompt + 1, 0)
    for gib in memories:
        settings.capacity = gib * GIB
        harmful = triples.harmful(longest_pack(memory, triples))
        yield Record(gib, method, recipe, harmful, "projected")


def table(machine: dict[str, Any], records: list[Record]) -> str:
    """Return a Markdown table: a row per memory, a column per method, recipe and source."""
    columns = list(dict.fromkeys((r.method, r.recipe, r.source) for r in records))
    lines = [
        "# The longest harmful response that fits\n",
        "Llama-3-8B's shape, LoRA of rank 16; what the columns mean is in [the benchmarks' "
        "page](../../README.md). ![tokens](longest.png)\n",
        f"{machine['date']}, commit {machine['commit']}, {machine.get('gpu', 'no GPU')}, torch "
        f"{machine['versions']['torch']}.\n",
        "| GiB | " + " | ".join(", ".join(column) for column in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for memory in sorted({r.memory_gib for r in records}):
        found = {(r.method, r.recipe, r.source): r for r in records if r.memory_gib == memory}
        cells = [f"{found[c].tokens:,}" if c in found else "-" for c in columns]
        lines.append(f"| {memory} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(records: list[Record], path: Path) -> None:
    """Plot tokens against memory, with a line for each column of the table."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for column in dict.fromkeys((r.method, r.recipe, r.source) for r in records):
        line = [r for r in records if (r.method, r.recipe, r.source) == column and r.tokens]
        axes.plot(
            [r.memory_gib for r in line],
            [r.tokens for r in line],
            "--o" if column[2] == "projected" else "-o",
            label=", ".join(column),
        )
    axes.set(xlabel="GiB", ylabel="tokens of a harmful response", xscale="log", yscale="log")
    axes.set_xticks(MEMORIES_GIB, [str(memory) for memory in MEMORIES_GIB])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Write longest.json, .md and .png."""
    parser = results_parser("longest", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--memories", type=int, nargs="+", default=MEMORIES_GIB, help="GiB, in rising order"
    )
    parser.add_argument("--resume", action="store_true", help="keep existing records")
    options = parser.parse_args()
    folder = results_folder(options)
    path = folder / "longest.json"
    device = torch.device(options.device)
    machine = describe_machine(device, torch.get_num_threads())
    records: list[Record] = []
    if options.resume and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))["records"]
        records = [Record(**values) for values in kept]

    def known(method: str, recipe: str, source: str) -> dict[int, int]:
        """Return the tokens by GiB."""
        about = (method, recipe, source)
        return {r.memory_gib: r.tokens for r in records if (r.method, r.recipe, r.source) == about}

    def runs() -> Iterator[Iterator[Record]]:
        every = list(itertools.product(METHODS, (OFFICIAL, OURS)))
        for method, recipe in every:
            missing = set(MEMORIES_GIB) - set(known(method, recipe, "projected"))
            if missing:
                yield projected(method, recipe, sorted(missing))
        for method, recipe in every if device.type == "cuda" else ():
            guesses = known(method, recipe, "projected")
            missing = set(options.memories) - set(known(method, recipe, "measured"))
            if missing:
                guesses = {memory: guesses.get(memory, LEAST) for memory in missing}
                yield measured(method, recipe, guesses, device)

    for run in runs():
        with contextlib.suppress(ModuleNotFoundError):  # bitsandbytes may not be installed
            for record in run:
                print(record, file=sys.stderr, flush=True)
                records.append(record)
                text = table(machine, records)
                write_results(folder, "longest", machine, map(vars, records), text)
        if find_spec("matplotlib") is not None:
            plot(records, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
