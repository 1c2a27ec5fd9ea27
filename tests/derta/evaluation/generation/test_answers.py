"""An interrupted evaluation resumes where it stopped, and only the owner can read answers."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from derta.data import Chat
from derta.evaluation import AnswerFile, ModelGenerator, fingerprint, generate
from derta.evaluation.generation.answers import Replies
from tiny import tiny_model

# In the package, the function of the same name hides the module.
generation = importlib.import_module("derta.evaluation.generation.local")
PROMPTS = [[5, 6, 7, 8], [40], [17, 18], [5, 6, 7], [17, 18], [99] * 7]
IDS = [f"prompt {place}" for place in range(len(PROMPTS))]
SETTINGS = dict(ids=IDS, stop_ids={3}, max_new_tokens=6, batch_size=2)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return the list of prompts that the model really ran, in order."""
    run, seen = generation._run, []

    def watched(model: PreTrainedModel, batch: list, *how: object) -> list[list[int]]:
        seen.extend(map(list, batch))
        return run(model, batch, *how)

    monkeypatch.setattr(generation, "_run", watched)
    return seen


def answers(path: Path, chat: Chat, model: str = "a model") -> AnswerFile:
    return AnswerFile(path, chat.tokenizer, model)


def test_a_killed_run_resumes_without_loss_repetition_or_reordering(
    tmp_path: Path, chat: Chat, runs: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    expected = generate(model, PROMPTS, **SETTINGS)
    runs.clear()
    path = tmp_path / "answers" / "model.jsonl"
    watched, calls = generation._run, 0

    def killed(*arguments: object) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return watched(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "_run", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(model, PROMPTS, **SETTINGS, answers=answers(path, chat))
    assert len(path.read_bytes().splitlines()) == len(runs) == 4
    path.write_bytes(path.read_bytes()[:-9])  # the last line was being written
    first = runs.copy()
    runs.clear()
    assert generate(model, PROMPTS, **SETTINGS, answers=answers(path, chat)) == expected
    assert sorted(first[:3] + runs) == sorted(map(list, {tuple(prompt) for prompt in PROMPTS}))
    runs.clear()
    assert generate(model, PROMPTS, **SETTINGS, answers=answers(path, chat)) == expected
    assert runs == []


def test_each_batch_is_stored_in_one_write(
    tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, written, fchmod = tmp_path / "model.jsonl", [], os.fchmod

    def before_a_write(file: int, mode: int) -> None:
        written.append(path.read_bytes().count(b"\n"))
        fchmod(file, mode)

    monkeypatch.setattr(os, "fchmod", before_a_write)
    generate(tiny_model("llama"), PROMPTS, **SETTINGS, answers=answers(path, chat))
    assert written == [0, 2, 4]


def test_lines_are_readable_text_and_only_for_the_owner(tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "model.jsonl"
    model = tiny_model("llama")
    prompt = chat.prompt_ids([{"role": "user", "content": "How do I paint?"}])
    generator = ModelGenerator(
        model, chat, max_new_tokens=4, batch_size=1, answers=answers(path, chat)
    )
    umask = os.umask(0)
    try:
        (written,) = generator([prompt], ids=["fence"])
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o600
    (line,) = path.read_text("utf-8").splitlines()
    value = json.loads(line)["value"]
    assert (value["id"], value["answer"], value["ids"]) == ("fence", written.text, written.ids)
    assert "How do I paint?" in value["prompt"]


@pytest.mark.parametrize("change", [{"max_new_tokens": 5}, {"stop_ids": {3, 4}}, {"model": "b"}])
def test_a_changed_setting_or_model_needs_new_answers(
    tmp_path: Path, chat: Chat, runs: list[list[int]], change: dict
) -> None:
    path, model = tmp_path / "model.jsonl", tiny_model("llama")
    generate(model, PROMPTS, **SETTINGS, answers=answers(path, chat))
    runs.clear()
    other = answers(path, chat, change.pop("model", "a model"))
    generate(model, PROMPTS, **SETTINGS | change, answers=other)
    assert len(runs) == 5


def test_a_file_of_something_else_is_refused(tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "model.jsonl"
    for line in ("{}", "[1]", "text", '{"prompt": "How?"}'):
        path.write_text('{"key": "a", "value": 1}\n' + line + "\n")
        for read in (Replies, lambda path: answers(path, chat)):
            with pytest.raises(ValueError, match=re.escape(f"{path}:2: expected a stored reply")):
                read(path)


def test_the_fingerprint_changes_with_the_model(tmp_path: Path) -> None:
    for name in ("one", "two"):
        tiny_model("llama").save_pretrained(tmp_path / name)
    one = fingerprint(tmp_path / "one", dtype="float32")
    assert one == fingerprint(tmp_path / "one", dtype="float32")
    assert one != fingerprint(tmp_path / "two", dtype="float32")
    assert one != fingerprint(tmp_path / "one", dtype="bfloat16")
    assert one != fingerprint(tmp_path / "one", tmp_path / "two", dtype="float32")
    os.utime(tmp_path / "one" / "model.safetensors", ns=(1, 1))
    assert one != fingerprint(tmp_path / "one", dtype="float32")
