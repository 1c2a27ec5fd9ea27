"""Sums that a reference model gave to branches and to what they leave, by example and cut."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

from derta.objectives.base import Drawn


class References:
    """Two numbers for each pair of an example and a cut.

    Memory: 24 bytes a pair. Keys are hashes of 64 bits.

    Args:
        keys: (R,) uint64, those of `pair_keys`, each once.
        values: (R, 2) float64.

    Raises:
        ValueError: keys are not ascending, or values have another shape.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        if not (keys[1:] > keys[:-1]).all():
            raise ValueError("keys must ascend, each once")
        if values.shape != (len(keys), 2):
            raise ValueError(f"values must have shape ({len(keys)}, 2), got {values.shape}")
        self.keys = keys
        self.values = values

    def of(self, drawn: Drawn) -> np.ndarray:
        """Return the numbers of each branch that was drawn, (branches, 2).

        Raises:
            KeyError: a branch is not among them.
        """
        wanted = pair_keys(drawn.example.id, drawn.cuts.tolist())
        places = np.searchsorted(self.keys, wanted)
        if not (places < len(self.keys)).all() or not (self.keys[places] == wanted).all():
            raise KeyError(f"no reference of {drawn.example.id} at cuts {drawn.cuts.tolist()}")
        return self.values[places]


def pair_keys(id: str, cuts: Iterable[int]) -> np.ndarray:
    """Return the key of an example at each cut, (cuts,) uint64."""
    digests = [blake2b(f"{cut}:{id}".encode(), digest_size=8).digest() for cut in cuts]
    return np.frombuffer(b"".join(digests), "<u8")
