"""Tokenizers with the chat templates that models come with."""

from __future__ import annotations

import copy
import functools

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from tiny import LLAMA3_TEMPLATE, tiny_tokenizer

TEMPLATES = {
    "llama3": LLAMA3_TEMPLATE,
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # The answer begins with a space, the prompt is closed by ordinary text, there is no system.
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "[INST] {{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %}"
        " {{ m['content'] | trim }}{{ eos_token }}{% else %}"
        "{{ raise_exception('only user and assistant roles are supported') }}"
        "{% endif %}{% endfor %}"
    ),
    # As above, but knows no generation prompt.
    "silent": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}"
    ),
    # Ordinary text only: the tokenizer's end of sequence has to close the answer.
    "plain": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    # As "chatml", but its marks are ordinary text to this tokenizer.
    "textual": (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    ),
    # An empty thinking block opens the last answer, and that one alone.
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # A thinking block opens in the prompt and is gone from the answered chat.
    "reasoning": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    # The prompt ends in the middle of what would be one token with the answer.
    "straddling": (
        "{% for m in messages %}{{ m['role'] }}{{ '\nSo' if m['role'] == 'assistant' else ': ' }}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\nSo{% endif %}"
    ),
    # Shortens what has been answered and drops what was thought.
    "forgetful": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] }}"
        "{% elif loop.last %}{{ m['content'] }}{% else %}{{ m['content'][:20] }}{% endif %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Changes what is said.
    "loud": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'].replace('SORRY', 'Sorry') }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "mute": "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
    "{% endfor %}",
}


# What comes between two turns in ordinary text: GPT-2 tears "\n\n" where a word follows, Llama 3
# joins it to the full stop before it.
SPLITS = {
    "gpt2": r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
}


def joining_tokenizer(split: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows "\n\n" and ".\n\n" as tokens, where one of `SPLITS` lets them be."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(SPLITS[split]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["stir it.\n\n", "stir it\n\n"] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=TEMPLATES["plain"],
    )


@functools.cache
def templated_tokenizer(name: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    marks = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer.add_tokens(
        [AddedToken(mark, special="im_" in mark, normalized=False) for mark in marks]
    )
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


@pytest.fixture
def joining():
    """Tokenizers that join, by the name of their split, what closes an answer to what it closes."""
    return joining_tokenizer


@pytest.fixture
def templated():
    """The tiny tokenizer with one of `TEMPLATES`; shared, so not to be changed."""
    return templated_tokenizer
