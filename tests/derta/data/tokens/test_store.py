"""Stored examples come back unchanged, and no two of them share an id."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from derta.data import Encoded, EncodedDialogue, EncodedTriple, ExampleStore


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


EXAMPLES: list[Encoded] = [
    EncodedTriple("a", ids(1, 2), ids(3, 4, 5), ids(6, 7), 2, np.array([1, 2]), "one", 2.5),
    EncodedDialogue("b", ids(1, 2, 3), np.array([False, True, True]), "two", 0.1, "borderline"),
    EncodedTriple("ü", ids(9), ids(), ids(), cut_limit=-1),
    EncodedDialogue("d", ids(8, 9), np.array([False, True])),
]


def assert_same(actual: Encoded, expected: Encoded) -> None:
    assert type(actual) is type(expected)
    for field in fields(expected):
        value, wanted = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(wanted, np.ndarray):
            assert value.dtype == wanted.dtype and value.tolist() == wanted.tolist(), field.name
        else:
            assert value == wanted and type(value) is type(wanted), field.name


def test_stored_examples_come_back_unchanged() -> None:
    store = ExampleStore(enumerate(EXAMPLES))
    assert len(store) == len(EXAMPLES)
    for actual, expected in zip(store, EXAMPLES, strict=True):
        assert_same(actual, expected)
    assert_same(store[-1], EXAMPLES[-1])
    for actual, place in zip(store.take([3, 0, 3]), (3, 0, 3), strict=True):
        assert_same(actual, EXAMPLES[place])
    assert store.take([]) == [] and len(store[1:3]) == 2
    with pytest.raises(IndexError):
        store[4]


def test_examples_with_one_id_are_refused_by_record() -> None:
    named = [(5, EXAMPLES[0]), (6, EXAMPLES[1]), (9, EXAMPLES[1]), (11, EXAMPLES[0])]
    with pytest.raises(
        ValueError, match="^record 9: id: 'b' is already used by record 6, expected"
    ):
        ExampleStore(named)


def test_the_file_is_removed_with_its_store(tmp_path: Path) -> None:
    store = ExampleStore(enumerate(EXAMPLES), folder=tmp_path)
    assert len(list(tmp_path.rglob("*.arrow"))) == 1
    del store
    assert not list(tmp_path.iterdir())
    assert len(ExampleStore([])) == 0


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    """A store removes what a killed one has left, and nothing else, whatever its name."""
    others = [tmp_path / "derta-run", tmp_path / ".derta-examples-mine"]
    left = tmp_path / ".derta-examples-0123cdef"
    for folder in (*others, left):
        folder.mkdir()
    alive = ExampleStore(enumerate(EXAMPLES), folder=tmp_path)
    ExampleStore(enumerate(EXAMPLES), folder=tmp_path)
    assert all(folder.exists() for folder in others) and not left.exists()
    assert_same(alive[0], EXAMPLES[0])


def test_a_spawned_process_reads_the_file_without_removing_it() -> None:
    store = ExampleStore(enumerate(EXAMPLES))
    sent = pickle.loads(pickle.dumps(store))  # as DataLoader sends it
    assert_same(sent[0], EXAMPLES[0])
    del sent
    assert_same(pickle.loads(pickle.dumps(store))[1], EXAMPLES[1])


def test_memory_holds_only_a_few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("derta.data.tokens.store.ROWS_AT_ONCE", 2)
    alive, most = 0, 0

    class Counted(EncodedTriple):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[tuple[int, Encoded]]:
        nonlocal alive, most
        for place in range(20):
            alive += 1
            most = max(most, alive)
            yield place, Counted(f"{place}", ids(1), ids(2), ids(3), 1)

    store = ExampleStore(stream())
    assert [example.id for example in store] == [f"{place}" for place in range(20)]
    assert most <= 5
