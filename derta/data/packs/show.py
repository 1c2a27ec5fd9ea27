"""A pack as text: what every row reads, and what it is trained on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from derta.data.packs.packing import PackedBatch
from derta.objectives.base import Objective
from derta.terminal import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLORS = {"prompt": "36", "harmful": "31", "cut": "1;33", "safe": "32", "answer": "34"}


def render_pack(
    batch: PackedBatch,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    refusal_token_id: int | Sequence[int],
    color: bool = True,
) -> str:
    """Return text for a terminal: a line for each row with a target, one for each run without.

    A line gives the row, its position, its part (prompt, harmful, safe and the number of its
    branch, or a dialogue's answer), its token, and its targets: the following token, the refusal
    token, where a branch leaves ("cut") the branch's first token.

    Args:
        batch: the pack.
        objective: names its targets.
        tokenizer: decodes its tokens.
        refusal_token_id: token that refusals start with, or several.
        color: if True, parts are in ANSI colours; a non-empty environment variable NO_COLOR turns
            them off.
    """
    color = color and not os.environ.get("NO_COLOR")
    batch = batch.to("cpu")
    tokens, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    columns = {name: column[0].tolist() for name, column in batch.columns.items()}
    depths = batch.depth[0].tolist()
    said = objective.said(batch.columns)[0].tolist()
    live = objective.live(batch.columns)[0].tolist()

    def quote(ids: list[int]) -> str:
        return repr(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def paint(text: str, part: str) -> str:
        return f"\x1b[{COLORS[part.split()[0]]}m{text}\x1b[0m" if color else text

    refusals = [refusal_token_id] if isinstance(refusal_token_id, int) else refusal_token_id
    counts = [f"{batch.totals[term.name].targets} {term.title} targets" for term in objective.terms]
    lines = [
        f"{len(tokens)} tokens, {len(batch.example_ids)} examples, {', '.join(counts)}; "
        f"refusal token{'s' * (len(refusals) > 1)} {', '.join(quote([id]) for id in refusals)}",
        "parts: " + ", ".join(paint(part, part) for part in COLORS),
    ]
    # strict=False: the empty pack has bounds and no example.
    for id, bounds, branches in zip(
        batch.example_ids, batch.example_bounds, batch.branch_bounds, strict=False
    ):
        lines += ["", printable(id)]
        parts = _parts(bounds, branches, depths, said)
        cuts = [row for row in parts if depths[row] >= 0 and said[row]]
        branch_of = {row: len(cuts) - index for index, row in enumerate(cuts)}
        for part, run in _runs(parts, live):
            first = run[0]
            row = {name: one[first] for name, one in columns.items()}
            notes = [note for _, note in objective.notes(row, quote)]
            if first in branch_of:  # the first note is that of the branch's token
                notes[0] = paint(f"cut, safe {branch_of[first]} {notes[0]}", "cut")
            read = paint(quote([tokens[row] for row in run]), part)
            line = f"{run[0]:>6} {positions[run[0]]:>6}  {part:<8}  {read}  {'  '.join(notes)}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def _parts(
    bounds: tuple[int, int],
    branches: Sequence[tuple[int, int]],
    depths: Sequence[int],
    said: Sequence[bool],
) -> dict[int, str]:
    """Return the part that each row of an example belongs to."""
    start, end = bounds
    if max(depths[start:end]) < 0:
        answers = {row + 1 for row in range(start, end) if said[row]}
        return {row: "answer" if row in answers else "prompt" for row in range(start, end)}
    parts = {row: "harmful" if depths[row] > 0 else "prompt" for row in range(start, end)}
    for number, branch in enumerate(branches, start=1):
        parts.update(dict.fromkeys(range(*branch), f"safe {number}"))
    return parts


def _runs(parts: dict[int, str], live: Sequence[bool]) -> list[tuple[str, list[int]]]:
    """Return each row with a target by itself, and runs of rows of one part without."""

    def key(row: int) -> tuple[str, int | None]:
        return parts[row], row if live[row] else None

    return [(part, list(rows)) for (part, _), rows in itertools.groupby(parts, key)]
