"""Folders of pictures and single pictures, read with Pillow."""

from __future__ import annotations

import os
import re

import numpy as np

from video_convmae.data import shards
from video_convmae.data.options import IMAGE_SUFFIXES

from .errors import DecodeError, decode_errors
from .reader import FrameReader


class FolderReader(FrameReader):
    """Folder with a picture for every frame, in the natural order of their names (frame9 before frame10)."""

    name = "pillow"

    def __init__(self, path: str, num_frames: int | None) -> None:
        self.path = path
        names = [name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
        if not names:
            raise DecodeError(f"{path}: holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
        if num_frames is not None and len(names) < num_frames:
            raise DecodeError(f"{path}: holds {len(names)} pictures; the list says {num_frames}")
        self._names = sorted(names, key=_natural_key)[:num_frames]

    def __len__(self) -> int:
        return len(self._names)

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        images = [_read_image(os.path.join(self.path, self._names[index])) for index in indices]
        for index, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                sizes = f"{image.shape[1]}x{image.shape[0]}, not {images[0].shape[1]}x{images[0].shape[0]}"
                raise DecodeError(f"{self.path}: {self._names[index]} is {sizes} like {self._names[indices[0]]}")
        return np.stack(images)


class ImageReader(FrameReader):
    """Picture as a video of one frame."""

    name = "pillow"

    def __init__(self, path: str) -> None:
        self.path = path
        self._image = _read_image(path)

    def __len__(self) -> int:
        return 1

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        return self._image[None]


def _read_image(path: str) -> np.ndarray:
    """Return a picture, upright as its EXIF orientation says: uint8 `(H, W, 3)`."""
    from PIL import Image, ImageOps

    with decode_errors(path), Image.open(shards.path_or_bytes(path)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers by value; of equal ones the one with more leading zeros is first."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
