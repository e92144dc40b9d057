"""Base of the readers of other libraries, which PyAV replaces where they fail."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any

import numpy as np

from .pyav_reader import PyAVReader
from .reader import FrameReader


class FallbackReader(FrameReader):
    """Reader of another library. After its first failure PyAV reads the file instead, or says what is wrong with it.

    decord fails on some good files (a rotated picture whose rows are not a multiple of 64 bytes). torchcodec, once it
    has failed in a damaged part, returns damaged frames from behind it.
    """

    def __init__(self, path: str, video: Any) -> None:
        self.path = path
        self._video = video
        self._instead: PyAVReader | None = None

    def __len__(self) -> int:
        return len(self._video if self._instead is None else self._instead)

    @abstractmethod
    def _decode(self, indices: list[int]) -> np.ndarray:
        """Return the library's frames at ascending indices without repeats."""

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        if self._instead is None:
            try:
                return self._decode(indices.tolist())
            except Exception:
                if not has_pyav():
                    raise
                self._instead = PyAVReader(self.path)
                self.name = self._instead.name
        frames = self._instead._read_ascending(indices)
        self.note = self._instead.note
        return frames

    def close(self) -> None:
        self._video = None
        if self._instead is not None:
            self._instead.close()


def has_pyav() -> bool:
    """Return whether PyAV can be imported."""
    try:
        importlib.import_module("av")
    except Exception:
        return False
    return True
