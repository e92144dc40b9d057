"""Evaluation of a classifier on a list: softmax of each view, the mean over a record's views, accuracy and F1.

Of records with several classes each (multi-label): the sigmoid in place of softmax, mAP in place of accuracy.
"""

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

ADVICE = (
    "Try pretrained weights (init.weights), a longer run, another optim.lr, weaker data.augmentation: "
    "docs/finetuning.md, Is it learning?"
)
SHUFFLES = 20  # orders of the records that mAP is compared with: 7 s for 10,000 records of 300 classes, on a busy core


@dataclass(frozen=True)
class Evaluation:
    """The scores of a list, in its order.

    scores: `(R, classes)` float32, softmax averaged over the views; zeros where the record could not be read. Of
        several classes each, the sigmoid.
    labels: `(R,)` int64, -1 where the list has none; of several classes the first.
    failed: `(R,)` bool.
    bad_records: records that could not be read, with their errors.
    new: records that this attempt scored, not an earlier one.
    targets: `(R, classes)` bool, where records may have several classes; None: they have one.
    """

    scores: np.ndarray
    labels: np.ndarray
    failed: np.ndarray
    bad_records: tuple[BadRecord, ...]
    new: int = 0
    targets: np.ndarray | None = None

    def metrics(self) -> dict[str, float | int | None]:
        """Return accuracies as fractions of the labelled records that were read, and macro F1; None if there are none.

        Beside them the shares of the most frequent class, which is the accuracy of always answering it, and of the
        class that is predicted most often. Of records with several classes each: mAP, that of scores which tell
        nothing (`chance_map`, the mean share of a class), and macro F1 of the scores above 0.5.
        """
        counted = ~self.failed & (self.labels >= 0)
        counts: dict[str, float | int | None] = {"scored": int((~self.failed).sum()), "failed": int(self.failed.sum())}
        if self.targets is not None:
            targets, scores = self.targets[counted], self.scores[counted]
            seen = targets.any(axis=0)
            return {
                "map": mean_average_precision(targets, scores),
                "chance_map": float(targets[:, seen].mean()) if seen.any() else None,
                "macro_f1": macro_f1(targets, scores > 0.5) if len(targets) else None,
                **counts,
            }
        labels, best = self.labels[counted], best_classes(self.scores[counted], 5)
        first_of_each = best[:, 0]
        first, hits = first_of_each == labels, (best == labels[:, None]).any(axis=1)
        of_class = [first[labels == label].mean() for label in np.unique(labels)]
        return {
            "top1": float(first.mean()) if len(labels) else None,
            "top5": float(hits.mean()) if len(labels) else None,
            "mean_class_accuracy": float(np.mean(of_class)) if of_class else None,
            "macro_f1": _f1_of_labels(labels, first_of_each) if len(labels) else None,
            "largest_class": float(np.bincount(labels).max() / len(labels)) if len(labels) else None,
            "predicted_largest": float(np.bincount(first_of_each).max() / len(labels)) if len(labels) else None,
            **counts,
        }

    def judge(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Compare top-1 with always answering the most frequent class; where records have several, mAP with chance.

        Args:
            names: of the classes; None: they are numbered.

        Returns:
            learned: True if top-1 is above that class's share by more than a standard error of a proportion, or mAP
                above that of the same scores dealt to other records by more than its standard deviation; None if no
                labelled record was read.
            verdict: a sentence that says so and what to try, where it is not.
        """
        counted = ~self.failed & (self.labels >= 0)
        labels = self.labels[counted]
        if not len(labels):
            return {"learned": None, "verdict": None}
        if self.targets is not None:
            return _judge_several(self.targets[counted], self.scores[counted])
        top1, largest = self.metrics()["top1"], int(np.bincount(labels).argmax())
        share = float((labels == largest).mean())
        error = math.sqrt(share * (1 - share) / len(labels))
        assert top1 is not None
        if top1 > share + error:
            return {"learned": True, "verdict": None}
        name = f"class {largest}" if names is None else repr(names[largest])
        verdict = (
            f"no better than always answering {name}: top-1 {top1:.1%} of {len(labels)} records, of which {share:.1%} "
            f"are {name} (standard error {error:.1%}). {ADVICE}"
        )
        return {"learned": False, "verdict": verdict}


def _judge_several(targets: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Judge the mAP of `(R, classes)` by that of the same scores in other orders of the records.

    A list of few records gives scores that tell nothing more than the share of a class, `chance_map`: their order is
    compared with others, and equal scores with themselves.
    """
    seen = np.flatnonzero(targets.any(axis=0))
    if not len(seen):
        return {"learned": None, "verdict": None}
    random, count = np.random.default_rng(0), len(scores)
    orders = np.stack([np.arange(count), *(random.permutation(count) for _ in range(SHUFFLES))])
    every = np.zeros(len(orders))
    for c in seen:
        falling, last = _thresholds(scores[:, c])
        every += _average_precisions(targets[:, c][orders[:, falling]], last) / len(seen)
    found, mean, deviation = every[0], every[1:].mean(), every[1:].std()
    if found > mean + deviation + 1e-9:  # of rounding, where all are equal
        return {"learned": True, "verdict": None}
    verdict = (
        f"no better than chance: mAP {found:.1%} of {len(scores)} records, and {mean:.1%} where their scores are dealt "
        f"to other records (standard deviation {deviation:.1%}). {ADVICE}"
    )
    return {"learned": False, "verdict": verdict}


def average_precision(targets: np.ndarray, scores: np.ndarray) -> float:
    """Return the average precision of a class: the sum of precision times the rise of recall, over falling thresholds.

    Args:
        targets: `(R,)` bool, at least one True.
        scores: `(R,)`; equal scores have one threshold.
    """
    order, last = _thresholds(scores)
    return float(_average_precisions(targets[order], last))


def _thresholds(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of falling scores, and in it the last place of each group of equal ones."""
    order = np.argsort(-scores, kind="stable")
    return order, np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)


def _average_precisions(ordered: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the average precision of targets `(..., R)` in the order of falling scores: `(...)`."""
    hits = np.cumsum(ordered, axis=-1)[..., last]
    precision, recall = hits / (last + 1), hits / hits[..., -1:]
    return (precision * np.diff(recall, axis=-1, prepend=0)).sum(axis=-1)


def mean_average_precision(targets: np.ndarray, scores: np.ndarray) -> float | None:
    """Return mAP of `(R, classes)`: the mean over the classes that some record has; None if there is none."""
    seen = np.flatnonzero(targets.any(axis=0))
    return float(np.mean([average_precision(targets[:, c], scores[:, c]) for c in seen])) if len(seen) else None


def macro_f1(targets: np.ndarray, answers: np.ndarray) -> float:
    """Return the mean of the classes' F1, of `(R, classes)` bool; a class that is neither there nor answered counts 0.

    So scikit-learn's `f1_score(targets, answers, average="macro", zero_division=0)`.
    """
    hits, named = (targets & answers).sum(axis=0), targets.sum(axis=0) + answers.sum(axis=0)
    return float((2 * hits / np.maximum(named, 1)).mean())


def _f1_of_labels(labels: np.ndarray, answers: np.ndarray) -> float:
    """Return macro F1 of one class each, over the classes that are there or answered, as scikit-learn's."""
    classes = np.union1d(labels, answers)
    return macro_f1(labels[:, None] == classes, answers[:, None] == classes)


def best_classes(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the classes of the `count` highest scores (or all), best first: `(R, classes)` -> `(R, count)`."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def class_scores(logits: Tensor, multi_label: bool) -> Tensor:
    """Return the probabilities of `(B, classes)`: of one class each the softmax, of several the sigmoid."""
    return logits.float().sigmoid() if multi_label else logits.float().softmax(dim=1)


def evaluate_list(
    inference: ListInference, num_classes: int, folder: Path | None = None, multi_label: bool = False
) -> Evaluation:
    """Score every record of a list; the same on every rank.

    Args:
        inference: a model that returns logits, over the list.
        num_classes: length of a row of logits.
        folder: for finished chunks; None: they are not stored, and no progress is shown.
        multi_label: records may have several classes.
    """

    result = inference.run(lambda clips: class_scores(inference.model(clips), multi_label), (num_classes,), folder)
    records = inference.views.records
    targets = records.targets(num_classes) if multi_label else None
    return Evaluation(result.values, records.labels, result.failed, result.bad_records, result.new, targets)


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
        labels = evaluation.labels if evaluation.targets is None else evaluation.targets
        np.savez(file, scores=evaluation.scores, labels=labels, failed=evaluation.failed, records=paths)
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
    targets = labels if labels.ndim == 2 else None
    if targets is not None:
        labels = np.where(targets.any(axis=1), targets.argmax(axis=1), -1)
    return Evaluation(scores, labels, failed, (), 0, targets), records.tolist()


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
                writer.writerow([record.path, record.label_text, *best[index], *scores])
