"""Tokenizers with the chat templates that models come with."""

from __future__ import annotations

import copy
import functools

import pytest
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
def templated():
    """The tiny tokenizer with one of `TEMPLATES`; shared, so not to be changed."""
    return templated_tokenizer
