"""Triples of the official data's lengths, for one pass and for the official recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from derta.data import DertaCollator, Drawn, EncodedTriple, PackedBatch, pack, plan_packs
from derta.data.packs.packing import packed_length
from derta.labels import IGNORE_INDEX
from derta.objectives.derta import DertaObjective

MEAN_LENGTHS = (40, 380, 70)  # prompt, harmful and safe response
SPREAD = 0.4  # standard deviation of a length's logarithm
MAX_LENGTH = 1024
BATCH = 16
REFUSAL, CLOSING = 7, 3


class Sample(NamedTuple):
    """One sequence of the official recipe.

    Attributes:
        input_ids: (n,) int64, with its closing token.
        labels: (n,) int64, as in transformers: the target of the row before, -100 for no target.
    """

    input_ids: np.ndarray
    labels: np.ndarray


def draw_triples(count: int, branches: int, vocabulary: int) -> list[Drawn]:
    """Draw triples of random tokens, with cuts as drawn by the trainer's defaults.

    Lengths are log-normal with means `MEAN_LENGTHS` and spread `SPREAD`. A harmful response is cut
    at its end if a sequence would be longer than `MAX_LENGTH`.
    """
    rng = np.random.default_rng(0)
    means = np.log(MEAN_LENGTHS) - SPREAD**2 / 2
    collator = DertaCollator(branches=branches)
    drawn = []
    for index, lengths in enumerate(rng.lognormal(means, SPREAD, (count, 3)).astype(int) + 1):
        prompt, harmful, safe = lengths.tolist()
        harmful = min(harmful, MAX_LENGTH - prompt - safe)
        ids = rng.integers(REFUSAL + 1, vocabulary, prompt + harmful + safe, dtype=np.int32)
        q, h, r = np.split(ids, [prompt, prompt + harmful])
        triple = EncodedTriple(f"triple-{index}", q, h, r, cut_limit=harmful)
        drawn.append(collator.draw(triple, epoch=0))
    return drawn


def in_packs(drawn: Sequence[Drawn], max_tokens: int) -> list[PackedBatch]:
    """One step's packs, planned as the trainer plans them."""
    lengths = [packed_length(d.example, DertaObjective(branches=len(d.cuts))) for d in drawn]
    plan = plan_packs(
        lengths, max_tokens=max_tokens, examples_per_step=len(drawn), epochs=1, seed=0
    )
    return [pack([drawn[index] for index in indices]) for indices in plan.steps[0]]


def samples(drawn: Sequence[Drawn]) -> list[Sample]:
    """Return every q + h, trained to refuse, and every q + h[:k] + r, shuffled."""
    found = []
    for triple, cuts in ((d.example, d.cuts) for d in drawn):
        assert isinstance(triple, EncodedTriple)
        ids = np.concatenate([triple.prompt, triple.harmful, [CLOSING]])
        found.append(_sample(ids, len(triple.prompt), refuses=True))
        for cut in cuts:
            prefix = np.concatenate([triple.prompt, triple.harmful[:cut]])
            ids = np.concatenate([prefix, triple.safe])
            found.append(_sample(ids, len(prefix), refuses=False))
    order = np.random.default_rng(0).permutation(len(found))
    return [found[index] for index in order]


def _sample(ids: np.ndarray, context: int, *, refuses: bool) -> Sample:
    labels = np.full_like(ids, REFUSAL) if refuses else ids.copy()
    labels[:context] = IGNORE_INDEX
    return Sample(ids, labels)


def padded(batch: Sequence[Sample]) -> dict[str, Tensor]:
    """Build a batch for a transformers model: (B, L) int64 each, padded on the right."""
    longest = max(len(sample.input_ids) for sample in batch)

    def rows(columns: Sequence[np.ndarray], filling: int) -> Tensor:
        table = np.full((len(batch), longest), filling)
        for row, column in zip(table, columns, strict=True):
            row[: len(column)] = column
        return torch.from_numpy(table)

    return {
        "input_ids": rows([sample.input_ids for sample in batch], CLOSING),
        "attention_mask": rows([np.ones_like(sample.labels) for sample in batch], 0),
        "labels": rows([sample.labels for sample in batch], IGNORE_INDEX),
    }


def in_batches(found: Sequence[Sample], size: int = BATCH) -> list[dict[str, Tensor]]:
    """Batch samples in their order; 16 is the size in the official full-parameter script."""
    return [padded(found[first : first + size]) for first in range(0, len(found), size)]
