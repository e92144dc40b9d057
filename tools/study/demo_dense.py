"""The dense demo: a tiny detector and a tiny segmenter, from pretrained weights and from scratch, in minutes on a CPU.

    make demo-dense

The scenes (tools/study/scenes.py) are photographs with shapes and handwritten digits on them, made at run time from
what ships inside the wheels of scikit-image and scikit-learn; nothing is downloaded. Validation scenes show other
photographs and other digits than training scenes.

The pretrained weights are those of the image demo's recipe (configs/debug/pretrain_digits.yaml), at twice the size: the
detector needs maps with strides of 4, 8, 16 and 32 pixels, so a token has 16. Each head is trained from them and from
scratch: same configuration, same steps. Beside the results stand those of predicting nothing, and of the largest class:
a detector that finds every object exactly and calls each by the most frequent class; a segmenter that calls every pixel
photograph.

It writes to runs/demo-dense: metrics.json, detections.png and segmentation.png, the scenes in data/, the runs in
pretrain/, detection/ and segmentation/. An interrupted demo resumes; a finished one is repeated. It exits with an error
if a detector or a segmenter has learned nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from tools.study.demo_image import make_digits, pretrain_digits
from tools.study.scenes import CLASSES, make_scenes
from tools.study.training import is_finished, remove_runs_of_other_settings, require_finished, side_by_side
from video_convmae.atomic import write_text
from video_convmae.cli import run_tool
from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.parser import parse
from video_convmae.cli.segmentation import predict_segments
from video_convmae.cli.train_detection import train_detection
from video_convmae.cli.train_segmentation import train_segmentation
from video_convmae.config import EvaluateConfig
from video_convmae.config_dense import TrainDetectionConfig, TrainSegmentationConfig
from video_convmae.data.coco import CocoRecords, image_results, read_coco
from video_convmae.data.masks import draw_mask
from video_convmae.engine.coco import evaluate_coco
from video_convmae.visualize.detections import Drawn, draw
from video_convmae.visualize.segments import overlay

CONFIGS = {
    task: Path(__file__).parents[2] / "configs" / "debug" / f"{task}_scenes.yaml"
    for task in ("detection", "segmentation")
}
LARGER = ("--model.image_size=64", "--model.strides=[4,2,2]")  # of the image demo's pretraining
STARTS = ("pretrained", "scratch")
NUMBERS = ("box_ap", "mask_ap", "miou")
SHOWN, SCALE = 8, 2  # scenes on a sheet, and how often each of their pixels is repeated
MIN_AP, MIN_MIOU = 0.12, 0.22  # the largest class scores 0.05 and 0.14


def baselines(records: CocoRecords, label_maps: Path) -> dict[str, dict[str, float | None]]:
    """Return what predicting nothing, and the largest class, score on the validation scenes.

    Args:
        records: their objects.
        label_maps: folder of their label maps.
    """
    miou = largest_class_miou(label_maps)
    results = true_results(records)
    largest = Counter(each["category_id"] for each in results).most_common(1)[0][0]
    found = evaluate_coco([each | {"category_id": largest} for each in results], records)
    return {
        "nothing": {"box_ap": 0.0, "mask_ap": 0.0, "miou": miou},
        "largest_class": {"box_ap": found["box_ap"], "mask_ap": found["mask_ap"], "miou": miou},
    }


def true_results(records: CocoRecords) -> list[dict[str, Any]]:
    """Return every object as a detection in COCO's format, as a perfect detector would."""
    results = []
    for record in records:
        boxes = np.array([each.box for each in record.objects])
        boxes[:, 2:] += boxes[:, :2]
        labels, scores = np.array([each.label for each in record.objects]), np.ones(len(boxes))
        masks = [
            draw_mask(each.segmentation, record.height, record.width)
            for each in record.objects
            if each.segmentation is not None
        ]
        results += image_results(record, records.categories, boxes, labels, scores, masks)
    return results


