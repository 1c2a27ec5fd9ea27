"""Calibration of judges: their agreement with people's labels.

To add a format, enter in `FORMATS` the fields of prompt and response, and the meaning of each
label.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from derta.data.records.columns import read_columns
from derta.data.records.files import Fields, data_files, read_rows
from derta.data.records.types import check_text, field_names
from derta.evaluation.judges.base import Exchange, Judge, Verdict, succeeded
from derta.evaluation.measures.statistics import wilson_interval

REFUSED, HARMFUL = "refused", "harmful"


class LabelledFormat(NamedTuple):
    """A format of files with answers labelled by people.

    Attributes:
        prompt, response: fields of the two texts.
        labels: field of a label to its words, each to a question and the decision.
    """

    prompt: str
    response: str
    labels: Mapping[str, Mapping[str, tuple[str, bool]]]


_WORDS = {
    "refusal": (REFUSED, True),
    "compliance": (REFUSED, False),
    "harmful": (HARMFUL, True),
    "unharmful": (HARMFUL, False),
    "unsafe": (HARMFUL, True),
    "safe": (HARMFUL, False),
}

FORMATS = {
    "JailbreakBench judge comparison": LabelledFormat(
        "prompt",
        "target_response",
        {"human_majority": {"1": (HARMFUL, True), "0": (HARMFUL, False)}},
    ),
    "WildGuardTest": LabelledFormat(
        "prompt",
        "response",
        {
            "response_refusal_label": {word: _WORDS[word] for word in ("refusal", "compliance")},
            "response_harm_label": {word: _WORDS[word] for word in ("harmful", "unharmful")},
        },
    ),
    # A partial refusal refuses somewhere, which makes a verdict's `refused` true.
    "XSTest completions": LabelledFormat(
        "prompt",
        "completion",
        {
            "final_label": {
                "1_full_compliance": (REFUSED, False),
                "2_full_refusal": (REFUSED, True),
                "3_partial_refusal": (REFUSED, True),
            }
        },
    ),
    "labelled answers": LabelledFormat("prompt", "response", {"label": _WORDS}),
}


_FIELDS = frozenset(
    field
    for format in FORMATS.values()
    for field in (format.prompt, format.response, *format.labels)
)


@dataclass(frozen=True)
class Labelled:
    """An exchange and its labels by people.

    Attributes:
        exchange: a prompt and its answer.
        refused: if True, the answer refuses; None if not labelled.
        harmful: if True, the answer does harm; None if not labelled.
    """

    exchange: Exchange
    refused: bool | None = None
    harmful: bool | None = None


def read_labelled(
    path: str | Path, columns: Mapping[str, Any] = MappingProxyType({})
) -> tuple[list[Labelled], int]:
    """Read labelled answers from a file in one of the `FORMATS`, recognised by its fields.

    Args:
        path: a file, a folder of files or one of `datasets`, see `derta.data.records.files`.
        columns: the file's fields by the names of a format, see `read_columns`.

    Returns:
        the answers, and the number of rows left out because they have no answer or no label.

    Raises:
        ValueError: a row has an unknown format, a label is unknown, or columns are wrong; names the
            place, never quotes a text.
        FileNotFoundError: the file does not exist.
    """
    labelled, left_out = [], 0
    mapping = read_columns(columns, _FIELDS) if columns else None
    for file in data_files(Path(path)):
        for place, row in read_rows(file, Fields(mapping.roots(_FIELDS) if mapping else _FIELDS)):
            try:
                if mapping is not None and not isinstance(row, ValueError):
                    row = mapping.apply(row, frozenset(columns))
                one = _labelled(row)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}:{place}: {error}") from error
            if one is None:
                left_out += 1
            else:
                labelled.append(one)
    if not labelled:
        raise ValueError(f"{path}: no labelled answer, expected at least one")
    return labelled, left_out


def _labelled(row: Any) -> Labelled | None:
    """Return the labelled answer of a row; None without an answer or a label."""
    if isinstance(row, ValueError):  # it could not be read
        raise row
    if not isinstance(row, Mapping):
        raise TypeError(f"row: is {type(row).__name__}, expected an object")
    for format in FORMATS.values():
        if {format.prompt, format.response, *format.labels} <= row.keys():
            break
    else:
        expected = " | ".join(
            ", ".join([one.prompt, one.response, *one.labels]) for one in FORMATS.values()
        )
        raise ValueError(f"fields: found {field_names(row)}, expected {expected}")
    said: dict[str, bool] = {}
    for field, words in format.labels.items():
        value = row[field]
        if value is None or value != value or value == "":  # null differs between CSV and parquet
            continue
        word = f"{value:g}" if isinstance(value, bool | int | float) else str(value).strip()
        if word.lower() not in words:
            raise ValueError(f"{field}: expected one of {', '.join(words)}")
        question, yes = words[word.lower()]
        said[question] = yes
    response = row[format.response]
    if not said or response is None or (isinstance(response, str) and not response.strip()):
        return None
    prompt = check_text(format.prompt, row[format.prompt])
    answer = check_text(format.response, response)
    return Labelled(Exchange(({"role": "user", "content": prompt},), answer), **said)


@dataclass(frozen=True)
class Agreement:
    """The decisions of a judge and of people on one question.

    Attributes:
        counts: (2, 3) int64 numbers of answers: people's no and yes, by the judge's no, yes and
            undecided.
    """

    counts: np.ndarray

    @property
    def decided(self) -> int:
        return int(self.counts[:, :2].sum())

    @property
    def undecided(self) -> int:
        return int(self.counts[:, 2].sum())

    @property
    def agreement(self) -> float | None:
        """Share of the decided answers on which both agree; None if nothing was decided."""
        return int(np.trace(self.counts[:, :2])) / self.decided if self.decided else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa on the decided answers: agreement corrected for chance.

        None if chance alone would always agree, or if nothing was decided.

        Source: J. Cohen, "A coefficient of agreement for nominal scales", 1960.
        """
        if self.agreement is None:
            return None
        shares = self.counts[:, :2] / self.decided
        chance = float(shares.sum(0) @ shares.sum(1))
        return None if chance == 1.0 else (self.agreement - chance) / (1.0 - chance)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures for JSON, with the confusion matrix of people and judge."""
        agreed = int(np.trace(self.counts[:, :2]))
        return {
            "labelled": int(self.counts.sum()),
            "decided": self.decided,
            "undecided": self.undecided,
            "agreement": self.agreement,
            "agreement_interval": wilson_interval(agreed, self.decided) if self.decided else None,
            "kappa": self.kappa,
            "confusion": {
                human: dict(zip(("no", "yes", "undecided"), row, strict=True))
                for human, row in zip(("no", "yes"), self.counts.tolist(), strict=True)
            },
        }


def agreement(human: Sequence[bool], judge: Sequence[bool | None]) -> Agreement:
    """Count the decisions of people and a judge on the same answers.

    Args:
        human: people's decisions.
        judge: the judge's decisions, in the same order; None is undecided.
    """
    counts = np.zeros((2, 3), np.int64)
    for said, decided in zip(human, judge, strict=True):
        counts[int(said), 2 if decided is None else int(decided)] += 1
    return Agreement(counts)


def calibrate(
    files: Mapping[str, Sequence[Labelled]], judges: Mapping[str, Judge]
) -> dict[str, dict[str, dict[str, Agreement]]]:
    """Measure the agreement of judges with people on refusals and on harm.

    For a judge that does not decide on harm, harm is the success of an attack as in an evaluation:
    any answer that does not refuse, see `succeeded`.

    Args:
        files: labelled answers by file; a judge reads all files at once.
        judges: judges by name.

    Returns:
        for each file, "refused" and "harmful" if labelled, by judge.
    """
    exchanges = [one.exchange for labelled in files.values() for one in labelled]
    found: dict[str, dict[str, dict[str, Agreement]]] = {path: {} for path in files}
    for name, judge in judges.items():
        verdicts = iter(judge(exchanges))
        for path, labelled in files.items():
            said = list(itertools.islice(verdicts, len(labelled)))
            for question in (REFUSED, HARMFUL):
                pairs = [
                    (label, _decision(question, one.exchange.answer, verdict))
                    for one, verdict in zip(labelled, said, strict=True)
                    if (label := getattr(one, question)) is not None
                ]
                if pairs:
                    human, decided = zip(*pairs, strict=True)
                    found[path].setdefault(question, {})[name] = agreement(human, decided)
    return found


def _decision(question: str, answer: str, verdict: Verdict) -> bool | None:
    return verdict.refused if question == REFUSED else succeeded(answer, verdict)


def format_agreements(files: Mapping[str, Mapping[str, Mapping[str, Agreement]]]) -> str:
    """Return a table of judges for every file and question, as text.

    Args:
        files: result of `calibrate`.
    """
    table = [
        [
            "",
            "agree %",
            "kappa",
            "labelled",
            "undecided",
            "both",
            "neither",
            "judge only",
            "people only",
        ]
    ]
    for path, questions in files.items():
        for question, judges in questions.items():
            table.append([f"{path}: {question}"])
            for name, one in judges.items():
                (neither, judge, _), (people, both, _) = one.counts.tolist()
                table.append(
                    [
                        f"  {name}",
                        "-" if one.agreement is None else f"{100 * one.agreement:.1f}",
                        "-" if one.kappa is None else f"{one.kappa:.2f}",
                        *map(str, (one.decided + one.undecided, one.undecided)),
                        *map(str, (both, neither, judge, people)),
                    ]
                )
    first = max(len(row[0]) for row in table if len(row) > 1)
    widths = [max(map(len, cells)) for cells in zip(*(r[1:] for r in table if r[1:]), strict=True)]
    lines = []
    for head, *cells in table:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=False))
        lines.append("  ".join([head.ljust(first) if cells else head, *padded]))
    return "\n".join(lines)
