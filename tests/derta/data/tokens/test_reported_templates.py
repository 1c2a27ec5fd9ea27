"""Kinds of chat template that other trainers' bug reports are about: a token is never misplaced."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tokenizers import processors

from derta.data import Chat, Dialogue, EncodedTriple, Encoder, Rendered, Request, Triple
from derta.data.tokens.refusal import resolve_refusal_token
from derta.evaluation.scenarios import completion

ENDLESS = dict(max_length=10_000, max_tokens=10_000, branches=1, cuts="uniform")
ASK = {"role": "user", "content": "How do I paint the fence?"}
SAY = {"role": "assistant", "content": "<think>\nA brush.\n</think>\n\nFirst buy a brush."}
MORE = {"role": "user", "content": "Then?"}
END = {"role": "assistant", "content": "Open the paint."}
TURNS = [ASK, SAY, MORE, END]

_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n"
TEMPLATES = {
    # Answers between marks that tell other trainers their targets.
    "marked": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + _PROMPT + "{% endif %}"
    ),
    # What was thought is dropped, and an empty thinking block opens the last answer.
    "stripping": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}"
        "{% endif %}{{ m['content'].split('</think>')[-1].lstrip('\\n') }}<|im_end|>\n"
        "{% endfor %}" + _PROMPT + "{% endif %}"
    ),
    # The last answer ends the sequence, an earlier one only its turn.
    "returning": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ eos_token }}{% else %}<|im_end|>"
        "{% endif %}{% endfor %}" + _PROMPT + "{% endif %}"
    ),
    # A thinking block opens in the prompt unless it is told not to, and is empty in an answer.
    "asking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ '<think></think>' if m['role'] == 'assistant' }}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}" + _PROMPT + "{{ '<think></think>' if enable_thinking is false else"
        " '<think>\\n' }}{% endif %}"
    ),
}


def answers(encoder: Encoder, messages: list) -> list[str]:
    """Return the text of each run of targets, having checked that the ids are the template's."""
    encoded = encoder.encode(Dialogue(messages=messages, id="d"))
    ids = encoded.input_ids.tolist()
    rendered = encoder.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == rendered[: len(ids)]
    edges = np.flatnonzero(np.diff(encoded.is_target.astype(int), prepend=0, append=0))
    return [
        encoder.tokenizer.decode(ids[start:end]) for start, end in edges.reshape(-1, 2).tolist()
    ]


@pytest.fixture
def reported(templated):
    """Return the tiny tokenizer with one of `TEMPLATES`."""

    def make(name: str):
        tokenizer = copy.deepcopy(templated("chatml"))
        tokenizer.chat_template = TEMPLATES[name]
        return tokenizer

    return make


def beginning(tokenizer):
    """Return the tokenizer such that it begins every text by itself, as Llama's does."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_generation_marks_change_nothing(templated, reported) -> None:
    marked, plain = Encoder(reported("marked"), **ENDLESS), Encoder(templated("chatml"), **ENDLESS)
    triple = Triple(messages=[ASK, END, MORE], safe="Sorry.", harmful="Sure.", id="t")
    for record in (Dialogue(messages=TURNS, id="d"), triple):
        ours, theirs = marked.encode(record), plain.encode(record)
        for name, value in vars(theirs).items():
            assert np.array_equal(getattr(ours, name), value), name


def test_an_answer_that_is_rewritten_later_is_context_alone(reported) -> None:
    encoder = Encoder(reported("stripping"), **ENDLESS)
    assert answers(encoder, TURNS) == ["Open the paint.<|im_end|>"]
    assert encoder.context_only == 1
    assert answers(encoder, [ASK, END]) == ["Open the paint.<|im_end|>"]
    assert encoder.context_only == 1
    # What the model is shown of it is what the template shows.
    triple = encoder.encode(Triple(messages=TURNS[:3], safe="Sorry.", harmful="Sure.", id="t"))
    shown = encoder.tokenizer.decode(triple.prompt)
    assert "A brush" not in shown and shown.endswith("assistant\n<think>\n\n</think>\n\n")
    assert encoder.tokenizer.decode(triple.safe) == "Sorry.<|im_end|>"


def test_an_earlier_answer_is_learned_but_for_the_closing_that_changes(reported) -> None:
    encoder = Encoder(reported("returning"), **ENDLESS)
    assert answers(encoder, TURNS) == [SAY["content"], "Open the paint.<|eot_id|>"]
    assert encoder.context_only == 0


def test_a_template_is_asked_for_answers_without_thinking(reported) -> None:
    encoder = Encoder(reported("asking"), **ENDLESS)
    assert encoder.tokenizer.decode(encoder.prompt_ids([ASK])).endswith("<think></think>")
    assert answers(encoder, [ASK, END]) == ["Open the paint.<|im_end|>"]
    assert resolve_refusal_token(encoder.tokenizer, "Sorry").text == "Sorry"


@pytest.mark.parametrize("adds", [True, False])
def test_a_sequence_begins_once(templated, adds: bool) -> None:
    tokenizer = templated("llama3")  # whose template writes the token
    tokenizer = beginning(tokenizer) if adds else tokenizer
    encoder, begin = Encoder(tokenizer, **ENDLESS), tokenizer.bos_token_id
    triple = encoder.encode(Triple(messages=[ASK], safe="Sorry.", harmful="Sure.", id="t"))
    dialogue = encoder.encode(Dialogue(messages=TURNS, id="d"))
    asked = completion(Request(messages=[ASK], id="r"), Chat(tokenizer)).prompt
    sequences = [[*triple.prompt, *triple.harmful], dialogue.input_ids.tolist(), list(asked)]
    for rto in (True, False):
        for text in (r"[INST] How? [\INST]", r"<|begin|>[INST] How? [\INST]"):
            row = encoder.encode(Rendered(prefix=text, text=" Sure, no.", rto=rto, id="r"))
            ids = row.prompt if isinstance(row, EncodedTriple) else row.input_ids
            if adds or "begin" in text:
                sequences.append(ids.tolist())
            else:
                assert begin not in ids
    for ids in sequences:
        assert ids[0] == begin and ids.count(begin) == 1


def test_rendered_rows_need_no_template(templated) -> None:
    bare = copy.deepcopy(templated("llama3"))
    bare.chat_template = None
    rows = [Rendered(prefix="How? ", text="Sure, no.", rto=rto, id=f"{rto}") for rto in (1, 0)]
    for record in rows:
        ours = Encoder(bare, **ENDLESS).encode(record)
        theirs = Encoder(templated("llama3"), **ENDLESS).encode(record)
        for name, value in vars(theirs).items():
            assert np.array_equal(getattr(ours, name), value), name
    missing = "the tokenizer has no chat template: set chat_template"
    with pytest.raises(ValueError, match=f"^t: {missing}"):
        Encoder(bare, **ENDLESS).encode(Triple(prompt="a", safe="b", harmful="c", id="t"))
