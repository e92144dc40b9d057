"""Evaluation: views -> records -> accuracy, over all ranks.

Every record counts exactly once, and no score depends on the number of ranks: the list is cut into fixed chunks that
are dealt whole, so that each forward pass has the same composition wherever it runs. Softmax of each view, then the
mean over a record's views. A record that cannot be read is reported; its slot in the batch is zeros and is dropped.

An evaluation with a folder leaves what was scored there as it goes, chunk by chunk; begun again, it goes on from there.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from video_convmae.data.datasets import Fault, ViewConfig, Views
from video_convmae.data.loader import Batch, load
from video_convmae.data.records import Records

from . import distributed
from .distributed import Processes
from .log import whole_lines, write_text
from .tasks import Pixels, autocast


@dataclass(frozen=True)
class ProtocolConfig(ViewConfig):
    """How a classifier is tested."""

    batch_size: int = 8
    """Records whose views go through the model together; a score may depend on it in the last bits."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast type."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a list, in its order.

    scores: `(R, classes)` float32, softmax averaged over the views; zeros where the record could not be read.
    labels: `(R,)` int64, -1 where the list has none.
    failed: `(R,)` bool.
    faults: what could not be read, and why.
    """

    scores: np.ndarray
    labels: np.ndarray
    failed: np.ndarray
    faults: tuple[Fault, ...]

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
    views: Views,
    pixels: Pixels,
    num_classes: int,
    config: ProtocolConfig,
    group: Processes,
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
    kept = _Kept(folder, num_classes, group.rank)
    rows, faults = kept.read()
    scored = set(rows["record"].tolist())
    starts = range(0, len(views), config.batch_size)
    chunks = [list(range(start, min(start + config.batch_size, len(views)))) for start in starts]
    pending = [chunk for chunk in chunks if not scored.issuperset(chunk)]
    mine = pending[group.rank :: group.count]
    bar = tqdm(
        total=len(views),
        initial=len(views) - sum(map(len, pending)),
        unit="video",
        disable=None if folder is not None and group.is_main else True,
    )
    new_rows, new_faults = [rows[:0]], []
    training = model.training
    model.eval()
    try:
        batches = load(views, mine, workers, group.device.type == "cuda", start_method)
        for chunk, scores, of_chunk in _score(model, batches, views.views.count, pixels, config.precision):
            failed = {fault.index for fault in of_chunk}
            new = np.zeros(len(chunk), kept.row)
            new["record"], new["failed"] = chunk, [record in failed for record in chunk]
            new["scores"] = np.where(new["failed"][:, None], 0, scores)
            kept.add(new, of_chunk)
            new_rows.append(new)
            new_faults += of_chunk
            bar.update(min(len(chunk) * group.count, bar.total - bar.n))
    finally:
        model.train(training)
        bar.close()
        kept.close()
    for rank_rows, rank_faults in distributed.gather((np.concatenate(new_rows), new_faults)):
        rows, faults = np.concatenate([rows, rank_rows]), [*faults, *rank_faults]
    return _arrange(rows, faults, views.records, num_classes)


@torch.inference_mode()
def _score(
    model: nn.Module, batches: Iterator[Batch], views: int, pixels: Pixels, precision: str
) -> Iterator[tuple[list[int], np.ndarray, list[Fault]]]:
    """Records of each chunk, their scores and faults."""
    for batch in batches:
        clips = pixels.normalise(batch.clips)
        with autocast(clips.device, precision):
            logits: Tensor = model(clips)
        scores = logits.float().softmax(dim=1).unflatten(0, (-1, views)).mean(dim=1)
        yield batch.records[::views].tolist(), scores.cpu().numpy(), list(batch.faults)


def _arrange(rows: np.ndarray, faults: Sequence[Fault], records: Records, num_classes: int) -> Evaluation:
    """Rows in the list's order; a record that was scored twice (a chunk that was torn by a kill) counts once."""
    scores = np.zeros((len(records), num_classes), np.float32)
    failed = np.zeros(len(records), bool)
    scores[rows["record"]], failed[rows["record"]] = rows["scores"], rows["failed"]
    by_record = {fault.index: fault for fault in faults}
    return Evaluation(scores, records.labels, failed, tuple(by_record[i] for i in sorted(by_record)))


class _Kept:
    """Chunks that were scored before an interruption. Each process of each attempt appends to files of its own."""

    def __init__(self, folder: Path | None, num_classes: int, rank: int) -> None:
        self.row = np.dtype([("record", "<i8"), ("failed", "?"), ("scores", "<f4", (num_classes,))])
        self._folder = folder
        self._files: list[Any] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{time.time_ns()}-{rank}"
            self._files = [open(folder / f"{name}.rows", "ab"), open(folder / f"{name}.faults.jsonl", "a")]  # noqa: SIM115

    def read(self) -> tuple[np.ndarray, list[Fault]]:
        """All that any process has kept, the same on every rank."""
        rows, faults = [np.zeros(0, self.row)], []
        if self._folder is not None:
            for path in sorted(self._folder.glob("*.rows")):
                data = path.read_bytes()  # a row that was cut off is not there
                rows.append(np.frombuffer(data[: len(data) // self.row.itemsize * self.row.itemsize], self.row))
            for path in sorted(self._folder.glob("*.faults.jsonl")):
                faults += [Fault(**json.loads(line)) for line in whole_lines(path)]
        everyone = distributed.gather((np.concatenate(rows), faults))
        return np.concatenate([rows for rows, _ in everyone]), [fault for _, faults in everyone for fault in faults]

    def add(self, rows: np.ndarray, faults: Sequence[Fault]) -> None:
        """Keep a chunk; its faults first, so that no failed row is without its reason."""
        if self._files:
            rows_file, faults_file = self._files
            faults_file.writelines(json.dumps(fault._asdict()) + "\n" for fault in faults)
            faults_file.flush()
            rows_file.write(rows.tobytes())
            rows_file.flush()

    def close(self) -> None:
        for file in self._files:
            file.close()


def begin(folder: Path, settings: dict[str, Any]) -> Path:
    """The folder for scored chunks of an evaluation; those of an interrupted one with the same settings stay.

    Raises:
        ValueError: an evaluation with other settings was interrupted there.
    """
    partial, text = folder / "partial", json.dumps(settings, indent=2, sort_keys=True) + "\n"
    known = partial / "evaluation.json"
    if known.exists() and known.read_text() != text:
        raise ValueError(
            f"{partial} holds chunks of an interrupted evaluation with other settings or weights (its evaluation.json "
            "says which): give another --output, or delete that folder"
        )
    partial.mkdir(parents=True, exist_ok=True)
    write_text(known, text)
    return partial


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
    bad = folder / "bad_records.jsonl"
    bad.unlink(missing_ok=True)
    if evaluation.faults:
        write_text(bad, "".join(json.dumps(fault._asdict()) + "\n" for fault in evaluation.faults))
    metrics = evaluation.metrics() | more
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(folder / "partial", ignore_errors=True)
    return metrics


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
