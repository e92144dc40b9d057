"""Small data sets in COCO's format, written at test time: painted ellipses, their masks in all of COCO's forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as pycocotools_mask

CATEGORIES = ({"id": 3, "name": "round"}, {"id": 18, "name": "flat"}, {"id": 90, "name": "tall"})  # ids with gaps


def ellipse(height: int, width: int, centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    """A mask (height, width) of an ellipse around (x, y), with radii along x and y."""
    y, x = np.mgrid[:height, :width] + 0.5
    return (((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 <= 1).astype(np.uint8)


def ellipse_polygon(centre: tuple[float, float], radii: tuple[float, float]) -> list[float]:
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.array(centre) + np.array(radii) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return points.round(2).ravel().tolist()


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """A mask as plain run lengths."""
    flat = np.concatenate([[0], mask.T.ravel(), [1 - mask.T.ravel()[-1]]])
    ends = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], ends])).tolist()
    return {"size": list(mask.shape), "counts": counts}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    encoded = pycocotools_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def write_coco(
    folder: Path, images: int = 6, size: tuple[int, int] = (48, 64), objects: int = 3, seed: int = 0
) -> tuple[Path, dict[str, Any]]:
    """Write `pictures/*.png` and `objects.json` (every fifth object is a crowd); returns the file and its contents."""
    rng = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": list(CATEGORIES)}
    height, width = size
    for image_id in range(10, 10 + images):
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for _ in range(objects):
            number = len(content["annotations"])
            centre = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height
            radii = rng.uniform(0.03, 0.25) * width, rng.uniform(0.03, 0.25) * height
            mask = ellipse(height, width, centre, radii)
            forms = [ellipse_polygon(centre, radii)], compressed(mask), uncompressed(mask)
            pixels[mask > 0] = (200, 40 * (number % 3), 0)
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            x, y = int(columns[0]), int(rows[0])
            content["annotations"].append(
                {
                    "id": number,  # from 0, which pycocotools cannot match: the evaluation numbers objects anew
                    "image_id": image_id,
                    "category_id": CATEGORIES[number % 3]["id"],
                    "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                    "area": int(mask.sum()),
                    "iscrowd": int(number % 5 == 4),
                    "segmentation": forms[number % 3],
                }
            )
        name = f"{image_id:06d}.png"
        Image.fromarray(pixels).save(folder / "pictures" / name)
        content["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
    return rewrite(folder, content), content


def rewrite(folder: Path, content: dict[str, Any]) -> Path:
    """Write the contents to `folder/objects.json`."""
    path = folder / "objects.json"
    path.write_text(json.dumps(content))
    return path
