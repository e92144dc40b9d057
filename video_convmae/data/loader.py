"""Batches: which records a step sees, workers that read them, tensors that cross to the device.

A global batch is a slice of the epoch's order, whatever the number of ranks and accumulated parts: for each part, each
rank takes its records of the slice. So 1, 2 and 4 processes see the same global batches, and a run that is resumed at a
step goes on with the records that it would have seen.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from video_convmae.errors import UserError

from .datasets import ORDER, BadRecord, ClipDataset, Sample, SampleKey, TestViewDataset, sample_generator
from .ragged import RaggedCrops, join

_PATIENCE = 2.0  # seconds that workers have to end before they are killed


class LoaderError(UserError, RuntimeError):
    """A worker ended before its time. No record is to blame, and what the main process holds is whole."""


class Batch(NamedTuple):
    """What a task turns into a loss; B counts clips, R of each record side by side.

    clips: `(B, C, T, H, W)` uint8, or B windows for the device to resize. visible: `(B, t, h, w)` bool, None without
    masks. labels, records: `(B,)` int64.
    faults: records that could not be read while this batch was made.
    """

    clips: Tensor | RaggedCrops
    visible: Tensor | None
    labels: Tensor
    records: Tensor
    faults: tuple[BadRecord, ...]


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is dealt out: `per_device` records to each of `ranks`, `accumulate` times a step."""

    per_device: int
    ranks: int = 1
    rank: int = 0
    accumulate: int = 1

    @property
    def global_batch(self) -> int:
        """Records of one optimizer step, repeats not counted."""
        return self.per_device * self.ranks * self.accumulate


class ResumableBatchSampler(Sampler[list[SampleKey]]):
    """The batches of one rank from one step to the last, across epochs: `accumulate` of them make a step.

    An epoch's order is a permutation drawn from (seed, epoch); what does not fill a global batch is left for the next
    epoch's order to show.

    Raises:
        ValueError: the list does not fill one global batch.
    """

    def __init__(self, count: int, share: BatchPlan, seed: int, first_step: int, last_step: int) -> None:
        self.count, self.share, self.seed = count, share, seed
        self.first_step, self.last_step = first_step, last_step
        self.steps_per_epoch = count // share.global_batch
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the list has {count} records and a step takes {share.global_batch} ({share.per_device} a device x "
                f"{share.ranks} devices x {share.accumulate} accumulated); make the batch smaller"
            )

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.share.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        share, epoch, order = self.share, -1, []
        for step in range(self.first_step, self.last_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.count, self.seed, epoch)
            start = step % self.steps_per_epoch * share.global_batch
            for part in range(share.accumulate):
                mine = start + (part * share.ranks + share.rank) * share.per_device
                yield [SampleKey(epoch, index) for index in order[mine : mine + share.per_device]]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the records in an epoch."""
    return torch.randperm(count, generator=sample_generator(seed, epoch, ORDER)).tolist()


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples -> a batch; the clips of one record stay side by side."""
    repeats = len(samples[0].clips)
    masks = [sample.visible for sample in samples if sample.visible is not None]
    clips = [sample.clips for sample in samples]
    return Batch(
        clips=join(clips, _join) if isinstance(clips[0], RaggedCrops) else _join(clips),
        visible=torch.cat(masks) if masks else None,
        labels=torch.tensor([sample.label for sample in samples]).repeat_interleave(repeats),
        records=torch.tensor([sample.index for sample in samples]).repeat_interleave(repeats),
        faults=tuple(fault for sample in samples for fault in sample.faults),
    )


def _join(clips: list[Tensor]) -> Tensor:
    """`torch.cat`; in a worker straight into the memory that it shares with the main process: one copy, not two."""
    if get_worker_info() is None:
        return torch.cat(clips)
    first = clips[0]
    shared = first.untyped_storage()._new_shared(sum(each.nbytes for each in clips))
    joined = torch.empty(0, dtype=first.dtype).set_(shared)
    return torch.cat(clips, out=joined.view(-1, *first.shape[1:]))


def load(
    data: ClipDataset | TestViewDataset,
    batches: Iterable[Sequence[Any]],
    workers: int,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Generator[Batch]:
    """The batches, from workers that live until the last one, or until this iterator is closed.

    Args:
        data: the data set.
        batches: what each batch asks the data set for, `ResumableBatchSampler` or lists of indices.
        workers: processes; 0 loads in this one.
        pin_memory: page-locked batches, for copies to CUDA that do not wait.
        start_method: fork, spawn or forkserver; None is the platform's own.

    Raises:
        LoaderError: a worker ended, which is noticed in 5 s.
    """
    loader = DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        multiprocessing_context=start_method if workers else None,
        prefetch_factor=2 if workers else None,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # else it would draw its workers' seeds from the numbers of the first step
    )
    iterator = iter(loader)
    if not workers:
        yield from iterator
        return
    # PyTorch would raise a worker's death wherever this process is at that moment, be it within an optimizer step. It
    # also looks for the dead when it has waited 5 s for a batch; that is when it is safe to raise.
    _remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False
    # An iterator that nobody closes, or that a traceback holds, must not keep the program from ending.
    at_exit = Finalize(None, _kill, [iterator._workers], exitpriority=0)
    try:
        yield from iterator
    except Exception as error:
        if reason := _death(iterator._workers):
            raise LoaderError(reason) from error
        raise
    finally:
        if at_exit.still_active():
            _end(iterator)
            at_exit.cancel()


def _prepare_worker(worker: int) -> None:
    """Parallelism belongs to the workers, stopping to the main process.

    Threads within each worker would only take turns on the same cores. Ctrl-C and a scheduler's signals reach every
    process: the main one saves and then ends its workers, which must serve it until then. If it is killed, they end at
    once; PyTorch would have them go on until their decoder returns, and for ever under forkserver.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _end(iterator: Any) -> None:
    """End the workers, by force if need be: one may wait for a decoder that hangs."""
    force = threading.Timer(_PATIENCE, _kill, [iterator._workers])
    force.daemon = True
    force.start()
    try:
        iterator._shutdown_workers()
    finally:
        force.cancel()


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _death(workers: Sequence[BaseProcess]) -> str | None:
    """Which worker ended, how, and what to do; None if all live. One whose line broke may take a moment to end."""
    ended = wait([worker.sentinel for worker in workers], timeout=1.0)
    for place, worker in enumerate(workers):
        if worker.sentinel in ended:
            worker.join(1.0)
            code = worker.exitcode
            how, advice = f"ended with exit code {code}", "what it wrote before stands above"
            if code is not None and code < 0:
                number = signal.Signals(-code)
                how, advice = f"was ended by {number.name}", _ADVICE.get(number, advice)
            return f"loading process {worker.pid} (worker {place} of {len(workers)}) {how}: {advice}"
    return None


_LESS = "fewer data.workers, a smaller train.batch_size or fewer data.repeats"
_ADVICE = {
    signal.SIGKILL: f"the system does this when memory runs out; set {_LESS}",
    signal.SIGBUS: f"shared memory (/dev/shm) is full; give it more room (docker run --shm-size), or set {_LESS}",
}
