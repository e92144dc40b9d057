"""Data of semantic segmentation: folders of pictures and of label maps -> training crops and test pictures.

A label map is a picture of one channel (or a palette) whose values are classes, as large as its picture. Of a palette
the indices are the values, unless it is one of greys that an optimiser of PNG files made (`Labels.read`). ADE20K's
folders are found by themselves: the maps of `images/training` lie in `annotations/training`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .datasets import BadRecord, SampleKey, read_or_replace, read_picture
from .decoding import DecodeError
from .decoding.errors import decode_errors
from .decoding.memory import MemoryReader
from .decoding.process import ReaderProcess
from .dense_transforms import PADDING, PictureTransform, fit
from .options import IMAGE_SUFFIXES, CropConfig
from .text import ListError

IGNORED = 255  # as in dense/segmentation.py, which data does not import
CROP_ATTEMPTS = 10  # draws of a crop in which one class covers too much (mmsegmentation)
MAPS = (".png", ".bmp", ".tif", ".tiff")
# Folders of pictures and of maps that data sets use: ADE20K, mmsegmentation, others.
FOLDERS = (("images", "annotations"), ("img_dir", "ann_dir"), ("images", "labels"), ("images", "masks"))


class SegmentationRecord(NamedTuple):
    """A picture and its label map; the map is empty where there is none."""

    path: str
    map: str


class SegmentationRecords(Sequence[SegmentationRecord]):
    """Pictures and label maps of the same names.

    Args:
        pictures, maps: the folders.
        pairs: paths below them.

    Attributes:
        lines: 0, 1, 2, ...: the place of each picture in the order of the names.
    """

    def __init__(self, pictures: Path, maps: Path, pairs: Sequence[tuple[str, str]]) -> None:
        self.pictures, self.maps, self._pairs = pictures, maps, tuple(pairs)
        self.lines = np.arange(len(self._pairs))

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> SegmentationRecord:  # type: ignore[override]  # nobody slices a list
        picture, label_map = self._pairs[index]
        return SegmentationRecord(str(self.pictures / picture), str(self.maps / label_map))

    def name(self, index: int) -> str:
        """Return a picture's path in its folder."""
        return self._pairs[index][0]

    def digest(self, root: str | Path | None = None) -> str:
        """Return the SHA-256 of the names in their order; `root` makes no difference."""
        return hashlib.sha256("\n".join(map("\t".join, self._pairs)).encode()).hexdigest()


class SegmentationSample(NamedTuple):
    """A picture and its labels.

    Attributes:
        image: `(3, H, W)` uint8.
        target: training: `(H, W)` int64 labels of the image; test: of the file's picture, whatever the image's size.
            IGNORED where there is no class.
        transform: from the file's picture to `image`.
        index: the record shown.
        bad_records: records that could not be read.
    """

    image: Tensor
    target: Tensor
    transform: PictureTransform
    index: int  # type: ignore[assignment]
    bad_records: tuple[BadRecord, ...]


# Records


