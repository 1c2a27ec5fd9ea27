"""An objective is one module: what it says of rows and terms is what a run trains and logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from derta.data import Triple
from derta.modeling.patch import patch_of
from derta.objectives.base import Drawn, Extent, Mean, Objective, Place, Term
from derta.objectives.choice import objective_of
from derta.objectives.derta import DertaObjective
from derta.objectives.unlikelihood import UnlikelihoodObjective
from derta.training.config import DertaConfig
from runs import RECORDS, trainer
from tiny import tiny_model

WEIGHT = 0.3


@pytest.mark.parametrize(
    ("loss_norm", "refusals"),
    [
        ("tokens", dict()),
        ("terms", dict()),
        ("official", dict()),
        ("tokens", dict(refusal="auto", refusal_tokens=["Sorry", 7, 11])),
    ],
)
def test_unlikelihood_and_refusals_train_what_eager_logits_say(
    tmp_path: Path, loss_norm: str, refusals: dict[str, Any]
) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    tuned = trainer(
        tmp_path, model, loss_norm=loss_norm, rto_weight=0.5, unlikelihood_weight=WEIGHT, **refusals
    )
    ids = [token.id for token in tuned.refusals.tokens]
    patch = patch_of(model)
    assert patch is not None and patch.refusal_token_id == tuned.refusals.target
    assert len(ids) == (3 if refusals else 1)
    (pack,) = tuned.train_dataset[0]
    columns = pack.columns
    rows = {name: pack.model_inputs()[name] for name in ("input_ids", "position_ids")}
    logits = model(**rows, visible_until=pack.visible_until).logits
    log_p = torch.log_softmax(logits, -1)

    def of(tokens: Tensor) -> Tensor:
        return log_p.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]

    unlikely = columns["unlikely_labels"]
    losses = {
        "mle": (-of(columns["shift_labels"]), columns["shift_labels"] != -100),
        "rto": (-log_p[..., ids].logsumexp(-1), columns["rto_mask"]),
        "unlikelihood": (-torch.log1p(-of(unlikely).exp()), unlikely != -100),
    }
    weighed = {name: pack.loss_weight * has for name, (_, has) in losses.items()}
    sums = {name: (loss * weighed[name]).sum() for name, (loss, _) in losses.items()}
    counts = {name: weight.sum().item() for name, weight in weighed.items()}
    weights = {"mle": 1.0, "rto": 0.5, "unlikelihood": WEIGHT}
    both = counts["mle"] + counts["rto"]
    divisors = counts if loss_norm == "terms" else dict.fromkeys(counts, both)
    expected = sum(weights[name] * sums[name] / divisors[name] for name in sums)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tuned.train()

    log = tuned.state.log_history[0]
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for name in sums:
        assert log[f"{name}_loss"] == pytest.approx(sums[name].item() / counts[name], rel=1e-6)
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        assert (old - parameter.detach() - gradient).norm() <= 1e-6 * gradient.norm()
    mass = log_p[..., ids].exp().sum(-1)[columns["rto_mask"] & (pack.depth_tenth == 0)].mean()
    assert log["refusal_p_1"] == pytest.approx(mass.item(), rel=1e-5)
    assert tuned.evaluate(RECORDS)["eval_loss"] > 0


def test_unlikely_tokens_are_the_harmful_ones_that_follow_rto_rows(tmp_path: Path) -> None:
    tuned = trainer(tmp_path, unlikelihood_weight=WEIGHT, rto_keep=0.5)
    (pack,) = tuned.train_dataset[0]
    unlikely, depth = pack.columns["unlikely_labels"][0], pack.depth[0]
    ids, rto = pack.input_ids[0], pack.columns["rto_mask"][0]
    followed = rto[:-1] & (depth[1:] == depth[:-1] + 1)
    assert followed.any() and torch.equal(unlikely[:-1][followed], ids[1:][followed])
    assert not (unlikely != -100)[~rto].any()
    # At the end of a response there is no harmful token left to make unlikely.
    assert pack.totals["unlikelihood"].targets < pack.totals["rto"].targets


@pytest.mark.parametrize(
    "refusals", [dict(refusal="Sorry"), dict(refusal="auto", refusal_tokens=["Sorry", "How"])]
)
def test_no_row_pushes_a_token_down_that_it_pushes_up(
    tmp_path: Path, refusals: dict[str, Any]
) -> None:
    """A harmful response has refusal tokens in it, and the first token of the safe one."""
    harmful = "Sure.Sorry.How.Sure.Sorry!How, take the ladder."
    record = Triple(prompt="How do I paint?", harmful=harmful, safe="Sure: no.", id="triple")
    tuned = trainer(tmp_path, records=[record], unlikelihood_weight=WEIGHT, branches=64, **refusals)
    (pack,) = tuned.train_dataset[0]
    ids, labels = pack.input_ids[0], pack.columns["shift_labels"][0]
    trunk = torch.arange(pack.branch_bounds[0][0][0])  # all depths are drawn, and all cuts
    rows = trunk[pack.depth[0, trunk] >= 0][:-1]
    raised = {token.id for token in tuned.refusals.tokens}
    follows = ids[rows + 1]
    is_refusal = torch.tensor([one in raised for one in follows.tolist()])
    is_start = follows == labels[rows]
    assert is_refusal.sum() == 2 * len(raised) and is_start.sum() == 2
    expected = follows.masked_fill(is_refusal | is_start, -100)
    assert torch.equal(pack.columns["unlikely_labels"][0, rows], expected)
    assert pack.totals["unlikelihood"].targets == (expected != -100).sum()


def test_settings_choose_the_objective(tmp_path: Path) -> None:
    plain = DertaConfig(output_dir=str(tmp_path), use_cpu=True, rto_weight=0.5)
    assert objective_of(plain) == DertaObjective(rto_weight=0.5)
    both = DertaConfig(output_dir=str(tmp_path), use_cpu=True, unlikelihood_weight=0.1)
    assert objective_of(both) == UnlikelihoodObjective(unlikelihood_weight=0.1)
    with pytest.raises(ValueError, match=r"^unlikelihood_weight must lie in \[0, 1000\], got -1"):
        DertaConfig(output_dir=str(tmp_path), use_cpu=True, unlikelihood_weight=-1.0)
    with pytest.raises(ValueError, match="^unlikelihood_weight must be above 0, got 0"):
        UnlikelihoodObjective(unlikelihood_weight=0.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(refusal="Sorry", refusal_tokens="auto"), "^refusal_tokens and refusal: Sorry both"),
        (dict(refusal_tokens=[]), "^refusal_tokens must have 1 to 64 tokens, got 0"),
        (dict(refusal_tokens=[*range(65)]), "^refusal_tokens must have 1 to 64 tokens, got 65"),
        (dict(refusal_tokens=["auto", 5]), "^refusal_tokens must be auto or a list of tokens"),
        (dict(refusal_tokens="Sorry"), "^refusal_tokens must be a list or auto, got 'Sorry'"),
    ],
)
def test_keys_that_name_no_set_are_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DertaConfig(output_dir=str(tmp_path), use_cpu=True, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            dict(recipe="vanilla", unlikelihood_weight=0.1),
            "^unlikelihood_weight must be 0.0 with recipe: vanilla, which has no RTO rows, got 0.1",
        ),
        (dict(recipe="prefix_only", rto_weight=5.0), "^rto_weight must be 1.0 with recipe: prefix"),
        (dict(rto_keep=0, rto_depth="growing"), "^rto_depth must be uniform with rto_keep: 0, wh"),
    ],
)
def test_keys_of_rto_rows_are_refused_where_there_are_none(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DertaConfig(output_dir=str(tmp_path), use_cpu=True, **keys)


class SmallStates(Objective):
    """The squared norm of the hidden state of each example's last row: no head, no targets' ids."""

    branches, cuts = 1, "zero"
    terms = (Term("norm", "norm"),)
    columns: Mapping[str, Any] = {"is_last": False}  # type: ignore[assignment]

    def draw(self, example: Any, padded: int, rng: np.random.Generator) -> Drawn:
        return DertaObjective(cuts="zero", rto_keep=0.0).draw(example, padded, rng)

    def extent(self, example: Any) -> Extent:
        return Extent(branches=1, cut=0, depth=-1)

    def lay(self, drawn: Drawn, place: Place) -> dict[str, np.ndarray]:
        return {"is_last": np.arange(place.rows) == place.rows - 1}

    def targets(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {"norm": columns["is_last"]}

    def row_weights(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {"norm": 1.0}

    def loss(
        self, hidden: Tensor, head: Any, columns: Mapping[str, Tensor], **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        norms = hidden.square().sum(-1)
        weighed = norms * options["loss_weight"] * options["term_weights"]["norm"]
        loss = weighed[columns["is_last"]].sum() / options["num_items"]
        return loss, {"norm": norms.detach()}

    def means(self, batch: Any, rows: Mapping[str, Tensor]) -> dict[str, Mean]:
        return {"largest": Mean(rows["norm"].amax(), torch.ones(()))}

    def notes(
        self, row: Mapping[str, Any], quote: Callable[[list[int]], str]
    ) -> list[tuple[str, str]]:
        return [("norm", "small")] if row["is_last"] else []


def test_a_loss_on_hidden_states_trains_and_logs_by_its_own_module_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DertaConfig, "objective", SmallStates())
    model = tiny_model("llama", dtype=torch.float64)
    tuned = trainer(tmp_path, model, max_tokens=160, max_length=160)
    packs = tuned.train_dataset[0]
    assert len(packs) > 1
    lasts = []
    for pack in packs:
        inputs = pack.model_inputs() | {"is_last": None}
        rows = model(**inputs, output_hidden_states=True).hidden_states[-1]
        lasts.append(rows[pack.columns["is_last"]].square().sum(-1).detach())
    expected = torch.cat(lasts).mean().item()
    tuned.train()
    log = tuned.state.log_history[0]
    assert log["loss"] == pytest.approx(expected, rel=1e-6)
    assert log["norm_loss"] == pytest.approx(expected, rel=1e-6)
    assert log["largest"] > expected
    shares = tuned.train_dataset.shares("tokens")
    assert sum(share["norm"] for share in shares.values()) == pytest.approx(1)
