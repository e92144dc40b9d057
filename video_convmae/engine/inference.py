"""A model over the test views of every record of a list: evaluation, features, probes.

Every record counts exactly once, and no value depends on the number of ranks: the list is cut into fixed chunks that
are dealt whole, so that each forward pass has the same composition wherever it runs. A record that cannot be read is
reported; its slot in the batch is zeros and is dropped.

With a folder, finished chunks are stored there, and an interrupted run resumes from them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from video_convmae.atomic import whole_lines
from video_convmae.data.datasets import BadRecord, TestViewDataset
from video_convmae.data.loader import Batch, iter_batches
from video_convmae.data.options import LOADING
from video_convmae.data.ragged import RaggedCrops
from video_convmae.errors import UserError
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe
from video_convmae.models.pytorchvideo import LibraryClassifier

from .distributed import DistInfo, all_gather_object
from .options import ProtocolConfig
from .tasks import Normalizer, autocast
from .watchdog import heartbeat

Model = Autoencoder | Classifier | Probe | LibraryClassifier


class NonFiniteOutput(UserError, FloatingPointError):
    """A model's output is not finite; the message names the records."""


class ListResult(NamedTuple):
    """Values of a list, in its order.

    values: `(R, ...)` float32, the mean over each record's views; zeros where it could not be read.
    failed: `(R,)` bool.
    bad_records: records that could not be read, with their errors.
    new: records that this attempt computed, not an earlier one.
    """

    values: np.ndarray
    failed: np.ndarray
    bad_records: tuple[BadRecord, ...]
    new: int


class Chunk(NamedTuple):
    """Records that went through the model together, their `(R, ...)` values, and those that could not be read."""

    records: list[int]
    values: np.ndarray
    bad_records: list[BadRecord]


@dataclass(frozen=True)
class ListInference:
    """A model over the views of a list, shared by all processes.

    model: on this process's device, not wrapped; in evaluation mode while it runs.
    views: the list's test views.
    normalizer: bytes -> the model's input.
    protocol: batch size and precision.
    info: the processes.
    workers, start_method: loading processes of each of them.
    """

    model: Model
    views: TestViewDataset
    normalizer: Normalizer
    protocol: ProtocolConfig
    info: DistInfo
    workers: int
    start_method: str | None = None

    def run(
        self, compute: Callable[[Tensor], Tensor], shape: tuple[int, ...], folder: Path | None = None
    ) -> ListResult:
        """Compute the values of every record, held in memory; the same on every rank.

        Args:
            compute: clips `(B, C, T, H, W)` -> values `(B, *shape)`, called without gradients and with autocast.
            shape: of a record's values.
            folder: for finished chunks; None: they are not stored, and no progress is shown.

        Raises:
            NonFiniteOutput: a value is not finite.
        """
        store = ChunkStore(folder, shape, self.info.rank)
        rows, bad_records = store.read()
        done = set(rows["record"][~rows["failed"]].tolist())  # failed ones are tried again: the disk may be back
        stored, new_rows, new_bad_records = len(rows), [rows[:0]], []
        with closing(store), closing(self.chunks(compute, done, show=folder is not None)) as chunks:
            for chunk in chunks:
                new_rows.append(store.add(chunk))
                new_bad_records += chunk.bad_records
        for rank_rows, rank_bad_records in all_gather_object((np.concatenate(new_rows), new_bad_records)):
            rows, bad_records = np.concatenate([rows, rank_rows]), [*bad_records, *rank_bad_records]
        # A record that was computed twice (a chunk that a kill cut in two) counts once: the last row wins.
        values, failed = np.zeros((len(self.views), *shape), np.float32), np.zeros(len(self.views), bool)
        values[rows["record"]], failed[rows["record"]] = rows["values"], rows["failed"]
        bad_records = [record for record in bad_records if failed[record.index]]
        return ListResult(values, failed, in_list_order(bad_records), len(rows) - stored)

    def chunks(self, compute: Callable[[Tensor], Tensor], done: Collection[int], show: bool) -> Generator[Chunk]:
        """Yield this rank's chunks as they are computed.

        Args:
            compute: as in `run`.
            done: records whose values are stored, the same on every rank; chunks of these alone are skipped.
            show: show progress.
        """
        size, count, done = self.protocol.batch_size, len(self.views), set(done)
        every = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
        pending = [chunk for chunk in every if not done.issuperset(chunk)]
        mine = pending[self.info.rank :: self.info.world_size]
        progress = Progress(count, count - sum(map(len, pending)), show and self.info.is_main)
        training = self.model.training
        self.model.eval()
        try:
            pin_memory = self.info.device.type == "cuda"
            batches = iter_batches(self.views, mine, self.workers, pin_memory, self.start_method)
            for chunk in self._compute(compute, batches):
                heartbeat(f"computes the records after {chunk.records[-1]}")
                yield chunk
                progress.update(len(chunk.records) * self.info.world_size)
        finally:
            self.model.train(training)
            progress.close()

    @torch.inference_mode()
    def _compute(self, compute: Callable[[Tensor], Tensor], batches: Iterator[Batch]) -> Iterator[Chunk]:
        """Yield chunks: `compute` of every view, then the mean over a record's views."""
        for batch in batches:
            records = batch.records[:: self.views.views.count].tolist()
            values = self.forward(compute, batch.clips, self.views.views.count, f"the records {records}")
            yield Chunk(records, values, list(batch.bad_records))

    @torch.inference_mode()
    def forward(
        self, compute: Callable[[Tensor], Tensor], clips: Tensor | RaggedCrops, views: int, names: str
    ) -> np.ndarray:
        """Compute the values of clips `(n * views, C, T, H, W)` uint8: `(n, ...)` float32, the mean over the views.

        Raises:
            NonFiniteOutput: a value is not finite; the message has the `names`.
        """
        precision = self.protocol.precision or "fp32"
        normalised = self.normalizer.normalise(clips)
        with autocast(normalised.device, precision):
            values = compute(normalised)
        values = values.float().unflatten(0, (-1, views)).mean(dim=1).cpu()
        if not values.isfinite().all():  # sorted like any others, they would count as predictions
            raise not_finite(names, precision)
        return values.numpy()


