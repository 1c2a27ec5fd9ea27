"""Named chat templates write what their models were trained on."""

from __future__ import annotations

import copy

import pytest
from tokenizers import processors

from derta.data import (
    CHAT_TEMPLATES,
    Chat,
    Dialogue,
    Encoder,
    Rendered,
    Triple,
    resolve_refusal_token,
)
from tiny import tiny_tokenizer

ENDLESS = dict(max_length=10_000, max_tokens=10_000, branches=1, cuts="uniform")
SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [
    {"role": "user", "content": "Paint?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "How?"},
    {"role": "assistant", "content": "Stir it."},
]

# <b> begins and <e> ends a sequence. The second text is that of the first two turns after SYSTEM.
WRITTEN = {
    "official": (r"<b>[INST] Paint? [\INST] Yes.<e>[INST] How? [\INST] Stir it.<e>", None),
    "llama2": (
        "<b>[INST] Paint? [/INST] Yes. <e><b>[INST] How? [/INST] Stir it. <e>",
        "<b>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nPaint? [/INST] Yes. <e>",
    ),
    "llama3": (
        "<b><|start_header_id|>user<|end_header_id|>\n\nPaint?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nStir it.<|eot_id|>",
        "<b><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nPaint?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
    ),
    "chatml": (
        "<|im_start|>user\nPaint?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nStir it.<|im_end|>\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nPaint?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n",
    ),
    "mistral": (
        "<b>[INST] Paint? [/INST] Yes.<e>[INST] How? [/INST] Stir it.<e>",
        "<b>[INST] Be kind.\n\nPaint? [/INST] Yes.<e>",
    ),
    "gemma": (
        "<b><start_of_turn>user\nPaint?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
        "<start_of_turn>user\nHow?<end_of_turn>\n<start_of_turn>model\nStir it.<end_of_turn>\n",
        "<b><start_of_turn>user\nBe kind.\n\nPaint?<end_of_turn>\n"
        "<start_of_turn>model\nYes.<end_of_turn>\n",
    ),
    "plain": (
        "<b>User: Paint?\n\nAssistant: Yes.<e>\n\nUser: How?\n\nAssistant: Stir it.<e>\n\n",
        "<b>System: Be kind.\n\nUser: Paint?\n\nAssistant: Yes.<e>\n\n",
    ),
}


def named(name: str):
    """The tiny tokenizer with a named template; the marks of ChatML and Gemma are tokens of it."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    marks = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = CHAT_TEMPLATES[name]
    return tokenizer


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_named_template_writes_its_models_form(name: str) -> None:
    tokenizer = named(name)
    ours = [
        text and text.replace("<b>", tokenizer.bos_token).replace("<e>", tokenizer.eos_token)
        for text in WRITTEN[name]
    ]
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == ours[0]
    if ours[1] is None:
        with pytest.raises(ValueError, match="rejects the messages: the official template has no"):
            Chat(tokenizer).prompt_ids([SYSTEM, TURNS[0]])
    else:
        rendered = tokenizer.apply_chat_template([SYSTEM, *TURNS[:2]], tokenize=False)
        assert rendered == ours[1]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_named_template_trains_on_answers_and_on_nothing_else(name: str) -> None:
    tokenizer = named(name)
    encoder = Encoder(tokenizer, **ENDLESS)
    encoded = encoder.encode(Dialogue(messages=TURNS, id="d"))
    ids = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    assert encoded.input_ids.tolist() == ids[: len(encoded.input_ids)]
    lead = " " if name in ("official", "llama2", "mistral", "plain") else ""
    said = "".join(f"{lead}{turn['content']}{encoder.closing_text}" for turn in TURNS[1::2])
    assert tokenizer.decode(encoded.input_ids[encoded.is_target]) == said
    assert resolve_refusal_token(tokenizer, "Sorry").text == f"{lead}Sorry"


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
@pytest.mark.parametrize("turns", [[TURNS[0], TURNS[1], SYSTEM], [SYSTEM, TURNS[1]]])
def test_a_folded_system_message_is_never_lost(name: str, turns: list) -> None:
    with pytest.raises(ValueError, match="rejects the messages: a system message must come first"):
        Chat(named(name)).prompt_ids([*turns, TURNS[2]])


def test_the_official_template_gives_the_tokens_of_the_authors_files() -> None:
    tokenizer = named("official")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    asked, safe, harmful = "How do I paint the fence?", "Sorry, I cannot.", "Sure, take the ladder."
    prefix, end = rf"[INST] {asked} [\INST]", tokenizer.eos_token

    def rendered(text: str, rto: bool) -> Rendered:
        return Rendered(prefix=prefix, text=f" {text}{end}", rto=rto, id="r")

    encoder = Encoder(tokenizer, **ENDLESS)
    ours = encoder.encode(Triple(prompt=asked, safe=safe, harmful=harmful, id="t"))
    rto, mle = encoder.encode(rendered(harmful, True)), encoder.encode(rendered(safe, False))
    assert ours.prompt.tolist() == rto.prompt.tolist()
    assert ours.harmful.tolist() == rto.harmful.tolist()
    assert [*ours.prompt, *ours.safe] == mle.input_ids.tolist()
    assert len(ours.safe) == mle.is_target.sum()
