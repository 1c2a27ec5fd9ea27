"""Find the sets that are near to a set, without comparing it with all others.

Each set is ordered by how rare its elements are. Two near sets then meet in an element near the
start of both, and its place in either bounds what they can have in common. So sets are listed under
their first elements only, and the lists are parted by place and size: a list whose bound is too low
is passed over whole, however many sets it holds. Rows of one template that differ in a few words
are such lists.

Source: prefix and positional filters, Xiao et al., "Efficient Similarity Joins for Near Duplicate
Detection", WWW 2008.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Portions in which sets are compared: few at first, since one near set may be all that is wanted.
_FIRST_PORTION, _GROWTH, _LARGEST_PORTION = 16, 16, 4096
# Rounding must not raise a bound that decides which sets are never compared.
_SLACK = 1e-6


class NearSets:
    """Sets of 64-bit hashes, arranged once, that are found by their Jaccard similarity.

    Memory: about 17 bytes for each element of a set, and as much for each distinct one.

    Args:
        values: elements of all sets, set after set, (T,) uint64; distinct within a set.
        sizes: elements of each set, (n,), at least 1.
        near: least similarity of near sets, in (0, 1].

    Attributes:
        compared: number of comparisons made so far.
    """

    def __init__(self, values: np.ndarray, sizes: np.ndarray, near: float) -> None:
        self.compared = 0
        self.values = values
        self.sizes = sizes.astype(np.int32)
        self._near = near
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self._known, at, counts = np.unique(values, return_inverse=True, return_counts=True)
        self._elements = at.astype(np.int32)
        self._counts = counts.astype(np.int32)
        self._asked = np.zeros(len(self._known), bool)
        del at, counts
        self._list_sets()

    def _list_sets(self) -> None:
        """List every set under its rarest elements, one group for each element, size and place."""
        owners = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)
        order = np.lexsort((self._elements, self._counts[self._elements], owners))
        places = np.arange(len(owners)) - self._first[owners]
        listed = places < _prefix(self.sizes, self._near)[owners]
        owners, places = owners[listed], places[listed].astype(np.int32)
        elements = self._elements[order[listed]]
        del order, listed
        sizes = self.sizes[owners]
        order = np.lexsort((owners, places, sizes, elements))
        elements, sizes, places = elements[order], sizes[order], places[order]
        starts = np.ones(len(order), bool)
        starts[1:] = np.diff(elements) != 0
        starts[1:] |= np.diff(sizes) != 0
        starts[1:] |= np.diff(places) != 0
        groups = np.flatnonzero(starts)
        self._listed = owners[order]
        self._group_sizes, self._group_places = sizes[groups], places[groups]
        self._group_starts = np.append(groups, len(order)).astype(np.int32)
        self._groups_of = np.searchsorted(
            elements[groups], np.arange(len(self._known) + 1), side="left"
        ).astype(np.int32)

    def __len__(self) -> int:
        return len(self.sizes)

    def near(self, values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield near sets and their similarities in portions; a set may come again.

        Args:
            values: distinct elements of the set in question, sorted, (m,) uint64.
        """
        at = np.minimum(np.searchsorted(self._known, values), len(self._known) - 1)
        known = self._known[at] == values
        if not known.any():
            return
        asked = at[known]
        counts = np.where(known, self._counts[at], 0)
        order = np.lexsort((values, counts))
        for place in range(int(_prefix(np.array(len(values)), self._near))):
            if not known[order[place]]:
                continue
            for sets in self._candidates(at[order[place]], len(values), place):
                similarities = self._similarities(asked, len(values), sets)
                near = similarities >= self._near
                if near.any():
                    yield sets[near], similarities[near]

    def _candidates(self, element: int, size: int, place: int) -> Iterator[np.ndarray]:
        """Yield the sets that may be near to one that has this element at this place."""
        groups = np.arange(self._groups_of[element], self._groups_of[element + 1])
        sizes, places = self._group_sizes[groups], self._group_places[groups]
        common = np.minimum(size - place, sizes - places)
        groups = groups[common >= self._near / (1 + self._near) * (size + sizes) - _SLACK]
        if not len(groups):
            return
        starts = self._group_starts[groups]
        ends = np.cumsum(self._group_starts[groups + 1] - starts)
        shifts = starts - np.append(0, ends[:-1])
        first, portion = 0, _FIRST_PORTION
        while first < ends[-1]:
            taken = np.arange(first, min(first + portion, ends[-1]))
            yield self._listed[taken + shifts[np.searchsorted(ends, taken, side="right")]]
            first, portion = first + portion, min(_GROWTH * portion, _LARGEST_PORTION)

    def _similarities(self, asked: np.ndarray, size: int, sets: np.ndarray) -> np.ndarray:
        """Return the similarities of sets to one of `size` elements, which holds `asked`."""
        self.compared += len(sets)
        sizes = self.sizes[sets]
        ends = np.cumsum(sizes)
        at = np.repeat(self._first[sets] - (ends - sizes), sizes) + np.arange(ends[-1])
        self._asked[asked] = True
        common = np.add.reduceat(self._asked[self._elements[at]], ends - sizes, dtype=np.int64)
        self._asked[asked] = False
        return common / (size + sizes - common)


def _prefix(sizes: np.ndarray, near: float) -> np.ndarray:
    """Return how many first elements of a set a near one cannot all lack."""
    return (sizes - np.ceil(near * sizes - _SLACK) + 1).astype(np.int64)
