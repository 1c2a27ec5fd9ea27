"""Special tokens in texts of records are plain text, and nothing else changes."""

from __future__ import annotations

import copy
import random
import re

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AddedToken

from derta.data import Chat, Dialogue, Encoder, Rendered, Triple
from derta.data.records.types import Request
from derta.data.tokens.special import (
    COMMON,
    SpecialTokenCount,
    SpecialTokens,
    listed_tokens,
    unquoted,
)
from marked import MARKS, marked

PROMISE = "Special tokens in texts of records become plain text."
LIMITS = dict(max_length=10_000, max_tokens=10_000, branches=1, cuts="uniform")
# Words, borders where tokenizers merge, parts of marks, and the characters that quoting uses.
PLAIN = ["the ladder", " fence", "Sorry", ",", ".\n\n", "\n", "  ", "é", "🪜", "<think>", "user"]
PARTS = ["<", "<|", "|>", "</", "s>", "of_turn>", "[/", "INST]", "\ufdd0", "\ufdd1", "\ufdd2"]


def text(rng: random.Random, pieces: list[str]) -> str:
    """Draw a text that the templates, which trim, leave as it is."""
    drawn = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 9)))
    return drawn.strip() or "paint"


def records(style: str, count: int, *, special: bool) -> list[Triple | Dialogue]:
    rng = random.Random(f"{style} {special}")
    pieces = PLAIN + PARTS
    if special:
        pieces = pieces + 3 * [pair[0] for pair in MARKS[style].values()]

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": text(rng, pieces)}

    made: list[Triple | Dialogue] = []
    for place in range(0, count, 2):
        asked = [turn("user"), turn("assistant"), turn("user")][rng.choice([0, 2]) :]
        safe, harmful = text(rng, pieces), text(rng, pieces)
        made.append(Triple(messages=asked, safe=safe, harmful=harmful, id=f"t{place}"))
        answered = [turn("user"), turn("assistant")] * rng.randint(1, 2)
        made.append(Dialogue(messages=answered, id=f"d{place}"))
    return made


def assert_equal(one: object, other: object) -> None:
    for name, value in vars(one).items():
        assert np.array_equal(getattr(other, name), value), name


def ids_of(tokenizer, marks: list[str]) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(mark) for mark in marks]


@pytest.mark.promise(PROMISE)
@pytest.mark.parametrize("style", MARKS)
@pytest.mark.parametrize("cuts", ["uniform", "official"])
def test_records_read_as_if_their_marks_were_no_tokens(
    style: str, cuts: str, record_property
) -> None:
    """The oracle differs in its marks alone, so it reads those of the texts as plain text."""
    encoder, oracle = (
        Encoder(marked(style, other), **{**LIMITS, "cuts": cuts}) for other in (False, True)
    )
    made = records(style, 200, special=True)
    for record, one, other in zip(
        made, encoder.encode_many(made), oracle.encode_many(made), strict=True
    ):
        assert_equal(one, other)
        assert one.id == record.id
    record_property("cases", len(made))


@pytest.mark.promise(PROMISE)
@pytest.mark.parametrize("style", MARKS)
def test_the_templates_own_marks_stay_tokens(style: str) -> None:
    tokenizer = marked(style)
    marks = [pair[0] for pair in MARKS[style].values()]
    controls = set(ids_of(tokenizer, marks))
    chat = Chat(tokenizer)

    def written(content: str) -> list[int]:
        messages = [{"role": "user", "content": content}]
        ids = [*chat.prompt_ids(messages), *chat.response_ids(messages, content)]
        return [id for id in ids if id in controls]

    assert written(" ".join(["paint", *marks, "well"])) == written("the ladder") != []


@pytest.mark.promise(PROMISE)
@pytest.mark.parametrize("style", MARKS)
def test_plain_marks_decode_to_the_same_text(style: str, record_property) -> None:
    rng = random.Random(style)
    chat = Chat(marked(style))
    pieces = PLAIN + PARTS + 3 * [pair[0] for pair in MARKS[style].values()]
    for _ in range(100):
        # As elsewhere, sentencepiece's first space is lost, and NFC composes letters.
        drawn = text(rng, pieces)
        assert chat.tokenizer.decode(chat.text_ids(drawn)) == drawn
    record_property("cases", 100)


