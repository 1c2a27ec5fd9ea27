"""`derta chat`: a conversation with a model, with a prefill for its answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from derta.cli.settings.tools import ChatConfig
from derta.data import Chat
from derta.data.records.types import Message
from derta.data.tokens.red_flag import flag_of
from derta.evaluation.generation.local import generate, stop_ids
from derta.modeling.loading import find_device, load_tuned, weights_dtype
from derta.terminal import say


def run(config: ChatConfig) -> None:
    """Answer each line of the standard input by greedy decoding.

    Raises:
        FileNotFoundError: the model does not exist.
        ValueError: the model has no chat template, or the conversation outgrows its context.
    """
    logging.set_verbosity_error()
    folder = Path(config.model)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder")
    device = find_device(config.device)
    model: Any
    model, tokenizer = load_tuned(folder, weights_dtype(config.dtype, device), config.chat_template)
    model.to(device)
    chat, flag = Chat(tokenizer), flag_of(tokenizer)
    messages: list[Message] = []
    if sys.stdin.isatty():
        say("a line is a message; /new begins a new conversation, Ctrl-D ends", error=True)
    for line in _lines():
        if line == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        begun = chat.response_ids(messages, config.prefill) if config.prefill else []
        (ids,) = generate(
            model,
            [chat.prompt_ids(messages) + begun],
            ids=["the conversation"],
            stop_ids=stop_ids(model, chat),
            max_new_tokens=config.max_new_tokens,
            batch_size=1,
            flag=flag,
        )
        if ids[-1:] == [flag]:
            say("the model has flagged its answer, which is withheld; the request is forgotten")
            messages.pop()
            continue
        answer = str(tokenizer.decode([*begun, *ids], skip_special_tokens=True))
        say(answer)
        messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """Yield the lines of the standard input that are not blank, with a prompt on a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line
