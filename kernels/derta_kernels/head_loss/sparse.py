"""A sparse backward pass: products of the gradient that leave out tiles of small numbers.

Most of a row's gradient is the probability of tokens that nobody expects there. A tile is 128 rows
by 128 columns of a chunk's gradient. It is dead, and takes no part in the products, if no
|gradient| in it exceeds tolerance x |logit_scale| x the weight of its row. What is lost is known:
the sum of |gradient| over the dead tiles of each row. A tile with a number that is not finite is
live.

Loss, gradient of bias and all by-products stay exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from derta_kernels.head_loss.chunked import SLICE_ELEMENTS, add_product
from derta_kernels.head_loss.row_pass import TILE, RowPass


class Masses(NamedTuple):
    """Sums of |dloss / dlogit| over a row's logits, before cap and scale.

    Attributes:
        gradient: (n,), all of it.
        skipped: (n,), the part in dead tiles.
    """

    gradient: Tensor
    skipped: Tensor


class SparseBackward:
    """The sparse backward pass of one call, chunk by chunk.

    Args:
        tolerance: > 0, a share of the row's weight.
        row_pass: gives the figures of blocks.
        uses_triton: if True, products are those of `tile_product_triton`, else rectangles.
        row_weight: (n, K), the weights of the live rows' tokens.
        logit_scale: factor of the logits.
        width: d.
    """

    def __init__(
        self,
        tolerance: float,
        row_pass: RowPass,
        uses_triton: bool,
        row_weight: Tensor,
        logit_scale: float,
        width: int,
    ) -> None:
        self._row_pass = row_pass
        self._uses_triton = uses_triton
        self._width = width
        self._bound = tolerance * abs(logit_scale) * row_weight.abs().sum(1)
        self.masses = Masses(*(row_weight.new_zeros(len(row_weight)) for _ in Masses._fields))

    def row_pass(
        self,
        chunk: slice,
        logits: Tensor,
        tokens: Tensor,
        token_weight: Tensor,
        unit: Tensor,
        softcap: float | None,
        logit_scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Run the row pass over a chunk, gradients in units of `unit`, and find its live tiles.

        Returns:
            logsumexp (C,) and nll (C, K).
        """
        logsumexp, nll, blocks = self._row_pass.with_blocks(
            logits, tokens, token_weight, softcap, logit_scale
        )
        peak, mass = blocks.unbind(1)
        dead = (peak <= (self._bound[chunk] / unit)[:, None]) & mass.isfinite()
        rows = len(dead)
        padded = dead.new_ones(-(-rows // TILE) * TILE, dead.shape[1])
        padded[:rows] = dead
        self._live = ~padded.view(-1, TILE, dead.shape[1]).all(1)
        is_live = self._live.repeat_interleave(TILE, 0)[:rows]
        self.masses.gradient[chunk] = mass.sum(1) * unit
        self.masses.skipped[chunk] = mass.masked_fill(is_live, 0).sum(1) * unit
        if not self._uses_triton:
            most = SLICE_ELEMENTS // self._width
            self._rectangles = list(rectangles(self._live, rows, logits.shape[1], most))
        return logsumexp, nll

    def times_weight(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Return gradient (C, V) @ weight (V, d) over the chunk's live tiles, (C, d).

        It is in gradient's dtype, or wider.
        """
        if self._uses_triton:
            from derta_kernels.head_loss.tile_product_triton import times_weight

            return times_weight(gradient, weight, self._live)
        wide = torch.promote_types(gradient.dtype, torch.float32)  # a part may be rounded
        product = gradient.new_zeros(len(gradient), weight.shape[1], dtype=wide)
        for rows, columns in self._rectangles:
            part = gradient[rows, columns]
            add_product(product[rows], part.T, weight[columns].to(part.dtype), is_first=False)
        return product

    def add_product(self, total: Tensor, gradient: Tensor, h: Tensor) -> None:
        """Add gradient (C, V)^T @ h (C, d) over the chunk's live tiles to total (V, d)."""
        if self._uses_triton:
            from derta_kernels.head_loss.tile_product_triton import add_product as add_tiles

            add_tiles(total, gradient, h, self._live)
            return
        for rows, columns in self._rectangles:
            add_product(total[columns], gradient[rows, columns], h[rows], is_first=False)


def rectangles(
    live: Tensor, rows: int, columns: int, most_columns: int
) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of rectangles that cover every live tile once, and no dead one.

    Neighbouring columns of tiles with the same live rows are merged.

    Synchronisation: one transfer to the host.

    Args:
        live: (ceil(rows / TILE), ceil(columns / TILE)) bool.
        rows, columns: C and V.
        most_columns: the widest rectangle.
    """
    most = max(1, most_columns // TILE)
    place = 0
    for tiles, group in itertools.groupby(live.T.tolist()):
        end = place + len(list(group))
        for first in range(place, end, most):
            across = slice(first * TILE, min(min(first + most, end) * TILE, columns))
            for top, bottom in _runs(tiles):
                yield slice(top * TILE, min(bottom * TILE, rows)), across
        place = end


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of True."""
    place = 0
    for flag, group in itertools.groupby(flags):
        end = place + len(list(group))
        if flag:
            yield place, end
        place = end
