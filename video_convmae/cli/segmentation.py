"""What `evaluate` and `predict` do with a segmenter."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from video_convmae.cli.dense import PICTURES, merge_data, pictures_in, print_metrics, refuse_options
from video_convmae.config import EvaluateConfig

DRAWN = 20  # pictures that `evaluate --plot` draws
NAMES = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc", "largest_class_miou": "largest class alone: mIoU"}


def evaluate_segmenter(config: EvaluateConfig, folder: Path) -> dict[str, Any]:
    """Test a segmenter on a folder of pictures with label maps; return the contents of metrics.json.

    Writes metrics.json (mIoU, mAcc, aAcc), classes.json (IoU and accuracy of each class) and bad_records.jsonl if a
    picture could not be read; with `plot` also the first pictures with their predicted classes as colours.

    Raises:
        UserError: an option of classifiers is given.
    """
    from video_convmae import build_dense
    from video_convmae.data.segmentation import read_pairs
    from video_convmae.engine.distributed import init_distributed
    from video_convmae.engine.segmentation import write_segmentation
    from video_convmae.runs import load_segmenter
    from video_convmae.visualize.segments import overlay

    refuse_options(config, "segmenter", "batch_size")
    with init_distributed(config.device) as info:
        model, run = load_segmenter(config.weights, config.ema)
        data, path = merge_data(config, run.data, info, "a folder of pictures with label maps")
        maps = data.validation_maps if path == data.validation else None
        records = read_pairs(path, data.root, config.maps or maps)
        precision = config.precision or run.validate.precision or run.train.precision
        test = replace(run.validate, precision=precision)
        inference = build_dense.build_segmentation_inference(model.to(info.device), data, records, test, info)
        if info.is_main:
            print(f"{config.weights}: {len(records)} pictures, label maps in {records.maps}", flush=True)
        classes = inference.classes

        def draw(index: int, image: Any, labels: Any) -> None:
            if index < DRAWN:
                (folder / PICTURES).mkdir(parents=True, exist_ok=True)
                name = Path(records.name(index)).stem
                picture = overlay(image.permute(1, 2, 0).numpy(), labels.numpy(), classes)
                picture.save(folder / PICTURES / f"{index:05d}_{name}.png")

        started = time.perf_counter()
        result = inference.run(draw if config.plot else None)
        if not info.is_main:
            return result.metrics()
        seconds = time.perf_counter() - started
        names = data.labels if isinstance(data.labels, tuple) else None
        speed = {"seconds": seconds, "pictures_per_second": len(records) / seconds}
        metrics = write_segmentation(result, folder, names, {"weights": config.weights, **speed})
        print_metrics(metrics, NAMES, "no pixel has a class")
        return metrics


def predict_segments(weights: str, files: Sequence[str], output: Path, device: str) -> int:
    """Segment pictures, and those in folders: write NAME.png, the classes (values of label maps as in training), and
    NAME_overlay.png, their colours over the picture.

    Args:
        weights: of a segmenter.
        files: pictures, or folders of them.
        output: folder of the results.
        device: as in a run.

    Returns:
        The exit status: 1 if a picture could not be read.
    """
    import numpy as np
    from PIL import Image

    from video_convmae import build_dense
    from video_convmae.data.datasets import read_picture
    from video_convmae.data.decoding import DecodeError
    from video_convmae.data.segmentation import SegmentationRecords, whole_picture
    from video_convmae.engine.distributed import init_distributed
    from video_convmae.runs import load_segmenter
    from video_convmae.visualize.segments import overlay

    model, run = load_segmenter(weights)
    names = run.data.labels if isinstance(run.data.labels, tuple) else None
    test = replace(run.validate, precision=run.validate.precision or run.train.precision)
    failed = 0
    output.mkdir(parents=True, exist_ok=True)
    with init_distributed(device) as info:
        nothing = SegmentationRecords(Path(), Path(), [])
        inference = build_dense.build_segmentation_inference(model.to(info.device), run.data, nothing, test, info)
        for place, file in enumerate(pictures_in(files)):
            try:
                pixels = read_picture(str(file), inference.pictures.reader)
            except DecodeError as error:
                failed += 1
                print(f"cannot be read: {error}", file=sys.stderr, flush=True)
                continue
            height, width = pixels.shape[:2]
            image = whole_picture(height, width, run.data.augmentation).picture(pixels)
            labels = inference.predict(image, (height, width), str(file)).numpy()
            name = f"{place:05d}_{file.stem}"
            values = (labels + int(run.data.zero_is_ignored)).astype(np.uint8)
            Image.fromarray(values).save(output / f"{name}.png")
            overlay(pixels, labels, inference.classes).save(output / f"{name}_overlay.png")
            counts = np.bincount(labels.reshape(-1), minlength=inference.classes)
            largest = [label for label in np.argsort(-counts, kind="stable")[:5].tolist() if counts[label]]
            words = (
                f"{label if names is None else names[label]} {counts[label] / labels.size:.0%}" for label in largest
            )
            print(f"{file}: {', '.join(words)}", flush=True)
    print(f"label maps and overlays are in {output}", flush=True)
    return 1 if failed else 0
