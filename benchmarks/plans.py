"""Project the longest packs, and their memory, for known models on small GPUs.

    python -m benchmarks.plans --machine xeon-2-cores

Nothing is measured: the numbers come from `derta plan` and the models' shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.harness.examples import MEAN_LENGTHS
from benchmarks.harness.measuring import describe_machine
from benchmarks.harness.results import results_folder, results_parser, write_results

MEMORIES_GIB = (8, 16, 24)
METHODS: tuple[Literal["full", "lora", "qlora"], ...] = ("full", "lora", "qlora")
MLP_TILE = 2048
SHORTEST = 128  # tokens of the pack shown if no pack fits
_LLAMA: dict[str, Any] = dict(num_attention_heads=32, num_key_value_heads=8)
MODELS: dict[str, dict[str, Any]] = {  # the shapes in config.json
    "Llama-3-8B": dict(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        max_position_embeddings=8192,
        **_LLAMA,
    ),
    "Qwen2.5-7B": dict(
        model_type="qwen2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "Gemma-2-2B": dict(
        model_type="gemma2",
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
    ),
}


@dataclass(frozen=True)
class Record:
    """The longest pack that fits, and the bytes at the peak of its step.

    Attributes:
        tokens: tokens of the pack; 0 if no pack fits, with `parts` of `SHORTEST` tokens.
        parts: bytes by part.
    """

    model: str
    method: str
    memory_gib: int
    tokens: int
    parts: dict[str, int]
    source: Literal["projected"] = "projected"


def plans(
    model: str, method: Literal["full", "lora", "qlora"], memories: Sequence[int]
) -> Iterator[Record]:
    """Project with all settings that save memory without reducing the weights' precision."""
    from transformers import AutoConfig

    from derta.memory import StepMemory, StepSettings
    from derta.memory.plan import GIB, Triples, longest_pack, needed
    from derta.modeling.adapters import Method

    prompt, _, safe = MEAN_LENGTHS
    triples = Triples(1, 1.0, prompt, safe)
    step = StepSettings(
        config=AutoConfig.for_model(**MODELS[model]),
        method=Method(method=method, lora_dropout=0.0),
        autocast=method != "full",
        optim="paged_adamw_8bit" if method == "full" else "adamw_torch_fused",
        checkpointing=True,
        offload=True,
        mlp_tile=MLP_TILE,
    )
    memory = StepMemory(step)
    for gib in memories:
        step.capacity = gib * GIB
        tokens = longest_pack(memory, triples)
        parts = needed(memory, tokens or SHORTEST, triples)
        yield Record(model, method, gib, tokens, dict(parts))


def table(machine: dict[str, Any], records: Sequence[Record]) -> str:
    """Return a Markdown table: a row for each plan, a column for each part."""
    from derta.memory.plan import GIB, WHAT

    parts = [part for part in WHAT if any(part in r.parts for r in records)]
    lines = [
        "# What known models take of small GPUs\n",
        "Projected; what the columns mean is in [the benchmarks' page](../../README.md). "
        "![tokens](plans.png)\n",
        f"{machine['date']}, commit {machine['commit']}, torch {machine['versions']['torch']}.\n",
        "| model | method | GiB | longest pack | " + " | ".join(parts) + " | in all |",
        "| --- | --- |" + " ---: |" * (len(parts) + 3),
    ]
    for r in records:
        sizes = [r.parts.get(part, 0) for part in parts]
        cells = [f"{size / GIB:.2f}" for size in (*sizes, sum(sizes))]
        longest = f"{r.tokens:,}" if r.tokens else "none"
        lines.append(
            f"| {r.model} | {r.method} | {r.memory_gib} | {longest} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def plot(records: Sequence[Record], path: Path) -> None:
    """Plot the longest packs as bars."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(MODELS), figsize=(9, 3.2), sharey=True, layout="constrained"
    )
    for place, model in zip(axes, MODELS, strict=True):
        for shift, method in enumerate(METHODS):
            own = [r for r in records if (r.model, r.method) == (model, method)]
            bars = place.bar(
                [number + 0.28 * (shift - 1) for number in range(len(own))],
                [r.tokens for r in own],
                0.26,
                label=method,
            )
            place.bar_label(bars, [f"{r.tokens / 1000:.0f}k" for r in own], fontsize=6)
        place.set_xticks(range(len(MEMORIES_GIB)), [f"{gib} GiB" for gib in MEMORIES_GIB])
        place.set_title(f"{model}, projected", fontsize=9)
    axes[0].set_ylabel("tokens of the longest pack")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Write plans.json, .md and .png."""
    parser = results_parser("plans", __doc__)
    options = parser.parse_args()
    folder = results_folder(options)
    machine = describe_machine(torch.device("cpu"), torch.get_num_threads())
    records: list[Record] = []
    for model in MODELS:
        for method in METHODS:
            for record in plans(model, method, MEMORIES_GIB):
                print(record, file=sys.stderr, flush=True)
                records.append(record)
    write_results(folder, "plans", machine, map(asdict, records), table(machine, records))
    if find_spec("matplotlib") is not None:
        plot(records, folder / "plans.png")


if __name__ == "__main__":
    main()