def largest_class_miou(label_maps: Path) -> float:
    """Return the mean intersection over union of calling every pixel by the most frequent class."""
    counts = np.zeros(len(CLASSES) + 1)
    for path in sorted(label_maps.glob("*.png")):
        counts += np.bincount(np.asarray(Image.open(path)).ravel(), minlength=len(counts))
    return float(counts.max() / counts.sum() / np.count_nonzero(counts))


# Runs


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        "python -m tools.study.demo_dense", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo-dense"), help="folder for all results (default %(default)s)"
    )
    parser.add_argument("--data_only", action="store_true", help="make the scenes and train nothing")
    args = parser.parse_args()
    started = time.perf_counter()
    output, data = args.output, args.output / "data"
    make_scenes(data)
    if args.data_only:
        return
    settings = {name: path.read_text(encoding="utf-8") for name, path in CONFIGS.items()}
    remove_runs_of_other_settings(output, settings, ["pretrain", *CONFIGS])
    torch.set_num_threads(1)  # as in the image demo
    make_digits(output / "digits")
    pretrain_digits(output / "pretrain", output / "digits", 0, *LARGER)
    records = read_coco(data / "annotations" / "instances_validation.json")
    metrics: dict[str, Any] = {start: {} for start in STARTS}
    for task, head in {"detection": detect, "segmentation": segment}.items():
        print(f"{task.capitalize()}, from the pretrained weights and from scratch (logs beside the runs):", flush=True)
        runs = [output / task / start for start in STARTS]
        calls = [partial(head, run, data, weights) for run, weights in zip(runs, (output / "pretrain", None))]
        for start, found in zip(STARTS, side_by_side(calls, runs)):
            metrics[start] |= found
    metrics |= baselines(records, data / "labels" / "validation")
    metrics["seconds"] = time.perf_counter() - started
    draw_detections(output, records).save(output / "detections.png")
    draw_segmentation(output, data).save(output / "segmentation.png")
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(report_demo_dense(metrics, output))
    if failed := what_failed(metrics):
        sys.exit(f"not learned: {'; '.join(failed)}")


def detect(run: Path, data: Path, weights: Path | None, *edits: str) -> dict[str, float]:
    """Train and test a detector on the scenes in `data`, unless that is done; return its AP of boxes and masks.

    Args:
        run: the run folder; the detections lie in its `test/detections.json`.
        data: the scenes.
        weights: where to start; None: from scratch.
        edits: of the configuration.
    """
    if not is_finished(run):
        print(f"\n{run}:", flush=True)
        train_detection(parse(TrainDetectionConfig, [*_arguments("detection", run, data, weights), *edits]))
        require_finished(run)
    metrics = evaluate(parse(EvaluateConfig, [f"--weights={run}", f"--output={run / 'test'}", "--device=cpu"]))
    return {name: metrics[name] or 0.0 for name in ("box_ap", "mask_ap")}


def segment(run: Path, data: Path, weights: Path | None, *edits: str) -> dict[str, float]:
    """Train and test a segmenter, like `detect`; return its mIoU. Maps of the shown scenes lie in `maps`."""
    if not is_finished(run):
        print(f"\n{run}:", flush=True)
        train_segmentation(parse(TrainSegmentationConfig, [*_arguments("segmentation", run, data, weights), *edits]))
        require_finished(run)
    metrics = evaluate(parse(EvaluateConfig, [f"--weights={run}", f"--output={run / 'test'}", "--device=cpu"]))
    predict_segments(str(run), [str(path) for path in shown_scenes(data)], run / "maps", "cpu")
    return {"miou": metrics["miou"]}


def _arguments(task: str, run: Path, data: Path, weights: Path | None) -> list[str]:
    start = [] if weights is None else [f"--init.weights={weights}"]
    return [f"--config={CONFIGS[task]}", f"--output={run}", f"--data.root={data}", *start]


def shown_scenes(data: Path) -> list[Path]:
    """Return the pictures of the scenes that the sheets show, the first of the validation."""
    return sorted((data / "images" / "validation").glob("*.jpg"))[:SHOWN]


# Report


