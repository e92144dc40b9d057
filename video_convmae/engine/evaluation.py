"""Evaluation of a classifier on a list: softmax of each view, the mean over a record's views, accuracy."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from video_convmae.atomic import replacing, write_text
from video_convmae.data.datasets import BadRecord
from video_convmae.data.records import Records
from video_convmae.errors import UserError

from .inference import ListInference


@dataclass(frozen=True)
class Evaluation:
    """The scores of a list, in its order.

    scores: `(R, classes)` float32, softmax averaged over the views; zeros where the record could not be read.
    labels: `(R,)` int64, -1 where the list has none.
    failed: `(R,)` bool.
    bad_records: records that could not be read, with their errors.
    new: records that this attempt scored, not an earlier one.
    """

    scores: np.ndarray
    labels: np.ndarray
    failed: np.ndarray
    bad_records: tuple[BadRecord, ...]
    new: int = 0

    def metrics(self) -> dict[str, float | int | None]:
        """Return accuracies as fractions of the labelled records that were read; None if there are none.

        Beside them the shares of the most frequent class, which is the accuracy of always answering it, and of the
        class that is predicted most often.
        """
        counted = ~self.failed & (self.labels >= 0)
        labels, best = self.labels[counted], best_classes(self.scores[counted], 5)
        first_of_each = best[:, 0]
        first, hits = first_of_each == labels, (best == labels[:, None]).any(axis=1)
        of_class = [first[labels == label].mean() for label in np.unique(labels)]
        return {
            "top1": float(first.mean()) if len(labels) else None,
            "top5": float(hits.mean()) if len(labels) else None,
            "mean_class_accuracy": float(np.mean(of_class)) if of_class else None,
            "largest_class": float(np.bincount(labels).max() / len(labels)) if len(labels) else None,
            "predicted_largest": float(np.bincount(first_of_each).max() / len(labels)) if len(labels) else None,
            "scored": int((~self.failed).sum()),
            "failed": int(self.failed.sum()),
        }

    def judge(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Compare top-1 with always answering the most frequent class.

        Args:
            names: of the classes; None: they are numbered.

        Returns:
            learned: True if top-1 is above that class's share by more than a standard error of a proportion; None if
                no labelled record was read.
            verdict: a sentence that says so and what to try, where it is not.
        """
        labels = self.labels[~self.failed & (self.labels >= 0)]
        if not len(labels):
            return {"learned": None, "verdict": None}
        top1, largest = self.metrics()["top1"], int(np.bincount(labels).argmax())
        share = float((labels == largest).mean())
        error = math.sqrt(share * (1 - share) / len(labels))
        assert top1 is not None
        if top1 > share + error:
            return {"learned": True, "verdict": None}
        name = f"class {largest}" if names is None else repr(names[largest])
        verdict = (
            f"no better than always answering {name}: top-1 {top1:.1%} of {len(labels)} records, of which {share:.1%} "
            f"are {name} (standard error {error:.1%}). Try pretrained weights (init.weights), a longer run, another "
            "optim.lr, weaker data.augmentation: docs/finetuning.md, Is it learning?"
        )
        return {"learned": False, "verdict": verdict}


def best_classes(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the classes of the `count` highest scores (or all), best first: `(R, classes)` -> `(R, count)`."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def evaluate_list(inference: ListInference, num_classes: int, folder: Path | None = None) -> Evaluation:
    """Score every record of a list; the same on every rank.

    Args:
        inference: a model that returns logits, over the list.
        num_classes: length of a row of logits.
        folder: for finished chunks; None: they are not stored, and no progress is shown.
    """

    def class_scores(clips: Tensor) -> Tensor:
        return inference.model(clips).float().softmax(dim=1)

    result = inference.run(class_scores, (num_classes,), folder)
    labels = inference.views.records.labels
    return Evaluation(result.values, labels, result.failed, result.bad_records, result.new)


def write_evaluation(evaluation: Evaluation, records: Records, folder: Path, extra: dict[str, Any]) -> dict[str, Any]:
    """Write predictions.csv, scores.npz, bad_records.jsonl and metrics.json; remove the stored chunks.

    Args:
        evaluation: of `records`.
        records: the list.
        folder: created if missing.
        extra: further entries of metrics.json.

    Returns:
        The contents of metrics.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_predictions(evaluation, records, folder / "predictions.csv")
    paths = np.array([record.path for record in records])
    with replacing(folder / "scores.npz", "wb") as file:
        np.savez(file, scores=evaluation.scores, labels=evaluation.labels, failed=evaluation.failed, records=paths)
    write_bad_records(evaluation.bad_records, folder)
    metrics = evaluation.metrics() | extra
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(folder / "partial", ignore_errors=True)
    return metrics


def read_evaluation(folder: Path) -> tuple[Evaluation, list[str]]:
    """Read what `write_evaluation` wrote: the scores, and the paths of the records.

    Raises:
        UserError: scores.npz is damaged.
    """
    path = folder / "scores.npz"
    try:
        with np.load(path) as file:
            scores, labels, failed, records = (file[name] for name in ("scores", "labels", "failed", "records"))
    except (ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): evaluate again into another folder") from error
    return Evaluation(scores, labels, failed, ()), records.tolist()


def write_bad_records(bad_records: Sequence[BadRecord], folder: Path) -> None:
    """Write bad_records.jsonl; without bad records there is none."""
    path = folder / "bad_records.jsonl"
    if bad_records:
        write_text(path, "".join(json.dumps(record._asdict()) + "\n" for record in bad_records))
    else:
        path.unlink(missing_ok=True)


def _write_predictions(evaluation: Evaluation, records: Records, path: Path) -> None:
    """Write a row for each record that was read, in the list's order: record, label, best classes, their scores."""
    count = min(5, evaluation.scores.shape[1])
    best = best_classes(evaluation.scores, count)
    with replacing(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        places = range(1, count + 1)
        writer.writerow(["record", "label", *(f"pred{i}" for i in places), *(f"score{i}" for i in places)])
        for index, record in enumerate(records):
            if not evaluation.failed[index]:
                scores = (f"{evaluation.scores[index, c]:.6g}" for c in best[index])
                label = "" if record.label is None else record.label
                writer.writerow([record.path, label, *best[index], *scores])