def read_pairs(pictures: str | Path, root: str | Path = "", maps: str | Path | None = None) -> SegmentationRecords:
    """Find pictures and their label maps, in folders below the two, by the same name up to the suffix.

    Args:
        pictures: folder of the pictures.
        root: folder that relative ones are joined to.
        maps: folder of the label maps; None: the usual one beside (ADE20K: images/training, annotations/training).

    Raises:
        ListError: a folder is missing, there is no picture, or a picture has no map.
    """
    folder = Path(root, pictures)
    if not folder.is_dir():
        raise ListError(f"{folder} is no folder; expected that of the pictures (ADE20K: images/training)")
    map_folder = _usual_maps(folder) if maps is None else Path(root, maps)
    if not map_folder.is_dir():
        raise ListError(f"{map_folder} is no folder; expected that of the label maps")
    maps_found, found = _files(map_folder, MAPS), _files(folder, IMAGE_SUFFIXES)
    for place, files in ((map_folder, maps_found), (folder, found)):
        stem, count = Counter(_stem(path, place) for path in files).most_common(1)[0] if files else ("", 0)
        if count > 1:
            raise ListError(f"{place} holds {count} files named {stem}; expected one: maps are found by name")
    by_stem = {_stem(path, map_folder): str(path.relative_to(map_folder)) for path in maps_found}
    if not found:
        raise ListError(f"{folder} holds no picture; expected files that end with {', '.join(IMAGE_SUFFIXES)}")
    missing = [path for path in found if _stem(path, folder) not in by_stem]
    if missing:
        raise ListError(
            f"{len(missing)} of the {len(found)} pictures in {folder} have no label map in {map_folder}, the first: "
            f"{missing[0].name}; expected a file of the same name that ends with {', '.join(MAPS)}"
        )
    pairs = [(str(path.relative_to(folder)), by_stem[_stem(path, folder)]) for path in found]
    return SegmentationRecords(folder, map_folder, pairs)


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and not path.name.startswith("."))
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _usual_maps(folder: Path) -> Path:
    """Return the folder of the maps beside one of pictures. Raises a ListError if there is none of the usual names."""
    parts, tried = folder.parts, []
    for pictures, maps in FOLDERS:
        for place in range(len(parts) - 1, -1, -1):
            if parts[place] == pictures:
                tried.append(Path(*parts[:place], maps, *parts[place + 1 :]))
                if tried[-1].is_dir():
                    return tried[-1]
    looked = f"looked for {', '.join(map(str, tried))}; " if tried else ""
    raise ListError(
        f"no label maps were found for {folder}; {looked}name their folder: data.train_maps, "
        "data.validation_maps, or --maps of evaluate"
    )


# Reading


@dataclass(frozen=True)
class Labels:
    """What the values of label maps mean.

    classes: their number.
    zero_is_ignored: value 0 is no class and class 0 has the value 1 (ADE20K).
    ignored: a further value that is no class.
    """

    classes: int
    zero_is_ignored: bool = False
    ignored: int = IGNORED

    def __post_init__(self) -> None:
        shift = int(self.zero_is_ignored)
        if shift <= self.ignored < self.classes + shift:
            raise ListError(
                f"data.ignored is {self.ignored}, the value of a class; expected one outside of {shift} to "
                f"{self.classes - 1 + shift}"
            )

    def read(self, path: str, size: tuple[int, int] | None = None) -> np.ndarray:
        """Read a label map: uint8 `(H, W)`, classes and IGNORED.

        The values of a palette are its indices, as in Pascal VOC, whatever the colours. But where all entries in use
        are greys that are classes here, they are the values: optimisers store a grey map with few values so. Black and
        white alone are the colours of indices.

        Args:
            path: of the map.
            size: (H, W) of its picture; None: not known.

        Raises:
            DecodeError: it cannot be read, is no map, has another size than its picture, or a value that is no class.
        """
        with decode_errors(path), Image.open(path) as image:
            if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
                raise DecodeError(
                    f"{path}: has the channels {image.mode}; expected a label map of one, whose values are classes"
                )
            values = np.asarray(image).astype(np.int64)
            if image.mode == "P":
                values = self._of_palette(values, np.array(image.getpalette("RGB")).reshape(-1, 3))
        if size is not None and values.shape != size:
            turned = " (turned as its EXIF data says)" if values.shape == size[::-1] else ""
            found = f"is {values.shape[1]}x{values.shape[0]} and its picture {size[1]}x{size[0]}{turned}"
            raise DecodeError(f"{path}: {found}; expected equal")
        shift = int(self.zero_is_ignored)
        wrong = self._wrong(values)
        if wrong.any():
            found = ", ".join(map(str, np.unique(values[wrong])[:5]))
            raise DecodeError(
                f"{path}: has the value {found}; expected {shift} to {self.classes - 1 + shift}, or {self.ignored} for "
                "ignored pixels: check data.num_classes and data.zero_is_ignored"
            )
        ignored = (values == self.ignored) | (values < shift)
        return np.where(ignored, IGNORED, values - shift).astype(np.uint8)

    def _wrong(self, values: np.ndarray) -> np.ndarray:
        """Return where values are neither classes nor ignored."""
        return (values != self.ignored) & ((values < 0) | (values >= self.classes + int(self.zero_is_ignored)))

    def _of_palette(self, indices: np.ndarray, palette: np.ndarray) -> np.ndarray:
        """Return the values of a map with a palette `(entries, 3)`: its indices or, as `read` says, its greys."""
        used = np.unique(indices)
        if used[-1] >= len(palette):
            return indices
        greys = palette[used, 0].astype(np.int64)
        is_grey = (palette[used] == greys[:, None]).all() and not set(greys.tolist()) <= {0, 255}
        return greys[np.searchsorted(used, indices)] if is_grey and not self._wrong(greys).any() else indices


