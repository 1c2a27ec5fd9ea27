"""What `derta data stats` says of a data set is what a run then makes of it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from derta.data import (
    Collator,
    Dialogue,
    EncodedDialogue,
    Encoder,
    Record,
    Rendered,
    Request,
    Triple,
    count_tokens,
    resolve_refusal_token,
)
from derta.data.packs.shares import loss_shares
from derta.data.records.defaults import TooLong
from derta.data.records.duplicates import Fingerprint, RequestIndex
from derta.data.statistics import Lengths, Repeats, RunStatistics, data_statistics
from derta.objectives.derta import DertaObjective
from derta.objectives.unlikelihood import UnlikelihoodObjective
from tiny import tiny_tokenizer


def triple(place: int, prompt: str = "", words: int = 3, **more: Any) -> Triple:
    given = {"safe": "Sorry, no.", "source": "fences", **more}
    return Triple(
        prompt=prompt or f"How do I paint {place} fences with {place} brushes?",
        harmful="Step one. " * words,
        id=str(place),
        **given,
    )


def dialogue(place: int, answer: str = "Stir it.", **more: Any) -> Dialogue:
    messages = [
        {"role": "user", "content": f"What is in bucket number {place}?"},
        {"role": "assistant", "content": answer},
    ]
    return Dialogue(messages=messages, id=f"d{place}", source="buckets", **more)


def mixed() -> list[Record]:
    return [
        *(triple(place, words=1 + place % 7, weight=1.0 + place % 2) for place in range(20)),
        *(dialogue(place, "Stir it. " * (1 + place % 5)) for place in range(10)),
        dialogue(99, borderline=True, weight=3.0),
        Rendered(prefix=r"[INST] How? [\INST]", text=" Sure.", rto=True, id="r1", source="old"),
        Rendered(prefix=r"[INST] How? [\INST]", text=" Sorry.", rto=False, id="r2", source="old"),
    ]


def run_statistics(
    max_length: int = 1024, max_tokens: int = 4096, too_long: TooLong = "skip", **draws: Any
) -> RunStatistics:
    return RunStatistics(
        tiny_tokenizer(),
        Collator(DertaObjective(**draws)),
        max_length=max_length,
        max_tokens=max_tokens,
        too_long=too_long,
    )


def test_lengths_are_those_of_all_rows() -> None:
    values = np.random.default_rng(0).integers(1, 50, size=333)
    lengths = Lengths()
    for value in values.tolist():
        lengths.add(value)
    expected = {
        name: int(np.percentile(values, share, method="inverted_cdf"))
        for name, share in (("p5", 5), ("p50", 50), ("p95", 95), ("max", 100))
    }
    assert lengths.summary() == {"rows": 333, **expected}


@pytest.mark.parametrize("limits", [(1024, 4096), (60, 4096), (1024, 70), (45, 50)])
@pytest.mark.parametrize("loss_norm", ["tokens", "terms"])
@pytest.mark.parametrize("too_long", ["skip", "truncate"])
def test_a_run_makes_of_the_records_what_is_said(
    limits: tuple[int, int], loss_norm: str, too_long: TooLong
) -> None:
    draws: Any = {"branches": 2, "cuts": "uniform"}
    encoder = Encoder(
        tiny_tokenizer(),
        max_length=limits[0],
        max_tokens=limits[1],
        too_long=too_long,
        **draws,
    )
    whole = Encoder(tiny_tokenizer(), max_length=10**6, max_tokens=10**6, **draws)
    collator = Collator(DertaObjective(**draws, rto_keep=0.5, rto_weight=0.5))
    examples = list(encoder.encode_many(mixed()))
    drawn = [collator.draw(example, 0) for example in examples if example is not None]
    found = data_statistics(
        mixed(),
        Repeats(),
        run_statistics(*limits, too_long, **draws, rto_keep=0.5, rto_weight=0.5),
        loss_norm=loss_norm,
    )
    tokens = found["tokens"]
    assert (tokens["one_pass"], tokens["apart"]) == tuple(count_tokens(drawn))
    assert tokens["skipped"] == examples.count(None)
    assert tokens["truncated"] == encoder.truncated
    assert tokens["shortened"] == sum(
        fitted is not None and len(fitted.harmful) < len(full.harmful)
        for fitted, full in zip(examples, whole.encode_many(mixed()), strict=True)
        if hasattr(full, "harmful")
    )
    assert found["loss"] == loss_shares(drawn, collator.objective, loss_norm)
    assert found["rows"] == {
        "fences": {"triples": 20},
        "buckets": {"helpful": 10, "borderline": 1},
        "old": {"rendered": 2},
    }
    triples = [record for record in mixed() if isinstance(record, Triple)]
    token = resolve_refusal_token(tiny_tokenizer(), "auto", triples)
    assert [one["id"] for one in found["refusal"]["tokens"]] == [token.id]
    assert found["refusal"]["warning"] is None


@pytest.mark.parametrize("refusals", [None, ["Sorry", "How"]])
@pytest.mark.parametrize("loss_norm", ["tokens", "terms"])
def test_no_refusal_token_is_counted_as_unlikely(
    refusals: list[str | int] | None, loss_norm: str
) -> None:
    """Training leaves them out, and knows them once all safe responses are read."""
    harmful = "Sure.Sorry.How.Sure.Sorry!How, take the ladder."
    gates = [triple(place, source="gates", weight=1.0 + place % 2) for place in range(30, 38)]
    records = [*mixed()[:31], *(replace(one, harmful=harmful) for one in gates)]
    draws: Any = {"branches": 2, "cuts": "uniform"}
    objective = UnlikelihoodObjective(**draws, unlikelihood_weight=0.5)
    encoder = Encoder(tiny_tokenizer(), max_length=10**6, max_tokens=10**6, **draws)
    examples = list(encoder.encode_many(records))
    drawn = [Collator(objective).draw(one, 0) for one in examples if one is not None]
    found = data_statistics(
        records,
        Repeats(),
        RunStatistics(tiny_tokenizer(), Collator(objective), max_length=1024, max_tokens=4096),
        refusal_tokens=refusals,
        loss_norm=loss_norm,
    )
    aimed = objective.aimed([one["id"] for one in found["refusal"]["tokens"]])
    assert len(aimed.refusals) == len(refusals or ["Sorry"])
    expected, unaimed = (loss_shares(drawn, one, loss_norm) for one in (aimed, objective))
    assert expected["gates"]["unlikelihood"] < unaimed["gates"]["unlikelihood"]
    for source, share in expected.items():
        assert found["loss"][source] == pytest.approx(share)


def test_lengths_are_of_whole_texts_in_tokens_or_in_characters() -> None:
    record = triple(1, words=30)
    encoder = Encoder(
        tiny_tokenizer(), max_length=1024, max_tokens=4096, branches=1, cuts="uniform"
    )
    encoded = encoder.encode(record)
    in_tokens = data_statistics([record], Repeats(), run_statistics(max_length=80))
    in_characters = data_statistics([record], Repeats())
    assert (in_tokens["unit"], in_characters["unit"]) == ("tokens", "characters")
    for part in ("prompt", "safe", "harmful"):
        tokens, characters = in_tokens["lengths"][part], in_characters["lengths"][part]
        assert tokens["max"] == len(getattr(encoded, part))
        assert characters["max"] == len(getattr(record, part))
    assert in_tokens["tokens"]["shortened"] == 1
    assert not {"tokens", "loss", "refusal"} & in_characters.keys()
    parts = data_statistics(mixed(), Repeats())["lengths"]
    assert parts["dialogue"]["rows"] == 11
    assert parts["rendered"] == {"rows": 2, "p5": 25, "p50": 25, "p95": 26, "max": 26}
    rendered = [
        Rendered(prefix="Lift it: ", text="Sorry, no.", rto=rto, id=f"{rto}")
        for rto in (True, False)
    ]
    both = data_statistics(rendered, Repeats(), run_statistics())["lengths"]["rendered"]
    plain = encoder.encode(rendered[1])
    assert isinstance(plain, EncodedDialogue)
    assert both["p5"] == both["max"] == len(plain.input_ids)


def test_another_token_than_most_refusals_begin_with_is_warned_of() -> None:
    found = data_statistics([triple(1), triple(2)], Repeats(), run_statistics(), refusal=5)
    assert "RTO trains" in found["refusal"]["warning"]
    assert "100% start with 'Sorry'" in found["refusal"]["warning"]
    assert data_statistics([dialogue(1)], Repeats(), run_statistics())["refusal"] is None


def test_what_comes_again_is_counted_once_and_named_without_its_text() -> None:
    base = triple(1, "How do I paint the old wooden fence by the river green?")
    records = [
        base,
        triple(2, "how do i PAINT the old wooden fence by the river: green"),
        replace(base, safe="Sorry, otherwise.", id="3"),
        triple(4, "How do I paint the old wooden fence by the river green today?"),
        triple(5, "Which ladder reaches the roof of a barn?"),
    ]
    evaluation: list[Any] = [
        Request(prompt="Which ladder, reaches the roof of a barn", id="e1"),
        Request(prompt="How do I paint the old wooden fence by the river?", id="e2"),
        Request(prompt="Who swept the chimney?", id="e3"),
    ]
    found = data_statistics(records, Repeats(evaluation))
    duplicates, leakage = found["duplicates"], found["leakage"]
    assert [duplicates[kind] for kind in ("example", "same", "near")] == [1, 1, 1]
    assert [(entry["kind"], entry["id"], entry["of"]) for entry in duplicates["listed"]] == [
        ("example", "fences: 2", "fences: 1"),
        ("same", "fences: 3", "fences: 1"),
        ("near", "fences: 4", "fences: 1"),
    ]
    assert duplicates["listed"][2]["similarity"] == round(11 / 12, 4)
    assert (leakage["same"], leakage["near"]) == (1, 4)
    assert (leakage["leaked"], leakage["evaluation"]) == (2, 3)
    told = json.dumps(found)
    assert not [word for word in ("paint", "ladder", "chimney", "Step") if word in told]


def test_no_more_are_listed_than_asked_for_and_all_are_counted() -> None:
    records = [replace(triple(1), id=str(place)) for place in range(9)]
    duplicates = data_statistics(records, Repeats(listed=2))["duplicates"]
    assert duplicates["example"] == 8
    assert [entry["id"] for entry in duplicates["listed"]] == ["fences: 1", "fences: 2"]


def test_leaks_are_counted_though_few_are_sought_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[Fingerprint] = []
    search = RequestIndex.matches
    monkeypatch.setattr(
        RequestIndex,
        "matches",
        lambda self, request: searches.append(request) or search(self, request),
    )
    words = "how do I paint the old wooden fence by the river green today with brush"
    records = [triple(place, f"{words} {place}") for place in range(100)]
    evaluation = [Request(prompt=f"{words} {place}", id=str(place)) for place in range(50, 150)]
    evaluation.append(Request(prompt="Who swept the chimney?", id="far"))
    found = data_statistics(records, Repeats(evaluation, listed=3))
    leakage = found["leakage"]
    assert (leakage["same"], leakage["near"]) == (50, 50)
    assert (leakage["leaked"], leakage["evaluation"]) == (100, 101)
    assert found["duplicates"]["near"] == 99
    assert len(searches) == 3 * 3


def test_near_requests_are_left_alone_where_only_the_same_are_asked_for() -> None:
    records = [triple(1, "one two three four five"), triple(2, "one two three four five six")]
    assert data_statistics(records, Repeats())["duplicates"]["near"] == 1
    assert data_statistics(records, Repeats(near=None))["duplicates"]["near"] == 0


def test_records_stream_through() -> None:
    def peak(count: int) -> int:
        def records() -> Iterator[Record]:
            return (triple(place, words=1000) for place in range(count))

        tracemalloc.start()
        try:
            data_statistics(records(), Repeats(near=None))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is made once
    assert peak(400) < peak(40) + 400_000  # the 360 more are 3.6 MB of text
