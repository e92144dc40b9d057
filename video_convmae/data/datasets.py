"""Datasets: a record -> training clips with masks, or its test views.

A training sample is a function of (seed, epoch, record index, repeat) and of nothing else: not of the worker, the rank
or the number of either. The key of a `ClipDataset` is therefore an epoch and an index.

The index in that promise is the record's line in the list file (`Records.lines`): a record gives the same samples
whether other lines are good, bad or commented out with '#'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .decoding import DecodeError
from .decoding.memory import MemoryReader
from .decoding.process import ReaderProcess
from .options import ViewConfig
from .ragged import RaggedCrops, concatenate_crops
from .records import Record, Records
from .sampling import Sampling
from .transforms import Augmentation, view_crops

R = TypeVar("R", covariant=True)
T = TypeVar("T")

# The last number of a generator's key, so that no two purposes share their numbers.
CLIP, REPLACEMENT, ORDER, STEP, PROPOSALS, SHARES, WALK = range(7)


class SampleKey(NamedTuple):
    """Dataset key: (epoch, record index), and how many samples of the record came before in this epoch.

    Of a mixture, an epoch of the record's own list (mixture.py).
    """

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index(), here and below, which nobody calls
    draw: int = 0


class BadRecord(NamedTuple):
    """A record that could not be read."""

    index: int  # type: ignore[assignment]
    path: str
    error: str


class Sample(NamedTuple):
    """R clips, or test views, of one record.

    Attributes:
        clips: `(R, C, T, H, W)` uint8, or R crops for the device to resize.
        visible: `(R, t, h, w)` bool, or `(R, masks, t, h, w)`; True = the encoder sees the token; None without masks.
        predicted: likewise, True = the decoder predicts the token; None: all hidden tokens, or no masks.
        label: -1 where the list has none; of records with several classes `(classes,)` float32.
        index: the record shown.
        bad_records: records that could not be read.
    """

    clips: Tensor | RaggedCrops
    visible: Tensor | None
    predicted: Tensor | None
    label: int | Tensor
    index: int  # type: ignore[assignment]
    bad_records: tuple[BadRecord, ...]


def sample_generator(seed: int, *key: int) -> torch.Generator:
    """Return a generator for one purpose: its numbers are a function of the seed and the key alone."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


class PlacedRecords(Protocol[R]):
    """Records with their lines in the list file: `Records`, and those of other kinds of data."""

    lines: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> R: ...


def read_or_replace(
    records: PlacedRecords[R],
    key: SampleKey,
    seed: int,
    attempts: int,
    read: Callable[[R, Callable[[int], torch.Generator]], T],
    among: Callable[[int], range] | None = None,
) -> tuple[T, int, tuple[BadRecord, ...]]:
    """Read a record for training, or a replacement drawn from (seed, epoch, line, attempt) if it is bad.

    Args:
        records: each has a `path`.
        key: epoch and index of the record.
        seed: of the run.
        attempts: records tried before giving up.
        read: record and a function from a repeat's number to its generator -> what is read.
        among: index -> indices of the records that may replace it; None: all.

    Returns:
        What was read, the index of the record that it is from, and the records that could not be read.

    Raises:
        DecodeError: `attempts` records in a row could not be read.
    """
    epoch, index = key[:2]
    line = int(records.lines[index])
    bad_records: list[BadRecord] = []
    for attempt in range(1, attempts + 1):

        def generator(repeat: int, attempt: int = attempt) -> torch.Generator:
            return sample_generator(seed, epoch, line, repeat, attempt, CLIP)

        record = records[index]
        try:
            return read(record, generator), index, tuple(bad_records)
        except DecodeError as error:
            bad_records.append(BadRecord(index, record.path, str(error)))  # type: ignore[attr-defined]
            numbers = sample_generator(seed, epoch, line, attempt, REPLACEMENT)
            others = range(len(records)) if among is None else among(index)
            index = others[int(torch.randint(len(others), (), generator=numbers))]
    raise DecodeError(
        f"{len(bad_records)} records in a row could not be read, from record {key[1]} on; the first: "
        f"{bad_records[0].error}"
    )


class KnowsTimes(Protocol):
    """What sampling by time asks of a record that is open, whatever reads it."""

    @property
    def times(self) -> np.ndarray | None: ...


def times_for(sampling: Sampling, opened: KnowsTimes, path: str) -> np.ndarray | None:
    """Return the times of an open record's frames, if the sampling goes by them.

    Raises:
        DecodeError: it does, and the record has none.
    """
    if sampling.fps is None:
        return None
    times = opened.times
    if times is None:
        raise DecodeError(
            f"{path}: nothing says when its frames are shown, and data.fps is {sampling.fps:g}; expected a video with "
            "a frame rate, or data.stride in place of data.fps"
        )
    return times


def read_picture(path: str, reader: ReaderProcess | MemoryReader) -> np.ndarray:
    """Return a picture, uint8 `(H, W, 3)`. Raises DecodeError: it cannot be read."""
    with reader.open(Record(path, format="image")) as opened:
        return opened.read([0])[0]


