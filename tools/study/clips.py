"""Make the study's data: handwritten digits that move over drifting photographs, as H.264 files with two label lists.

    python -m tools.study.clips --output runs/demo/data

A clip shows one digit of scikit-learn's 1,797, in a random colour, moving in one of eight directions in front of a
small part of a photograph, which drifts a random way. The same clips carry two labels: **what** (which digit:
appearance, as in Kinetics) and **how** (which way it moves, as in Something-Something). As the background moves too,
neither one frame nor the sum of all motion tells the direction. The photographs ship inside the wheels of scikit-image
and scikit-learn; nothing is downloaded. Digits and photographs are split before anything is drawn: validation clips
show others than training clips. Training clips are a quarter wider, so that random crops of the size of a validation
clip move the scene by up to an eighth.

Output: `train/*.mp4`, `validation/*.mp4`; the lists `train_how.txt`, `train_what.txt` and those of the validation
(`path label`, relative to the folder), each with its class names beside it (`train_how.labels.txt`); and, last of all,
`settings.json`: a folder that holds it is complete. Same settings, same bytes, whatever the number of processes (with
the same versions of the libraries on the same kind of machine). Left and right are labels, so training must not flip.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm
from video_convmae.benchmark.files import PHOTOGRAPHS, photograph

from video_convmae.cli import run_tool

# Clockwise from the right: class k moves along the angle k x 45 degrees, y growing downwards.
HOW = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
WHAT = tuple(str(digit) for digit in range(10))
TASKS = {"how": HOW, "what": WHAT}
SPLITS = tuple(PHOTOGRAPHS)  # train, validation

VALIDATION_DIGITS = 30  # of each of the ten digits' 174 to 183 drawings
MARGIN = 8  # a training clip has size // MARGIN pixels more on every side
RECIPE = 6  # raise it when the same settings give other clips, so that earlier folders are made again
SETTINGS_FILE = "settings.json"
CLIP_NAME = re.compile(r"\d{5}_\d_(up|down|left|right).*\.mp4")


@dataclass(frozen=True)
class ClipSettings:
    """Everything that determines the contents of the folder."""

    train: int
    validation: int
    size: int
    frames: int
    seed: int
    recipe: int = RECIPE

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 clip or more")
        if self.size < 16 or self.size % 2:
            raise ValueError(f"size is {self.size}; expected an even number of pixels, 16 or more (yuv420p needs even)")
        if self.frames < 2:
            raise ValueError(f"frames is {self.frames}; expected 2 or more")


def make_digit_clips(
    output: str | Path,
    train: int = 4000,
    validation: int = 400,
    size: int = 32,
    frames: int = 8,
    seed: int = 0,
    processes: int | None = None,
) -> None:
    """Make the clips; do nothing if the folder already holds these clips, complete.

    Args:
        output: destination folder. Clips that an earlier call with other settings left there are removed.
        train: training clips; the 80 pairs of a digit and a direction come in turn.
        validation: validation clips.
        size: side of a validation clip in pixels; what is seen does not depend on it.
        frames: frames of a clip, 8 a second.
        seed: clips of another seed show other digits at other places.
        processes: None: one for each core.
    """
    settings = ClipSettings(train, validation, size, frames, seed)
    output = Path(output)
    if is_complete(output, asdict(settings), [f"{split}_{task}" for split in SPLITS for task in TASKS]):
        print(f"{output} already holds these clips")
        return
    remove_clips(output, CLIP_NAME)
    with (
        ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn")) as pool,
        tqdm(total=train + validation, desc="making clips", unit="clip") as progress,
    ):
        for split, count in (("train", train), ("validation", validation)):
            (output / split).mkdir(parents=True, exist_ok=True)
            names = []
            for name in pool.map(partial(_make_clip, output, split, settings=settings), range(count), chunksize=50):
                names.append(name)
                progress.update()
            for task, classes in TASKS.items():
                labels = (clip_classes(index)[task] for index in range(count))
                lines = "".join(f"{name} {label}\n" for name, label in zip(names, labels))
                (output / f"{split}_{task}.txt").write_text(lines, encoding="utf-8")
                (output / f"{split}_{task}.labels.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    (output / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def clip_classes(index: int) -> dict[str, int]:
    """Return the class of a clip in each task, from its number: the eight ways in turn, then the ten digits."""
    return {"how": index % len(HOW), "what": index // len(HOW) % len(WHAT)}


@cache
def digit_drawings(split: str) -> list[np.ndarray]:
    """Return the drawings `(n, 8, 8)` of each digit in a split, 0 to 1. The split is the same for every seed."""
    digits = load_digits()
    drawings = []
    for digit in range(10):
        order = np.random.default_rng([0, digit]).permutation(np.flatnonzero(digits.target == digit))
        chosen = order[:VALIDATION_DIGITS] if split == "validation" else order[VALIDATION_DIGITS:]
        drawings.append((digits.images[chosen] / 16).astype(np.float32))
    return drawings


@cache
def photographs(split: str) -> list[Image.Image]:
    """Return the photographs of a split."""
    return [photograph(name) for name in PHOTOGRAPHS[split]]


def draw_clip(
    split: str, what: int, how: int, size: int, frames: int, rng: np.random.Generator, margin: int = 0
) -> np.ndarray:
    """Draw a clip of `size` pixels and a margin around them: uint8 (T, size + 2 margin, size + 2 margin, 3).

    Within `size`, the digit is 0.4 to 0.6 wide, its way 0.25 to 0.43 long with its middle in the middle half; it is
    bright or dark. The background is 12 to 25% of a photograph's width and drifts up to 6% of that width.
    """
    photos, drawings = photographs(split), digit_drawings(split)[what]
    photo, drawing = photos[rng.integers(len(photos))], drawings[rng.integers(len(drawings))]
    time = np.linspace(-0.5, 0.5, frames)[:, None]

    side = size + 2 * margin
    view = rng.uniform(0.12, 0.25) * photo.width * side / size
    drift = _vector(rng.uniform(0, 2 * math.pi)) * rng.uniform(0, 0.06) * photo.width
    border = (view + np.abs(drift)) / 2
    centre = rng.uniform(border, np.array(photo.size) - border)
    boxes = [(*(middle - view / 2), *(middle + view / 2)) for middle in centre + time * drift]
    background = np.stack([np.asarray(photo.resize((side, side), Image.Resampling.BILINEAR, box)) for box in boxes])

    width = rng.uniform(0.4, 0.6) * size
    way = _vector(how * math.pi / 4) * rng.uniform(0.25, 0.43) * size
    places = margin + rng.uniform(0.25, 0.75, 2) * size + time * way
    colour = rng.uniform(170, 255, 3) if rng.random() < 0.5 else rng.uniform(0, 85, 3)
    alpha = np.stack([_stamp(drawing, width, place, side) for place in places])[..., None]
    return (background * (1 - alpha) + colour * alpha).round().clip(0, 255).astype(np.uint8)


def _vector(angle: float) -> np.ndarray:
    """Return the unit vector (x, y) along an angle, clockwise as seen on the picture."""
    return np.array([math.cos(angle), math.sin(angle)])


def _stamp(drawing: np.ndarray, width: float, place: np.ndarray, size: int) -> np.ndarray:
    """Return the opacity `(size, size)` of a drawing that many pixels wide around a place, to fractions of a pixel."""
    padded = Image.fromarray(np.pad(drawing, 1))
    step = drawing.shape[1] / width
    left, top = padded.width / 2 - step * place
    coefficients = (step, 0, left, 0, step, top)
    stamp = padded.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return np.asarray(stamp).clip(0, 1)


def write_h264(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write frames, uint8 (T, H, W, 3), as an H.264 mp4 with B-frames and a keyframe a second.

    Nearly lossless, at 10 KB a clip: at the usual quality so small pictures lose what moves (docs/results.md).
    `b_strategy` 0 puts three B-frames between any two others (left to choose, x264 gives a few of these short clips
    none). One thread: with more, the bytes depend on the machine. `mbtree` off: with it, one clip of 64 pixels encoded
    five times gave up to four different files, without it always one.
    """
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        b_frames = {"bf": "3", "b_strategy": "0"}
        stream.options = {"crf": "2", "g": str(fps), "threads": "1", "mbtree": "0", **b_frames}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _make_clip(output: Path, split: str, index: int, settings: ClipSettings) -> str:
    """Make one clip; returns its path in the folder."""
    classes = clip_classes(index)
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    margin = settings.size // MARGIN if split == "train" else 0
    frames = draw_clip(split, classes["what"], classes["how"], settings.size, settings.frames, rng, margin)
    name = f"{split}/{index:05d}_{WHAT[classes['what']]}_{HOW[classes['how']].replace(' ', '_')}.mp4"
    write_h264(output / name, frames, fps=8)
    return name


