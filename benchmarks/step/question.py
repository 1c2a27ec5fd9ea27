"""A whole training step, from the official recipe to one pass.

    python -m benchmarks.step.question --machine xeon-2-cores

transformers and PEFT are imported where a model is made, so that reports do not need them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness.examples import REFUSAL, draw_triples, in_batches, in_packs, samples
from benchmarks.harness.gradients import TrainingStep
from benchmarks.harness.question import (
    Column,
    Question,
    Values,
    error_of,
    number_of,
    ratio_to,
    within_budget,
)
from benchmarks.harness.requirements import Requirement
from benchmarks.one_pass import question as one_pass
from derta.data import Drawn, EncodedDialogue, EncodedTriple, PackedBatch
from derta.labels import IGNORE_INDEX
from derta.loss import derta_loss

OFFICIAL = "official recipe"
OURS = "one pass"
LORA: dict[str, Any] = dict(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
ONE_ROUNDING = 2**-8  # bfloat16
ERROR_LIMIT = 1e-4  # float32
TINY: dict[str, Any] = one_pass.SHAPE | dict(vocab_size=16000)
LLAMA_3_8B: dict[str, Any] = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
)
LLAMA_3_3B = LLAMA_3_8B | dict(
    hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24
)
SHAPES = {"a tiny Llama": TINY, "Llama-3.2-3B": LLAMA_3_3B, "Llama-3-8B": LLAMA_3_8B}


@dataclass(frozen=True)
class Case:
    """Triples of `draw_triples` through a model of `SHAPES` with checkpointed layers.

    Attributes:
        model: a key of `SHAPES`.
        triples, branches: number of triples, and of branches in each.
        dtype: torch's name for the dtype of the weights.
        lora: if True, adapters are trained, else all weights.
        max_tokens: tokens of a pack.
    """

    model: str
    triples: int
    branches: int
    dtype: str
    lora: bool
    max_tokens: int = one_pass.MAX_TOKENS

    @property
    def name(self) -> str:
        """Name of the case in records and tables."""
        branches = "1 branch" if self.branches == 1 else f"{self.branches} branches"
        trained = "LoRA" if self.lora else "all weights"
        return f"{self.model}, {trained}, {self.triples} triples, {branches} each, {self.dtype}"


SMALL = Case("a tiny Llama", 16, 1, "float32", lora=False)
SMALL_FOUR = replace(SMALL, branches=4)
SHORT = replace(SMALL, triples=8)
# A GPU of 80 GB holds six processes of 3B beside the official recipe's logits.
LARGE = Case("Llama-3.2-3B", 16, 1, "bfloat16", lora=True, max_tokens=8192)
LARGE_FOUR = replace(LARGE, branches=4)


class Rung(NamedTuple):
    """The make-up of a step.

    Attributes:
        batches: "padded", a sample per row; "packed", a sample per example; or "one pass".
        head: "all" logits, those of "live" rows, or "fused" with the loss.
        liger: if True, Liger's layers replace the model's.
    """

    batches: str
    head: str = "fused"
    liger: bool = False


RUNGS = {
    OFFICIAL: Rung("padded", "all"),
    "+ live rows": Rung("padded", "live"),
    "+ fused loss": Rung("padded"),
    "+ packing": Rung("packed"),
    OURS: Rung("one pass"),
    "one pass, Liger layers": Rung("one pass", liger=True),
}


def batches_of(case: Case, rung: Rung, device: torch.device) -> list[Any]:
    """Return a step's forward passes: packs, or dictionaries of transformers' arguments."""
    drawn = draw_triples(case.triples, case.branches, SHAPES[case.model]["vocab_size"])
    if rung.batches == "padded":
        return [
            {name: tensor.to(device) for name, tensor in batch.items()}
            for batch in in_batches(samples(drawn))
        ]
    drawn = apart(drawn) if rung.batches == "packed" else drawn
    return [pack.to(device) for pack in in_packs(drawn, case.max_tokens)]


def apart(drawn: Sequence[Drawn]) -> list[Drawn]:
    """Split triples into separate examples: trunks without branches, and branches as dialogues."""
    none = np.zeros(0, int)
    found = []
    for one in drawn:
        triple = one.example
        assert isinstance(triple, EncodedTriple)
        found.append(replace(one, cuts=none))
        for cut in one.cuts:
            prefix = np.concatenate([triple.prompt, triple.harmful[:cut]])
            ids = np.concatenate([prefix, triple.safe])
            is_target = np.arange(len(ids)) >= len(prefix)
            dialogue = EncodedDialogue(f"{triple.id}-{cut}", ids, is_target)
            found.append(Drawn(dialogue, none, none.astype(bool)))
    return found


def make_model(case: Case, rung: Rung, device: torch.device) -> Any:
    """Make the same random model in every process on one kind of device; PEFT's for LoRA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from derta.modeling.patch import apply_derta, checkpoint_layers

    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    with device:
        model: Any = LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[case.model]), dtype=dtype)
    if rung.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model)
    adapted = model
    if case.lora:
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # initially zero, which would stop gradients to lora_A
                nn.init.normal_(parameter, std=0.01)
    checkpoint_layers(model)
    if rung.batches != "padded":
        apply_derta(model, REFUSAL)
    return adapted.train()


