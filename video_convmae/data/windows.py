"""Windows over whole videos of any length: one pass over each file, a few frames in memory.

    window 4, stride 2, hop 3 in a video of 12 frames

    frames    0 1 2 3 4 5 6 7 8 9 10 11
    window 0  x   x   x   x
    window 1        x   x   x   x
    window 2              x   x    x     the last does not fit: frame 11 is repeated

A frame is decoded, cropped and resized once, whatever number of windows show it, and dropped behind the last of them.
The windows of a video go through the model in batches of fixed numbers, so no value depends on the number of processes
or on where an interrupted run went on.

Letters: n windows of a batch; C T H W as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .datasets import TestViewDataset, times_for
from .decoding import DecodeError
from .decoding.process import RemoteReader
from .records import Record
from .sampling import Sampling, duration
from .transforms import ClipTransform, view_crops

_STARTS = 4096  # windows whose frames are listed at a time


class Span(NamedTuple):
    """Part of a video that a window shows: from a frame up to, but without, another.

    Seconds are those at which the two are shown (behind the last frame: at which the video ends), NaN where nothing
    says them.
    """

    start_frame: int
    end_frame: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class WindowPlan:
    """Which windows there are: frames of each, and frames of the file between two starts.

    sampling: frames of a window.
    hop: frames of the file between the starts of two windows.
    """

    sampling: Sampling
    hop: int

    @property
    def span(self) -> int | None:
        """Frames of the file that a window covers; None: its length is in seconds, other frames in each file."""
        return None if self.sampling.fps is not None else (self.sampling.num_frames - 1) * self.sampling.stride + 1


class WindowBatch(NamedTuple):
    """Windows of one video that go through the model together.

    Attributes:
        record: index of the video.
        first: number of the first window.
        clips: `(n * crops, C, T, H, W)` uint8, the crops of a window next to each other.
        spans: of each window.
        total: windows of the video; 0 where it could not be opened.
        frames: frames of the video.
        seconds: for which it is shown; NaN where nothing says them.
        error: why the video ends with this batch, whose windows were read before; None: it was read so far.
    """

    record: int
    first: int
    clips: Tensor
    spans: list[Span]
    total: int
    frames: int
    seconds: float
    error: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether no batch of the video follows."""
        return self.error is not None or self.first + len(self.spans) == self.total


@dataclass(eq=False)
class WindowDataset(IterableDataset[WindowBatch]):
    """The windows of videos; a loading process takes whole videos.

    Args:
        views: the list, its frame sampling and its crops; one segment.
        hop: frames of the file between the starts of two windows.
        batch: windows that go through the model together.
        videos: records to read, and of each the first window that is wanted, a multiple of `batch`.
    """

    views: TestViewDataset
    hop: int
    batch: int
    videos: Sequence[tuple[int, int]]

    def __iter__(self) -> Iterator[WindowBatch]:
        """Yield batches video by video; one without windows for a video that cannot be opened."""
        worker = get_worker_info()
        mine = self.videos if worker is None else self.videos[worker.id :: worker.num_workers]
        for index, first in mine:
            yield from self._read(index, first)

    def _read(self, index: int, first: int) -> Iterator[WindowBatch]:
        record = self.views.records[index]
        nothing = torch.zeros(0, 3, self.views.sampling.num_frames, *self.views.size, dtype=torch.uint8)
        try:
            with self.views.reader.open(record) as opened:
                video = _OpenVideo(self.views, record, opened, self.hop)
                starts = video.starts[first:]
                frames = video.frames(starts)
                for place in range(0, max(1, len(starts)), self.batch):  # without windows: all were read before
                    clips, spans, error = [], [], None
                    for start in starts[place : place + self.batch]:
                        try:
                            clips.append(frames.show(video.indices(start)))
                        except DecodeError as problem:
                            error = str(problem)
                            break
                        spans.append(video.span(start))
                    shown = torch.cat(clips) if clips else nothing
                    total, count, seconds = len(video.starts), len(opened), video.seconds
                    yield WindowBatch(index, first + place, shown, spans, total, count, seconds, error)
                    if error is not None:
                        return
        except DecodeError as error:
            yield WindowBatch(index, first, nothing, [], 0, 0, math.nan, str(error))


class _OpenVideo:
    """An open video, and the places of its windows."""

    def __init__(self, views: TestViewDataset, record: Record, opened: RemoteReader, hop: int) -> None:
        self._views, self._opened, self._count = views, opened, len(opened)
        times_for(views.sampling, opened, record.path)  # raises where the sampling needs them
        self._times = opened.times
        self.starts = views.sampling.window_starts(self._count, hop, self._times)
        self.seconds = math.nan if self._times is None else duration(self._times, opened.rate)

    def indices(self, start: int) -> np.ndarray:
        """Return the frames of the window that begins there, `(T,)`."""
        return self._views.sampling.windows(np.array([start]), self._count, self._times)[0]

    def span(self, start: int) -> Span:
        """Return the part of the video that the window shows."""
        end = int(self.indices(start)[-1]) + 1
        if self._times is None:
            return Span(int(start), end, math.nan, math.nan)
        end_seconds = self.seconds if end == self._count else float(self._times[end])
        return Span(int(start), end, float(self._times[start]), end_seconds)

    def frames(self, starts: np.ndarray) -> _Frames:
        """Return the frames of these windows, read in one pass."""
        is_shown = np.zeros(self._count, bool)
        for place in range(0, len(starts), _STARTS):
            some = starts[place : place + _STARTS]
            is_shown[self._views.sampling.windows(some, self._count, self._times)] = True
        return _Frames(self._views, self._opened, np.flatnonzero(is_shown))


class _Frames:
    """Frames of a video as its windows show them, taken from one pass; those behind are dropped."""

    def __init__(self, views: TestViewDataset, opened: RemoteReader, indices: np.ndarray) -> None:
        self._views = views
        self._stream = zip(indices.tolist(), opened.stream(indices))
        self._crops: list[ClipTransform] | None = None
        self._kept: dict[int, Tensor] = {}  # index -> (crops, C, 1, H, W), in ascending order

    def show(self, indices: np.ndarray) -> Tensor:
        """Return the window of these frames, which begins no earlier than the last one: `(crops, C, T, H, W)` uint8.

        Raises:
            DecodeError: a frame cannot be read.
        """
        while self._kept and next(iter(self._kept)) < indices[0]:
            del self._kept[next(iter(self._kept))]
        while int(indices[-1]) not in self._kept:
            index, image = next(self._stream)
            if index >= indices[0]:
                self._kept[index] = self._cropped(image)
        return torch.cat([self._kept[index] for index in indices.tolist()], dim=2)

    def _cropped(self, image: np.ndarray) -> Tensor:
        views = self._views
        if self._crops is None:
            height, width = image.shape[:2]
            self._crops = view_crops(height, width, views.size, views.views.crops, views.views.crop_pct)
        return torch.stack([views.augmentation.apply(image[None], crop, views.size) for crop in self._crops])
