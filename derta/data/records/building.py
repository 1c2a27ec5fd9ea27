"""Build data sets from record files: join halves, drop duplicates, hold out an evaluation part.

Rows are streamed. An SQLite file beside the output holds what must be remembered of every row (its
id, a digest of its texts, unjoined halves); it is removed when the build ends. Memory holds only
the answers that their own file has not completed, until their source has been read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from derta._version import __version__
from derta.data.records.defaults import SHOWN_AFTER_S
from derta.data.records.duplicates import (
    NEAR,
    Fingerprint,
    RequestIndex,
    all_texts,
    check_near,
    digest,
    turns_of,
    user_turns,
)
from derta.data.records.formats import Half
from derta.data.records.reading import Reading, alternatives
from derta.data.records.refusal_keywords import opens_with_refusal, refuses
from derta.data.records.sources import Source, source_records
from derta.data.records.types import Dialogue, Record, Rendered, Triple, check_text
from derta.outputs import whole_folder

SUMMARY_FILE = "build.json"


def read_sources(sources: Sequence[Source]) -> Iterator[tuple[str, Record | Half]]:
    """Yield all records with roles and weights, and the halves that their file leaves unjoined.

    A source with a limit yields no unjoined halves, since it is not read to its end.

    Raises:
        ValueError, OSError: as `read_records`.
    """
    for source in sources:
        alone: list[Half] = []
        reading = Reading(alone=alone.append)
        for record in source_records(source, reading):
            yield source.role, record
        for half in alone:
            weight = source.weight * half.origin.get("weight", 1.0)
            yield source.role, dataclasses.replace(half, origin={**half.origin, "weight": weight})


def build(
    records: Iterable[tuple[str, Record | Half]],
    output_dir: Path,
    *,
    eval_share: float = 0.05,
    seed: int = 0,
    near: float | None = NEAR,
    refusal_text: str | None = None,
) -> dict[str, Any]:
    """Write train.ROLE.jsonl, eval.ROLE.jsonl and build.json into a new folder.

    Rendered rows go into files of their own, train.ROLE.rendered.jsonl.

    Halves of one request are joined in their order of arrival, each used once. A joined triple has
    the request, source and weight of the harmful half, and the ids of both. It is dropped if its
    texts contradict their labels: the harmful one opens with a refusal, the safe one holds none. Of
    examples whose texts are the same once `normalized`, the first is kept.

    Only the first user message, `normalized`, decides whether an example is held out. The same
    message is therefore never on both sides, whatever its source, and no message changes sides when
    data is added. Training examples whose request is near to a held-out one are dropped.

    The folder appears complete and readable only by its owner; an interrupted build leaves no
    folder. An example whose id is taken gets its source as a prefix, once or several times, and the
    number of its row once `PREFIXES` are not enough.

    Args:
        records: (role, record) pairs with role safety, helpful or borderline; a half's is safety.
        output_dir: a folder that is empty or does not exist yet.
        eval_share: share of first messages to hold out, in [0, 1).
        seed: seed of the choice of held-out messages.
        near: least similarity of near requests, see `RequestIndex`; None: keep near requests.
        refusal_text: safe response for harmful halves without one; None: drop them.

    Returns:
        the content of build.json: the numbers of rows read, joined, dropped and written.

    Raises:
        ValueError: an argument is out of its range, output_dir is not empty, or no example is left
            to train on.
        OSError: the data set cannot be written.
    """
    check_new(output_dir)
    check_near(near)
    if not 0 <= eval_share < 1:
        raise ValueError(f"eval_share must lie in [0, 1), got {eval_share}")
    if refusal_text is not None:
        check_text("refusal_text", refusal_text)
    with whole_folder(output_dir, private=True) as beside:
        with closing(_Ledger(beside / "ledger.sqlite")) as ledger:
            with closing(_Files(beside)) as files, _bar("build") as bar:
                for role, record in ledger.examples(records, refusal_text):
                    bar.update()
                    side = "eval" if _drawn(record, seed) < eval_share else "train"
                    rendered = ".rendered" if isinstance(record, Rendered) else ""
                    line = json.dumps(_row(record), ensure_ascii=False) + "\n"
                    files.write(f"{side}.{role}{rendered}.jsonl", line.encode())
            counts = ledger.counts
        ledger.path.unlink()
        counts["dropped"]["near_evaluation"] = 0 if near is None else _drop_near(beside, near)
        summary = {
            "derta": __version__,
            "eval_share": eval_share,
            "seed": seed,
            "near": near,
            "refusal_text": refusal_text,
            **counts,
            "files": {path.name: _described(path) for path in sorted(beside.glob("*.jsonl"))},
        }
        if not any(name.startswith("train.") for name in summary["files"]):
            raise ValueError("no example is left to train on: add data or lower eval_share")
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        (beside / SUMMARY_FILE).write_text(text, encoding="utf-8")
    return summary


def check_new(output_dir: Path) -> None:
    """Raise ValueError unless `output_dir` does not exist or is an empty folder."""
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise ValueError(f"output_dir: {output_dir} is not empty, choose another folder")


class _Ledger:
    """The ids, digests and unjoined halves of all rows, on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._named_so_far = 0
        self.counts: dict[str, Any] = {
            "read": {},
            "joined": 0,
            "completed": 0,
            "dropped": Counter(duplicates=0, contradicting=0, safe_halves=0, harmful_halves=0),
        }
        # The file is removed with the build, so a journal protects nothing.
        self._base = sqlite3.connect(path, isolation_level=None)
        self._base.executescript(
            """
            PRAGMA journal_mode = OFF;
            PRAGMA synchronous = OFF;
            CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID;
            CREATE TABLE examples (digest BLOB PRIMARY KEY) WITHOUT ROWID;
            CREATE TABLE halves (place INTEGER PRIMARY KEY, request BLOB, half TEXT);
            BEGIN;
            """
        )

    def close(self) -> None:
        self._base.close()

    def examples(
        self, records: Iterable[tuple[str, Record | Half]], refusal_text: str | None
    ) -> Iterator[tuple[str, Record]]:
        """Yield all new examples: whole ones as they come, then joined ones."""
        for role, record in records:
            if isinstance(record, Half):
                self._count(record.origin["source"], f"{role}_halves")
                self._keep(record)
                continue
            self._count(record.source, role)
            if self._is_new(role, all_texts(record)):
                yield role, self._named(record)
        for triple in self._joined(refusal_text):
            if self._is_new("safety", all_texts(triple)):
                yield "safety", self._named(triple)

    def _count(self, source: str, kind: str) -> None:
        self.counts["read"].setdefault(source, Counter())[kind] += 1

    def _is_new(self, kind: str, texts: Sequence[str]) -> bool:
        """Return True if these texts are new; count them as a duplicate otherwise."""
        is_new = self._enter("examples", digest([kind, *texts]))
        self.counts["dropped"]["duplicates"] += not is_new
        return is_new

    def _enter(self, table: str, value: str | bytes) -> bool:
        """Insert a value into a table; return False if the table already has it."""
        entry = self._base.execute(f"INSERT OR IGNORE INTO {table} VALUES (?)", (value,))
        return entry.rowcount > 0

    def _named(self, record: Record) -> Record:
        self._named_so_far += 1
        ids = alternatives(record.id, record.source, self._named_so_far)
        id = next(one for one in ids if self._enter("ids", one))
        return record if id == record.id else dataclasses.replace(record, id=id)

    def _keep(self, half: Half) -> None:
        if self._is_new("safe half" if half.safe else "harmful half", [half.prompt, half.text]):
            self._base.execute(
                "INSERT INTO halves (request, half) VALUES (?, ?)",
                (digest([half.prompt]), json.dumps(dataclasses.asdict(half))),
            )

    def _joined(self, refusal_text: str | None) -> Iterator[Triple]:
        dropped = self.counts["dropped"]
        self._base.execute("CREATE INDEX by_request ON halves (request, place)")
        rows = self._base.execute("SELECT request, half FROM halves ORDER BY request, place")
        for _, group in itertools.groupby(rows, key=lambda row: row[0]):
            halves = [Half(**json.loads(half)) for _, half in group]
            safe = [half for half in halves if half.safe]
            harmful = [half for half in halves if not half.safe]
            for broken, kept in zip(harmful, safe, strict=False):
                if opens_with_refusal(broken.text) and not refuses(kept.text):
                    dropped["contradicting"] += 1
                    continue
                self.counts["joined"] += 1
                yield _completed(broken, kept.text, f"{broken.origin['id']}+{kept.origin['id']}")
            dropped["safe_halves"] += max(0, len(safe) - len(harmful))
            alone = harmful[len(safe) :]
            if refusal_text is None:
                dropped["harmful_halves"] += len(alone)
                continue
            for broken in alone:
                self.counts["completed"] += 1
                yield _completed(broken, refusal_text, broken.origin["id"])


