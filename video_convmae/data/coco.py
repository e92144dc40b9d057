"""COCO's format of detection data: pictures, objects with boxes and masks; read nowhere else.

A data set is a JSON file with `images`, `annotations` and `categories`, and a folder of pictures. Exports of other
programs differ from COCO's own files in what they leave out, so this is what is taken and what is not:

- Category ids may be any numbers; classes are 1 .. C in the order of the ids, 0 is the background.
- A mask is polygons, or run lengths (compressed or not). Polygons that cover no pixel of the picture are dropped;
  run lengths that do not fill it are a broken mask. An object with no mask left counts as one without.
- An object without a usable box gets that of its mask; one with neither is left out.
- Boxes are [x, y, width, height] in pixels. Some that reach beyond the picture are cut and some below a pixel stay; a
  file most of whose boxes are so has another convention (corners, centres, parts of the picture) and is an error.
- Crowd regions (`iscrowd`) take no part in training; the evaluation ignores detections on them.
- In training, pictures without an object are left out, as in detectron2.
- A picture that is missing, or whose size is not that of the JSON file, is a bad record like any other.

`CocoReport` counts all of these but pictures of another size, which are seen when they are decoded. Pictures are found
by `file_name` under the folder that `data.root` names, or that stands beside the JSON file under one of the usual
names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .masks import Segmentation, draw_mask, encode_mask, tight_box, usable_segmentation
from .text import ListError, read_text


class CocoObject(NamedTuple):
    """One object of a picture.

    Attributes:
        label: class, from 1.
        box: (x, y, width, height) in pixels, as in the file.
        segmentation: its mask; None: it has none.
        crowd: the box is that of a group that is not marked one by one.
        area: as in the file, by which the evaluation tells small and large objects; else that of the mask or the box.
    """

    label: int
    box: tuple[float, float, float, float]
    segmentation: Segmentation | None
    crowd: bool
    area: float


@dataclass(frozen=True)
class CocoRecord:
    """A picture and its objects.

    Attributes:
        path: of the file.
        image_id: its id in the JSON file.
        height, width: in pixels.
        objects: crowd regions included.
    """

    path: str
    image_id: int
    height: int
    width: int
    objects: tuple[CocoObject, ...]


@dataclass(frozen=True)
class CocoReport:
    """What a file holds, and what was left out or mended.

    Attributes:
        images: pictures of the file.
        without_objects: pictures without an object to learn from; left out of training.
        objects: objects that are kept, crowd regions not counted.
        crowd: crowd regions.
        boxes_from_masks: objects whose box was empty or missing, and is that of their mask.
        left_out: objects without a usable box or mask.
        without_mask: objects that are kept, but have no mask, or an empty or broken one.
        strays: objects of pictures that are not in the file; left out.
        beyond: boxes that reach more than a pixel beyond their picture; the part outside is cut off.
        tiny: other boxes with a side below one pixel.
        missing: pictures of the file that are not in the folder.
    """

    images: int = 0
    without_objects: int = 0
    objects: int = 0
    crowd: int = 0
    boxes_from_masks: int = 0
    left_out: int = 0
    without_mask: int = 0
    strays: int = 0
    beyond: int = 0
    tiny: int = 0
    missing: int = 0

    def __str__(self) -> str:
        found = f"{self.images} pictures, {self.objects} objects"
        details = {
            "pictures without an object": self.without_objects,
            "crowd regions": self.crowd,
            "objects whose empty box became that of their mask": self.boxes_from_masks,
            "objects left out, with neither box nor mask": self.left_out,
            "objects without a usable mask": self.without_mask,
            "objects left out, of pictures that are not in the file": self.strays,
            "boxes that reach beyond their picture": self.beyond,
            "boxes smaller than a pixel": self.tiny,
            "pictures are missing": self.missing,
        }
        return "; ".join([found, *(f"{count} {what}" for what, count in details.items() if count)])


class CocoRecords(Sequence[CocoRecord]):
    """Pictures of a data set with their objects, held as bytes in one array (see `Records` for the reason).

    Args:
        rows: (line, file name, image id, height, width, objects) of each picture, in the order of the file.
        folder: of the pictures.
        categories: (id, name) of each class, from class 1 on.
        report: what was found.

    Attributes:
        lines: place of each picture among the file's `images`, int64, from 0.
    """

    def __init__(
        self,
        rows: Iterable[tuple[int, str, int, int, int, list[CocoObject]]],
        folder: str | Path,
        categories: Sequence[tuple[int, str]],
        report: CocoReport,
    ) -> None:
        rows = list(rows)
        parts = [json.dumps(row[1:], separators=(",", ":")).encode() for row in rows]
        self._data = np.frombuffer(b"".join(parts), dtype=np.uint8)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.lines = np.array([row[0] for row in rows], dtype=np.int64)
        self.folder = os.fspath(folder)
        self.categories = tuple(categories)
        self.report = report

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> CocoRecord:  # type: ignore[override]  # nobody slices a list
        count = len(self._ends)
        if not -count <= index < count:
            raise IndexError(f"picture {index} was asked for; the data set has {count}")
        index %= count
        start = self._ends[index - 1] if index else 0
        name, image_id, height, width, objects = json.loads(self._data[start : self._ends[index]].tobytes())
        kept = tuple(CocoObject(label, tuple(box), *others) for label, box, *others in objects)
        return CocoRecord(os.path.join(self.folder, name), image_id, height, width, kept)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; class k has the name k - 1."""
        return tuple(name for _, name in self.categories)

    def digest(self, root: str | Path | None = None) -> str:
        """Return the SHA-256 of pictures, objects and categories in their order; `root` makes no difference.

        It is the same for the same data under another file name or in another folder.
        """
        digest = hashlib.sha256(json.dumps(self.categories).encode())
        digest.update(self._data.tobytes())
        digest.update(self._ends.tobytes())
        digest.update(self.lines.tobytes())
        return digest.hexdigest()


