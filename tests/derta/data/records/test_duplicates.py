"""Duplicates are found however they are written, and no distant pair is called near."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable

import pytest

from derta.data import Dialogue, Rendered, Request, Triple
from derta.data.records.duplicates import (
    Fingerprint,
    RequestIndex,
    digest,
    jaccard,
    normalized,
    user_turns,
)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("How do I paint a fence?", "  how DO i\n\tpaint a fence "),
        ("Well-known: paint!", "well known paint"),
        ("ｐａｉｎｔ ﬁve fences", "paint five fences"),
        ("Straße", "STRASSE"),
        ("paint\u200bbrush\u00ad", "paintbrush"),
        ("¿Cómo?", "co\u0301mo"),
    ],
)
def test_spelling_variants_are_the_same_text(text: str, same: str) -> None:
    assert normalized(text) == normalized(same)


@pytest.mark.parametrize(
    ("text", "other"), [("C++", "C"), ("कि", "की"), ("?", "!"), ("2 < 3", "2 3")]
)
def test_different_texts_stay_different(text: str, other: str) -> None:
    assert normalized(text) != normalized(other)


def test_text_boundaries_count() -> None:
    assert digest(["a b", "c"]) == digest(["A  b!", "c"])
    assert len({digest(["a b", "c"]), digest(["a", "b c"]), digest(["a b c"])}) == 3


def test_a_request_consists_of_the_users_messages() -> None:
    system = {"role": "system", "content": "Be kind."}
    ask = {"role": "user", "content": "How?"}
    say = {"role": "assistant", "content": "So."}
    assert user_turns(Triple(prompt="How?", safe="Sorry.", harmful="So.", id="1")) == ["How?"]
    assert user_turns(Dialogue(messages=[system, ask, say, ask, say], id="1")) == ["How?", "How?"]
    assert user_turns(Dialogue(messages=[system, say], id="1")) == ["Be kind."]
    assert user_turns(Request(messages=[system, ask], id="1")) == ["How?"]
    for prefix in (r"[INST] How? [\INST] So", "[INST] How? [/INST]"):
        (turn,) = user_turns(Rendered(prefix=prefix, text=" Sorry.", rto=False, id="1"))
        assert turn == " How? "
    plain = Rendered(prefix="User: How?", text=" Sorry.", rto=True, id="1")
    assert user_turns(plain) == ["User: How?"]


def variants(count: int) -> list[str]:
    """Return texts of which many are near to others, at every distance, and some are equal."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(400)]
    texts: list[str] = []
    for place in range(count):
        if place % 4 == 0:
            texts.append(" ".join(rng.choices(words, k=rng.randint(1, 30))))
            continue
        changed = rng.choice(texts).split()
        for _ in range(rng.randint(0, 3)):
            changed[rng.randrange(len(changed))] = rng.choice(words)
        texts.append(" ".join(changed))
    return texts


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 2]) for i in range(max(1, len(words) - 1))}


@pytest.mark.promise("Every near request is found, and no distant one is called near.")
@pytest.mark.parametrize("near", [0.5, 0.7, 0.9, 1.0])
def test_near_requests_match_brute_force(
    near: float, record_property: Callable[[str, object], None]
) -> None:
    texts = variants(300)
    index = RequestIndex(near)
    found: dict[tuple[str, str], float] = {}
    expected: dict[tuple[str, str], float] = {}
    distinct: dict[str, str] = {}
    for place, text in enumerate(texts):
        request = Fingerprint([text])
        for match in index.matches(request):
            found[str(place), match.id] = match.similarity
            assert match.exact == (texts[int(match.id)] == text)
        for other, id in distinct.items():
            one, two = shingles(text), shingles(other)
            similarity = len(one & two) / len(one | two)
            if similarity >= near or text == other:
                expected[str(place), id] = similarity
        assert index.has_match(request) == bool(index.matches(request))
        index.add(str(place), request)
        distinct.setdefault(text, str(place))
    record_property("cases", len(texts) * (len(texts) - 1) // 2)
    assert len(expected) > 50
    assert found == expected
    assert len(index) == len(distinct)


def one_template(middle: str) -> Callable[[int], str]:
    words = "please tell me how the people of the town paint their tall garden fences".split()
    return lambda place: " ".join([*words, middle.format(place), *reversed(words)])


def some_words(place: int) -> str:
    return " ".join(random.Random(place).choices([f"word{i}" for i in range(300)], k=12))


ALIKE: dict[str, Callable[[int], str]] = {
    "near": one_template("{}"),
    "just not near": one_template("{0} {0}a {0}b {0}c {0}d {0}e"),
    "far": some_words,
}


@pytest.mark.promise("The work to find near requests grows with their number, not its square.")
@pytest.mark.parametrize("text_of", ALIKE.values(), ids=ALIKE.keys())
@pytest.mark.parametrize("each_in_turn", [False, True])
def test_a_request_is_compared_with_few_however_many_are_alike(
    text_of: Callable[[int], str], each_in_turn: bool
) -> None:
    """In turn, as statistics do; or half of them first, as a held-out part is."""
    requests = [Fingerprint([text_of(place)]) for place in range(1_000)]
    index = RequestIndex()
    found = 0
    for place, request in enumerate(requests):
        is_asked = each_in_turn or place >= len(requests) // 2
        found += is_asked and index.has_match(request)
        if each_in_turn or not is_asked:
            index.add(str(place), request)
    assert index.compared < 40 * len(requests)
    if text_of is ALIKE["near"]:
        assert found == (len(requests) - 1 if each_in_turn else len(requests) // 2)
    else:
        assert found == 0


def test_matches_are_sorted_equal_first_then_nearest() -> None:
    index = RequestIndex(0.5)
    words = "one two three four five six seven eight nine ten".split()
    for id, text in {"a": words[:8], "b": words[:9], "c": words, "d": words[::-1]}.items():
        index.add(id, Fingerprint([" ".join(text)]))
    matches = index.matches(Fingerprint(["One, two, three four five six seven eight nine ten!"]))
    assert [(match.id, match.exact) for match in matches] == [
        ("c", True),
        ("b", False),
        ("a", False),
    ]
    assert [match.similarity for match in matches] == [1, 8 / 9, 7 / 9]
    exact = RequestIndex(None)
    exact.add("a", Fingerprint(["one two three"]))
    assert exact.matches(Fingerprint(["one two three four"])) == []
    assert [match.id for match in exact.matches(Fingerprint(["One two: three"]))] == ["a"]


def test_similarity_counts_shared_shingles() -> None:
    assert jaccard({1, 2, 3}, [2, 3, 4, 5]) == 2 / 5


@pytest.mark.parametrize(("near", "bytes_a_row"), [(None, 300), (0.7, 2_200)])
def test_a_row_takes_no_more_memory_than_documented(near: float | None, bytes_a_row: int) -> None:
    rng = random.Random(0)
    texts = [" ".join(str(rng.random()) for _ in range(25)) for _ in range(300)]
    index = RequestIndex(near)
    index.add("warm", Fingerprint(["warm"]))
    tracemalloc.start()
    try:
        for place, text in enumerate(texts):
            index.add(f"rows.jsonl:{place}", Fingerprint([text]))
        index.has_match(Fingerprint(["another"]))  # which arranges them
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / len(texts) < bytes_a_row


@pytest.mark.parametrize("near", [0.4, 1.1])
def test_a_similarity_out_of_reach_is_refused(near: float) -> None:
    with pytest.raises(ValueError, match=r"^near must lie in \[0.5, 1\], or be null .*, got"):
        RequestIndex(near)
