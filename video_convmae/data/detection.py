"""Data sets of detection: a record in COCO's format -> a picture, with the boxes, classes and masks on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .coco import CocoRecord, CocoRecords
from .datasets import BadRecord, SampleKey, read_or_replace, read_picture
from .decoding import DecodeError
from .decoding.memory import MemoryReader
from .decoding.process import ReaderProcess
from .dense_transforms import PADDING, PictureTransform, draw_jitter, resize_for_test
from .masks import Segmentation, draw_mask, tight_box
from .options import JitterConfig


class DetectionSample(NamedTuple):
    """A picture and the objects on it.

    Attributes:
        image: `(3, H, W)` uint8.
        target: as torchvision's detection models take it: `boxes` (K, 4) float32, x1 y1 x2 y2 in pixels; `labels` (K,)
            int64, from 1; `masks` (K, H, W) uint8, only where every object has one; `image_id`, an int.
        transform: from the file's picture to `image`; its `undo_boxes` takes detections back.
        index: the record shown.
        bad_records: records that could not be read.
    """

    image: Tensor
    target: dict[str, Any]
    transform: PictureTransform
    index: int  # type: ignore[assignment]
    bad_records: tuple[BadRecord, ...]


@dataclass(eq=False)
class DetectionDataset(Dataset[DetectionSample]):
    """Training pictures with large-scale jitter; a function of (seed, epoch, record index) alone, like `ClipDataset`.

    Args:
        records: the data set.
        augmentation: the jitter.
        reader: decodes in a process that can be killed, or keeps what it has decoded.
        seed: of the run.
        attempts: records tried for one sample before giving up.
    """

    records: CocoRecords
    augmentation: JitterConfig
    reader: ReaderProcess | MemoryReader
    seed: int = 0
    attempts: int = 10

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: SampleKey) -> DetectionSample:
        """Return a record's picture, or that of a replacement if it is bad. Raises as `read_or_replace` does."""

        def read(record: CocoRecord, generator: Callable[[int], torch.Generator]) -> tuple[Any, ...]:
            pixels = read_pixels(record, self.reader)
            transform = draw_jitter(record.height, record.width, self.augmentation, generator(0))
            return transform.picture(pixels), detection_target(record, transform), transform

        sample, index, bad_records = read_or_replace(self.records, key, self.seed, self.attempts, read)
        image, target, transform = sample
        return DetectionSample(image, target, transform, index, bad_records)


@dataclass(eq=False)
class DetectionTestDataset(Dataset[DetectionSample]):
    """Test pictures, resized. Nothing is random; a bad record is grey, has no objects, and is reported.

    Args:
        records: the data set.
        augmentation: its test sizes.
        reader: decodes in a process that can be killed.
    """

    records: CocoRecords
    augmentation: JitterConfig
    reader: ReaderProcess | MemoryReader

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> DetectionSample:
        """Return a record's picture."""
        record = self.records[index]
        transform = resize_for_test(record.height, record.width, self.augmentation)
        bad_records: tuple[BadRecord, ...] = ()
        try:
            pixels = read_pixels(record, self.reader)
        except DecodeError as error:
            pixels = np.full((record.height, record.width, 3), PADDING, dtype=np.uint8)
            record = CocoRecord(record.path, record.image_id, record.height, record.width, ())
            bad_records = (BadRecord(index, record.path, str(error)),)
        return DetectionSample(
            transform.picture(pixels), detection_target(record, transform), transform, index, bad_records
        )


def read_pixels(record: CocoRecord, reader: ReaderProcess | MemoryReader) -> np.ndarray:
    """Return a picture, uint8 `(H, W, 3)`. Raises DecodeError: it cannot be read, or has not the size of the JSON."""
    pixels = read_picture(record.path, reader)
    if pixels.shape[:2] != (record.height, record.width):
        height, width = pixels.shape[:2]
        turned = " (turned as its EXIF data says)" if (width, height) == (record.height, record.width) else ""
        raise DecodeError(
            f"{record.path}: is {width}x{height}{turned}; the annotations say {record.width}x{record.height}"
        )
    return pixels


def detection_target(record: CocoRecord, transform: PictureTransform) -> dict[str, Any]:
    """Return the objects on a transformed picture: those of which something is seen, without crowd regions.

    A box is the annotated one, transformed; of an object that the crop cuts it is that of the visible part of its mask.
    """
    boxes, labels, masks = [], [], []
    has_masks = all(each.segmentation is not None for each in record.objects if not each.crowd)
    for each in record.objects:
        if each.crowd:
            continue
        x, y, width, height = each.box
        whole = transform.boxes(np.array([[x, y, x + width, y + height]]))
        box = transform.cut(whole)[0]
        if not _is_seen(box):
            continue
        if each.segmentation is not None:
            mask = transformed_mask(each.segmentation, transform)
            visible = tight_box(mask)
            if visible is None:
                continue
            # A box may end a fraction of a pixel outside its picture; that is no cut.
            if np.abs(whole[0] - box).max() > 0.5:
                box = np.array(visible, dtype=np.float64)
            masks.append(mask)
        boxes.append(box)
        labels.append(each.label)
    target: dict[str, Any] = {
        "boxes": torch.from_numpy(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "image_id": record.image_id,
    }
    if has_masks:
        stack = np.zeros((len(masks), *transform.frame), dtype=np.uint8)
        for place, mask in enumerate(masks):
            stack[place, : mask.shape[0], : mask.shape[1]] = mask
        target["masks"] = torch.from_numpy(stack)
    return target


def transformed_mask(segmentation: Segmentation, transform: PictureTransform) -> np.ndarray:
    """Return a mask in the crop of a transform: polygons are drawn at its size, run lengths take the nearest pixel."""
    if isinstance(segmentation, dict):
        return transform.mask(draw_mask(segmentation, *transform.source))
    polygons = [transform.points(np.array(polygon).reshape(-1, 2)).reshape(-1).tolist() for polygon in segmentation]
    return draw_mask(polygons, *transform.crop)


def _is_seen(box: np.ndarray) -> bool:
    """Return whether a box that was cut to the crop has both a width and a height, of a hundredth of a pixel or more.

    A box without would have an infinite logarithm in the box loss.
    """
    return bool(box[2] - box[0] >= 0.01 and box[3] - box[1] >= 0.01)
