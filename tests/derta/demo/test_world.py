"""The demo's world: new for every seed, with honest held-out data."""

from __future__ import annotations

import pytest

from derta.data import Dialogue
from derta.demo.model import train_tokenizer
from derta.demo.world import (
    BORDERLINE_HELD_OUT_WORDINGS,
    BORDERLINE_TUNING_WORDINGS,
    REFUSALS,
    TEMPLATES,
    TUNING_WORDINGS,
    held_out_records,
    make_world,
    tuning_records,
)


def test_a_world_depends_only_on_its_seed() -> None:
    assert make_world(3, 30) == make_world(3, 30)
    assert make_world(3, 30) != make_world(4, 30)
    world = make_world(3, 30)
    assert tuning_records(world, 3) == tuning_records(world, 3)
    assert held_out_records(world, 20, 3) == held_out_records(world, 20, 3)


def test_a_third_of_the_gadgets_is_forbidden_and_no_gadget_is_both() -> None:
    world = make_world(0, 120)
    assert len(world.forbidden) == 40
    assert not set(world.forbidden) & set(world.allowed)
    assert set(world.gadgets) == set(world.recipes)


def test_recipes_do_not_reveal_forbidden_gadgets() -> None:
    world = make_world(0, 120)

    def words(gadgets: tuple[str, ...]) -> set[str]:
        return {word.strip(",.") for gadget in gadgets for word in world.recipes[gadget].split()}

    assert words(world.forbidden) == words(world.allowed)


def test_held_out_wordings_are_not_in_the_tuning_data() -> None:
    world = make_world(0, 120)
    tuned = {_request(record) for records in tuning_records(world, 0) for record in records}
    tuned |= {_request(record) for record in world.borderline(BORDERLINE_TUNING_WORDINGS)}
    harmful, benign, borderline = held_out_records(world, 240, 0)
    asked = {_request(record) for record in (*harmful, *benign, *borderline)}
    assert len(asked) == 720
    assert not tuned & asked
    for records, gadgets in (
        (harmful, world.forbidden),
        (benign, world.allowed),
        (borderline, world.forbidden),
    ):
        assert all(any(gadget in _request(one) for gadget in gadgets) for one in records)


def test_borderline_requests_ask_for_no_recipe() -> None:
    world = make_world(0, 120)
    wordings = (*BORDERLINE_TUNING_WORDINGS, *BORDERLINE_HELD_OUT_WORDINGS)
    dialogues = world.borderline(wordings)
    assert len(dialogues) == 40 * len(wordings) and all(one.borderline for one in dialogues)
    assert {one.messages[-1]["content"] for one in dialogues} == {
        world.places[gadget] for gadget in world.forbidden
    }


def test_a_template_contains_the_request_once() -> None:
    for template in TEMPLATES:
        assert template.count("{request}") == 1


def test_tuning_covers_every_gadget_and_half_of_it_are_triples() -> None:
    world = make_world(0, 120)
    triples, dialogues = tuning_records(world, 0)
    assert len(triples) == len(dialogues) == 40 * len(TUNING_WORDINGS)
    text = " ".join(_request(record) for record in (*triples, *dialogues))
    assert all(gadget in text for gadget in world.gadgets)


def test_every_gadget_and_the_refusal_are_one_token() -> None:
    world = make_world(1, 120)
    tokenizer = train_tokenizer(world)
    assert all(len(tokenizer.tokenize(f" {gadget}")) == 1 for gadget in world.gadgets)
    assert {tokenizer.tokenize(refusal)[0] for refusal in REFUSALS} == {"Sorry"}


@pytest.mark.parametrize("gadgets", [2, 265])
def test_impossible_numbers_of_gadgets_are_refused(gadgets: int) -> None:
    with pytest.raises(ValueError, match=rf"gadgets must lie in 3..264, got {gadgets}"):
        make_world(0, gadgets)


def _request(record: object) -> str:
    messages = record.messages[:-1] if isinstance(record, Dialogue) else record.messages
    (message,) = messages
    return message["content"]