@pytest.mark.parametrize("style", MARKS)
def test_texts_without_special_tokens_read_as_ever(style: str, record_property) -> None:
    """Both ways: through the tokenizer, and through its copy, which marked texts take."""
    tokenizer = marked(style)
    chat = Chat(tokenizer)
    cases = 0
    for record in records(style, 200, special=False):
        asked = list(record.messages)[: 1 if isinstance(record, Dialogue) else None]
        rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        if any(chat.special.pattern.search(one["content"]) for one in asked):
            continue  # parts have formed a mark
        expected = tokenizer(rendered, add_special_tokens=False).input_ids
        assert chat.prompt_ids(asked) == expected
        cases += 1
    record_property("cases", cases)


@pytest.mark.promise(PROMISE)
def test_two_messages_never_form_a_special_token_together() -> None:
    tokenizer = marked("unigram")
    chat = Chat(tokenizer)
    system, user = {"role": "system", "content": "the <|us"}, {"role": "user", "content": "er|>"}
    ids = chat.prompt_ids([system, user])
    (mark,) = ids_of(tokenizer, ["<|user|>"])
    rendered = tokenizer.apply_chat_template([system, user], tokenize=False)
    assert tokenizer(rendered, add_special_tokens=False).input_ids.count(mark) == 2
    assert ids.count(mark) == 1
    assert tokenizer.decode(ids) == rendered + "<|assistant|>"


def test_overlapping_marks_are_all_broken() -> None:
    tokenizer = copy.deepcopy(marked("chatml"))
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("<|a", "a|>")])
    special = SpecialTokens(tokenizer)
    assert not special.pattern.search(special.quote("<|a|>"))
    marks = set(ids_of(tokenizer, ["<|a", "a|>"]))
    assert marks.isdisjoint(special.encode([special.quote("<|a|>")])[0])


@pytest.mark.promise(PROMISE)
def test_tokens_found_in_normalized_text_are_covered_too() -> None:
    """Full-width letters become a special token only once NFKC has folded them."""
    tokenizer = copy.deepcopy(marked("chatml"))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|halt|>", special=True, normalized=True)]}
    )
    (mark,) = ids_of(tokenizer, ["<|halt|>"])
    folded = "the ＜｜ｈａｌｔ｜＞ fence"
    assert mark in tokenizer(folded).input_ids
    assert mark not in Chat(tokenizer).text_ids(folded)
    assert mark in Chat(tokenizer, "keep").text_ids(folded)


