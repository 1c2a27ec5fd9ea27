"""Store encoded examples on disk: an Arrow file of `datasets`, streamed to disk and memory-mapped.

Memory holds one batch of examples while they are written, and afterwards the pages in use.
"""

from __future__ import annotations

import dataclasses
import secrets
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import numpy as np

from derta.data.tokens.chat import batched
from derta.data.tokens.encoding import Encoded, EncodedDialogue, EncodedTriple
from derta.outputs import claimed, remove_abandoned, told

# Large enough to split millions of rows into a few thousand parts, small enough for memory.
ROWS_AT_ONCE = 1024
FOLDER = ".derta-examples-"  # and eight hexadecimal digits: nobody else's

_COLUMNS = {
    "place": "int64",
    "id": "string",
    "source": "string",
    "weight": "float64",
    # columns of triples, null in dialogues
    "prompt": ["int32"],
    "harmful": ["int32"],
    "safe": ["int32"],
    "cut_limit": "int64",
    "word_ends": ["int64"],
    "closing": "int64",
    # columns of dialogues, null in triples
    "input_ids": ["int32"],
    "is_target": ["bool"],
    "role": "string",
}


class ExampleStore(Sequence[Encoded]):
    """Encoded examples in a file that lasts as long as this object.

    Spawned worker processes open the file by its name. Only a killed run leaves it behind; the next
    one removes it.

    Args:
        examples: (place, example) pairs; errors name the place, the number of the example's record.
        folder: folder of the file; None: the folder of temporary files (TMPDIR).

    Attributes:
        digest: a hash of all that a training step reads of the examples, in hexadecimal.

    Raises:
        ValueError: two examples share an id and would be cut at the same places; names both.
        OSError: the file cannot be written.
    """

    def __init__(
        self, examples: Iterable[tuple[int, Encoded]], folder: str | Path | None = None
    ) -> None:
        # Imported here because it takes a second that most users of derta.data do not need.
        import pyarrow
        from datasets import Dataset, Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        features = Features(
            {
                name: List(Value(kind[0])) if isinstance(kind, list) else Value(kind)
                for name, kind in _COLUMNS.items()
            }
        )
        within = Path(folder or tempfile.gettempdir())
        remove_abandoned(within.glob(FOLDER + "[0-9a-f]" * 8))
        with ExitStack() as stack:
            own = stack.enter_context(claimed(within / f"{FOLDER}{secrets.token_hex(4)}"))
            # The folder goes with this object, at the latest when Python ends.
            self.remove = weakref.finalize(self, stack.pop_all().close)
        path = str(own / "examples.arrow")
        digests, content = bytearray(), blake2b(digest_size=16)
        with told(own), ArrowWriter(features=features, path=path) as writer:
            for batch in batched(examples, ROWS_AT_ONCE):
                rows = [{"place": place, **_row(example)} for place, example in batch]
                writer.write_table(pyarrow.Table.from_pylist(rows, features.arrow_schema))
                for row in rows:
                    digests += blake2b(row["id"].encode(), digest_size=16).digest()
                    _add(content, row)
            writer.finalize()
        self.digest = content.hexdigest()
        self._size = len(digests) // 16
        if not self._size:
            return
        self._rows = Dataset.from_file(path).with_format("arrow")
        if (pair := _first_pair(digests)) is not None:
            table = self._rows[list(pair)]
            first, second = table["place"].to_pylist()
            raise ValueError(
                f"record {second}: id: {table['id'][0].as_py()!r} is already used by record "
                f"{first}, expected a unique id"
            )

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        chosen = range(self._size)[index]
        return self.take(chosen) if isinstance(chosen, range) else self.take([chosen])[0]

    def __iter__(self) -> Iterator[Encoded]:
        for first in range(0, self._size, ROWS_AT_ONCE):
            yield from self[first : first + ROWS_AT_ONCE]

    def take(self, indices: Sequence[int]) -> list[Encoded]:
        """Return the examples at `indices`, in that order; faster than one by one."""
        if not indices:
            return []
        table = self._rows[list(indices)]
        columns = [[_read(value) for value in table[name]] for name in _COLUMNS]
        rows = zip(*columns, strict=True)
        return [_example(dict(zip(_COLUMNS, row, strict=True))) for row in rows]


def _row(example: Encoded) -> dict[str, Any]:
    return {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}


def _add(content: Any, row: Mapping[str, Any]) -> None:
    """Add an example to a hash, its source and its place aside.

    Without closing tokens, the hash is that of versions which never kept any.
    """
    for name, value in row.items():
        if name not in ("place", "source") and (name, value) != ("closing", 0):
            data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
            content.update(f"{name} {len(data)} ".encode() + data)


def _read(value: Any) -> Any:
    """Return a column's value, with lists as views of the file."""
    if value.is_valid and hasattr(value, "values"):
        return value.values.to_numpy(zero_copy_only=False)  # booleans are stored as bits
    return value.as_py()


def _example(row: dict[str, Any]) -> Encoded:
    kind: Any = EncodedTriple if row["input_ids"] is None else EncodedDialogue
    return kind(**{field.name: row[field.name] for field in dataclasses.fields(kind)})


def _first_pair(digests: bytearray) -> tuple[int, int] | None:
    """Return the places of two equal 16-byte digests, with the earliest second place."""
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.argsort(halves[:, 0], kind="stable")
    alike = np.flatnonzero(np.diff(halves[order, 0]) == 0)
    pairs = zip(order[alike].tolist(), order[alike + 1].tolist(), strict=True)
    equal = [pair for pair in pairs if (halves[pair[0]] == halves[pair[1]]).all()]
    return min(equal, key=lambda pair: pair[1], default=None)
