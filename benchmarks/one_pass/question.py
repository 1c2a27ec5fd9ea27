"""One pass against separate forward passes, through a model's body.

    python -m benchmarks.one_pass.question --machine xeon-2-cores

transformers is imported where a model is made, so that reports do not need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness.examples import BATCH, REFUSAL, draw_triples, in_batches, in_packs, samples
from benchmarks.harness.gradients import TrainingStep
from benchmarks.harness.question import Question, Values, error_of, number_of, ratio_to
from benchmarks.harness.requirements import Requirement
from derta.data.packs.packing import PackedBatch
from derta.labels import IGNORE_INDEX

OURS = "one pass"
PADDED = "apart, padded"
BY_LENGTH = "apart, padded, sorted by length"
UNPADDED = "apart, one by one"
MAX_TOKENS = 4096  # tokens of a pack, the trainer's default
ERROR_LIMIT = 1e-5

# Shape of a tiny Llama of 3 million parameters.
SHAPE: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    initializer_range=0.06,  # about hidden_size ** -0.5: attention that matters
)


@dataclass(frozen=True)
class Case:
    """Triples of `draw_triples` with that many branches each."""

    triples: int
    branches: int

    @property
    def name(self) -> str:
        """Name of the case in records and tables."""
        branches = "1 branch" if self.branches == 1 else f"{self.branches} branches"
        return f"{self.triples} triples, {branches} each, float32"


ONE, FOUR = Case(16, 1), Case(16, 4)


class Batch(NamedTuple):
    """One forward pass.

    Attributes:
        inputs: function that makes the body's arguments, with a new mask for every step.
        labels: (B, L) int64, the token that a row is trained to say, -100 for no token.
        refuses: (B, L) bool, True if a row is also trained to say the refusal token.
    """

    inputs: Callable[[], dict[str, Any]]
    labels: Tensor
    refuses: Tensor

    @property
    def tokens(self) -> int:
        return self.labels.numel()


def batches_of(case: Case, implementation: str) -> list[Batch]:
    """Return the forward passes of a step."""
    drawn = draw_triples(case.triples, case.branches, SHAPE["vocab_size"])
    if implementation == OURS:
        return [
            Batch(
                partial(packed_inputs, pack), pack.columns["shift_labels"], pack.columns["rto_mask"]
            )
            for pack in in_packs(drawn, MAX_TOKENS)
        ]
    found = samples(drawn)
    if implementation == BY_LENGTH:
        found.sort(key=lambda sample: len(sample.input_ids))
    batches = []
    for inputs in in_batches(found, 1 if implementation == UNPADDED else BATCH):
        labels = nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
        refuses = torch.zeros_like(labels, dtype=torch.bool)
        batches.append(Batch(partial(dict, inputs), labels, refuses))
    return batches


def packed_inputs(pack: PackedBatch) -> dict[str, Any]:
    """Return a patched model's inputs to its body."""
    from derta.modeling.attention import packed_mask

    bounds = (pack.example_bounds,)
    return {
        "input_ids": pack.input_ids,
        "position_ids": pack.position_ids,
        "attention_mask": packed_mask(pack.visible_until, pack.position_ids, bounds),
    }


def make_model(dtype: torch.dtype, *, packed: bool) -> nn.Module:
    """Make the same random model in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from derta.modeling.patch import apply_derta

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype)  # type: ignore[arg-type]
    return apply_derta(model, REFUSAL) if packed else model


class Setup(TrainingStep):
    """Forward and backward of the body, with a gradient at the targets' rows.

    A target's row gets the row of a random table that belongs to the target token, like a head's
    gradient but without its cost. It does not depend on the row's place.
    """

    def __init__(self, body: nn.Module, batches: list[Batch]) -> None:
        super().__init__(body, torch.device("cpu"))
        self.batches = batches
        generator = torch.Generator().manual_seed(1)
        shape = SHAPE["vocab_size"], SHAPE["hidden_size"]
        table = torch.randn(shape, generator=generator).to(next(body.parameters()).dtype)
        self.upstream = [self._upstream(table, batch) for batch in batches]

    def _upstream(self, table: Tensor, batch: Batch) -> Tensor:
        rows = table[batch.labels.clamp(min=0)] * (batch.labels != IGNORE_INDEX)[..., None]
        return rows + table[REFUSAL] * batch.refuses[..., None]

    def step(self) -> None:
        for batch, upstream in zip(self.batches, self.upstream, strict=True):
            hidden = self.module(**batch.inputs(), use_cache=False).last_hidden_state
            hidden.backward(upstream)


class OnePass(Question):
    """Forward and backward of a tiny Llama's body."""

    name = "one_pass"
    title = "One pass against separate passes"
    case_type = Case
    ours = OURS
    baseline = PADDED
    columns = (
        number_of("tokens", "tokens"),
        ratio_to(PADDED, "time / padded", "time_ms_p50"),
        number_of("peak MiB", "peak_mib"),
        ratio_to(PADDED, "memory / padded", "peak_mib"),
        error_of("error of gradients", "gradient_error"),
    )

    def groups(self, device: str) -> dict[str, list[tuple[Case, str]]]:
        names = (OURS, PADDED, BY_LENGTH, UNPADDED)
        return {
            "one branch": [(ONE, name) for name in names],
            "four branches": [(FOUR, name) for name in names],
        }

    def setup(self, case: Case, implementation: str, device: torch.device) -> Setup:
        if device.type != "cpu":
            raise NotImplementedError("a tiny model cannot measure a GPU: see benchmarks.step")
        model: Any = make_model(torch.float32, packed=implementation == OURS)
        return Setup(model.model, batches_of(case, implementation))

    def answer(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        """Return the gradients of separate samples, one after another, in float64."""
        model: Any = make_model(torch.float64, packed=False)
        return Setup(model.model, batches_of(case, UNPADDED)).gradients()

    def is_right(self, case: Case, errors: Values, baseline: Values) -> bool:
        return errors["gradient_error"] <= ERROR_LIMIT

    def derived(self, case: Case, implementation: str, values: Values) -> Values:
        return {"tokens": sum(batch.tokens for batch in batches_of(case, implementation))}

    def requirements(self) -> list[Requirement]:
        return [
            Requirement("time over padded passes'", ONE, "time_ms_p50", 1 / 1.8, None, PADDED),
            Requirement("time over padded passes'", FOUR, "time_ms_p50", 1 / 3, None, PADDED),
            Requirement("relative error of gradients", ONE, "gradient_error", ERROR_LIMIT),
            Requirement("relative error of gradients", FOUR, "gradient_error", ERROR_LIMIT),
        ]


QUESTION = OnePass()
