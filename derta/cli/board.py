"""A board that all ranks of a run read and write: torch's store at MASTER_ADDR and MASTER_PORT.

It is there before the process group is, and works while a rank waits in a collective. torchrun
hosts it; without torchrun rank 0 does, in the store that the process group takes as well.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

# Seconds until a living rank has answered a roll call: it looks once a second.
ROLL_CALL_S = 5.0
_CALLS = "calls"
_FIRST = "first"
_VERDICT = "verdict"


@dataclass(frozen=True)
class Place:
    """The place where a rank's main thread is.

    Args:
        name: the part of the run, and the innermost function with its file and line.
        waits: if True, it waits in a collective or has failed.
    """

    name: str
    waits: bool


def hosted_by_agent() -> bool:
    """Return True if torchrun's agent, and not rank 0, hosts the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


class Board:
    """A connection to the board, which threads may share: torch's store serves one at a time.

    Args:
        rank, world_size: this process and the number of processes.
        timeout_s: seconds to wait for the host of the board.

    Raises:
        RuntimeError: nobody hosts the board; any method raises it once its host has ended.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        from torch.distributed import PrefixStore, TCPStore

        self.rank = rank
        self.world_size = world_size
        self._answered = 0
        self._tcp = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and not hosted_by_agent(),
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            multi_tenant=True,  # the process group's store has the same port
        )
        # A restarted run does not read the failures of the one before.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"derta/{restart}", self._tcp)

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _read_ranks(self, name: str) -> dict[int, str]:
        keys = {rank: self._read(f"{name}/{rank}") for rank in range(self.world_size)}
        return {rank: value for rank, value in keys.items() if value is not None}

    def arrive(self, host: str) -> None:
        """Tell the name of this rank's host."""
        self._store.set(f"host/{self.rank}", host)

    def hosts(self) -> dict[int, str]:
        """Return the host of every rank that has arrived."""
        return self._read_ranks("host")

    def leave(self) -> None:
        """Tell that this rank ends in order, with or without an error."""
        self._store.set(f"gone/{self.rank}", "")

    def gone(self) -> set[int]:
        """Return the ranks that have left."""
        return set(self._read_ranks("gone"))

    def is_first(self) -> bool:
        """Return True for the first rank that asks: it decides which error is said."""
        return self._store.compare_set(_FIRST, "", str(self.rank)).decode() == str(self.rank)

    def somebody_failed(self) -> bool:
        """Return True once a rank was the first."""
        return self._read(_FIRST) is not None

    def state_error(self, sentence: str) -> None:
        """Tell the other ranks the error of this one."""
        self._store.set(f"error/{self.rank}", sentence)

    def errors(self) -> dict[int, str]:
        """Return the errors by rank."""
        return self._read_ranks("error")

    def decide(self, sentence: str) -> None:
        """Tell that an error was said, so that all ranks end."""
        self._store.set(_VERDICT, sentence)

    def verdict(self) -> str | None:
        """Return the error that was said."""
        return self._read(_VERDICT)

    def unanswered(self) -> int:
        """Return the number of the last roll call, 0 if this connection has answered it."""
        call = int(self._store.add(_CALLS, 0))
        return call if call > self._answered else 0

    def answer(self, call: int, place: Place) -> None:
        """Answer a roll call."""
        self._answered = call
        self._store.set(f"answer/{call}/{self.rank}", json.dumps(vars(place)))

    def call_roll(self) -> dict[int, Place]:
        """Return the places of the ranks that answer: of those that have ended there is none."""
        call = int(self._store.add(_CALLS, 1))
        for _ in until(ROLL_CALL_S):
            answers = self._read_ranks(f"answer/{call}")
            if len(answers.keys() | self.gone()) == self.world_size:
                break
        return {rank: Place(**json.loads(text)) for rank, text in answers.items()}


def until(seconds: float) -> Iterator[None]:
    """Yield at once and every tenth of a second, until the seconds are over."""
    end = time.monotonic() + seconds
    yield
    while time.monotonic() < end:
        time.sleep(0.1)
        yield
