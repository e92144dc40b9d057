"""Batches: the records of a step, the processes that load them, the tensors that cross to the device.

A global batch is a slice of the epoch's order, whatever the number of ranks and of accumulated parts: for each part,
each rank takes its records of the slice. So 1, 2 and 4 processes see the same global batches, and a run resumed at a
step sees the records that it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from video_convmae.errors import UserError

from .datasets import ORDER, BadRecord, Sample, SampleKey, sample_generator
from .mixture import Mixture
from .ragged import RaggedCrops, concatenate_crops
from .workers import prepare_worker, supervise

T = TypeVar("T")


class AnyBatch(Protocol):
    """What the loop reads of a batch, whatever its task is: the records shown, and those that could not be read."""

    @property
    def records(self) -> Tensor: ...

    @property
    def bad_records(self) -> tuple[BadRecord, ...]: ...


class Batch(NamedTuple):
    """Input of a task on clips; B counts clips, the R clips of a record next to each other.

    Attributes:
        clips: `(B, C, T, H, W)` uint8, or B crops for the device to resize.
        visible: `(B, t, h, w)` bool, or `(B, masks, t, h, w)`; True = the encoder sees the token; None without masks.
        predicted: likewise, True = the decoder predicts the token; None: all hidden tokens, or no masks.
        labels: `(B,)` int64; of records with several classes `(B, classes)` float32, 1 for each class that one has.
        records: `(B,)` int64.
        bad_records: records that could not be read while this batch was made.
    """

    clips: Tensor | RaggedCrops
    visible: Tensor | None
    predicted: Tensor | None
    labels: Tensor
    records: Tensor
    bad_records: tuple[BadRecord, ...]


class PictureSample(Protocol):
    """A picture of a dense task: its target belongs to pixels (boxes and masks, or a label map)."""

    @property
    def image(self) -> Tensor: ...

    @property
    def target(self) -> Any: ...

    @property
    def transform(self) -> Any: ...

    @property
    def index(self) -> int: ...

    @property
    def bad_records(self) -> tuple[BadRecord, ...]: ...


class PictureBatch(NamedTuple):
    """Input of a dense task: B pictures, of which each may have a size of its own.

    Attributes:
        images: `(3, H, W)` uint8 each.
        targets: what the pictures show, as their data set gives it.
        transforms: from the file's picture to the image.
        records: `(B,)` int64.
        bad_records: records that could not be read while this batch was made.
    """

    images: list[Tensor]
    targets: list[Any]
    transforms: list[Any]
    records: Tensor
    bad_records: tuple[BadRecord, ...]


@dataclass(frozen=True)
class BatchPlan:
    """Distribution of a global batch: `per_device` records to each of `ranks`, `accumulate` times a step."""

    per_device: int
    ranks: int = 1
    rank: int = 0
    accumulate: int = 1

    @property
    def global_batch(self) -> int:
        """Records of one optimizer step, repeats not counted."""
        return self.per_device * self.ranks * self.accumulate


class ResumableBatchSampler(Sampler[list[SampleKey]]):
    """The batches of one rank from one step to another, across epochs: `accumulate` of them make a step.

    An epoch's order is a permutation drawn from (seed, epoch). Its last records, where they do not fill a global batch,
    are left out; an epoch of a mixture is as much shorter instead.

    Args:
        records: of the list, or their number.
        plan: distribution of a global batch.
        seed: of the run.
        first_step, last_step: optimizer steps from the run's start; the last one is excluded.
        labels: class of each record, to show every class equally often (`balanced_order`); None: every record once.

    Raises:
        ValueError: the list does not fill one global batch.
    """

    def __init__(
        self,
        records: int | Sized,
        plan: BatchPlan,
        seed: int,
        first_step: int,
        last_step: int,
        labels: np.ndarray | None = None,
    ) -> None:
        count = records if isinstance(records, int) else len(records)
        self.records, self.count, self.plan, self.seed = records, count, plan, seed
        self.first_step, self.last_step, self.labels = first_step, last_step, labels
        self.steps_per_epoch = count // plan.global_batch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"the list has {count} records and a step takes {plan.global_batch} ({plan.per_device} a device x "
                f"{plan.ranks} devices x {plan.accumulate} accumulated); make the batch smaller"
            )

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.plan.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        plan, global_batch, epoch = self.plan, self.plan.global_batch, -1
        order = np.zeros((0, 2), dtype=np.int64)
        for step in range(self.first_step, self.last_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self._order(epoch)
            start = step % self.steps_per_epoch * global_batch
            for part in range(plan.accumulate):
                ours = start + (part * plan.ranks + plan.rank) * plan.per_device
                yield [SampleKey(*key) for key in order[ours : ours + plan.per_device].tolist()]

    def _order(self, epoch: int) -> np.ndarray:
        """Return the keys of an epoch: `(samples, 2)`, or 3 with the sample of the record."""
        if isinstance(self.records, Mixture):
            return self.records.draw(self.seed, epoch, self.steps_per_epoch * self.plan.global_batch)
        if self.labels is not None:
            order = np.array(balanced_order(self.labels, self.seed, epoch))
        else:
            order = np.array(epoch_order(self.count, self.seed, epoch))[:, None]
        return np.column_stack([np.full(self.count, epoch), order])


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the records in an epoch."""
    return torch.randperm(count, generator=sample_generator(seed, epoch, ORDER)).tolist()


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> list[tuple[int, int]]:
    """Return the order of an epoch in which every class has as many samples, give or take one.

    A class goes through its records in an order drawn from (seed, epoch), again and again until it has its share of
    the epoch: so a record of a frequent class is seen in some epochs only, each equally often in the long run. The
    classes with one sample more are drawn, too.

    Args:
        labels: class of each of the R records, `(R,)`.
        seed: of the run.
        epoch: its number.

    Returns:
        R pairs: a record, and how many samples of it came before in this epoch.
    """
    generator = sample_generator(seed, epoch, ORDER)
    classes = np.unique(labels)
    share, rest = divmod(len(labels), len(classes))
    with_more = set(torch.randperm(len(classes), generator=generator)[:rest].tolist())
    pairs = []
    for number, label in enumerate(classes):
        places = np.flatnonzero(labels == label)
        shuffled = places[torch.randperm(len(places), generator=generator).numpy()]
        pairs += [(int(shuffled[i % len(places)]), i // len(places)) for i in range(share + (number in with_more))]
    return [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]


def collate(samples: Sequence[Sample]) -> Batch:
    """Collate samples into a batch; the clips of one record stay next to each other."""
    repeats = len(samples[0].clips)
    crops = [sample.clips for sample in samples if isinstance(sample.clips, RaggedCrops)]
    clips = [sample.clips for sample in samples if isinstance(sample.clips, Tensor)]
    visible = [sample.visible for sample in samples if sample.visible is not None]
    predicted = [sample.predicted for sample in samples if sample.predicted is not None]
    return Batch(
        clips=concatenate_crops(crops, _concatenate) if crops else _concatenate(clips),
        visible=torch.cat(visible) if visible else None,
        predicted=torch.cat(predicted) if predicted else None,
        labels=_stack_labels([sample.label for sample in samples]).repeat_interleave(repeats, dim=0),
        records=torch.tensor([sample.index for sample in samples]).repeat_interleave(repeats),
        bad_records=tuple(record for sample in samples for record in sample.bad_records),
    )


def _stack_labels(labels: list[int | Tensor]) -> Tensor:
    """Return `(S,)` int64 of numbers, or `(S, classes)` of several classes each."""
    several = [label for label in labels if isinstance(label, Tensor)]
    return torch.stack(several) if several else torch.tensor(labels)


def collate_pictures(samples: Sequence[PictureSample]) -> PictureBatch:
    """Collate pictures into a batch; nothing is padded or stacked."""
    return PictureBatch(
        images=[sample.image for sample in samples],
        targets=[sample.target for sample in samples],
        transforms=[sample.transform for sample in samples],
        records=torch.tensor([sample.index for sample in samples]),
        bad_records=tuple(record for sample in samples for record in sample.bad_records),
    )


def _concatenate(tensors: list[Tensor]) -> Tensor:
    """`torch.cat`; in a worker into the memory shared with the training process: one copy in place of two.

    PyTorch's own collate function makes shared memory by the same private method.
    """
    if get_worker_info() is None:
        return torch.cat(tensors)
    first = tensors[0]
    shared = first.untyped_storage()._new_shared(sum(each.nbytes for each in tensors))
    result = torch.empty(0, dtype=first.dtype).set_(shared)
    return torch.cat(tensors, out=result.view(-1, *first.shape[1:]))


def iter_batches(
    dataset: Dataset[Any],
    batches: Iterable[list[Any]],
    workers: int,
    pin_memory: bool = False,
    start_method: str | None = None,
    collate: Callable[[list[Any]], Any] = collate,
) -> Generator[Any]:
    """Yield batches from workers that live until the last batch, or until this generator is closed.

    Args:
        dataset: clips, test views or pictures.
        batches: dataset keys of each batch: a `ResumableBatchSampler`, or lists of indices.
        workers: loading processes; 0 loads in this one.
        pin_memory: page-locked batches, for asynchronous copies to CUDA.
        start_method: fork, spawn or forkserver; None: the platform's default.
        collate: samples -> a batch: that of clips, or `collate_pictures`.

    Raises:
        LoaderError: a worker was lost, which is noticed within 5 s.
    """
    return _iterate(
        workers, start_method, dataset=dataset, batch_sampler=batches, collate_fn=collate, pin_memory=pin_memory
    )


def iter_stream(
    dataset: IterableDataset[T], workers: int, pin_memory: bool = False, start_method: str | None = None
) -> Generator[T]:
    """Yield what a dataset makes in its own order (windows of long videos); else as `iter_batches`."""
    return _iterate(
        workers, start_method, dataset=dataset, batch_size=None, collate_fn=_unchanged, pin_memory=pin_memory
    )


def _unchanged(item: T) -> T:
    return item


def _iterate(workers: int, start_method: str | None, **options: Any) -> Generator[Any]:
    loader: DataLoader[Any] = DataLoader(
        **options,
        num_workers=workers,
        multiprocessing_context=start_method if workers else None,
        prefetch_factor=2 if workers else None,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # else the loader draws its workers' seeds from the numbers of the first step
    )
    iterator = iter(loader)
    with supervise(iterator) if workers else nullcontext():
        yield from iterator
