"""Preference losses are those that TRL's trainers compute of the same records."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from derta import Triple, apply_derta
from derta.data import Collator, Encoder
from derta.objectives.preference import PreferenceObjective
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

RECORDS = [
    Triple(
        prompt=f"How do I paint the {colour} fence?",
        harmful="Sure, here is how: " + "step one, take the ladder. " * (1 + index % 3),
        safe="Sorry, I cannot help with that." + " Sorry!" * (index % 2),
        id=f"triple-{index}",
    )
    for index, colour in enumerate(["green", "brown", "quiet", "lazy"])
]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def rows() -> Dataset:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return Dataset.from_list(
        [
            {
                "prompt": list(record.messages),
                "chosen": said("assistant", record.safe),
                "rejected": said("assistant", record.harmful),
            }
            for record in RECORDS
        ]
    )


def theirs(loss: str, directory: Path, model: Any, reference: Any) -> tuple[torch.Tensor, dict]:
    """The loss of one batch as TRL's trainer computes it, and what it logs of it."""
    common: dict[str, Any] = dict(
        output_dir=str(directory),
        per_device_train_batch_size=len(RECORDS),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    given: dict[str, Any] = dict(
        model=model, train_dataset=rows(), processing_class=copy.deepcopy(tiny_tokenizer())
    )
    if loss == "dpo":
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(**given, args=DPOConfig(**common, beta=0.3), ref_model=reference)
    elif loss == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        trainer = ORPOTrainer(**given, args=ORPOConfig(**common, beta=0.3))
    else:
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        numbers = dict(loss_type="simpo", cpo_alpha=0.0, beta=1.5, simpo_gamma=0.4)
        trainer = CPOTrainer(**given, args=CPOConfig(**common, **numbers))
    (batch,) = trainer.get_train_dataloader()
    value = trainer.compute_loss(trainer.model, batch)
    kept = trainer._metrics if loss == "dpo" else trainer._stored_metrics
    return value, {name: values[0] for name, values in kept["train"].items()}


OURS: dict[str, PreferenceObjective] = {
    "dpo": PreferenceObjective(preference="dpo", preference_beta=0.3, preference_weight=1.0),
    "orpo": PreferenceObjective(preference="orpo", preference_weight=0.3),
    "simpo": PreferenceObjective(
        preference="simpo", preference_beta=1.5, simpo_gamma=0.4, preference_weight=1.0
    ),
}


def ours(loss: str, model: Any, reference: Any) -> tuple[torch.Tensor, dict[str, float]]:
    objective = OURS[loss]
    encoder = Encoder(
        tiny_tokenizer(),
        max_length=256,
        max_tokens=4096,
        branches=1,
        cuts="zero",
        closes_harmful=True,
    )
    batch = Collator(objective)(list(encoder.encode_many(RECORDS)))
    columns = batch.columns
    firsts = columns["pair_back"] == 0
    if loss == "dpo":
        apply_derta(reference, 0, objective=objective)
        with torch.no_grad():
            found = reference(**batch.model_inputs()).rows
        for name in ("chosen", "rejected"):
            columns[f"{name}_reference"] = found[f"logp_{name}"]
    inputs = batch.model_inputs()
    if loss == "orpo":  # TRL's next-token loss is over the prompt too
        labels = columns["shift_labels"]
        prompt = (columns["pair_back"] < 0)[:, :-1]
        labels[:, :-1] = batch.input_ids[:, 1:].where(prompt, labels[:, :-1])
        inputs["live_rows"] = None
    count = objective.targets(columns)["mle"].sum()
    num_items, weights = objective.normalizer(
        "terms", {}, {"mle": count, "preference": firsts.sum()}, 1
    )
    apply_derta(model, 0, objective=objective)
    output = model(**inputs, num_items=num_items, term_weights=weights)
    means = objective.means(batch, output.rows)
    return output.loss, {
        name: float(mean.total / mean.divisor) for name, mean in means.items() if mean.divisor
    }


@pytest.mark.parametrize("loss", OURS)
def test_loss_gradients_and_figures_are_those_of_trl(tmp_path: Path, loss: str) -> None:
    pytest.importorskip("trl")
    reference, model = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():  # away from the reference
        model.model.norm.weight.mul_(0.7)
    other = copy.deepcopy(model)
    their_loss, logged = theirs(loss, tmp_path, other, copy.deepcopy(reference))
    our_loss, figures = ours(loss, model, reference)
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=TOLERANCE)
    their_loss.backward()
    our_loss.backward()
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name].grad).norm()
        assert error <= TOLERANCE * expected[name].grad.norm(), name
    for ours_, theirs_ in {
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
        "reward_margin": "rewards/margins",
        "reward_accuracy": "rewards/accuracies",
        "logp_chosen": "logps/chosen",
        "logp_rejected": "logps/rejected",
    }.items():
        close = pytest.approx(float(logged[theirs_]), rel=TOLERANCE, abs=TOLERANCE)
        assert figures[ours_] == close, ours_
