"""What a training run watches, gathered on the device and read only when it is logged."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from derta.data import PackedBatch
from derta.labels import IGNORE_INDEX
from derta.modeling.patch import DertaOutput

TENTHS = 10


class StepMetrics:
    """Sums over the packs run since the last `read`: by-products of the loss, no extra pass.

    `add` never waits for the device; `read` costs one host transfer.

    Args:
        device: where the losses are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self._next_nll = torch.zeros((), device=self.device)
        self._rto_nll = torch.zeros((), device=self.device)
        # Slot 0 takes the rows outside harmful responses, so that no row has to be selected.
        self._probability = torch.zeros(TENTHS + 1, device=self.device)
        self._rows = torch.zeros(TENTHS + 1, device=self.device)
        self._live_rows = torch.zeros((), device=self.device)
        self._benign_probability = torch.zeros((), device=self.device)
        self._benign_rows = torch.zeros((), device=self.device)
        self._next_total = self._rto_total = 0.0
        self._tokens = 0
        self._since = time.perf_counter()

    def add(self, batch: PackedBatch, output: DertaOutput) -> None:
        """Adds one pack's by-products.

        Args:
            batch: the pack, on the device.
            output: what the patched model returned for it.
        """
        next_nll, refusal_nll = output.next_nll, output.refusal_nll
        assert next_nll is not None and refusal_nll is not None
        rto = batch.rto_mask.float()
        self._next_nll += (next_nll * batch.loss_weight).sum()
        self._rto_nll += (refusal_nll * rto * batch.loss_weight * batch.rto_weight).sum()
        slot = (batch.depth_tenth + 1).flatten()
        refusal_probability = torch.exp(-refusal_nll)
        probability = refusal_probability * rto
        self._probability.scatter_add_(0, slot, probability.flatten().float())
        self._benign_probability += (refusal_probability * batch.benign).sum()
        self._benign_rows += batch.benign.sum()
        self._rows.scatter_add_(0, slot, rto.flatten())
        self._live_rows += ((batch.shift_labels != IGNORE_INDEX) | batch.rto_mask).sum()
        self._next_total += batch.next_total
        self._rto_total += batch.rto_total
        self._tokens += batch.input_ids.shape[1]

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last read, over all ranks; starts anew.

        Args:
            reduce: sums a tensor over all ranks.

        Returns:
            the figures that `DertaTrainer` names; those without a target are left out.
        """
        host = torch.tensor(
            [self._next_total, self._rto_total, self._tokens],
            dtype=torch.float32,
            device=self.device,
        )
        sums = torch.cat(
            [
                torch.stack(
                    [
                        self._next_nll,
                        self._rto_nll,
                        self._live_rows,
                        self._benign_probability,
                        self._benign_rows,
                    ]
                ),
                host,
                self._probability[1:],
                self._rows[1:],
            ]
        )
        next_nll, rto_nll, live_rows, benign_probability, benign_rows, *rest = reduce(sums).tolist()
        next_total, rto_total, tokens, *tenths = rest
        seconds = time.perf_counter() - self._since
        self._reset()

        figures = {}
        if next_total:
            figures["mle_loss"] = next_nll / next_total
        if rto_total:
            figures["rto_loss"] = rto_nll / rto_total
        for tenth, (probability, rows) in enumerate(
            zip(tenths[:TENTHS], tenths[TENTHS:], strict=True)
        ):
            if rows:
                figures[f"refusal_p_{tenth + 1}"] = probability / rows
        if benign_rows:
            figures["benign_refusal_p"] = benign_probability / benign_rows
        if tokens:
            figures["live_rows"] = live_rows / tokens
            figures["rto_targets"] = rto_total / ((next_total + rto_total) or 1.0)
            figures["tokens_per_s"] = tokens / seconds
        return figures
