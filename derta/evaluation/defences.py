"""Defences without training, at inference alone: the baselines of a tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from derta.data import Chat, Message
from derta.data.tokens.chat import PROBE, Answer
from derta.data.tokens.special import unquoted


@dataclass(frozen=True, kw_only=True)
class Defence:
    """A defence at inference.

    Args:
        system_prompt: text of the system's message, before that of a request if it has one. Raw
            text that is continued without a chat template has none.
        reinsert_header: if True, the text that opens the assistant's turn is put in again, after
            the tokens that an attacker prefilled, or after the first `header_after` tokens of the
            answer. If the model then refuses, by the keywords of the keyword judges, the refusal
            replaces the rest of the answer; else the answer stands.
        header_after: number of tokens.

    Raises:
        ValueError: there is no defence, or header_after is negative.

    Source: arXiv 2510.18081, for the header that is put in again.
    """

    system_prompt: str = ""
    reinsert_header: bool = False
    header_after: int = 16

    def __post_init__(self) -> None:
        if not self.system_prompt.strip() and not self.reinsert_header:
            raise ValueError("system_prompt or reinsert_header must be given, got neither")
        if self.header_after < 0:
            raise ValueError(f"header_after must be at least 0, got {self.header_after}")

    def conditions(self) -> dict[str, Any]:
        """Return the settings on which rates depend."""
        return {
            "system_prompt": self.system_prompt or None,
            "header_after": self.header_after if self.reinsert_header else None,
        }


def defended(chat: Chat, defence: Defence | None) -> Chat:
    """Return a model's chat under a defence.

    Args:
        chat: the model's tokenizer and template.
        defence: the defence; None: the chat as it is.

    Raises:
        ValueError: the chat template has no system message or no header, and the defence needs it.
    """
    if defence is None:
        return chat
    if defence.reinsert_header:
        chat.header_ids()
    return InstructedChat(chat, defence.system_prompt) if defence.system_prompt else chat


class InstructedChat(Chat):
    """A chat whose prompts begin with the same system message.

    Args:
        chat: the chat.
        system_prompt: text of the message.

    Raises:
        ValueError: the chat template has no system message.
    """

    def __init__(self, chat: Chat, system_prompt: str) -> None:
        super().__init__(chat.tokenizer, chat.special_tokens_in_text)
        self.system_prompt = system_prompt
        if system_prompt.strip() not in unquoted(self.render(PROBE, "Hello").prompt):
            raise ValueError("system_prompt: the chat template drops the system's message")

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return super().prompt_ids(self._instructed(messages))

    def thinking_ids(self, messages: Sequence[Message], tag: str) -> list[int]:
        return super().thinking_ids(self._instructed(messages), tag)

    def render(self, messages: Sequence[Message], text: str) -> Answer:
        return super().render(self._instructed(messages), text)

    def _instructed(self, messages: Sequence[Message]) -> list[Message]:
        first, *rest = messages
        if first["role"] == "system":
            text = f"{self.system_prompt}\n\n{first['content']}"
        else:
            text, rest = self.system_prompt, list(messages)
        return [{"role": "system", "content": text}, *rest]
