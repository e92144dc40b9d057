"""torchcodec, on the CPU and with NVDEC. The only reader that imports torch."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np

from video_convmae.data import shards

from .fallback import FallbackReader
from .scan import Scan


class TorchcodecReader(FallbackReader):
    """torchcodec's frames, seek mode "exact": "approximate" is wrong where the frame rate varies, and no faster."""

    name = "torchcodec"

    def __init__(self, path: str, scan: Scan | None, **options: Any) -> None:
        decoders = importlib.import_module("torchcodec.decoders")
        stream = None if scan is None else scan.stream
        options |= {"dimension_order": "NHWC", "num_ffmpeg_threads": 1, "seek_mode": "exact"}
        super().__init__(path, decoders.VideoDecoder(shards.path_or_bytes(path), stream_index=stream, **options))

    def _decode(self, indices: list[int]) -> np.ndarray:
        return self._video.get_frames_at(indices).data.cpu().numpy()


class TorchcodecCudaReader(TorchcodecReader):
    """torchcodec on the GPU that belongs to this rank; PyAV reads what NVDEC cannot decode.

    Only decoding moves to the GPU: the frames are returned on the CPU, like those of all readers. Each reader process
    holds a CUDA context (some 500 MB of the GPU's memory). Not tried on a GPU yet.
    """

    name = "torchcodec_cuda"

    def __init__(self, path: str, scan: Scan | None) -> None:
        super().__init__(path, scan, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
