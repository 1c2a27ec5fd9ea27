"""The model's chat template as token ids: prompts, responses and their closing tokens."""

from __future__ import annotations

import contextlib
import itertools
import os
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jinja2

from derta.data.records.defaults import SpecialTokensInText
from derta.data.records.types import Dialogue, Message, Request, Triple, texts_of
from derta.data.tokens.special import SpecialTokens, unquoted
from derta.data.tokens.templates import CHAT_TEMPLATES
from derta.data.tokens.trial import check_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# Large enough for a fast tokenizer to use all cores.
BATCH = 256

# A template's own errors, and Python's in its expressions.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

PROBE: tuple[Message, ...] = ({"role": "user", "content": "Hello"},)
_SENTINEL = "sentinel-answer"
_WITHOUT_THINKING = {"enable_thinking": False, "thinking": False}
_WITH_THINKING = {"enable_thinking": True, "thinking": True}


class Answer(NamedTuple):
    """A rendered prompt, up to where the model starts to write, and a rendered response to it.

    The response ends before its closing text, or with `closing_text`; `appended_ids` are never part
    of it. Both may have texts of messages that are quoted, see `SpecialTokens`.
    """

    prompt: str
    response: str


class Chat:
    """A renderer of conversations with a tokenizer's chat template, and their tokenizer.

    Text that the template writes before a response (the generation prompt, an empty thinking block)
    belongs to the prompt, except spaces, which tokenizers join to the next word. Responses are read
    from the rendered conversation, so they change as the template changes them (by trimming). They
    hold no reasoning: a template that opens a thinking block in its generation prompt is told
    `enable_thinking: false` (and `thinking`, its other name).

    Control tokens in the texts of messages are read as plain text, and decode to the same text; the
    template's own stay tokens. `SpecialTokens` says which tokens control, and how.

    Args:
        tokenizer: a tokenizer with a chat template.
        special_tokens_in_text: "plain"; "refuse", the same, and `check` raises an error; or "keep",
            which makes them control tokens, as if the template had written them.
        needs_template: if False, a tokenizer without a template is taken too, for texts that were
            rendered before; nothing else can be rendered then.

    Attributes:
        special: the tokenizer's control tokens.
        closing_text: text that the template writes after a response, up to and including its first
            special token.
        appended_ids: the end-of-sequence token if the template closes a response with no special
            token; it is never rendered, and the conversation ends with it. Else empty.
        closing_ids: both as token ids.

    Raises:
        ValueError: there is no chat template and it is needed, it is no Jinja, it does not end (see
            `trial.check_ends`), it drops the assistant's text, a response does not begin with its
            generation prompt, there is no token to close a response, or special_tokens_in_text has
            another value.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        special_tokens_in_text: SpecialTokensInText = "plain",
        *,
        needs_template: bool = True,
    ) -> None:
        if special_tokens_in_text not in (choices := typing.get_args(SpecialTokensInText)):
            raise ValueError(
                f"special_tokens_in_text must be one of {', '.join(choices)}, got "
                f"{special_tokens_in_text!r}"
            )
        self.tokenizer = tokenizer
        self.special_tokens_in_text = special_tokens_in_text
        self.special = SpecialTokens(tokenizer)  # enough for the texts of the probes
        self.closing_text = ""
        self.closing_ids: list[int] = []
        self.appended_ids: list[int] = []
        if not tokenizer.chat_template and not needs_template:
            return
        check_ends(
            str(tokenizer.chat_template),
            lambda: "".join([*self._probed({}), *self._probed(_WITHOUT_THINKING)]),
        )
        opening, answered = self._probed({})
        if not answered.startswith(opening):
            opening, answered = self._probed(_WITHOUT_THINKING)
        if _SENTINEL not in answered:
            raise ValueError("chat_template drops the assistant's messages")
        if not answered.startswith(opening):
            own = opening[len(os.path.commonprefix([opening, answered])) :][:40]
            raise ValueError(
                f"chat_template ends its generation prompt with {own!r}, with which an answered "
                "chat does not go on: set chat_template to a copy that leaves it out"
            )
        lead, _, self._tail = answered[len(opening) :].partition(_SENTINEL)
        self._lead = lead.rstrip(" ")
        self.special = SpecialTokens(tokenizer, self._written())
        self.closing_text, self.closing_ids, self.appended_ids = self._closing()

    def _probed(self, options: dict[str, Any]) -> tuple[str, str]:
        """Return a rendered prompt, and the same with an answer; options are the template's."""
        self._options = options
        answer: Message = {"role": "assistant", "content": _SENTINEL}
        return self._render(PROBE, generate=True), self._render([*PROBE, answer])

    def _written(self) -> str:
        """Return the text that the template writes around messages, with probes in between."""
        turns = [*PROBE, {"role": "assistant", "content": _SENTINEL}, *PROBE]
        written = [self._render(turns)]
        with contextlib.suppress(ValueError):  # many templates know no system
            written.append(self._render([{"role": "system", "content": _SENTINEL}, *turns]))
        return "".join(written)

    def _closing(self) -> tuple[str, list[int], list[int]]:
        tokenizer = self.tokenizer
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special.update(tokenizer.all_special_ids)
        ids = self._tokenize([self._tail])[0]
        for index, id in enumerate(ids):
            if id in special:
                token = str(tokenizer.convert_ids_to_tokens(id))
                head, _, _ = self._tail.partition(token)
                return head + token, ids[: index + 1], []
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "chat_template closes a response with no special token and the tokenizer has no "
                "eos_token: set one of them"
            )
        return self._tail, [*ids, tokenizer.eos_token_id], [tokenizer.eos_token_id]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids after which the model writes its response to `messages`.

        Raises:
            ValueError: the template rejects the messages.
        """
        return self._tokenize([self._prompt(messages)])[0]

    def thinking_ids(self, messages: Sequence[Message], tag: str) -> list[int]:
        """Return the token ids after which the model goes on with its thinking.

        Args:
            messages: the conversation, whose template is told to let the model think.
            tag: text that opens a thinking block; it is added, with a line break, unless the
                template has written it.

        Raises:
            ValueError: the template rejects the messages.
        """
        opened = self._render(messages, generate=True, options=_WITH_THINKING)
        if not opened.rstrip().endswith(tag.strip()):
            opened += f"{tag}\n"
        return self._tokenize([opened])[0]

    def header_ids(self) -> list[int]:
        """Return the token ids that open the assistant's turn.

        They are those of the generation prompt, or of all that the template writes between a user's
        message and its answer if there is no generation prompt.

        Raises:
            ValueError: the template writes nothing there.
        """
        asked, opened = self._render(PROBE), self._prompt(PROBE)
        header = opened[len(asked) :] if opened.startswith(asked) else ""
        header = header or opened.rpartition(PROBE[-1]["content"])[2]
        if not header.strip():
            raise ValueError("chat_template writes nothing between a message and its answer")
        return self._tokenize([header])[0]

    def response_ids(self, messages: Sequence[Message], text: str) -> list[int]:
        """Return the token ids of `text` as the response to `messages`, without closing tokens.

        Raises:
            ValueError: the template rejects the messages or does not render them in order.
        """
        ((_, response),) = self.answer_ids([self.render(messages, text)])
        return response

    def render(self, messages: Sequence[Message], text: str) -> Answer:
        """Render `messages` and the response `text`.

        Raises:
            ValueError: the template rejects the messages or does not render them in order.
        """
        prompt = self._prompt(messages)
        answered = self._render([*messages, {"role": "assistant", "content": text}])
        if not (answered.startswith(prompt) and answered.endswith(self._tail)):
            raise ValueError(
                "chat_template changes earlier messages as a conversation continues, so a prompt "
                "differs from the one a model would have seen: set chat_template to one that does "
                "not"
            )
        response = answered[len(prompt) : len(answered) - len(self._tail)]
        if not unquoted(response).strip():
            raise ValueError("chat_template renders an empty response")
        return Answer(prompt, response)

    def answer_ids(self, answers: Sequence[Answer]) -> list[tuple[list[int], list[int]]]:
        """Return the token ids of each answer's prompt and response."""
        texts = dict.fromkeys(
            text for answer in answers for text in (answer.prompt, answer.prompt + answer.response)
        )
        ids = dict(zip(texts, self._tokenize(list(texts)), strict=True))
        return [
            (
                ids[answer.prompt],
                self.continuation(
                    ids[answer.prompt], ids[answer.prompt + answer.response], answer.response
                ),
            )
            for answer in answers
        ]

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of a text by itself, without a template."""
        return self._tokenize([self._quoted(text)])[0]

    def check(self, record: Triple | Dialogue | Request) -> None:
        """Check that no text of a record has a control token, if those are refused.

        Raises:
            ValueError: a text has one; names the field.
        """
        if self.special_tokens_in_text == "refuse":
            for name, text in texts_of(record):
                self.check_text(name, text)

    def check_text(self, name: str, text: str) -> None:
        """Check one text, see `check`.

        Raises:
            ValueError: the text has a control token; names it.
        """
        if self.special_tokens_in_text == "refuse" and (found := self.special.pattern.search(text)):
            raise ValueError(
                f"{name}: has the special token {found[0]!r} as text, expected none: remove it, or "
                "choose special_tokens_in_text: plain, which reads it as text"
            )

    def text(self, id: int) -> str:
        """Decode one token."""
        return str(self.tokenizer.decode([id]))

    def continuation(self, before: list[int], whole: list[int], text: str) -> list[int]:
        """Return the token ids of `text` after `before`; `whole` are those of the joined text.

        If the tokenizer would merge across the border, `text` is tokenized separately: after
        `before`, a model can only write whole new tokens.
        """
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self._tokenize([text])[0]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.special.encode(texts)

    def _quoted(self, text: str) -> str:
        special = self.special
        return (special.verbatim if self.special_tokens_in_text == "keep" else special.quote)(text)

    def _prompt(self, messages: Sequence[Message]) -> str:
        return self._render(messages, generate=True) + self._lead

    def _render(
        self,
        messages: Sequence[Message],
        *,
        generate: bool = False,
        options: dict[str, Any] | None = None,
    ) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: set chat_template (the configuration key, or "
                "the tokenizer's attribute) to that of the model's instruct version: a file, or "
                f"one of {', '.join(CHAT_TEMPLATES)}"
            )
        quoted = [{**one, "content": self._quoted(one["content"])} for one in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    quoted,
                    tokenize=False,
                    add_generation_prompt=generate,
                    **(self._options if options is None else options),
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"chat_template is not valid Jinja: {error.message} at line {error.lineno}"
            ) from error
        except TEMPLATE_ERRORS as error:
            said = " ".join(str(error).split())
            raise ValueError(f"chat_template rejects the messages: {said}") from error


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` consecutive items; the last one may be shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
