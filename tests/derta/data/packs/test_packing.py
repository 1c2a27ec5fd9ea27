"""A pack is every logical sequence of its examples, each read in its own context and no other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from derta.data import (
    CUT_POLICIES,
    DertaCollator,
    Drawn,
    Encoded,
    EncodedDialogue,
    EncodedTriple,
    PackedBatch,
    count_tokens,
    pack,
    packed_length,
    sequence_length,
)
from derta.objectives.derta import DertaObjective

REFUSE = -1


class Tokens:
    """Never gives the same token twice, so that a context names one place in one sequence."""

    def __init__(self) -> None:
        self.used = 0

    def __call__(self, count: int) -> np.ndarray:
        self.used += count
        return np.arange(self.used - count, self.used, dtype=np.int32)


@st.composite
def triples(draw: st.DrawFn, tokens: Tokens, id: str) -> EncodedTriple:
    harmful = draw(st.integers(0, 9))
    limit = draw(st.integers(0, harmful))
    ends = draw(st.lists(st.integers(1, limit), max_size=4)) if limit else []
    return EncodedTriple(
        id=id,
        prompt=tokens(draw(st.integers(1, 4))),
        harmful=tokens(harmful),
        safe=tokens(draw(st.integers(1, 4))),
        cut_limit=limit,
        word_ends=np.array(sorted(ends), dtype=np.int64),
    )


@st.composite
def dialogues(draw: st.DrawFn, tokens: Tokens, id: str) -> EncodedDialogue:
    is_target = [False] + draw(st.lists(st.booleans(), max_size=9)) + [True]
    is_target += [False] * draw(st.integers(0, 3))
    return EncodedDialogue(id, tokens(len(is_target)), np.array(is_target))


@st.composite
def examples(draw: st.DrawFn, max_size: int = 4) -> list[Encoded]:
    tokens = Tokens()
    kinds = draw(st.lists(st.sampled_from([triples, dialogues]), min_size=1, max_size=max_size))
    return [draw(kind(tokens, f"example-{index}")) for index, kind in enumerate(kinds)]


@st.composite
def draws(draw: st.DrawFn) -> list[Drawn]:
    drawn = []
    for example in draw(examples()):
        if isinstance(example, EncodedDialogue):
            drawn.append(Drawn(example, np.zeros(0, np.int64), np.zeros(0, bool)))
            continue
        cuts = draw(st.lists(st.integers(0, example.cut_limit), max_size=4, unique=True))
        size = len(example.harmful) + 1
        rows = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        cuts = np.array(sorted(cuts, reverse=True), dtype=np.int64)
        drawn.append(Drawn(example, cuts, np.array(rows)))
    return drawn


def wanted(drawn: Drawn) -> Counter:
    """(context, what to say) of every target, straight from the objective."""
    example, targets = drawn.example, Counter()
    if isinstance(example, EncodedDialogue):
        ids = example.input_ids.tolist()
        for index in range(1, len(ids)):
            if example.is_target[index]:
                targets[tuple(ids[:index]), ids[index]] += 1
        return targets
    prompt, harmful, safe = (
        part.tolist() for part in (example.prompt, example.harmful, example.safe)
    )
    for depth in range(len(harmful) + 1):
        if drawn.depths[depth]:
            targets[tuple(prompt + harmful[:depth]), REFUSE] += 1
    for cut in drawn.cuts:
        for index in range(len(safe)):
            targets[tuple(prompt + harmful[:cut] + safe[:index]), safe[index]] += 1
    return targets


def seen(batch: PackedBatch, row: int) -> list[int]:
    """The rows that `row` sees, itself last."""
    until = batch.visible_until[0].tolist()
    return [key for key in range(row + 1) if row < until[key]]


def trained(batch: PackedBatch, start: int, end: int) -> Counter:
    targets: Counter = Counter()
    for row in range(start, end):
        context = tuple(batch.input_ids[0, seen(batch, row)].tolist())
        if batch.columns["shift_labels"][0, row] != -100:
            targets[context, int(batch.columns["shift_labels"][0, row])] += 1
        if batch.columns["rto_mask"][0, row]:
            targets[context, REFUSE] += 1
    return targets


@given(draws())
def test_every_target_is_read_in_its_own_context(drawn: list[Drawn]) -> None:
    batch = pack(drawn)
    assert batch.example_ids == tuple(d.example.id for d in drawn)
    total: Counter = Counter()
    for d, (start, end) in zip(drawn, batch.example_bounds, strict=True):
        assert trained(batch, start, end) == wanted(d)
        total += wanted(d)
    refusals = sum(count for (_, said), count in total.items() if said == REFUSE)
    assert (batch.totals["mle"].targets, batch.totals["rto"].targets) == (
        total.total() - refusals,
        refusals,
    )


@given(draws())
def test_positions_count_what_a_row_sees(drawn: list[Drawn]) -> None:
    batch = pack(drawn)
    positions = batch.position_ids[0].tolist()
    for row in range(len(positions)):
        assert [positions[key] for key in seen(batch, row)] == list(range(positions[row] + 1))


@given(draws())
def test_nothing_is_computed_that_no_target_needs(drawn: list[Drawn]) -> None:
    drawn = [d for d in drawn if wanted(d)]
    batch = pack(drawn)
    live = (batch.columns["shift_labels"] != -100) | batch.columns["rto_mask"]
    needed = {key for row in torch.nonzero(live[0]).flatten().tolist() for key in seen(batch, row)}
    assert needed == set(range(batch.input_ids.shape[1])) or not drawn
    # And no trunk, branch or prompt is laid out twice.
    for d, (start, end) in zip(drawn, batch.example_bounds if drawn else (), strict=True):
        contexts = {context[:n] for context, _ in wanted(d) for n in range(1, len(context) + 1)}
        assert end - start == len(contexts)


@given(draws())
def test_tokens_are_counted_as_they_are_run(drawn: list[Drawn]) -> None:
    apart = 0
    for d in drawn:
        if isinstance(d.example, EncodedDialogue):
            apart += max(len(context) for context, _ in wanted(d))
            continue
        prompt, harmful, safe = d.example.prompt, d.example.harmful, d.example.safe
        samples = [[*prompt, *harmful]] if d.depths.any() else []
        samples += [[*prompt, *harmful[:cut], *safe] for cut in d.cuts]
        apart += sum(map(len, samples))
    assert count_tokens(drawn) == (pack(drawn).input_ids.shape[1], apart)


@pytest.mark.parametrize("cuts", ["uniform", "official"])
@pytest.mark.parametrize(("branches", "least"), [(1, 1.33), (4, 1.95)])
def test_one_pass_saves_tokens_at_the_official_lengths(
    cuts: str, branches: int, least: float
) -> None:
    ids = np.zeros(490, np.int32)
    word_ends = np.arange(4, 372, 4)
    collator = DertaCollator(branches=branches, cuts=cuts)
    found = count_tokens(
        collator.draw(
            EncodedTriple(f"triple-{i}", *np.split(ids, [40, 420]), 380, word_ends), epoch=0
        )
        for i in range(3000)
    )
    assert found.apart / found.one_pass >= least
    assert f"{found.one_pass:,} tokens an epoch, {found.apart / found.one_pass:.2f} x" in str(found)


@given(draws())
def test_rows_know_where_they_are(drawn: list[Drawn]) -> None:
    batch = pack(drawn)
    shape = batch.input_ids.shape
    expected_index = [
        index for index, (start, end) in enumerate(batch.example_bounds) for _ in range(start, end)
    ]
    assert batch.example_index[0].tolist() == expected_index
    assert torch.equal(batch.loss_weight, torch.ones(shape))
    rows = zip(drawn, batch.example_bounds, batch.branch_bounds, strict=True)
    for d, (start, end), branches in rows:
        depth = batch.depth[0, start:end].tolist()
        tenth = batch.depth_tenth[0, start:end].tolist()
        if isinstance(d.example, EncodedDialogue):
            assert branches == () and set(depth) == set(tenth) == {-1}
            continue
        prompt, harmful, safe = d.example.prompt, d.example.harmful, d.example.safe
        trunk_end = branches[0][0] if branches else end
        for row in range(start, end):
            read = row - start - len(prompt) + 1
            if row >= trunk_end or read < 0:
                assert depth[row - start] == tenth[row - start] == -1
            else:
                assert depth[row - start] == read
                assert tenth[row - start] == int(10 * read / (len(harmful) + 1))
                assert batch.columns["rto_mask"][0, row] == d.depths[read]
        assert len(branches) == len(d.cuts)
        for (first, last), cut in zip(branches, d.cuts, strict=True):
            assert batch.input_ids[0, first:last].tolist() == safe[:-1].tolist()
            assert batch.columns["shift_labels"][0, first:last].tolist() == safe[1:].tolist()
            assert batch.columns["shift_labels"][0, start + len(prompt) - 1 + cut] == safe[0]


@given(
    examples(),
    st.integers(0, 4),
    st.sampled_from(sorted(CUT_POLICIES)),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.integers(0, 3),
)
def test_every_draw_fits_what_was_planned(
    examples: list[Encoded], branches: int, cuts: str, rto_keep: float, epoch: int
) -> None:
    if branches == 0 and rto_keep == 0:
        branches = 1
    collator = DertaCollator(branches=branches, cuts=cuts, rto_keep=rto_keep, seed=3)
    batch = collator(examples, epoch)
    for example, (start, end) in zip(examples, batch.example_bounds, strict=True):
        limit = packed_length(example, collator.objective)
        assert end - start <= limit
        if isinstance(example, EncodedDialogue) or rto_keep == 1.0:
            assert end - start == limit
        read = int(batch.position_ids[0, start:end].max()) + 1
        longest = sequence_length(example, collator.objective)
        assert read <= longest
        if isinstance(example, EncodedDialogue) or (cuts == "zero" and rto_keep == 1.0):
            assert read == longest


def test_the_longest_sequence_is_the_trunk_or_what_a_branch_sees() -> None:
    triple = example_triple(cut_limit=6)  # 3 of prompt, 8 of harmful response, 4 of safe response
    for branches, cuts, rto_keep, expected in (
        (0, "uniform", 1.0, 3 + 8),
        (1, "uniform", 1.0, 3 + 6 + 3),
        (5, "uniform", 1.0, 3 + 6 + 3),
        (1, "uniform", 0.0, 3 + 6 + 3),
        (1, "zero", 0.5, 3 + 8),
        (1, "zero", 0.0, 3 + 3),
    ):
        objective = DertaObjective(branches=branches, cuts=cuts, rto_keep=rto_keep)
        assert sequence_length(triple, objective) == expected, objective


def example_triple(**changes: object) -> EncodedTriple:
    fields = {"prompt": 3, "harmful": 8, "safe": 4}
    tokens = Tokens()
    arrays = {name: tokens(count) for name, count in fields.items()}
    return EncodedTriple(**{"id": "t", "cut_limit": 8, **arrays, **changes})


def test_dtypes_are_those_that_models_and_kernels_expect() -> None:
    expected = {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "visible_until": torch.int32,
        "shift_labels": torch.int64,
        "rto_mask": torch.bool,
        "example_index": torch.int32,
        "depth": torch.int32,
        "depth_tenth": torch.int64,
        "loss_weight": torch.float32,
        "rto_weight": torch.float32,
        "benign": torch.bool,
        "live_rows": torch.int64,
    }
    for batch in (pack(()), DertaCollator()([example_triple()])):
        tensors = {name: t for name, t in vars(batch).items() if isinstance(t, torch.Tensor)}
        tensors |= batch.columns
        assert {name: tensor.dtype for name, tensor in tensors.items()} == expected
        del tensors["live_rows"]
        assert {tensor.shape for tensor in tensors.values()} == {batch.input_ids.shape}


@given(draws())
def test_live_rows_are_those_with_a_target(drawn: list[Drawn]) -> None:
    batch = pack(drawn)
    labels, mask = batch.columns["shift_labels"][0], batch.columns["rto_mask"][0]
    expected = [row for row in range(len(mask)) if mask[row] or labels[row] != -100]
    assert batch.live_rows.tolist() == expected


@given(draws(), st.sampled_from(["uniform", "growing"]))
def test_rows_weigh_what_their_example_and_depth_do(drawn: list[Drawn], policy: str) -> None:
    weights = [1.0 + index for index in range(len(drawn))]
    drawn = [
        replace(d, example=replace(d.example, weight=weight))
        for d, weight in zip(drawn, weights, strict=True)
    ]
    batch = pack(drawn, DertaObjective(rto_depth=policy))
    next_total = rto_total = 0.0
    for d, weight, (start, end) in zip(drawn, weights, batch.example_bounds, strict=True):
        assert set(batch.loss_weight[0, start:end].tolist()) == {weight}
        next_total += weight * int((batch.columns["shift_labels"][0, start:end] != -100).sum())
        rto_total += weight * int(batch.columns["rto_mask"][0, start:end].sum())
        for row in range(start, end):
            depth, expected = int(batch.depth[0, row]), 1.0
            if depth >= 0 and policy == "growing":
                expected = 2 * (depth + 1) / (len(d.example.harmful) + 2)
            assert float(batch.columns["rto_weight"][0, row]) == pytest.approx(expected)
    assert (batch.totals["mle"].weight, batch.totals["rto"].weight) == (next_total, rto_total)


def test_the_empty_pack_is_one_token_without_a_target() -> None:
    batch = pack(())
    assert batch.input_ids.shape == (1, 1)
    assert seen(batch, 0) == [0]
    assert (
        batch.columns["shift_labels"].tolist() == [[-100]] and not batch.columns["rto_mask"].any()
    )
    assert batch.example_ids == () and batch.example_bounds == ((0, 1),)
    assert (batch.totals["mle"].targets, batch.totals["rto"].targets) == (0, 0)
    assert (batch.totals["mle"].weight, batch.totals["rto"].weight) == (0.0, 0.0)


def test_a_plain_sequence_is_laid_out_as_one() -> None:
    collator = DertaCollator(branches=1, cuts="uniform", rto_keep=0)
    batch = collator([example_triple()])
    n = batch.input_ids.shape[1]
    assert batch.visible_until[0].tolist() == [n] * n
    assert batch.position_ids[0].tolist() == list(range(n))


@pytest.mark.parametrize("pinned", [False, True])
def test_a_pack_moves_as_one(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = replace(DertaCollator()([example_triple()]), row_lists={"some": torch.arange(2)})
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    moved = batch.pin_memory() if pinned else batch.to("meta", non_blocking=True)
    for name, value in (*vars(moved).items(), *moved.columns.items(), *moved.row_lists.items()):
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta", name
        elif name not in ("columns", "row_lists"):
            assert value == getattr(batch, name), name
    assert batch.input_ids.device.type == "cpu"
    assert set(batch.model_inputs()) == {
        "input_ids",
        "position_ids",
        "visible_until",
        "shift_labels",
        "rto_mask",
        "loss_weight",
        "rto_weight",
        "live_rows",
        "row_lists",
        "example_bounds",
    }


def test_what_is_drawn_for_an_example_does_not_depend_on_its_company() -> None:
    collator = DertaCollator(branches=2, rto_keep=0.5, seed=5)
    first, second = example_triple(id="a"), example_triple(id="b")

    def labels(batch: PackedBatch, index: int) -> list:
        start, end = batch.example_bounds[index]
        return [
            batch.columns["shift_labels"][0, start:end].tolist(),
            batch.columns["rto_mask"][0, start:end].tolist(),
        ]

    alone, together = collator([first], epoch=1), collator([second, first], epoch=1)
    assert labels(alone, 0) == labels(together, 1)
    assert labels(collator([first], epoch=2), 0) != labels(alone, 0)
    assert labels(collator([second], epoch=1), 0) != labels(alone, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": -1}, "^branches must be at least 0, got -1"),
        ({"rto_keep": 1.5}, r"^rto_keep must lie in \[0, 1\], got 1.5"),
        ({"branches": 0, "rto_keep": 0}, "^branches and rto_keep are both 0: a triple would train"),
    ],
)
def test_a_collator_that_would_train_nothing_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DertaCollator(**changes)


def test_an_unknown_policy_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(ValueError, match="^cuts must be one of zero, uniform"):
        packed_length(example_triple(), DertaObjective(cuts="often"))


@pytest.mark.parametrize("cuts", [[9], [-1], [2, 2], [1, 2]])
def test_impossible_cuts_are_refused(cuts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^cuts of t must be distinct, descending and in 0\.\.8"):
        Drawn(example_triple(), np.array(cuts), np.ones(9, bool))


def test_depths_have_to_match_the_harmful_response() -> None:
    with pytest.raises(ValueError, match=r"^depths of t must have shape \(9,\), got \(8,\)"):
        Drawn(example_triple(), np.array([1]), np.ones(8, bool))
