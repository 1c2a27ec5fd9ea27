"""Compute ops of decoupled refusal training: plain tensors in, plain tensors out.

Each op is a package of its own (`derta_kernels.head_loss`, `derta_kernels.attention`) that holds
its implementations and `choose`, the one place that chooses between them. Nothing here knows of
tokenizers, models or trainers; `kernels/README.md` has the mathematics.
"""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """Which implementation of an op is taken, and why: what every op's `choose` returns."""

    name: str
    reason: str
