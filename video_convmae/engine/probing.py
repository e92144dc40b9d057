"""Probes beside pretraining: what can be read from a model's features, on a labelled list.

A feature is the mean over a clip's tokens and, of a video, how much they change over time. The list is cut into two
halves, and each is classified by what the other teaches, so one labelled list is enough and nothing is tested on what
it was fitted to.

Letters: R records, D width of a token.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from video_convmae.models.pooling import pool_features, pooled_width
from video_convmae.models.probe import KNNHead
from video_convmae.models.pytorchvideo import LibraryClassifier
from video_convmae.models.sizes import Pool

from .distributed import broadcast_object
from .evaluation import write_bad_records
from .inference import ListInference
from .metrics import Values, effective_rank
from .options import ProbeConfig
from .watchdog import heartbeat

TIME_SHARE = 0.05  # of the training time
MEASUREMENTS = 20
RECORDS_OF_CLASS = 20  # measured less often rather than with fewer: at 160 records, a standard error of 3 to 4 points


class ProbePlan(NamedTuple):
    """Optimizer steps between two measurements, and the records of each."""

    every: int
    records: int


def plan_probe(
    config: ProbeConfig, *, steps: int, steps_per_epoch: int, batch: int, cost: float, available: int, classes: int
) -> ProbePlan:
    """Choose what the options leave open, so that all measurements together take 5% of the training time.

    The rule reads no clock: a resumed run, on any machine, measures the same records. A run that is too short for two
    records a class at its start and its end takes longer.

    Args:
        config: the options.
        steps, steps_per_epoch: of the run.
        batch: records of one optimizer step, repeats not counted.
        cost: time of a measured record over that of a training record.
        available, classes: records and classes of the list.
    """
    affordable = TIME_SHARE * steps * batch / cost
    if config.every is None:
        wanted = config.records or min(available, RECORDS_OF_CLASS * classes)
        count = min(MEASUREMENTS, max(2, int(affordable / wanted)))
        every = math.ceil(steps / (count - 1))
    else:
        every = max(1, round(config.every * steps_per_epoch))
    count = 1 + math.ceil(steps / every)  # before the first step and after the last, too
    records = config.records or max(2 * classes, int(affordable / count))
    return ProbePlan(every, min(records, available))


def choose_records(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose `count` places of `labels (R,)`, evenly over the classes and within each; ascending."""
    order = np.argsort(labels, kind="stable")
    return np.sort(order[np.arange(count) * len(order) // count])


def first_half(labels: np.ndarray) -> np.ndarray:
    """Return `(R,)` bool: every second record of each class."""
    first = np.zeros(len(labels), bool)
    first[np.argsort(labels, kind="stable")[::2]] = True
    return first


def measure_probe(inference: ListInference, folder: Path) -> Values:
    """Measure a pretrained model's features; the same on every rank.

    A record that cannot be read is left out, and written to `folder/bad_records.jsonl`.

    Returns:
        Those of `probe_features`, and how many records were `scored` and how many `failed`.
    """
    model, info, labels = inference.model, inference.info, inference.views.records.labels
    assert not isinstance(model, LibraryClassifier)  # none is pretrained
    config = model.encoder.config
    frames = config.grid[0]
    # The mean hardly depends on what moves: of the demo's model, logistic regression with 1,000 labels reads 18% from
    # it and 47% with the difference in time beside it (chance 12.5%).
    pool: Pool = "mean" if frames == 1 else "difference"
    result = inference.run(
        lambda clips: pool_features(model.encode(clips).float(), [], pool, frames), (pooled_width(config, pool),)
    )
    values: Values = {}
    if info.is_main:
        heartbeat("fits the probes")
        folder.mkdir(parents=True, exist_ok=True)
        write_bad_records(result.bad_records, folder)
        read = ~result.failed
        values = probe_features(result.values[read], labels[read], first_half(labels)[read])
        values |= {"scored": int(read.sum()), "failed": int(result.failed.sum())}
    return broadcast_object(values)


def probe_features(features: np.ndarray, labels: np.ndarray, first: np.ndarray) -> Values:
    """Measure features `(R, D)` with `labels (R,)`, of which `first (R,)` are one half.

    Returns:
        knn_top1, linear_top1: accuracy of the nearest neighbours (`KNNHead`) and of logistic regression on standardised
            features, over both halves; None where a half is empty.
        rank: `effective_rank`.
        std: deviation over the records, the mean over the D values; 0: every record has the same feature.
    """
    values: Values = {"knn_top1": None, "linear_top1": None, "rank": None, "std": None}
    if len(features):
        values |= {"rank": effective_rank(features), "std": float(features.std(axis=0, dtype=np.float64).mean())}
    if first.any() and not first.all():
        for name, classify in (("knn_top1", _nearest), ("linear_top1", _linear)):
            hits = [
                classify(features[fitted], labels[fitted], features[~fitted]) == labels[~fitted]
                for fitted in (first, ~first)
            ]
            values[name] = float(np.concatenate(hits).mean())
    return values


def _nearest(features: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Classify `others` by the nearest of the labelled features."""
    head = KNNHead(features.shape[1], int(labels.max()) + 1)
    head.fit(head.embed(torch.from_numpy(features)[:, None]), torch.from_numpy(labels))
    return head(torch.from_numpy(others)[:, None]).argmax(dim=1).numpy()


def _linear(features: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Classify `others` by logistic regression on the labelled features."""
    from sklearn.linear_model import LogisticRegression  # a second of imports that only rank 0 needs
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) == 1:  # which scikit-learn refuses
        return np.full(len(others), labels[0])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may end before it has converged
        return model.fit(features.astype(np.float64), labels).predict(others.astype(np.float64))
