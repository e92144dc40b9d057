"""What a classifier sees in videos or images: the most probable classes of each file.

    python tools/predict.py runs/k400 clip.mp4 other.webm
    python tools/predict.py vit_b_k710.pth frames/ --labels data_lists/kinetics400.txt --json

A file may be a video, an image or a folder of frames. The views of the run's own test protocol are averaged. A file
that cannot be read is reported on stderr; the others are done all the same, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from video_convmae.data.decoding import DecodeError
from video_convmae.engine import distributed
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.predictor import Prediction, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="run folder, a checkpoint of one (checkpoints/best), or a published classifier")
    parser.add_argument("files", nargs="+", help="videos, images, folders of frames")
    parser.add_argument("--labels", type=Path, help="file of class names, line n names class n; default: the run's own")
    parser.add_argument("--top", type=_at_least_one, default=5, help="how many classes (default 5)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each file: file, predictions")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda")
    given = parser.parse_args(arguments)
    try:
        predictor = load(given.weights, labels=given.labels)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    if isinstance(predictor.model, Autoencoder):
        parser.error(f"{given.weights} was pretrained only: it has no classes (tools/finetune.py adds them)")
    failed = 0
    with distributed.init_distributed(given.device) as group:
        predictor.model.to(group.device)
        for file in given.files:
            try:
                predictions = predictor(file, given.top)
            except DecodeError as error:
                failed += 1
                print(f"cannot be read: {error}", file=sys.stderr, flush=True)
            else:
                print(_line(file, predictions) if given.json else _text(file, predictions), flush=True)
    return 1 if failed else 0


def _text(file: str, predictions: Sequence[Prediction]) -> str:
    return "\n".join([file, *(f"{prediction.score:8.2%}  {prediction.name}" for prediction in predictions)])


def _line(file: str, predictions: Sequence[Prediction]) -> str:
    return json.dumps({"file": file, "predictions": [prediction._asdict() for prediction in predictions]})


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return int(text)
