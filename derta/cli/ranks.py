"""A command on several ranks: one of them says an error, once, and all of them end.

A launcher ends the other ranks of its own machine at best. Each rank therefore has a thread that
looks at a board (`derta.cli.board`) once a second, also while the main thread waits in a
collective. The first rank that fails waits a moment for the others: if all of them met the same
error, it is the run's, else the rank's. An error of a collective is a consequence of another
rank's, so that the rank asks who is still there, and where.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from derta.cli.board import Board, Place, hosted_by_agent, until
from derta.launch import RENDEZVOUS, several_processes
from derta.terminal import say

# Seconds that ranks may take to meet the same error.
TOGETHER_S = 10.0
# Seconds that the cause of a collective's error has to reach the board.
CAUSE_S = 3.0
# Seconds that a rank has to end in order, well within the 30 that torchrun allows it.
END_S = 10.0
# Seconds that the first rank to fail has to say so.
VERDICT_S = 20.0
# Seconds to wait for the host of the board: the machines of a run do not start together.
ARRIVAL_S = 1800.0
# Texts of torch when another rank has ended or does not come.
_CONSEQUENCE = re.compile(
    r"/gloo/|NCCL|TCPStore|Connection (closed|reset) by|Broken pipe|wait timeout"
    r"|[Ss]ocket (Timeout|has (timed out|failed))"
)
_TIMED_OUT = re.compile(r"(?i)tim(?:ed |e)out\D*(\d+) ?ms")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_HOST_ENDED = "rank 0 ended without a word, as a killed process does"
_stage = ""


def several() -> bool:
    """Return True if this process is one of several ranks.

    Raises:
        ValueError: SLURM has started several tasks that do not know of one another.
        SystemExit: the same, in all tasks but the first.
    """
    tasks, place = _slurm_task()
    if tasks != "1" and "RANK" not in os.environ:
        if place != "0":
            sys.exit(1)
        raise ValueError(
            f"srun has started {tasks} tasks without RANK: start torchrun in one task of each "
            f"node, or export {', '.join(RENDEZVOUS)} and LOCAL_RANK"
        )
    return several_processes()


def refuse_several() -> None:
    """Refuse several processes for a command that runs in one.

    Raises:
        ValueError: this is the first of several.
        SystemExit: this is another one. It ends in order, or a launcher might stop the first before
            it has said why.
    """
    count, place = _slurm_task()
    if several_processes():
        count, place = os.environ["WORLD_SIZE"], os.environ["RANK"]
    if count == "1":
        return
    if place != "0":
        sys.exit(0)
    raise ValueError(f"it runs in one process, got {count}: start it without torchrun or srun")


def _slurm_task() -> tuple[str, str]:
    """Return the number of tasks that srun started, and this one's place among them."""
    return os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("SLURM_PROCID", "0")


def enter(stage: str) -> None:
    """Name the part of the run that begins, as "step 3", for errors of collectives."""
    global _stage
    _stage = stage


def run(
    title: str, work: Callable[[], None], sentence_of: Callable[[Exception], str | None]
) -> NoReturn:
    """Do this rank's part of a command, and end the process with the command's exit status.

    Args:
        title: opens every error, as "derta train".
        work: this rank's part.
        sentence_of: returns an error's sentence; None: its traceback is shown.
    """
    ranks = FailureWatch(title)
    status = 0
    try:
        ranks.watch()
        work()
    except Exception as error:  # also a bug's, which every rank would show
        ranks.fail(error, sentence_of(error))
        status = 1
    except KeyboardInterrupt:
        ranks.stop("interrupted")
        status = 128 + signal.SIGINT
    except SystemExit:
        ranks.stop("ended by SIGTERM")
        status = 128 + signal.SIGTERM
    ranks.leave(status)


