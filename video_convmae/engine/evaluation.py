"""Evaluation: views -> records -> accuracy, over all ranks.

Every record counts exactly once, and no score depends on the number of ranks: the list is cut into fixed chunks that
are dealt whole, so that each forward pass has the same composition wherever it runs. Softmax of each view, then the
mean over a record's views. A record that cannot be read is reported; its slot in the batch is zeros and is dropped.

An evaluation with a folder leaves what was scored there as it goes, chunk by chunk; begun again, it goes on from there.
Features (features.py) are computed and kept by the same means: what is a record's row of scores here is its row of
features there.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from video_convmae.data.datasets import BadRecord, TestViewDataset
from video_convmae.data.loader import Batch, iter_batches
from video_convmae.data.options import ViewConfig
from video_convmae.data.records import Records

from . import distributed
from .distributed import DistInfo
from .log import whole_lines, write_text
from .tasks import Normalizer, autocast


@dataclass(frozen=True)
class ProtocolConfig(ViewConfig):
    """How a classifier is tested."""

    batch_size: int = 8
    """Records whose views go through the model together; a score may depend on it in the last bits."""
    precision: Literal["bf16", "fp16", "fp32"] | None = None
    """Autocast type; none: that of the training."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a list, in its order.

    scores: `(R, classes)` float32, softmax averaged over the views; zeros where the record could not be read.
    labels: `(R,)` int64, -1 where the list has none.
    failed: `(R,)` bool.
    faults: what could not be read, and why.
    new: records that this attempt went through, not one before it.
    """

    scores: np.ndarray
    labels: np.ndarray
    failed: np.ndarray
    faults: tuple[BadRecord, ...]
    new: int = 0

    def metrics(self) -> dict[str, float | int | None]:
        """Accuracies as fractions over the labelled records that were read; None where there are none."""
        counted = ~self.failed & (self.labels >= 0)
        labels, best = self.labels[counted], best_classes(self.scores[counted], 5)
        first, hits = best[:, 0] == labels, (best == labels[:, None]).any(axis=1)
        of_class = [first[labels == label].mean() for label in np.unique(labels)]
        return {
            "top1": float(first.mean()) if len(labels) else None,
            "top5": float(hits.mean()) if len(labels) else None,
            "mean_class_accuracy": float(np.mean(of_class)) if of_class else None,
            "scored": int((~self.failed).sum()),
            "failed": int(self.failed.sum()),
        }


def best_classes(scores: np.ndarray, count: int) -> np.ndarray:
    """Classes of the `count` highest scores (or all there are), best first: `(R, classes)` -> `(R, count)`."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def evaluate(
    model: nn.Module,
    views: TestViewDataset,
    pixels: Normalizer,
    num_classes: int,
    config: ProtocolConfig,
    group: DistInfo,
    workers: int,
    start_method: str | None = None,
    folder: Path | None = None,
) -> Evaluation:
    """Score every record of a list.

    Args:
        model: clips -> logits, on the group's device, not wrapped.
        views: the list's test views.
        pixels: how bytes become the model's input.
        num_classes: values in a row of logits.
        config: batch and precision.
        group: the processes that share the work.
        workers: loading processes of each of them.
        start_method: how those start.
        folder: where scored chunks are kept until all are there; None: they are not, and no progress is shown.

    Returns:
        The same on every rank.
    """

    def class_scores(clips: Tensor) -> Tensor:
        return model(clips).float().softmax(dim=1)

    shape = (num_classes,)
    rows = score_list(model, class_scores, shape, views, pixels, config, group, workers, start_method, folder)
    return Evaluation(rows.values, views.records.labels, rows.failed, rows.faults, rows.new)


class ListResult(NamedTuple):
    """What was computed of a list, in its order.

    values: `(R, ...)` float32, the mean over each record's views; zeros where it could not be read.
    failed: `(R,)` bool.
    faults: what could not be read, and why.
    new: records that this attempt went through, not one before it.
    """

    values: np.ndarray
    failed: np.ndarray
    faults: tuple[BadRecord, ...]
    new: int


class Chunk(NamedTuple):
    """Records that went through the model together, their `(R, ...)` values, and which of them could not be read."""

    records: list[int]
    values: np.ndarray
    faults: list[BadRecord]


def score_list(
    model: nn.Module,
    compute: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    views: TestViewDataset,
    pixels: Normalizer,
    config: ProtocolConfig,
    group: DistInfo,
    workers: int,
    start_method: str | None = None,
    folder: Path | None = None,
) -> ListResult:
    """A row of float32 for every record of a list, held in memory; the same on every rank.

    Args:
        model: what `compute` uses; in evaluation mode meanwhile.
        compute: clips `(B, C, T, H, W)` -> values `(B, *shape)`, without gradients and with autocast on.
        shape: of a record's values.
        views, pixels, config, group, workers, start_method, folder: as in `evaluate`.
    """
    kept = ChunkStore(folder, shape, group.rank)
    rows, faults = kept.read()
    done = set(rows["record"][~rows["failed"]].tolist())  # what failed is tried again: the disk may be back
    new_rows, new_faults = [rows[:0]], []
    show = folder is not None
    chunks = score_chunks(model, compute, views, pixels, config, group, workers, start_method, done, show)
    with closing(kept), closing(chunks):
        for chunk in chunks:
            new_rows.append(kept.add(chunk))
            new_faults += chunk.faults
    kept_rows = len(rows)
    for rank_rows, rank_faults in distributed.all_gather_object((np.concatenate(new_rows), new_faults)):
        rows, faults = np.concatenate([rows, rank_rows]), [*faults, *rank_faults]
    return _arrange(rows, faults, len(views), shape, len(rows) - kept_rows)


