"""Judges that are models on this machine: language models with a rubric, and classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jinja2
import torch
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from derta.data import Message
from derta.evaluation.generation.local import SHOWN_AFTER_S, generate
from derta.evaluation.judges.base import SILENT, Exchange, Verdict
from derta.evaluation.judges.rubrics import Rubric, request_of
from derta.modeling.introspection import context_length, evaluating

UNDECIDED = Verdict(refused=None)
_SENTINEL = "sentinel-answer"


class ModelJudge:
    """A language model that is asked about each exchange and replies with its likeliest tokens.

    An exchange that does not fit the model's context is left undecided, whole: half an answer says
    nothing of the other half.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; with a chat template, if the rubric asks in conversations.
        rubric: one of `RUBRICS`, or `paper_rubric`.
        batch_size: exchanges a batch.

    Raises:
        ValueError: nothing ends the model's sequences, or the rubric asks in conversations and
            there is no chat template, or one that leaves out what is to be judged.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rubric: Rubric,
        batch_size: int = 8,
    ) -> None:
        configured = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id}
        ends.update(configured if isinstance(configured, list) else [configured])
        self._stop_ids = frozenset(ends - {None})
        if not self._stop_ids:
            raise ValueError("the judge's tokenizer has no eos_token: set it")
        self.model = model
        self.tokenizer = tokenizer
        self.rubric = rubric
        self.batch_size = batch_size
        # Templates of models that see take contents as lists of parts, and pass over texts.
        self._in_parts = False
        probe = rubric.ask(Exchange([{"role": "user", "content": "Hello"}], _SENTINEL))
        if not isinstance(probe, str) and _SENTINEL not in self._render(probe):
            self._in_parts = True
            if _SENTINEL not in self._render(probe):
                raise ValueError("the judge's chat template leaves out the answer it is to read")

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        room = context_length(self.model) - self.rubric.max_new_tokens
        verdicts = [UNDECIDED if exchange.answer.strip() else SILENT for exchange in exchanges]
        asked: dict[int, list[int]] = {}
        for place, exchange in enumerate(exchanges):
            if exchange.answer.strip():
                question = self._question(exchange)
                if len(question) <= room:
                    asked[place] = question
        replies = generate(
            self.model,
            list(asked.values()),
            ids=[f"exchange {place}" for place in asked],
            stop_ids=self._stop_ids,
            max_new_tokens=self.rubric.max_new_tokens,
            batch_size=self.batch_size,
            title="judge",
        )
        for place, reply in zip(asked, replies, strict=True):
            text = str(self.tokenizer.decode(reply, skip_special_tokens=True))
            verdicts[place] = self.rubric.read(text)
        return verdicts

    def _question(self, exchange: Exchange) -> list[int]:
        question = self.rubric.ask(exchange)
        if isinstance(question, str):
            return self.tokenizer(question, verbose=False)["input_ids"]
        text = self._render(question)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _render(self, messages: Sequence[Message]) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError("the judge's tokenizer has no chat template, expected the model's own")
        shaped: list[dict[str, Any]] = [
            {**one, "content": [{"type": "text", "text": one["content"]}]}
            if self._in_parts
            else one
            for one in messages
        ]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    shaped, tokenize=False, add_generation_prompt=True
                )
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the judge's chat template rejects the exchange: {error}") from error


class ClassifierJudge:
    """A sequence classifier whose likeliest label says whether an answer refuses, or harms.

    An answer that does not fit the classifier's context is left undecided.

    Args:
        model: a sequence classifier with one label an answer.
        tokenizer: its tokenizer.
        refusal_label: the label of answers that refuse, if it has one.
        harmful_label: the label of answers that do harm, if it has one.
        reads: what it was trained on: the "answer" alone, as the model wrote it itself, or the
            "exchange", request and response as a pair of texts, with what was prefilled of it.
        batch_size: answers a batch.

    Raises:
        ValueError: no label is named, the model has none of that name, or its labels do not
            exclude one another.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        refusal_label: str | None = None,
        harmful_label: str | None = None,
        reads: Literal["answer", "exchange"] = "answer",
        batch_size: int = 16,
    ) -> None:
        id2label = model.config.id2label or {}
        self.labels: list[str] = [label for _, label in sorted(id2label.items())]
        if refusal_label is None and harmful_label is None:
            raise ValueError(
                f"name refusal_label, harmful_label or both; the labels are {_listed(self.labels)}"
            )
        for name, label in (("refusal_label", refusal_label), ("harmful_label", harmful_label)):
            if label is not None and label not in self.labels:
                raise ValueError(f"{name}: {label!r} is none of {_listed(self.labels)}")
        if len(self.labels) < 2 or model.config.problem_type == "multi_label_classification":
            raise ValueError("the classifier must give every answer exactly one of several labels")
        self.model = model
        self.tokenizer = tokenizer
        self.refusal_label = refusal_label
        self.harmful_label = harmful_label
        self.reads = reads
        # Without a padding token that both know, a model would read the padding.
        padded = tokenizer.pad_token_id is not None and (
            model.config.get_text_config().pad_token_id == tokenizer.pad_token_id
        )
        self.batch_size = batch_size if padded else 1

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        verdicts = [UNDECIDED if exchange.answer.strip() else SILENT for exchange in exchanges]
        room = min(self.tokenizer.model_max_length, _positions(self.model))
        read: dict[int, BatchEncoding] = {}
        for place, exchange in enumerate(exchanges):
            if exchange.answer.strip():
                inputs = self._inputs(exchange)
                if len(inputs["input_ids"]) <= room:
                    read[place] = inputs
        # The longest first: what does not fit the memory fails at once.
        places = sorted(read, key=lambda place: len(read[place]["input_ids"]), reverse=True)
        with (
            evaluating(self.model),
            tqdm(
                total=len(places), desc="judge", unit="answer", delay=SHOWN_AFTER_S, leave=False
            ) as bar,
        ):
            for first in range(0, len(places), self.batch_size):
                batch = places[first : first + self.batch_size]
                for place, label in zip(batch, self._labels([read[p] for p in batch]), strict=True):
                    verdicts[place] = self._verdict(label)
                bar.update(len(batch))
        return verdicts

    def _inputs(self, exchange: Exchange) -> BatchEncoding:
        if self.reads == "answer":
            return self.tokenizer(exchange.answer, verbose=False)
        request = request_of(exchange.messages)
        return self.tokenizer(request, exchange.response, verbose=False)

    def _labels(self, batch: Sequence[BatchEncoding]) -> list[str]:
        if len(batch) == 1:
            inputs = {name: torch.tensor([ids]) for name, ids in batch[0].items()}
        else:
            inputs = dict(self.tokenizer.pad(list(batch), return_tensors="pt"))
        device = self.model.device
        logits = self.model(**{name: ids.to(device) for name, ids in inputs.items()}).logits
        return [self.labels[index] for index in logits.argmax(-1).tolist()]

    def _verdict(self, label: str) -> Verdict:
        return Verdict(
            refused=None if self.refusal_label is None else label == self.refusal_label,
            harmful=None if self.harmful_label is None else label == self.harmful_label,
        )


def _positions(model: PreTrainedModel) -> int:
    """The longest text that a classifier can read, in tokens."""
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, torch.nn.Embedding)
            and module.padding_idx is not None
        ):  # as in RoBERTa: the padding's position comes before those of texts
            return module.num_embeddings - module.padding_idx - 1
    return context_length(model)


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels)
