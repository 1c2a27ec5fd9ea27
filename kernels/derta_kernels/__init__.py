"""Compute ops of decoupled refusal training: plain tensors in, plain tensors out.

Each op is a package (`derta_kernels.head_loss`, `derta_kernels.attention`) with its implementations
and `choose`, the one place that chooses between them. Nothing here knows of tokenizers, models or
trainers. `kernels/README.md` has the mathematics.
"""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """An implementation of an op and the reason for it, as every op's `choose` returns them."""

    name: str
    reason: str