# Reading


def read_coco(path: str | Path, root: str | Path = "", training: bool = False) -> CocoRecords:
    """Read a data set in COCO's format.

    Args:
        path: the JSON file, or the folder of a split's pictures: COCO's `train2017` with
            `annotations/instances_train2017.json` beside it, or one with the only JSON file inside.
        root: folder of the pictures, or that a relative `path` lies in; empty: found from the JSON file.
        training: leave out pictures without an object that is no crowd region.

    Raises:
        ListError: the file is missing, is of another format, or names no picture that is there.
    """
    place = Path(root, path)
    if not place.exists() and Path(path).exists():
        place = Path(path)
    file = _annotation_file(place) if place.is_dir() else place
    content = _read_json(file)
    classes = _classes(file, content["categories"])
    categories = [(id_, name) for id_, (_, name) in classes.items()]
    labels = {id_: label for id_, (label, _) in classes.items()}
    folder = _picture_folder(file, root, place if place.is_dir() else None, content["images"])
    return _Reading(file, labels, training).records(content, folder, categories)


class _Reading:
    """One reading of a file: it counts what it finds."""

    def __init__(self, file: Path, labels: dict[int, int], training: bool) -> None:
        self.file, self.labels, self.training = file, labels, training
        self.counts = dict.fromkeys(CocoReport.__dataclass_fields__, 0)
        self.odd_box = ""  # the first that does not fit its picture

    def records(self, content: dict[str, Any], folder: Path, categories: list[tuple[int, str]]) -> CocoRecords:
        """Return the pictures with their objects."""
        by_image: dict[int, list[dict[str, Any]]] = {}
        for place, image in enumerate(content["images"]):
            self._require(image, f"images[{place}]", "id", "height", "width")
            if not isinstance(image.get("file_name"), str):
                raise ListError(f"{self.file}: images[{place}] has no file_name; expected the name of a picture")
            if image["id"] in by_image:
                raise ListError(f"{self.file}: two pictures have the id {image['id']}; expected each id once")
            by_image[image["id"]] = []
        for place, annotation in enumerate(content["annotations"]):
            self._require(annotation, f"annotations[{place}]", "image_id", "category_id")
            if annotation["category_id"] not in self.labels:
                known = ", ".join(map(str, list(self.labels)[:10]))
                raise ListError(
                    f"{self.file}: annotations[{place}] has the category_id {annotation['category_id']}; expected one "
                    f"of its categories ({known}{', ...' if len(self.labels) > 10 else ''})"
                )
            if annotation["image_id"] in by_image:
                by_image[annotation["image_id"]].append(annotation)
            else:
                self.counts["strays"] += 1
        rows = []
        for line, image in enumerate(content["images"]):
            found = [self._object(each, image["height"], image["width"]) for each in by_image[image["id"]]]
            objects = [each for each in found if each is not None]
            self.counts["images"] += 1
            if not any(not each.crowd for each in objects):
                self.counts["without_objects"] += 1
                if self.training:
                    continue
            rows.append((line, image["file_name"], image["id"], image["height"], image["width"], objects))
        self._check_boxes()
        if not rows:
            raise ListError(f"{self.file} holds no pictures" + (" with objects" if content["images"] else ""))
        self.counts["missing"] = _count_missing([os.path.join(folder, row[1]) for row in rows])
        return CocoRecords(rows, folder, categories, CocoReport(**self.counts))

    def _require(self, entry: Any, place: str, *numbers: str) -> None:
        """Raise a ListError if an entry lacks a number; numbers written as text or with a point become integers."""
        if not isinstance(entry, dict):
            raise ListError(f"{self.file}: {place} is {entry!r:.40}; expected an object with {', '.join(numbers)}")
        for name in numbers:
            value = entry.get(name, "missing")
            try:
                entry[name] = int(value)
                usable = not isinstance(value, bool) and entry[name] == float(value)
            except (TypeError, ValueError, OverflowError):
                usable = False
            if not usable or (name in ("height", "width") and entry[name] < 1):
                raise ListError(f"{self.file}: {name} of {place} is {value!r:.40}; expected a whole number")

    def _object(self, annotation: dict[str, Any], height: int, width: int) -> CocoObject | None:
        """Return an annotation as an object; None if it has neither a box nor a mask."""
        crowd = annotation.get("iscrowd") in (1, True, "1")
        segmentation = usable_segmentation(annotation.get("segmentation"), height, width)
        box = _usable_box(annotation.get("bbox"))
        if box is None:
            box = _mask_box(segmentation, height, width)
            if box is None:
                self.counts["left_out"] += 1
                return None
            self.counts["boxes_from_masks"] += 1
        else:
            self._measure_box(box, height, width)
        self.counts["crowd" if crowd else "objects"] += 1
        self.counts["without_mask"] += segmentation is None
        area = annotation.get("area")
        if not isinstance(area, (int, float)) or not math.isfinite(area):
            area = box[2] * box[3] if segmentation is None else int(draw_mask(segmentation, height, width).sum())
        return CocoObject(self.labels[annotation["category_id"]], box, segmentation, crowd, area)

    def _measure_box(self, box: tuple[float, float, float, float], height: int, width: int) -> None:
        """Count a box that does not fit its picture, as those of another convention do not."""
        x, y, w, h = box
        kind = (
            "beyond" if min(x, y) < -1 or x + w > width + 1 or y + h > height + 1 else "tiny" if min(w, h) < 1 else ""
        )
        if kind:
            self.counts[kind] += 1
            self.odd_box = self.odd_box or f"{list(box)} in a picture of {width}x{height}"

    def _check_boxes(self) -> None:
        """Raise a ListError if most boxes do not fit their pictures."""
        beyond, tiny = self.counts["beyond"], self.counts["tiny"]
        boxes = self.counts["objects"] + self.counts["crowd"] - self.counts["boxes_from_masks"]
        if 2 * (beyond + tiny) > boxes:
            raise ListError(
                f"{self.file}: of {boxes} boxes {beyond} reach beyond their pictures and {tiny} are smaller than a "
                f"pixel, the first is {self.odd_box}; expected [x, y, width, height] in pixels"
            )