def classes_seen(records: SegmentationRecords, labels: Labels, count: int = 32) -> set[int]:
    """Return the classes of some label maps, evenly chosen; those that cannot be read are left out."""
    seen: set[int] = set()
    for index in np.unique(np.linspace(0, len(records) - 1, count).round().astype(int)):
        try:
            seen |= set(np.unique(labels.read(records[index].map)).tolist()) - {IGNORED}
        except DecodeError:
            continue  # of training: replaced and reported when it is drawn
    return seen


# Data sets


@dataclass(eq=False)
class SegmentationDataset(Dataset[SegmentationSample]):
    """Training crops; a function of (seed, epoch, record index) alone, like `ClipDataset`.

    Args:
        records: the pairs.
        labels: what the values of the maps mean.
        augmentation: scales, crop, flip, distortion.
        reader: decodes pictures in a process that can be killed, or keeps what it has decoded.
        seed: of the run.
        attempts: records tried for one sample before giving up.
    """

    records: SegmentationRecords
    labels: Labels
    augmentation: CropConfig
    reader: ReaderProcess | MemoryReader
    seed: int = 0
    attempts: int = 10

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: SampleKey) -> SegmentationSample:
        """Return a record's crop, or that of a replacement if it is bad. Raises as `read_or_replace` does."""

        def read(record: SegmentationRecord, generator: Callable[[int], torch.Generator]) -> tuple[Any, ...]:
            pixels, numbers = read_picture(record.path, self.reader), generator(0)
            labels = self.labels.read(record.map, pixels.shape[:2])
            transform = draw_crop(labels, self.augmentation, numbers)
            image = transform.picture(pixels)
            if self.augmentation.distortion:
                height, width = transform.crop
                image[:, :height, :width] = distort(image[:, :height, :width], numbers)
            target = np.full(transform.frame, IGNORED, dtype=np.int64)
            target[: transform.crop[0], : transform.crop[1]] = transform.mask(labels)
            return image, torch.from_numpy(target), transform

        sample, index, bad_records = read_or_replace(self.records, key, self.seed, self.attempts, read)
        image, target, transform = sample
        return SegmentationSample(image, target, transform, index, bad_records)


@dataclass(eq=False)
class SegmentationTestDataset(Dataset[SegmentationSample]):
    """Test pictures, resized as at ratio 1. Nothing is random; a bad record is grey, ignored, and reported.

    Args:
        records: the pairs.
        labels: what the values of the maps mean.
        augmentation: its sides.
        reader: decodes pictures in a process that can be killed.
    """

    records: SegmentationRecords
    labels: Labels
    augmentation: CropConfig
    reader: ReaderProcess | MemoryReader

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> SegmentationSample:
        """Return a record's picture, and its labels at the size of the file."""
        record = self.records[index]
        bad_records: tuple[BadRecord, ...] = ()
        try:
            pixels = read_picture(record.path, self.reader)
            labels = self.labels.read(record.map, pixels.shape[:2])
        except DecodeError as error:
            side = self.augmentation.crop
            pixels = np.full((side, side, 3), PADDING, dtype=np.uint8)
            labels = np.full((side, side), IGNORED, dtype=np.uint8)
            bad_records = (BadRecord(index, record.path, str(error)),)
        transform = whole_picture(pixels.shape[0], pixels.shape[1], self.augmentation)
        target = torch.from_numpy(labels.astype(np.int64))
        return SegmentationSample(transform.picture(pixels), target, transform, index, bad_records)


