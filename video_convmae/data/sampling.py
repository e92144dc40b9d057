"""Frame sampling: the frame indices of a training clip or of a record's test views. Nothing is opened here.

Dense sampling (Kinetics-400) takes T frames, `stride` apart, from one place of the video. A clip's span is not its
frame count: 4 frames at strides 1, 2, 3 span 4, 7, 10 frames.

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
    """A way to sample frames, for training clips and test views.

    Args:
        kind: dense or uniform.
        num_frames: T.
        stride: frames from one frame of a dense clip to the next; unused by uniform sampling.

    Raises:
        ValueError: an unknown kind, or a number below 1.
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
        """Draw a training clip: `(T,)` int64 indices into a video of `count` frames.

        Raises:
            ValueError: the video has no frames.
        """
        if count < 1:
            raise ValueError(f"the video has {count} frames; expected at least one")
        if self.kind == "uniform":
            return uniform_clip(count, self.num_frames, generator)
        return dense_clip(count, self.num_frames, self.stride, generator)

    def views(self, count: int, segments: int) -> np.ndarray:
        """Return test views: `(segments, T)` int64 indices into a video of `count` frames, 1 or more."""
        if self.kind == "uniform":
            return uniform_views(count, self.num_frames, segments)
        return dense_views(count, self.num_frames, self.stride, segments)


def dense_clip(count: int, num_frames: int, stride: int, generator: torch.Generator | None = None) -> np.ndarray:
    """Draw a start among all that fit: `(num_frames,)` int64 indices into a video of `count` frames, 1 or more.

    A video shorter than the span starts at 0 and repeats its last frame. VideoMAE draws the start as if the span were
    `num_frames * stride` and so never shows the last `stride - 1` frames.
    """
    latest_start = max(0, count - 1 - (num_frames - 1) * stride)
    start = int(torch.randint(latest_start + 1, (), generator=generator))
    return np.minimum(start + stride * np.arange(num_frames), count - 1)


def dense_views(count: int, num_frames: int, stride: int, segments: int) -> np.ndarray:
    """Spread the starts evenly from the first to the last possible one; a single view lies in the middle.

    Returns:
        `(segments, num_frames)` int64 indices into a video of `count` frames, 1 or more.
    """
    latest_start = max(0, count - 1 - (num_frames - 1) * stride)
    starts = np.array([latest_start // 2]) if segments == 1 else np.arange(segments) * latest_start // (segments - 1)
    return np.minimum(starts[:, None] + stride * np.arange(num_frames), count - 1)


def uniform_clip(count: int, num_frames: int, generator: torch.Generator | None = None) -> np.ndarray:
    """Draw one frame of each segment: `(num_frames,)` int64 indices into a video of `count` frames, 1 or more."""
    edges = np.arange(num_frames + 1) * count // num_frames
    widths = np.maximum(edges[1:] - edges[:-1], 1)  # an empty segment of a short video shows the frame at its edge
    within = torch.rand(num_frames, generator=generator, dtype=torch.float64).numpy()
    return np.minimum(edges[:-1] + (within * widths).astype(np.int64), count - 1)


def uniform_views(count: int, num_frames: int, segments: int) -> np.ndarray:
    """Take, for view v of V, the frame v / V into each segment; a single view takes the middle of each.

    These are VideoMAE's views at V = 1 and 2. VideoMAE shows frame 0 sixteen times where the video has no more than T
    frames; here such a video is spread over the T frames.

    Returns:
        `(segments, num_frames)` int64 indices into a video of `count` frames, 1 or more.
    """
    segment = np.arange(num_frames)
    if segments == 1:
        return ((2 * segment + 1) * count // (2 * num_frames))[None]
    view = np.arange(segments)[:, None]
    return (segment * segments + view) * count // (num_frames * segments)