def _read_json(file: Path) -> dict[str, Any]:
    """Return the contents of a COCO file. Raises a ListError if it is none."""
    text = read_text(file, "the annotations")
    try:
        content = json.loads(text)
    except ValueError as error:
        lfs = text.startswith("version https://git-lfs")
        raise ListError(
            f"{file} is a pointer of Git LFS: get the file itself with git lfs pull"
            if lfs
            else f"{file} is not JSON, or is cut off ({error}); expected annotations in COCO's format"
        ) from None
    names = ("images", "annotations", "categories")
    if isinstance(content, dict) and all(isinstance(content.get(name), list) for name in names):
        return content
    kind = "a list (results of a detector?)" if isinstance(content, list) else "an object"
    missing = [name for name in names if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    raise ListError(f"{file} is {kind} without {', '.join(missing)}; expected annotations in COCO's format")


def _classes(file: Path, categories: list[Any]) -> dict[int, tuple[int, str]]:
    """Return (class, name) of each category id, in the order of the ids."""
    names: dict[int, str] = {}
    for place, category in enumerate(categories):
        id_ = category.get("id") if isinstance(category, dict) else None
        if not isinstance(id_, int) or isinstance(id_, bool) or id_ in names:
            raise ListError(f"{file}: the id of categories[{place}] is {id_!r}; expected a whole number, each once")
        names[id_] = str(category.get("name", id_))
    if not names:
        raise ListError(f"{file} has no categories; expected one or more, with id and name")
    return {id_: (label, names[id_]) for label, id_ in enumerate(sorted(names), start=1)}


def _annotation_file(folder: Path) -> Path:
    """Return the JSON file of a folder of pictures. Raises a ListError if there is none, or more than one."""
    beside = folder.parent / "annotations"
    for places in (
        [folder / "_annotations.coco.json", beside / f"instances_{folder.name}.json", beside / f"{folder.name}.json"],
        sorted(folder.glob("*.json")),
        sorted((folder / "annotations").glob("*.json")),
    ):
        found = [place for place in places if place.is_file()]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(place.name for place in found[:5])
            raise ListError(f"{folder} has {len(found)} annotation files ({names}); give one of them in place of it")
    raise ListError(
        f"{folder} has no annotations: expected {beside}/instances_{folder.name}.json, or one JSON file in the folder; "
        "or give the JSON file itself"
    )


def _picture_folder(file: Path, root: str | Path, split: Path | None, images: list[Any]) -> Path:
    """Return the folder of the pictures: the first usual one that holds any of the first hundred.

    Raises:
        ListError: none does.
    """
    stem = file.stem.removeprefix("instances_")
    bases = [split, Path(root) if root else None, file.parent, file.parent.parent]
    folders = [base / name for base in bases if base is not None for name in ("", stem, "images", f"images/{stem}")]
    names = [image["file_name"] for image in images[:100] if isinstance(image, dict) and "file_name" in image]
    for folder in folders:
        if any((folder / str(name)).is_file() for name in names):
            return folder
    if not names:
        return folders[0]
    tried = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise ListError(
        f"{file}: no picture was found, the first is {names[0]!r}; looked in {tried}; set data.root to their folder"
    )


def _count_missing(paths: Iterable[str]) -> int:
    """Count files that are not there. Each folder is listed once: on a network's disk asking for each takes minutes."""
    listed: dict[str, set[str]] = {}
    missing = 0
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder))
            except OSError:
                listed[folder] = set()
        missing += name not in listed[folder] and not os.path.isfile(path)  # names may differ in upper case alone
    return missing


