"""Text on its way to a terminal: control characters of files and models are shown, never obeyed.

A terminal obeys escape sequences wherever they come from: an id may clear the screen, an answer
may retitle the window or hide what comes before it. All commands print through `say`. Tables and
lists make each name from a file `printable` first, so that none of them begins a line of its own.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from types import TracebackType

# Control characters, line and paragraph separators, overrides of the direction of text, and lone
# surrogates.
_CONTROLS = "\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_IN_A_LINE = re.compile(f"[{_CONTROLS}]")
_IN_LINES = re.compile(rf"(?![\n\t])[{_CONTROLS}]")
_BESIDE_COLORS = re.compile(rf"(?![\n\t]|\x1b\[[\d;]*m)[{_CONTROLS}]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return the text with control characters as escapes: "\x1b" is shown with its backslash.

    Args:
        text: any text, also with lone surrogates.
        lines: if True, line breaks and tabs stay.
    """
    return (_IN_LINES if lines else _IN_A_LINE).sub(_escape, text)


def say(text: str, *, error: bool = False, colors: bool = False, end: str = "\n") -> None:
    """Print lines of text, `printable`; characters that the terminal cannot show are escaped too.

    Args:
        text: the lines.
        error: if True, print to the standard error.
        colors: if True, ANSI colours stay; names from files are then to be `printable` already.
        end: text that follows.
    """
    stream = sys.stderr if error else sys.stdout
    shown = (_BESIDE_COLORS if colors else _IN_LINES).sub(_escape, text) + end
    encoding = stream.encoding or "utf-8"
    stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def guard() -> None:
    """Make messages of loggers and of uncaught errors printable from now on."""
    logging.setLogRecordFactory(_PrintableRecord)
    sys.excepthook = _show


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage(), lines=True)


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, error, trace)), error=True, end="")


def _escape(character: re.Match[str]) -> str:
    return character[0].encode("unicode_escape").decode("ascii")