@dataclass(eq=False)
class ClipDataset(Dataset[Sample]):
    """Training clips, with masks where a task hides tokens.

    Args:
        records: the list.
        sampling: choice of frames.
        augmentation: transforms of a clip.
        size: (height, width) of a clip.
        draw_mask: generator -> `visible` and `predicted`, `(t, h, w)` or `(masks, t, h, w)` each; None for all hidden
            tokens. Called here, in the worker, with the clip's own generator. None: nothing is hidden.
        reader: decodes in a process that can be killed, or keeps what it has decoded.
        repeats: clips of one decoded record (repeated augmentation), each with its own start, crop and mask.
        seed: of the run.
        attempts: records tried for one sample before giving up.
        num_classes: of records that may have several classes; None: a record has one, or none.
        samplings: choice of frames of each list of a mixture, in place of `sampling`.
    """

    records: Records
    sampling: Sampling
    augmentation: Augmentation
    size: tuple[int, int]
    draw_mask: Callable[[torch.Generator], tuple[Tensor, Tensor | None]] | None
    reader: ReaderProcess | MemoryReader
    repeats: int = 1
    seed: int = 0
    attempts: int = 10
    num_classes: int | None = None
    samplings: tuple[Sampling, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Return a record's clips, or those of a replacement drawn from (seed, epoch, line, attempt) if it is bad.

        Raises:
            DecodeError: `attempts` records in a row could not be read.
        """

        def read(record: Record, generator: Callable[[int], torch.Generator]) -> tuple[Any, ...]:
            first = key.draw * self.repeats  # a record that is shown again shows other clips
            return record, *self._read(record, [generator(first + repeat) for repeat in range(self.repeats)])

        sample, index, bad_records = read_or_replace(
            self.records, key, self.seed, self.attempts, read, self.records.same_list
        )
        record, clips, visible, predicted = sample
        label = -1 if record.label is None else record.label
        if self.num_classes is not None:
            label = torch.zeros(self.num_classes)
            label[list(record.labels)] = 1
        return Sample(clips, visible, predicted, label, index, bad_records)

    def _read(
        self, record: Record, generators: list[torch.Generator]
    ) -> tuple[Tensor | RaggedCrops, Tensor | None, Tensor | None]:
        """Decode a record once; draw a clip and a mask with each generator. Returns clips, visible, predicted."""
        sampling = self.samplings[record.source] if self.samplings else self.sampling
        with self.reader.open(record) as reader:
            times = times_for(sampling, reader, record.path)
            indices = np.stack([sampling.clip(len(reader), generator, times) for generator in generators])
            wanted, places = np.unique(indices, return_inverse=True)  # repeats that overlap share their frames
            frames = reader.read(wanted)
        # Each generator gives the numbers of one clip in this order: start, transform, mask.
        height, width = frames.shape[1:3]
        transforms = [self.augmentation.draw(height, width, generator) for generator in generators]
        masks = [self.draw_mask(generator) for generator in generators] if self.draw_mask is not None else []
        parts = zip(transforms, places.reshape(indices.shape))
        clips: Tensor | RaggedCrops
        if self.augmentation.config.on_device:
            crops = [self.augmentation.crop_only(frames, transform, self.size, where) for transform, where in parts]
            clips = concatenate_crops(crops)
        else:
            clips = torch.stack(
                [self.augmentation.apply(frames, transform, self.size, where) for transform, where in parts]
            )
        visible = torch.stack([clip_visible for clip_visible, _ in masks]) if masks else None
        predicted = [clip_predicted for _, clip_predicted in masks if clip_predicted is not None]
        return clips, visible, torch.stack(predicted) if predicted else None


@dataclass(eq=False)
class TestViewDataset(Dataset[Sample]):
    """Test views of each record, from one decode. Nothing is random, and a bad record is not replaced.

    Args:
        records: the list.
        sampling: choice of frames.
        views: number and places of the views.
        augmentation: only its interpolation is used.
        size: (height, width) of a clip.
        reader: decodes in a process that can be killed.
        samplings: choice of frames of each list of a mixture, in place of `sampling`.
    """

    records: Records
    sampling: Sampling
    views: ViewConfig
    augmentation: Augmentation
    size: tuple[int, int]
    reader: ReaderProcess
    samplings: tuple[Sampling, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Return a record's views, segment by segment; zeros and a bad record if it cannot be read."""
        record = self.records[index]
        label = -1 if record.label is None else record.label
        sampling = self.samplings[record.source] if self.samplings else self.sampling
        try:
            with self.reader.open(record) as reader:
                times = times_for(sampling, reader, record.path)
                segments = sampling.views(len(reader), self.views.segments, times)
                wanted, places = np.unique(segments, return_inverse=True)  # segments of short videos overlap
                frames = reader.read(wanted)
        except DecodeError as error:
            zeros = torch.zeros(self.views.count, 3, self.sampling.num_frames, *self.size, dtype=torch.uint8)
            return Sample(zeros, None, None, label, index, (BadRecord(index, record.path, str(error)),))
        height, width = frames.shape[1:3]
        crops = view_crops(height, width, self.size, self.views.crops, self.views.crop_pct)
        clips = [
            self.augmentation.apply(frames, crop, self.size, segment_places)
            for segment_places in places.reshape(segments.shape)
            for crop in crops
        ]
        return Sample(torch.stack(clips), None, None, label, index, ())