class FailureWatch:
    """The ranks of a run, seen by one of them.

    Args:
        title: opens every error.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self._local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._connected: Board | None = None
        self._failing = False
        self._said = False
        self._host_left = False

    def watch(self) -> None:
        """Silence the warnings that rank 0 shows as well, and watch the others from now on."""
        if self.rank:
            os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
        import torch.distributed  # noqa: F401  before a thread imports it beside this one

        self._handlers = {int(one): signal.getsignal(one) for one in _SIGNALS}
        signals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        # Python's own handlers wait until the main thread returns from a collective.
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget_signals)
        threading.Thread(target=self._watch, args=(signals,), daemon=True).start()

    def fail(self, error: Exception, sentence: str | None) -> None:
        """Say an error of this rank, unless another rank says one."""
        self._begin_failing()
        text = sentence or f"{type(error).__name__}: {_first_line(error)}"
        trace = "" if sentence else "".join(traceback.format_exception(error))
        if _CONSEQUENCE.search(str(error)):
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
            self._fail_with_others(_first_line(error), frames[::-1])
            return
        try:
            board = self._board()
            board.state_error(text)
            self._decide(board, lambda: self._alone_or_together(board, text), trace)
        except RuntimeError:
            self._say(f"{self._name(self.rank)}: {text}", trace)

    def stop(self, reason: str) -> None:
        """Say that the run is over, and which ranks ended before, unless another rank does."""
        self._begin_failing()
        try:
            board = self._board()
            self._decide(board, lambda: self._silent(board, board.call_roll()) or reason)
        except RuntimeError:
            self._without_board(reason)

    def _fail_with_others(self, error: str, frames: list[FrameType]) -> None:
        """Say the cause of a collective's error, once it has had time to reach the board."""
        try:
            board = self._board()
            for _ in until(CAUSE_S):
                if board.somebody_failed():
                    break
            self._decide(board, lambda: self._consequence(board, error, frames))
        except RuntimeError:
            self._without_board(_HOST_ENDED)

    def leave(self, status: int) -> NoReturn:
        """End the process in order, but without Python's own end, in which gloo may abort it."""
        if status:
            limit = threading.Timer(END_S, os._exit, (status,))
            limit.daemon = True
            limit.start()
        atexit._run_exitfuncs()
        with contextlib.suppress(RuntimeError):
            if not self._host_left:
                self._leave_board()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _leave_board(self) -> None:
        board = self._board()
        board.leave()
        if self.rank == 0 and not hosted_by_agent():  # the board ends with this process
            for _ in until(END_S):
                if len(board.gone()) == self.world_size:
                    break

    def _board(self) -> Board:
        return self._connected or Board(self.rank, self.world_size, END_S)

    def _begin_failing(self) -> None:
        self._failing = True
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _watch(self, signals: int) -> None:
        """Answer roll calls, and end this process once another rank has failed."""
        try:
            board = Board(self.rank, self.world_size, ARRIVAL_S)
            board.arrive(socket.gethostname())
        except RuntimeError:
            return  # the process group will not come about either, and says so
        self._connected = board
        end = float("inf")
        while True:
            if select.select([signals], [], [], 1.0)[0]:
                numbers = set(os.read(signals, 64)) & set(_SIGNALS)
                # transformers handles SIGTERM itself if it is to save a checkpoint first.
                if any(signal.getsignal(one) is self._handlers[one] for one in numbers):
                    end = min(end, time.monotonic() + END_S)
            try:
                self._answer(board)
                # Read before the verdict, which rank 0 leaves behind if it has failed.
                host_left = not hosted_by_agent() and 0 in board.gone()
                if end == float("inf") and board.verdict() is not None:
                    end = time.monotonic() + END_S
                    if not self._failing:
                        os.kill(os.getpid(), signal.SIGTERM)
                elif host_left:
                    self._host_left = True
                    return
            except RuntimeError:
                self._without_board(_HOST_ENDED)
                self.leave(1)
            if self._failing:
                continue
            if (failure := _nccl_failure()) is not None:
                self._begin_failing()
                self._fail_with_others(failure, _frames_of_main())
                self.leave(1)
            if time.monotonic() > end:  # the main thread does not respond
                self.stop("ended by a signal")
                self.leave(1)

    def _answer(self, board: Board) -> None:
        if call := board.unanswered():
            frames = _frames_of_main()
            function = _named(frames[0])
            waits = self._failing or any(map(_is_torch_distributed, frames))
            board.answer(call, Place(f"{_stage}, in {function}" if _stage else function, waits))

    def _decide(self, board: Board, sentence: Callable[[], str], trace: str = "") -> None:
        """Say the sentence if this rank is the first to fail, else wait until the first has."""
        if board.is_first():
            said = sentence()
            self._say(said, trace)
            board.decide(said)
            return
        for _ in until(VERDICT_S):
            self._answer(board)
            if board.verdict() is not None:
                break
        self._record("ended because another rank has failed")

    def _alone_or_together(self, board: Board, text: str) -> str:
        for _ in until(TOGETHER_S):
            errors = board.errors()
            if len(errors) == self.world_size:
                break
        same = len(errors) == self.world_size and len(set(errors.values())) == 1
        return text if same else f"{self._name(self.rank)}: {text}"

    def _silent(self, board: Board, places: dict[int, Place]) -> str:
        """Describe the ranks that have ended and not said so, empty if there are none."""
        left, hosts = board.gone(), board.hosts()
        silent = [rank for rank in range(self.world_size) if rank not in {*places, *left}]
        if not silent:
            return ""
        names = ", ".join(self._name(rank, hosts.get(rank, "")) for rank in silent)
        return f"{_stage_prefix()}{names} ended without a word, as a killed process does"

    def _consequence(self, board: Board, error: str, frames: list[FrameType]) -> str:
        """Describe the cause of a collective's error: ranks that have ended, or have not come."""
        places = board.call_roll()
        if silent := self._silent(board, places):
            return silent
        if not (waited := _TIMED_OUT.search(error)):
            return f"{self._name(self.rank)}: {_stage_prefix()}{error}"
        collective = next((f.f_code.co_name for f in frames if _is_torch_distributed(f)), "")
        hosts = board.hosts()
        absent = [
            f"{self._name(rank, hosts.get(rank, ''))} was in {place.name}"
            for rank, place in sorted(places.items())
            if not place.waits
        ]
        return (
            f"{_stage_prefix()}{collective or 'a collective'} of all ranks timed out after "
            f"{int(waited[1]) / 1000:g} s (ddp_timeout): "
            + (", ".join(absent) or "all ranks wait, for different collectives")
        )

    def _without_board(self, sentence: str) -> None:
        """Say a sentence on the first of the ranks that are left once the board's host has ended.

        torchrun hosts it on the first machine, else rank 0 does.
        """
        if self.rank == (self._local_size if hosted_by_agent() else 1):
            self._say(sentence)

    def _name(self, rank: int, host: str = "") -> str:
        one_machine = self._local_size == self.world_size
        host = socket.gethostname() if rank == self.rank else host
        return f"rank {rank}" if one_machine or not host else f"rank {rank} ({host})"

    def _say(self, sentence: str, trace: str = "") -> None:
        if self._said:  # by the other thread
            return
        self._said = True
        bar = "\n" if _stage else ""  # that of rank 0 may stand unfinished
        say(f"{bar}{trace}{self.title}: {sentence}", error=True)
        self._record(f"{self.title}: {sentence}")

    def _record(self, message: str) -> None:
        """Leave a message for torchrun's summary, if there is none, in the format of its errors."""
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file and not os.path.exists(file):
            extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
            with open(file, "w", encoding="utf-8") as stream:
                json.dump({"message": {"message": message, "extraInfo": extra}}, stream)


