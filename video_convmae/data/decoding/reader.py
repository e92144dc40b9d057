"""Interface of all frame readers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from .errors import DecodeError, decode_errors

_AT_ONCE = 4  # frames of a stream that a library without one of its own decodes at a time


def smaller_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """Return width and height divided by the least whole number that brings both down to `max_side`; None: no bound."""
    divisor = 1 if max_side is None else -(-max(size) // max_side)
    return max(1, size[0] // divisor), max(1, size[1] // divisor)


class FrameReader(ABC):
    """Frames of one open record; a context manager.

    Attributes:
        path: path of the record.
        name: library that decodes: "torchcodec", "torchcodec_cuda", "pyav" or "decord"; "pillow" for images. Not always
            the one asked for (see rules.py).
        note: what a user should know of the frames that were read; None: nothing.
        damaged: a part of the file is missing, as `note` says; the frames that can be read are right.
        times: `(len(self),)` seconds at which each frame is shown, ascending from 0; None: nothing says them.
        rate: frames a second, as far as the file says: for how long a single frame is shown; None: it does not.
    """

    path: str
    name: str
    note: str | None = None
    damaged: bool = False
    times: np.ndarray | None = None
    rate: float | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of frames that can be read: those the file holds, whatever its header says."""

    @abstractmethod
    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        """Return the frames at ascending indices without repeats, uint8 `(T, H, W, 3)`."""

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the frames at `indices`, in that order, repeats allowed: uint8 `(T, H, W, 3)`, RGB.

        Raises:
            DecodeError: an index is not in [0, len(self)), or the part of the file that is needed is damaged.
        """
        with decode_errors(self.path):
            wanted, places = np.unique(np.asarray(indices, dtype=np.int64).reshape(-1), return_inverse=True)
            if not len(wanted):
                raise DecodeError(f"{self.path}: no frames were asked for")
            if wanted[0] < 0 or wanted[-1] >= len(self):
                bad = wanted[0] if wanted[0] < 0 else wanted[-1]
                raise DecodeError(f"{self.path}: frame {bad} was asked for; there are {len(self)}, counted from 0")
            frames = self._read_ascending(wanted)
            return frames if np.array_equal(places, np.arange(len(wanted))) else frames[places]

    def stream(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the frames at ascending indices without repeats, uint8 `(H, W, 3)` each, in one pass over the file.

        Memory holds a few frames, however many are asked for. Nothing else may be read until the last was taken.

        Raises:
            DecodeError: as `read`, at the first frame that is damaged; those before it were yielded.
        """
        with decode_errors(self.path):
            yield from self._stream_ascending(indices)

    def _stream_ascending(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(indices), _AT_ONCE):
            yield from self._read_ascending(indices[start : start + _AT_ONCE])

    def close(self) -> None:
        """Release the file. Reading afterwards is an error."""
        return  # image readers keep no file open

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
