"""The reference model of a preference loss: its log probabilities, computed once and kept.

The reference is the model before its first step, or under adapters the model without them. Its
numbers are computed before that step and lie in the run's folder, in a folder of their own, as some
loaders read every safetensors file beside a model. A run that continues reads them, and never asks
a trained model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from derta.data import PackedBatch, PackedSteps, pack, plan_packs
from derta.data.packs.references import References, pair_keys
from derta.data.tokens.encoding import EncodedTriple
from derta.data.tokens.store import ROWS_AT_ONCE
from derta.outputs import write_whole

FOLDER = "reference"


def reference_file(folder: Path, name: str) -> Path:
    """Return the path of the numbers of the records called `name`, "train" or "eval"."""
    return folder / FOLDER / f"{name}.safetensors"


def epochs_of(steps: PackedSteps) -> int:
    """Return the number of epochs whose draws differ: 1 if all cuts are 0."""
    if steps.collator.objective.cuts == "zero":
        return 1
    return len(steps) // steps.plan.steps_per_epoch


def identity(steps: PackedSteps, model: str, precision: str) -> dict[str, Any]:
    """Return what the numbers depend on, as plain values.

    Args:
        steps: the run's steps.
        model: a description that tells the model from others.
        precision: the dtype in which it computes.
    """
    found = {"data": steps.examples.digest, "model": model, "precision": precision}
    cuts = steps.collator.objective.cuts
    if cuts == "zero":
        return found | {"cuts": cuts}
    return found | {"cuts": cuts, "seed": steps.collator.seed, "epochs": epochs_of(steps)}


def read_references(path: Path, wanted: Mapping[str, Any]) -> References | None:
    """Return the numbers of a file; None if there is none, or it is damaged or of another run.

    Args:
        path: path of the file.
        wanted: the `identity` of the run. Epochs draw apart, so that the file of a run with more of
            them holds what is wanted.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            keys, values = file.get_tensor("keys"), file.get_tensor("values")
    except (SafetensorError, OSError):
        return None
    if about.get("digest") != _digest(keys, values):
        return None
    told = json.loads(about.get("run", "{}"))
    if told.get("epochs", 1) < wanted.get("epochs", 1):
        return None
    if told | {"epochs": None} != {**wanted, "epochs": None}:
        return None
    return References(keys, values)


def write_references(path: Path, references: References, about: Mapping[str, Any]) -> None:
    """Write the numbers and their `identity`.

    Raises:
        OSError: the file cannot be written.
    """
    keys, values = references.keys, references.values
    metadata = {"run": json.dumps(about), "digest": _digest(keys, values)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({"keys": keys, "values": values}, metadata))


def _digest(keys: np.ndarray, values: np.ndarray) -> str:
    return blake2b(keys.tobytes() + values.tobytes(), digest_size=16).hexdigest()


def compute_references(
    steps: PackedSteps,
    run: Callable[[PackedBatch], Mapping[str, Tensor]],
    *,
    max_tokens: int,
    examples_per_step: int,
    ranks: int,
) -> References:
    """Compute the numbers of all pairs that any epoch draws; all ranks call it together.

    Memory: beside packs, 24 bytes a pair.

    Args:
        steps: the run's steps.
        run: runs a pack without gradients and returns its rows, see `DertaOutput`.
        max_tokens, examples_per_step: see `plan_packs`.
        ranks: the number of processes.
    """
    seen: set[int] = set()
    keys: list[np.ndarray] = []
    values: list[np.ndarray] = []
    collator, examples = steps.collator, steps.examples
    for epoch in range(epochs_of(steps)):
        places = list(_new_pairs(steps, epoch, seen))
        if not places:
            continue
        plan = plan_packs(
            steps.plan.lengths[places],
            max_tokens=max_tokens,
            examples_per_step=examples_per_step,
            epochs=1,
            seed=0,
            ranks=ranks,
            costs=steps.plan.costs[places],
        )
        for step in range(plan.steps_per_epoch):
            for chosen in plan.rank_packs(step, steps.rank):
                found = examples.take([places[index] for index in chosen])
                drawn = [collator.draw(example, epoch) for example in found]
                batch = pack(drawn, collator.objective)
                rows = run(batch)
                firsts = (batch.columns["pair_back"][0] == 0).nonzero()[:, 0]
                both = torch.stack([rows[name][0] for name in ("logp_chosen", "logp_rejected")], 1)
                values.append(both.double().cpu()[firsts].numpy())
                keys += [pair_keys(one.example.id, one.cuts.tolist()) for one in drawn]
    gathered = gather_object(
        [(np.concatenate([np.zeros(0, np.uint64), *keys]), np.concatenate([_NONE, *values]))]
    )
    all_keys = np.concatenate([one for one, _ in gathered])
    order = np.argsort(all_keys)
    return References(all_keys[order], np.concatenate([one for _, one in gathered])[order])


_NONE = np.zeros((0, 2))


def _new_pairs(steps: PackedSteps, epoch: int, seen: set[int]) -> Iterator[int]:
    """Yield the places of triples of which an epoch draws a pair that is not in `seen`; add it."""
    for first in range(0, len(steps.examples), ROWS_AT_ONCE):
        places = range(first, min(first + ROWS_AT_ONCE, len(steps.examples)))
        for place, example in zip(places, steps.examples.take(places), strict=True):
            if not isinstance(example, EncodedTriple):
                continue
            (key,) = pair_keys(example.id, steps.collator.draw(example, epoch).cuts.tolist())
            if int(key) not in seen:
                seen.add(int(key))
                yield place