def score_chunks(
    model: nn.Module,
    compute: Callable[[Tensor], Tensor],
    views: TestViewDataset,
    pixels: Normalizer,
    config: ProtocolConfig,
    group: DistInfo,
    workers: int,
    start_method: str | None,
    done: Collection[int],
    show: bool,
) -> Generator[Chunk]:
    """This rank's chunks, as they are computed.

    Args:
        model, compute, views, pixels, config, group, workers, start_method: as in `score_list`.
        done: records whose values are kept, the same on every rank; chunks that lack none of theirs are left out.
        show: show progress.
    """
    starts, done = range(0, len(views), config.batch_size), set(done)
    chunks = [list(range(start, min(start + config.batch_size, len(views)))) for start in starts]
    pending = [chunk for chunk in chunks if not done.issuperset(chunk)]
    mine = pending[group.rank :: group.count]
    progress = Progress(len(views), len(views) - sum(map(len, pending)), show and group.is_main)
    training = model.training
    model.eval()
    try:
        batches = iter_batches(views, mine, workers, group.device.type == "cuda", start_method)
        for chunk in _score(compute, batches, views.views.count, pixels, config.precision):
            distributed.heartbeat(f"scores the records after {chunk.records[-1]}")
            yield chunk
            progress.update(len(chunk.records) * group.count)
    finally:
        model.train(training)
        progress.close()


class Progress:
    """For the person who watches: a bar on a terminal; elsewhere, in a batch system's log, a line now and then.

    Args:
        total: records of the list.
        done: those that need no work.
        show: else nothing is said.
    """

    EVERY = 10.0  # seconds between two lines

    def __init__(self, total: int, done: int, show: bool) -> None:
        self._bar = tqdm(total=total, initial=done, unit="video", disable=None if show else True)
        self._prints = show and self._bar.disable
        self._total, self._first, self._done = total, done, done
        self._started = self._said = time.perf_counter()

    def update(self, count: int) -> None:
        """So many more are done; with several processes a guess, which may run ahead of the list."""
        count = min(count, self._total - self._done)
        self._done += count
        self._bar.update(count)
        now = time.perf_counter()
        if self._prints and now >= self._said + self.EVERY:
            rate = (self._done - self._first) / (now - self._started)
            print(f"{self._done}/{self._total} videos, {rate:.1f} videos/s", flush=True)
            self._said = now

    def close(self) -> None:
        """Nothing more is done."""
        self._bar.close()


@torch.inference_mode()
def _score(
    compute: Callable[[Tensor], Tensor], batches: Iterator[Batch], views: int, pixels: Normalizer, precision: str
) -> Iterator[Chunk]:
    """The chunks: `compute` of every view, then the mean over a record's views."""
    for batch in batches:
        clips = pixels.normalise(batch.clips)
        with autocast(clips.device, precision):
            values = compute(clips)
        values = values.float().unflatten(0, (-1, views)).mean(dim=1).cpu()
        records = batch.records[::views].tolist()
        if not values.isfinite().all():  # sorted like any others, they would count as predictions
            raise FloatingPointError(
                f"not finite for the records {records}: try precision bf16 or fp32 for {precision}"
            )
        yield Chunk(records, values.numpy(), list(batch.faults))


def _arrange(rows: np.ndarray, faults: Sequence[BadRecord], count: int, shape: tuple[int, ...], new: int) -> ListResult:
    """Rows in the list's order; a record that was scored twice (a chunk that was torn by a kill) counts once."""
    values = np.zeros((count, *shape), np.float32)
    failed = np.zeros(count, bool)
    values[rows["record"]], failed[rows["record"]] = rows["values"], rows["failed"]
    return ListResult(values, failed, in_order([fault for fault in faults if failed[fault.index]]), new)


def in_order(faults: Sequence[BadRecord]) -> tuple[BadRecord, ...]:
    """Faults in the order of the list, one a record."""
    by_record = {fault.index: fault for fault in faults}
    return tuple(by_record[index] for index in sorted(by_record))


