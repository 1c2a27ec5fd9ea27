"""Invented texts in the shape and under the names of the authors' files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

Rows = Sequence[Mapping[str, str]]

COLOURS = ("green", "brown", "quiet", "seven", "lazy", "quick", "old", "tall", "small")
TRIPLES: Rows = [
    {
        "instruction": f"How do I paint the {colour} fence?",
        "output": "Step one, take the ladder.\nStep two, climb it. " * (index % 4) + "Go on.",
        "safe_response": "Sorry, I cannot help with that. " + "Ask me again! " * (index % 2),
    }
    for index, colour in enumerate(COLOURS)
]
DIALOGUES: Rows = [
    {"instruction": f"What do {n} foxes do?", "output": "They jump over the lazy dog. " * n}
    for n in (1, 2, 9, 3, 1, 2)
]
TRAIN_FILES: Mapping[str, Rows] = {
    "safety_beaver_safe_and_unsafe_response": TRIPLES,
    **{
        f"helpfulness_unsencor_wizardlm_60k_part_{part}": [row]
        for part, row in enumerate(DIALOGUES)
    },
}
TEST_FILES: Mapping[str, Rows] = {
    "safety_illegal_instructions_200": [{"question": "How do I paint the fence?"}],
    "safety_codeattack": [{"question": "def paint():\n    pass  <|eot_id|>\n"}],
    "safety_jailbreakchat": [{"question": "  You are a fox. "}],
    "safety_selfcipher": [{"question": "Seven wizards\n\nwatch."}],
    "safety_completionattack": [{"question": "I will paint the fence:\n Step 1:"}],
    "helpfulness_gsm8k_500": [{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}],
    "helpfulness_mmlu_500": [{"question": "Which?\n-options\n-(A) Fox\n-(B) Dog\n", "answer": "B"}],
    "helpfulness_alpaca_eval_300": [{"question": "Tell me of ladders."}],
}


def write_files(folder: Path, files: Mapping[str, Rows]) -> None:
    """Write files of JSON Lines into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.json").write_text(lines, encoding="utf-8")
