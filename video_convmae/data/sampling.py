"""Which frames make a clip or a test view: integers in, integers out; nothing is opened here.

Dense sampling (Kinetics-400) takes T frames `stride` apart from one place of the video. A clip's span is not its frame
count: 4 frames at strides 1, 2, 3 span 4, 7, 10 frames.

    frames   0 1 2 3 4 5 6 7 8 9
    stride 2 x . x . x . x           the first of 4 possible starts, 0 to 3

Uniform sampling (Something-Something V2, finetuning and testing) cuts the whole video into T segments and takes one
frame of each. A video with fewer than T frames shows some of them more than once, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """How frames are chosen.

    kind: dense or uniform.
    num_frames: T.
    stride: frames between two of a dense clip; uniform sampling has none.
    """

    kind: Literal["dense", "uniform"] = "dense"
    num_frames: int = 16
    stride: int = 4

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "uniform"):
            raise ValueError(f"sampling is {self.kind!r}; expected 'dense' or 'uniform'")
        if self.num_frames < 1 or self.stride < 1:
            raise ValueError(f"num_frames is {self.num_frames} and stride {self.stride}; expected 1 or more")

    def clip(self, count: int, generator: torch.Generator | None = None) -> np.ndarray:
        """A training clip: `(T,)` int64 indices into a video of `count` frames."""
        if self.kind == "uniform":
            return uniform_clip(count, self.num_frames, generator)
        return dense_clip(count, self.num_frames, self.stride, generator)

    def views(self, count: int, segments: int) -> np.ndarray:
        """Test views: `(segments, T)` int64 indices into a video of `count` frames."""
        if self.kind == "uniform":
            return uniform_views(count, self.num_frames, segments)
        return dense_views(count, self.num_frames, self.stride, segments)


def dense_clip(count: int, num_frames: int, stride: int, generator: torch.Generator | None = None) -> np.ndarray:
    """A random start among all that fit; a video shorter than the span starts at 0 and repeats its last frame.

    VideoMAE draws the start as if the span were `num_frames * stride` and so never shows the last `stride - 1` frames.
    """
    last_start = _last_start(count, num_frames, stride)
    start = int(torch.randint(last_start + 1, (), generator=generator))
    return _dense(count, num_frames, stride, start)


def dense_views(count: int, num_frames: int, stride: int, segments: int) -> np.ndarray:
    """Starts spread evenly from the first to the last possible; a single view lies in the middle."""
    last_start = _last_start(count, num_frames, stride)
    if segments == 1:
        starts = [last_start // 2]
    else:
        starts = [segment * last_start // (segments - 1) for segment in range(segments)]
    return np.stack([_dense(count, num_frames, stride, start) for start in starts])


def uniform_clip(count: int, num_frames: int, generator: torch.Generator | None = None) -> np.ndarray:
    """A random frame of each of T segments."""
    _check(count)
    edges = np.arange(num_frames + 1) * count // num_frames
    widths = np.maximum(edges[1:] - edges[:-1], 1)
    within = torch.rand(num_frames, generator=generator, dtype=torch.float64).numpy()
    return np.minimum(edges[:-1] + (within * widths).astype(np.int64), count - 1)


def uniform_views(count: int, num_frames: int, segments: int) -> np.ndarray:
    """View v of V takes the frame v / V into each segment; a single view takes the middle (VideoMAE at V = 1 and 2).

    VideoMAE shows frame 0 sixteen times where the video has no more than T frames; here such a video runs through.
    """
    _check(count)
    segment = np.arange(num_frames)
    if segments == 1:
        return ((2 * segment + 1) * count // (2 * num_frames))[None]
    view = np.arange(segments)[:, None]
    return (segment * segments + view) * count // (num_frames * segments)


def _dense(count: int, num_frames: int, stride: int, start: int) -> np.ndarray:
    return np.minimum(start + stride * np.arange(num_frames), count - 1)


def _last_start(count: int, num_frames: int, stride: int) -> int:
    _check(count)
    return max(0, count - ((num_frames - 1) * stride + 1))


def _check(count: int) -> None:
    if count < 1:
        raise ValueError(f"the video has {count} frames; expected at least one")
