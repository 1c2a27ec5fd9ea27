"""The refusal token is the one that starts a refusal in the context of the chat template."""

from __future__ import annotations

import pytest

from derta.data import Triple, resolve_refusal_token


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
