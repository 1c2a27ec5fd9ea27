"""A run in which something is not finite stops before anything of it is saved, and says where."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from derta import DertaTrainer
from derta.training.finite_watch import not_finite
from derta_kernels.testing import HostTransfers
from runs import RECORDS, poison, settings, trainer
from tiny import tiny_model, tiny_tokenizer

# All but the head, whose gradient is formed before that of the norm below it.
REACHED = (
    "model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight, "
    "model.layers.0.self_attn.k_proj.weight and 17 more"
)


def saved(directory: Path) -> set[str]:
    return {path.parent.name for path in directory.rglob("*.safetensors")}


def examples(tuned: DertaTrainer, step: int, pack: int = 0) -> str:
    """Those of a pack of a step, counted from 1."""
    return ", ".join(tuned.train_dataset[step - 1][pack].example_ids)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize(("step", "kept"), [(1, set()), (4, {"checkpoint-2"})])
def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_saved(
    tmp_path: Path, step: int, kept: set[str], max_grad_norm: float
) -> None:
    tuned = trainer(
        tmp_path,
        examples_per_step=5,
        max_steps=4,
        max_length=200,
        max_tokens=200,
        max_grad_norm=max_grad_norm,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=2,
    )
    assert all(len(packs) == 2 for packs in tuned.train_dataset)
    poison(tuned.model, 2 * step - 1)
    where = f"at step {step} in the pack of examples {examples(tuned, step, 1)}"
    message = f"^the gradient norm of {REACHED} is not finite {where}; nothing of it was saved$"
    with pytest.raises(FloatingPointError, match=message):
        tuned.train()
    assert saved(tmp_path) == kept
    with pytest.raises(FloatingPointError, match=message):
        tuned.save_model(str(tmp_path / "model"))
    assert saved(tmp_path) == kept


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(tmp_path: Path) -> None:
    tuned = trainer(
        tmp_path,
        examples_per_step=1,
        max_steps=6,
        logging_steps=5,
        save_strategy="steps",
        save_steps=4,
    )
    poison(tuned.model, 2, loss=True)
    message = f"^the loss is not finite at step 3 in the pack of examples {examples(tuned, 3)};"
    with pytest.raises(FloatingPointError, match=message):
        tuned.train()
    assert not saved(tmp_path)


def test_the_log_stops_a_run(tmp_path: Path) -> None:
    tuned = trainer(tmp_path, max_steps=5, logging_steps=2)
    poison(tuned.model, 2)
    with pytest.raises(FloatingPointError, match=r"is not finite at step 3 in the pack"):
        tuned.train()
    assert tuned.state.global_step == 4
    assert [row["step"] for row in tuned.state.log_history] == [2]


def test_the_end_of_a_run_is_not_hidden_by_its_best_checkpoint(tmp_path: Path) -> None:
    """Which would take the place of the model that is not finite, and be finite itself."""
    tuned = DertaTrainer(
        model=tiny_model("llama"),
        args=settings(
            tmp_path,
            max_steps=3,
            learning_rate=0.1,
            logging_strategy="no",
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="best",
            metric_for_best_model="loss",
            load_best_model_at_end=True,
        ),
        train_dataset=RECORDS,
        eval_dataset=RECORDS,
        processing_class=tiny_tokenizer(),
    )
    poison(tuned.model, 2)
    with pytest.raises(FloatingPointError, match="is not finite at step 3 in the pack"):
        tuned.train()
    assert saved(tmp_path) == {"checkpoint-2"}


def test_weights_past_use_stop_the_run(tmp_path: Path) -> None:
    """A norm layer makes zeros of what they give, so that losses and gradients are finite."""
    tuned = trainer(tmp_path, tiny_model("llama"), save_strategy="steps", save_steps=1)
    with torch.no_grad():
        tuned.model.model.layers[0].mlp.down_proj.weight.fill_(1e30)
    name = "model.layers.0.mlp.down_proj.weight"
    message = f"^the norm of {name} is not finite after step 1; nothing of it was saved$"
    with pytest.raises(FloatingPointError, match=message):
        tuned.train()
    assert not saved(tmp_path)


def test_an_update_that_overflows_stops_the_run(tmp_path: Path) -> None:
    """Gradients show nothing of it."""
    tuned = trainer(tmp_path, tiny_model("llama"), save_strategy="steps", save_steps=1)
    tuned.args.learning_rate = 3e38  # which no configuration may have
    with pytest.raises(FloatingPointError, match="^the norm of .* and 18 more is not finite after"):
        tuned.train()
    assert not saved(tmp_path)


class Skipped(TrainerCallback):
    """Whether each step was skipped, because a gradient overflowed."""

    def __init__(self, tuned: DertaTrainer) -> None:
        self.tuned = tuned
        self.steps: list[bool] = []

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.steps.append(self.tuned.accelerator.optimizer_step_was_skipped)


def in_float16(directory: Path, init_scale: float, **changes: object) -> DertaTrainer:
    """A run with float16 and loss scaling, which Accelerate has on accelerators only."""
    tuned = trainer(directory, tiny_model("llama"), learning_rate=1e-3, **changes)
    tuned.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    tuned.model.forward = torch.autocast("cpu", torch.float16)(tuned.model.forward)
    return tuned


def test_steps_that_overflow_float16_are_skipped_and_the_run_goes_on(tmp_path: Path) -> None:
    tuned = in_float16(
        tmp_path, 2.0**18, max_steps=4, logging_steps=2, save_strategy="steps", save_steps=1
    )
    skipped = Skipped(tuned)
    tuned.add_callback(skipped)
    tuned.train()
    assert skipped.steps[0] and not skipped.steps[-1]
    assert len(saved(tmp_path)) == 4


def test_a_loss_scale_that_keeps_falling_stops_the_run(tmp_path: Path) -> None:
    tuned = in_float16(tmp_path, 2.0, max_steps=9)
    poison(tuned.model, *range(9))
    message = "^the loss scale has fallen to 0.5 at step 2: gradients overflow float16 at any scale"
    with pytest.raises(FloatingPointError, match=message):
        tuned.train()


def test_gradients_that_deepspeed_scales_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = trainer(tmp_path)
    poison(tuned.model, 0, 1)
    monkeypatch.setattr(tuned, "is_deepspeed_enabled", True)
    tuned.training_step(tuned.model, tuned.train_dataset[0])
    monkeypatch.undo()
    tuned.save_model(str(tmp_path / "model"))
    tuned.training_step(tuned.model, tuned.train_dataset[0])
    with pytest.raises(FloatingPointError, match="the gradient norm of"):
        tuned.save_model(str(tmp_path / "model"))


def test_the_probe_leaves_no_mark(tmp_path: Path) -> None:
    tuned = trainer(tmp_path, probe=True)
    poison(tuned.model, 0)
    tuned.train()
    assert tuned.state.global_step == 1


def test_no_step_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = trainer(tmp_path, max_tokens=260)
    packs = tuned.train_dataset[0]

    def transfers() -> int:
        with HostTransfers() as counted:
            tuned.training_step(tuned.model, packs)
        return counted.count

    watched = transfers()
    with HostTransfers() as counted:
        parameters = dict(tuned.model.named_parameters())
        tuned.finite.check(parameters, lambda flags: flags, step=1, loss_scale=None)
    assert counted.count == 1
    monkeypatch.setattr("derta.training.finite_watch.FiniteWatch.add", lambda *_, **__: None)
    assert watched == transfers()


def test_norms_tell_of_tensors_of_every_kind_in_their_order() -> None:
    cases: list[tuple[torch.Tensor | None, bool]] = [
        (torch.ones(3), False),
        (None, False),
        (torch.tensor([1.0, math.nan]), True),
        (torch.full((2,), 1e30), True),
        (torch.full((2,), 1e30, dtype=torch.float64), False),
        (torch.full((2,), 6e4, dtype=torch.float16), False),
        (torch.tensor([[-math.inf]], dtype=torch.bfloat16), True),
        (torch.empty(0), False),
        (nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), False),
    ]
    tensors, expected = zip(*cases, strict=True)
    assert not_finite(tensors, torch.device("cpu")).tolist() == list(expected)
