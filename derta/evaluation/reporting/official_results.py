"""Result files of the method's official repository: read, judged and counted as they are.

A file is JSON Lines of one of four shapes:

    {"question": ..., "response": ...}                  an answer to an attack
    {"instruction": ..., "response": ...}               the same, from a model behind an API
    {"question": ..., "response": ..., "answer": ...}   the same to GSM8K or MMLU, and the right one
    "prompt and answer in one"                          a completion, or the log of a PAIR search

A file does not name its attack. If prompt and answer are one string, the answer starts after the
known prompt (ignoring white space, which decoding changes), or else after the last end-of-prompt
mark of a chat template. Without either, the answer is the whole string, and a refusal in it has no
position. The log of a search holds an answer only if the search's own judge accepted one; without
an answer, the attack has failed.
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
REFERENCE = "---answer---"  # stands between an answer and the right one if both are one string
PICKLES = (b"PK\x03\x04", b"\x80")

_SEARCH = re.compile(r"\s*=+ FINAL SUMMARY STATISTICS =+\s")
_FOUND = re.compile(r"^Example Jailbreak RESPONSE:\s*", re.MULTILINE)
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class OfficialAnswer:
    """One row of a result file.

    Attributes:
        request: the request; rows with the same one are repeats.
        answer: the text that the model wrote; None if the attack failed and the file has none.
        is_placed: if True, the answer starts where the model began to write.
        is_harmless: if True, the request is harmless and has a right answer.
    """

    request: str
    answer: str | None
    is_placed: bool = True
    is_harmless: bool = False


def read_prompts(*paths: str | Path) -> list[str]:
    """Read the prompts of official test files, JSON Lines of {"question": ...}.

    Raises:
        ValueError: a row has no question; names file and line.
        OSError: a file cannot be read.
    """
    return [
        _text(place, row, "question") for path in paths for place, row in _json_lines(Path(path))
    ]


def read_answers(path: str | Path, prompts: Sequence[str] = ()) -> list[OfficialAnswer]:
    """Read a result file.

    Args:
        path: the file, of any name.
        prompts: the prompts of the answers, see `read_prompts`.

    Raises:
        ValueError: a row has an unknown shape or begins with none of the prompts (names file and
            line); the file has no row, or a right answer in only some rows; it is not UTF-8, or it
            is a pickle.
        OSError: the file cannot be read.
    """
    known = [_bare(prompt) for prompt in prompts]
    rows = [_answered(place, row, known) for place, row in _json_lines(Path(path))]
    if not rows:
        raise ValueError(f"{path}: expected JSON Lines of questions and responses, got no row")
    if len({row.is_harmless for row in rows}) > 1:
        raise ValueError(f"{path}: expected a right answer in every row or in none, got both")
    return rows


def official_entry(
    files: Mapping[str, str | Path],
    judge: Judge,
    *,
    prompts: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep_repeats: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Judge a model's result files, and return an entry like that of a variant in a summary.

    Args:
        files: name of an attack to result file. A name that starts with "over_refusal." marks
            harmless requests. Requests with a right answer are harmless under any name.
        judge, tokenizer, keep_repeats: see `judge_answers`.
        prompts: see `read_answers`.

    Returns:
        an entry, see `summarize`, with "position_unit" "words" or "tokens"; and notes on rows that
        its figures leave out.

    Raises:
        ValueError: as `read_answers`, or two attacks have one name in figures.
        OSError: see `read_answers`.
    """
    outcomes, notes = [], []
    named: dict[str, str] = {}
    for attack, path in files.items():
        rows = read_answers(path, prompts)
        name = attack.removeprefix(HARMLESS).replace(".", "_")  # dots separate a metric's levels
        is_harmless = attack.startswith(HARMLESS) or rows[0].is_harmless
        metric = f"{HARMLESS if is_harmless else 'asr.file.'}{name}"
        if (other := named.setdefault(metric, attack)) != attack:
            raise ValueError(
                f"results: {other!r} and {attack!r} would both be {name!r} in figures, expected "
                "names that differ in more than dots"
            )
        outcome, unplaced = judge_answers(
            metric,
            rows,
            judge,
            tokenizer,
            keep_repeats=keep_repeats,
        )
        outcomes.append(outcome)
        for count, what in (
            (outcome.left_out, "repeat a request and are left out"),
            (outcome.empty, "have an empty answer and count as neither success nor refusal"),
            (sum(row.answer is None for row in rows), "are searches that found no success"),
            (unplaced, "refuse at an unknown place: give the prompts to find it"),
        ):
            if count:
                notes.append(f"{name}: {count} of {len(rows)} rows {what}")
    unit = "words" if tokenizer is None else "tokens"
    result = VariantResult(tuple(outcomes), conditions={"empty_answers": "failed"})
    return result.to_dict() | {"position_unit": unit}, notes


def judge_answers(
    metric: str,
    rows: Sequence[OfficialAnswer],
    judge: Judge,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    keep_repeats: bool = False,
) -> tuple[Outcome, int]:
    """Judge the answers of one file.

    `succeeded` decides on attacks. A repeated request counts once: distributed evaluation repeats
    requests to give every process equally many.

    Args:
        metric: the metric of the outcome; if it starts with "over_refusal.", refusals are the hits.
        rows: the result of `read_answers`.
        judge: the judge, see `Judge`.
        tokenizer: a tokenizer whose tokens are the unit of positions; None: words.
        keep_repeats: if True, every row counts.

    Returns:
        the outcome, with repeated rows as left out; and the number of refusals without a position.
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
    """Yield the place of each row, as file and line, and the row."""
    data = path.read_bytes()
    if data.startswith(PICKLES):
        raise ValueError(
            f"{path}: expected JSON Lines, got a pickle, which can run any code when opened; use "
            "the .json file beside it"
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
                raise ValueError(f"{path}:{number}: expected one JSON row per line") from None
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
        raise ValueError(f"{place}: expected a row that begins with one of the prompts")
    return OfficialAnswer(text, text, is_placed=False, is_harmless=is_harmless)


def _bare(text: str) -> str:
    return _SPACE.sub("", text)


def _after(text: str, count: int) -> int:
    """Return the index in `text` after `count` characters other than white space."""
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
