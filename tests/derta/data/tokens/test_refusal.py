"""The refusal token is the one that starts a refusal in the context of the chat template."""

from __future__ import annotations

from collections import Counter

import pytest

from derta.data import Chat, Triple, choose_refusal_set, resolve_refusal_token


def triples(*safe: str) -> list[Triple]:
    return [
        Triple(prompt=f"How do I paint {n}?", safe=text, harmful="Sure.", id=f"t{n}")
        for n, text in enumerate(safe)
    ]


@pytest.mark.parametrize(("style", "piece"), [("llama3", "Sorry"), ("mistral", "ĠSorry")])
def test_a_word_becomes_the_token_that_starts_a_response(templated, style: str, piece: str) -> None:
    tokenizer = templated(style)
    token = resolve_refusal_token(tokenizer, "Sorry")
    assert token.id == tokenizer.convert_tokens_to_ids(piece)
    assert token.text.strip() == "Sorry"
    assert token.safe_start_share == 0 and token.common_start is None
    assert token.warning is None


@pytest.mark.parametrize("style", ["llama3", "mistral", "chatml"])
def test_auto_is_the_most_common_first_token_of_the_safe_responses(templated, style: str) -> None:
    tokenizer = templated(style)
    answers = triples("First no.", "Sorry, no.", " Sorry!" if style != "chatml" else "Sorry!")
    token = resolve_refusal_token(tokenizer, "auto", answers)
    assert token == resolve_refusal_token(tokenizer, "Sorry", answers)
    assert token == resolve_refusal_token(tokenizer, token.id, answers)
    assert token.safe_start_share == pytest.approx(2 / 3)
    assert token.warning is None
    assert str(token) == f"{token.text!r} (id {token.id})"


def test_a_token_that_the_safe_responses_do_not_start_with_gives_a_warning(templated) -> None:
    tokenizer = templated("llama3")
    bare, spaced = tokenizer.convert_tokens_to_ids(["Sorry", "ĠSorry"])
    token = resolve_refusal_token(tokenizer, spaced, triples("Sorry.", "Sorry!", "No.", "Sorry?"))
    assert (token.id, token.text, token.safe_start_share) == (spaced, " Sorry", 0)
    assert (token.common_start, token.common_start_share) == (bare, 0.75)
    assert str(token) == token.warning
    assert token.warning.startswith(
        f"RTO trains ' Sorry' (id {spaced}), but only 0% of the safe responses start with it; "
        f"75% start with 'Sorry' (id {bare}): set refusal to that id"
    )


@pytest.mark.parametrize(
    ("refusal", "error", "message"),
    [
        ("auto", ValueError, "^refusal='auto' needs triples to read: give a word or a token id"),
        ("", ValueError, "^refusal must be a word without spaces around it, got ''"),
        (" Sorry", ValueError, "^refusal must be a word without spaces around it, got ' Sorry'"),
        (
            "Sorrow",
            ValueError,
            r"^refusal must be one token, but 'Sorrow' is 4, \['S', 'or', 'r', 'ow'\] with ids "
            r"\[54, 274, 85, 266\]: give another word, or the id of its first piece, 54",
        ),
        (-1, ValueError, r"^refusal must be a token id in 0\.\.403, got -1"),
        (404, ValueError, r"^refusal must be a token id in 0\.\.403, got 404"),
        (True, TypeError, "^refusal must be a word, a token id or 'auto', got bool"),
        (None, TypeError, "^refusal must be a word, a token id or 'auto', got NoneType"),
    ],
)
def test_anything_but_one_token_is_refused(
    templated, refusal: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve_refusal_token(templated("llama3"), refusal)


def test_a_word_that_the_tokenizer_changes_is_refused(templated) -> None:
    with pytest.raises(ValueError, match="'SORRY' becomes id .*, which decodes to 'Sorry': the"):
        resolve_refusal_token(templated("loud"), "SORRY")


def test_a_triple_rejected_by_the_template_is_named(templated) -> None:
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "How?"}]
    triple = Triple(messages=messages, safe="Sorry.", harmful="Sure.", id="t")
    with pytest.raises(ValueError, match="^t: chat_template rejects the messages: only user"):
        resolve_refusal_token(templated("mistral"), "auto", [triple])


def test_a_set_is_one_token_several_or_those_that_safe_responses_start_with(templated) -> None:
    chat = Chat(templated("llama3"))
    sorry = chat.tokenizer.convert_tokens_to_ids("Sorry")
    no, rare = 7, 9  # no is "$"
    starts = Counter({rare: 1, no: 60, sorry: 139})
    one = choose_refusal_set(chat, "Sorry", None, starts)
    assert one.target == sorry and str(one) == f"refusal token 'Sorry' (id {sorry})"
    given = choose_refusal_set(chat, "auto", [no, "Sorry"], starts)
    assert given.target == tuple(sorted((no, sorry))) and given.warning is None
    assert given.safe_start_share == pytest.approx(199 / 200)
    assert str(given) == f"refusal tokens '$' (id {no}), 'Sorry' (id {sorry})"
    # The third token starts 1 of 200, less than 1%.
    found = choose_refusal_set(chat, "auto", "auto", starts)
    assert [token.id for token in found.tokens] == [sorry, no]
    ten = Counter({id: 20 - id for id in range(10, 20)})
    assert choose_refusal_set(chat, "auto", "auto", ten).target == tuple(range(10, 18))
    untaught = choose_refusal_set(chat, "auto", ["Sorry", 8], starts)
    assert untaught.warning is not None and untaught.warning.startswith(
        "RTO trains '%' (id 8) too, but no safe response starts so, and nothing teaches the model"
    )
    others = choose_refusal_set(chat, "auto", [rare, no], starts)
    assert others.warning is not None and others.warning.endswith(
        f"only 30% of the safe responses start with one of them; 70% start with 'Sorry' (id "
        f"{sorry}): add that id to refusal_tokens"
    )


def test_a_set_that_is_none_is_refused(templated) -> None:
    chat = Chat(templated("llama3"))
    sorry = chat.tokenizer.convert_tokens_to_ids("Sorry")
    message = (
        rf"^refusal_tokens must be distinct tokens, got 'Sorry' and {sorry}, both 'Sorry' \(id"
    )
    with pytest.raises(ValueError, match=message):
        choose_refusal_set(chat, "auto", ["Sorry", sorry], Counter())
    with pytest.raises(ValueError, match="refusal='auto' needs triples to read"):
        choose_refusal_set(chat, "auto", "auto", Counter())
