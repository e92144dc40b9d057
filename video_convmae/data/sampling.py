"""Frame sampling: the frame indices of a training clip or of a record's test views. Nothing is opened here.

Dense sampling (Kinetics-400) takes T frames, `stride` apart, from one place of the video. A clip's span is not its
frame count: 4 frames at strides 1, 2, 3 span 4, 7, 10 frames.

    frames   0 1 2 3 4 5 6 7 8 9
    stride 2 x . x . x . x           the first of 4 possible starts, 0 to 3

By time (`fps`) they lie 1 / fps seconds apart instead, whatever the rate of the file: each is the frame that is shown
nearest to its time, so that the same scene at 24 and at 60 frames a second gives the same moments.

    shown at 0.0  0.1  0.2  0.3  0.4  0.5  0.6     10 frames a second
    fps 4    x              x              x       the times asked for are 0, 0.25, 0.5: the nearest frames 0, 2, 5

Uniform sampling (Something-Something V2, finetuning and testing) cuts the whole video into T segments and takes one
frame of each. A video with fewer than T frames shows some of them more than once, in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from .options import UNIFORM_HAS_NO_RATE, SamplingKind

_ROUNDING = 1e-6  # seconds; the times of a file are rounded, and two frames equally near must not depend on that


@dataclass(frozen=True)
class Sampling:
    """A way to sample frames, for training clips and test views.

    Args:
        kind: dense or uniform.
        num_frames: T.
        stride: frames from one frame of a dense clip to the next; unused by uniform sampling.
        fps: frames a second of a dense clip, which replace `stride`; None: `stride` counts.

    Raises:
        ValueError: an unknown kind, a number out of bounds, or uniform sampling with `fps`.
    """

    kind: SamplingKind = "dense"
    num_frames: int = 16
    stride: int = 4
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(SamplingKind):
            raise ValueError(f"sampling is {self.kind!r}; expected 'dense' or 'uniform'")
        if self.num_frames < 1 or self.stride < 1:
            raise ValueError(f"num_frames is {self.num_frames} and stride {self.stride}; expected 1 or more")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps is {self.fps}; expected a number above 0")
        if self.fps is not None and self.kind == "uniform":
            raise ValueError(f"fps is {self.fps} and sampling uniform, {UNIFORM_HAS_NO_RATE}")

    def clip(self, count: int, generator: torch.Generator | None = None, times: np.ndarray | None = None) -> np.ndarray:
        """Draw a training clip: `(T,)` int64 indices into a video of `count` frames.

        Args:
            count: frames of the video.
            generator: source of the numbers; one is drawn for the start.
            times: `(count,)` seconds at which each frame is shown, ascending from 0; needed with `fps` alone.

        Raises:
            ValueError: the video has no frames, or `fps` is given and no times are.
        """
        if count < 1:
            raise ValueError(f"the video has {count} frames; expected at least one")
        if self.fps is not None:
            return timed_clip(_known(times), self.num_frames, self.fps, generator)
        if self.kind == "uniform":
            return uniform_clip(count, self.num_frames, generator)
        return dense_clip(count, self.num_frames, self.stride, generator)

    def views(self, count: int, segments: int, times: np.ndarray | None = None) -> np.ndarray:
        """Return test views: `(segments, T)` int64 indices into a video of `count` frames, 1 or more.

        `times` are those of `clip`.
        """
        if self.fps is not None:
            return timed_views(_known(times), self.num_frames, self.fps, segments)
        if self.kind == "uniform":
            return uniform_views(count, self.num_frames, segments)
        return dense_views(count, self.num_frames, self.stride, segments)

    def window_starts(self, count: int, hop: int, times: np.ndarray | None = None) -> np.ndarray:
        """Return the first frames of the windows over a whole video: every `hop`-th, to the first that reaches its end.

        4 frames at stride 2 span 7; a video of 12 frames with a hop of 3 has the starts 0, 3 and 6: the last window
        does not fit, and repeats frame 11.

        Args:
            count: frames of the video, 1 or more.
            hop: frames of the file between the starts of two windows.
            times: as for `clip`.

        Returns:
            `(W,)` int64.
        """
        starts = np.arange(0, count, hop)
        at_end = np.flatnonzero(self._from(starts, np.array([self.num_frames - 1]), count, times)[:, 0] == count - 1)
        return starts[: at_end[0] + 1] if len(at_end) else starts  # none where the hop is longer than a window

    def windows(self, starts: np.ndarray, count: int, times: np.ndarray | None = None) -> np.ndarray:
        """Return the frames of windows: `(n, T)` int64 indices; a window that does not fit repeats the last frame."""
        return self._from(starts, np.arange(self.num_frames), count, times)

    def _from(self, starts: np.ndarray, places: np.ndarray, count: int, times: np.ndarray | None) -> np.ndarray:
        """Return the `places`-th frames of dense clips that begin at `starts`: `(n, places)` indices."""
        if self.fps is not None:
            times = _known(times)
            return nearest_frames(times, times[starts][:, None] + places / self.fps)
        return np.minimum(starts[:, None] + self.stride * places, count - 1)


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


def timed_clip(times: np.ndarray, num_frames: int, fps: float, generator: torch.Generator | None = None) -> np.ndarray:
    """Draw a start among all times that fit: `(num_frames,)` int64 indices of the frames 1 / fps seconds apart.

    A clip takes num_frames / fps seconds: each of its frames stands for 1 / fps. So the starts are the same at any rate
    of the file. A shorter video starts at 0 and repeats its last frame.

    Args:
        times: `(N,)` seconds at which each frame is shown, ascending from 0.
        num_frames: T.
        fps: frames a second; above the file's own rate frames are repeated.
        generator: source of one number.
    """
    latest_start = max(0.0, duration(times) - num_frames / fps)
    start = latest_start * float(torch.rand((), generator=generator, dtype=torch.float64))
    return nearest_frames(times, start + np.arange(num_frames) / fps)


def timed_views(times: np.ndarray, num_frames: int, fps: float, segments: int) -> np.ndarray:
    """Spread the starts evenly from time 0 to the last possible one; a single view lies in the middle.

    Returns:
        `(segments, num_frames)` int64 indices of frames shown at `times`, as in `timed_clip`.
    """
    latest_start = max(0.0, duration(times) - num_frames / fps)
    starts = np.array([0.5]) if segments == 1 else np.linspace(0, 1, segments)
    return nearest_frames(times, latest_start * starts[:, None] + np.arange(num_frames) / fps)


def duration(times: np.ndarray, rate: float | None = None) -> float:
    """Return the seconds for which a video is shown; the last frame for as long as the others on average.

    A single frame is shown for 1 / `rate` seconds, and without a rate, as a picture has none, for 0.
    """
    if len(times) > 1:
        return float(times[-1]) * len(times) / (len(times) - 1)
    return 1 / rate if rate else 0.0


def nearest_frames(times: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the indices of the frames shown nearest to the times asked for; of two as near, the earlier.

    Args:
        times: `(N,)` seconds, ascending, 1 or more.
        asked: seconds, of any shape; those behind the last frame get it.
    """
    after = np.searchsorted(times, asked).clip(0, len(times) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(asked - times[before] <= times[after] - asked + _ROUNDING, before, after)


def _known(times: np.ndarray | None) -> np.ndarray:
    if times is None:
        raise ValueError("sampling by fps needs the times at which the frames are shown; got none")
    return times


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
