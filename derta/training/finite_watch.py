"""Stop a run in which a loss, gradient or weight is no longer finite, before anything is saved.

Losses and gradients are checked after every pack, on the device. The result waits there until
figures are logged or a model is saved. The message names the pack as exactly as possible: a loss
belongs to one rank, but gradients may show only once they are averaged over ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from derta.data import PackedBatch
from derta.modeling.folders import listed

# The loss is a mean over targets, of the order of 1: what overflows float16 unscaled has exploded.
LEAST_LOSS_SCALE = 1.0


def not_finite(tensors: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Tell which tensors have a 2-norm that is NaN or infinite.

    Reads every element once; never waits for the device.

    Numerics: norms are float32, of float64 tensors float64: they overflow before elements do, and
    a weight or gradient of 1e19 is past use already.

    Args:
        tensors: any dtype and device; a sharded one is checked by this rank's part. None counts as
            finite.
        device: device of the result.

    Returns:
        One bool per tensor.
    """
    tensors = list(tensors)
    norms = [torch.zeros((), device=device)] * len(tensors)
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if tensor is not None:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            alike[local.device, local.dtype].append((index, local))
    for (_, dtype), members in alike.items():
        wide = torch.promote_types(dtype, torch.float32)
        found = torch.stack(torch._foreach_norm([local for _, local in members], dtype=wide))
        found = found.to(device, non_blocking=True)  # one copy for all that wait on the host
        for (index, _), norm in zip(members, found.unbind(), strict=True):
            norms[index] = norm
    return ~torch.isfinite(torch.stack(norms))


class _Pack(NamedTuple):
    """A pack that ran since the last check; `shows` and `averaged` describe its gradients."""

    step: int
    example_ids: tuple[str, ...]
    shows: bool
    averaged: bool


class _Mark(NamedTuple):
    """A rank's first finding: its pack, if it is in the loss, and indices of gradients."""

    pack: int
    in_loss: bool
    gradients: list[int]


class FiniteWatch:
    """Marks the first pack after which a loss or a gradient norm is NaN or infinite.

    `add` never waits for the device; `check` costs one host transfer while all is finite.

    Args:
        device: the device of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._packs: list[_Pack] = []
        self._first = torch.full((), -1, device=device)
        self._bad: Tensor | None = None  # of the loss, then of each gradient, after that pack

    @torch.no_grad()
    def add(
        self,
        batch: PackedBatch,
        loss: Tensor,
        gradients: Iterable[Tensor | None],
        *,
        step: int,
        averaged: bool,
    ) -> None:
        """Look at one pack, after its backward pass.

        Args:
            batch: the pack.
            loss: its loss on this rank.
            gradients: accumulated gradients of all parameters; None for a missing one, or one to
                skip.
            step: the pack's optimizer step.
            averaged: if True, gradients that are not sharded are averaged over all ranks by now.
        """
        gradients = list(gradients)
        bad_loss = ~torch.isfinite(loss.detach())
        bad = torch.cat([bad_loss[None], not_finite(gradients, self.device)])
        unmarked = self._first < 0
        self._first = torch.where(unmarked & bad.any(), len(self._packs), self._first)
        self._bad = bad if self._bad is None else torch.where(unmarked, bad, self._bad)
        shown = [gradient for gradient in gradients if gradient is not None]
        averaged = averaged or any(isinstance(gradient, DTensor) for gradient in shown)
        self._packs.append(_Pack(step, batch.example_ids, bool(shown), averaged))

    @torch.no_grad()
    def check(
        self,
        parameters: Mapping[str, Tensor | None],
        reduce: Callable[[Tensor], Tensor],
        *,
        step: int,
        loss_scale: float | None,
    ) -> None:
        """Stop a run in which something was not finite since the last check, or now is not.

        Args:
            parameters: all parameters by name, in the order of gradients; None for a frozen one.
            reduce: sums a tensor over all ranks, so that every rank stops.
            step: the optimizer step of the parameters.
            loss_scale: factor of float16 losses; None: losses are not scaled.

        Raises:
            FloatingPointError: a loss or a gradient norm was not finite, with step, examples and
                first parameters of the first such pack; the norm of a parameter is not; gradients
                overflowed so often that the loss scale is too small. All ranks say the same.
        """
        bad = not_finite(parameters.values(), self.device)
        too_small = loss_scale is not None and loss_scale < LEAST_LOSS_SCALE
        flags = torch.stack(
            [self._first >= 0, bad.any(), torch.full((), too_small, device=self.device)]
        )
        if not any(reduce(flags.float()).tolist()):
            self._packs.clear()
            return
        names = list(parameters)
        if marks := gather_object(self._own_mark()):
            raise FloatingPointError(f"{self._first_of(marks, names)}; nothing of it was saved")
        if found := gather_object(torch.nonzero(bad).flatten().tolist()):
            raise FloatingPointError(
                f"the norm of {_some(found, names)} is not finite after step {step}; nothing of it "
                "was saved"
            )
        raise FloatingPointError(
            f"the loss scale has fallen to {loss_scale:g} at step {step}: gradients overflow "
            "float16 at any scale, and their steps are skipped; bf16 needs no scale"
        )

    def _own_mark(self) -> list[_Mark]:
        pack = int(self._first)
        if pack < 0:
            return []
        assert self._bad is not None
        in_loss, *gradients = self._bad.tolist()
        return [_Mark(pack, in_loss, [index for index, bad in enumerate(gradients) if bad])]

    def _first_of(self, marks: list[_Mark], names: list[str]) -> str:
        """Describe the first finding of any rank, and its place."""
        first = min(mark.pack for mark in marks)
        marks = [mark for mark in marks if mark.pack == first]
        own = [mark for mark in self._own_mark() if mark.pack == first]
        pack = self._packs[first]
        if any(mark.in_loss for mark in marks):
            what = "the loss"
            packs = [pack.example_ids for mark in own if mark.in_loss]
        else:
            found = [index for mark in marks for index in mark.gradients]
            what = f"the gradient norm of {_some(found, names)}"
            packs = self._shown_with(first) if own or pack.averaged else []
        ids = [", ".join(examples) or "none" for examples in gather_object(packs)]
        if len(ids) > 1:
            where = f"one of the packs of examples ({'), ('.join(ids)})"
        else:
            where = f"the pack of examples {ids[0]}"
        return f"{what} is not finite at step {pack.step} in {where}"

    def _shown_with(self, last: int) -> list[tuple[str, ...]]:
        """Return the examples of a pack, and of packs before it whose gradients showed with it."""
        first = last
        while first and not self._packs[first - 1].shows:
            first -= 1
        return [pack.example_ids for pack in self._packs[first : last + 1]]


def _some(indices: Iterable[int], names: list[str]) -> str:
    """Return the first few of the names, and the number of the others."""
    return listed([names[index] for index in sorted(set(indices))])
