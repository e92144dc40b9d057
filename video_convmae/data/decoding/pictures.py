"""Folders of pictures and single pictures, read with Pillow."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict

import numpy as np

from video_convmae.data import remote, shards
from video_convmae.data.options import IMAGE_SUFFIXES

from .errors import DecodeError, decode_errors
from .reader import FrameReader, smaller_size


class FolderReader(FrameReader):
    """Folder with a picture for every frame, in the natural order of their names (frame9 before frame10).

    Args:
        path: the folder. Where it holds several series of pictures, `folder/img_*.jpg` says which is read.
        num_frames: number of pictures that the list says.
        max_side: longest side of the pictures returned (`smaller_size`).

    Raises:
        DecodeError: the folder holds no picture, several series (names that differ in more than their numbers), or
            another number of pictures than the list says.
    """

    name = "pillow"

    def __init__(self, path: str, num_frames: int | None, max_side: int | None = None) -> None:
        self.path, self.max_side = path, max_side
        self._folder, pattern = split_pattern(path)
        names = [
            name for name in remote.list_names(self._folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."
        ]
        chosen = names if pattern is None else _of_pattern(names, pattern)
        if not chosen:
            wanted = ", ".join(IMAGE_SUFFIXES) if pattern is None else f"none of its {len(names)} is named {pattern}"
            raise DecodeError(f"{path}: holds no pictures ({wanted})")
        series = _series(chosen)
        if pattern is None and len(series) > 1:
            found = ", ".join(f"{name} ({count})" for name, count in series.most_common(5))
            more = f" and {len(series) - 5} more" if len(series) > 5 else ""
            raise DecodeError(
                f"{path}: holds {len(series)} series of pictures: {found}{more}; name the one to read, "
                f"{os.path.join(os.path.basename(os.path.normpath(path)), series.most_common(1)[0][0])}"
            )
        if num_frames is not None and len(chosen) != num_frames:
            raise DecodeError(f"{path}: holds {len(chosen)} pictures; the list says {num_frames}")
        self._names = sorted(chosen, key=_natural_key)
        self._brightest = 0  # 16-bit value of the pictures read so far

    def __len__(self) -> int:
        return len(self._names)

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        clip: np.ndarray | None = None
        for place, index in enumerate(indices):
            image, brightest = _read_image(os.path.join(self._folder, self._names[index]), self.max_side)
            self._brightest = max(self._brightest, brightest or 0)
            if clip is None:
                clip = np.empty((len(indices), *image.shape), dtype=np.uint8)
            if image.shape != clip.shape[1:]:
                sizes = f"{image.shape[1]}x{image.shape[0]}, not {clip.shape[2]}x{clip.shape[1]}"
                raise DecodeError(f"{self.path}: {self._names[index]} is {sizes} like {self._names[indices[0]]}")
            clip[place] = image
        self.note = _note_dark(self._brightest)
        assert clip is not None  # `read` refuses no indices
        return clip


class ImageReader(FrameReader):
    """Picture as a video of one frame."""

    name = "pillow"
    times = np.zeros(1)

    def __init__(self, path: str, max_side: int | None = None) -> None:
        self.path = path
        self._image, brightest = _read_image(path, max_side)
        self.note = _note_dark(brightest or 0)

    def __len__(self) -> int:
        return 1

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        return self._image[None]


def split_pattern(path: str) -> tuple[str, str | None]:
    """Split `folder/img_*.jpg` into the folder and the pattern of its pictures' names; (path, None) for a folder."""
    folder, name = os.path.split(path)
    return (folder, name) if "*" in name and not os.path.exists(path) else (path, None)


def _of_pattern(names: list[str], pattern: str) -> list[str]:
    """Return the names that a pattern says: `*` is a number, and the file's type may be left out."""
    kinds = "" if pattern.lower().endswith(IMAGE_SUFFIXES) else "(" + "|".join(map(re.escape, IMAGE_SUFFIXES)) + ")"
    expression = re.compile(r"\d+".join(map(re.escape, pattern.split("*"))) + kinds, flags=re.IGNORECASE)
    return [name for name in names if expression.fullmatch(name)]


