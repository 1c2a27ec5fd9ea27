"""A step of a preference loss: one pass over pairs, and TRL's trainers on the same pairs.

    python -m benchmarks.preference --machine xeon-2-cores

transformers and TRL are imported where a model is made, so that reports do not need them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.examples import MAX_LENGTH, draw_triples
from benchmarks.harness.gradients import TrainingStep
from benchmarks.harness.question import Question, Values, error_of, number_of, ratio_to
from benchmarks.harness.requirements import Requirement
from benchmarks.step.question import TINY
from derta.data import Drawn, EncodedTriple, PackedBatch, pack
from derta.objectives.defaults import PREFERENCES, Preference
from derta.objectives.preference import REFERENCES, PreferenceObjective

OURS = "one pass"
TRL = "TRL"
WITH_REFERENCE = "TRL, reference model"
ERROR_LIMIT = 1e-4
CLOSING = 3
# Away from the reference model, where all pairs would compare as equal.
NUDGE = 0.7


@dataclass(frozen=True)
class Case:
    """Pairs of `draw_triples`, whole responses, through a Llama of 11 million parameters."""

    loss: Preference
    pairs: int

    @property
    def name(self) -> str:
        """Name of the case in records and tables."""
        return f"{self.loss}, {self.pairs} pairs, float32"


CASES = {loss: Case(loss, 8) for loss in PREFERENCES}


def draw_pairs(case: Case) -> list[Drawn]:
    """Draw pairs whose responses both end with the closing token."""
    objective = objective_of(case)
    pairs = []
    for one in draw_triples(case.pairs, 1, TINY["vocab_size"]):
        assert isinstance(one.example, EncodedTriple)
        triple = replace(one.example, cut_limit=0, closing=1)
        for response in (triple.harmful, triple.safe):
            response[-1] = CLOSING
        pairs.append(objective.draw(triple, 0, np.random.default_rng(0)))
    return pairs


def objective_of(case: Case) -> PreferenceObjective:
    """Return ours with its default numbers."""
    numbers = PREFERENCES[case.loss]
    assert numbers.weight is not None
    return PreferenceObjective(
        preference=case.loss,
        preference_weight=numbers.weight,
        preference_beta=numbers.beta,
        simpo_gamma=numbers.gamma,
    )


def make_model() -> Any:
    """Make the same random model in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, pad_token_id=0, eos_token_id=CLOSING)).train()


def nudge(model: Any) -> None:
    """Move a model away from the reference."""
    with torch.no_grad():
        model.model.norm.weight.mul_(NUDGE)


class OnePass(TrainingStep):
    """Forward and backward of one pack of all pairs."""

    def __init__(self, case: Case, device: torch.device) -> None:
        from derta.modeling.patch import apply_derta

        model = make_model().to(device)
        super().__init__(model, device)
        objective = objective_of(case)
        apply_derta(model, 0, objective=objective)
        batch = pack(draw_pairs(case), objective).to(device)
        if objective.needs_references:
            _add_references(model, batch)
        nudge(model)
        if case.loss == "orpo":
            batch = _with_prompts(batch, objective)
        totals = {name: mask.sum() for name, mask in objective.targets(batch.columns).items()}
        num_items, weights = objective.normalizer("terms", {}, totals, 1)
        self.inputs = batch.model_inputs() | dict(num_items=num_items, term_weights=weights)

    def step(self) -> None:
        self.module(**self.inputs).loss.backward()


def _add_references(model: Any, batch: PackedBatch) -> None:
    with torch.no_grad():
        rows = model(**batch.model_inputs()).rows
    for name in REFERENCES:
        batch.columns[name] = rows[f"logp_{name.removesuffix('_reference')}"].double()


def _with_prompts(batch: PackedBatch, objective: PreferenceObjective) -> PackedBatch:
    """Return the pack with prompts as targets too, as TRL's next-token loss of ORPO has them."""
    labels = batch.columns["shift_labels"].clone()
    prompt = (batch.columns["pair_back"] < 0)[:, :-1]
    labels[:, :-1] = batch.input_ids[:, 1:].where(prompt, labels[:, :-1])
    columns = {**batch.columns, "shift_labels": labels}
    live_rows = objective.live(columns)[0].nonzero()[:, 0]
    return replace(batch, columns=columns, live_rows=live_rows)


