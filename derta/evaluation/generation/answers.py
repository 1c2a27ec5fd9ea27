"""Answers and replies of models, kept on disk as they come.

An interrupted evaluation goes on where it was, and another judge needs no new answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

Prompt = tuple[int, ...]


class Replies:
    """Replies by their keys, each appended to a file as it comes, that only its owner can read.

    A last line that was cut short, as by a crash, is written anew.

    Args:
        path: of the file, made with its folder when there is something to keep; None: no file.

    Raises:
        ValueError: another line of it is not a reply; names file and line.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self._lock = threading.Lock()
        if path is not None and path.exists():
            self._load(path)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def keep(self, replies: Mapping[str, Any]) -> None:
        """All in one write, which a kill does not part, from any thread."""
        lines = [json.dumps({"key": key, "value": value}) + "\n" for key, value in replies.items()]
        with self._lock:
            self._values.update(replies)
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", opener=_for_owner) as file:
                os.fchmod(file.fileno(), 0o600)  # it may have been another's work
                file.write("".join(lines).encode())

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
                    f"{path}:{number}: expected a reply as they are kept here, remove the file"
                ) from None


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class AnswerFile:
    """Answers of one model, one a line, in a file that only its owner can read.

    A line belongs to a prompt, to the limits under which it was answered and to the model as it
    was: whoever asks the same again is given it, and whoever has changed one of them is not. So
    answers can be judged anew without generating them. What a kill left of a last line is dropped.

    A line has "key", a digest of all that, and "value": the record's "id", "prompt" and "answer" as
    text, and "ids", the answer's tokens.

    Args:
        path: of the file; it and its folder are made when there is an answer.
        tokenizer: of the model.
        model: tells the model from any other, see `fingerprint`.

    Raises:
        ValueError: the file holds something else; names the line.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        self._lines = Replies(path)
        self._tokenizer = tokenizer
        self._model = model

    def find(
        self, prompts: Collection[Prompt], stop_ids: Collection[int], max_new_tokens: int
    ) -> dict[Prompt, list[int]]:
        """What is there of the answers to `prompts`."""
        keys = {prompt: self._key(prompt, stop_ids, max_new_tokens) for prompt in prompts}
        return {p: self._lines[key]["ids"] for p, key in keys.items() if key in self._lines}

    def add(
        self,
        answers: Sequence[tuple[str, Prompt, list[int]]],
        stop_ids: Collection[int],
        max_new_tokens: int,
    ) -> None:
        """Writes answers down, each with the id of its record and its prompt.

        Those of a batch at once: were they parted, the rest would be answered in other batches than
        without the interruption, and what a model writes depends on the batch, to rounding.
        """
        self._lines.keep(
            {
                self._key(prompt, stop_ids, max_new_tokens): {
                    "id": id,
                    "prompt": self._tokenizer.decode(list(prompt)),
                    "answer": self._tokenizer.decode(ids, skip_special_tokens=True),
                    "ids": ids,
                }
                for id, prompt, ids in answers
            }
        )

    def _key(self, prompt: Prompt, stop_ids: Collection[int], max_new_tokens: int) -> str:
        asked = [self._model, prompt, sorted(stop_ids), max_new_tokens]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def fingerprint(*folders: str | Path, **settings: Any) -> str:
    """What tells a model from any other: its folders, its weights' sizes and times, and settings.

    Weights are not read, which would take as long as to load them.

    Args:
        folders: of the model; of adapters and of the model that they were trained on.
        settings: what else its answers depend on, as the dtype.
    """
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders
        for path in sorted(Path(folder).glob("*"))
        if path.suffix == ".safetensors" or path.name in ("config.json", "adapter_config.json")
    ]
    places = [str(Path(folder).resolve()) for folder in folders]
    return json.dumps([places, files, settings], sort_keys=True)
