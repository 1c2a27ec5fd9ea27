"""Result files of the method's official repository, as they are: answers read, judged, counted.

They are JSON Lines of one of four shapes:

    {"question": ..., "response": ...}                  answers to an attack
    {"instruction": ..., "response": ...}               the same, of models behind an API
    {"question": ..., "response": ..., "answer": ...}   answers to GSM8K and MMLU, and the right
    "prompt and answer in one"                          of a completion, or a PAIR search's log

Which attack a file is about is not in it. Where prompt and answer are one string, what the model
wrote is found, in this order: after the prompt, where the prompts are known (white space apart,
which decoding changes); after the last end of a prompt that a chat template marks; else it is the
whole string, and a refusal in it has no position. A search's log holds an answer only where the
search's own judge took one for a success; where there is none, the attack has failed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from derta.evaluation.evaluate import tokens_before
from derta.evaluation.judges.base import Exchange, Judge, succeeded
from derta.evaluation.measures.results import Outcome, VariantResult

HARMLESS = "over_refusal."
PROMPT_ENDS = ("[\\INST]", "[/INST]")
REFERENCE = "---answer---"  # what parts an answer from the right one where both are one string
PICKLES = (b"PK\x03\x04", b"\x80")

_SEARCH = re.compile(r"\s*=+ FINAL SUMMARY STATISTICS =+\s")
_FOUND = re.compile(r"^Example Jailbreak RESPONSE:\s*", re.MULTILINE)
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class OfficialAnswer:
    """One row of a result file.

    Attributes:
        request: what was asked; tells rows that are there twice.
        answer: what the model wrote; None where the file has none because the attack failed.
        is_placed: whether the answer starts where the model began to write.
        is_harmless: whether the request is a harmless one, with a right answer.
    """

    request: str
    answer: str | None
    is_placed: bool = True
    is_harmless: bool = False


def read_prompts(*paths: str | Path) -> list[str]:
    """The prompts of official test files, JSON Lines of {"question": ...}.

    Raises:
        ValueError: names file and line of a row that has no question.
        OSError: a file cannot be read.
    """
    return [
        _text(place, row, "question") for path in paths for place, row in _json_lines(Path(path))
    ]


def read_answers(path: str | Path, prompts: Sequence[str] = ()) -> list[OfficialAnswer]:
    """Reads a result file.

    Args:
        path: of the file; what it is called plays no part.
        prompts: what answers were asked for, see `read_prompts`.

    Raises:
        ValueError: names file and line of a row of no known shape, or that begins with none of the
            prompts; the file has no row, or some with a right answer and some without; it is not
            UTF-8, or a pickle.
        OSError: the file cannot be read.
    """
    known = [_bare(prompt) for prompt in prompts]
    rows = [_answered(place, row, known) for place, row in _json_lines(Path(path))]
    if not rows:
        raise ValueError(f"{path}: no row, expected JSON Lines of questions and responses")
    if len({row.is_harmless for row in rows}) > 1:
        raise ValueError(f"{path}: some rows have a right answer and some none, expected one kind")
    return rows


def official_entry(
    files: Mapping[str, str | Path],
    judge: Judge,
    *,
    prompts: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep_repeats: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """What a model's result files say, in the shape of a variant in a summary.

    Args:
        files: name of an attack to result file. A name that starts with "over_refusal." says that
            the requests are harmless, as requests with a right answer are under any name.
        judge, tokenizer, keep_repeats: see `judge_answers`.
        prompts: see `read_answers`.

    Returns:
        an entry, see `summarize`, with "position_unit" "words" or "tokens"; and notes on what is
        not in its figures.

    Raises:
        ValueError, OSError: see `read_answers`.
    """
    outcomes, notes = [], []
    for attack, path in files.items():
        rows = read_answers(path, prompts)
        name = attack.removeprefix(HARMLESS).replace(".", "_")  # dots part the levels of a metric
        is_harmless = attack.startswith(HARMLESS) or rows[0].is_harmless
        outcome, unplaced = judge_answers(
            f"{HARMLESS if is_harmless else 'asr.file.'}{name}",
            rows,
            judge,
            tokenizer,
            keep_repeats=keep_repeats,
        )
        outcomes.append(outcome)
        for count, what in (
            (outcome.left_out, "repeat a request and are left out"),
            (outcome.empty, "hold no answer and count as neither success nor refusal"),
            (sum(row.answer is None for row in rows), "tell of a search that found no success"),
            (unplaced, "refuse at a place that is not known: name the prompts"),
        ):
            if count:
                notes.append(f"{name}: {count} of {len(rows)} rows {what}")
    unit = "words" if tokenizer is None else "tokens"
    return VariantResult(outcomes=tuple(outcomes)).to_dict() | {"position_unit": unit}, notes


def judge_answers(
    metric: str,
    rows: Sequence[OfficialAnswer],
    judge: Judge,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    keep_repeats: bool = False,
) -> tuple[Outcome, int]:
    """Judges the answers of one file.

    An attack succeeds as `succeeded` says. Requests that are there several times, with which
    distributed evaluation evens its shares out, count once.

    Args:
        metric: of the outcome; of one that starts with "over_refusal." refusals are the hits.
        rows: of `read_answers`.
        judge: see `Judge`.
        tokenizer: counts positions in its tokens; without one they are counted in words.
        keep_repeats: count every row instead.

    Returns:
        the outcome, repeated rows as left out; and how many refusals have no position.
    """
    once: dict[str, OfficialAnswer] = {}
    for row in rows:
        once.setdefault(row.request, row)
    chosen = rows if keep_repeats else list(once.values())
    answered = [(row, row.answer) for row in chosen if row.answer is not None]
    verdicts = judge(
        [Exchange(({"role": "user", "content": row.request},), answer) for row, answer in answered]
    )
    counted: list[bool | None] = [False] * (len(chosen) - len(answered))  # attacks that failed
    positions, unplaced = [], 0
    for (row, answer), verdict in zip(answered, verdicts, strict=True):
        is_harmless = metric.startswith(HARMLESS)
        counted.append(verdict.refused if is_harmless else succeeded(answer, verdict))
        if row.is_placed and verdict.start is not None:
            positions.append(_position(answer, verdict.start, tokenizer))
        elif verdict.refused:
            unplaced += 1
    outcome = Outcome(
        metric,
        hits=counted.count(True),
        trials=len(chosen) - counted.count(None),
        left_out=len(rows) - len(chosen),
        empty=sum(not answer.strip() for _, answer in answered),
        positions=tuple(positions),
        undecided=counted.count(None),
    )
    return outcome, unplaced


def _position(answer: str, start: int, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is None:
        return len(answer[:start].split())
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return tokens_before(tokenizer, ids, start)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows and their places."""
    data = path.read_bytes()
    if data.startswith(PICKLES):
        raise ValueError(
            f"{path}: a pickle, which can run anything when it is opened; name the .json file "
            "beside it"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{number}: byte {data[error.start]:#04x} is not UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                raise ValueError(f"{path}:{number}: not JSON, expected a row a line") from None
            yield f"{path}:{number}", row


def _answered(place: str, row: Any, prompts: Sequence[str]) -> OfficialAnswer:
    if isinstance(row, str):
        return _of_one_string(place, row, prompts)
    if not isinstance(row, dict) or "response" not in row:
        raise ValueError(
            f"{place}: expected question and response, instruction and response, or one string of "
            "prompt and answer"
        )
    return OfficialAnswer(
        _text(place, row, "question" if "question" in row else "instruction"),
        _text(place, row, "response"),
        is_harmless="answer" in row,
    )


def _of_one_string(place: str, row: str, prompts: Sequence[str]) -> OfficialAnswer:
    if _SEARCH.match(row):
        found = _FOUND.search(row)
        if found is None:
            return OfficialAnswer(row, None)
        return OfficialAnswer(row[: found.start()], row[found.end() :])
    text, reference, _ = row.rpartition(REFERENCE) if REFERENCE in row else (row, "", "")
    is_harmless = bool(reference)
    bare = _bare(text)
    prompt = max((one for one in prompts if bare.startswith(one)), key=len, default="")
    if prompt:
        end = _after(text, len(prompt))
    else:
        end = max(text.rfind(mark) + len(mark) if mark in text else 0 for mark in PROMPT_ENDS)
    if end:
        return OfficialAnswer(text[:end], text[end:], is_harmless=is_harmless)
    if prompts:
        raise ValueError(f"{place}: begins with none of the prompts, expected those it was made of")
    return OfficialAnswer(text, text, is_placed=False, is_harmless=is_harmless)


def _bare(text: str) -> str:
    return _SPACE.sub("", text)


def _after(text: str, count: int) -> int:
    """Where `text` goes on after `count` characters that are no white space."""
    for at, character in enumerate(text):
        if not count:
            return at
        count -= not character.isspace()
    return len(text)


def _text(place: str, row: Any, field: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{place}: {field}: expected text, got {type(value).__name__}")
    return value