def _series(names: list[str]) -> Counter[str]:
    """Count pictures by series: names that agree but for their numbers, each series as a pattern (`img_*.jpg`).

    Two kinds of file are one series where no name comes in both: img_1.jpg and img_2.png, but not img_1.png (a mask).
    Names without a number are one series. cam1_01, cam1_02, cam2_01, cam2_02 are two: all of one number comes again
    with another; times of day (12-59-59, 13-00-00) are not.
    """
    stems = [os.path.splitext(name)[0] for name in names]
    one_kind = len(set(stems)) == len(stems)
    series: dict[str, list[str]] = defaultdict(list)
    for name, stem in zip(names, stems, strict=True):
        pattern = re.sub(r"\d+", "*", stem)
        kind = "" if one_kind else os.path.splitext(name)[1].lower()
        series[("*" if pattern == stem else pattern) + kind].append(stem)
    found: Counter[str] = Counter()
    for pattern, members in series.items():
        heads: dict[str, set[str]] = defaultdict(set)
        for stem in members:
            head, number, _ = re.fullmatch(r"(.*?)(\d*)(\D*)", stem).groups()  # type: ignore[union-attr]  # all match
            heads[head].add(number)
        repeats = len(heads) > 1 and len(set(map(frozenset, heads.values()))) == 1 and len(members) > len(heads)
        found.update(
            {f"{head}*": len(numbers) for head, numbers in heads.items()} if repeats else {pattern: len(members)}
        )
    return found


def _note_dark(brightest: int) -> str | None:
    """Return what to know of pictures whose largest 16-bit value this is (0: of 8 bits, or black); None: nothing."""
    if not 0 < brightest < _NEARLY_BLACK:
        return None
    bits = max(8, brightest.bit_length())
    return (
        f"nearly black: the largest 16-bit value is {brightest}, and white is 65535; if these are {bits} bits, "
        f"multiply them by {2 ** (16 - bits)}, or convert the pictures to 8 bits"
    )


_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_NEARLY_BLACK = 4096  # of 65535: cameras and scanners of 10 and 12 bits store their values as they are


def _read_image(path: str, max_side: int | None) -> tuple[np.ndarray, int | None]:
    """Return a picture, upright as its EXIF orientation says, uint8 `(H, W, 3)`, and its largest 16-bit value, if any.

    Of colours in 16 bits Pillow gives the upper 8: the value is the largest that these may stand for.

    Grey values of 16 bits are scaled (65535 is white). Values of 32 bits and fractions have no white, so they are
    refused.
    """
    from PIL import Image, ImageOps

    with decode_errors(path), Image.open(shards.path_or_bytes(path)) as image:
        format, brightest = image.format, None
        wide_colours = re.search("(RGB.?|LA);16", str(getattr(image, "tile", ())[:1])) is not None
        ImageOps.exif_transpose(image, in_place=True)  # at 8K each copy would be 95 MiB
        # Pillow before 11.3 gives 16 bits of PNG as 32-bit numbers, and always those of PGM.
        if image.mode in _WIDE_GREY or (image.mode == "I" and format in ("PNG", "PPM")):
            grey = np.asarray(image).astype(np.int64)
            brightest = int(grey.max())
            image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            kind = "fractions (32-bit float)" if image.mode == "F" else "32-bit integers"
            raise DecodeError(
                f"{path}: its values are {kind}, which say no black and white; convert it to 8 or 16 bits"
            )
        image = image if image.mode == "RGB" else image.convert("RGB")
        if wide_colours and (largest := max(high for _, high in image.getextrema())):
            brightest = 256 * largest + 255
        smaller = smaller_size(image.size, max_side)
        image = image if smaller == image.size else image.resize(smaller, Image.Resampling.BOX)
        return np.asarray(image), brightest


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers by value; of equal ones the one with more leading zeros is first."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