def loss_of(model: Any, head: str, batch: Any, targets: int) -> Tensor:
    """Return the batch's share of the step's loss, the mean over all its targets."""
    if isinstance(batch, PackedBatch):
        return model(**batch.model_inputs(), num_items=targets).loss
    if head == "all":
        return model(**batch, num_items_in_batch=targets, use_cache=False).loss
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    target = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    lm_head = model.get_output_embeddings()
    if head == "fused":
        return derta_loss(hidden, lm_head.weight, target, num_items=targets)
    live = target != IGNORE_INDEX
    logits = lm_head(hidden[live]).float()
    return F.cross_entropy(logits, target[live], reduction="sum") / targets


def targets_of(batches: Sequence[Any]) -> int:
    """Count the targets of the whole step."""
    return sum(
        batch.totals["mle"].targets + batch.totals["rto"].targets
        if isinstance(batch, PackedBatch)
        else int((batch["labels"] != IGNORE_INDEX).sum())
        for batch in batches
    )


class Setup(TrainingStep):
    """Forward and backward of all batches of a step, without the optimizer's step."""

    def __init__(self, case: Case, rung: Rung, device: torch.device, model: Any) -> None:
        super().__init__(model, device)
        model = model.get_base_model() if case.lora else model
        self.batches = batches_of(case, rung, device)
        self.loss = partial(loss_of, model, rung.head, targets=targets_of(self.batches))

    def step(self) -> None:
        for batch in self.batches:
            self.loss(batch=batch).backward()


class StepQuestion(Question):
    """A step's forward and backward passes."""

    name = "step"
    title = "The whole step"
    case_type = Case
    ours = OURS
    baseline = OFFICIAL
    gpu_steps = 1
    columns = (
        Column("triples / s", lambda own, _: f"{own['triples_per_s']:.3g}", of_right=True),
        number_of("tokens", "tokens"),
        ratio_to(OFFICIAL, "time / official", "time_ms_p50"),
        number_of("peak MiB", "peak_mib"),
        ratio_to(OFFICIAL, "memory / official", "peak_mib"),
        error_of("error of gradients", "gradient_error"),
    )

    def groups(self, device: str) -> dict[str, list[tuple[Case, str]]]:
        if device == "cpu":
            cases = {"one branch": SMALL, "four branches": SMALL_FOUR, "in short": SHORT}
        else:
            cases = {"one branch": LARGE, "four branches": LARGE_FOUR}
        return {group: [(case, name) for name in RUNGS] for group, case in cases.items()}

    def setup(self, case: Case, implementation: str, device: torch.device) -> Setup:
        rung = RUNGS[implementation]
        if rung.liger and device.type != "cuda":
            raise NotImplementedError("Liger's layers need Triton, which this device lacks")
        return Setup(case, rung, device, make_model(case, rung, device))

    def answer(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        """Return the official recipe's gradients in float64; in float32 for bfloat16."""
        rung = RUNGS[OFFICIAL]
        wide = torch.float64 if case.dtype == "float32" else torch.float32
        model = make_model(case, rung, device).to(wide)
        gradients = Setup(case, rung, device, model).gradients()
        return {name: gradient.cpu() for name, gradient in gradients.items()}

    def is_right(self, case: Case, errors: Values, baseline: Values) -> bool:
        """Return True if the error is within its limit.

        The limit is 1e-4 in float32; in bfloat16, 2 x (the official recipe's + one rounding).
        """
        if case.dtype == "float32":
            return errors["gradient_error"] <= ERROR_LIMIT
        return within_budget(errors, baseline, {"gradient_error": ONE_ROUNDING})

    def derived(self, case: Case, implementation: str, values: Values) -> Values:
        batches = batches_of(case, RUNGS[implementation], torch.device("cpu"))
        ids = [
            batch.input_ids if isinstance(batch, PackedBatch) else batch["input_ids"]
            for batch in batches
        ]
        return {
            "tokens": sum(tensor.numel() for tensor in ids),
            "triples_per_s": 1e3 * case.triples / values["time_ms_p50"],
        }

    def requirements(self) -> list[Requirement]:
        return [
            Requirement(f"time over the {OFFICIAL}'s", case, "time_ms_p50", limit, None, OFFICIAL)
            for case, limit in (
                (SMALL, 1 / 1.8),
                (SMALL_FOUR, 1 / 3),
                (SHORT, 1 / 1.8),
                (LARGE, 1 / 2.5),
                (LARGE_FOUR, 1 / 2.5),
            )
        ]


QUESTION = StepQuestion()