def is_complete(output: Path, settings: dict[str, Any], lists: Iterable[str]) -> bool:
    """Return whether a folder holds the clips of these settings and the lists of these names."""
    paths = [output / f"{name}.txt" for name in lists]
    try:
        held = json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
        lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return False
    return held == settings and all((output / line.rsplit(" ", 1)[0]).is_file() for line in lines)


def remove_clips(output: Path, name: re.Pattern[str]) -> None:
    """Remove clips of earlier calls, by their names, and nothing else: the folder may hold a user's files."""
    (output / SETTINGS_FILE).unlink(missing_ok=True)
    for path in output.glob("*/*.mp4"):
        if name.fullmatch(path.name):
            path.unlink()


def main() -> None:
    """Make the clips that the command line asks for."""
    parser = argparse.ArgumentParser(
        "python -m tools.study.clips", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make the clips in")
    parser.add_argument("--train", type=int, default=4000, help="training clips (default %(default)s)")
    parser.add_argument("--validation", type=int, default=400, help="validation clips (default %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="side of a validation clip in pixels (default 32)")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip, 8 a second (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of digits, places and colours (default %(default)s)")
    parser.add_argument("--processes", type=int, help="default: one for each core")
    arguments = parser.parse_args()
    try:
        make_digit_clips(**vars(arguments))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(run_tool("tools.study.clips", main))