def _completed(half: Half, safe: str, id: str) -> Triple:
    origin = {**half.origin, "id": id}
    return Triple(prompt=half.prompt, safe=safe, harmful=half.text, **origin)


def _drawn(record: Record, seed: int) -> float:
    """Return the example's place in [0, 1), drawn from its first user message."""
    first = digest([str(seed), user_turns(record)[0]])
    return int.from_bytes(first[:8], "big") / 2**64


def _row(record: Record) -> dict[str, Any]:
    """Return the row that `read_records` reads as this record."""
    row: dict[str, Any] = {"id": record.id, "source": record.source, "weight": record.weight}
    if isinstance(record, Rendered):
        safe = "true" if record.rto else "false"
        return {"prefix": record.prefix, "text": record.text, "safe": safe, **row}
    if isinstance(record, Dialogue):
        return {"messages": record.messages, **row}
    one_message = len(record.messages) == 1
    request = {"prompt": record.prompt} if one_message else {"messages": record.messages}
    return {**request, "safe": record.safe, "harmful": record.harmful, **row}


def _row_turns(row: dict[str, Any]) -> list[str]:
    """Return the `user_turns` of a row made by `_row`."""
    if "prompt" in row:
        return [row["prompt"]]
    if "prefix" in row:
        rendered = Rendered(prefix=row["prefix"], text=row["text"], rto=False, id=row["id"])
        return user_turns(rendered)
    return turns_of(row["messages"])


