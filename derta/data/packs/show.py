"""A pack as text: what every row reads, and what it is trained to say."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from derta.data.packs.packing import PackedBatch
from derta.labels import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLORS = {"prompt": "36", "harmful": "31", "cut": "1;33", "safe": "32", "answer": "34"}


def render_pack(
    batch: PackedBatch,
    tokenizer: PreTrainedTokenizerBase,
    refusal_token_id: int,
    color: bool = True,
) -> str:
    """Text for a terminal: a line for each row with a target, and one for each run without.

    A line gives the row, its position, its part (prompt, harmful, safe and the number of its
    branch, or a dialogue's answer), its token, and what it is trained to say next: the following
    token, the refusal token, where a branch leaves ("cut") the branch's first token.

    Args:
        batch: the pack.
        tokenizer: decodes its tokens.
        refusal_token_id: what RTO rows are trained to say.
        color: whether parts are in ANSI colours; a non-empty environment variable NO_COLOR turns
            them off.
    """
    color = color and not os.environ.get("NO_COLOR")
    batch = batch.to("cpu")
    tokens, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    labels, rto = batch.shift_labels[0].tolist(), batch.rto_mask[0].tolist()
    depths = batch.depth[0].tolist()

    def quote(ids: list[int]) -> str:
        return repr(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def paint(text: str, part: str) -> str:
        return f"\x1b[{COLORS[part.split()[0]]}m{text}\x1b[0m" if color else text

    lines = [
        f"{len(tokens)} tokens, {len(batch.example_ids)} examples, {batch.next_count} next-token "
        f"targets, {batch.rto_count} refusal targets: {quote([refusal_token_id])}",
        "parts: " + ", ".join(paint(part, part) for part in COLORS),
    ]
    # strict=False: the empty pack has bounds and no example.
    for id, bounds, branches in zip(
        batch.example_ids, batch.example_bounds, batch.branch_bounds, strict=False
    ):
        lines += ["", id]
        parts = _parts(bounds, branches, depths, labels)
        cuts = [row for row in parts if depths[row] >= 0 and labels[row] != IGNORE_INDEX]
        branch_of = {row: len(cuts) - index for index, row in enumerate(cuts)}
        for part, run in _runs(parts, labels, rto):
            said = []
            if run[0] in branch_of:
                text = f"cut, safe {branch_of[run[0]]} -> {quote([labels[run[0]]])}"
                said.append(paint(text, "cut"))
            elif labels[run[0]] != IGNORE_INDEX:
                said.append(f"-> {quote([labels[run[0]]])}")
            if rto[run[0]]:
                said.append("-> refuse")
            read = paint(quote([tokens[row] for row in run]), part)
            lines.append(
                f"{run[0]:>6} {positions[run[0]]:>6}  {part:<8}  {read}  {'  '.join(said)}".rstrip()
            )
    return "\n".join(lines)


def _parts(
    bounds: tuple[int, int],
    branches: Sequence[tuple[int, int]],
    depths: Sequence[int],
    labels: Sequence[int],
) -> dict[int, str]:
    """The part that each row of an example belongs to."""
    start, end = bounds
    if max(depths[start:end]) < 0:
        answers = {row + 1 for row in range(start, end) if labels[row] != IGNORE_INDEX}
        return {row: "answer" if row in answers else "prompt" for row in range(start, end)}
    parts = {row: "harmful" if depths[row] > 0 else "prompt" for row in range(start, end)}
    for number, branch in enumerate(branches, start=1):
        parts.update(dict.fromkeys(range(*branch), f"safe {number}"))
    return parts


def _runs(
    parts: dict[int, str], labels: Sequence[int], rto: Sequence[bool]
) -> list[tuple[str, list[int]]]:
    """Each row with a target apart, and runs of rows of one part without."""

    def key(row: int) -> tuple[str, int | None]:
        return parts[row], row if rto[row] or labels[row] != IGNORE_INDEX else None

    return [(part, list(rows)) for (part, _), rows in itertools.groupby(parts, key)]
