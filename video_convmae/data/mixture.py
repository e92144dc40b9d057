"""A weighted mixture of lists: the records that an epoch draws, and in which order.

An epoch has as many samples as the lists have records, less what does not fill a step. A list's share of them is its
weight's; without weights it is the share of its records, as if the lists stood in one file. What a list gives is a
walk: all of its records in a random order, then all in another, and so on. So a list with fewer records than its share
is repeated within an epoch, and a larger one is walked through in several epochs until every record was seen.

    weights 3 : 1, lists of 4 and 8 records, epochs of 12       a walk through each list, cut at the epochs' ends
    list A  9 an epoch    2031 1302 3 | 201 3012 01 | ...
    list B  3 an epoch    605 | 174 | 23 3 | ...                 8 records last 2 2/3 epochs

All of it is a function of (seed, epoch). A record's own epoch, of which its samples are made, is the number of the walk
through its list: the same record comes twice in an epoch with other frames, another crop and another mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .datasets import ORDER, SHARES, WALK, sample_generator
from .records import Record, Records

GOLDEN = (5**0.5 - 1) / 2
LINES = 2**32  # lines of a list are numbered from its place times this, so that no two records have the same number


@dataclass(frozen=True)
class MixedList:
    """A list of a mixture.

    Attributes:
        name: of the list, for messages.
        root: folder that its paths were joined to.
        records: its records.
        weight: of its share of an epoch.
        options: what it says of its own about its samples (stride, ...).
    """

    name: str
    root: str
    records: Records
    weight: float
    options: dict[str, Any]


class Mixture(Records):
    """The records of several lists, one list behind the other; `Record.source` is the place of a record's list.

    Args:
        lists: in the order of the configuration.
    """

    def __init__(self, lists: Sequence[MixedList]) -> None:
        self.lists = tuple(lists)
        self.format = self.lists[0].records.format
        counts = [len(each.records) for each in self.lists]
        self.starts = np.cumsum([0, *counts])
        self.labels = np.concatenate([each.records.labels for each in self.lists])
        others = [each.records.all_labels[len(each.records) :] for each in self.lists]
        self.all_labels = np.concatenate([self.labels, *others])
        self._others_ends = None
        if any(map(len, others)):
            self._others_ends = np.cumsum(np.concatenate([each.records.count_others() for each in self.lists]))
        self.lines = np.concatenate([each.records.lines + place * LINES for place, each in enumerate(self.lists)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # nobody slices a list
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} was asked for; the lists have {len(self)}")
        place = self._place(index % len(self))
        return replace(self.lists[place].records[index % len(self) - int(self.starts[place])], source=place)

    def same_list(self, index: int) -> range:
        """Return the indices of the records in a record's list."""
        place = self._place(index)
        return range(int(self.starts[place]), int(self.starts[place + 1]))

    def spans(self) -> list[tuple[str, range]]:
        """Return the name of each list and the indices of its records."""
        ends = self.starts.tolist()
        return [(each.name, range(first, last)) for each, first, last in zip(self.lists, ends, ends[1:])]

    def select(self, indices: Sequence[int] | np.ndarray) -> Mixture:
        """Return some of the records, by ascending indices, each with its line."""
        cuts = np.searchsorted(indices, self.starts)
        parts = [
            replace(each, records=each.records.select(np.asarray(indices[first:last]) - start))
            for each, start, first, last in zip(self.lists, self.starts, cuts, cuts[1:])
        ]
        return Mixture(parts)

    def digest(self, root: Any = None) -> str:
        """Return the SHA-256 of all that decides which records an epoch draws; with a root: where they lie does not."""
        digest = hashlib.sha256()
        for each in self.lists:
            records = each.records.digest(None if root is None else each.root)
            digest.update(repr((records, each.weight, sorted(each.options.items()))).encode())
        return digest.hexdigest()

    def draw(self, seed: int, epoch: int, length: int) -> np.ndarray:
        """Draw an epoch.

        Args:
            seed: of the run.
            epoch: of the run.
            length: samples of an epoch, the same in all of them.

        Returns:
            `(length, 2)` int64: each record's own epoch and its index, in the order in which they are seen.
        """
        counts = self._counts(seed, epoch + 1, length)
        before, here = counts[:-1].sum(axis=0), counts[-1]
        drawn = [
            self._walk(seed, place, int(first), int(count)) for place, (first, count) in enumerate(zip(before, here))
        ]
        order = torch.randperm(length, generator=sample_generator(seed, epoch, ORDER)).numpy()
        return np.concatenate(drawn)[order]

    def _counts(self, seed: int, epochs: int, length: int) -> np.ndarray:
        """Return the samples of each list in each of the first epochs: `(epochs, lists)` int64.

        Systematic sampling: the shares lie end to end on a line of `length`, and a comb of teeth at every whole number
        plus an offset counts them. So an epoch has a list's share, rounded up or down, in the mean exactly, and over
        the epochs, whose offsets are spread by the golden ratio, hardly more or less.
        """
        weights = np.array([each.weight for each in self.lists], dtype=np.float64)
        edges = np.round(np.concatenate([[0], np.cumsum(weights) / weights.sum() * length]), 6)
        first = torch.rand((), generator=sample_generator(seed, SHARES), dtype=torch.float64).item()
        offsets = (first + GOLDEN * np.arange(epochs)) % 1
        return np.diff(np.ceil(edges - offsets[:, None]).astype(np.int64), axis=1)

    def _walk(self, seed: int, place: int, first: int, count: int) -> np.ndarray:
        """Return a part of the walk through a list: `(count, 2)` int64, the number of the walk and the record."""
        size = len(self.lists[place].records)
        parts = [np.zeros((0, 2), dtype=np.int64)]
        for walk in range(first // size, -(-(first + count) // size)):
            generator = sample_generator(seed, walk, place, WALK)
            order = torch.randperm(size, generator=generator).numpy() + int(self.starts[place])
            cut = order[max(0, first - walk * size) : first + count - walk * size]
            parts.append(np.column_stack([np.full(len(cut), walk), cut]))
        return np.concatenate(parts)

    def _place(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1
