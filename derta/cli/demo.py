"""`derta demo`: small models, trained and compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging

from derta.demo.run import ABLATIONS, VARIANTS, run_demo
from derta.evaluation import format_table
from derta.outputs import check_folder

MAX_THREADS = 4


@dataclass(kw_only=True)
class DemoConfig:
    """A demo.

    Args:
        seeds: how many worlds and trainings to average over.
        output_dir: where report.html, summary.json and the pictures go.
        variants: ways to tune: vanilla, prefix_only, rto_only, derta, derta_balanced (borderline
            dialogues too), and with RTO targets that weigh more at the end rto_only_growing,
            derta_growing, derta_balanced_growing.

    Raises:
        ValueError: there is no seed or no such variant, or `output_dir` can be no folder.
    """

    seeds: int = 1
    output_dir: str = "outputs/demo"
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        known = {**VARIANTS, **ABLATIONS}
        for name in self.variants:
            if name not in known:
                raise ValueError(f"variants must be of {', '.join(known)}, got {name!r}")
        check_folder("output_dir", self.output_dir)


def run(config: DemoConfig) -> None:
    """Runs the demo; prints its table and where the report is."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # A model this small gains nothing from more, and a container may own fewer cores than it sees.
    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
    folder = Path(config.output_dir)
    count = len(config.variants)
    print(f"one base model and {count} tunings of it, by equal numbers of tokens -> {folder}/")
    summary = run_demo(folder, range(config.seeds), variants=config.variants)
    print(f"\n{format_table(summary)}\n\nreport: {folder / 'report.html'}")
