"""Pictures of segmentation: predicted classes as colours over a picture."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image


def palette(classes: int) -> np.ndarray:
    """Return a colour for each class, uint8 `(K, 3)`: hues a golden section apart, in three brightnesses."""
    colours = [
        colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.9 - 0.25 * (label // 3 % 2), 1 - 0.25 * (label % 3))
        for label in range(classes)
    ]
    return (np.array(colours) * 255).round().astype(np.uint8)


def overlay(pixels: np.ndarray, labels: np.ndarray, classes: int, strength: float = 0.5) -> Image.Image:
    """Draw classes over a picture.

    Args:
        pixels: `(H, W, 3)` uint8.
        labels: `(H', W')`, 0 .. K - 1; other values are not drawn. The picture is resized to it.
        classes: K.
        strength: of the colours; the rest is the picture.
    """
    height, width = labels.shape
    if pixels.shape[:2] != labels.shape:
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    drawn = (labels >= 0) & (labels < classes)
    colours = palette(classes)[np.where(drawn, labels, 0)]
    mixed = (pixels * (1 - strength) + colours * strength).round().astype(np.uint8)
    return Image.fromarray(np.where(drawn[..., None], mixed, pixels))
