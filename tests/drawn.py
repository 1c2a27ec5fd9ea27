"""Examples of every kind with their cuts drawn, and the gradients of a model to compare."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from derta.data.packs.packing import Drawn
from derta.data.tokens.encoding import EncodedDialogue, EncodedTriple

REFUSAL = 77
VOCABULARY = 400


def triple(name: str, prompt: int, harmful: int, safe: int, cuts: list[int], keep: float) -> Drawn:
    rng = np.random.default_rng(len(name) + prompt + harmful)
    ids = rng.integers(VOCABULARY, size=prompt + harmful + safe).astype(np.int32)
    rto_rows = rng.random(harmful + 1) < keep
    parts = np.split(ids, [prompt, prompt + harmful])
    return Drawn(EncodedTriple(name, *parts, cut_limit=harmful), np.array(cuts, np.int64), rto_rows)


def dialogue(name: str, prompt: int, answer: int) -> Drawn:
    rng = np.random.default_rng(prompt)
    ids = rng.integers(VOCABULARY, size=prompt + answer + 2).astype(np.int32)
    is_target = np.arange(len(ids)) >= prompt
    is_target[-2:] = False
    none = np.zeros(0, dtype=np.int64)
    return Drawn(EncodedDialogue(name, ids, is_target), none, none.astype(bool))


# Several branches, one of them at each end, one example without RTO, dialogues in between.
DRAWN = (
    triple("several", prompt=6, harmful=12, safe=5, cuts=[12, 7, 0], keep=1.0),
    dialogue("plain", prompt=4, answer=9),
    triple("one branch", prompt=3, harmful=9, safe=4, cuts=[4], keep=0.4),
    triple("no rto", prompt=5, harmful=8, safe=3, cuts=[6, 2], keep=0.0),
    dialogue("short", prompt=2, answer=1),
    triple("no branch", prompt=4, harmful=6, safe=3, cuts=[], keep=1.0),
)


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trainable, torch.autograd.grad(loss, list(trainable.values())), strict=True))


def assert_same_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert wanted.norm() > 0, name
        error = float((actual[name] - wanted).norm() / wanted.norm())
        assert error <= tolerance, f"{name}: {error:.1e}"
