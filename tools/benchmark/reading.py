"""Ways to read the same clips: the loader of this package, its stages one by one, the codec alone, VideoMAE's loader.

Each side is called with a turn, reads the sample of that turn and returns its seconds.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from video_convmae import masking
from video_convmae.data.datasets import CLIP, ClipDataset, SampleKey, TestViewDataset, sample_generator
from video_convmae.data.decoding import DecodeError, FrameReader, open_frames, pyav_reader
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.loader import collate
from video_convmae.data.options import ReaderName, ViewConfig
from video_convmae.data.records import Record, Records
from video_convmae.data.sampling import Sampling
from video_convmae.data.transforms import Augmentation, view_crops

MASK_RATIO = 0.9
STAGES = ("decode", "convert", "augment", "collate")
VIDEOMAE_STRIDE = 4  # its test reads every fourth frame of the whole video, again for each view


class ReadSide(Protocol):
    """One way to read."""

    def __call__(self, turn: int) -> float:
        """Read the sample of a turn; returns the seconds it took."""


@dataclass(frozen=True)
class ReadCase:
    """One list and the way its samples are made."""

    name: str
    records: Records
    sampling: Sampling
    size: int
    repeats: int
    views: ViewConfig | None  # None: training clips
    augmentation: Augmentation
    reader: ReaderName
    clock: str  # wall, or cpu: processor seconds of this process and the reading one
    ratio: float = MASK_RATIO
    masks: int = 1  # of a clip

    @property
    def clips(self) -> int:
        """Clips of one sample."""
        return self.repeats if self.views is None else self.views.count

    def now(self, reader: ReaderProcess | None = None) -> float:
        """Return the clock's time in seconds; on the cpu clock the reading process is included."""
        if self.clock == "wall":
            return time.perf_counter()
        return time.process_time() + (0.0 if reader is None else _cpu_seconds(reader))

    def dataset(self, reader: Any, seed: int = 0) -> ClipDataset | TestViewDataset:
        """Build the data set; `reader` is a `ReaderProcess`, or anything with its `open`."""
        size = (self.size, self.size)
        if self.views is not None:
            return TestViewDataset(self.records, self.sampling, self.views, self.augmentation, size, reader)
        grid = (self.sampling.num_frames // 2, self.size // 16, self.size // 16)

        def draw_mask(generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
            return masking.draw("tube", grid, self.ratio, None, generator, self.masks)

        return ClipDataset(self.records, self.sampling, self.augmentation, size, draw_mask, reader, self.repeats, seed)

    def key(self, turn: int) -> Any:
        """Return the data set's key for a turn: every record once before any is repeated."""
        epoch, index = divmod(turn, len(self.records))
        return index if self.views is not None else SampleKey(epoch, index)

    def indices(self, turn: int, count: int) -> np.ndarray:
        """Return the frames of each clip or segment of a turn, `(R, T)`, in a video of `count` frames."""
        if self.views is not None:
            return self.sampling.views(count, self.views.segments)
        epoch, index = divmod(turn, len(self.records))
        line = int(self.records.lines[index])
        generators = [sample_generator(0, epoch, line, repeat, 1, CLIP) for repeat in range(self.repeats)]
        return np.stack([self.sampling.clip(count, generator) for generator in generators])


def _cpu_seconds(reader: ReaderProcess) -> float:
    """Return the processor seconds of a reading process: on Linux a process number names its clock
    (clock_getcpuclockid)."""
    child = reader._child
    return 0.0 if child is None else time.clock_gettime((~child.pid << 3) | 2)


class LoaderSide:
    """Training data on one core: a sample and its batch of one, with the reader in a process of its own."""

    def __init__(self, case: ReadCase) -> None:
        self.case = case
        self.reader = ReaderProcess(case.reader)
        self.dataset = case.dataset(self.reader)

    def __call__(self, turn: int) -> float:
        start = self.case.now(self.reader)
        sample = self.dataset[self.case.key(turn)]
        collate([sample])
        seconds = self.case.now(self.reader) - start
        if sample.bad_records:
            raise DecodeError(f"{sample.bad_records[0].error}; measure a list that check-videos found clean")
        return seconds


class CodecFloor:
    """The codec alone, as the docstring of loader.py defines it. Each file is scanned before the clock starts."""

    def __init__(self, case: ReadCase) -> None:
        self.case = case

    def __call__(self, turn: int) -> float:
        record = self.case.records[turn % len(self.case.records)]
        with open_frames(record, "pyav") as opened:
            reader: Any = opened  # the scan and the frames of a group of pictures are PyAV's alone
            if record.format != "video" or not reader.scan.timed:
                raise ValueError(f"{record.path}: the floor needs videos whose frames carry presentation times")
            wanted = np.unique(self.case.indices(turn, len(reader)))
            times = reader.scan.times[wanted]
            groups = np.searchsorted(reader.scan.keyframes[:, 0], times, side="right") - 1
            lasts = [(group, times[groups == group][-1]) for group in np.unique(groups)]
            start = self.case.now()
            for group, last in lasts:
                for frame in reader._frames_from(group):
                    if frame.pts >= last:
                        break
            return self.case.now() - start


class VideoMAELoader:
    """VideoMAE's loader on the same frames, from the published facts, in one process.

    Pretraining: a decord reader with one thread for each clip, frames as PIL pictures, multi-scale crop and bilinear
    resize frame by frame, stacked, to float, normalised; a mask. Testing: every fourth frame of the whole video is
    decoded again for each view. Only the frames of the view are resized here; the original resizes all.
    """

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)

    def __init__(self, case: ReadCase) -> None:
        import decord

        self.case, self.decord = case, decord
        self.augmentation = Augmentation()

    def __call__(self, turn: int) -> float:
        path = self.case.records[turn % len(self.case.records)].path
        with open_frames(Record(path), "pyav") as reader:
            clips = self.case.indices(turn, len(reader))
        start = self.case.now()
        for indices in clips:
            if self.case.views is None:
                self._read_clip(path, indices)
                continue
            for place in range(self.case.views.crops):
                self._read_view(path, indices, place, self.case.views.crops)
        return self.case.now() - start

    def _open(self, path: str) -> Any:
        return self.decord.VideoReader(path, ctx=self.decord.cpu(0), num_threads=1)

    def _read_clip(self, path: str, indices: np.ndarray) -> Tensor:
        frames = self._open(path).get_batch(indices.tolist()).asnumpy()
        pictures = [Image.fromarray(frame).convert("RGB") for frame in frames]
        crop = self.augmentation.draw(*frames.shape[1:3])
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        size = (self.case.size, self.case.size)
        clip = self._normalize([picture.crop(box).resize(size, Image.Resampling.BILINEAR) for picture in pictures])
        np.random.shuffle(np.hstack([np.zeros(20), np.ones(176)]))  # its mask: 176 of 196 hidden
        return clip

    def _read_view(self, path: str, indices: np.ndarray, place: int, crops: int) -> Tensor:
        video = self._open(path)
        every = list(range(0, len(video), VIDEOMAE_STRIDE))
        frames = video.get_batch(every).asnumpy()[np.minimum(indices // VIDEOMAE_STRIDE, len(every) - 1)]
        height, width = frames.shape[1:3]
        crop = view_crops(height, width, (self.case.size, self.case.size), crops)[place]
        scale = self.case.size / min(height, width)
        size = (round(width * scale), round(height * scale))
        left, top = round(crop.left * scale), round(crop.top * scale)
        box = (left, top, left + self.case.size, top + self.case.size)
        return self._normalize(
            [Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR).crop(box) for frame in frames]
        )

    def _normalize(self, pictures: Sequence[Image.Image]) -> Tensor:
        stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        return (stacked.permute(3, 0, 1, 2).contiguous().float() / 255 - self.mean) / self.std


class StageTimer:
    """The loader's samples within this process, with a clock at each stage; takes the place of a `ReaderProcess`."""

    def __init__(self, case: ReadCase) -> None:
        self.case = case
        self.seconds: dict[str, float] = defaultdict(float)  # of each stage, over all turns

    def __call__(self, turn: int) -> float:
        before = dict(self.seconds)
        dataset = self.case.dataset(self)
        with self._timed_conversion(), self._timed("augment"):
            sample = dataset[self.case.key(turn)]
        with self._timed("collate"):
            collate([sample])
        spent = {name: self.seconds[name] - before.get(name, 0.0) for name in STAGES}
        # The clocks are nested: conversion is a part of reading, reading a part of making the sample.
        self.seconds["decode"] -= spent["convert"]
        self.seconds["augment"] -= spent["decode"]
        return spent["augment"] + spent["collate"]

    def open(self, record: Record) -> FrameReader:
        """Open a record; opening and reading count as "decode"."""
        with self._timed("decode"):
            reader = open_frames(record, self.case.reader)
        read = reader.read

        def timed_read(indices: Sequence[int] | np.ndarray) -> np.ndarray:
            with self._timed("decode"):
                return read(indices)

        reader.read = timed_read  # type: ignore[method-assign]  # a subclass would have to be one of every reader
        return reader

    def shares(self, seconds: float, turns: int) -> dict[str, float | None]:
        """Return each stage's share of samples that take `seconds` in the loader.

        "transfer" is the rest: the way between the reading process and this one. "convert" is None where the reader is
        not PyAV: conversion is then a part of "decode".
        """
        shares = {name: self.seconds[name] / turns / seconds for name in STAGES}
        return {**shares, "convert": shares["convert"] or None, "transfer": max(0.0, 1 - sum(shares.values()))}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = self.case.now()
        yield
        self.seconds[name] += self.case.now() - start

    @contextmanager
    def _timed_conversion(self) -> Iterator[None]:
        """Time the conversion to RGB within PyAV's reader."""
        make_converter = pyav_reader.rgb_converter

        def timed_converter() -> Callable[..., np.ndarray]:
            convert = make_converter()

            def timed_convert(*arguments: Any) -> np.ndarray:
                with self._timed("convert"):
                    return convert(*arguments)

            return timed_convert

        pyav_reader.rgb_converter = timed_converter
        try:
            yield
        finally:
            pyav_reader.rgb_converter = make_converter


RIVALS: dict[str, Callable[[ReadCase], ReadSide]] = {"floor": CodecFloor, "videomae": VideoMAELoader}