def not_finite(names: str, precision: str) -> NonFiniteOutput:
    """Return the error of an output that is not finite, for the named records or picture."""
    advice = "try precision bf16 or fp32" if precision == "fp16" else "are the weights damaged?"
    return NonFiniteOutput(f"not finite for {names} at precision {precision}: {advice}")


def in_list_order(bad_records: Sequence[BadRecord]) -> tuple[BadRecord, ...]:
    """Sort bad records by their place in the list, one a record."""
    by_record = {record.index: record for record in bad_records}
    return tuple(by_record[index] for index in sorted(by_record))


class Progress:
    """A progress bar on a terminal; elsewhere, such as in a batch system's log, a line every few seconds.

    Args:
        total: records of the list.
        done: records that need no work.
        show: otherwise nothing is printed.
        unit: what records are, in words.
    """

    EVERY = 10.0  # seconds between two lines

    def __init__(self, total: int, done: int, show: bool, unit: str = "videos") -> None:
        self._unit = unit
        self._bar = tqdm(total=total, initial=done, unit=unit.removesuffix("s"), disable=None if show else True)
        self._prints = show and self._bar.disable
        self._total, self._first, self._done = total, done, done
        self._started = self._printed = time.perf_counter()

    def update(self, count: int, note: str = "") -> None:
        """Add `count` finished records; with several processes an estimate, cut at the list's length.

        `note` says in words what is being done within a record.
        """
        count = min(count, self._total - self._done)
        self._done += count
        self._bar.update(count)
        if note:
            self._bar.set_postfix_str(note)
        now = time.perf_counter()
        if self._prints and now >= self._printed + self.EVERY:
            rate = (self._done - self._first) / (now - self._started)
            print(f"{self._done}/{self._total} {self._unit}, {note or f'{rate:.1f} {self._unit}/s'}", flush=True)
            self._printed = now

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


