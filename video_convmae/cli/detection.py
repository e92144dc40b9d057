"""What `evaluate` and `predict` do with a detector."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from video_convmae.cli.dense import PICTURES, merge_data, pictures_in, print_metrics, refuse_options
from video_convmae.config import EvaluateConfig

NAMES = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP", "mask_ap50": "mask AP50"}


def evaluate_detector(config: EvaluateConfig, folder: Path) -> dict[str, Any]:
    """Test a detector on a data set in COCO's format; return the contents of metrics.json.

    Writes metrics.json (COCO's twelve numbers of boxes, twelve of masks), detections.json (COCO's results format) and
    bad_records.jsonl if a picture could not be read; with `plot` also pictures with boxes and masks.

    Raises:
        UserError: an option of classifiers is given, or the classes are not those of the data set.
    """
    from video_convmae import build_dense
    from video_convmae.atomic import write_text
    from video_convmae.data.coco import read_coco
    from video_convmae.data.records import ListError
    from video_convmae.engine.detection import judge_detector
    from video_convmae.engine.distributed import init_distributed
    from video_convmae.engine.evaluation import write_bad_records
    from video_convmae.runs import load_detector

    refuse_options(config, "detector", "maps")
    with init_distributed(config.device) as info:
        model, run = load_detector(config.weights, config.ema)
        data, path = merge_data(config, run.data, info, "a data set in COCO's format")
        records = read_coco(path, data.root)
        if records.categories != run.categories:
            raise ListError(
                f"the categories of {path} ({len(records.categories)}) are not those of the detector "
                f"({len(run.categories)}); expected the same ids and names"
            )
        batch_size = config.batch_size or run.validate.batch_size
        precision = config.precision or run.validate.precision or run.train.precision
        inference = build_dense.build_detection_inference(data, records, batch_size, precision, info, show=True)
        if info.is_main:
            print(f"{config.weights}: {records.report}", flush=True)
        started = time.perf_counter()
        numbers, results, bad_records = inference.evaluate(model.to(info.device))
        if results is None:
            return numbers
        seconds = time.perf_counter() - started
        metrics = numbers | judge_detector(numbers) | {"weights": config.weights, "seconds": seconds}
        metrics["pictures_per_second"] = len(records) / seconds
        folder.mkdir(parents=True, exist_ok=True)
        write_bad_records(bad_records, folder)
        write_text(folder / "detections.json", json.dumps(results) + "\n")
        write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        if config.plot:
            from video_convmae.visualize.detections import draw_results

            draw_results(records, results, folder / PICTURES)
        print_metrics(metrics, NAMES, "no object to score")
        return metrics


def predict_detections(weights: str, files: Sequence[str], output: Path, least: float, device: str) -> int:
    """Detect objects on pictures, and on those in folders: draw them, and write detections.json.

    The file holds entries of COCO's results format, with the picture's `file` in place of its id and a `name`.

    Args:
        weights: of a detector.
        files: pictures, or folders of them.
        output: folder of the results.
        least: score from which a detection counts.
        device: as in a run.

    Returns:
        The exit status: 1 if a picture could not be read.
    """
    from PIL import ExifTags, Image

    from video_convmae.atomic import write_text
    from video_convmae.build_dense import build_detection_inference
    from video_convmae.data.coco import CocoObject, CocoRecord, CocoRecords, CocoReport
    from video_convmae.data.decoding import DecodeError
    from video_convmae.data.detection import read_pixels
    from video_convmae.engine.detection import on_picture
    from video_convmae.engine.distributed import init_distributed
    from video_convmae.runs import load_detector
    from video_convmae.visualize.detections import Drawn, draw

    model, run = load_detector(weights)
    names = run.data.labels
    failed = 0
    rows: list[tuple[int, str, int, int, int, list[CocoObject]]] = []
    for place, file in enumerate(pictures_in(files)):
        try:
            with Image.open(file) as picture:
                width, height = picture.size
                if picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # turned by 90 degrees when it is read
                    width, height = height, width
        except (OSError, ValueError) as error:
            failed += 1
            print(f"cannot be read: {file}: {error}", file=sys.stderr, flush=True)
        else:
            rows.append((place, str(file.absolute()), place, height, width, []))
    entries: list[dict[str, Any]] = []
    output.mkdir(parents=True, exist_ok=True)
    with init_distributed(device) as info:
        model.to(info.device)
        records = CocoRecords(rows, "", run.categories, CocoReport())
        data = replace(run.data, workers=0)
        precision = run.validate.precision or run.train.precision
        inference = build_detection_inference(data, records, 1, precision, info)
        for index, (record, found, (boxes, masks)), bad in inference.run(
            model, lambda record, transform, found: (record, found, on_picture(record, transform, found))
        ):
            if bad:
                failed += 1
                print(f"cannot be read: {bad[0].error}", file=sys.stderr, flush=True)
                continue
            assert isinstance(record, CocoRecord)
            kept = [k for k, score in enumerate(found.scores.tolist()) if score >= least]
            drawn = [
                Drawn(
                    names[int(found.labels[k]) - 1],
                    float(found.scores[k]),
                    tuple(boxes[k].tolist()),
                    None if masks is None else masks[k],
                )
                for k in kept
            ]
            try:
                pixels = read_pixels(record, inference.pictures.reader)
            except DecodeError as error:
                failed += 1
                print(f"cannot be read: {error}", file=sys.stderr, flush=True)
                continue
            draw(pixels, drawn).save(output / f"{index:05d}_{Path(record.path).stem}.png")
            entries += [{"file": record.path} | each.as_entry() for each in drawn]
            print(f"{record.path}: {', '.join(f'{each.name} {each.score:.2f}' for each in drawn) or 'nothing'}")
    write_text(output / "detections.json", json.dumps(entries) + "\n")
    print(f"pictures and detections.json are in {output}", flush=True)
    return 1 if failed else 0
