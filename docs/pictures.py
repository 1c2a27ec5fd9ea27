"""Draw the pictures of the pages from real packs: `python docs/pictures.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from derta.data import Drawn, EncodedTriple, PackedBatch, pack

PARTS = {"prompt": "#4C78A8", "harmful response": "#E45756", "safe response": "#54A24B"}


def example_pack() -> PackedBatch:
    """Return a triple of 3, 6 and 4 tokens with branches after 5 and 2 tokens."""
    ids = np.arange(13, dtype=np.int32)
    triple = EncodedTriple("triple", ids[:3], ids[3:9], ids[9:], cut_limit=6)
    return pack([Drawn(triple, cuts=np.array([5, 2]), depths=np.ones(7, bool))])


def draw_pack(path: Path) -> None:
    """Draw the mask of `example_pack` by the part of each key, and the targets of each row."""
    batch = example_pack()
    until = batch.visible_until[0].numpy()
    tokens = len(until)
    seen = np.tril(np.ones((tokens, tokens), bool)) & (np.arange(tokens)[:, None] < until[None, :])
    part = np.full(tokens, 1)
    part[:3] = 0
    for start, end in batch.branch_bounds[0]:
        part[start:end] = 2
    colors = np.array([matplotlib.colors.to_rgb(color) for color in PARTS.values()])
    picture = np.where(seen[..., None], colors[part][None, :, :], 1.0)

    figure, axes = plt.subplots(figsize=(6.2, 4.6), layout="constrained")
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks(np.arange(-0.5, tokens), minor=True)
    axes.set_yticks(np.arange(-0.5, tokens), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("key: index in the pack")
    axes.set_ylabel("query: index in the pack")
    labels, rto = batch.columns["shift_labels"][0], batch.columns["rto_mask"][0]
    for row in range(tokens):
        said = ["refuse"] * bool(rto[row]) + ["next token"] * bool(labels[row] != -100)
        axes.text(tokens - 0.2, row, " + ".join(said), va="center", fontsize=8)
    handles = [Patch(color=color, label=name) for name, color in PARTS.items()]
    axes.legend(handles=handles, loc="upper right", fontsize=8, framealpha=1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    draw_pack(Path(__file__).with_name("pack.png"))
