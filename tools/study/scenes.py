"""Make photographs with objects on them, and their boxes, masks and label maps, as files like those of COCO and ADE20K.

    python -m tools.study.scenes --output runs/demo-dense/data

A scene is a part of a photograph with two to five objects on it: discs, squares, triangles and stars, whose surface is
another photograph under a colour, and handwritten digits. They turn, differ in size, and hide each other in part. The
photographs ship inside the wheels of scikit-image and scikit-learn, the digits in scikit-learn's; nothing is
downloaded. Photographs and digits are split before anything is drawn: validation scenes show others than training
scenes. Half of the scenes are wider than high, half higher than wide.

Output, the same bytes for the same settings (with the same versions of the libraries on the same kind of machine):
`images/SPLIT/*.jpg`; `annotations/instances_SPLIT.json` in COCO's format, with ids of categories that have gaps, the
masks of whole objects as polygons and those of hidden and handwritten ones as run lengths, always of the visible part;
`labels/SPLIT/*.png`, a grey value a pixel, 0 where no object is, else its class; and, last of all,
`settings.json`: a folder that holds it is complete.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from tools.study.clips import SETTINGS_FILE, SPLITS, digit_drawings, photographs
from video_convmae.cli import run_tool
from video_convmae.data.masks import encode_mask, tight_box

CLASSES = ("disc", "square", "triangle", "star", "digit")  # class 1 and up; 0 is the photograph
CATEGORY_IDS = (1, 3, 4, 7, 9)
SIDES = (96, 128)  # pixels
MIN_VISIBLE = 0.4  # of each object
FINE = 4  # an outline is drawn that many times larger, for smooth edges
RECIPE = 1  # raise it when the same settings give other scenes, so that earlier folders are made again
SCENE_NAME = re.compile(r"\d{5}\.(jpg|png)")


@dataclass(frozen=True)
class SceneSettings:
    """Everything that determines the contents of the folder."""

    train: int
    validation: int
    seed: int
    recipe: int = RECIPE

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 scene or more")


class SceneObject(NamedTuple):
    """An object of a scene.

    Attributes:
        label: class, from 1.
        mask: `(H, W)` bool, the visible part.
        outline: `(N, 2)` points x, y of a whole shape; None: it is partly hidden, or handwritten.
    """

    label: int
    mask: np.ndarray
    outline: np.ndarray | None


def make_scenes(output: str | Path, train: int = 300, validation: int = 100, seed: int = 0) -> None:
    """Make the scenes; do nothing if the folder already holds these scenes, complete.

    Args:
        output: destination folder. Scenes that an earlier call with other settings left there are removed.
        train: training scenes.
        validation: validation scenes.
        seed: scenes of another seed show other parts of the photographs, and other objects at other places.
    """
    settings, output = SceneSettings(train, validation, seed), Path(output)
    if _is_complete(output, settings):
        print(f"{output} already holds these scenes")
        return
    (output / SETTINGS_FILE).unlink(missing_ok=True)
    for place in output.glob("*/*/*"):
        if SCENE_NAME.fullmatch(place.name):
            place.unlink()
    (output / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in zip(SPLITS, (train, validation), strict=True):
        content = _make_split(output, split, count, seed)
        path = output / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    (output / "classes.txt").write_text("\n".join(("photograph", *CLASSES)) + "\n", encoding="utf-8")
    (output / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def draw_scene(split: str, index: int, seed: int) -> tuple[np.ndarray, list[SceneObject]]:
    """Draw a scene: pixels, uint8 (H, W, 3), and its objects, the lowest first."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index, RECIPE])
    height, width = SIDES if index % 2 else SIDES[::-1]
    pixels = _part_of_photograph(split, width, height, rng)
    objects: list[SceneObject] = []
    areas: list[int] = []  # of the whole objects
    wanted = int(rng.integers(2, 6))
    for _ in range(20 * wanted):
        if len(objects) == wanted:
            break
        label = int(rng.integers(1, len(CLASSES) + 1))
        opacity, outline = _draw_object(split, label, height, width, rng)
        mask = opacity > 0.5
        under = [each._replace(mask=each.mask & ~mask) for each in objects]
        if any(rest.mask.sum() < MIN_VISIBLE * area for rest, area in zip(under, areas)):
            continue
        surface = _surface(split, label, pixels, mask, rng)
        pixels = pixels * (1 - opacity[..., None]) + surface * opacity[..., None]
        hidden = [not np.array_equal(rest.mask, whole.mask) for rest, whole in zip(under, objects)]
        objects = [rest._replace(outline=None) if less else rest for rest, less in zip(under, hidden)]
        objects.append(SceneObject(label, mask, outline))
        areas.append(int(mask.sum()))
    return pixels.round().clip(0, 255).astype(np.uint8), objects


