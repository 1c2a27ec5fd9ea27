"""Token ids are those of the chat as the model will see it, for any template."""

from __future__ import annotations

import copy
import itertools
import re

import numpy as np
import pytest
from tokenizers import processors

from derta.data import (
    Chat,
    DertaCollator,
    Dialogue,
    EncodedDialogue,
    EncodedTriple,
    Encoder,
    Rendered,
    Triple,
    packed_length,
)
from derta.data.tokens.chat import BATCH

SYSTEM = {"role": "system", "content": "You are the wizards."}
ASK = {"role": "user", "content": "How do I paint the fence green?"}
SAY = {"role": "assistant", "content": "First buy a brush."}
MORE = {"role": "user", "content": "Then?"}
END = {"role": "assistant", "content": "Open the paint."}

CONVERSATIONS = {"single": [ASK], "multi": [ASK, SAY, MORE], "system": [SYSTEM, ASK]}
SAFE = "Sorry, I cannot help."
HARMFUL = "Sure, here is how: step one, take the ladder."

# Each template's form of a response, and its closing text.
STYLES = {
    "llama3": ("{}", "<|eot_id|>"),
    "chatml": ("{}", "<|im_end|>"),
    "mistral": (" {}", "<|eot_id|>"),
    "silent": ("{}", "<|im_end|>"),
    "plain": (" {}", "\n\n<|eot_id|>"),
    "textual": ("{}", "<|stop|>\n<|eot_id|>"),
    "thinking": ("{}", "<|im_end|>"),
}
# Templates that close a response with no special token: the end-of-sequence token is appended.
APPENDED = ("plain", "textual")
ENDLESS = dict(max_length=10_000, max_tokens=10_000, branches=1, cuts="uniform")


def triple(**changes: object) -> Triple:
    return Triple(**{"messages": [ASK], "safe": SAFE, "harmful": HARMFUL, "id": "t", **changes})


@pytest.mark.parametrize(
    ("style", "conversation"),
    [pair for pair in itertools.product(STYLES, CONVERSATIONS) if pair != ("mistral", "system")],
)
def test_a_triple_decodes_to_its_rendered_chat(templated, style: str, conversation: str) -> None:
    tokenizer, messages = templated(style), CONVERSATIONS[conversation]
    encoded = Encoder(tokenizer, **ENDLESS).encode(triple(messages=messages))
    assert isinstance(encoded, EncodedTriple) and encoded.id == "t"
    response, closing = STYLES[style]
    rendered = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": SAFE}], tokenize=False
    )
    prompt, _, _ = rendered.rpartition(response.format(SAFE))
    assert tokenizer.decode(encoded.prompt) == prompt
    assert tokenizer.decode(encoded.safe) == response.format(SAFE) + closing
    assert tokenizer.decode(encoded.harmful) == response.format(HARMFUL)
    assert encoded.cut_limit == len(encoded.harmful)
    assert {array.dtype.name for array in (encoded.prompt, encoded.safe)} == {"int32"}
    # No token straddles a border here, so the whole rendered text has the same tokens.
    whole = tokenizer(rendered, add_special_tokens=False).input_ids
    ids = [*encoded.prompt, *encoded.safe]
    assert ids[: len(whole)] == whole[: len(ids)]


