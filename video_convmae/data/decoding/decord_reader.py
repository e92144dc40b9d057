"""decord."""

from __future__ import annotations

import numpy as np

from video_convmae.data import shards

from .errors import DecodeError
from .fallback import FallbackReader
from .scan import Scan


class DecordReader(FallbackReader):
    """decord's frames. One thread: with more, it fails on every Something-Something webm (decord issue 246)."""

    name = "decord"

    def __init__(self, path: str, scan: Scan | None) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        video = decord.VideoReader(shards.path_or_bytes(path), ctx=decord.cpu(0), num_threads=1)
        super().__init__(path, video)
        if scan is not None and video.get_key_indices() != scan.key_indices().tolist():
            raise DecodeError(f"{path}: decord takes other frames for keyframes than the scan does")

    def _decode(self, indices: list[int]) -> np.ndarray:
        return self._video.get_batch(indices).asnumpy()
