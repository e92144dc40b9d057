"""Evaluation of segmentation: sliding windows over whole pictures, a confusion matrix, mIoU, mAcc, aAcc.

Each picture is a forward pass of its own and counts once, and the matrix holds whole numbers: nothing depends on the
number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae.atomic import write_text
from video_convmae.data.datasets import BadRecord
from video_convmae.data.loader import collate_pictures, iter_batches
from video_convmae.data.segmentation import IGNORED, SegmentationTestDataset
from video_convmae.errors import UserError

from .distributed import DistInfo, all_gather_object
from .evaluation import write_bad_records
from .inference import in_list_order, not_finite
from .options import Precision
from .tasks import Normalizer, autocast
from .watchdog import heartbeat


@dataclass(frozen=True)
class SegmentationResult:
    """What a list of pictures scored.

    confusion: `(K, K)` int64 pixels; rows are labels, columns predictions.
    scored: pictures that were read; bad_records: those that were not.
    """

    confusion: np.ndarray
    scored: int
    bad_records: tuple[BadRecord, ...]

    def per_class(self) -> tuple[np.ndarray, np.ndarray]:
        """Return intersection over union and accuracy of each class; NaN where there is nothing to divide by."""
        hits = self.confusion.diagonal().astype(np.float64)
        labelled, predicted = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return hits / (labelled + predicted - hits), hits / labelled

    def metrics(self) -> dict[str, Any]:
        """Return mIoU, mAcc and aAcc as fractions, and what predicting the largest class everywhere scores.

        A class that is neither labelled nor predicted counts in no mean (mmsegmentation).
        """
        pixels = self.confusion.sum()
        values: dict[str, Any] = dict.fromkeys(("miou", "macc", "aacc", "largest_class_miou", "largest_class_aacc"))
        if pixels:
            iou, accuracy = self.per_class()
            labelled = self.confusion.sum(axis=1)
            share = labelled.max() / pixels
            values = {
                "miou": float(np.nanmean(iou)),
                "macc": float(np.nanmean(accuracy)),
                "aacc": float(self.confusion.diagonal().sum() / pixels),
                "largest_class_miou": float(share / (labelled > 0).sum()),
                "largest_class_aacc": float(share),
            }
        return values | {"scored": self.scored, "failed": len(self.bad_records)}

    def judge(self) -> dict[str, Any]:
        """Say whether mIoU is above that of always predicting the largest class, and what to try if not."""
        metrics = self.metrics()
        if metrics["miou"] is None:
            return {"learned": None, "verdict": None}
        if metrics["miou"] > metrics["largest_class_miou"]:
            return {"learned": True, "verdict": None}
        return {
            "learned": False,
            "verdict": (
                f"no better than always predicting the largest class: mIoU {metrics['miou']:.1%} against "
                f"{metrics['largest_class_miou']:.1%}. Try pretrained weights (init.weights), a longer run or another "
                "optim.lr"
            ),
        }


@dataclass(frozen=True)
class SegmentationInference:
    """A segmenter over pictures, shared by all processes.

    model: on this process's device, not wrapped; in evaluation mode while it runs.
    pictures: the test pictures.
    normalizer: bytes -> the model's input.
    logits: model and images `(1, 3, H, W)` -> logits of that size: sliding windows.
    classes: K.
    info: the processes.
    precision: autocast type.
    workers, start_method: loading processes of each of them.
    """

    model: nn.Module
    pictures: SegmentationTestDataset
    normalizer: Normalizer
    logits: Callable[[nn.Module, Tensor], Tensor]
    classes: int
    info: DistInfo
    precision: Precision = "fp32"
    workers: int = 0
    start_method: str | None = None

    def run(self, show: Callable[[int, Tensor, Tensor], None] | None = None) -> SegmentationResult:
        """Score every picture; the same on every rank.

        Args:
            show: called with the index, the image `(3, H, W)` uint8 and the predicted labels `(H', W')` int64 of each
                picture that was read, on the process that computed it.
        """
        count = len(self.pictures)
        mine = [[index] for index in range(self.info.rank, count, self.info.world_size)]
        confusion, bad_records = np.zeros((self.classes, self.classes), np.int64), []
        training = self.model.training
        self.model.eval()
        pin_memory = self.info.device.type == "cuda"
        batches = iter_batches(self.pictures, mine, self.workers, pin_memory, self.start_method, collate_pictures)
        try:
            with closing(batches):
                for batch in batches:
                    heartbeat(f"segments picture {int(batch.records[0])}")
                    bad_records += batch.bad_records
                    if batch.bad_records:
                        continue
                    height, width = batch.targets[0].shape
                    name = self.pictures.records[int(batch.records[0])].path
                    predicted = self.predict(batch.images[0], (height, width), name)
                    confusion += confusion_matrix(predicted, batch.targets[0], self.classes)
                    if show is not None:
                        show(int(batch.records[0]), batch.images[0], predicted)
        finally:
            self.model.train(training)
        everyone = all_gather_object((confusion, bad_records))
        all_bad = in_list_order([record for _, records in everyone for record in records])
        return SegmentationResult(sum(matrix for matrix, _ in everyone), count - len(all_bad), all_bad)

    @torch.inference_mode()
    def predict(self, image: Tensor, size: tuple[int, int], name: str) -> Tensor:
        """Return the labels of a picture, `(H, W)` int64 on the CPU. The model is in evaluation mode.

        Args:
            image: `(3, h, w)` uint8.
            size: (H, W).
            name: of the picture, for an error.
        """
        pixels = self.normalizer.normalise(image[None, :, None])[:, :, 0]
        with autocast(pixels.device, self.precision):
            logits = self.logits(self.model, pixels)
        if not logits.isfinite().all():
            raise not_finite(name, self.precision)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1)[0].cpu()


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> np.ndarray:
    """Return the pixels of each label (row) and prediction (column), `(K, K)` int64; ignored ones do not count."""
    try:
        from torchmetrics.functional.classification import multiclass_confusion_matrix
    except ImportError as error:
        raise UserError("torchmetrics is not installed: pip install 'video-convmae[dense]'") from error
    if (labels == IGNORED).all():  # which torchmetrics takes for an error
        return np.zeros((classes, classes), np.int64)
    matrix = multiclass_confusion_matrix(predicted, labels, classes, ignore_index=IGNORED, validate_args=False)
    return matrix.numpy().reshape(classes, classes)


def write_segmentation(
    result: SegmentationResult, folder: Path, names: Sequence[str] | None, extra: dict[str, Any]
) -> dict[str, Any]:
    """Write metrics.json, classes.json (IoU and accuracy of each) and bad_records.jsonl; return the metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    iou, accuracy = result.per_class()
    rows = [
        {
            "class": label if names is None else names[label],
            "iou": None if np.isnan(iou[label]) else float(iou[label]),
            "accuracy": None if np.isnan(accuracy[label]) else float(accuracy[label]),
        }
        for label in range(len(iou))
    ]
    write_text(folder / "classes.json", json.dumps(rows, indent=2) + "\n")
    write_bad_records(result.bad_records, folder)
    metrics = result.metrics() | result.judge() | extra
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics
