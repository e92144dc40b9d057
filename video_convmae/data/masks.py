"""Masks of objects as COCO writes them: polygons and run lengths -> pixels, and back.

Run lengths are read here; polygons are drawn, and masks encoded, by COCO's own code as faster-coco-eval ships it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .text import ListError

Segmentation = list[list[float]] | dict[str, Any]  # polygons x1 y1 x2 y2 ..., or run lengths {"size", "counts"}


def usable_segmentation(segmentation: Any, height: int, width: int) -> Segmentation | None:
    """Return a mask without the polygons that cover no pixel; None if nothing is left, or if it is broken."""
    if isinstance(segmentation, dict):
        try:
            counts = run_lengths(segmentation["counts"])
            whole = list(segmentation["size"]) == [height, width] and sum(counts) == height * width
        except (KeyError, TypeError, ValueError, IndexError):
            return None
        if not whole or min(counts) < 0 or not any(counts[1::2]):
            return None
        # COCO's code takes whole numbers alone; some exports write them with a point.
        compressed = isinstance(segmentation["counts"], str)
        return {"size": [height, width], "counts": segmentation["counts"] if compressed else counts}
    if not isinstance(segmentation, list):
        return None
    if segmentation and not isinstance(segmentation[0], list):
        segmentation = [segmentation]  # some exports leave out the outer list
    return [polygon for polygon in segmentation if _covers_pixels(polygon, height, width)] or None


def _covers_pixels(polygon: Any, height: int, width: int) -> bool:
    """Return whether a polygon has three points or more, and covers a pixel of its picture."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in polygon):
        return False
    xs, ys = polygon[::2], polygon[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    if max(-left, right, -top, bottom) > 10 * max(height, width):
        return False  # a damaged number; COCO's code would follow the outline for seconds, or take all memory
    is_inside = left >= 0 and top >= 0 and right <= width and bottom <= height
    double_area = sum(x1 * y2 - x2 * y1 for x1, y1, x2, y2 in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1]))
    if is_inside and abs(double_area) > 4 * (right - left + bottom - top):
        return True  # some two pixels thick on the average; drawing all of COCO's masks would take minutes
    masks = mask_api()
    return bool(masks.area(masks.frPyObjects([polygon], height, width)).any())


def run_lengths(counts: list[int] | str) -> list[int]:
    """Return the lengths of a mask's runs, down its columns: outside, inside, outside ...

    In compressed form each number is characters of six bits from "0" on, the lowest first: five bits of the number and
    one that says that more follow. From the fourth on a number is the difference to the one two before.
    """
    if not isinstance(counts, str):
        return [int(count) for count in counts]
    lengths: list[int] = []
    number = shift = 0
    for character in counts.encode():
        bits = character - 48
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # negative
                number -= 1 << shift
            lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
            number = shift = 0
    return lengths


def draw_mask(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """Return a mask as uint8 `(height, width)`, 1 inside; polygons by COCO's own rule."""
    if isinstance(segmentation, dict):
        counts = run_lengths(segmentation["counts"])
        inside = np.arange(len(counts)) % 2
        return np.ascontiguousarray(np.repeat(inside, counts).astype(np.uint8).reshape(width, height).T)
    masks = mask_api()
    return masks.decode(masks.merge(masks.frPyObjects(segmentation, height, width)))


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask `(H, W)`, non-zero inside, as compressed run lengths that JSON can hold."""
    encoded = mask_api().encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    counts = encoded["counts"]
    return {
        "size": [int(side) for side in encoded["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }


def mask_api() -> Any:
    """Return faster-coco-eval's mask functions, COCO's own in C++. Raises a ListError if it is not installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ListError(
            "polygons and COCO's evaluation need faster-coco-eval: pip install 'video-convmae[dense]'"
        ) from error
    return mask


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return the smallest box (x1, y1, x2, y2) around a mask `(H, W)`; None if it is empty."""
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
