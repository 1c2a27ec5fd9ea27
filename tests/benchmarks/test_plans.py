"""Plans of known models: the packs that fit, their parts, and the table and plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import plans

TINY: dict[str, Any] = dict(
    model_type="llama",
    vocab_size=32000,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=1,
    num_attention_heads=4,
)


def test_a_plan_fills_its_memory_and_plans_that_do_not_fit_are_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plans, "MODELS", {"Tiny": TINY, "Tiny too": TINY})
    monkeypatch.setattr(plans, "SHORTEST", 256)
    large, none = plans.plans("Tiny", "lora", (2, 0))
    assert large.tokens > 10_000
    assert 0.95 * 2**31 < sum(large.parts.values()) <= 2**31
    assert none.tokens == 0 and sum(none.parts.values()) > 0
    machine = {"date": "today", "commit": "c", "versions": {"torch": "2"}}
    text = plans.table(machine, [large, none])
    assert f"| Tiny | lora | 2 | {large.tokens:,} |" in text
    assert "| Tiny | lora | 0 | none |" in text and "Projected" in text
    plans.plot([large, none], tmp_path / "plans.png")
    assert (tmp_path / "plans.png").stat().st_size > 1000
