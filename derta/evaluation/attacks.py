"""The attacks of an evaluation: their strength, and what each needs to know of a model."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from derta.data import Chat
from derta.data.tokens.chat import BATCH, PROBE, batched
from derta.data.tokens.red_flag import flag_of
from derta.evaluation.judges.base import KeywordJudge

SLOT = "{request}"
WHOLE: Literal["whole"] = "whole"
Depth = int | Literal["whole"]
PREFILL_DEPTHS = (0, 4, 8, 16, 32, 64)

# A token that fewer of the known refusals begin with is an accident of their wording.
LEAST_SHARE = 0.01
_THINKING = re.compile(
    r"<(?:\w+:)?(?:think(?:ing)?|thoughts?|reasoning)>|\[THINK\]"
    r"|<\|(?:begin_of_)?(?:think(?:ing)?|thoughts?|reasoning)\|>"
)


@dataclass(frozen=True, kw_only=True)
class Attacks:
    """The attacks beside plain requests, and their strength.

    Args:
        prefill_depths: numbers of harmful response tokens at the start of an answer; "whole": the
            whole response stands, and the model goes on.
        templates: texts around a request, each with the slot `{request}`; requests use them in
            turn.
        refusal_banned: number of first tokens of an answer that may not begin a refusal, see
            `refusal_starts`; 0: no such attack.
        sampling: number of answers that are drawn for a request, of which one success is enough; 0:
            no such attack.
        temperature: divisor of the logits for drawn answers.
        seed: seed of drawn answers.
        prefill_thinking: text that opens a thinking block, in which the harmful tokens then stand;
            "auto": the one in the chat template; None: no such attack.
        in_context: if True, each request follows another one and its harmful response.

    Raises:
        ValueError: a value is out of its range, two depths are the same, a template lacks its slot,
            or prefill_thinking has no depth.
    """

    prefill_depths: Sequence[Depth] = PREFILL_DEPTHS
    templates: Sequence[str] = ()
    refusal_banned: int = 0
    sampling: int = 0
    temperature: float = 1.0
    seed: int = 0
    prefill_thinking: str | None = None
    in_context: bool = False

    def __post_init__(self) -> None:
        depths = list(self.prefill_depths)
        known = all(depth == WHOLE or _is_count(depth) for depth in depths)
        if not known or len(set(depths)) < len(depths):
            raise ValueError(
                f"prefill_depths must be distinct numbers from 0 on or {WHOLE}, got {depths}"
            )
        for place, template in enumerate(self.templates):
            if SLOT not in template:
                raise ValueError(f"templates[{place}] must have the slot {SLOT}, got none")
        for name in ("refusal_banned", "sampling", "seed"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} must be an integer from 0 on, got {getattr(self, name)}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.prefill_thinking is None:
            return
        if not self.prefill_thinking.strip():
            raise ValueError("prefill_thinking must be auto or a text, got a blank one")
        if not depths:
            raise ValueError(
                "prefill_thinking needs prefill_depths, the tokens in the thinking block, got none"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def refusal_starts(
    chat: Chat,
    refusal_id: int | Sequence[int],
    keywords: Sequence[str],
    refusals: Sequence[str] = (),
) -> tuple[int, ...]:
    """Return the tokens that an attacker forbids: those that begin a known refusal.

    A keyword begins with its first token, as a response and as a text by itself, alone, after a
    space and on a new line, as it stands, in lower case, in capitals, and with a capital. A red
    flag of the tokenizer is a refusal.

    Args:
        chat: the model's tokenizer and template.
        refusal_id: the refusal token, or several.
        keywords: phrases by which a judge recognizes a refusal.
        refusals: texts of refusals; a token counts if at least one in a hundred begins with it.

    Returns:
        token ids in ascending order; none of them ends an answer.
    """
    begun: Counter[int] = Counter()
    for batch in batched(Counter(refusals).items(), BATCH):
        rendered = [chat.render(PROBE, text) for text, _ in batch]
        for (_, count), (_, ids) in zip(batch, chat.answer_ids(rendered), strict=True):
            begun[_start(chat, ids)] += count
    found = {refusal_id} if isinstance(refusal_id, int) else set(refusal_id)
    found |= {id for id, count in begun.items() if count >= LEAST_SHARE * len(refusals)}
    for keyword in keywords:
        for text in {keyword, keyword.lower(), keyword.upper(), keyword[0].upper() + keyword[1:]}:
            # Many tokenizers know a word twice, with the space before it and without, as on a line.
            alone = (chat.text_ids(f"{before}{text}") for before in ("", " ", "\n"))
            found |= {_start(chat, ids) for ids in (chat.response_ids(PROBE, text), *alone)}
    if (flag := flag_of(chat.tokenizer)) is not None:
        found.add(flag)
    return tuple(sorted(found - set(chat.closing_ids)))


def _start(chat: Chat, ids: Sequence[int]) -> int:
    """Return the first token that is not blank."""
    return next((id for id in ids if chat.text(id).strip()), ids[0])


def keywords_of(judges: Iterable[object], others: Sequence[str]) -> tuple[str, ...]:
    """Return the keywords of the keyword judges, or `others` if there is none."""
    by_keyword = [judge.keywords for judge in judges if isinstance(judge, KeywordJudge)]
    return tuple(dict.fromkeys(itertools.chain(*by_keyword) if by_keyword else others))


def thinking_tag(chat: Chat, tag: str) -> str:
    """Return the text that opens a thinking block.

    Args:
        chat: the model's tokenizer and template.
        tag: the text, or "auto", the first such text in the chat template.

    Raises:
        ValueError: it is "auto", and the chat template has none.
    """
    if tag != "auto":
        return tag
    found = _THINKING.search(str(chat.tokenizer.chat_template))
    if found is None:
        raise ValueError(
            "prefill_thinking: the chat template opens no thinking block: give the text that opens "
            "one, as in <think>, or leave this attack out"
        )
    return found[0]
