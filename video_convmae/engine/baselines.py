"""Trivial baselines of a classifier: what a list's classes can be told by without learning to see.

    largest_class    always answer the most frequent class of the training list
    motion_energy    how much changes where and when, and logistic regression
    mean_frame       the mean picture of the clip, 16 x 16 pixels, and logistic regression

They read one view of a record, in the middle, with the model's own size and sampling. They are fitted to the training
list and tested on the records that the model scored.

Letters: R records; B C T H W as everywhere.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from video_convmae.data.records import Records
from video_convmae.errors import UserError

from .evaluation import Evaluation, best_classes
from .inference import ListInference
from .probing import choose_records
from .watchdog import heartbeat

CELLS, PIXELS = 8, 16  # along a side, of motion energy and of the mean frame
MAX_RECORDS = 5000  # of the training list
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, strongest regularisation first
FOLDS = 5
TITLES = {
    "largest_class": "always answering the most frequent class",
    "motion_energy": "motion energy + logistic regression",
    "mean_frame": "mean frame + logistic regression",
}


def motion_energy(clips: Tensor) -> Tensor:
    """Return how much changes from frame to frame: clips `(B, C, T, H, W)` -> `(B, (T - 1) * 64)` float32.

    The absolute difference of neighbouring frames, grey (the mean over channels), averaged over each cell of an 8 x 8
    grid.
    """
    changes = clips.float().mean(dim=1).diff(dim=1).abs()
    return F.adaptive_avg_pool2d(changes, CELLS).flatten(1)


def mean_frame(clips: Tensor) -> Tensor:
    """Return the mean over time, shrunk to 16 x 16 pixels: clips `(B, C, T, H, W)` -> `(B, C * 256)` float32."""
    return F.adaptive_avg_pool2d(clips.float().mean(dim=2), PIXELS).flatten(1)


FEATURES = {"motion_energy": motion_energy, "mean_frame": mean_frame}


class Fit(NamedTuple):
    """A logistic regression's answers.

    answers: `(R,)` int64, the class of each record of the test list.
    top1: their accuracy.
    strength: scikit-learn's C, that of STRENGTHS with the best accuracy in cross-validation within the training list.
    """

    answers: np.ndarray
    top1: float
    strength: float


def fit_and_score(
    train_features: np.ndarray, train_labels: np.ndarray, features: np.ndarray, labels: np.ndarray
) -> Fit:
    """Fit logistic regression on standardised features, and test it; the same numbers give the same answers.

    Args:
        train_features: `(R', D)`. train_labels: `(R',)`, at least one.
        features: `(R, D)`. labels: `(R,)`.
    """
    classes, counts = np.unique(train_labels, return_counts=True)
    strength = STRENGTHS[len(STRENGTHS) // 2]
    if len(classes) == 1:  # which scikit-learn refuses
        answers = np.full(len(features), classes[0])
        return Fit(answers, float((answers == labels).mean()), strength)

    from sklearn.exceptions import ConvergenceWarning  # a second of imports, for rank 0 alone
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import StandardScaler

    def regression(strength: float) -> Pipeline:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # accuracies no longer change
        warnings.filterwarnings("ignore", "The least populated class")
        if np.sort(counts)[-2] > 1:  # two classes in every fold
            splits = StratifiedKFold(min(FOLDS, int(counts.max())), shuffle=True, random_state=0)
            accuracy = []
            for each in STRENGTHS:
                heartbeat(f"cross-validates a baseline, C {each:g}")
                accuracy.append(cross_val_score(regression(each), train_features, train_labels, cv=splits).mean())
            strength = STRENGTHS[int(np.argmax(accuracy))]  # of equal ones the strongest regularisation
        answers = regression(strength).fit(train_features, train_labels).predict(features)
    return Fit(answers, float((answers == labels).mean()), strength)


class Table(NamedTuple):
    """What the baselines read of a list: `features (R, D)` of each kind, `labels (R,)`, `failed (R,)`."""

    features: dict[str, np.ndarray]
    labels: np.ndarray
    failed: np.ndarray


def choose_training_records(records: Records) -> Records:
    """Return the list, or 5,000 of its records: evenly over the classes' shares and within each class, always the same.

    Raises:
        ValueError: no record has a label.
    """
    labelled = np.flatnonzero(records.labels >= 0)
    if not len(labelled):
        raise UserError("no record of the training list has a label: baselines need data.train with labels")
    chosen = labelled[choose_records(records.labels[labelled], min(MAX_RECORDS, len(labelled)))]
    return Records([records[int(index)] for index in chosen], records.format)


def read_table(inference: ListInference, folder: Path) -> Table:
    """Read a list for the baselines; the same on every rank.

    Args:
        inference: over one view of each record, with the model's clips.
        folder: for finished chunks.
    """
    channels, frames = inference.model.config.clip_shape[:2]
    sizes = {"motion_energy": (frames - 1) * CELLS**2, "mean_frame": channels * PIXELS**2}
    names = [name for name, size in sizes.items() if size]  # an image has no motion

    def both(clips: Tensor) -> Tensor:
        return torch.cat([FEATURES[name](clips) for name in names], dim=1)

    result = inference.run(both, (sum(sizes.values()),), folder)
    ends = np.cumsum([sizes[name] for name in names])[:-1]
    features = dict(zip(names, np.split(result.values, ends, axis=1)))
    return Table(features, inference.views.records.labels, result.failed)


class Comparison(NamedTuple):
    """Accuracies beside the model's, as fractions of the labelled records that it scored.

    top1: of each baseline.
    table: lines to print.
    verdict: a sentence, where the model is no better than the best of them; else None.
    """

    top1: dict[str, float]
    table: tuple[str, ...]
    verdict: str | None

    @property
    def metrics(self) -> dict[str, Any]:
        """Entries of metrics.json."""
        return {"baselines": self.top1, "baselines_verdict": self.verdict}


def compare(evaluation: Evaluation, training: Table, testing: Table) -> Comparison | None:
    """Fit the baselines, and compare them with a model's evaluation of the same list; None: nothing can be counted.

    A test record that the model could read and the baselines could not counts with the most frequent class.

    Args:
        evaluation: of the list of `testing`.
        training, testing: what the baselines read.
    """
    counted, read = ~evaluation.failed & (evaluation.labels >= 0), ~training.failed
    if not counted.any() or not read.any():
        return None
    labels, train_labels, unread = evaluation.labels[counted], training.labels[read], testing.failed[counted]
    largest = np.full(len(labels), np.bincount(train_labels).argmax())
    answers, notes = {"largest_class": largest}, {"largest_class": f"class {largest[0]}"}
    for name, features in testing.features.items():
        fit = fit_and_score(training.features[name][read], train_labels, features[counted], labels)
        answers[name] = np.where(unread, largest, fit.answers)
        notes[name] = f"C {fit.strength:g}"
    hits = {name: each == labels for name, each in answers.items()}
    top1 = {name: float(each.mean()) for name, each in hits.items()}
    ours = best_classes(evaluation.scores[counted], 1)[:, 0] == labels
    lines = [
        f"top-1 on {len(labels)} records; baselines are fitted to {len(train_labels)} training records",
        *(f"  {TITLES[name]:42s}{value:8.2%}  ({notes[name]})" for name, value in top1.items()),
        f"  {'the model':42s}{ours.mean():8.2%}",
    ]
    if "motion_energy" not in answers:
        lines.append("  (no motion energy: a clip is one frame)")
    return Comparison(top1, tuple(lines), _verdict(ours, hits))


def _verdict(ours: np.ndarray, hits: Mapping[str, np.ndarray]) -> str | None:
    """Return a sentence unless the model is above the best baseline by more than one standard error.

    Args:
        ours: `(R,)` bool, the records that the model got right.
        hits: the same of each baseline.
    """
    best = max(hits, key=lambda name: hits[name].mean())
    difference = ours.astype(float) - hits[best]
    count = len(difference)
    error = difference.std(ddof=1) / math.sqrt(count) if count > 1 else math.inf  # of the paired difference
    if difference.mean() > error + 1e-9:  # one record more of n is exactly one standard error
        return None
    return (
        f"the model is no better than {TITLES[best]} ({hits[best].mean():.1%} against {ours.mean():.1%} of {count} "
        f"records, standard error of the difference {error:.1%}): start from pretrained weights (init.weights), train "
        "for more steps, or weaken data.augmentation (docs/evaluation.md#baselines)"
    )