@pytest.mark.parametrize("style", STYLES)
def test_a_harmful_response_is_closed_on_request_and_never_cut_within_its_closing_tokens(
    templated, style: str
) -> None:
    tokenizer = templated(style)
    plain = Encoder(tokenizer, **ENDLESS).encode(triple())
    closed = Encoder(tokenizer, **ENDLESS, closes_harmful=True).encode(triple())
    response, closing = STYLES[style]
    assert tokenizer.decode(closed.harmful) == response.format(HARMFUL) + closing
    assert closed.closing == len(closed.harmful) - len(plain.harmful)
    assert (closed.cut_limit, plain.closing) == (plain.cut_limit, 0)
    assert closed.safe.tolist() == plain.safe.tolist()
    # Refusal is not trained, or watched, after the end.
    watched = DertaCollator(branches=0)([closed])
    assert watched.columns["rto_mask"].sum() == len(plain.harmful) + 1
    for lost in range(1, len(closed.harmful) + 1):
        most = len(closed.prompt) + len(closed.harmful) - lost
        limits = {**ENDLESS, "max_length": max(most, len(closed.prompt) + len(closed.safe))}
        cut = Encoder(tokenizer, **limits, closes_harmful=True).encode(triple())
        room = limits["max_length"] - len(closed.prompt)
        assert cut.harmful.tolist() == closed.harmful.tolist()[:room]
        assert cut.closing == max(0, closed.closing - max(0, len(closed.harmful) - room))
        assert cut.cut_limit <= len(cut.harmful) - max(1, cut.closing)
    nothing = {**ENDLESS, "max_tokens": len(closed.prompt) + len(closed.safe) - 1}
    assert Encoder(tokenizer, **nothing).encode(triple()).cut_limit == 0
    assert Encoder(tokenizer, **nothing, closes_harmful=True).encode(triple()) is None


@pytest.mark.parametrize("style", sorted(STYLES.keys() - {"thinking"}))
def test_a_dialogues_targets_are_the_assistants_messages(templated, style: str) -> None:
    tokenizer = templated(style)
    encoder = Encoder(tokenizer, **ENDLESS)
    dialogue = Dialogue(messages=[ASK, SAY, MORE, END], id="d")
    encoded = encoder.encode(dialogue)
    assert isinstance(encoded, EncodedDialogue) and encoded.id == "d"
    response, closing = STYLES[style]
    said = response.format(SAY["content"]) + closing
    if style in APPENDED:
        said = said.removesuffix(tokenizer.eos_token)
    said += response.format(END["content"]) + closing
    assert tokenizer.decode(encoded.input_ids[encoded.is_target]) == said
    assert encoded.is_target[-1] and not encoded.is_target[0]
    one_turn = encoder.encode(Dialogue(messages=[ASK, SAY], id="d"))
    as_triple = encoder.encode(triple(safe=SAY["content"]))
    assert one_turn.input_ids.tolist() == [*as_triple.prompt, *as_triple.safe]
    assert one_turn.is_target.sum() == len(as_triple.safe)


@pytest.mark.parametrize("style", sorted(STYLES.keys() - {"thinking"}))
@pytest.mark.parametrize("turns", [1, 2, 4])
def test_a_dialogue_has_the_token_ids_of_its_template(templated, style: str, turns: int) -> None:
    messages = [ASK, SAY, MORE, END, *[MORE, SAY] * (turns - 2)][: 2 * turns]
    assert_reads_as_its_template(templated(style), messages, appended=style in APPENDED)


@pytest.mark.parametrize("split", ["gpt2", "llama3"])
def test_closing_text_may_merge_with_its_neighbours(joining, split: str) -> None:
    tokenizer = joining(split)
    messages = [ASK, SAY, MORE, END, MORE, SAY]
    said = assert_reads_as_its_template(tokenizer, messages, appended=True)
    # A model closes an answer with one token. If the conversation continues, GPT-2 makes two of it,
    # which no model would write: they are no targets.
    last = {"gpt2": ["\n\n", "<|end|>"], "llama3": [".\n\n", "<|end|>"]}[split]
    inner = {"gpt2": " paint.", "llama3": " paint.\n\n"}[split]
    assert tokenizer.batch_decode([[id] for id in said[-1][-2:]]) == last
    assert tokenizer.decode(said[1]).endswith(inner)
    encoder = Encoder(tokenizer, **ENDLESS)
    safe = encoder.encode(triple(messages=messages[:-1], safe=SAY["content"])).safe
    assert safe.tolist() == said[-1]


