"""The layout of a batch, which all layers share: worked out once, kept as long as the batch lives.

The memory of `visible_until` identifies a layout, not the tensor object: each layer may hold its
own view, and reentrant checkpointing recomputes from a detached alias.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, UntypedStorage

Bounds = Sequence[Sequence[tuple[int, int]]]
T = TypeVar("T")


class Example(NamedTuple):
    """Tokens start <= i < end of the flattened batch, which see nothing outside of them.

    Attributes:
        start, end: indices into the B N tokens of the batch.
        causal_end: end of the queries that see all earlier tokens of the example; `start` where
            the host does not know.
        span: the largest difference of two positions; None where the host does not know.
    """

    start: int
    end: int
    causal_end: int
    span: int | None


class Layout:
    """The examples of one batch, and the values that implementations derive from them (`kept`).

    Memory: one byte for each pair of a query and a key of the same example, for queries with a mask
        and for each distinct window.

    Args: those of `layout_of`.

    Attributes:
        examples: all examples of the batch in order, tiling its B N tokens.
        visible_until: (B N,) int32, as indices into the B N tokens of the batch.
        position_ids: (B N,) integer, or None where there are none.
    """

    def __init__(
        self, visible_until: Tensor, position_ids: Tensor | None, example_bounds: Bounds | None
    ) -> None:
        rows, count = visible_until.shape
        first = torch.arange(rows, device=visible_until.device)[:, None] * count
        # Copies: an alias would keep alive the memory whose release ends this layout.
        self.visible_until = (visible_until + first).to(torch.int32).flatten()
        self.position_ids = None if position_ids is None else position_ids.flatten().clone()
        self._sources = (_source(visible_until), _source(position_ids))
        self._kept: dict[Hashable, Any] = {}

        bounds = None if example_bounds is None else _flat_bounds(example_bounds, rows, count)
        if bounds is not None and visible_until.device.type != "cpu":
            self.examples = tuple(Example(start, end, start, None) for start, end in bounds)
        else:
            self.examples = self._read_examples(bounds)

    def is_of(self, visible_until: Tensor, position_ids: Tensor | None) -> bool:
        """Tell whether the layout was made from these tensors, unchanged since."""
        return self._sources == (_source(visible_until), _source(position_ids))

    def causal_queries(self, example: Example, window: int | None) -> int:
        """Count the example's first queries that need nothing but plain causal attention."""
        return 0 if self._cuts(window, example) else example.causal_end - example.start

    def mask(self, example: Example, window: int | None, first: int) -> Tensor:
        """Return (L - first, L) bool, True where the query of the row sees the key of the column.

        Rows are the queries from `first` on.
        """
        effective = window if self._cuts(window, example) else None
        key = ("mask", example.start, effective, first)
        length = example.end - example.start
        return self.kept(key, lambda: self.mask_rows(example, effective, first, length))

    def mask_rows(self, example: Example, window: int | None, first: int, end: int) -> Tensor:
        """Return rows `first` to `end` of `mask` with all keys they see, (end - first, end) bool.

        Every call makes it anew; it is not kept.
        """
        tokens = slice(example.start, example.start + end)
        key = torch.arange(tokens.start, tokens.stop, device=self.visible_until.device)
        query = key[first:, None]
        seen = (key <= query) & (query < self.visible_until[tokens])
        if window is not None and self._cuts(window, example):
            assert self.position_ids is not None
            positions = self.position_ids[tokens]
            seen &= positions[first:, None] - positions < window
        return seen

    def kept(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the result of `build`, called once for each `key` and kept for later calls."""
        if key not in self._kept:
            # Evaluation under inference_mode must not leave tensors that training cannot save.
            with torch.inference_mode(False):
                self._kept[key] = build()
        value: T = self._kept[key]
        return value

    def _cuts(self, window: int | None, example: Example) -> bool:
        return window is not None and (example.span is None or example.span >= window)

    def _read_examples(self, bounds: list[tuple[int, int]] | None) -> tuple[Example, ...]:
        """Read the examples from the values of `visible_until`.

        On a device this is the batch's only transfer to the host.
        """
        positions = self.visible_until if self.position_ids is None else self.position_ids
        until, positions = torch.stack((self.visible_until, positions.to(torch.int32))).cpu()
        if bounds is None:
            bounds = _bounds(until.tolist())
        lengths = [end - start for start, end in bounds]
        index = torch.arange(len(until))
        ends = torch.tensor([end for _, end in bounds]).repeat_interleave(torch.tensor(lengths))
        wrong = (until <= index) | (until > ends)
        if wrong.any():
            at = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"visible_until must lie above its own index and within its example, got "
                f"{int(until[at])} for token {at} of an example that ends at {int(ends[at])}"
            )
        return tuple(
            Example(
                start,
                end,
                causal_end=int(own_until.min()),
                span=None if self.position_ids is None else int(own.max() - own.min()),
            )
            for (start, end), own_until, own in zip(
                bounds, until.split(lengths), positions.split(lengths), strict=True
            )
        )


_LAYOUTS: weakref.WeakKeyDictionary[UntypedStorage, Layout] = weakref.WeakKeyDictionary()


@torch.compiler.disable(reason="a layout is made on the host")
def layout_of(
    visible_until: Tensor, position_ids: Tensor | None, example_bounds: Bounds | None
) -> Layout:
    """Return the layout of a batch, made on the first call and found again by every later call.

    Writing to a tensor in place makes a new layout; freeing `visible_until` frees it. Writes that
    PyTorch does not count go unnoticed: those through NumPy, and those to the input of a compiled
    graph between its calls. PyTorch counts no writes to inference tensors, so their layouts are
    made anew every time.

    Args:
        visible_until: (B, N) int32, see `interval_attention`.
        position_ids: (B, N) integer or None.
        example_bounds: see `interval_attention`; used when the layout is made.

    Raises:
        ValueError: example_bounds do not tile the tokens, or a value of visible_until lies outside
            its example (checked where the values are on the host).
    """
    if visible_until.is_inference():
        with torch.inference_mode(False):
            return Layout(visible_until, position_ids, example_bounds)
    storage = visible_until.untyped_storage()
    layout = _LAYOUTS.get(storage)
    if layout is None or not layout.is_of(visible_until, position_ids):
        with torch.inference_mode(False):
            layout = _LAYOUTS[storage] = Layout(visible_until, position_ids, example_bounds)
    return layout


def _source(tensor: Tensor | None) -> tuple[object, ...] | None:
    """Return a tensor's place in memory and its version, equal for aliases of one value."""
    if tensor is None:
        return None
    version = None if tensor.is_inference() else tensor._version
    storage = weakref.ref(tensor.untyped_storage())
    return storage, version, tensor.storage_offset(), tensor.shape, tensor.stride()


def _flat_bounds(example_bounds: Bounds, rows: int, count: int) -> list[tuple[int, int]]:
    """Convert bounds of each batch row to indices into the flattened batch."""
    if len(example_bounds) != rows:
        raise ValueError(
            f"example_bounds must hold one sequence of (start, end) for each of the {rows} batch "
            f"rows, got {len(example_bounds)}"
        )
    for bounds in example_bounds:
        edges = [0, *(end for _, end in bounds)]
        tiles = [start for start, _ in bounds] == edges[:-1] and edges[-1] == count
        if not tiles or any(start >= end for start, end in bounds):
            raise ValueError(
                f"example_bounds must cut [0, N) = [0, {count}) into consecutive (start, end), "
                f"got {tuple(bounds)}"
            )
    return [
        (row * count + start, row * count + end)
        for row, bounds in enumerate(example_bounds)
        for start, end in bounds
    ]


def _bounds(until: list[int]) -> list[tuple[int, int]]:
    """Read bounds from visible_until: an example that starts at s ends at visible_until[s]."""
    bounds = []
    start = 0
    while start < len(until):
        end = until[start]
        if not start < end <= len(until):
            raise ValueError(
                f"visible_until must lie above its own index and within the batch, got {end} for "
                f"token {start} of {len(until)}"
            )
        bounds.append((start, end))
        start = end
    return bounds
