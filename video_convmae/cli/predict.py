"""Print the most probable classes of videos or images, or detect objects on pictures or segment them.

    video-convmae predict runs/k400 clip.mp4 other.webm
    video-convmae predict vit_b_k710.pth frames/ 'others/img_*' --labels kinetics400 --json
    video-convmae predict runs/vitdet folder/ picture.jpg --output runs/vitdet/found

    video-convmae predict runs/k400 match.mp4 --window 16 --stride 4 --hop 32 --output timelines

prints a timeline: the stretches of a video of any length in which the windows have one most probable class. --output
draws it, and writes every window's classes.

A file may be a video, an image, a folder of frames, or one of several series in a folder (between quotes). The views of
the run's own test protocol are averaged. A file that cannot be read is reported on stderr; the others are still
predicted, and the exit status is 1. A detector or a segmenter takes pictures and folders of them, and draws what it
finds.
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from video_convmae.atomic import refuse_overwriting
from video_convmae.cli.detection import predict_detections
from video_convmae.cli.parser import CommandLine, within
from video_convmae.cli.segmentation import predict_segments
from video_convmae.errors import UserError

if TYPE_CHECKING:
    from video_convmae.predictor import Prediction, Predictor, WindowPrediction


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    parser = CommandLine("predict", __doc__)
    parser.add_argument("weights", help="run folder, a checkpoint of one (checkpoints/best), or a published classifier")
    parser.add_argument("files", nargs="+", help="videos, images, folders of frames or 'FOLDER/img_*'")
    parser.add_argument("--labels", help="class names: kinetics400, something_something_v2, or a file whose line n "
                        "names class n; default: the run's own")  # fmt: skip
    parser.add_argument("--top", type=within(int, least=1), help="number of classes (default 5)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each file: file, predictions")
    parser.add_argument("--window", type=within(int, least=1), help="print a timeline: frames that a window shows, as "
                        "many as the model takes")  # fmt: skip
    parser.add_argument("--stride", type=within(int, least=1), help="of a timeline: frames of the file from one of a "
                        "window to the next (default: the run's)")  # fmt: skip
    parser.add_argument("--fps", type=within(float, above=0), help="of a timeline: frames a second of a window, in "
                        "place of --stride")  # fmt: skip
    parser.add_argument("--hop", type=within(int, least=1), help="of a timeline: frames of the file between the starts "
                        "of two windows (default: window x stride; with --fps required)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (CUDA if available), cpu, cuda")
    parser.add_argument("--output", help="folder of the pictures of a timeline, a detector or a segmenter")
    parser.add_argument("--least", type=within(float, least=0, most=1), help="of a detector: score from "
                        "which an object counts (default 0.5)")  # fmt: skip
    args = parser.parse_args(arguments)

    from video_convmae.data.decoding import DecodeError
    from video_convmae.engine.checkpoint import find_weights
    from video_convmae.engine.distributed import init_distributed
    from video_convmae.models.autoencoder import Autoencoder
    from video_convmae.predictor import load
    from video_convmae.runs import run_kind

    kind = run_kind(find_weights(args.weights))
    dense = kind in ("detection", "segmentation")
    foreign = {"labels": dense, "top": dense, "json": dense, "window": dense, "least": kind != "detection"}
    of_timelines = {"output": not dense, "stride": True, "fps": True, "hop": True}
    if given := [f"--{name}" for name, is_foreign in foreign.items() if is_foreign and getattr(args, name)]:
        raise UserError(
            f"{args.weights} is a run of {kind or 'finetune'}, which has no {', '.join(given)}; leave it out"
        )
    given = [f"--{name}" for name, is_one in of_timelines.items() if is_one and getattr(args, name)]
    if given and args.window is None:
        raise UserError(f"{', '.join(given)} without --window, which prints a timeline; give it, or leave this out")
    if dense and args.output is None:
        raise UserError(f"{args.weights} is a run of {kind}: --output DIR names the folder of its pictures")
    if kind == "segmentation":
        return predict_segments(args.weights, args.files, Path(args.output), args.device)
    if kind == "detection":
        least = 0.5 if args.least is None else args.least
        return predict_detections(args.weights, args.files, Path(args.output), least, args.device)

    predictor = load(args.weights, labels=args.labels)
    if isinstance(predictor.model, Autoencoder):
        raise UserError(f"{args.weights} was pretrained only: it has no classes (video-convmae finetune adds them)")
    if args.window not in (None, frames := predictor.model.config.num_frames):
        raise UserError(f"--window is {args.window}, and the model takes {frames} frames; expected {frames}")
    names = timeline_names(args.files)
    if args.output is not None:
        refuse_overwriting([Path(args.output, f"{name}.{end}") for name in names for end in ("csv", "png")], args.files)
        importlib.import_module("matplotlib")  # where it is missing, that is said now, not after hours of prediction
    failed = 0
    with init_distributed(args.device) as info:
        predictor.model.to(info.device)
        for file, name in zip(args.files, names):
            try:
                if args.window is not None:
                    print_timeline(predictor, file, name, args)
                    continue
                predictions = predictor(file, args.top or 5)
            except DecodeError as error:
                failed += 1
                print(f"cannot be read: {error}", file=sys.stderr, flush=True)
            else:
                print(_as_json(file, predictions) if args.json else _as_text(file, predictions), flush=True)
    return 1 if failed else 0


def timeline_names(files: Sequence[str]) -> list[str]:
    """Return the name of each file's pictures, without an ending."""
    from video_convmae.data.records import Record, Records
    from video_convmae.engine.windows import video_names

    return video_names(Records([Record(file) for file in files]), "")


def print_timeline(predictor: Predictor, file: str, name: str, args: Namespace) -> None:
    """Print the stretches of a video as they end; with --output, write NAME.csv and draw NAME.png.

    Raises:
        DecodeError: the file cannot be read, or not further; what was read before is printed and drawn.
    """
    from video_convmae.data.decoding import DecodeError
    from video_convmae.visualize.timeline import (
        Timeline,
        as_plain,
        draw_timeline,
        merge_windows,
        text_line,
        write_table,
    )

    timeline, error = Timeline(), None
    every: list[dict[str, object]] = []

    def read() -> Iterator[WindowPrediction]:
        nonlocal error
        try:
            for window in predictor.windows(file, hop=args.hop, stride=args.stride, fps=args.fps, top=args.top or 5):
                if not args.json and not window.number:
                    print(file)
                if args.json:
                    every.append(as_plain(window))
                timeline.add(window)
                yield window
        except DecodeError as problem:
            error = problem

    path = None if args.output is None else Path(args.output, name)
    for stretch in merge_windows(read() if path is None else write_table(read(), path.with_name(f"{path.name}.csv"))):
        timeline.stretches.append(stretch)
        if not args.json:
            print(text_line(stretch, timeline.unit), flush=True)
    if args.json and every:
        print(json.dumps({"file": file, "timeline": list(map(as_plain, timeline.stretches)), "windows": every}))
    if path is not None and timeline.stretches:
        draw_timeline(timeline, file, path.with_name(f"{path.name}.png"))
    if error is not None:
        raise error


def _as_text(file: str, predictions: Sequence[Prediction]) -> str:
    return "\n".join([file, *(f"{prediction.score:8.2%}  {prediction.name}" for prediction in predictions)])


def _as_json(file: str, predictions: Sequence[Prediction]) -> str:
    return json.dumps({"file": file, "predictions": [prediction._asdict() for prediction in predictions]})
