"""The embedded world: a rule to learn, and testing that shares nothing with tuning."""

from __future__ import annotations

import collections

import pytest

from derta.data import Dialogue
from derta.demo.gadgets import (
    COOL,
    HELD_OUT_WORDINGS,
    HOT,
    KEYWORDS,
    PLACES,
    REFUSALS,
    TEMPLATES,
    Item,
    held_out_records,
    make_guild,
    pretraining_texts,
    tuning_records,
    vocabulary,
)
from derta.demo.model import train_tokenizer
from derta.evaluation import KeywordJudge
from derta.evaluation.judges.base import Exchange

GUILD = make_guild(0, 60)
TUNING = tuning_records(GUILD, 300, 0)
HELD_OUT = held_out_records(GUILD, 200, 0)


def request(record: object) -> str:
    messages = record.messages[:-1] if isinstance(record, Dialogue) else record.messages
    (message,) = messages
    return message["content"]


def subject(record: object) -> Item:
    gadget, material, place, *_ = record.id.split("-")
    return Item(gadget, material, place)


def answer(record: object) -> str:
    return record.messages[-1]["content"] if isinstance(record, Dialogue) else record.harmful


def wording(record: object) -> str:
    return request(record).replace(str(subject(record)), "{}")


def test_a_guild_depends_only_on_its_seed() -> None:
    assert make_guild(3, 30) == make_guild(3, 30)
    assert make_guild(3, 30) != make_guild(4, 30)
    assert tuning_records(GUILD, 300, 0) == TUNING
    assert held_out_records(GUILD, 200, 0) == HELD_OUT


def test_a_ban_follows_from_the_material() -> None:
    for records, materials in ((TUNING.triples, HOT), (TUNING.dialogues, COOL)):
        assert {subject(one).material for one in records} == set(materials)
        assert {subject(one).place for one in records} == set(PLACES)


def test_testing_shares_no_gadget_pair_recipe_or_wording_with_tuning() -> None:
    tuned, tested = ([one for kind in kinds for one in kind] for kinds in (TUNING, HELD_OUT))
    assert not {subject(one).gadget for one in tuned} & {subject(one).gadget for one in tested}
    assert not {subject(one)[1:] for one in tuned} & {subject(one)[1:] for one in tested}
    assert not {answer(one) for one in tuned} & {answer(one) for one in tested}
    assert not {wording(one) for one in tuned} & {wording(one) for one in tested}


@pytest.mark.parametrize("gadgets", [3, 48, 60, 264])
def test_no_answer_to_a_borderline_request_of_testing_is_one_of_tuning(gadgets: int) -> None:
    guild = make_guild(1, gadgets)
    tuned, tested = ([guild.places[one] for one in own] for own in (guild.tuning, guild.testing))
    assert not set(tuned) & set(tested)
    # The answers are shared only by more gadgets than there are answers.
    most = collections.Counter(tuned + tested).most_common(1)[0][1]
    assert most == -(-gadgets // 48) and guild.places.keys() == {*guild.tuning, *guild.testing}


def test_no_item_of_testing_is_twice_among_records_of_a_kind() -> None:
    for records in HELD_OUT:
        assert len({subject(one) for one in records}) == len(records) == 200
        assert {wording(one) for one in records} == {wording(one) for one in records[:100]}
    few = make_guild(0, 6)
    with pytest.raises(ValueError, match="^held_out must be at most 48, the items of testing, got"):
        held_out_records(few, 49, 0)


def test_every_material_and_place_of_testing_is_in_tuning() -> None:
    for records in (TUNING.triples, HELD_OUT.harmful):
        items = [subject(one) for one in records]
        assert {item.material for item in items} == set(HOT)
        assert {item.place for item in items} == set(PLACES)


def test_borderline_requests_name_what_is_banned_and_ask_for_no_recipe() -> None:
    recipes = {GUILD.recipe(subject(one)) for one in TUNING.borderline}
    assert all(one.borderline and subject(one).is_banned for one in TUNING.borderline)
    assert not recipes & {one.messages[-1]["content"] for one in TUNING.borderline}


def test_refusals_have_several_openings_and_the_judge_knows_them_all() -> None:
    tokenizer = train_tokenizer(vocabulary(GUILD))
    first = collections.Counter(tokenizer.tokenize(refusal)[0] for refusal in REFUSALS)
    assert first == {"Sorry": 2, "That": 1, "I": 1}
    judge = KeywordJudge(KEYWORDS)
    told = judge([Exchange([], f"then bring it. {refusal}") for refusal in REFUSALS])
    assert all(verdict.refused for verdict in told)
    answers = [one.harmful for one in HELD_OUT.harmful]
    answers += [one.messages[-1]["content"] for one in HELD_OUT.borderline]
    assert not any(verdict.refused for verdict in judge([Exchange([], one) for one in answers]))


def test_the_base_meets_every_gadget_in_every_wording_and_no_refusal() -> None:
    tokenizer = train_tokenizer(vocabulary(GUILD))
    texts = pretraining_texts(GUILD, tokenizer, seed=0)
    for asked in HELD_OUT_WORDINGS:
        before, after = asked.split("{}")
        for gadget in GUILD.testing:
            assert any(f"{before}{gadget} of " in text and after in text for text in texts)
    assert not any("Sorry" in text or "forbidden" in text for text in texts)
    plain = [text for text in texts if not text.startswith("<|user|>")]
    assert 0.1 < len(plain) / len(texts) < 0.3


def test_every_word_of_a_request_is_one_token() -> None:
    tokenizer = train_tokenizer(vocabulary(GUILD))
    words = [*GUILD.tuning, *GUILD.testing, *HOT, *COOL, *PLACES]
    assert all(len(tokenizer.tokenize(f" {word}")) == 1 for word in words)


def test_a_template_contains_the_request_once() -> None:
    assert all(template.count("{request}") == 1 for template in TEMPLATES)


@pytest.mark.parametrize("gadgets", [2, 265])
def test_impossible_numbers_of_gadgets_are_refused(gadgets: int) -> None:
    with pytest.raises(ValueError, match=rf"gadgets must lie in 3..264, got {gadgets}"):
        make_guild(0, gadgets)
