"""Figures of a training run, gathered on the device and read only when they are logged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from derta.data import PackedBatch
from derta.modeling.patch import DertaOutput
from derta.objectives.base import Mean, Objective


class StepFigures(NamedTuple):
    """Figures of the packs since the last read, over all ranks.

    Attributes:
        means: figures by name; those without a target are left out.
        totals: weight of each term's targets.
    """

    means: dict[str, float]
    totals: dict[str, float]


def figure_names(objective: Objective) -> list[str]:
    """Return the names of all figures that `StepMetrics.read` may return."""
    counted = [term.name for term in objective.terms if term.counted]
    return [
        *(f"{term.name}_loss" for term in objective.terms),
        *(f"{name}_targets" for name in counted[1:]),
        *objective.figures,
        "live_rows",
        "tokens_per_s",
    ]


class StepMetrics:
    """Means over the packs run since the last `read`: by-products of the loss, no extra pass.

    `add` never waits for the device; `read` costs one transfer to the host.

    Args:
        objective: its terms, and what else it logs.
        device: the device of the losses.
    """

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective = objective
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self._totals = {term.name: 0.0 for term in self.objective.terms}
        self._losses = {name: torch.zeros((), device=self.device) for name in self._totals}
        self._live_rows = torch.zeros((), device=self.device)
        self._means: dict[str, Mean] = {}
        self._tokens = 0
        self._since = time.perf_counter()

    def add(self, batch: PackedBatch, output: DertaOutput) -> None:
        """Add the by-products of one pack.

        Args:
            batch: the pack, on the device.
            output: the patched model's output for it.
        """
        assert output.rows is not None
        targets = self.objective.targets(batch.columns)
        weights = self.objective.row_weights(batch.columns)
        for name, rows in targets.items():
            weight = batch.loss_weight * weights[name]
            self._losses[name] += (output.rows[name] * weight).where(rows, 0).sum()
            self._totals[name] += batch.totals[name].weight
        self._live_rows += self.objective.live(batch.columns).sum()
        for name, mean in self.objective.means(batch, output.rows).items():
            if name in self._means:
                mean = Mean(*(old + new for old, new in zip(self._means[name], mean, strict=True)))
            self._means[name] = mean
        if batch.example_ids:  # the token of an empty pack is no one's
            self._tokens += batch.input_ids.shape[1]

    def sums(self) -> dict[str, Tensor]:
        """Return what was added since the last read, for `set_sums` of a later process."""
        seconds = time.perf_counter() - self._since
        host = {"tokens": self._tokens, "seconds": seconds}
        host |= {f"total.{name}": total for name, total in self._totals.items()}
        sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in host.items()}
        sums |= {f"loss.{name}": loss for name, loss in self._losses.items()}
        sums["live_rows"] = self._live_rows
        for name, mean in self._means.items():
            sums |= {f"mean.{name}": mean.total, f"divisor.{name}": mean.divisor}
        return sums

    def set_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue with the result of `sums`, on any device."""
        self._tokens = int(sums["tokens"])
        self._since = time.perf_counter() - float(sums["seconds"])
        self._totals = {name: float(sums[f"total.{name}"]) for name in self._totals}
        self._losses = {name: sums[f"loss.{name}"].to(self.device) for name in self._losses}
        self._live_rows = sums["live_rows"].to(self.device)
        self._means = {
            name: Mean(total.to(self.device), sums[f"divisor.{name}"].to(self.device))
            for key, total in sums.items()
            if (name := key.removeprefix("mean.")) != key
        }

    def read(self, reduce: Callable[[Tensor], Tensor]) -> StepFigures:
        """Return the means since the last read, over all ranks, and start anew.

        Args:
            reduce: sums a tensor over all ranks.

        Returns:
            The figures that `DertaTrainer` names.
        """
        host = torch.tensor([*self._totals.values(), self._tokens], device=self.device)
        device = torch.stack([*self._losses.values(), self._live_rows])
        parts = [host.float(), device.float()]
        for mean in self._means.values():
            parts += [mean.total.flatten().float(), mean.divisor.flatten().float()]
        sums = iter(reduce(torch.cat(parts)).tolist())
        seconds = time.perf_counter() - self._since
        shapes = {name: mean.total.shape for name, mean in self._means.items()}

        totals = {name: next(sums) for name in self._totals}
        tokens = next(sums)
        losses = {name: next(sums) for name in totals}
        live_rows = next(sums)
        means = {f"{name}_loss": losses[name] / totals[name] for name in totals if totals[name]}
        for name, shape in shapes.items():
            names = [f"{name}_{index + 1}" for index in range(shape.numel())] if shape else [name]
            numerators = [next(sums) for _ in names]
            means |= {
                one: numerator / count
                for one, numerator in zip(names, numerators, strict=True)
                if (count := next(sums))
            }
        if tokens:
            means["live_rows"] = live_rows / tokens
            counted = [term.name for term in self.objective.terms if term.counted]
            everything = sum(totals[name] for name in counted) or 1.0
            means |= {f"{name}_targets": totals[name] / everything for name in counted[1:]}
            means["tokens_per_s"] = tokens / seconds
        self._reset()
        return StepFigures(means, totals)
