"""Tables of tiles of tokens, which the Triton kernels walk in place of a mask.

Tiles start with their example, as those of flash attention start with their sequence, so that no
tile has tokens of two examples. Tiles are numbered in the order of the batch. Every table is linear
in the tokens of a batch and made once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from derta_kernels.attention.layout import Layout


def query_tiles(layout: Layout, block: int, key_block: int) -> Tensor:
    """Return the tiles of `block` queries, those with the most keys before them first.

    Returns:
        (tiles, 4) int32 on the layout's device: first token of the tile, first token and end of
        its example, number of the example's first tile of `key_block` keys.
    """

    def build() -> Tensor:
        table = _tiles(layout, block, key_block)
        return _by_work(table, table[:, 0] - table[:, 1], layout)

    return layout.kept(("query tiles", block, key_block), build)


def key_tiles(layout: Layout, block: int, query_block: int) -> Tensor:
    """Return the tiles of `block` keys, those with the most queries after them first.

    The columns are those of `query_tiles`, the last one counted in tiles of `query_block` queries.
    """

    def build() -> Tensor:
        table = _tiles(layout, block, query_block)
        return _by_work(table, table[:, 2] - table[:, 0], layout)

    return layout.kept(("key tiles", block, query_block), build)


def visible_until_extremes(layout: Layout, block: int) -> Tensor:
    """Return smallest and largest `visible_until` of each tile of `block`, (tiles, 2) int32."""
    return layout.kept(
        ("visible_until extremes", block), lambda: _extremes(layout, layout.visible_until, block)
    )


def position_extremes(layout: Layout, block: int) -> Tensor:
    """Return smallest and largest position of each tile of `block`, (tiles, 2) int32."""
    return layout.kept(
        ("position extremes", block), lambda: _extremes(layout, positions(layout), block)
    )


def positions(layout: Layout) -> Tensor:
    """Return the `position_ids` of a layout that has them, (B N,) int32."""
    position_ids = layout.position_ids
    assert position_ids is not None
    return layout.kept("int32 positions", lambda: position_ids.to(torch.int32))


def _tiles(layout: Layout, block: int, other_block: int) -> Tensor:
    """Return the table of `query_tiles` in the batch's order, (tiles, 4) int64 on the host."""
    start, end = torch.tensor([(example.start, example.end) for example in layout.examples]).T
    count = _ceil_div(end - start, block)
    other_count = _ceil_div(end - start, other_block)
    examples = torch.stack((start, end, _first(count), _first(other_count)), 1)
    start, end, first, other_first = examples.repeat_interleave(count, 0).T
    offset = (torch.arange(len(start)) - first) * block
    return torch.stack((start + offset, start, end, other_first), 1)


def _ceil_div(length: Tensor, block: int) -> Tensor:
    return (length + block - 1) // block


def _first(count: Tensor) -> Tensor:
    return count.cumsum(0) - count


def _by_work(table: Tensor, work: Tensor, layout: Layout) -> Tensor:
    """Sort by descending work, so that no multiprocessor starts the largest tile last."""
    table = table[work.argsort(descending=True, stable=True)].to(torch.int32)
    return table.to(layout.visible_until.device, non_blocking=True)


def _extremes(layout: Layout, values: Tensor, block: int) -> Tensor:
    table = _tiles(layout, block, block).to(values.device, non_blocking=True)
    tokens = table[:, :1] + torch.arange(block, device=values.device)
    own = values[tokens.minimum(table[:, 2:3] - 1)]  # past the end: the last token again
    return torch.stack(own.aminmax(dim=1), 1)