class ChunkStore:
    """Chunks that were scored before an interruption. Each process of each attempt appends to files of its own.

    Args:
        folder: where they lie; made with the first chunk that is added. None: nothing is kept.
        shape: of a record's values.
        rank: of this process.
    """

    def __init__(self, folder: Path | None, shape: tuple[int, ...], rank: int) -> None:
        self.row = np.dtype([("record", "<i8"), ("failed", "?"), ("values", "<f4", shape)])
        self._folder = folder
        self._rank = rank
        self._files: list[Any] = []

    def read(self) -> tuple[np.ndarray, list[BadRecord]]:
        """All that any process has kept, the same on every rank."""
        everyone = distributed.all_gather_object(
            (np.concatenate([np.zeros(0, self.row), *self.mapped()]), self.faults())
        )
        return np.concatenate([rows for rows, _ in everyone]), [fault for _, faults in everyone for fault in faults]

    def records(self) -> set[int]:
        """The records that any process has read, the same on every rank; their values are not looked at."""
        read = (rows["record"][~rows["failed"]] for rows in self.mapped())
        mine = np.unique(np.concatenate([np.zeros(0, np.int64), *read]))
        return set(np.concatenate(distributed.all_gather_object(mine)).tolist())

    def mapped(self) -> list[np.ndarray]:
        """The rows of every file that this process sees; they are read from it when they are looked at."""
        files = sorted(self._folder.glob("*.rows")) if self._folder is not None else []
        counts = [path.stat().st_size // self.row.itemsize for path in files]  # a row that was cut off is not there
        return [np.memmap(path, self.row, "r", shape=(count,)) for path, count in zip(files, counts) if count]

    def faults(self) -> list[BadRecord]:
        """The faults in every file that this process sees."""
        files = sorted(self._folder.glob("*.faults.jsonl")) if self._folder is not None else []
        return [BadRecord(**json.loads(line)) for path in files for line in whole_lines(path)]

    def add(self, chunk: Chunk) -> np.ndarray:
        """Keep a chunk; its faults first, so that no failed row is without its reason. Returns its rows."""
        failed = {fault.index for fault in chunk.faults}
        rows = np.zeros(len(chunk.records), self.row)
        rows["record"], rows["failed"] = chunk.records, [record in failed for record in chunk.records]
        rows["values"][~rows["failed"]] = chunk.values[~rows["failed"]]
        if self._folder is not None:
            rows_file, faults_file = self._files = self._files or self._opened(self._folder)
            faults_file.writelines(json.dumps(fault._asdict()) + "\n" for fault in chunk.faults)
            faults_file.flush()
            rows_file.write(rows.tobytes())
            rows_file.flush()
        return rows

    def _opened(self, folder: Path) -> list[Any]:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns()}-{self._rank}"
        return [open(folder / f"{name}.rows", "ab"), open(folder / f"{name}.faults.jsonl", "a")]

    def close(self) -> None:
        """Nothing more is added."""
        for file in self._files:
            file.close()


def partial_folder(folder: Path, settings: dict[str, Any]) -> Path:
    """Where scored chunks are kept until all are there: a place of its own for each kind of evaluation.

    So an evaluation goes on with the chunks of an interrupted one only where weights, list and settings are the same.
    How clips are loaded (workers, start method, timeout) changes no score and is left out.

    Args:
        folder: of the results.
        settings: all that a score follows from, as plain data; `data` holds a data configuration.
    """
    data = {name: value for name, value in settings["data"].items() if name not in _NO_SCORE_DEPENDS_ON}
    text = json.dumps(settings | {"data": data}, sort_keys=True)
    return folder / "partial" / hashlib.sha256(text.encode()).hexdigest()[:16]


_NO_SCORE_DEPENDS_ON = ("workers", "start_method", "decode_timeout", "max_bad_fraction")


def write(evaluation: Evaluation, records: Records, folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    """Write predictions.csv, scores.npz, bad_records.jsonl and metrics.json; the interrupted chunks are removed.

    Args:
        evaluation: of `records`.
        folder: made if it is not there.
        more: what metrics.json says besides.

    Returns:
        What metrics.json holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_predictions(evaluation, records, folder / "predictions.csv")
    paths = np.array([record.path for record in records])
    with open(folder / "scores.npz.partial", "wb") as file:
        np.savez(file, scores=evaluation.scores, labels=evaluation.labels, failed=evaluation.failed, records=paths)
    (folder / "scores.npz.partial").replace(folder / "scores.npz")
    write_faults(evaluation.faults, folder)
    metrics = evaluation.metrics() | more
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(folder / "partial", ignore_errors=True)
    return metrics


def write_faults(faults: Sequence[BadRecord], folder: Path) -> None:
    """Write bad_records.jsonl; with no faults there is none."""
    bad = folder / "bad_records.jsonl"
    bad.unlink(missing_ok=True)
    if faults:
        write_text(bad, "".join(json.dumps(fault._asdict()) + "\n" for fault in faults))


def _write_predictions(evaluation: Evaluation, records: Records, path: Path) -> None:
    """A row for each record that was read, in the list's order: record, label, best classes, their scores."""
    count = min(5, evaluation.scores.shape[1])
    best = best_classes(evaluation.scores, count)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        places = range(1, count + 1)
        writer.writerow(["record", "label", *(f"pred{i}" for i in places), *(f"score{i}" for i in places)])
        for index, record in enumerate(records):
            if not evaluation.failed[index]:
                scores = (f"{evaluation.scores[index, c]:.6g}" for c in best[index])
                label = "" if record.label is None else record.label
                writer.writerow([record.path, label, *best[index], *scores])
    partial.replace(path)
