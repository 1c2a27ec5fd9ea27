"""Outputs: files and folders that appear complete or not at all, also after a kill.

Everything is written under a name that nothing reads, synced to the disk, and then renamed. A
folder in the making is locked (`flock`) by the process that fills it. The kernel drops the lock
when the process ends, however it ends, so that the next start knows abandoned folders and removes
them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Elsewhere folders can be neither synced nor locked.
POSIX = os.name == "posix"
# Reasons of the system for which a write fails and another place or more room helps.
REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EBUSY,
    errno.ENAMETOOLONG,
}


def check_folder(field: str, path: str) -> None:
    """Check that `path` is a folder that can be written to or can become one, before any work.

    Raises:
        ValueError: the path, or one of its parents, is a file.
        OSError: the folder, or the nearest parent that exists, cannot be written to.
    """
    nearest = next(place for place in (Path(path), *Path(path).parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{field}: {path}: {nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=POSIX):
        raise OSError(f"{field}: {path}: {nearest} cannot be written to")


def check_file(field: str, path: str) -> None:
    """Check that a file can be written at `path`, before any work on its content.

    Raises:
        ValueError: the path is a folder, or its folder does not exist.
    """
    if Path(path).is_dir():
        raise ValueError(f"{field}: {path} is a folder, expected a file")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{field}: {path}: {Path(path).parent} is no folder")


def check_new_file(field: str, path: str) -> None:
    """Check that a file can be written at `path` and that nothing is there yet.

    Raises:
        ValueError: as `check_file`, or the file exists.
    """
    if Path(path).exists():
        raise ValueError(f"{field}: {path} is there already, choose another file")
    check_file(field, path)


def write_new(field: str, path: str, data: bytes) -> None:
    """Write a file that appears complete or not at all, and replaces no other.

    Raises:
        ValueError, OSError: as `check_new_file` and `write_whole`.
    """
    check_new_file(field, path)
    write_whole(Path(path), data)


def write_whole(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file that appears complete or not at all.

    Args:
        path: path of the file.
        data: its content.
        private: if True, only its owner can read it.

    Raises:
        OSError: the file cannot be written; says why, the bytes needed and the bytes free.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with told(path, len(data)):
            descriptor = os.open(
                partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666
            )
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextmanager
def whole_folder(target: Path, *, private: bool = False, needed: int = 0) -> Iterator[Path]:
    """Yield a new folder that becomes `target` once it is filled, or leaves nothing.

    Args:
        target: an empty folder, or a path where nothing is yet.
        private: if True, only its owner can read it.
        needed: bytes that will be written, if they are known beforehand.

    Raises:
        OSError: a file cannot be written; says why, the bytes needed and the bytes free. Or another
            process fills the same folder.
    """
    target = target.resolve()
    with unfinished(target, private=private, needed=needed) as folder:
        yield folder
        sync_files(folder)
        folder.replace(target)
        sync(target.parent)


@contextmanager
def unfinished(target: Path, *, private: bool = False, needed: int = 0) -> Iterator[Path]:
    """Yield a new, locked folder beside `target`, and remove it unless it was renamed meanwhile.

    Args, Raises: as `whole_folder`.
    """
    folder = unfinished_name(target)
    with told(target, needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned([folder], unlockable=True)
        if folder.exists():
            raise OSError(f"{target}: another process is writing it")
        with claimed(folder, private=private):
            yield folder


def unfinished_name(target: Path) -> Path:
    """Return the path under which the folder `target` is filled."""
    return target.with_name(f".{target.name}.unfinished")


@contextmanager
def claimed(folder: Path, *, private: bool = True) -> Iterator[Path]:
    """Yield a new folder that is locked until the end, and remove what is left of it then."""
    # Under its name it must be locked from the first moment, or another process may remove it.
    fresh = folder.with_name(f".{secrets.token_hex(4)}{folder.name}")
    fresh.mkdir(mode=0o700 if private else 0o777)
    lock = os.open(fresh, os.O_RDONLY) if POSIX else None
    try:
        if lock is not None:
            _lock(lock)
        fresh.rename(folder)
        yield folder
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(folders: Iterable[Path], *, unlockable: bool = False) -> None:
    """Remove those of the folders that no living process has claimed.

    Args:
        folders: paths made by `claimed`.
        unlockable: if True, remove those too that the file system cannot lock.
    """
    for folder in folders:
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) if POSIX else None
            try:
                locked = None if lock is None else _lock(lock)
                if locked or (locked is None and unlockable):
                    shutil.rmtree(folder)
            finally:
                if lock is not None:
                    os.close(lock)


def _lock(descriptor: int) -> bool | None:
    """Lock a folder; return False if another process has it, None if it cannot be locked."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder such that no part of it is ever seen under its name."""
    gone = folder.with_name(f".{secrets.token_hex(4)}.{folder.name}.unfinished")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk."""
    if not POSIX and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if POSIX else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Write all that is in a folder to the disk, its files in parallel."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync, [*folder.rglob("*"), folder]))


@contextmanager
def told(target: Path, needed: int = 0) -> Iterator[None]:
    """Turn a failed write inside into one sentence.

    Args:
        target: the path that was to be written.
        needed: the bytes that it needs; 0: unknown.

    Raises:
        OSError: the disk is full, a quota is used up, or the place is read-only; says so with the
            path, the bytes needed and the bytes free.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError, sqlite3.Error) as error:
        reason = _refusal(error, target.parent)
        if reason is None:
            raise
        nearest = next(place for place in (target, *target.parents) if place.exists())
        free = shutil.disk_usage(nearest).free
        room = f"needs {in_bytes(needed)}, " if needed else ""
        raise OSError(f"{target}: cannot be written, {reason}: {room}{in_bytes(free)} free") from (
            error
        )


