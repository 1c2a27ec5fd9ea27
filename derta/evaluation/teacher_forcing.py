"""Refusal curves, rank curves and perplexity of given responses, by packed forward passes.

The fused head loss returns the negative log-likelihood of every row as a by-product. These figures
therefore cost one forward pass over the packs and hold no logits. Ranks come from the same pass and
cost one more product of its rows with the head.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from derta.data import (
    Chat,
    Dialogue,
    Drawn,
    Encoded,
    EncodedDialogue,
    EncodedTriple,
    Message,
    PackedBatch,
    Triple,
    pack,
    packed_length,
    plan_packs,
    resolve_refusal_token,
)
from derta.data.records.defaults import SpecialTokensInText
from derta.data.records.types import Request, naming
from derta.data.tokens.red_flag import flag_of
from derta.evaluation.generation.local import SHOWN_AFTER_S
from derta.labels import IGNORE_INDEX
from derta.modeling.introspection import context_length, evaluating
from derta.modeling.patch import apply_derta, computing, patch_of, remove_derta
from derta.modeling.shared_work import ranks
from derta.objectives.base import Place
from derta.objectives.derta import DertaObjective
from derta_kernels.head_loss import Head, checked_ids, token_ranks

Reduced = TypeVar("Reduced")
# Values by row of a response, by their names.
_Rows = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class RankedTrunks(DertaObjective):
    """Responses without branches, read at every position: the refusal token, and the next token.

    Beside the losses, each row has the "rank" of the response's next token, see `token_ranks`, and
    -1 where none follows.
    """

    @property
    def columns(self) -> Mapping[str, Any]:
        return {**super().columns, "ranked_labels": IGNORE_INDEX}

    def lay(self, drawn: Drawn, place: Place) -> dict[str, np.ndarray]:
        columns = super().lay(drawn, place)
        if isinstance(drawn.example, EncodedTriple):
            harmful = drawn.example.harmful
            columns["ranked_labels"][place.trunk + np.arange(len(harmful))] = harmful
        return columns

    def loss(
        self, hidden: Tensor, head: Head, columns: Mapping[str, Tensor], **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, rows = super().loss(hidden, head, columns, **options)
        rank = token_ranks(
            hidden[0],
            head.weight,
            columns["ranked_labels"][0],
            bias=head.bias,
            logit_scale=head.logit_scale,
            ignore_index=IGNORE_INDEX,
            scratch_mb=options["scratch_mb"],
            group=head.group,
        )
        return loss, {**rows, "rank": rank[None]}


# Responses without branches, the refusal token read at every position.
TRUNKS = DertaObjective(branches=0, cuts="zero")
RANKED = RankedTrunks(branches=0, cuts="zero")
# Source: arXiv 2407.09121, section 3.3.
PAPER_REFUSAL = "Sorry"


def response(chat: Chat, id: str, messages: Sequence[Message], text: str) -> EncodedTriple:
    """Encode `text` as the response to `messages`, in the form that `refusal_curve` reads.

    A response of any kind, even a harmless one, takes the place of the harmful response.
    """
    return EncodedTriple(
        id=id,
        prompt=np.array(chat.prompt_ids(messages), np.int32),
        harmful=np.array(chat.response_ids(messages, text), np.int32),
        safe=np.array(chat.closing_ids, np.int32),
        cut_limit=0,
    )


class ResponseCurves(NamedTuple):
    """The readings of one response h after each of its tokens.

    Attributes:
        refusal: (|h| + 1,) float32, see `refusal_curve`.
        ranks: (|h|,) int64; entry t is the number of tokens that are likelier than the response's
            token t after the t before it, see `derta_kernels.head_loss.token_ranks`.
    """

    refusal: np.ndarray
    ranks: np.ndarray


def refusal_curves(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Triple | Dialogue | Request],
    *,
    refusal: str | int | Sequence[str | int] = "auto",
    max_tokens: int = 4096,
    special_tokens_in_text: SpecialTokensInText = "plain",
) -> list[np.ndarray]:
    """Return the `refusal_curve` of each record's response.

    The response is a triple's harmful response, a dialogue's last answer, or a request's response.

    Args:
        model: a model that `apply_derta` supports, patched or not; its state is restored.
        tokenizer: its tokenizer, with a chat template.
        records: records with a response.
        refusal: as for `find_refusal_token`.
        max_tokens: tokens per pack; a longer response has its own pack.
        special_tokens_in_text: as for `Chat`; "refuse" makes a control token in a text an error of
            its record.

    Returns:
        for each record (tokens of the response + 1,) float32: entry t is read after t of them.

    Raises:
        TypeError: a record is neither a triple, nor a dialogue, nor a request.
        ValueError: a request has no response, a record does not fit the model's context or its chat
            template or has a special token that is refused (names its id), or as `refusal_curve`
            and `find_refusal_token`.
    """
    read = _responses(model, tokenizer, records, refusal, special_tokens_in_text)
    return refusal_curve(model, *read, max_tokens)


def response_curves(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Triple | Dialogue | Request],
    *,
    refusal: str | int | Sequence[str | int] = "auto",
    max_tokens: int = 4096,
    special_tokens_in_text: SpecialTokensInText = "plain",
) -> list[ResponseCurves]:
    """Return refusal curve and ranks of each record's response, from one forward pass.

    Args:
        model, tokenizer, ...: see `refusal_curves`.

    Raises:
        TypeError, ValueError: as `refusal_curves`.
    """
    read = _responses(model, tokenizer, records, refusal, special_tokens_in_text)
    return response_curve(model, *read, max_tokens)


def _responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Triple | Dialogue | Request],
    refusal: str | int | Sequence[str | int],
    special_tokens_in_text: SpecialTokensInText,
) -> tuple[list[EncodedTriple], int | Sequence[int]]:
    """Return the encoded responses of records, and the id of the refusal token, or several."""
    chat = Chat(tokenizer, special_tokens_in_text)
    examples = []
    for record in records:
        messages, text = _response_of(record)
        with naming(record):
            chat.check(record)
            examples.append(response(chat, record.id, messages, text))
    triples = [record for record in records if isinstance(record, Triple)]
    return examples, find_refusal_token(model, tokenizer, refusal, triples)


def _response_of(record: Triple | Dialogue | Request) -> tuple[Sequence[Message], str]:
    if isinstance(record, Triple):
        return record.messages, record.harmful
    if isinstance(record, Dialogue):
        return record.messages[:-1], record.messages[-1]["content"]
    if not isinstance(record, Request):
        raise TypeError(
            f"records must be triples, dialogues or requests, got {type(record).__name__}"
        )
    if not record.response:
        raise ValueError(f"{record.id}: response: is missing, expected one to read")
    return record.messages, record.response


def find_refusal_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    refusal: str | int | Sequence[str | int] = "auto",
    triples: Sequence[Triple] = (),
) -> int | tuple[int, ...]:
    """Return the id of the refusal token, or those of a set.

    Args:
        model: a model, patched or not.
        tokenizer: its tokenizer, with a chat template.
        refusal: a word, a token id, several of them, or "auto": what `apply_derta` was given if the
            model is patched, else the tokenizer's red flag, else the most common first token of the
            safe responses, else "Sorry".
        triples: triples with safe responses, for "auto".

    Raises:
        TypeError: as `derta.resolve_refusal_token`.
        ValueError: likewise, or no token is named.
    """
    patch = patch_of(model)
    if refusal == "auto" and patch is not None:
        return patch.refusal_token_id
    return refusal_ids(tokenizer, refusal, triples)


def refusal_ids(
    tokenizer: PreTrainedTokenizerBase,
    refusal: str | int | Sequence[str | int] = "auto",
    triples: Sequence[Triple] = (),
) -> int | tuple[int, ...]:
    """Do as `find_refusal_token`, for a model that is not patched."""
    if not isinstance(refusal, str | int) and not refusal:
        raise ValueError("refusal must name at least one token, got none")
    flag = flag_of(tokenizer)
    if refusal == "auto" and flag is not None:
        return flag
    if refusal == "auto" and not triples:
        refusal = PAPER_REFUSAL
    if isinstance(refusal, str | int):
        return resolve_refusal_token(tokenizer, refusal, triples).id
    # Only "auto" reads the safe responses of all triples.
    return tuple(
        resolve_refusal_token(tokenizer, one, triples if one == "auto" else triples[:1]).id
        for one in refusal
    )


def refusal_curve(
    model: PreTrainedModel,
    examples: Sequence[EncodedTriple],
    refusal_token_id: int | Sequence[int],
    max_tokens: int = 4096,
) -> list[np.ndarray]:
    """Return the probability of a refusal token after every token of each harmful response.

    Equals, up to rounding:
        logits = model(torch.cat([prompt, harmful])[None]).logits[0].float()
        refusals = [refusal_token_id] if isinstance(refusal_token_id, int) else refusal_token_id
        curve = logits.softmax(-1)[len(prompt) - 1 :, refusals].sum(-1)

    The model may be patched or not, and its state is restored. Inside `over_ranks`, ranks share the
    packs.

    Args:
        model: a model that `apply_derta` supports.
        examples: examples with harmful responses; safe responses are ignored.
        refusal_token_id: see `derta.resolve_refusal_token`; several: their probabilities add up.
        max_tokens: tokens per pack; a longer example has its own pack.

    Returns:
        for each example (|h| + 1,) float32: entry t is read after t tokens of the response.

    Raises:
        ValueError: `apply_derta` refuses the model, it is patched with another refusal token, or an
            example does not fit its context.
        FloatingPointError: the model's probabilities are NaN.
    """
    return _read_responses(model, examples, refusal_token_id, max_tokens, TRUNKS, _refusal_of)


def response_curve(
    model: PreTrainedModel,
    examples: Sequence[EncodedTriple],
    refusal_token_id: int | Sequence[int],
    max_tokens: int = 4096,
) -> list[ResponseCurves]:
    """Return the refusal curve of each harmful response and the ranks of its tokens, together.

    Equals, up to rounding:
        logits = model(torch.cat([prompt, harmful])[None]).logits[0, len(prompt) - 1 :].float()
        refusal = logits.softmax(-1)[:, refusal_token_id]
        ranks = (logits[:-1] > logits[:-1].gather(1, harmful[:, None])).sum(1)

    Args:
        model, examples, refusal_token_id, max_tokens: see `refusal_curve`.

    Raises:
        ValueError, FloatingPointError: as `refusal_curve`.
    """

    def curves_of(rows: _Rows) -> ResponseCurves:
        return ResponseCurves(_refusal_of(rows), rows["rank"][:-1])

    return _read_responses(model, examples, refusal_token_id, max_tokens, RANKED, curves_of)


def _refusal_of(rows: _Rows) -> np.ndarray:
    return np.exp(-rows["rto"].astype(np.float32))


def _read_responses(
    model: PreTrainedModel,
    examples: Sequence[EncodedTriple],
    refusal_token_id: int | Sequence[int],
    max_tokens: int,
    objective: DertaObjective,
    reduce: Callable[[_Rows], Reduced],
) -> list[Reduced]:
    """Return what `reduce` makes of the rows of each harmful response."""
    drawn = [
        Drawn(example, cuts=np.zeros(0, np.int64), depths=np.ones(len(example.harmful) + 1, bool))
        for example in examples
    ]

    def by_place(read: _Read) -> dict[int, Reduced]:
        depth, index = read.batch.depth[0].numpy(), read.batch.example_index[0].numpy()
        rows = {name: values[0].cpu().numpy() for name, values in read.rows.items()}
        made = {}
        for nth, place in enumerate(read.places):
            own = (index == nth) & (depth >= 0)
            if np.isnan(rows["rto"][own]).any():
                raise FloatingPointError(
                    f"{drawn[place].example.id}: the refusal's probability is NaN, expected a "
                    "number: look at the model's weights, or choose dtype float32"
                )
            made[place] = reduce({name: values[own] for name, values in rows.items()})
        return made

    with _reading(model, objective, refusal_token_id):
        found = _read(model, drawn, max_tokens, objective, by_place)
    made = {place: one for pack_of in found for place, one in pack_of.items()}
    return [made[place] for place in range(len(drawn))]


def perplexity(
    model: PreTrainedModel,
    dialogues: Sequence[EncodedDialogue],
    max_tokens: int = 4096,
) -> tuple[float, int]:
    """Return the negative log-likelihood of the assistant's tokens; perplexity is exp(sum / count).

    Inside `over_ranks`, ranks share the packs.

    Args:
        model, max_tokens: as for `refusal_curve`.
        dialogues: encoded dialogues.

    Returns:
        the sum in nats and the number of tokens, which add up over data sets.

    Raises:
        ValueError: `apply_derta` refuses the model, or a dialogue does not fit its context.
    """
    nothing = np.zeros(0, np.int64)
    drawn = [Drawn(dialogue, nothing, nothing.astype(bool)) for dialogue in dialogues]
    with _reading(model, TRUNKS):
        read = _read(model, drawn, max_tokens, TRUNKS, _likelihood_of)
    return math.fsum(nll for nll, _ in read), sum(count for _, count in read)


def _likelihood_of(read: _Read) -> tuple[float, int]:
    return float(read.rows["mle"].double().sum()), read.batch.totals["mle"].targets


class _Read(NamedTuple):
    """A pack on the CPU, the places of its examples, and their losses."""

    places: tuple[int, ...]
    batch: PackedBatch
    rows: dict[str, Tensor]


def _read(
    model: PreTrainedModel,
    drawn: Sequence[Drawn],
    max_tokens: int,
    objective: DertaObjective,
    reduce: Callable[[_Read], Reduced],
) -> list[Reduced]:
    """Run the model over packs of all examples, and return what `reduce` makes of each."""
    if not drawn:
        return []
    examples: list[Encoded] = [one.example for one in drawn]
    context = context_length(model)
    lengths = [packed_length(one, objective) for one in examples]
    for example, length in zip(examples, lengths, strict=True):
        if length > context:
            raise ValueError(
                f"{example.id}: its {length} tokens exceed the model's context of {context}"
            )
    plan = plan_packs(
        lengths,
        max_tokens=max(max_tokens, *lengths),
        examples_per_step=len(drawn),
        epochs=1,
        seed=0,
    )
    (packs,) = plan.steps
    made = []
    for places in tqdm(
        ranks().share(packs),
        desc="read",
        unit="pack",
        delay=SHOWN_AFTER_S,
        leave=False,
        disable=ranks().rank > 0,
    ):
        batch = pack([drawn[place] for place in places], objective)
        output = model(**batch.to(model.device).model_inputs())
        made.append(reduce(_Read(places, batch, output.rows)))
    return ranks().gather(made)


@contextlib.contextmanager
def _reading(
    model: PreTrainedModel,
    objective: DertaObjective,
    refusal_token_id: int | Sequence[int] | None = None,
) -> Iterator[None]:
    """Patch the model in evaluation mode, and restore it; without an id, any token will do."""
    patch = patch_of(model)
    if (
        patch is not None
        and refusal_token_id is not None
        and checked_ids(refusal_token_id) != checked_ids(patch.refusal_token_id)
    ):
        raise ValueError(
            f"refusal_token_id must be the one given to apply_derta, {patch.refusal_token_id}, got "
            f"{refusal_token_id}: apply it again, or remove_derta first"
        )
    if patch is None:
        apply_derta(model, refusal_token_id or 0)
    try:
        with evaluating(model), computing(model, objective):
            yield
    finally:
        if patch is None:
            remove_derta(model)
