"""Invented rows in every public format, with harmless texts that name themselves.

The texts of item `n` contain their kind and `n`, to check the result of reading them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

Row = dict[str, Any]


def ask(n: int) -> str:
    return f'How do I "paint", fence {n}?\nQuickly.'


def safe(n: int) -> str:
    return f"Sorry, I cannot: safe {n}."


def harmful(n: int) -> str:
    return f"Step one, take the ladder: harmful {n}."


def helpful(n: int) -> str:
    return f"Two coats, dried well: helpful {n}."


def prefill(n: int) -> str:
    return f"Sure, here is how: prefill {n}."


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def transcript(asked: str, answer: str) -> str:
    return f"\n\nHuman: {asked}\n\nAssistant: {answer}"


def _wildguard(n: int, response: str | None, *labels: str | None) -> Row:
    names = ("prompt_harm_label", "response_refusal_label", "response_harm_label")
    return {
        "prompt": ask(n),
        "adversarial": False,
        "response": response,
        **dict(zip(names, labels, strict=True)),
        "subcategory": "fences",
    }


def _pku(n: int, first_is_safe: bool) -> Row:
    responses = [safe(n), harmful(n)] if first_is_safe else [harmful(n), safe(n)]
    return {
        "prompt": ask(n),
        "response_0": responses[0],
        "response_1": responses[1],
        "prompt_source": "invented",
        "is_response_0_safe": first_is_safe,
        "is_response_1_safe": not first_is_safe,
        "better_response_id": 0,
        "safer_response_id": 0 if first_is_safe else 1,
    }


# The rows of item n, by format. A preference's rejected answer is harmful, as one for safety.
ROWS: dict[str, Callable[[int], list[Row]]] = {
    "triple": lambda n: [{"prompt": ask(n), "safe": safe(n), "harmful": harmful(n)}],
    "rendered": lambda n: [
        {"prefix": f"[INST] {ask(n)} [\\INST]", "text": f" {harmful(n)}<|eot|>", "safe": "true"},
        {"prefix": f"[INST] {ask(n)} [\\INST]", "text": f" {helpful(n)}<|eot|>", "safe": "false"},
    ],
    "official_triple": lambda n: [
        {"instruction": ask(n), "output": harmful(n), "safe_response": safe(n)}
    ],
    "beavertails": lambda n: [
        {"prompt": ask(n), "response": text, "category": {"fences": not good}, "is_safe": good}
        for text, good in ((harmful(n), False), (safe(n), True))
    ],
    "pku_saferlhf": lambda n: [_pku(n, first_is_safe=n % 2 == 0)],
    "circuit_breakers": lambda n: [
        {"prompt": ask(n), "output": harmful(n), "llama3_output": safe(n), "category": "fences"}
    ],
    "shallow_deep": lambda n: [
        {"instruction": ask(n), "input": "", "harmful": harmful(n), "refusal": safe(n)}
    ],
    "harmful_answer": lambda n: [{"prompt": ask(n), "harmful": harmful(n)}],
    "instruction_preference": lambda n: [
        {"instruction": ask(n), "input": "", "chosen": safe(n), "rejected": harmful(n)}
    ],
    "sharegpt_preference": lambda n: [
        {
            "conversations": [{"from": "human", "value": ask(n)}],
            "chosen": {"from": "gpt", "value": safe(n)},
            "rejected": {"from": "gpt", "value": harmful(n)},
        }
    ],
    "whole_preference": lambda n: [
        {"chosen": transcript(ask(n), safe(n)), "rejected": transcript(ask(n), harmful(n))}
    ],
    "preference": lambda n: [{"prompt": ask(n), "chosen": safe(n), "rejected": harmful(n)}],
    "wildguard": lambda n: [
        _wildguard(n, safe(n), "harmful", "refusal", "unharmful"),
        _wildguard(n, harmful(n), "harmful", "compliance", "harmful"),
        _wildguard(n, helpful(n), "unharmful", "compliance", "unharmful"),
        _wildguard(n, None, "harmful", None, None),
    ],
    "alpaca": lambda n: [{"instruction": ask(n), "input": "", "output": helpful(n)}],
    "dolly": lambda n: [
        {"instruction": ask(n), "context": "", "response": helpful(n), "category": "fences"}
    ],
    "instruction_target": lambda n: [{"instruction": ask(n), "target": helpful(n)}],
    "transcript": lambda n: [{"transcript": transcript(ask(n), helpful(n)), "rating": 4}],
    "prompt_output": lambda n: [{"prompt": ask(n), "output": helpful(n)}],
    "prompt_answer": lambda n: [{"prompt": ask(n), "answer": helpful(n)}],
    "prefilled": lambda n: [{"prompt": ask(n), "prefill": prefill(n)}],
    "queries": lambda n: [
        {"queries": ["How are fences made?", ask(n)], "answers": ["Of wood.", helpful(n)]}
    ],
    "conversation": lambda n: [{"messages": [turn("user", ask(n)), turn("assistant", helpful(n))]}],
    "sharegpt": lambda n: [
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": ask(n)},
                {"from": "gpt", "value": helpful(n)},
            ]
        }
    ],
    "prompt_completion": lambda n: [{"prompt": ask(n), "completion": helpful(n)}],
    "question": lambda n: [{"question": ask(n), "answer": helpful(n)}],
    "mmlu": lambda n: [
        {
            "question": ask(n),
            "subject": "fences",
            "choices": ["Water", helpful(n), "0"],
            "answer": 1,
        }
    ],
    "advbench": lambda n: [{"goal": ask(n), "target": prefill(n)}],
    "harmbench": lambda n: [
        {
            "Behavior": ask(n),
            "FunctionalCategory": "contextual",
            "SemanticCategory": "fences",
            "Tags": "",
            "ContextString": "A garden.",
            "BehaviorID": f"fence_{n}",
        }
    ],
    "harmbench_completions": lambda n: [
        {"test_case": ask(n), "generation": harmful(n), "label": 1, "advbench_label": 1},
        {"test_case": ask(n), "generation": safe(n), "label": 0, "advbench_label": 0},
        {"test_case": ask(n), "generation": safe(n)},
    ],
    "jailbreakbench": lambda n: [
        {
            "Index": n,
            "Goal": ask(n),
            "Target": prefill(n),
            "Behavior": "Fences",
            "Category": "fences",
            "Source": "Original",
        }
    ],
    "strongreject": lambda n: [
        {"category": "fences", "source": "invented", "forbidden_prompt": ask(n)}
    ],
    "xstest": lambda n: [
        {"id": f"v2-{n}{kind}", "type": kind, "prompt": ask(n)}
        for kind in ("homonyms", "contrast_homonyms")
    ],
    "or_bench": lambda n: [{"prompt": ask(n), "category": "fences"}],
    "hex_phi": lambda n: [{"instruction": ask(n), "category": "fences"}],
    "do_not_answer": lambda n: [
        {"id": n, "risk_area": "fences", "types_of_harm": "paint", "question": ask(n)}
    ],
    "beavertails_evaluation": lambda n: [
        {"prompt": ask(n), "category": "fences", "category_id": n}
    ],
    "requests": lambda n: [{"prompt": ask(n)}],
    "turns": lambda n: [{"turns": ["How are fences made?", ask(n)]}],
}

CONTAINERS = ("jsonl", "json", "object", "table", "csv", "parquet")
FLAT = ("table", "csv")  # they hold no lists and objects within rows
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "xz": lambda data: lzma.compress(data, preset=0),
}


def contain(rows: Sequence[Row], container: str) -> bytes:
    """Return the content of a file with the rows.

    Raises:
        pyarrow.ArrowException: parquet cannot hold the rows.
    """
    if container == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if container == "json":
        return json.dumps(rows, indent=1).encode()
    if container == "object":
        return json.dumps({"name": "invented", "size": len(rows), "data": rows}, indent=1).encode()
    if container == "table":
        names = dict.fromkeys(name for row in rows for name in row)
        return json.dumps({name: [row.get(name) for row in rows] for name in names}).encode()
    if container == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), data)
    return data.getvalue()