def _refusal(error: Exception, folder: Path) -> str | None:
    """Return the system's reason for a failed write into a folder, None for other errors."""
    if isinstance(error, OSError):
        elsewhere = error.filename and not Path(os.fsdecode(error.filename)).is_relative_to(folder)
        # One without a number has been told already.
        if error.errno not in REFUSALS or elsewhere:
            return None
        return os.strerror(error.errno).lower()
    said = str(error)
    for number in REFUSALS:  # Rust's way
        if f"(os error {number})" in said:
            return os.strerror(number).lower()
    # Those of torch and SQLite, which name no reason or no number.
    ways = ("PytorchStreamWriter", "inline_container", "iostream error", "disk is full", "disk I/O")
    return "the write broke off" if any(way in said for way in ways) else None


def in_bytes(count: float) -> str:
    """Return a number of bytes in the unit that suits it: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def compact_json(value: Any, depth: int = 3, *, default: Callable[[Any], Any] | None = None) -> str:
    """Return JSON with a line for each entry down to `depth`, and one line for all within.

    Args:
        value: plain values; others as `default` makes them.
        depth: nested levels that get lines of their own.
        default: see `json.dumps`.

    Raises:
        ValueError: a number is NaN or infinite.
    """

    def laid_out(value: Any, depth: int, indent: str) -> str:
        if depth == 0 or not value or not isinstance(value, dict | list):
            return json.dumps(value, allow_nan=False, ensure_ascii=False, default=default)
        inner = indent + " "
        if isinstance(value, list):
            opening, closing = "[]"
            entries = [laid_out(one, depth - 1, inner) for one in value]
        else:
            opening, closing = "{}"
            entries = [
                f"{json.dumps(str(key), ensure_ascii=False)}: {laid_out(one, depth - 1, inner)}"
                for key, one in value.items()
            ]
        lines = f",\n{inner}".join(entries)
        return f"{opening}\n{inner}{lines}\n{indent}{closing}"

    return laid_out(value, depth, "") + "\n"
