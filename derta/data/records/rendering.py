"""The authors' training files, made of triples and dialogues: rendered, with their cuts frozen.

The rows are those of their generator, draw for draw, also where it is odd: every third triple has
no prefix, and then two spaces before the safe response; a harmful response of fewer than three
words has no safe row; cuts are counted in words and never reach the last two. It has no seed, which
is given here.

Source: the official `generate_training_data.py`; table 4 of arXiv 2407.09121 for the numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from derta.data.records.types import Dialogue, Triple

Row = dict[str, str]

# Safety rows of each recipe: safe ones, and RTO ones. A triple counts as two instances.
SAFETY_ROWS = {
    "vanilla": (6000, 0),
    "prefix_only": (3000, 0),
    "rto_only": (3000, 3000),
    "derta": (3000, 3000),
}
CLOSING = "<|end_of_text|>"  # Llama 3's
PREFIXED = ("prefix_only", "derta")


def official_rows(
    triples: Sequence[Triple],
    dialogues: Sequence[Dialogue],
    *,
    seed: int = 0,
    closing: str = CLOSING,
) -> dict[str, list[Row]]:
    """Return the rows of each of the paper's recipes, in the order of the authors' files.

    Their file of harmful prefixes has 6,000 of them, twice the paper's. For RTO alone they have no
    file: its rows are the safe ones without prefixes and the RTO ones.

    Args:
        triples: triples of one request each; `SAFETY_ROWS` says how many are used at most.
        dialogues: a request and its answer each.
        seed: seed of the cuts. Python's `random.seed` of it makes the authors' code draw the same.
        closing: the model's end-of-sequence token as text, which closes every response.

    Raises:
        ValueError: a record has more than one turn; names its id.
    """
    helpful = [_helpful(dialogue, closing) for dialogue in dialogues]
    refusing: list[Row] = []
    plain: list[Row] = []
    prefixed: list[Row] = []
    rng = random.Random(seed)
    for index, triple in enumerate(triples):
        if len(triple.messages) > 1:
            raise ValueError(f"{triple.id}: messages: expected one request, got several messages")
        asked = _asked(triple.prompt)
        refusing.append(_row(asked, triple.harmful + closing, is_rto=True))
        words = triple.harmful.split(" ")
        if len(words) < 3:
            continue
        count = rng.randint(1, len(words) - 2)
        start = " ".join(words[: count if index % 3 else 0])
        prefixed.append(_row(f"{asked} {start}", triple.safe + closing))
        plain.append(_row(asked, triple.safe + closing))
    return {
        recipe: helpful + refusing[:rto] + (prefixed if recipe in PREFIXED else plain)[:safe]
        for recipe, (safe, rto) in SAFETY_ROWS.items()
    }


def _helpful(dialogue: Dialogue, closing: str) -> Row:
    roles = [message["role"] for message in dialogue.messages]
    if roles != ["user", "assistant"]:
        raise ValueError(
            f"{dialogue.id}: messages: expected a request and its answer, got {', '.join(roles)}"
        )
    request, answer = (message["content"] for message in dialogue.messages)
    return _row(_asked(request), answer + closing)


def _asked(request: str) -> str:
    return f"[INST] {request} [\\INST]"


def _row(prefix: str, response: str, *, is_rto: bool = False) -> Row:
    safe = "true" if is_rto else "false"
    return {"prefix": prefix, "text": f" {response}", "safe": safe}