def _usable_box(box: Any) -> tuple[float, float, float, float] | None:
    """Return a box (x, y, width, height); None if it is none, or is empty."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(each, (int, float)) for each in box):
        return None
    if not all(map(math.isfinite, box)) or box[2] <= 0 or box[3] <= 0:
        return None
    return box[0], box[1], box[2], box[3]


def _mask_box(segmentation: Segmentation | None, height: int, width: int) -> tuple[float, float, float, float] | None:
    """Return the box (x, y, width, height) of a mask; None if it is empty."""
    if segmentation is None:
        return None
    box = tight_box(draw_mask(segmentation, height, width))
    return None if box is None else (box[0], box[1], box[2] - box[0], box[3] - box[1])


# Results


def image_results(
    record: CocoRecord,
    categories: Sequence[tuple[int, str]],
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    masks: Iterable[np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Return the detections of one picture as entries of COCO's results format, with the ids of the categories.

    Args:
        record: the picture.
        categories: of the records.
        boxes: `(K, 4)` x1 y1 x2 y2, in pixels of the file's picture.
        labels: `(K,)` classes, from 1.
        scores: `(K,)`.
        masks: `(H, W)` each, at the file's size, non-zero inside; None: boxes alone.
    """
    results: list[dict[str, Any]] = []
    for (x1, y1, x2, y2), label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist()):
        entry = {"image_id": record.image_id, "category_id": categories[label - 1][0]}
        results.append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
    if masks is not None:
        for result, mask in zip(results, masks, strict=True):
            result["segmentation"] = encode_mask(mask)
    return results
