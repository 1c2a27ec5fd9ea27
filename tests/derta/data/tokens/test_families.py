"""The table of refusal tokens is what is found."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from derta.data import CHAT_TEMPLATES, Chat, Dialogue, Encoder, Triple
from families import FAMILIES, MISTRAL_7B, folder, installed, llama3, rows
from tiny import tiny_tokenizer

PAGE = Path(__file__).parents[4] / "docs" / "guides" / "model.md"


def table() -> list[str]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| family |")) + 2
    return lines[start : start + len(FAMILIES)]


def test_the_table_has_a_row_for_each_family() -> None:
    assert [row.split("|")[1].strip() for row in table()] == [one.name for one in FAMILIES]


@pytest.mark.slow
def test_the_table_of_refusal_tokens_is_what_is_found() -> None:
    found = list(rows())
    if not found:
        pytest.skip("no package with a tokenizer is installed, see families.py")
    listed = dict(zip(FAMILIES, table(), strict=True))
    for family, row in found:
        assert listed[family] == row


ASK, SAY, MORE = (
    {"role": role, "content": content}
    for role, content in [("user", "How?"), ("assistant", "Sorry, no."), ("user", "Then?")]
)
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.slow
def test_llama_3_prompts_are_metas_own() -> None:
    pytest.importorskip("llama_models")
    pytest.importorskip("tiktoken")
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    messages = [SYSTEM, ASK, SAY, MORE]
    theirs = ChatFormat(Tokenizer.get_instance()).encode_dialog_prompt(
        [RawMessage(**one) for one in messages]
    )
    tokenizer = llama3()
    tokenizer.chat_template = CHAT_TEMPLATES["llama3"]
    assert Chat(tokenizer).prompt_ids(messages) == theirs.tokens


@pytest.mark.slow
@pytest.mark.parametrize("messages", [[ASK, SAY, MORE], [SYSTEM, ASK, SAY, MORE]])
def test_mistral_prompts_are_mistrals_own(messages: list) -> None:
    for package in ("mistral_common", "sentencepiece", "pydantic_extra_types"):
        pytest.importorskip(package)
    from mistral_common.protocol.instruct import messages as kinds
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    said = [
        getattr(kinds, one["role"].title() + "Message")(content=one["content"]) for one in messages
    ]
    theirs = MistralTokenizer.v1().encode_chat_completion(ChatCompletionRequest(messages=said))
    tokenizer = MISTRAL_7B()
    tokenizer.chat_template = CHAT_TEMPLATES["mistral"]
    assert Chat(tokenizer).prompt_ids(messages) == theirs.tokens


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), [("gemma", "gemma3.jinja"), ("llama3", "llama3.jinja")])
def test_named_templates_write_what_their_models_templates_write(name: str, file: str) -> None:
    if not installed("trl"):
        pytest.skip("trl is not installed")
    template = (folder("trl") / "chat_templates" / file).read_text(encoding="utf-8")
    for messages in ([ASK], [ASK, SAY], [SYSTEM, ASK, SAY, MORE]):
        ours, theirs = (
            tiny_tokenizer().apply_chat_template(
                messages, chat_template=one, tokenize=False, add_generation_prompt=True
            )
            for one in (CHAT_TEMPLATES[name], template)
        )
        assert ours == theirs


@pytest.mark.slow
def test_templates_of_models_are_taken_unless_they_think_or_see() -> None:
    if not installed("trl"):
        pytest.skip("trl is not installed")
    taken, refused = [], []
    for file in sorted((folder("trl") / "chat_templates").glob("*.jinja")):
        tokenizer = copy.copy(tiny_tokenizer())
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        limits = dict(max_length=10**6, max_tokens=10**6, branches=1, cuts="uniform")
        triple = Triple(messages=[ASK, SAY, MORE], safe="Sorry.", harmful="Sure.", id="t")
        try:
            encoder = Encoder(tokenizer, **limits)
        except ValueError as error:
            thinks = "ends its generation prompt with '<think>" in str(error)
            sees = "<image>" in tokenizer.chat_template
            assert thinks or sees, file.name
            refused.append(file.name)
            continue
        for record in (triple, Dialogue(messages=[ASK, SAY, MORE, SAY], id="d")):
            assert encoder.encode(record) is not None
        taken.append(file.name)
    assert (len(taken), len(refused)) == (62, 10)  # of trl 1.16
