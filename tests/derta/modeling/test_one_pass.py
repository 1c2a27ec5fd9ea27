"""One pass over a pack equals separate passes over its sequences: loss and every gradient."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from derta.data.packs.packing import Drawn, PackedBatch, pack
from derta.data.tokens.encoding import EncodedDialogue
from derta.modeling.patch import apply_derta
from drawn import (
    DRAWN,
    REFUSAL,
    VOCABULARY,
    assert_same_gradients,
    gradients,
)
from tiny import ARCHITECTURES, tiny_model


def log_probabilities(model: PreTrainedModel, ids: np.ndarray) -> Tensor:
    """Return the (n, V) log-probabilities of one separate sequence, with all logits formed."""
    logits = model(input_ids=torch.tensor(ids, dtype=torch.int64)[None]).logits[0]
    return F.log_softmax(logits, dim=-1)


def separate_passes(model: PreTrainedModel, drawn: tuple[Drawn, ...] = DRAWN) -> Tensor:
    """Compute the objective literally: the mean over all targets of all sequences."""
    losses = []
    for example, cuts, rto_rows in ((one.example, one.cuts, one.depths) for one in drawn):
        if isinstance(example, EncodedDialogue):
            table = log_probabilities(model, example.input_ids)
            for place in np.flatnonzero(example.is_target):
                losses.append(-table[place - 1, int(example.input_ids[place])])
            continue
        start = len(example.prompt)
        table = log_probabilities(model, np.concatenate([example.prompt, example.harmful]))
        for read in np.flatnonzero(rto_rows):
            losses.append(-table[start + read - 1, REFUSAL])
        for cut in cuts:
            prefix = np.concatenate([example.prompt, example.harmful[:cut]])
            table = log_probabilities(model, np.concatenate([prefix, example.safe]))
            for place, token in enumerate(example.safe):
                losses.append(-table[len(prefix) + place - 1, int(token)])
    return torch.stack(losses).mean()


# Norms or rotary embeddings compute in float32 even in a double model; their rounding dominates.
TOLERANCE = dict.fromkeys(ARCHITECTURES, 1e-6) | {"gpt_neox": 1e-12}


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_pass_equals_separate_passes(architecture: str, attention: str) -> None:
    # The router loss is a property of a batch, not of its sequences: it has its own test.
    router = {"output_router_logits": False} if architecture == "mixtral" else {}
    model = tiny_model(architecture, dtype=torch.float64, **router).train()
    expected = separate_passes(model)
    expected_gradients = gradients(expected, model)

    apply_derta(model, REFUSAL, attention=attention)
    output = model(**pack(DRAWN).model_inputs())
    tolerance = TOLERANCE[architecture]
    assert output.loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert_same_gradients(gradients(output.loss, model), expected_gradients, tolerance)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_packs_logits_equal_those_of_its_sequences(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.float64)
    example, cuts, batch = DRAWN[0].example, DRAWN[0].cuts, pack(DRAWN[:1])
    alone = log_probabilities(model, np.concatenate([example.prompt, example.harmful]))
    branch = np.concatenate([example.prompt, example.harmful[: cuts[1]], example.safe[:-1]])
    branch_alone = log_probabilities(model, branch)

    apply_derta(model, REFUSAL)
    inputs = {**batch.model_inputs(), "shift_labels": None, "rto_mask": None}
    table = F.log_softmax(model(**inputs).logits[0], dim=-1)
    trunk = len(alone)
    start, end = batch.branch_bounds[0][1]
    assert torch.allclose(table[:trunk], alone, rtol=0, atol=1e-6)
    assert torch.allclose(table[start:end], branch_alone[start - end :], rtol=0, atol=1e-6)


def test_the_rows_losses_are_those_of_the_full_logits() -> None:
    model = tiny_model("gpt_neox", dtype=torch.float64)
    batch = pack(DRAWN)
    apply_derta(model, REFUSAL)
    output = model(**batch.model_inputs())
    inputs = {**batch.model_inputs(), "shift_labels": None, "rto_mask": None}
    nll = -F.log_softmax(model(**inputs).logits, dim=-1)
    has_next = batch.columns["shift_labels"] != -100
    targets = batch.columns["shift_labels"].where(has_next, 0)[..., None]
    next_nll = nll.gather(-1, targets)[..., 0].where(has_next, 0)
    assert torch.allclose(output.rows["mle"], next_nll, rtol=0, atol=1e-12)
    live = has_next | batch.columns["rto_mask"]
    assert torch.allclose(output.rows["rto"], nll[..., REFUSAL].where(live, 0), rtol=0, atol=1e-12)
    assert not output.rows["mle"].requires_grad and not output.rows["rto"].requires_grad
    assert output.logits is None and output.aux_loss is None


def test_the_router_loss_equals_the_models_own() -> None:
    model = tiny_model("mixtral", dtype=torch.float64).train()
    ids = np.random.default_rng(0).integers(VOCABULARY, size=23)
    none = np.zeros(0, dtype=np.int64)
    batch = pack([Drawn(EncodedDialogue("all", ids, np.arange(23) > 0), none, none.astype(bool))])
    inputs = torch.tensor(ids)[None]
    # The last token of a pack is only a label, so the router never sees it.
    aux_loss = model(input_ids=inputs[:, :-1]).aux_loss
    whole = model(input_ids=inputs, labels=inputs)
    expected = whole.loss + model.router_aux_loss_coef * (aux_loss - whole.aux_loss)
    expected_gradients = gradients(expected, model)

    apply_derta(model, REFUSAL)
    output = model(**batch.model_inputs())
    assert output.aux_loss.item() == pytest.approx(aux_loss.item(), rel=1e-6)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(gradients(output.loss, model), expected_gradients, 1e-6)

    # A step of two packs has two router losses, each weighted by half.
    half = model(**batch.model_inputs(), router_weight=0.5)
    difference = (output.loss - half.loss).item()
    assert difference == pytest.approx(model.router_aux_loss_coef * aux_loss.item() / 2, rel=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_neox"])
def test_examples_of_a_pack_do_not_affect_each_other_by_a_bit(architecture: str) -> None:
    model = tiny_model(architecture)
    apply_derta(model, REFUSAL)
    changed = copy.deepcopy(DRAWN[2])
    changed.example.prompt[:] = 5
    changed.example.harmful[:] = 6
    changed.example.safe[:] = 7
    batch, other = pack(DRAWN), pack((*DRAWN[:2], changed, *DRAWN[3:]))
    start, end = batch.example_bounds[2]
    assert other.example_bounds == batch.example_bounds

    def rows(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        inputs = batch.model_inputs()
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
        embeddings.requires_grad_()
        output = model(inputs_embeds=embeddings, **inputs, reduction="sum")
        (gradient,) = torch.autograd.grad(output.loss, embeddings)
        return output.rows["mle"][0], output.rows["rto"][0], gradient[0]

    for ours, theirs in zip(rows(batch), rows(other), strict=True):
        assert torch.equal(ours[:start], theirs[:start])
        assert torch.equal(ours[end:], theirs[end:])
        assert not torch.equal(ours[start:end], theirs[start:end])


def test_a_rank_without_work_adds_nothing() -> None:
    model = tiny_model("llama")
    apply_derta(model, REFUSAL)
    output = model(**pack(()).model_inputs(), num_items=10)
    assert output.loss == 0
    assert all((gradient == 0).all() for gradient in gradients(output.loss, model).values())