def test_a_single_word_token_is_one_only_between_words() -> None:
    tokenizer = copy.deepcopy(marked("chatml"))
    tokenizer.add_tokens([AddedToken("halt", special=True, single_word=True, normalized=False)])
    (mark,) = ids_of(tokenizer, ["halt"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", " halt.<|im_end|>")
    chat = Chat(tokenizer)
    messages = [{"role": "user", "content": "halt halting <|im_end|>"}]
    assert chat.prompt_ids(messages).count(mark) == 1
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(chat.prompt_ids(messages)) == rendered


def test_tokens_that_a_model_may_say_stay_tokens() -> None:
    tokenizer = marked("chatml")
    (think,) = ids_of(tokenizer, ["<think>"])
    messages = [{"role": "user", "content": "<think><|im_end|>"}]
    assert Chat(tokenizer).prompt_ids(messages).count(think) == 1
    declaring = copy.deepcopy(tokenizer)
    declaring.chat_control_tokens = ["<think>"]
    assert think not in Chat(declaring).prompt_ids(messages)


def test_a_longer_token_of_the_template_is_not_taken_apart() -> None:
    tokenizer = copy.deepcopy(marked("chatml"))
    tokenizer.add_tokens([AddedToken("<|im_start|>user", special=False, normalized=False)])
    (mark,) = ids_of(tokenizer, ["<|im_start|>user"])
    messages = [{"role": "user", "content": "the <|im_start|>user <|im_end|>"}]
    ids = Chat(tokenizer).prompt_ids(messages)
    assert ids[0] == mark and ids.count(mark) == 1


def test_a_template_token_that_the_tokenizer_overlooks_is_an_error() -> None:
    """As old Llama files do: "</s>" is found after a space alone, since spaces are normalized."""
    tokenizer = copy.deepcopy(marked("mistral"))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.add_tokens([AddedToken("<halt>", special=True, normalized=True)])
    special = SpecialTokens(tokenizer)
    assert special.encode([special.quote("the <halt>") + " <halt>"])
    with pytest.raises(ValueError, match=r"^the tokenizer overlooks a special token of chat_templ"):
        special.encode([special.quote("the <halt>") + "x<halt>"])


MARKED = [{"role": "user", "content": "paint <|im_end|> well"}]


@pytest.mark.promise(PROMISE)
@pytest.mark.parametrize(
    ("record", "field"),
    [
        (Triple(messages=MARKED, safe="no", harmful="yes", id="a"), "prompt"),
        (Triple(prompt="how", safe="no<|im_end|>", harmful="yes", id="a"), "safe"),
        (Triple(prompt="how", safe="no", harmful="<|im_start|>", id="a"), "harmful"),
        (
            Dialogue(messages=[*MARKED, {"role": "assistant", "content": "yes"}], id="a"),
            "messages[0].content",
        ),
    ],
)
def test_refused_special_tokens_name_record_and_field(record, field: str) -> None:
    encoder = Encoder(marked("chatml"), **LIMITS, special_tokens_in_text="refuse")
    with pytest.raises(ValueError, match=rf"^a: {re.escape(field)}: has the special token '<\|im_"):
        encoder.encode(record)
    assert Encoder(marked("chatml"), **LIMITS).encode(record) is not None
    rendered = Rendered(prefix="the <|im_start|>", text="fence<|im_end|>", rto=False, id="r")
    assert encoder.encode(rendered) is not None


def test_kept_special_tokens_read_as_ever() -> None:
    tokenizer = marked("chatml")
    chat = Chat(tokenizer, "keep")
    messages = [{"role": "user", "content": "paint <|im_end|>\ufdd0 \ufdd1\ufdd2 well"}]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert chat.prompt_ids(messages) == expected
    assert chat.text_ids("a<|im_end|>") == tokenizer("a<|im_end|>").input_ids


def test_rendered_rows_keep_their_marks() -> None:
    tokenizer = marked("chatml")
    row = Rendered(
        prefix="<|im_start|>user\nthe \ufdd0<|im_end|>", text="fence<|im_end|>", rto=False, id="r"
    )
    encoded = Encoder(tokenizer, **LIMITS).encode(row)
    assert encoded.input_ids.tolist() == tokenizer(row.prefix + row.text).input_ids


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="special_tokens_in_text must be one of plain, refuse, ke"):
        Chat(marked("chatml"), "drop")  # type: ignore[arg-type]


def test_a_slow_tokenizer_refuses_texts_with_special_tokens() -> None:
    tokenizer = copy.deepcopy(marked("chatml"))
    tokenizer.__class__ = type("SlowTokenizer", (type(tokenizer),), {"is_fast": False})
    encoder = Encoder(tokenizer, **LIMITS)
    fast = Encoder(marked("chatml"), **LIMITS)
    record = Triple(prompt="the <\ufdd0", safe="no", harmful="yes", id="a")
    assert_equal(encoder.encode(record), fast.encode(record))
    with pytest.raises(
        ValueError, match=r"^a: a text has .*'<\|im_end\|>', which only a fast .*Sl"
    ):
        encoder.encode(Triple(messages=MARKED, safe="no", harmful="yes", id="a"))


def test_quoting_is_undone_whatever_a_text_holds(record_property) -> None:
    rng = random.Random(0)
    special = SpecialTokens(marked("chatml"))
    pieces = [*PARTS, "\ufdd3", "<|im_end|>", "a"]
    for _ in range(500):
        drawn = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))
        assert unquoted(special.quote(drawn)) == drawn == unquoted(special.verbatim(drawn))
    record_property("cases", 500)


def test_special_tokens_are_counted_by_record_and_token() -> None:
    count = SpecialTokenCount(COMMON)
    asked = "paint </s> <|end|><|assistant|>"
    assert count.add(Triple(prompt=asked, safe="no", harmful="<|end|>", id="a")) == [
        "prompt",
        "harmful",
    ]
    assert count.add(Request(prompt="the | fence <of> 3 < 4", id="b")) == []
    assert count.add(Request(prompt="how", prefill="<start_of_turn>", id="c")) == ["prefill"]
    said = "2 records (<|end|> 2, </s> 1, <|assistant|> 1, <start_of_turn> 1)"
    assert listed_tokens(count.records, count.tokens) == said
    assert listed_tokens(1, {"<a>": 1, "<b>": 2}, most=1) == "1 records (<b> 2, ...)"
    assert listed_tokens(0, {}) == "0 records"
