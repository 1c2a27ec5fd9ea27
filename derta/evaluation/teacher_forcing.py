"""Refusal curves and perplexity of given responses, by packed forward passes.

The fused head loss returns the negative log-likelihood of every row as a by-product. These figures
therefore cost one forward pass over the packs and hold no logits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

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
from derta.evaluation.generation.local import SHOWN_AFTER_S
from derta.modeling.introspection import context_length, evaluating
from derta.modeling.patch import apply_derta, patch_of, remove_derta
from derta.modeling.shared_work import ranks
from derta.objectives.derta import DertaObjective

Reduced = TypeVar("Reduced")

# Responses without branches, the refusal token read at every position.
TRUNKS = DertaObjective(branches=0, cuts="zero")
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
    chat = Chat(tokenizer, special_tokens_in_text)
    examples = []
    for record in records:
        messages, text = _response_of(record)
        with naming(record):
            chat.check(record)
            examples.append(response(chat, record.id, messages, text))
    triples = [record for record in records if isinstance(record, Triple)]
    refusal_id = find_refusal_token(model, tokenizer, refusal, triples)
    return refusal_curve(model, examples, refusal_id, max_tokens)


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
            model is patched, else the most common first token of the safe responses, else "Sorry".
        triples: triples with safe responses, for "auto".

    Raises:
        TypeError, ValueError: as `derta.resolve_refusal_token`.
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
    if refusal == "auto" and not triples:
        refusal = PAPER_REFUSAL
    if isinstance(refusal, str | int):
        return resolve_refusal_token(tokenizer, refusal, triples).id
    return tuple(resolve_refusal_token(tokenizer, one, triples).id for one in refusal)


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
    """
    drawn = [
        Drawn(example, cuts=np.zeros(0, np.int64), depths=np.ones(len(example.harmful) + 1, bool))
        for example in examples
    ]
    curves = [np.empty(0, np.float32)] * len(drawn)
    with _reading(model, refusal_token_id):
        for curve_by_place in _read(model, drawn, max_tokens, _curves_of):
            for place, curve in curve_by_place.items():
                curves[place] = curve
    return curves


def _curves_of(read: _Read) -> dict[int, np.ndarray]:
    probability = np.exp(-read.rows["rto"][0].float().cpu().numpy())
    depth, index = read.batch.depth[0].numpy(), read.batch.example_index[0].numpy()
    return {
        place: probability[(index == nth) & (depth >= 0)] for nth, place in enumerate(read.places)
    }


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
    with _reading(model):
        read = _read(model, drawn, max_tokens, _likelihood_of)
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
    reduce: Callable[[_Read], Reduced],
) -> list[Reduced]:
    """Run the model over packs of all examples, and return what `reduce` makes of each."""
    if not drawn:
        return []
    examples: list[Encoded] = [one.example for one in drawn]
    context = context_length(model)
    lengths = [packed_length(one, TRUNKS) for one in examples]
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
        batch = pack([drawn[place] for place in places], TRUNKS)
        output = model(**batch.to(model.device).model_inputs())
        made.append(reduce(_Read(places, batch, output.rows)))
    return ranks().gather(made)


@contextlib.contextmanager
def _reading(
    model: PreTrainedModel, refusal_token_id: int | Sequence[int] | None = None
) -> Iterator[None]:
    """Patch the model in evaluation mode, and restore it; without an id, any token will do."""
    patch = patch_of(model)
    if patch is not None and refusal_token_id not in (None, patch.refusal_token_id):
        raise ValueError(
            f"refusal_token_id must be the one given to apply_derta, {patch.refusal_token_id}, got "
            f"{refusal_token_id}: apply it again, or remove_derta first"
        )
    if patch is None:
        apply_derta(model, refusal_token_id or 0)
    try:
        with evaluating(model):
            yield
    finally:
        if patch is None:
            remove_derta(model)
