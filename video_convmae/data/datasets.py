"""Clips: record + sampling + decoding + crop + mask -> a sample. Views: a record's test views.

A training sample is a function of (seed, epoch, record index, repeat) and of nothing else: not of the worker, the rank
or the number of either. An epoch and an index are therefore what a data set of clips is asked for.

The index that its random numbers are drawn from is the record's line in the list file (`Records.lines`): whether other
rows are good, bad or commented out with '#', a record gives the same samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .decoding import DecodeError
from .decoding.process import ReaderProcess
from .ragged import RaggedCrops, join
from .records import Record, Records
from .sampling import Sampling
from .transforms import Augmentation, ClipTransform, cut, view_crops


class SampleKey(NamedTuple):
    """What a data set is asked for: a record in an epoch."""

    epoch: int
    index: int


class BadRecord(NamedTuple):
    """A record that could not be read."""

    index: int
    path: str
    error: str


class Sample(NamedTuple):
    """R clips, or views, of one record.

    clips: `(R, C, T, H, W)` uint8, or R windows for the device to resize. visible: `(R, t, h, w)` bool, None without
    masks. label: -1 where the list has none.
    index: the record that is shown. faults: records that could not be read.
    """

    clips: Tensor | RaggedCrops
    visible: Tensor | None
    label: int
    index: int
    faults: tuple[BadRecord, ...]


def sample_generator(seed: int, *key: int) -> torch.Generator:
    """A generator for one purpose: its numbers are a function of the seed and the key, and of no other draw."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


# What a key's last number says, so that no two purposes share their numbers.
CLIP, REPLACEMENT, ORDER, STEP = range(4)


class ClipDataset(Dataset):
    """Training clips, with masks where a task hides tokens.

    Args:
        records: the list.
        sampling: which frames.
        augmentation: crop, flip and what else changes a clip.
        size: (height, width) of a clip.
        draw_mask: generator -> `visible (t, h, w)`; drawn here, in the worker, with the clip's own generator. None:
            nothing is hidden.
        repeats: clips of one decoded record (repeated augmentation), each with its own start, crop and mask.
        seed: of the run.
        decoder: reads frames in a process that can be ended.
        attempts: how many records are tried for one slot before giving up.
    """

    def __init__(
        self,
        records: Records,
        sampling: Sampling,
        augmentation: Augmentation,
        size: tuple[int, int],
        draw_mask: Callable[[torch.Generator], Tensor] | None,
        decoder: ReaderProcess,
        repeats: int = 1,
        seed: int = 0,
        attempts: int = 10,
    ) -> None:
        self.records = records
        self.sampling = sampling
        self.augmentation = augmentation
        self.size = size
        self.draw_mask = draw_mask
        self.decoder = decoder
        self.repeats = repeats
        self.seed = seed
        self.attempts = attempts

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draw: SampleKey) -> Sample:
        """The record's clips; where it cannot be read, those of another, drawn from (seed, epoch, line, attempt).

        Raises:
            DecodeError: `attempts` records in a row could not be read.
        """
        epoch, asked = draw
        line = int(self.records.lines[asked])
        faults: list[BadRecord] = []
        index = asked
        for attempt in range(1, self.attempts + 1):
            try:
                return self._sample(epoch, line, index, attempt, tuple(faults))
            except DecodeError as error:
                faults.append(BadRecord(index, self.records[index].path, str(error)))
            generator = sample_generator(self.seed, epoch, line, attempt, REPLACEMENT)
            index = int(torch.randint(len(self.records), (), generator=generator))
        raise DecodeError(
            f"{len(faults)} records in a row could not be read, from record {asked} on; the first: {faults[0].error}"
        )

    def _sample(self, epoch: int, line: int, index: int, attempt: int, faults: tuple[BadRecord, ...]) -> Sample:
        record = self.records[index]
        generators = [sample_generator(self.seed, epoch, line, repeat, attempt, CLIP) for repeat in range(self.repeats)]
        with self.decoder.open(record) as reader:
            indices = [self.sampling.clip(len(reader), generator) for generator in generators]
            wanted = np.unique(np.concatenate(indices))  # each frame is decoded once, whatever the repeats ask for
            frames = reader.read(wanted)
        clips, masks = [], []
        for generator, of_clip in zip(generators, indices):
            crop = self.augmentation.draw(*frames.shape[1:3], generator)
            clips.append(self._clip(frames, crop, np.searchsorted(wanted, of_clip)))
            if self.draw_mask is not None:
                masks.append(self.draw_mask(generator))
        visible = torch.stack(masks) if masks else None
        joined = join(clips) if self.augmentation.on_device else torch.stack(clips)
        return Sample(joined, visible, _label_of(record), index, faults)

    def _clip(self, frames: np.ndarray, crop: ClipTransform, places: np.ndarray) -> Tensor | RaggedCrops:
        if self.augmentation.on_device:
            return cut(frames, crop, self.size, self.augmentation.interpolation, places)
        return self.augmentation.apply(frames, crop, self.size, places)


@dataclass(frozen=True)
class ViewConfig:
    """Which parts of a record are looked at in a test, each in time and space."""

    segments: int = 1
    """Clips over the length of a video."""
    crops: int = 1
    """Windows along the longer side of a frame."""
    crop_pct: float = 1.0
    """Side of a window over the largest one's; 0.875 is what resizing to 256 and cropping 224 shows."""

    def __post_init__(self) -> None:
        if self.segments < 1 or self.crops < 1:
            raise ValueError(f"segments is {self.segments} and crops {self.crops}; expected 1 or more")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}; expected more than 0 and up to 1")

    @property
    def count(self) -> int:
        """Views of one record."""
        return self.segments * self.crops


class TestViewDataset(Dataset):
    """The test views of each record, from one decode. Nothing is random, and no record takes another's place.

    Args:
        records: the list.
        sampling: which frames.
        views: how many views, and where.
        augmentation: its resizing alone is used.
        size: (height, width) of a clip.
        decoder: reads frames in a process that can be ended.
    """

    def __init__(
        self,
        records: Records,
        sampling: Sampling,
        views: ViewConfig,
        augmentation: Augmentation,
        size: tuple[int, int],
        decoder: ReaderProcess,
    ) -> None:
        self.records = records
        self.sampling = sampling
        self.views = views
        self.augmentation = augmentation
        self.size = size
        self.decoder = decoder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """The record's views, segment by segment; zeros and a fault where it cannot be read."""
        record = self.records[index]
        try:
            clips, faults = self._clips(record), ()
        except DecodeError as error:
            shape = (self.views.count, 3, self.sampling.num_frames, *self.size)
            clips, faults = torch.zeros(shape, dtype=torch.uint8), (BadRecord(index, record.path, str(error)),)
        return Sample(clips, None, _label_of(record), index, faults)

    def _clips(self, record: Record) -> Tensor:
        with self.decoder.open(record) as reader:
            segments = self.sampling.views(len(reader), self.views.segments)
            wanted = np.unique(segments)  # segments overlap in short videos: each frame is decoded once
            frames = reader.read(wanted)
        crops = view_crops(*frames.shape[1:3], self.size, self.views.crops, self.views.crop_pct)
        return torch.stack(
            [
                self.augmentation.apply(frames, crop, self.size, np.searchsorted(wanted, segment))
                for segment in segments
                for crop in crops
            ]
        )


def _label_of(record: Record) -> int:
    return -1 if record.label is None else record.label
