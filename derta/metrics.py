"""What a training run watches, gathered on the device and read only when it is logged."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from derta.data import PackedBatch
from derta.modeling import DertaOutput

TENTHS = 10


class StepMetrics:
    """Sums over the packs run since the last `read`: by-products of the loss, no extra pass.

    `add` never waits for the device; `read` and `check_finite` cost one host transfer.

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
        self._next_count = self._rto_count = self._tokens = 0
        self._first_bad = torch.full((), -1, device=self.device)
        self._origins: list[tuple[int, tuple[str, ...]]] = []
        self._since = time.perf_counter()

    def add(self, batch: PackedBatch, output: DertaOutput, step: int) -> None:
        """Adds one pack's by-products.

        Args:
            batch: the pack, on the device.
            output: what the patched model returned for it.
            step: optimizer step, named if the loss is not finite.
        """
        loss, next_nll, refusal_nll = output.loss, output.next_nll, output.refusal_nll
        assert loss is not None and next_nll is not None and refusal_nll is not None
        rto = batch.rto_mask.float()
        self._next_nll += next_nll.sum()
        self._rto_nll += (refusal_nll * rto).sum()
        slot = (batch.depth_tenth + 1).flatten()
        probability = torch.exp(-refusal_nll) * rto
        self._probability.scatter_add_(0, slot, probability.flatten().float())
        self._rows.scatter_add_(0, slot, rto.flatten())
        self._live_rows += ((batch.shift_labels != -100) | batch.rto_mask).sum()
        self._next_count += batch.next_count
        self._rto_count += batch.rto_count
        self._tokens += batch.input_ids.shape[1]

        bad = ~torch.isfinite(loss.detach())
        index = len(self._origins)
        self._first_bad = torch.where((self._first_bad < 0) & bad, index, self._first_bad)
        self._origins.append((step, batch.example_ids))

    def check_finite(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Stops a run whose loss has become NaN or infinite.

        Args:
            reduce: sums a tensor over all ranks, so that every rank stops.

        Raises:
            FloatingPointError: names the step and the examples of the first such pack.
        """
        first_bad = int(self._first_bad)
        if first_bad >= 0:
            step, ids = self._origins[first_bad]
            where = f"at step {step} in the pack of examples {', '.join(ids)}"
        else:
            where = "on another rank"
        if reduce((self._first_bad >= 0).float()).item() > 0:
            raise FloatingPointError(f"the loss is not finite {where}; nothing of it was saved")

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last read, over all ranks; starts anew.

        Args:
            reduce: sums a tensor over all ranks.

        Returns:
            the figures that `DertaTrainer` names; those without a target are left out.
        """
        host = torch.tensor(
            [self._next_count, self._rto_count, self._tokens],
            dtype=torch.float32,
            device=self.device,
        )
        sums = torch.cat(
            [
                torch.stack([self._next_nll, self._rto_nll, self._live_rows]),
                host,
                self._probability[1:],
                self._rows[1:],
            ]
        )
        next_nll, rto_nll, live_rows, next_count, rto_count, tokens, *tenths = reduce(sums).tolist()
        seconds = time.perf_counter() - self._since
        self._reset()

        figures = {}
        if next_count:
            figures["mle_loss"] = next_nll / next_count
        if rto_count:
            figures["rto_loss"] = rto_nll / rto_count
        for tenth, (probability, rows) in enumerate(
            zip(tenths[:TENTHS], tenths[TENTHS:], strict=True)
        ):
            if rows:
                figures[f"refusal_p_{tenth + 1}"] = probability / rows
        if tokens:
            figures["live_rows"] = live_rows / tokens
            figures["rto_targets"] = rto_count / max(next_count + rto_count, 1)
            figures["tokens_per_s"] = tokens / seconds
        return figures