class ChunkStore:
    """Finished chunks on the disk. Each process of each attempt appends to files of its own.

    Args:
        folder: created with the first chunk. None: nothing is stored.
        shape: of a record's values.
        rank: of this process.
    """

    lines = ".bad_records.jsonl"  # end of the name of the file beside the rows

    def __init__(self, folder: Path | None, shape: tuple[int, ...], rank: int) -> None:
        self.row = np.dtype([("record", "<i8"), ("failed", "?"), ("values", "<f4", shape)])
        self.folder = folder
        self._rank = rank
        self._files: tuple[IO[bytes], IO[str]] | None = None

    def read(self) -> tuple[np.ndarray, list[BadRecord]]:
        """Return the rows that any process has stored and their bad records, the same on every rank."""
        mine = np.concatenate([np.zeros(0, self.row), *self.mapped_rows()]), self.bad_records()
        everyone = all_gather_object(mine)
        bad_records = [record for _, records in everyone for record in records]
        return np.concatenate([rows for rows, _ in everyone]), bad_records

    def stored_records(self) -> set[int]:
        """Return the records that any process has stored, the same on every rank, without reading their values."""
        read = (rows["record"][~rows["failed"]] for rows in self.mapped_rows())
        mine = np.unique(np.concatenate([np.zeros(0, np.int64), *read]))
        return set(np.concatenate(all_gather_object(mine)).tolist())

    def mapped_rows(self) -> list[np.ndarray]:
        """Map the rows of every file that this process sees; the disk is read on access."""
        files = sorted(self.folder.glob("*.rows")) if self.folder is not None else []
        counts = [path.stat().st_size // self.row.itemsize for path in files]  # an incomplete last row is left out
        return [np.memmap(path, self.row, "r", shape=(count,)) for path, count in zip(files, counts) if count]

    def bad_records(self) -> list[BadRecord]:
        """Return the bad records in every file that this process sees."""
        files = sorted(self.folder.glob(f"*{self.lines}")) if self.folder is not None else []
        return [BadRecord(**json.loads(line)) for path in files for line in whole_lines(path)]

    def add(self, chunk: Chunk) -> np.ndarray:
        """Store a chunk and return its rows. Bad records are written first: no failed row is without its reason."""
        failed = {record.index for record in chunk.bad_records}
        rows = np.zeros(len(chunk.records), self.row)
        rows["record"], rows["failed"] = chunk.records, [record in failed for record in chunk.records]
        rows["values"][~rows["failed"]] = chunk.values[~rows["failed"]]
        if self.folder is not None:
            rows_file, bad_records_file = self._open()
            bad_records_file.writelines(json.dumps(record._asdict()) + "\n" for record in chunk.bad_records)
            bad_records_file.flush()
            rows_file.write(rows.tobytes())
            rows_file.flush()
        return rows

    def _open(self) -> tuple[IO[bytes], IO[str]]:
        """Return this process's files of rows and of lines, made when first needed."""
        assert self.folder is not None
        if self._files is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{time.time_ns()}-{self._rank}"
            rows_path, lines_path = Path(f"{path}.rows"), Path(f"{path}{self.lines}")
            self._files = rows_path.open("ab"), lines_path.open("a")
        return self._files

    def close(self) -> None:
        """Close the files."""
        for file in self._files or ():
            file.close()


def chunk_folder(folder: Path, settings: dict[str, Any]) -> Path:
    """Return a folder for finished chunks that is unique to what is computed.

    So a run resumes from the chunks of an interrupted one only if weights, list and settings are the same. Options of
    loading (workers, start method, timeout) change no value and are left out.

    Args:
        folder: of the results.
        settings: everything that a value depends on, as plain data; `data` holds a data configuration.
    """
    data = {name: value for name, value in settings["data"].items() if name not in (*LOADING, "max_bad_fraction")}
    text = json.dumps(settings | {"data": data}, sort_keys=True)
    return folder / "partial" / hashlib.sha256(text.encode()).hexdigest()[:16]
