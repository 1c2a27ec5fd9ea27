"""Evaluations by name: the settings that another code evaluates with.

No attack is here: the authors' test files hold their prompts ready-made, and are the user's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The authors' prompt at evaluation. Their training rows have spaces in the place of line breaks.
OFFICIAL_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] \n{{ m['content'] }}\n\n [\\INST]"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Test files of the official repository, without those of PAIR and AutoDAN, which it lacks.
OFFICIAL_ATTACKS = {
    "plain": "safety_illegal_instructions_200.json",
    "codeattack": "safety_codeattack.json",
    "jailbreakchat": "safety_jailbreakchat.json",
    "selfcipher": "safety_selfcipher.json",
}
OFFICIAL_COMPLETIONS = {"completionattack": "safety_completionattack.json"}
# Searches for a prompt of each model, kept beside the others by whoever ran them.
OFFICIAL_SEARCHES = {"pair": "safety_pair.json", "autodan": "safety_autodan.json"}
OFFICIAL_QUESTIONS = {
    "gsm8k": "helpfulness_gsm8k_500.json",
    "mmlu": "helpfulness_mmlu_500.json",
}
OFFICIAL_EXPORTS = {"alpaca_eval": "helpfulness_alpaca_eval_300.json"}
OFFICIAL_WRAPPERS = {
    "gsm8k": "\n {request} \n ",
    "mmlu": "Choose the correct option for the given question.\n\n\n\nQuestion: {request}\n",
}


def official(folder: str | Path) -> dict[str, Any]:
    """Return the settings of `derta eval` for the authors' evaluation (arXiv 2407.09121).

    Greedy answers of at most 1,024 tokens to their prompts, in their batches of 25. Attacks are
    judged by the refusals that the paper names, where people judged the paper's, and an empty
    answer is an attack without success; questions count by their final answer, where people read
    them too; answers to AlpacaEval's prompts are exported for its own judge.

    Args:
        folder: the test files of the official repository, `data/test`. If `safety_pair.json` and
            `safety_autodan.json` stand there too, in the shape of the others, they are run.

    Source: arXiv 2407.09121, section 3.1, and the official `evaluation.py`.
    """
    folder = Path(folder)

    def files(names: Mapping[str, str]) -> dict[str, str]:
        return {name: str(folder / file) for name, file in names.items()}

    searches = files(OFFICIAL_SEARCHES)
    return {
        "attacks": files(OFFICIAL_ATTACKS)
        | {name: path for name, path in searches.items() if Path(path).is_file()},
        "completions": files(OFFICIAL_COMPLETIONS),
        "questions": files(OFFICIAL_QUESTIONS),
        "exports": files(OFFICIAL_EXPORTS),
        "wrappers": OFFICIAL_WRAPPERS,
        "chat_template": OFFICIAL_CHAT_TEMPLATE,
        "special_tokens_in_text": "keep",
        "max_new_tokens": 1024,
        "batch_size": 25,
        "empty_answers": "failed",
        "judges": {"official_keywords": {}},
    }


PRESETS = {"official": official}
