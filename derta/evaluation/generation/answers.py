"""Answers and replies of models, stored on disk as they arrive.

An interrupted evaluation resumes where it stopped, and another judge needs no new answers.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from derta.evaluation.generation.decoding import GREEDY, Decoding
from derta.modeling.shared_work import ranks

Prompt = tuple[int, ...]


class Replies:
    """Replies by key, appended to a file that only its owner can read.

    An incomplete last line, left by a crash, is dropped.

    Args:
        path: the file, created with its folder for the first reply; None: no file.
        read: if False, replies that the file holds are not read.

    Raises:
        ValueError: another line is not a stored reply; names file and line.
    """

    def __init__(self, path: Path | None = None, *, read: bool = True) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self._lock = threading.Lock()
        if read and path is not None and path.exists():
            self._load(path)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def keep(self, replies: Mapping[str, Any]) -> None:
        """Store replies in one write, which a kill does not split; thread-safe."""
        lines = [json.dumps({"key": key, "value": value}) + "\n" for key, value in replies.items()]
        with self._lock:
            self._values.update(replies)
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", opener=_for_owner) as file:
                os.fchmod(file.fileno(), 0o600)  # another program may have made the file
                file.write("".join(lines).encode())

    def absorb(self, path: Path) -> None:
        """Store the replies of another file that are new here, and remove it."""
        other = Replies(path)
        new = {key: value for key, value in other._values.items() if key not in self}
        if new:
            self.keep(new)
        other.remove()

    def remove(self) -> None:
        """Remove the file, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _load(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}:{number}: expected a stored reply, remove the file"
                ) from None


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class AnswerFile:
    """Answers of one model, one per line, in a file that only its owner can read.

    Inside `over_ranks`, each rank adds its answers to a part of its own beside the file, such as
    base.jsonl.rank1, and the first rank joins the parts. Those that a kill has left are joined by
    the next start, on any number of ranks.

    An answer is found again only for the same prompt, limits, decoding and model. Answers can thus
    be judged again without generating them. An incomplete last line, left by a kill, is dropped.

    A line has "key", a digest of prompt, limits, decoding and model, and "value": the record's
    "id", "prompt" and "answer" as text, and "ids", the answer's tokens.

    Args:
        path: the file, created with its folder for the first answer.
        tokenizer: tokenizer of the model.
        model: identity of the model, see `fingerprint`.

    Raises:
        ValueError: the file holds something else; names the line.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        self._part: Replies | None = None
        if ranks().count > 1:
            self._part = Replies(path.with_name(f"{path.name}.rank{ranks().rank}"), read=False)
        self._lines = Replies(path if ranks().rank == 0 else None)
        if ranks().rank == 0:
            for part in sorted(path.parent.glob(f"{glob.escape(path.name)}.rank*")):
                self._lines.absorb(part)
        self._tokenizer = tokenizer
        self._model = model

    def find(
        self,
        prompts: Collection[Prompt],
        stop_ids: Collection[int],
        max_new_tokens: int,
        decoding: Decoding = GREEDY,
    ) -> dict[Prompt, list[int]]:
        """Return the stored answers to `prompts`; only the first rank knows them."""
        keys = {p: self._key(p, stop_ids, max_new_tokens, decoding) for p in prompts}
        return {p: self._lines[key]["ids"] for p, key in keys.items() if key in self._lines}

    def add(
        self,
        answers: Sequence[tuple[str, Prompt, list[int]]],
        stop_ids: Collection[int],
        max_new_tokens: int,
        decoding: Decoding = GREEDY,
    ) -> None:
        """Store answers, each with the id of its record and its prompt.

        Pass the answers of a batch together. If a batch were split, a resumed run would form other
        batches, and answers depend on the batch through rounding.
        """
        (self._part or self._lines).keep(self._entries(answers, stop_ids, max_new_tokens, decoding))

    def join(
        self,
        batches: Sequence[Sequence[tuple[str, Prompt, list[int]]]],
        stop_ids: Collection[int],
        max_new_tokens: int,
        decoding: Decoding = GREEDY,
    ) -> None:
        """Store the answers of all ranks in the order of one process, and remove the parts.

        Args:
            batches: the additions of all ranks, in order.
            stop_ids, max_new_tokens, decoding: as for `add`.
        """
        if self._part is None:
            return
        if ranks().rank == 0:
            for answers in batches:
                self._lines.keep(self._entries(answers, stop_ids, max_new_tokens, decoding))
        ranks().wait()
        self._part.remove()

    def _entries(
        self,
        answers: Sequence[tuple[str, Prompt, list[int]]],
        stop_ids: Collection[int],
        max_new_tokens: int,
        decoding: Decoding,
    ) -> dict[str, Any]:
        return {
            self._key(prompt, stop_ids, max_new_tokens, decoding): {
                "id": id,
                "prompt": self._tokenizer.decode(list(prompt)),
                "answer": self._tokenizer.decode(ids, skip_special_tokens=True),
                "ids": ids,
            }
            for id, prompt, ids in answers
        }

    def _key(
        self, prompt: Prompt, stop_ids: Collection[int], max_new_tokens: int, decoding: Decoding
    ) -> str:
        asked = [self._model, prompt, sorted(stop_ids), max_new_tokens, *decoding.key()]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def fingerprint(*folders: str | Path, **settings: Any) -> str:
    """Return the identity of a model: its folders, the sizes and times of its files, and settings.

    The weights are not read, because that would take as long as loading them.

    Args:
        folders: folder of the model, or folders of the adapter and its base model.
        settings: other settings that affect its answers, such as the dtype.
    """
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders
        for path in sorted(Path(folder).glob("*"))
        if path.suffix == ".safetensors" or path.name in ("config.json", "adapter_config.json")
    ]
    places = [str(Path(folder).resolve()) for folder in folders]
    return json.dumps([places, files, settings], sort_keys=True)
