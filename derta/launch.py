"""The variables of a launcher, from which torch finds the other ranks."""

from __future__ import annotations

import os

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def several_processes() -> bool:
    """Return True if this process was launched as one of several."""
    return all(name in os.environ for name in RENDEZVOUS) and int(os.environ["WORLD_SIZE"]) > 1