def _stage_prefix() -> str:
    return f"{_stage}: " if _stage else ""


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _forget_signals() -> None:
    """Keep signals of a forked process from the one that watches."""
    signal.set_wakeup_fd(-1)


def _frames_of_main() -> list[FrameType]:
    """Return the main thread's frames, the innermost first."""
    ident = threading.main_thread().ident
    assert ident is not None
    return [frame for frame, _ in traceback.walk_stack(sys._current_frames()[ident])]


def _is_torch_distributed(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith("torch.distributed.distributed_c10d")


def _named(frame: FrameType) -> str:
    folder, name = os.path.split(frame.f_code.co_filename)
    place = f"{os.path.basename(folder)}/{name}:{frame.f_lineno}"
    return f"{frame.f_code.co_name} ({place})"


def _nccl_failure() -> str | None:
    """Return the error of NCCL that its watchdog has recorded, before it aborts this process.

    The watchdog leaves other threads a minute for their reports (torch's `ProcessGroupNCCL`).
    """
    torch = sys.modules["torch"]
    if not (torch.cuda.is_initialized() and torch.distributed.is_initialized()):
        return None
    group, device = torch.distributed.group.WORLD, torch.device("cuda")
    if "nccl" not in torch.distributed.get_backend(group):
        return None
    backend = group._get_backend(device)
    error = backend.get_error().name
    if error == "SUCCESS":
        return None
    timeout_ms = int(backend.options._timeout.total_seconds() * 1000)
    return f"NCCL timeout after {timeout_ms} ms" if error == "TIMEOUT" else f"NCCL: {error}"
