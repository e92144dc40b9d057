"""Decoded records kept in memory: after their first epoch small clips are not decoded again (`data.memory`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from video_convmae.data.records import Record

from .process import ReaderProcess, RemoteReader


class MemoryReader:
    """A `ReaderProcess` whose records are decoded whole, once, and kept while they fit.

    A record that does not fit is decoded at each visit. The frames are the same either way. A copy (a loading process)
    starts empty.

    Args:
        reader: decodes.
        gigabytes: of decoded frames that are kept, in 2**30 bytes.
    """

    def __init__(self, reader: ReaderProcess, gigabytes: float) -> None:
        self.reader = reader
        self.gigabytes = gigabytes
        self.kept_bytes = 0
        self._kept: dict[str, KeptRecord] = {}

    def open(self, record: Record) -> RemoteReader | KeptRecord:
        """Open a record, as `ReaderProcess.open` does; one that is kept comes from memory."""
        if record.path in self._kept:
            return self._kept[record.path]
        opened = self.reader.open(record)
        size = len(opened) * opened.read([0]).nbytes
        if self.kept_bytes + size > self.gigabytes * 2**30:
            return opened
        kept = KeptRecord(opened.read(np.arange(len(opened))), opened.times)
        self._kept[record.path] = kept
        self.kept_bytes += size
        return kept

    def __reduce__(self) -> tuple[type[MemoryReader], tuple[ReaderProcess, float]]:
        return MemoryReader, (self.reader, self.gigabytes)


class KeptRecord(contextlib.AbstractContextManager["KeptRecord"]):
    """A record in memory, used like a `RemoteReader`."""

    def __init__(self, frames: np.ndarray, times: np.ndarray | None = None) -> None:
        self._frames = frames
        self.times = times

    def __len__(self) -> int:
        return len(self._frames)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return a copy of frames, as `RemoteReader.read` does."""
        return self._frames[indices]

    def __exit__(self, *exception: object) -> None:
        """Nothing is open."""
