"""Trial of a chat template in a process of its own, where an endless one can be ended.

Jinja limits neither loops within loops nor the length of a text. A template is a file of a
stranger's model, so its first conversation is rendered in a forked process with limits on time and
memory. Later conversations are rendered without, since a template's work grows with them. Windows
has no fork, and makes no trial.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable

MOST_SECONDS = 3  # of computation; templates of models take thousandths
MOST_CHARACTERS = 1_000_000
MOST_BYTES = 2**30  # of memory beyond what the process has
WAIT_S = 60.0  # for a process that does not even compute
TOO_LONG, TOO_LARGE = 3, 4  # exit statuses
_ended: set[str] = set()  # templates that passed in this process


def check_ends(template: str, render: Callable[[], str]) -> None:
    """Check that a template ends soon, with a text of reasonable length. It is tried once.

    An error of the rendering itself is none here: it will be raised again.

    Args:
        template: the template, as text.
        render: function that renders a short conversation by it.

    Raises:
        ValueError: the rendering does not end.
    """
    if template in _ended or "fork" not in multiprocessing.get_all_start_methods():
        return
    child = multiprocessing.get_context("fork").Process(target=_try, args=(render,), daemon=True)
    with warnings.catch_warnings():  # Python warns of forks beside threads, of which this has none
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    child.join(WAIT_S)
    if child.exitcode is None:
        child.kill()
        child.join()
    status, seconds = child.exitcode, f"{MOST_SECONDS} s"
    child.close()
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ValueError(f"chat_template does not end: one message took more than {seconds}")
    if status == TOO_LARGE:
        raise ValueError(
            f"chat_template does not end: one message took more than {MOST_BYTES >> 20} MiB"
        )
    if status == TOO_LONG:
        raise ValueError(
            f"chat_template writes more than {MOST_CHARACTERS:,} characters for one message"
        )
    _ended.add(template)


def _try(render: Callable[[], str]) -> None:
    """Render within limits, and leave without any exit handler of the parent process."""
    import resource

    def limit(kind: int, most: int) -> None:
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))

    status = 0
    try:
        limit(resource.RLIMIT_CPU, MOST_SECONDS)
        if os.path.exists("/proc/self/statm"):  # elsewhere memory is not limited
            with open("/proc/self/statm", encoding="ascii") as file:
                pages = int(file.read().split()[0])
            limit(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + MOST_BYTES)
        if len(render()) > MOST_CHARACTERS:
            status = TOO_LONG
    except MemoryError:
        status = TOO_LARGE
    finally:
        os._exit(status)
