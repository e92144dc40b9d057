"""decord."""

from __future__ import annotations

import numpy as np

from video_convmae.data import shards

from .fallback import FallbackReader
from .scan import Scan


class DecordReader(FallbackReader):
    """decord's frames. One thread: with more, it fails on every Something-Something webm (decord issue 246)."""

    name = "decord"

    def __init__(self, path: str, scan: Scan | None) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        super().__init__(path, decord.VideoReader(shards.path_or_bytes(path), ctx=decord.cpu(0), num_threads=1))

    def _decode(self, indices: list[int]) -> np.ndarray:
        return self._video.get_batch(indices).asnumpy()