def assert_reads_as_its_template(tokenizer, messages: list, *, appended: bool) -> list[list[int]]:
    """Compare a dialogue with what a model is shown of it; return the targets of each turn."""
    encoder = Encoder(tokenizer, **ENDLESS)
    encoded = encoder.encode(Dialogue(messages=messages, id="d"))
    ids = encoded.input_ids.tolist()
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    if appended:
        assert ids == [*rendered, tokenizer.eos_token_id]
    else:  # except the text between this turn and the next
        assert ids == rendered[: len(ids)]
        assert not tokenizer.decode(rendered[len(ids) :]).strip()
    starts = np.flatnonzero(np.diff(encoded.is_target.astype(int), prepend=0) == 1)
    ends = np.flatnonzero(np.diff(encoded.is_target.astype(int), append=0) == -1) + 1
    asked = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index, start in zip(asked, starts, strict=True):
        assert ids[:start] == encoder.prompt_ids(messages[:index])
    return [ids[start:end] for start, end in zip(starts, ends, strict=True)]


def test_a_response_is_trimmed_as_the_template_trims(templated) -> None:
    padded = f"  {SAFE}\n"
    for style, expected in (("llama3", SAFE), ("mistral", f" {SAFE}"), ("chatml", padded)):
        chat = Chat(templated(style))
        assert chat.tokenizer.decode(chat.response_ids([ASK], padded)) == expected


def test_no_token_straddles_the_border_of_prompt_and_response(templated) -> None:
    tokenizer = templated("straddling")
    joined = tokenizer("\nSorry, I cannot help.", add_special_tokens=False).input_ids
    assert tokenizer.convert_tokens_to_ids("Sorry") in joined
    encoder = Encoder(tokenizer, **{**ENDLESS, "cuts": "official"})
    encoded = encoder.encode(triple(harmful="rry, I cannot help.", safe="rry."))
    assert tokenizer.decode(encoded.prompt).endswith("assistant\nSo")
    assert tokenizer.decode(encoded.harmful) == "rry, I cannot help."
    assert tokenizer.decode(encoded.safe) == "rry.<|im_end|>"
    ends = [tokenizer.decode(encoded.harmful[:end]) for end in encoded.word_ends]
    assert ends == ["rry,", "rry, I"]


def test_tokens_that_no_model_would_write_are_no_targets(templated) -> None:
    encoder = Encoder(templated("straddling"), **ENDLESS)
    answers = [{"role": "assistant", "content": text} for text in ("rry, no.", "rry.")]
    encoded = encoder.encode(Dialogue(messages=[ASK, answers[0], MORE, answers[1]], id="d"))
    assert encoder.tokenizer.decode(encoded.input_ids[encoded.is_target]) == "rry.<|im_end|>"
    start = len(encoded.input_ids) - encoded.is_target.sum()
    prompt = encoder.prompt_ids([ASK, answers[0], MORE])
    assert encoded.input_ids[:start].tolist() == prompt


