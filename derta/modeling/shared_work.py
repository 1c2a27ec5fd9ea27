"""Work that several processes share out, one to a GPU: results are those of one process, in order.

Inside `over_ranks`, functions that say so run a part of their work on each rank, and return all of
it on every rank. Outside of it, a process works alone, whatever launched it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from derta.launch import several_processes

Unit = TypeVar("Unit")

# Ranks may wait long for one with longer answers, or with tasks that only the first one runs.
TIMEOUT = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """The processes that share work, seen by one of them.

    Attributes:
        rank: this process, from 0.
        count: the number of processes.
    """

    rank: int = 0
    count: int = 1

    def share(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """Return this rank's units; `gather` puts what all ranks made of theirs in order."""
        return units[self.rank :: self.count]

    def gather(self, made: Sequence[Unit]) -> list[Unit]:
        """Return the results of all units on every rank, in the order of the units.

        Args:
            made: the results of the units that `share` has returned.
        """
        if self.count == 1:
            return list(made)
        parts: list[Any] = [None] * self.count
        distributed.all_gather_object(parts, list(made))
        places = range(sum(map(len, parts)))
        return [parts[place % self.count][place // self.count] for place in places]

    def from_first(self, make: Callable[[], Unit]) -> Unit:
        """Return on every rank what the first one makes; the others wait for it."""
        if self.count == 1:
            return make()
        made: list[Any] = [make() if self.rank == 0 else None]
        distributed.broadcast_object_list(made)
        return made[0]

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            distributed.barrier()


_ALONE = Ranks()
_RANKS = ContextVar("ranks", default=_ALONE)


def ranks() -> Ranks:
    """Return the processes that share work here."""
    return _RANKS.get()


@contextmanager
def over_ranks(device: str) -> Iterator[Ranks]:
    """Share work inside over the processes of torchrun, if there are several.

    Each has the GPU of its LOCAL_RANK as the current one. Objects are exchanged on the host.

    Args:
        device: "auto" or as in torch, of all processes.

    Raises:
        ValueError: the device names one GPU for several processes, or a process lacks one.
    """
    if not several_processes():
        yield _ALONE
        return
    check_device_of_each(device)
    if device != "cpu":
        _take_gpu()
    distributed.init_process_group("gloo", timeout=TIMEOUT)
    shared = Ranks(distributed.get_rank(), distributed.get_world_size())
    token = _RANKS.set(shared)
    try:
        yield shared
        shared.wait()
        distributed.destroy_process_group()
    finally:
        _RANKS.reset(token)


def check_device_of_each(device: str) -> None:
    """Refuse a device that each of several processes would take.

    Raises:
        ValueError: it names one GPU.
    """
    if several_processes() and device not in ("auto", "cuda", "cpu"):
        raise ValueError(
            f"device must be auto, a GPU for each process, or cpu with several, got {device!r}"
        )


def _take_gpu() -> None:
    place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if torch.cuda.is_available():
        if place >= count:
            raise ValueError(
                f"the process with LOCAL_RANK {place} needs a GPU of its own, got {count} visible: "
                "launch no more processes than GPUs"
            )
        torch.cuda.set_device(place)
