"""A sparse backward pass is measured on the rows that the model itself has, with true figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import sparse
from derta.data import Chat
from derta_kernels.head_loss.row_pass import TILE
from tiny import tiny_model, tiny_tokenizer

TRIPLES = [
    {
        "prompt": f"How do I paint the {thing} green?",
        "safe": "Sorry, I cannot help with that.",
        "harmful": f"First buy a brush, then open the paint and stir it well. Take the {thing}. "
        * length,
    }
    for length, thing in enumerate(("fence", "ladder", "garden"), 3)
]


def test_the_figures_are_those_of_the_definition_on_rows_of_separate_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model("granite").eval(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "triples.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in TRIPLES), encoding="utf-8")

    chat, logits, hidden = Chat(tokenizer), [], []
    for row in TRIPLES:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt, answer = chat.prompt_ids(messages), chat.response_ids(messages, row["harmful"])
        with torch.no_grad():
            read = model(torch.tensor([prompt + answer]), output_hidden_states=True)
        logits.append(read.logits[0, len(prompt) - 1 :].double())
        hidden.append(read.hidden_states[-1][0, len(prompt) - 1 :].double())
    refusal = chat.response_ids(messages, "Sorry")[0]
    p = torch.cat(logits).softmax(1)
    count, scale = 2 * TILE - 9, 1 / model.config.logits_scaling
    gradient = (p - F.one_hot(torch.tensor(refusal), p.shape[1]))[:count] * scale
    peaks = F.pad(gradient.abs(), (0, -p.shape[1] % TILE, 0, -count % TILE))
    peaks = peaks.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).amax((1, 3))
    middle = peaks.flatten().sort().values[1:-2]  # the last two have the refusal token
    gap = int((middle[1:] / middle[:-1]).argmax())
    limit = (middle[gap] * middle[gap + 1]).sqrt()
    dead = (peaks < limit).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    skipped = gradient.where(dead[:count, : p.shape[1]], 0)

    options = ["--rows", f"{count}", "--tolerance", f"{limit / scale}", "--turns", "1"]
    where = ["--machine", "here", "--out", str(tmp_path)]
    monkeypatch.setattr(
        "sys.argv", ["sparse", f"{tmp_path / 'model'}", str(data), *where, *options]
    )
    sparse.main()
    records = json.loads((tmp_path / "sparse.json").read_text())["records"]
    heads = [(r["dtype"], r["trainable"]) for r in records]
    assert heads == [(d, t) for d in ("float32", "bfloat16") for t in (False, True)]
    weight, rows = model.get_output_embeddings().weight.detach().double(), torch.cat(hidden)[:count]
    for record in records:
        rel = 1e-3 if record["dtype"] == "float32" else 0.1
        expected = {"d_hidden": (skipped @ weight, gradient @ weight)}
        if record["trainable"]:
            expected["d_weight"] = (skipped.T @ rows, gradient.T @ rows)
        assert record["errors"].keys() == expected.keys()
        for name, (lost, whole) in expected.items():
            assert record["errors"][name] == pytest.approx(
                float(lost.norm() / whole.norm()), rel=rel
            )
        assert record["refusal_p"] == pytest.approx(p[:count, refusal].mean().item(), rel=rel)
        assert record["live_share"] == (peaks > limit).double().mean()
        skipped_share = float(skipped.abs().sum() / gradient.abs().sum())
        assert record["skipped_share"] == pytest.approx(skipped_share, rel=rel)
        assert record["rows"] == count and len(record["ratios"]) == 1 and record["dense_ms"] > 0
    text = (tmp_path / "sparse.md").read_text()
    assert f"| trainable, float32 | {records[1]['refusal_p']:.3f} |" in text
    assert f" {records[0]['live_share']:.2%} | {records[0]['skipped_share']:.2%} |" in text