# Transforms


def whole_picture(height: int, width: int, config: CropConfig) -> PictureTransform:
    """Return the transform of a test picture: resized as at ratio 1."""
    size = fit(height, width, config.shortest, config.longest)
    return PictureTransform((height, width), size, size, size)


def draw_crop(labels: np.ndarray, config: CropConfig, generator: torch.Generator) -> PictureTransform:
    """Draw flip, ratio and crop; a crop that one class covers too much is drawn again, at most ten times.

    Args:
        labels: `(H, W)` of the picture, with IGNORED.
        config: sizes.
        generator: source of the numbers: flip, ratio, places.
    """
    numbers = torch.rand(2 + 2 * CROP_ATTEMPTS, generator=generator, dtype=torch.float64).tolist()
    height, width = labels.shape
    least, most = config.ratios
    ratio = least + numbers[1] * (most - least)
    resized = fit(height, width, config.shortest * ratio, config.longest * ratio)
    crop = min(resized[0], config.crop), min(resized[1], config.crop)
    frame = (config.crop, config.crop)
    flip = config.flip and numbers[0] < 0.5
    for attempt in range(CROP_ATTEMPTS):
        place = numbers[2 + 2 * attempt : 4 + 2 * attempt]
        top, left = (int(number * (whole - part + 1)) for number, whole, part in zip(place, resized, crop))
        transform = PictureTransform((height, width), resized, crop, frame, top, left, flip)
        if config.cat_max == 1:
            break
        seen = transform.mask(labels)
        counts = np.bincount(seen[seen != IGNORED].reshape(-1))
        if (counts > 0).sum() > 1 and counts.max() < config.cat_max * counts.sum():
            break
    return transform


def distort(image: Tensor, generator: torch.Generator) -> Tensor:
    """Distort brightness, contrast, saturation and hue, each with probability 1/2 (SSD, mmsegmentation).

    Brightness is shifted by up to 32; contrast and saturation are scaled by 0.5 to 1.5, contrast before or after the
    others; hue turns by up to 36 degrees. Values are rounded and cut to 0 .. 255 after each.

    Args:
        image: `(3, H, W)` uint8.
        generator: source of nine numbers.
    """
    n = torch.rand(9, generator=generator, dtype=torch.float64).tolist()

    def scale(pixels: np.ndarray, factor: float, shift: float = 0.0) -> np.ndarray:
        return (pixels * np.float32(factor) + np.float32(shift)).round().clip(0, 255).astype(np.uint8)

    pixels = image.permute(1, 2, 0).numpy()
    contrast_first = n[2] < 0.5
    if n[0] < 0.5:
        pixels = scale(pixels, 1, 64 * n[1] - 32)
    if contrast_first and n[3] < 0.5:
        pixels = scale(pixels, 0.5 + n[4])
    if n[5] < 0.5 or n[7] < 0.5:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        if n[5] < 0.5:
            hsv[..., 1] = scale(hsv[..., 1], 0.5 + n[6])
        if n[7] < 0.5:
            hsv[..., 0] += np.uint8(round((2 * n[8] - 1) * 25.6) % 256)  # a turn is 256
        pixels = np.asarray(Image.fromarray(hsv, mode="HSV").convert("RGB"))
    if not contrast_first and n[3] < 0.5:
        pixels = scale(pixels, 0.5 + n[4])
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
