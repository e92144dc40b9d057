"""A detector over a data set: what it finds on every picture, in COCO's format, and COCO's numbers of it.

Every picture counts once, and no result depends on the number of processes: the data set is cut into fixed chunks that
are dealt whole, and all pictures are padded to one size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from video_convmae.data.coco import CocoRecord, image_results
from video_convmae.data.datasets import BadRecord
from video_convmae.data.dense_transforms import PictureTransform
from video_convmae.data.detection import DetectionTestDataset
from video_convmae.data.loader import PictureBatch, collate_pictures, iter_batches
from video_convmae.dense.detection import Detections, paste_masks

from .coco import evaluate_everywhere
from .dense_tasks import stack_pictures
from .distributed import DistInfo, all_gather_object
from .inference import Progress, in_list_order, not_finite
from .metrics import Values
from .options import Precision
from .tasks import Normalizer, autocast
from .watchdog import heartbeat

LEAST_AP50 = 0.01  # below it a detector has not learned; predicting nothing has 0


@dataclass(frozen=True)
class DetectionInference:
    """A detector over the pictures of a data set, shared by all processes.

    pictures: the data set's.
    normalizer: bytes -> the model's input.
    size: (height, width) that pictures are padded to.
    batch_size: pictures that go through the model together.
    precision: autocast type.
    info: the processes.
    workers, start_method: loading processes of each of them.
    show: show progress.
    """

    pictures: DetectionTestDataset
    normalizer: Normalizer
    size: tuple[int, int]
    batch_size: int
    precision: Precision
    info: DistInfo
    workers: int
    start_method: str | None = None
    show: bool = False

    def evaluate(self, model: nn.Module) -> tuple[Values, list[dict[str, Any]] | None, tuple[BadRecord, ...]]:
        """Return COCO's numbers, all results (on rank 0 alone), and the pictures that could not be read.

        Args:
            model: a `Detector` on this process's device, not wrapped.

        Raises:
            NonFiniteOutput: a score or a box is not finite.
        """
        records = self.pictures.records
        results: list[dict[str, Any]] = []
        bad: list[BadRecord] = []
        for index, entries, bad_records in self.run(model, entries_of(records.categories)):
            bad += bad_records
            if not any(record.index == index for record in bad_records):
                results += entries
        bad_records = in_list_order([record for each in all_gather_object(bad) for record in each])
        failed = [record.index for record in bad_records]
        masks = model.heads.has_mask() and any(o.segmentation for record in records for o in record.objects)  # type: ignore[operator,union-attr]
        metrics, every = evaluate_everywhere(results, records, failed, masks)
        return {**metrics, "scored": len(records) - len(failed), "failed": len(failed)}, every, bad_records

    @torch.inference_mode()
    def run(
        self, model: nn.Module, convert: Callable[[CocoRecord, PictureTransform, Detections], Any]
    ) -> Iterator[tuple[int, Any, tuple[BadRecord, ...]]]:
        """Yield this process's pictures: index, what `convert` makes of the detections, and those not read."""
        records, size, info = self.pictures.records, self.batch_size, self.info
        chunks = [list(range(i, min(i + size, len(records)))) for i in range(0, len(records), size)]
        mine = chunks[info.rank :: info.world_size]
        progress, training = Progress(len(records), 0, self.show and info.is_main, "pictures"), model.training
        model.eval()
        try:
            pin_memory = info.device.type == "cuda"
            loaded = iter_batches(self.pictures, mine, self.workers, pin_memory, self.start_method, collate_pictures)
            with closing(loaded) as batches:
                for batch in batches:
                    heartbeat(f"detects on the pictures after {int(batch.records[-1])}")
                    for place, found in enumerate(self._detect(model, batch)):
                        index = int(batch.records[place])
                        bad = tuple(record for record in batch.bad_records if record.index == index)
                        yield index, convert(records[index], batch.transforms[place], found), bad
                    progress.update(len(batch.images) * info.world_size)
        finally:
            model.train(training)
            progress.close()

    def _detect(self, model: nn.Module, batch: PictureBatch) -> list[Detections]:
        images = stack_pictures(batch.images, self.normalizer, self.size)
        sizes = [(image.shape[1], image.shape[2]) for image in batch.images]
        with autocast(images.device, self.precision):
            found = model(images, sizes)
        for record, each in zip(batch.records.tolist(), found):
            if not (each.scores.isfinite().all() and each.boxes.isfinite().all()):
                raise not_finite(f"picture {record}", self.precision)
        return found


def entries_of(
    categories: Sequence[tuple[int, str]],
) -> Callable[[CocoRecord, PictureTransform, Detections], list[dict[str, Any]]]:
    """Return the conversion of detections to entries of COCO's results format."""

    def convert(record: CocoRecord, transform: PictureTransform, found: Detections) -> list[dict[str, Any]]:
        boxes, masks = on_picture(record, transform, found)
        labels, scores = found.labels.cpu().numpy(), found.scores.cpu().numpy()
        return image_results(record, categories, boxes, labels, scores, masks)

    return convert


def on_picture(
    record: CocoRecord, transform: PictureTransform, found: Detections
) -> tuple[np.ndarray, list[np.ndarray] | None]:
    """Return boxes `(K, 4)` in pixels of the file's picture, and masks `(H, W)` of its size; None: no masks."""
    boxes = transform.undo_boxes(found.boxes.double().cpu().numpy())
    if found.masks is None:
        return boxes, None
    masks = paste_masks(found.masks, torch.from_numpy(boxes), (record.height, record.width))
    return boxes, [mask.numpy() for mask in masks]


def judge_detector(metrics: Values) -> Values:
    """Return `learned`, and a `verdict` in words where a detector finds next to nothing."""
    ap50 = metrics["box_ap50"]
    if ap50 is None or ap50 >= LEAST_AP50:
        return {"learned": None if ap50 is None else True, "verdict": None}
    verdict = (
        f"hardly better than finding nothing: box AP at IoU .5 is {ap50:.2%}. Try pretrained weights (init.weights), a "
        "longer run, another optim.lr: DETECTION.md, Is it learning?"
    )
    return {"learned": False, "verdict": verdict}