def _part_of_photograph(split: str, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Return a part of a photograph, 25 to 60% as wide, as floats (height, width, 3)."""
    photos = photographs(split)
    photo = photos[rng.integers(len(photos))]
    scale = rng.uniform(0.25, 0.6) * min(photo.width / width, photo.height / height)
    left, top = rng.uniform(0, photo.width - scale * width), rng.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    return np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR, box), dtype=np.float64)


def _draw_object(
    split: str, label: int, height: int, width: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Draw an object of a class: its opacity (height, width), and its outline where it has one."""
    side = rng.uniform(0.25, 0.5) * min(height, width)
    x, y = rng.uniform(side / 2, width - side / 2), rng.uniform(side / 2, height - side / 2)
    if CLASSES[label - 1] == "digit":
        drawings = digit_drawings(split)[rng.integers(10)]
        drawing = Image.fromarray(drawings[rng.integers(len(drawings))])
        canvas = Image.new("F", (width, height))
        stamp = drawing.resize((round(1.2 * side), round(1.2 * side)), Image.Resampling.BICUBIC)
        canvas.paste(stamp, (round(x - stamp.width / 2), round(y - stamp.height / 2)))
        return np.asarray(canvas, dtype=np.float64).clip(0, 1), None
    outline = np.array([x, y]) + side / 2 * _shape(CLASSES[label - 1], rng.uniform(0, 2 * np.pi))
    canvas = Image.new("L", (FINE * width, FINE * height))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in FINE * outline], fill=255)
    return np.asarray(canvas.reduce(FINE), dtype=np.float64) / 255, outline


def _shape(name: str, turn: float) -> np.ndarray:
    """Return the outline of a shape inside the unit circle, turned: (N, 2)."""
    count = {"disc": 32, "square": 4, "triangle": 3, "star": 10}[name]
    angles = turn + np.arange(count) * 2 * np.pi / count
    radius = np.where(np.arange(count) % 2, 0.45, 1.0) if name == "star" else np.ones(count)
    return radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _surface(split: str, label: int, pixels: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the surface of an object: (H, W, 3), or one colour (3,) for a digit.

    Its colour is far from the mean of what it hides, so that people see it at once.
    """
    behind = pixels[mask].mean(axis=0) if mask.any() else np.full(3, 128.0)
    colours = rng.uniform(0, 255, (8, 3))
    colour = colours[np.abs(colours - behind).sum(axis=1).argmax()]
    if CLASSES[label - 1] == "digit":
        return colour
    return 0.6 * colour + 0.4 * _part_of_photograph(split, pixels.shape[1], pixels.shape[0], rng)


def _make_split(output: Path, split: str, count: int, seed: int) -> dict[str, Any]:
    """Make the pictures and label maps of a split; returns the contents of its COCO file."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for kind in ("images", "labels"):
        (output / kind / split).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels, objects = draw_scene(split, index, seed)
        name = f"{index:05d}"
        Image.fromarray(pixels).save(output / "images" / split / f"{name}.jpg", quality=95)
        Image.fromarray(label_map(objects, pixels.shape[:2])).save(output / "labels" / split / f"{name}.png")
        height, width = pixels.shape[:2]
        images.append({"id": index + 1, "file_name": f"{name}.jpg", "height": height, "width": width})
        annotations += [_annotation(each, index + 1) for each in objects]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    categories = [{"id": id_, "name": name} for id_, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def label_map(objects: Sequence[SceneObject], size: tuple[int, ...]) -> np.ndarray:
    """Return the class of each pixel: uint8 (H, W), 0 where no object is."""
    labels = np.zeros(size, dtype=np.uint8)
    for each in objects:
        labels[each.mask] = each.label
    return labels


def _annotation(each: SceneObject, image_id: int) -> dict[str, Any]:
    """Return an object as COCO writes it, without its id."""
    box = tight_box(each.mask)
    assert box is not None  # an object is seen
    outlined = each.outline is not None
    return {
        "image_id": image_id,
        "category_id": CATEGORY_IDS[each.label - 1],
        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
        "area": int(each.mask.sum()),
        "iscrowd": 0,
        "segmentation": [each.outline.round(2).ravel().tolist()] if outlined else encode_mask(each.mask),  # type: ignore[union-attr]
    }


def _is_complete(output: Path, settings: SceneSettings) -> bool:
    """Return whether a folder holds the scenes of these settings."""
    try:
        held = json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    counts = [len(list((output / "images" / split).glob("*.jpg"))) for split in SPLITS]
    return held == asdict(settings) and counts == [settings.train, settings.validation]


def main() -> None:
    """Make the scenes that the command line asks for."""
    parser = argparse.ArgumentParser(
        "python -m tools.study.scenes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make the scenes in")
    parser.add_argument("--train", type=int, default=300, help="training scenes (default %(default)s)")
    parser.add_argument("--validation", type=int, default=100, help="validation scenes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of places, objects and colours (default %(default)s)")
    arguments = parser.parse_args()
    try:
        make_scenes(**vars(arguments))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(run_tool("tools.study.scenes", main))