class Trl(TrainingStep):
    """TRL's loss of one batch of all pairs, forward and backward."""

    def __init__(self, case: Case, name: str, device: torch.device, dtype: torch.dtype) -> None:
        model = make_model().to(device, dtype)
        super().__init__(model, device)
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = trainer_of(case, name, model, folder)
        (self.batch,) = self.trainer.get_train_dataloader()
        nudge(model)

    def step(self) -> None:
        self.trainer.compute_loss(self.trainer.model, self.batch).backward()


def trainer_of(case: Case, name: str, model: Any, folder: str) -> Any:
    """Return TRL's trainer with our default numbers, without checkpointed layers."""
    from datasets import Dataset

    data = Dataset.from_list([_texts(one.example) for one in draw_pairs(case)])
    given = dict(model=model, train_dataset=data, processing_class=_numbers_tokenizer())
    numbers = PREFERENCES[case.loss]
    common: dict[str, Any] = dict(
        output_dir=folder,
        per_device_train_batch_size=case.pairs,
        use_cpu=model.device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        max_length=MAX_LENGTH,
        report_to="none",
        disable_tqdm=True,
    )
    if case.loss == "dpo":
        from trl import DPOConfig, DPOTrainer

        stored = name != WITH_REFERENCE
        common |= dict(beta=numbers.beta, precompute_ref_log_probs=stored)
        reference = None if stored else copy.deepcopy(model)
        return DPOTrainer(**given, args=DPOConfig(**common), ref_model=reference)
    if case.loss == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        common |= dict(beta=numbers.weight)
        return ORPOTrainer(**given, args=ORPOConfig(**common))
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    common |= dict(beta=numbers.beta, simpo_gamma=numbers.gamma)
    return CPOTrainer(**given, args=CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0))


def _texts(example: Any) -> dict[str, str]:
    """Return a pair as texts of `_numbers_tokenizer`, without the closing tokens that TRL adds."""
    parts = {
        "prompt": example.prompt,
        "chosen": example.safe[:-1],
        "rejected": example.harmful[:-1],
    }
    return {name: " ".join(map(str, ids)) + " " for name, ids in parts.items()}


def _numbers_tokenizer() -> Any:
    """Return a tokenizer whose texts are token ids with spaces between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {0: "<pad>", CLOSING: "</s>"}
    words = {special.get(id, str(id)): id for id in range(TINY["vocab_size"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


class PreferenceQuestion(Question):
    """A step's forward and backward passes, with the reference's numbers computed before it."""

    name = "preference"
    title = "Preference losses"
    case_type = Case
    ours = OURS
    baseline = TRL
    gpu_steps = 1
    columns = (
        number_of("tokens", "tokens"),
        ratio_to(TRL, "time / TRL", "time_ms_p50"),
        number_of("peak MiB", "peak_mib"),
        ratio_to(TRL, "memory / TRL", "peak_mib"),
        error_of("error of gradients", "gradient_error"),
    )

    def groups(self, device: str) -> dict[str, list[tuple[Case, str]]]:
        return {loss: [(case, name) for name in names_of(case)] for loss, case in CASES.items()}

    def setup(self, case: Case, implementation: str, device: torch.device) -> TrainingStep:
        if implementation == OURS:
            return OnePass(case, device)
        return Trl(case, implementation, device, torch.float32)

    def answer(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        """Return TRL's gradients in float64."""
        gradients = Trl(case, TRL, device, torch.float64).gradients()
        return {name: gradient.cpu() for name, gradient in gradients.items()}

    def is_right(self, case: Case, errors: Values, baseline: Values) -> bool:
        """Return True if the error is at most 1e-4."""
        return errors["gradient_error"] <= ERROR_LIMIT

    def derived(self, case: Case, implementation: str, values: Values) -> Values:
        """Return the number of tokens that a step computes, padding included."""
        pairs = draw_pairs(case)
        if implementation == OURS:
            return {"tokens": pack(pairs, objective_of(case)).input_ids.numel()}
        return {"tokens": 2 * len(pairs) * max(map(longest_sequence, pairs))}

    def requirements(self) -> list[Requirement]:
        return [
            Requirement("time over TRL's", case, "time_ms_p50", 0.5, None, TRL)
            for case in CASES.values()
        ]


def names_of(case: Case) -> Sequence[str]:
    """Return the implementations of a case."""
    return (OURS, TRL, WITH_REFERENCE) if case.loss == "dpo" else (OURS, TRL)


def longest_sequence(drawn: Drawn) -> int:
    """Return the tokens of the longer one of a pair's two sequences."""
    example = drawn.example
    assert isinstance(example, EncodedTriple)
    return len(example.prompt) + max(len(example.harmful), len(example.safe))


QUESTION = PreferenceQuestion()