def report_demo_dense(metrics: dict[str, Any], output: Path) -> str:
    """Return the metrics as a table."""
    titles = {
        "pretrained": "pretrained",
        "scratch": "from scratch",
        "nothing": "predicting nothing",
        "largest_class": "the largest class",
    }
    lines = ["\n                      box AP  mask AP     mIoU"]
    for name, title in titles.items():
        lines.append(f"  {title:18}" + "".join(f"{metrics[name][number]:9.1%}" for number in NUMBERS))
    lines.append(f"Pictures: {output / 'detections.png'}, {output / 'segmentation.png'}")
    return "\n".join(lines)


def what_failed(metrics: dict[str, Any]) -> list[str]:
    """Return which models have learned nothing."""
    least = {"box_ap": MIN_AP, "mask_ap": MIN_AP, "miou": MIN_MIOU}
    return [
        f"{number} {start} is {metrics[start][number]:.3f}, expected at least {least[number]}"
        for start in STARTS
        for number in NUMBERS
        if metrics[start][number] < least[number]
    ]


# Pictures


def draw_detections(output: Path, records: CocoRecords) -> Image.Image:
    """Draw the objects of the shown scenes and what each detector finds, of a score of 0.5 or more."""
    found = {"truth": true_results(records)}
    for start in STARTS:
        found[start] = json.loads((output / "detection" / start / "test" / "detections.json").read_text())
    rows = []
    for record in list(records)[:SHOWN]:
        pixels = np.asarray(Image.open(record.path))
        of_record = [
            [each for each in results if each["image_id"] == record.image_id and each["score"] >= 0.5]
            for results in found.values()
        ]
        rows.append([draw_objects(pixels, results, records) for results in of_record])
    return sheet(rows, list(found))


def draw_objects(pixels: np.ndarray, results: Sequence[dict[str, Any]], records: CocoRecords) -> Image.Image:
    """Draw results in COCO's format on a picture `(H, W, 3)`, enlarged."""
    names = dict(records.categories)
    drawn = []
    for result in sorted(results, key=lambda each: -each["score"]):
        x, y, width, height = (SCALE * side for side in result["bbox"])
        mask = _enlarge(draw_mask(result["segmentation"], *pixels.shape[:2]))
        drawn.append(Drawn(names[result["category_id"]], result["score"], (x, y, x + width, y + height), mask))
    return draw(_enlarge(pixels), drawn)


def draw_segmentation(output: Path, data: Path) -> Image.Image:
    """Draw the label maps of the shown scenes and what each segmenter predicts."""
    rows = []
    for place, path in enumerate(shown_scenes(data)):
        pixels = np.asarray(Image.open(path))
        name = f"{place:05d}_{path.stem}.png"
        maps = [data / "labels" / "validation" / f"{path.stem}.png"]
        maps += [output / "segmentation" / start / "maps" / name for start in STARTS]
        rows.append([draw_labels(pixels, np.asarray(Image.open(each))) for each in maps])
    return sheet(rows, ["truth", *STARTS])


def draw_labels(pixels: np.ndarray, labels: np.ndarray) -> Image.Image:
    """Draw a label map `(H, W)` over a picture `(H, W, 3)`, enlarged; where it is 0 the picture stays."""
    objects = np.where(labels > 0, labels.astype(np.int64), -1)
    return overlay(_enlarge(pixels), _enlarge(objects), len(CLASSES) + 1)


def _enlarge(pixels: np.ndarray) -> np.ndarray:
    """Repeat every pixel along the first two dimensions: names are written on the pictures."""
    return pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Return pictures in rows and columns, with a title over each column."""
    cell, title = 4 + max(max(each.size) for row in rows for each in row), 16
    result = Image.new("RGB", (cell * len(titles), title + cell * len(rows)), "white")
    draw = ImageDraw.Draw(result)
    for column, text in enumerate(titles):
        draw.text((column * cell + 2, 2), text, fill="black")
        for place, row in enumerate(rows):
            result.paste(row[column], (column * cell, title + place * cell))
    return result


if __name__ == "__main__":
    sys.exit(run_tool("tools.study.demo_dense", main))