def test_batches_encode_like_single_records(templated) -> None:
    records: list = []
    for index in range(BATCH // 2 + 3):
        records += [
            triple(id=f"t{index}", harmful=HARMFUL * (1 + index % 3)),
            Dialogue(messages=[ASK, SAY] * (1 + index % 2), id=f"d{index}"),
        ]
    encoder = Encoder(templated("llama3"), **ENDLESS)
    batched = list(encoder.encode_many(iter(records)))
    for record, many in zip(records, batched, strict=True):
        one = encoder.encode(record)
        for name, value in vars(one).items():
            assert np.array_equal(getattr(many, name), value), (record.id, name)


@pytest.mark.parametrize("words", [1, 2, 3, 7])
def test_word_ends_match_the_authors_generator(templated, words: int) -> None:
    tokenizer = templated("mistral")
    text = " ".join(["Sure,", "here\nis", "über", "", "the", "ladderladder", "fox."][:words])
    encoder = Encoder(tokenizer, **{**ENDLESS, "cuts": "official"})
    encoded = encoder.encode(triple(harmful=text))
    prefixes = [tokenizer.decode(encoded.harmful[:end]) for end in encoded.word_ends]
    parts = text.split(" ")
    expected = [" " + " ".join(parts[:k]) for k in range(1, len(parts) - 1)]
    assert prefixes == expected
    assert Encoder(tokenizer, **ENDLESS).encode(triple(harmful=text)).word_ends is None


def test_a_long_triple_loses_the_end_of_its_harmful_response(templated) -> None:
    tokenizer = templated("llama3")
    whole = Encoder(tokenizer, **ENDLESS).encode(triple(harmful=HARMFUL * 5))
    q, h, r = len(whole.prompt), len(whole.harmful), len(whole.safe)
    for max_length in range(q + r, q + h + r + 2):
        encoder = Encoder(
            tokenizer, max_length=max_length, max_tokens=10_000, branches=1, cuts="official"
        )
        cut = encoder.encode(triple(harmful=HARMFUL * 5))
        assert cut.prompt.tolist() == whole.prompt.tolist()
        assert cut.safe.tolist() == whole.safe.tolist()
        assert cut.harmful.tolist() == whole.harmful[: max_length - q].tolist()
        assert cut.cut_limit == min(h, max_length - q - r)
        assert np.all(cut.word_ends <= cut.cut_limit)
        assert encoder.skipped == 0


def test_records_that_do_not_fit_are_skipped_and_counted(templated) -> None:
    tokenizer = templated("llama3")
    whole = Encoder(tokenizer, **ENDLESS).encode(triple())
    q, r = len(whole.prompt), len(whole.safe)
    dialogue = Dialogue(messages=[ASK, SAY], id="d")
    n = len(Encoder(tokenizer, **ENDLESS).encode(dialogue).input_ids)

    def fits(record, **limits: int) -> bool:
        encoder = Encoder(tokenizer, **{**ENDLESS, **limits})
        encoded = encoder.encode(record)
        assert encoder.skipped == (encoded is None)
        return encoded is not None

    assert fits(triple(), max_length=q + r) and not fits(triple(), max_length=q + r - 1)
    room = q + 3 * (r - 1)
    assert fits(triple(), branches=3, max_tokens=room)
    assert not fits(triple(), branches=3, max_tokens=room - 1)
    assert fits(dialogue, max_length=n) and not fits(dialogue, max_length=n - 1)
    assert fits(dialogue, max_tokens=n - 1) and not fits(dialogue, max_tokens=n - 2)


def beginning(tokenizer):
    """Return the tokenizer with a beginning-of-sequence token, as Llama's has."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def rendered(**changes: object) -> Rendered:
    return Rendered(
        **{
            "prefix": r"[INST] How do I paint the fence green? [\INST] Sure, here",
            "text": " is how: step one.<|eot_id|>",
            "rto": True,
            "id": "r",
            **changes,
        }
    )


@pytest.mark.parametrize("rto", [True, False])
@pytest.mark.parametrize("begins", [True, False])
def test_a_rendered_row_has_the_official_codes_targets(templated, rto: bool, begins: bool) -> None:
    tokenizer = templated("llama3")
    tokenizer = beginning(tokenizer) if begins else tokenizer
    row, refusal = rendered(rto=rto), -7
    # The authors' rule: mask the prefix's own tokens, and replace all other labels.
    ids = tokenizer(row.prefix + row.text)["input_ids"]
    masked = len(tokenizer(row.prefix)["input_ids"])
    labels = [-100] * masked + [refusal if rto else id for id in ids[masked:]]

    example = Encoder(tokenizer, **ENDLESS).encode(row)
    for cuts in ("uniform", "official", "deep", "zero"):
        collator = DertaCollator(branches=2, cuts=cuts)
        batch = collator([example])
        assert batch.input_ids[0].tolist() == ids[:-1]
        assert batch.position_ids[0].tolist() == list(range(len(ids) - 1))
        said = batch.columns["shift_labels"].masked_fill(batch.columns["rto_mask"], refusal)
        assert said[0].tolist() == labels[1:]
        assert not batch.benign.any()
        assert packed_length(example, collator.objective) == batch.input_ids.shape[1]


@pytest.mark.parametrize("rto", [True, False])
@pytest.mark.parametrize("begins", [True, False])
def test_a_truncated_row_has_the_official_codes_targets(templated, rto: bool, begins: bool) -> None:
    tokenizer = templated("llama3")
    tokenizer = beginning(tokenizer) if begins else tokenizer
    row, refusal = rendered(rto=rto), -7
    whole = len(tokenizer(row.prefix + row.text)["input_ids"])
    for longest in range(2, whole + 2):
        # The authors' steps: prefix and whole text are truncated, each by itself.
        ids = tokenizer(row.prefix + row.text, truncation=True, max_length=longest)["input_ids"]
        prefix = tokenizer(row.prefix, truncation=True, max_length=longest)["input_ids"]
        labels = [-100] * len(prefix) + [refusal if rto else id for id in ids[len(prefix) :]]

        for limits in ({"max_length": longest}, {"max_tokens": longest - 1}):
            encoder = Encoder(tokenizer, **{**ENDLESS, **limits}, too_long="truncate")
            example = encoder.encode(row)
            without_targets = labels == [-100] * longest
            assert encoder.skipped == without_targets == (example is None)
            assert encoder.truncated == (longest < whole and not rto and not without_targets)
            if example is None:
                continue
            collator = DertaCollator(branches=2, cuts="uniform")
            batch = collator([example])
            assert batch.input_ids[0].tolist() == ids[:-1]
            said = batch.columns["shift_labels"].masked_fill(batch.columns["rto_mask"], refusal)
            assert said[0].tolist() == labels[1:]
            assert packed_length(example, collator.objective) == batch.input_ids.shape[1]


def test_a_truncated_dialogue_is_the_beginning_of_the_whole(templated) -> None:
    tokenizer = templated("chatml")
    dialogue = Dialogue(messages=[SYSTEM, ASK, SAY, MORE, END], id="d")
    whole = Encoder(tokenizer, **ENDLESS).encode(dialogue)
    first = int(np.argmax(whole.is_target))
    for longest in range(1, len(whole.input_ids) + 2):
        encoder = Encoder(tokenizer, **{**ENDLESS, "max_length": longest}, too_long="truncate")
        cut = encoder.encode(dialogue)
        assert (cut is None) == (longest <= first) == bool(encoder.skipped)
        assert encoder.truncated == (first < longest < len(whole.input_ids))
        if cut is not None:
            assert cut.input_ids.tolist() == whole.input_ids[:longest].tolist()
            assert cut.is_target.tolist() == whole.is_target[:longest].tolist()


def test_a_truncated_triple_counts_its_closing_label(templated) -> None:
    whole = Encoder(templated("llama3"), **ENDLESS).encode(triple(harmful=HARMFUL * 5))
    q, h, r = len(whole.prompt), len(whole.harmful), len(whole.safe)
    for longest in (q + r, q + r + 3, q + h, q + h + 1):
        limits = {**ENDLESS, "max_length": longest}
        encoder = Encoder(templated("llama3"), **limits, too_long="truncate")
        cut = encoder.encode(triple(harmful=HARMFUL * 5))
        assert cut.harmful.tolist() == whole.harmful[: longest - q - 1].tolist()
        assert len(cut.safe) == r and cut.cut_limit == min(len(cut.harmful), longest - q - r)


def test_too_long_has_two_answers(templated) -> None:
    with pytest.raises(ValueError, match="too_long must be one of skip, truncate, got 'cut'"):
        Encoder(templated("llama3"), **ENDLESS, too_long="cut")


def test_a_rendered_prefix_keeps_its_own_tokens(templated) -> None:
    tokenizer = beginning(templated("llama3"))
    row = rendered(prefix="<|begin|>How do I paint the fe", text="nce green?", rto=False)
    example = Encoder(tokenizer, **ENDLESS).encode(row)
    first = int(np.argmax(example.is_target))
    assert tokenizer.decode(example.input_ids[:first]) == row.prefix
    assert tokenizer.decode(example.input_ids[first:]) == row.text


@pytest.mark.parametrize("closing", ["<|end_of_text|>", "</s>", "<｜end｜>"])
def test_a_row_that_ends_in_another_models_token_is_refused(templated, closing: str) -> None:
    """It would train the model to write the token's letters, and never to end."""
    encoder = Encoder(templated("llama3"), **ENDLESS)
    message = f"^r: text: ends in {re.escape(closing)}, which is no token of the tokenizer"
    with pytest.raises(ValueError, match=message):
        encoder.encode(rendered(text=f" It is green.{closing}"))
    for text in (f" It is {closing} green.<|eot_id|>", f" It is {closing} green", " [/INST]"):
        assert encoder.encode(rendered(text=text)) is not None


def test_a_long_rendered_row_is_cut_if_rto_and_skipped_otherwise(templated) -> None:
    tokenizer = templated("llama3")
    whole = Encoder(tokenizer, **ENDLESS).encode(rendered())
    q, h = len(whole.prompt), len(whole.harmful)

    def encode(length: int, rto: bool):
        return Encoder(tokenizer, **{**ENDLESS, "max_length": length}).encode(rendered(rto=rto))

    cut = encode(q + 2, rto=True)
    assert cut.harmful.tolist() == whole.harmful[:2].tolist()
    assert encode(q, rto=True).harmful.tolist() == []
    assert encode(q - 1, rto=True) is None
    assert encode(q + h + 1, rto=False) is not None and encode(q + h, rto=False) is None


def test_encoded_examples_keep_source_weight_and_role(templated) -> None:
    encoder = Encoder(templated("llama3"), **ENDLESS)
    origin = dict(source="file", weight=2.5)
    dialogue = dict(messages=[ASK, SAY], id="d", **origin)
    roles = {
        "safety": [triple(**origin), rendered(**origin), rendered(rto=False, **origin)],
        "helpful": [Dialogue(**dialogue)],
        "borderline": [Dialogue(**dialogue, borderline=True)],
    }
    for role, records in roles.items():
        for example in encoder.encode_many(records):
            assert (example.role, example.source, example.weight) == (role, "file", 2.5)


def test_a_prompt_ends_with_the_generation_prompt(templated) -> None:
    tokenizer = templated("llama3")
    encoder = Encoder(tokenizer, **ENDLESS)
    expected = tokenizer.apply_chat_template(
        [ASK], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert encoder.prompt_ids([ASK]) == expected
    assert encoder.encode(triple()).prompt.tolist() == expected


@pytest.mark.parametrize(
    ("style", "message"),
    [
        (None, "^the tokenizer has no chat template: set chat_template"),
        ("reasoning", r"ends its generation prompt with .<think>\\n., with .* to a copy that"),
        ("mute", "chat_template drops the assistant's messages"),
    ],
)
def test_an_unusable_template_is_refused(templated, style: str | None, message: str) -> None:
    tokenizer = copy.deepcopy(templated(style or "llama3"))
    if style is None:
        tokenizer.chat_template = None
    with pytest.raises(ValueError, match=message):
        Chat(tokenizer)


def test_a_response_must_have_a_closing_token(templated) -> None:
    tokenizer = copy.deepcopy(templated("plain"))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no special token and the tokenizer has no eos_token"):
        Chat(tokenizer)


@pytest.mark.parametrize(
    ("style", "record", "message"),
    [
        (
            "mistral",
            triple(messages=[SYSTEM, ASK]),
            "^t: chat_template rejects the messages: only user and assistant roles",
        ),
        (
            "forgetful",
            triple(),
            "^t: chat_template changes earlier messages as a conversation continues",
        ),
        (
            "forgetful",
            triple(messages=[MORE], safe="Why?</think>"),
            "^t: chat_template renders an empty response",
        ),
    ],
)
def test_a_record_rejected_by_the_template_is_named(
    templated, style: str, record, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(templated(style), **ENDLESS).encode(record)


def test_cuts_between_words_need_a_fast_tokenizer(templated) -> None:
    tokenizer = copy.deepcopy(templated("llama3"))
    tokenizer.__class__ = type("SlowTokenizer", (type(tokenizer),), {"is_fast": False})
    with pytest.raises(ValueError, match="offsets of a fast tokenizer, got SlowTokenizer: choose"):
        Encoder(tokenizer, **{**ENDLESS, "cuts": "official"})
    assert Encoder(tokenizer, **ENDLESS).encode(triple()) is not None