class _Files:
    """The JSON Lines files of a folder, each opened at its first row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, BinaryIO] = {}

    def write(self, name: str, line: bytes) -> None:
        if name not in self._open:
            self._open[name] = (self.folder / name).open("xb")
        self._open[name].write(line)

    def close(self) -> None:
        for file in self._open.values():
            file.close()


def _drop_near(folder: Path, near: float) -> int:
    """Drop the training rows that are near to an evaluation row; return their number."""
    index = RequestIndex(near)
    for path in sorted(folder.glob("eval.*.jsonl")):
        for line in _lines(path):
            row = json.loads(line)
            index.add(row["id"], Fingerprint(_row_turns(row)))
    dropped = 0
    if not len(index):
        return dropped
    with closing(_Files(folder)) as files, _bar("compare") as bar:
        for path in sorted(folder.glob("train.*.jsonl")):
            whole = path.rename(folder / f"all.{path.name}")
            for line in _lines(whole):
                if index.has_match(Fingerprint(_row_turns(json.loads(line)))):
                    dropped += 1
                else:
                    files.write(path.name, line)
                bar.update()
            whole.unlink()
    return dropped


def _bar(title: str) -> tqdm:
    return tqdm(desc=title, unit="row", delay=SHOWN_AFTER_S, leave=False)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        rows = sum(1 for _ in file)
        file.seek(0)
        return {"rows": rows, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
