"""Transforms of a picture together with the boxes, polygons and masks on it: flip, resize, crop, pad.

A drawn transform is data (`PictureTransform`), made from the picture's size and a generator. Every part of it maps
pixel edges to pixel edges: a coordinate x of a picture W wide lies from 0 (left edge of the first pixel) to W.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .options import JitterConfig

PADDING = 128  # grey of a padded pixel, as in detectron2's FixedSizeCrop


@dataclass(frozen=True)
class PictureTransform:
    """A transform of a picture, in this order: flip, resize, crop, pad at the bottom and at the right.

    Args:
        source: (height, width) of the picture.
        resized: (height, width) that it is resized to.
        crop: (height, width) of the part that is kept.
        frame: (height, width) of the result; the crop lies in its top left corner.
        top, left: of the crop in the resized picture.
        flip: mirror the picture.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    frame: tuple[int, int]
    top: int = 0
    left: int = 0
    flip: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the resized picture for one of the source, (down, across)."""
        return self.resized[0] / self.source[0], self.resized[1] / self.source[1]

    def picture(self, pixels: np.ndarray) -> Tensor:
        """Transform a picture: uint8 `(H, W, 3)` -> uint8 `(3, *frame)`, contiguous."""
        (down, across), (height, width) = self.scale, self.crop
        source_width = self.source[1]
        left, right = self.left / across, (self.left + width) / across
        if self.flip:  # crop the mirrored part, then mirror it: fewer pixels
            left, right = source_width - right, source_width - left
        # Only what is seen is resized: at twice the size that is a quarter of the pixels.
        box = (
            max(0.0, left),
            self.top / down,
            min(right, source_width),
            min((self.top + height) / down, self.source[0]),
        )
        part = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box))
        result = np.full((3, *self.frame), PADDING, dtype=np.uint8)
        result[:, :height, :width] = (part[:, ::-1] if self.flip else part).transpose(2, 0, 1)
        return torch.from_numpy(result)

    def points(self, points: np.ndarray) -> np.ndarray:
        """Transform points (x, y): `(N, 2)` -> `(N, 2)` float64; those outside the crop stay outside."""
        down, across = self.scale
        x = self.source[1] - points[:, 0] if self.flip else points[:, 0]
        return np.stack([x * across - self.left, points[:, 1] * down - self.top], axis=1)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Transform boxes (x1, y1, x2, y2): `(K, 4)` -> `(K, 4)` float64; not cut to the crop."""
        corners = self.points(boxes.reshape(-1, 2)).reshape(-1, 4)
        return corners[:, [2, 1, 0, 3]] if self.flip else corners

    def undo_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Invert `boxes`, and cut to the source: boxes in the frame -> boxes in the picture."""
        down, across = self.scale
        boxes = (boxes + np.array([self.left, self.top] * 2)) / np.array([across, down] * 2)
        height, width = self.source
        if self.flip:
            boxes = boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [width, 0, width, 0]
        return boxes.clip(0, [width, height, width, height])

    def cut(self, boxes: np.ndarray) -> np.ndarray:
        """Cut transformed boxes to the crop; what lies outside becomes empty."""
        height, width = self.crop
        return boxes.clip(0, [width, height, width, height])

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Transform a mask or label map by the nearest pixel: `(H, W)` -> `crop`, of the same type."""
        (down, across), (height, width) = self.scale, self.crop
        rows = ((np.arange(height) + self.top + 0.5) / down).astype(np.int64).clip(0, self.source[0] - 1)
        columns = ((np.arange(width) + self.left + 0.5) / across).astype(np.int64).clip(0, self.source[1] - 1)
        return mask[rows[:, None], self.source[1] - 1 - columns if self.flip else columns]


def draw_jitter(
    height: int, width: int, config: JitterConfig, generator: torch.Generator | None = None
) -> PictureTransform:
    """Draw detectron2's large-scale jitter: flip, resize to a random scale, crop of a fixed size.

    At scale 1 the longer side is `config.size`. A picture that is larger than the crop in a direction is cut at a
    random place, which is one number for both directions, as in detectron2's FixedSizeCrop; one that is smaller is
    padded, or stays smaller (`config.pad`).

    Args:
        height, width: of the picture.
        config: sizes.
        generator: source of the numbers: flip, scale, place.
    """
    numbers = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    least, most = config.scales
    scale = (least + numbers[1] * (most - least)) * config.size / max(height, width)
    resized = max(1, round(height * scale)), max(1, round(width * scale))
    crop = min(resized[0], config.size), min(resized[1], config.size)
    top, left = (round(numbers[2] * (whole - part)) for whole, part in zip(resized, crop))
    frame = (config.size, config.size) if config.pad else crop
    return PictureTransform((height, width), resized, crop, frame, top, left, config.flip and numbers[0] < 0.5)


def fit(height: int, width: int, shortest: float, longest: float) -> tuple[int, int]:
    """Return (height, width) of a picture whose shorter side is `shortest`, or less where the longer would be above."""
    scale = min(shortest / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_for_test(height: int, width: int, config: JitterConfig) -> PictureTransform:
    """Return the transform of a test picture: shorter side to `test_shortest`, longer to `test_longest` at most.

    Where training pads, a picture that fits into the training size is padded to it too.
    """
    resized = fit(height, width, config.test_shortest, config.test_longest)
    pads = config.pad and max(resized) <= config.size
    return PictureTransform((height, width), resized, resized, (config.size, config.size) if pads else resized)
