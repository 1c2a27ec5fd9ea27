"""Outputs appear whole, in folders that can hold them, with a record a line."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from safetensors import SafetensorError

from derta.outputs import (
    check_file,
    check_folder,
    check_new_file,
    compact_json,
    in_bytes,
    remove_abandoned,
    remove_folder,
    whole_folder,
    write_whole,
)

DISK = "A full disk costs no checkpoint and leaves nothing half-written."

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@given(VALUES, st.integers(0, 4))
def test_compact_json_reads_as_what_was_written(value: object, depth: int) -> None:
    assert json.loads(compact_json(value, depth)) == value


def test_compact_json_has_a_line_for_each_record() -> None:
    text = compact_json({"rows": {"a": [1, [2, 3]], "b": {"c": 4}}, "seeds": []}, 2)
    assert text.splitlines() == [
        "{",
        ' "rows": {',
        '  "a": [1, [2, 3]],',
        '  "b": {"c": 4}',
        " },",
        ' "seeds": []',
        "}",
    ]
    with pytest.raises(ValueError, match="JSON compliant"):
        compact_json({"a": [float("nan")]})


def failing(number: int, error: BaseException | None = None) -> Callable[..., Any]:
    """A function that fails as the system does it."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error or OSError(number, os.strerror(number))

    return fail


@pytest.mark.promise(DISK)
def test_a_file_that_cannot_be_written_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_whole(path, b"former")
    monkeypatch.setattr("os.fsync", failing(errno.ENOSPC))
    with pytest.raises(OSError, match=r"json: cannot be written, no space left on device: needs"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"former" and list(tmp_path.iterdir()) == [path]


@pytest.mark.promise(DISK)
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk quota exceeded"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only file system"),
        (SafetensorError("Error: Io(No space (os error 28))"), "no space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file data.pkl"), "the write broke off"),
    ],
)
def test_a_failed_write_is_one_sentence_with_the_bytes_needed(
    tmp_path: Path, error: Exception, reason: str
) -> None:
    message = rf"/out: cannot be written, {reason}: needs 1.5 KiB, [\d,.]+ \w+ free$"
    with pytest.raises(OSError, match=message), whole_folder(tmp_path / "out", needed=1536) as new:
        (new / "half").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


def test_errors_of_other_files_keep_their_words(tmp_path: Path) -> None:
    for error in (
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/rows.jsonl"),
        RuntimeError("of the model"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
    ):
        with pytest.raises(type(error)) as caught, whole_folder(tmp_path / "out"):
            raise error
        assert caught.value is error


def fill(target: Path, started: Any) -> None:
    with whole_folder(target) as folder:
        (folder / "half").write_text("half")
        started.send(folder)
        time.sleep(60)


@pytest.mark.promise("What a kill leaves unfinished is removed by the next start.")
def test_a_killed_process_leaves_no_folder_and_the_next_removes_its_rest(tmp_path: Path) -> None:
    target = tmp_path / "out"
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=fill, args=(target, theirs))
    process.start()
    rest = ours.recv()
    with pytest.raises(OSError, match=r"out: another process is writing it"), whole_folder(target):
        pass
    remove_abandoned([rest])
    assert (rest / "half").exists() and not target.exists()
    process.kill()
    process.join()
    assert (rest / "half").exists() and not target.exists()
    with whole_folder(target, private=True) as folder:
        (folder / "whole").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
    assert target.stat().st_mode & 0o777 == 0o700


def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a target there is taken for abandoned; other folders are not."""
    monkeypatch.setattr("fcntl.flock", failing(errno.ENOSYS))
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / "other").mkdir()
    remove_abandoned([tmp_path / "other"])
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "whole", "other"}


def test_a_link_to_a_folder_is_filled_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert (tmp_path / "disk" / "whole").exists() and (tmp_path / "out").is_symlink()


def test_a_folder_is_removed_under_another_name(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    remove_folder(folder)
    assert not list(tmp_path.iterdir())


def test_bytes_have_the_unit_that_suits_them() -> None:
    sizes = (0, 1023, 1536, 5 * 2**20, 80 * 2**30, 5000 * 2**30)
    assert [in_bytes(size) for size in sizes] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "5 MiB",
        "80.0 GiB",
        "5,000.0 GiB",
    ]


def test_a_folder_that_cannot_be_written_to_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system says it of a read-only disk: the owner of this process may be root."""
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    with pytest.raises(OSError, match=r"^output_dir: .*out: .* cannot be written to$"):
        check_folder("output_dir", str(tmp_path / "out"))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_folder("output_dir", str(tmp_path / "new" / "folder"))
    with pytest.raises(
        ValueError, match="^output_dir: .*file/new: .*file is a file, expected a fo"
    ):
        check_folder("output_dir", str(tmp_path / "file" / "new"))


def test_a_file_needs_a_folder_and_a_new_one_replaces_nothing(tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("mine")
    check_file("output", str(there))
    check_new_file("output", str(tmp_path / "new.json"))
    with pytest.raises(ValueError, match="^output: .*there.json is there already, choose another"):
        check_new_file("output", str(there))
    for check in (check_file, check_new_file):
        with pytest.raises(ValueError, match="^output: .*none/a.json: .*none is no folder$"):
            check("output", str(tmp_path / "none" / "a.json"))
    with pytest.raises(ValueError, match="^output: .* is a folder, expected a file$"):
        check_file("output", str(tmp_path))
