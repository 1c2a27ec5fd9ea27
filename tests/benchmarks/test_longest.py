"""The longest response that fits: the search, the trials, and the table."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import longest
from benchmarks.harness.examples import MEAN_LENGTHS
from benchmarks.step.question import OFFICIAL, OURS, RUNGS, SMALL, make_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("guess", [0, 100, 12000, 2**20])
@pytest.mark.parametrize("limit", [0, 64, 100, 1000, 12345, 2**19, 2**21])
def test_the_search_finds_the_limit(limit: int, guess: int) -> None:
    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= limit

    found = longest.longest(fits, 2**19, guess)
    assert found <= limit
    assert limit < 64 or found >= min(limit, 2**19) * (1 - longest.PRECISION) - 1
    assert len(tried) <= (3 if guess <= limit <= 1.03 * guess else 20)


@pytest.mark.parametrize("recipe", [OFFICIAL, OURS])
def test_a_trial_is_a_whole_step(recipe: str) -> None:
    case = replace(SMALL, lora=True)
    model = make_model(case, RUNGS[recipe], CPU)
    longest.step(model.get_base_model(), recipe, 100, CPU)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_trials_cover_each_memory_size_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is simulated: its size, its limit, and its out-of-memory errors."""
    shares: list[float] = []
    monkeypatch.setattr(longest, "CASE", replace(SMALL, lora=True))
    properties = SimpleNamespace(total_memory=20 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    let_go: list[None] = []
    monkeypatch.setattr(longest, "_let_go", lambda: let_go.append(None))
    steps: list[int] = []

    def step(model: object, recipe: str, harmful: int, device: torch.device) -> None:
        steps.append(harmful)
        if harmful > 1000 * shares[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(longest, "step", step)
    records = list(longest.measured("lora", OURS, {24: 64, 16: 64, 8: 2000}, CPU))
    assert [record.memory_gib for record in records] == [8, 16] and shares[-1] == 1
    for record, share in zip(records, shares, strict=False):
        assert (1 - longest.PRECISION) * 1000 * share - 1 <= record.tokens <= 1000 * share
    assert len(let_go) == len(steps) + 1, "after every try, and of the model before"


def test_the_triple_has_the_requested_length() -> None:
    one = longest.triple(500)
    assert (len(one.example.prompt), len(one.example.harmful)) == (MEAN_LENGTHS[0], 500)
    assert one.cuts.tolist() == [250] and len(one.example.safe) == MEAN_LENGTHS[2]


def test_projections_grow_with_memory_and_are_labelled_in_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(longest.LLAMA_3_8B, "num_hidden_layers", 1)
    records = list(longest.projected("qlora", OURS, (8, 24)))
    (official,) = longest.projected("qlora", OFFICIAL, (24,))
    assert 0 < 10 * official.tokens < records[1].tokens
    small, large = (record.tokens for record in records)
    assert 0 < small < large
    machine = {"date": "today", "commit": "c", "versions": {"torch": "2"}}
    lines = longest.table(machine, records).splitlines()
    assert "| GiB | qlora, one pass, projected |" in lines
    assert f"| 24 | {large:,} |" in lines
    assert "no GPU" in " ".join(lines)
