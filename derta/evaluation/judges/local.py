"""Judges that are models on this machine: language models with a rubric, and classifiers."""

from __future__ import annotations

import itertools
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
from derta.modeling.shared_work import ranks

UNDECIDED = Verdict(refused=None)
_SENTINEL = "sentinel-answer"


class ModelJudge:
    """A language model that judges each exchange with a greedy reply.

    An exchange that does not fit the model's context is undecided and never cut: half an answer
    does not decide on the other half.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template if the rubric's questions are conversations.
        rubric: one of `RUBRICS`, or `paper_rubric`.
        batch_size: exchanges per batch.

    Raises:
        ValueError: the model has no end of sequence, or the rubric's questions are conversations
            and the chat template is missing or drops the answer.
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
        self.decides_refusals = rubric.decides_refusals
        self.batch_size = batch_size
        # Templates of vision models take contents as lists of parts and ignore plain text.
        self._in_parts = False
        probe = rubric.ask(Exchange([{"role": "user", "content": "Hello"}], _SENTINEL))
        if not isinstance(probe, str) and _SENTINEL not in self._render(probe):
            self._in_parts = True
            if _SENTINEL not in self._render(probe):
                raise ValueError("the judge's chat template drops the answer to be judged")

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
    """A sequence classifier whose likeliest label decides on refusal or harm.

    An answer that does not fit the classifier's context is undecided. Inside `over_ranks`, ranks
    share the answers.

    Args:
        model: a sequence classifier with one label per answer.
        tokenizer: its tokenizer.
        refusal_label: the label of answers that refuse, if any.
        harmful_label: the label of answers that do harm, if any.
        reads: input of the classifier: only the "answer" that the model wrote, or the "exchange",
            request and whole response as a pair of texts.
        batch_size: answers per batch.

    Raises:
        ValueError: no label is named, the model lacks a label, or its labels are not exclusive.
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
                "refusal_label or harmful_label must be given; the labels are "
                f"{_listed(self.labels)}"
            )
        for name, label in (("refusal_label", refusal_label), ("harmful_label", harmful_label)):
            if label is not None and label not in self.labels:
                raise ValueError(f"{name} must be one of {_listed(self.labels)}, got {label!r}")
        if len(self.labels) < 2 or model.config.problem_type == "multi_label_classification":
            raise ValueError("the classifier must give every answer exactly one of several labels")
        self.model = model
        self.tokenizer = tokenizer
        self.refusal_label = refusal_label
        self.decides_refusals = refusal_label is not None
        self.harmful_label = harmful_label
        self.reads = reads
        # Without a shared padding token, the model would read the padding.
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
        # The longest answers come first, to fail early if memory is short.
        places = sorted(read, key=lambda place: len(read[place]["input_ids"]), reverse=True)
        size = self.batch_size
        batches = ranks().share(
            [places[first : first + size] for first in range(0, len(places), size)]
        )
        labelled = []
        with (
            evaluating(self.model),
            tqdm(
                total=sum(map(len, batches)),
                desc="judge",
                unit="answer",
                delay=SHOWN_AFTER_S,
                leave=False,
                disable=ranks().rank > 0,
            ) as bar,
        ):
            for batch in batches:
                labels = self._labels([read[place] for place in batch])
                labelled.append(list(zip(batch, labels, strict=True)))
                bar.update(len(batch))
        for place, label in itertools.chain(*ranks().gather(labelled)):
            verdicts[place] = self._verdict(label)
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
    """Return the most tokens that a classifier can read."""
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
