"""Pictures with the boxes, masks, names and scores of objects."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from video_convmae.data.coco import CocoRecords
from video_convmae.data.decoding import DecodeError
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.detection import read_pixels
from video_convmae.data.masks import draw_mask, encode_mask

OPACITY = 0.45  # of a mask
LEAST_SCORE = 0.5  # of a drawn detection of an evaluation
MOST_PICTURES = 32  # of an evaluation that are drawn


@dataclass(frozen=True)
class Drawn:
    """One object: class name, score, box (x1, y1, x2, y2) in pixels, mask `(H, W)` of the picture's size or None."""

    name: str
    score: float
    box: tuple[float, ...]
    mask: np.ndarray | None

    def as_entry(self) -> dict[str, Any]:
        """Return it as an entry like those of COCO's results: box as x, y, width, height, mask as run lengths."""
        x1, y1, x2, y2 = self.box
        entry: dict[str, Any] = {"name": self.name, "score": self.score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        return entry if self.mask is None else entry | {"segmentation": encode_mask(self.mask)}


def draw(pixels: np.ndarray, objects: Sequence[Drawn]) -> Image.Image:
    """Draw objects on a picture, uint8 `(H, W, 3)`; each in a colour of its own, the best on top."""
    painted = pixels.astype(np.float32)
    colours = [_colour(place) for place in range(len(objects))]
    for each, colour in reversed(list(zip(objects, colours))):
        if each.mask is not None:
            inside = each.mask != 0
            painted[inside] = (1 - OPACITY) * painted[inside] + OPACITY * np.array(colour, dtype=np.float32)
    picture = Image.fromarray(painted.round().astype(np.uint8))
    canvas = ImageDraw.Draw(picture)
    size = max(10, round(min(picture.size) / 32))
    font = ImageFont.load_default(size)
    for each, colour in reversed(list(zip(objects, colours))):
        canvas.rectangle(each.box, outline=colour, width=max(1, size // 6))
        text, place = f"{each.name} {each.score:.2f}", (each.box[0], max(0.0, each.box[1] - size - 2))
        canvas.rectangle(canvas.textbbox(place, text, font), fill=colour)
        canvas.text(place, text, fill="black", font=font)
    return picture


def draw_results(
    records: CocoRecords, results: Sequence[dict[str, Any]], folder: Path, least: float = LEAST_SCORE
) -> None:
    """Draw detections on the first pictures of a data set, as `folder/IMAGE_ID.png`; unreadable ones are left out.

    Args:
        records: the data set.
        results: in COCO's format.
        folder: created if missing.
        least: score from which a detection is drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(records.categories)
    of_picture: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        of_picture.setdefault(result["image_id"], []).append(result)
    with ReaderProcess("pyav", max_side=None) as reader:
        for record in [records[index] for index in range(min(MOST_PICTURES, len(records)))]:
            found = [each for each in of_picture.get(record.image_id, []) if each["score"] >= least]
            objects = []
            for each in sorted(found, key=lambda each: -each["score"]):
                x, y, width, height = each["bbox"]
                mask = draw_mask(each["segmentation"], record.height, record.width) if "segmentation" in each else None
                objects.append(Drawn(names[each["category_id"]], each["score"], (x, y, x + width, y + height), mask))
            try:
                draw(read_pixels(record, reader), objects).save(folder / f"{record.image_id}.png")
            except DecodeError:
                continue


def _colour(place: int) -> tuple[int, int, int]:
    """Return a bright colour; neighbours in order are far apart in hue."""
    red, green, blue = colorsys.hsv_to_rgb(place * 0.618034 % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
