"""`derta demo`: small models, trained and compared."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.utils import logging

from derta.cli.settings.tools import DemoConfig
from derta.demo.run import run_demo
from derta.evaluation import format_table
from derta.terminal import say

MAX_THREADS = 4


def run(config: DemoConfig) -> None:
    """Run the demo, and print its table and the path of its report."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # A model this small gains nothing from more, and a container may own fewer cores than it sees.
    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
    folder = Path(config.output_dir)
    count = len(config.variants)
    say(f"one base model and {count} tunings of it, by equal numbers of tokens -> {folder}/")
    summary = run_demo(folder, range(config.seeds), variants=config.variants)
    say(f"\n{format_table(summary)}\n\nreport: {folder / 'report.html'}")
