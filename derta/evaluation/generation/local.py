"""Answers to many prompts: the generator interface, and a model on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from derta.data import Chat
from derta.data.records.defaults import SHOWN_AFTER_S as SHOWN_AFTER_S
from derta.data.tokens.red_flag import flag_of
from derta.evaluation.generation.answers import AnswerFile
from derta.evaluation.generation.choice import TokenChoice
from derta.evaluation.generation.decoding import GREEDY, Decoding
from derta.modeling.introspection import context_length, evaluating
from derta.modeling.shared_work import ranks


@dataclass(frozen=True)
class Written:
    """The answer of a model to a prompt.

    Attributes:
        text: the answer without special tokens; nothing of it if it is flagged.
        ids: token ids of the answer, without the token that ended it.
        flagged: if True, that was the model's red flag, see `derta.modeling.red_flag`.
        kept: number of first tokens before a defender's refusal, which begins on a new line that
            has no token; 0: all of the answer is the model's.
    """

    text: str
    ids: list[int]
    flagged: bool = False
    kept: int = 0


class Generator(Protocol):
    """A generator for many prompts at once: a model on this machine, or a served model."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, ids: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Written]:
        """Return the answer to each prompt of token ids, in order; `ids` name them in errors."""
        ...


def stop_ids(model: PreTrainedModel, chat: Chat) -> frozenset[int]:
    """Return the tokens that end an answer: the end of a chat's turn, and every end of sequence."""
    configured = model.generation_config.eos_token_id
    ends = {chat.closing_ids[-1], chat.tokenizer.eos_token_id}
    ends.update(configured if isinstance(configured, list) else [configured])
    return frozenset(ends - {None})


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of an answer, without special tokens."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)  # a list only for a list of lists
    return text


def written(text: str, ids: list[int], flag: int | None) -> Written:
    """Return an answer as it reaches its reader: nothing of it if a red flag ends it.

    Args:
        text, ids: the answer, with the flag that ended it.
        flag: id of the model's red flag, if it has one.
    """
    if ids[-1:] == [flag]:
        return Written("", ids[:-1], flagged=True)
    return Written(text, ids)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    ids: Sequence[str],
    stop_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int,
    title: str = "generate",
    answers: AnswerFile | None = None,
    decoding: Decoding = GREEDY,
    flag: int | None = None,
) -> list[list[int]]:
    """Return the model's answer to each prompt.

    Sampling, penalties and beams in `generation_config` are ignored. Prompts run in batches of
    similar length, padded on the left and masked. Equal prompts run once. Inside `over_ranks`,
    ranks share the batches.

    Args:
        model: a causal language model, plain or under PEFT, with or without `apply_derta`.
        prompts: token ids of each prompt, at least one.
        ids: name of each prompt in errors.
        stop_ids: tokens at which an answer ends, see `stop_ids`.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts per batch.
        title: title of the progress bar, which appears after two seconds.
        answers: file of known answers, to which new ones are added batch by batch.
        decoding: the choice of tokens, by default the likeliest.
        flag: id of a red flag, at which an answer ends too.

    Returns:
        for each prompt, the token ids of the answer, without the token that ended it unless that
        is the flag.

    Raises:
        ValueError: a number is below 1, a prompt is empty, or it does not fit the model's context
            together with its answer; names its id.
        FloatingPointError: the model's logits are NaN.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    ends = stop_ids if flag is None else {*stop_ids, flag}
    context = context_length(model)
    for id, prompt in zip(ids, prompts, strict=True):
        if not len(prompt):
            raise ValueError(f"{id}: the prompt is empty, expected at least one token")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"{id}: the prompt's {len(prompt)} tokens and max_new_tokens ({max_new_tokens}) "
                f"exceed the model's context of {context}"
            )
    distinct = {tuple(prompt): id for id, prompt in zip(ids, prompts, strict=True)}
    known = ranks().from_first(
        lambda: {} if answers is None else answers.find(distinct, ends, max_new_tokens, decoding)
    )
    # The longest prompts come first, to fail early if memory is short.
    missing = sorted(distinct.keys() - known.keys(), key=_longest_first)
    batches = ranks().share(
        [missing[first : first + batch_size] for first in range(0, len(missing), batch_size)]
    )
    made = []
    with (
        evaluating(model),
        _greedy(model, ends, max_new_tokens),
        tqdm(
            total=sum(map(len, batches)),
            desc=title,
            unit="answer",
            delay=SHOWN_AFTER_S,
            leave=False,
            disable=ranks().rank > 0,
        ) as bar,
    ):
        for batch in batches:
            rows = _run(model, batch, ends, max_new_tokens, decoding)
            said = [_until_end(row, ends, flag) for row in rows]
            named = zip((distinct[prompt] for prompt in batch), batch, said, strict=True)
            made.append(list(named))
            if answers is not None:
                answers.add(made[-1], ends, max_new_tokens, decoding)
            bar.update(len(batch))
    everything = ranks().gather(made)
    if answers is not None:
        answers.join(everything, ends, max_new_tokens, decoding)
    known |= {prompt: ids for batch in everything for _, prompt, ids in batch}
    return [known[tuple(prompt)] for prompt in prompts]


def _longest_first(prompt: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return -len(prompt), prompt


def _run(
    model: PreTrainedModel,
    batch: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    decoding: Decoding,
) -> list[list[int]]:
    longest = max(map(len, batch))
    device = model.device
    pad = min(stop_ids)  # any token of the vocabulary: it is masked
    input_ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in batch], device=device)
    lengths = torch.tensor([[len(prompt)] for prompt in batch], device=device)
    attention_mask = torch.arange(longest, device=device) >= longest - lengths
    # Training may have left a router loss on, which cannot be computed from one new token.
    router = (
        {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    )
    choice = TokenChoice(decoding, batch, max_new_tokens)
    output = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=attention_mask.long(),
        logits_processor=LogitsProcessorList([choice]),
        **router,
    )
    choice.check()
    rows: list[list[int]] = output[:, longest:].tolist()
    return rows


def _until_end(ids: list[int], ends: Collection[int], flag: int | None) -> list[int]:
    end = next((place for place, id in enumerate(ids) if id in ends), len(ids))
    return ids[: end + 1] if ids[end : end + 1] == [flag] else ids[:end]


@contextlib.contextmanager
def _greedy(
    model: PreTrainedModel, stop_ids: Collection[int], max_new_tokens: int
) -> Iterator[None]:
    """Replace the model's generation configuration, from which generate() takes its defaults."""
    inner: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
    own = inner.generation_config
    inner.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=min(stop_ids),
    )
    try:
        yield
    finally:
        inner.generation_config = own


class ModelGenerator:
    """Answers of a model on this machine.

    Args:
        model: as for `generate`.
        chat: the model's tokenizer and template.
        max_new_tokens, batch_size, answers: as for `generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: Chat,
        *,
        max_new_tokens: int,
        batch_size: int,
        answers: AnswerFile | None = None,
    ) -> None:
        self.model = model
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.answers = answers

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, ids: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Written]:
        """Generate answers, see `Generator`.

        Raises:
            ValueError: as `generate`.
        """
        flag = flag_of(self.chat.tokenizer)
        made = generate(
            self.model,
            prompts,
            ids=ids,
            stop_ids=stop_ids(self.model, self.chat),
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            answers=self.answers,
            decoding=decoding,
            flag=flag,
        )
        return [written(decode(self.chat.tokenizer, answer), answer, flag) for answer in made]
