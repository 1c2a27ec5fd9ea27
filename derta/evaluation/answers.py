"""Answers on disk as they come, so that an evaluation that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

Prompt = tuple[int, ...]


class AnswerFile:
    """Answers of one model, one a line, in a file and a folder that only their owner can read.

    A line belongs to a prompt, to the limits under which it was answered and to the model as it
    was: whoever asks the same again is given it, and whoever has changed one of them is not. So
    answers can be judged anew without a model. What a kill left of a last line is dropped.

    Lines have "key" (a digest of all that), "id" (the record's), "prompt" and "answer" as text, and
    "ids", the answer's tokens.

    Args:
        path: of the file; it and its folder are made if they are not there.
        tokenizer: of the model.
        fingerprint: tells the model from any other, see `fingerprint`.

    Raises:
        ValueError: the file holds something else; names the line.
        OSError: it cannot be read and written.
    """

    def __init__(
        self, path: str | Path, tokenizer: PreTrainedTokenizerBase, fingerprint: str
    ) -> None:
        self.path = Path(path)
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.parent.chmod(0o700)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(self._file, 0o600)
        self._ids = self._read()

    def find(
        self, prompts: Collection[Prompt], stop_ids: Collection[int], max_new_tokens: int
    ) -> dict[Prompt, list[int]]:
        """What is there of the answers to `prompts`."""
        keys = {prompt: self._key(prompt, stop_ids, max_new_tokens) for prompt in prompts}
        return {prompt: self._ids[key] for prompt, key in keys.items() if key in self._ids}

    def add(
        self,
        answers: Sequence[tuple[str, Prompt, list[int]]],
        stop_ids: Collection[int],
        max_new_tokens: int,
    ) -> None:
        """Writes answers down, each with the id of its record and its prompt."""
        lines = []
        for id, prompt, ids in answers:
            key = self._key(prompt, stop_ids, max_new_tokens)
            self._ids[key] = ids
            row = {
                "key": key,
                "id": id,
                "prompt": self._tokenizer.decode(list(prompt)),
                "answer": self._tokenizer.decode(ids, skip_special_tokens=True),
                "ids": ids,
            }
            lines.append(json.dumps(row) + "\n")
        data = "".join(lines).encode()
        while data:
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        """Nothing can be added afterwards."""
        os.close(self._file)

    def _read(self) -> dict[str, list[int]]:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        os.ftruncate(self._file, len(whole))
        ids = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                ids[row["key"]] = [int(id) for id in row["ids"]]
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self.path}:{number}: is no answer of an evaluation, expected key and ids: "
                    "move the file away"
                ) from None
        return ids

    def _key(self, prompt: Prompt, stop_ids: Collection[int], max_new_tokens: int) -> str:
        asked = [self._fingerprint, prompt, sorted(stop_ids), max_new_tokens]
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
