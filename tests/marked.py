"""Tokenizers in the manner of well-known models, each made twice: only its marks differ.

The second is the oracle of the first. Its template writes other marks, so that the first one's are
ordinary text to it, and everything else is the same.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from tiny import CORPUS

# Marks by style: of each pair the first tokenizer has the former. "think" is not special.
MARKS = {
    "llama3": {
        "begin": ("<|begin_of_text|>", "⟦begin⟧"),
        "open": ("<|start_header_id|>", "⟦open⟧"),
        "close": ("<|end_header_id|>", "⟦close⟧"),
        "end": ("<|eot_id|>", "⟦end⟧"),
        "spare": ("<|reserved|>", "⟦spare⟧"),
    },
    "chatml": {
        "open": ("<|im_start|>", "⟦open⟧"),
        "end": ("<|im_end|>", "⟦end⟧"),
        "pad": ("<|endoftext|>", "⟦pad⟧"),
    },
    "gemma": {
        "begin": ("<bos>", "⟦bos⟧"),
        "open": ("<start_of_turn>", "⟦open⟧"),
        "end": ("<end_of_turn>", "⟦end⟧"),
    },
    "mistral": {
        "begin": ("<s>", "⟦s⟧"),
        "end": ("</s>", "⟦/s⟧"),
        "ask": ("[INST]", "⟦ask⟧"),
        "asked": ("[/INST]", "⟦asked⟧"),
    },
    "unigram": {
        "begin": ("<s>", "⟦s⟧"),
        "end": ("</s>", "⟦/s⟧"),
        "user": ("<|user|>", "⟦user⟧"),
        "assistant": ("<|assistant|>", "⟦assistant⟧"),
    },
}
# Marks that the tokenizer does not call special, as DeepSeek's are not.
NOT_SPECIAL = {"unigram": ("user", "assistant")}

TEMPLATES = {
    "llama3": (
        "{begin}{% for m in messages %}{open}{{ m['role'] }}{close}\n\n"
        "{{ m['content'] | trim }}{end}{% endfor %}"
        "{% if add_generation_prompt %}{open}assistant{close}\n\n{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{open}{{ m['role'] }}\n{{ m['content'] }}{end}\n{% endfor %}"
        "{% if add_generation_prompt %}{open}assistant\n{% endif %}"
    ),
    "gemma": (
        "{begin}{% for m in messages %}{open}{{ 'model' if m['role'] == 'assistant' else "
        "m['role'] }}\n{{ m['content'] | trim }}{end}\n{% endfor %}"
        "{% if add_generation_prompt %}{open}model\n{% endif %}"
    ),
    "mistral": (
        "{begin}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{end}"
        "{% else %}{ask} {{ m['content'] }}{asked}{% endif %}{% endfor %}"
    ),
    # No text of its own comes between two messages of one role.
    "unigram": (
        "{begin}{% for m in messages %}{% if m['role'] == 'assistant' %}{assistant}"
        "{{ m['content'] }}{end}{% else %}{% if loop.index0 == 0 or messages[loop.index0 - 1]"
        "['role'] == 'assistant' %}{user}{% endif %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{assistant}{% endif %}"
    ),
}
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def _bytes() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(style: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if style == "chatml":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "well.\n\nSo:\n\n<| |> <|"] * 4, trainer)
    return tokenizer


def _sentence_piece(style: str, marks: list[str]) -> Tokenizer:
    """A BPE over whole texts with bytes for unknown characters, whose marks are in its vocabulary.

    Where a mark can be merged from its characters, as in files converted from sentencepiece, it is.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    corpus = [*CORPUS, "</s> <s> <eos> s> </ of_turn> start_of_ end_of_ [INST] [/INST]"] * 4
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    all_marks = {mark for pair in MARKS[style].values() for mark in pair}
    learned = [piece for piece in model["vocab"] if piece not in all_marks]
    merges = [
        (left, right)
        for left, right in model["merges"]
        if all_marks.isdisjoint((left, right, left + right))
    ]
    for mark in marks:
        for cut in range(1, len(mark)):
            if {mark[:cut], mark[cut:]} <= {*learned}:
                merges.append((mark[:cut], mark[cut:]))
    pieces = ["<unk>", *marks, *_bytes(), *learned]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: id for id, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if style == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _unigram(marks: list[str]) -> Tokenizer:
    """A Unigram whose marks are pieces of the best score, as user-defined symbols are."""
    text = "".join(CORPUS).replace(" ", "▁") + "<>|/[]\n"
    words = {word: -3.0 - len(word) / 10 for one in CORPUS for word in f"▁{one}".split()}
    pieces = {"<unk>": 0.0, **dict.fromkeys(marks, 0.0), **dict.fromkeys(_bytes(), 0.0)}
    pieces |= dict.fromkeys(sorted(set(text)), -8.0) | {"▁the": -4.0, "end": -5.0, "user": -5.0}
    pieces |= {word: score for word, score in words.items() if word not in pieces}
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    return tokenizer


@functools.cache
def marked(style: str, oracle: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a style; shared, so not to be changed."""
    names = {name: pair[oracle] for name, pair in MARKS[style].items()}
    if style in ("llama3", "chatml"):
        tokenizer = _byte_level(style)
    elif style == "unigram":
        tokenizer = _unigram(list(names.values()))
    else:
        tokenizer = _sentence_piece(style, list(names.values()))
    plain = NOT_SPECIAL.get(style, ())
    added = [
        AddedToken(mark, special=name not in plain, normalized=False)
        for name, mark in names.items()
    ]
    added += [AddedToken("<think>", special=False, normalized=False)]
    if style == "gemma":
        added.append(AddedToken("\n\n", special=False, normalized=False))
    tokenizer.add_tokens(added)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=names.get("begin"),
        eos_token=names["end"],
        unk_token="<unk>" if style in ("gemma", "mistral", "unigram") else None,
    )
    template = TEMPLATES[style]
    for name, mark in names.items():
        template = template.replace(f"{{{name}}}", mark)
    fast.chat_template = template
    return fast
