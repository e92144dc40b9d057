"""Measure the recipe for own videos (VIDEO.md) on two-class sets that are made from any folder of real clips.

    python -m tools.study.real VIDEOS --output runs/real --scratch

Each set is made from the clips of the folder, about 300 clips of one class or the other, as many of each from each:

    speed        a second of a clip, as it was filmed or four times as fast
    direction    a second of a clip, forward or backward (not measured unless asked for)
    scuffle      two seconds of a still picture of a clip on which two to five cut-out patches walk, or two of them
                 scuffle; with noise, sometimes shaking or flickering, as surveillance cameras see

It is split **by source clip**: the clips of some sources to learn from, 80 of them, and those of all others to test
on. On each split the documented commands run, as in VIDEO.md: `finetune --config video/probe_own_videos_tiny` with the
given weights (with `--scratch` also with random ones), and `evaluate --baselines`. One thread; half a minute of one
core a split and model.

Files that cannot be decoded from start to end, are too short for a set, or show the same as another, are named and
left out. Output: a folder for each set with its clips, their list, and a folder for each split with its lists and runs;
results.json, a list of rows, and table.md, written after every measurement. The same command resumes. Same settings,
same bytes (with the same versions of the libraries on the same kind of machine). Weights that changed under their name
are measured anew, in rows of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from tools.study.clips import SETTINGS_FILE, is_complete, remove_clips, write_h264
from tools.study.study import Row, cell, origins, write_rows
from video_convmae.atomic import write_text
from video_convmae.cli import run_tool
from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.config import EvaluateConfig, FinetuneConfig
from video_convmae.data.folders import scan_folder
from video_convmae.engine.baselines import TITLES
from video_convmae.engine.checkpoint import Checkpoint, file_digest, find_weights
from video_convmae.machine import describe_machine

FPS = 25
WIDTH, HEIGHT = 160, 120
BORDER = 4  # pixels around a still picture, for shaking
SHORT_SIDE = 180  # of a decoded frame
MAX_FRAMES = 600  # of a file; the rest is not read

COPY_TIMES, COPY_CELLS = 9, 16  # pictures of a file that are compared, and cells along a side
COPY_DISTANCE = 0.5  # 0.14 at most between a clip and its encodings, 1.4 or more between halves of a still scene

TRAIN_CLIPS = 80
RECIPE = 1  # raise it when the same settings give other clips, so that earlier folders are refused
CLIP_NAME = re.compile(r"\d{3,}_\d{3,}_[a-z0-9]+\.mp4")
RANDOM = "random weights"


@dataclass(frozen=True)
class Source:
    """A real clip. path: below the folder of videos. rate: frames a second."""

    path: str
    frames: int
    rate: float

    @property
    def seconds(self) -> float:
        """Its length where no frame is shown twice: one with fewer than 25 frames a second is shown faster."""
        return (self.frames - 1) / max(self.rate, FPS)


@dataclass(frozen=True)
class RealSet:
    """A set of two classes. seconds: length of the shortest source. draw: (frames, rate, label, generator) -> clip."""

    classes: tuple[str, str]
    seconds: float
    draw: Callable[[np.ndarray, float, int, np.random.Generator], np.ndarray]


def main() -> None:
    """Make the sets and measure."""
    parser = argparse.ArgumentParser(
        "python -m tools.study.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, help="folder of real clips of some seconds, at any depth")
    parser.add_argument("--output", type=Path, default=Path("runs/real"), help="folder (default %(default)s)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["speed", "scuffle"], help="default: speed scuffle")
    parser.add_argument("--splits", type=int, default=10, help="random splits by source (default %(default)s)")
    parser.add_argument("--init", default="tiny-moving-digits", help="weights (default %(default)s)")
    parser.add_argument("--scratch", action="store_true", help="also measure the same model with random weights")
    parser.add_argument("--clips", type=int, default=300, help="of a set, about (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of clips and splits (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        measure(**vars(args))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def measure(
    videos: Path,
    output: Path,
    sets: list[str],
    splits: int = 10,
    init: str = "tiny-moving-digits",
    scratch: bool = False,
    clips: int = 300,
    seed: int = 0,
) -> list[Row]:
    """Make sets of the clips in a folder, and measure each on random splits; what is done already is not done again.

    Raises:
        ValueError: fewer than two clips can be used, or the output folder holds other clips.
    """
    models = {f"{init}, {weights_digest(init)[:8]}": init} | ({RANDOM: None} if scratch else {})
    sources = find_sources(videos)
    for name in sets:
        make_set(name, videos, sources, output / name, clips, seed)
    for split in range(splits):
        for name in sets:
            folder = write_split(output / name, split, seed)
            for model, weights in models.items():
                measure_split(folder, {"set": name, "split": split, "model": model}, weights)
                rows = collect_rows(output)
                write_rows(output / "results.json", rows)
                write_text(output / "table.md", table(rows) + "\n")
    print(table(rows))
    return rows


# Sources


def find_sources(videos: Path) -> list[Source]:
    """Return the clips below a folder, in the order of their paths; say which files cannot be used, and why.

    Of files that show the same, the longest is taken: otherwise one would be learned from and another tested on.
    """
    tree = scan_folder(videos)
    found: dict[Source, np.ndarray] = {}
    for path in sorted(path for paths in tree.files.values() for path in paths):
        try:
            frames, rate = read_clip(videos / path)
        except ValueError as error:
            print(f"{path} is left out: {error}")
        else:
            found[Source(path, len(frames), rate)] = shrink(frames)
    taken: list[Source] = []
    for source in sorted(found, key=lambda source: -source.frames):
        same = next((other for other in taken if is_copy(found[source], found[other])), None)
        if same is None:
            taken.append(source)
        else:
            print(f"{source.path} is left out: it shows the same as {same.path}")
    return sorted(taken, key=lambda source: source.path)


def read_clip(path: Path) -> tuple[np.ndarray, float]:
    """Decode a file from its start, 600 frames at most: uint8 (T, H, W, 3), the shorter side 180; and its frame rate.

    Raises:
        ValueError: the file cannot be decoded to its end, or holds no picture.
    """
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}  # a damaged picture is an error
            rate = float(stream.average_rate or stream.guessed_rate or FPS)
            frames = [_small(frame) for frame in islice(container.decode(stream), MAX_FRAMES)]
    except av.FFmpegError as error:
        raise ValueError(error.strerror) from None
    if not frames:
        raise ValueError("it has no picture")
    return np.stack(frames), rate


def _small(frame: av.VideoFrame) -> np.ndarray:
    scale = SHORT_SIDE / min(frame.width, frame.height)
    return frame.to_ndarray(format="rgb24", width=round(frame.width * scale), height=round(frame.height * scale))


def shrink(frames: np.ndarray) -> np.ndarray:
    """Return each frame as 16 x 16 grey cells, standardised: (T, 256) float32."""
    size = (COPY_CELLS, COPY_CELLS)
    grey = [np.asarray(Image.fromarray(frame).convert("L").resize(size, Image.Resampling.BOX)) for frame in frames]
    cells = np.stack(grey).reshape(len(frames), -1).astype(np.float32)
    return (cells - cells.mean(1, keepdims=True)) / (cells.std(1, keepdims=True) + 1e-3)


def is_copy(clip: np.ndarray, longer: np.ndarray) -> bool:
    """Return whether nine frames spread over a clip are all in a longer one, whatever their times: of `shrink`."""
    some = clip[np.linspace(0, len(clip) - 1, COPY_TIMES).astype(int)]
    return all(np.abs(longer - frame).max(axis=1).min() < COPY_DISTANCE for frame in some)


# What a clip shows


def draw_played(
    factors: tuple[int, int], frames: np.ndarray, rate: float, label: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw a second of a clip, played `factors[label]` times as fast (-1: backward), cropped to 60 to 100%."""
    factor = factors[label]
    step = abs(factor) * max(rate / FPS, 1)  # no frame is shown twice
    start = rng.uniform(0, max(0, len(frames) - 1 - step * (FPS - 1)))
    times = np.floor(start + step * np.arange(FPS)).astype(int)
    box = draw_box(frames, rng.uniform(0.6, 1), rng)
    return np.stack([picture(frames[time], box, WIDTH, HEIGHT) for time in times[:: 1 if factor > 0 else -1]])


def draw_scuffle(frames: np.ndarray, rate: float, label: int, rng: np.random.Generator) -> np.ndarray:
    """Draw two seconds of a still picture with two to five patches on it; two of them scuffle where the label is 1.

    Patches are cut from other moments of the clip, 0.1 to 0.36 of the picture high and half as wide, brighter or
    darker; their speeds overlap between the classes.
    """
    count = 2 * FPS
    box = draw_box(frames, rng.uniform(0.5, 0.9), rng)
    still = picture(frames[rng.integers(len(frames))], box, WIDTH + 2 * BORDER, HEIGHT + 2 * BORDER).astype(float)
    side = rng.uniform(0.12, 0.3) * HEIGHT * 0.8
    speed = rng.uniform(0.006, 0.03) * WIDTH
    middle = rng.uniform(0.3, 0.7, 2) * (HEIGHT, WIDTH)
    patches = []
    for number in range(rng.integers(2, 6)):
        width = side * rng.uniform(0.8, 1.2)
        patch = cut_patch(frames, round(width), round(1.5 * width), rng)
        own_speed = speed * rng.uniform(0.5, 1.5)
        if label and number < 2:
            places = middle + rng.normal(0, width / 2, 2) + scuffle(count, 0.7 * own_speed, rng)
        else:
            places = rng.uniform(0.1, 0.9, 2) * (HEIGHT, WIDTH) + walk(count, own_speed, rng)
        patches.append((patch, places))
    shaking = rng.uniform(0, 1.2) * (rng.random() < 0.3)
    shifts = rng.normal(0, shaking, (count, 2)).round().astype(int).clip(-BORDER, BORDER)
    flicker = rng.uniform(0, 4) * (rng.random() < 0.3) * np.sin(np.arange(count) / 2)
    noise = rng.uniform(0, 6)
    clip = []
    for time, (down, right) in enumerate(BORDER + shifts):
        shown = still[down : down + HEIGHT, right : right + WIDTH].copy()
        for patch, places in patches:
            paste(shown, patch, places[time])
        shown += rng.normal(0, noise, (HEIGHT, WIDTH, 1)) + flicker[time]
        clip.append(shown.round().clip(0, 255).astype(np.uint8))
    return np.stack(clip)


def walk(count: int, speed: float, rng: np.random.Generator) -> np.ndarray:
    """Return places (count, 2), y and x, around 0: straight on, bobbing."""
    angle, time = rng.uniform(0, 2 * math.pi), np.arange(count)
    places = speed * (time[:, None] - count // 2) * (math.sin(angle) / 2, math.cos(angle))
    places[:, 0] += rng.uniform(0, 1) * np.sin(rng.uniform(0.4, 0.8) * time)
    return places


def scuffle(count: int, speed: float, rng: np.random.Generator) -> np.ndarray:
    """Return places (count, 2), y and x, around 0: another way and speed every 3 to 8 frames."""
    steps = np.zeros((count, 2))
    time = 0
    while time < count:
        angle, length = rng.uniform(0, 2 * math.pi), rng.integers(3, 9)
        steps[time : time + length] = speed * rng.uniform(0.3, 1.7) * np.array((math.sin(angle), math.cos(angle)))
        time += length
    places = steps.cumsum(axis=0)
    return places - places.mean(axis=0)


def cut_patch(frames: np.ndarray, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Return a part of a random frame, brighter or darker, and its opacity, an ellipse: (height, width, 4) float."""
    frame = frames[rng.integers(len(frames))]
    left, top = rng.uniform(0, 1, 2) * (frame.shape[1] - width, frame.shape[0] - height)
    colours = picture(frame, (left, top, left + width, top + height), width, height)
    colours = (colours * rng.uniform(0.6, 1.3) + rng.uniform(-40, 40)).clip(0, 255)
    rows, columns = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    opacity = (3 * (1 - rows**2 - columns**2)).clip(0, 1)
    return np.dstack([colours, opacity])


def paste(shown: np.ndarray, patch: np.ndarray, place: np.ndarray) -> None:
    """Draw the part of a patch that lies inside a picture, in place; `place` is its middle, y and x."""
    top, left = (place - np.array(patch.shape[:2]) / 2).round().astype(int)
    part = patch[max(0, -top) : max(0, shown.shape[0] - top), max(0, -left) : max(0, shown.shape[1] - left)]
    rows, columns = part.shape[:2]
    under = shown[max(0, top) :, max(0, left) :][:rows, :columns]
    under += part[..., 3:] * (part[..., :3] - under)


def draw_box(frames: np.ndarray, part: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Return a box (left, top, right, bottom) anywhere in the frames: 4:3, this part of the largest."""
    height, width = frames.shape[1:3]
    side = part * min(width, height * WIDTH / HEIGHT)
    left, top = rng.uniform(0, 1, 2) * (width - side, height - side * HEIGHT / WIDTH)
    return left, top, left + side, top + side * HEIGHT / WIDTH


def picture(frame: np.ndarray, box: tuple[float, float, float, float], width: int, height: int) -> np.ndarray:
    """Return a box of a frame, resized: uint8 (height, width, 3)."""
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, box=box))


SETS = {
    "speed": RealSet(("x1", "x4"), 4 * (FPS - 1) / FPS, partial(draw_played, (1, 4))),
    "scuffle": RealSet(("walk", "scuffle"), 1.5, draw_scuffle),
    "direction": RealSet(("forward", "backward"), (FPS - 1) / FPS, partial(draw_played, (1, -1))),
}


# Sets and splits


def make_set(name: str, videos: Path, sources: list[Source], output: Path, clips: int, seed: int) -> None:
    """Make the clips of a set and their list `all.txt`, unless the folder holds them.

    Raises:
        ValueError: fewer than two sources are long enough, or the folder holds clips of other settings.
    """
    real = SETS[name]
    long = [source for source in sources if source.seconds >= real.seconds]
    for source in sources:
        if source not in long:
            print(f"{name}: {source.path} is left out: {source.seconds:.1f} s of {real.seconds:.1f}, at {FPS} frames/s")
    if len(long) < 2:
        raise ValueError(f"{videos} has {len(long)} clips for {name}; expected two or more of {real.seconds:.1f} s")
    settings = {"set": name, "sources": list(map(asdict, long)), "clips": clips, "seed": seed, "recipe": RECIPE}
    if is_complete(output, settings, ["all"]):
        return
    held = output / SETTINGS_FILE
    if held.exists() and json.loads(held.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{output} holds clips of other videos or settings; choose another folder (--output)")
    remove_clips(output, CLIP_NAME)
    (output / "clips").mkdir(parents=True, exist_ok=True)
    pairs = max(1, round(clips / len(long) / 2))
    lines = []
    for number, source in enumerate(long):
        frames, rate = read_clip(videos / source.path)
        for index in range(2 * pairs):
            label = index % 2
            rng = np.random.default_rng([seed, list(SETS).index(name), number, index])
            clip = f"clips/{number:03d}_{index:03d}_{real.classes[label]}.mp4"
            write_h264(output / clip, real.draw(frames, rate, label, rng), FPS)
            lines.append(f"{clip} {label}\n")
        print(f"{name}: {2 * pairs} clips of {source.path}", flush=True)
    write_text(output / "all.txt", "".join(lines))
    write_text(output / "all.labels.txt", "\n".join(real.classes) + "\n")
    write_text(held, json.dumps(settings, indent=2) + "\n")


def write_split(output: Path, split: int, seed: int) -> Path:
    """Write `train.txt` and `validation.txt` of a split of a set; returns their folder."""
    lines = (output / "all.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    sources = np.array([int(Path(line).name.split("_")[0]) for line in lines])
    labels = np.array([int(line.split()[-1]) for line in lines])
    folder = output / f"split_{split}"
    folder.mkdir(exist_ok=True)
    for name, chosen in zip(
        ("train", "validation"), split_sources(sources, labels, np.random.default_rng([seed, split]))
    ):
        write_text(folder / f"{name}.txt", "".join(lines[index] for index in chosen))
        write_text(folder / f"{name}.labels.txt", (output / "all.labels.txt").read_text(encoding="utf-8"))
    return folder


def split_sources(
    sources: np.ndarray, labels: np.ndarray, rng: np.random.Generator, train: int = TRAIN_CLIPS
) -> tuple[np.ndarray, np.ndarray]:
    """Split a set by source: whole sources, in random order, until there are `train` clips; all others to test on.

    At most three sources of five are to learn from. Of their clips, `train` are taken, as many of each class.

    Args:
        sources: (R,), the source of each clip.
        labels: (R,), 0 or 1.
        rng: draws the sources and the clips.
        train: clips to learn from.

    Returns:
        The indices of the clips to learn from and of those to test on, ascending.
    """
    order = rng.permutation(np.unique(sources))
    needed = 1
    while needed < int(0.6 * len(order)) and np.isin(sources, order[:needed]).sum() < train:
        needed += 1
    known = np.isin(sources, order[:needed])
    chosen = [rng.permutation(np.flatnonzero(known & (labels == label)))[: train // 2] for label in (0, 1)]
    return np.sort(np.concatenate(chosen)), np.flatnonzero(~known)


# Measurements


def weights_digest(init: str) -> str:
    """Return what identifies the contents of weights: the same name may mean others tomorrow."""
    found = find_weights(init)
    return found.digest() if isinstance(found, Checkpoint) else file_digest(found)


def measure_split(folder: Path, row: dict[str, Any], weights: str | None) -> None:
    """Run the documented commands on a split, unless its row is there; `weights` None: random ones, of the split."""
    run = folder / re.sub(r"[^\w.-]+", "-", row["model"])
    if (run / "row.json").exists():
        return
    start = [f"--seed={row['split']}"] if weights is None else [f"--init.weights={weights}"]
    lists = [f"--data.train={folder / 'train.txt'}", f"--data.validation={folder / 'validation.txt'}"]
    lists += [f"--data.root={folder.parent}"]
    finetune(parse(FinetuneConfig, ["--config=video/probe_own_videos_tiny", *lists, *start, f"--output={run}"]))
    metrics = evaluate(parse(EvaluateConfig, [f"--weights={run}", f"--output={run / 'test'}", "--baselines"]))
    result: Row = row | {"top1": metrics["top1"], **metrics["baselines"], "tested": metrics["scored"]}
    write_text(run / "row.json", json.dumps(result | describe_machine()) + "\n")


def collect_rows(output: Path) -> list[Row]:
    """Return the rows of all measurements in the folder, whatever the command that made them."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in output.glob("*/split_*/*/row.json")]
    return sorted(
        rows, key=lambda row: (list(SETS).index(row["set"]), row["model"] == RANDOM, row["model"], row["split"])
    )


def table(rows: list[Row]) -> str:
    """Return top-1 in percent, mean and standard deviation over the splits (and their number).

    Below it, how much better each model is than motion energy and than random weights on the same splits.
    """
    sets = list(dict.fromkeys(row["set"] for row in rows))
    lines = [f"| | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for title, values in _results(rows).items():
        cells = [cell([value for (name, _), value in values.items() if name == each]) for each in sets]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", origins(rows)])


def _results(rows: list[Row]) -> dict[str, dict[tuple[str, int], float]]:
    """Return the lines of the table, by title: the number of each set and split."""
    models: dict[str, dict[tuple[str, int], float]] = {}
    baselines: dict[str, dict[tuple[str, int], float]] = {}
    for row in rows:
        place = row["set"], row["split"]
        models.setdefault(row["model"], {})[place] = row["top1"]
        for name, title in TITLES.items():
            baselines.setdefault(title, {})[place] = row[name]
    differences = {}
    for model, top1 in models.items():
        for other, theirs in {"motion energy": baselines.get(TITLES["motion_energy"], {}), **models}.items():
            if model != RANDOM and other in ("motion energy", RANDOM):
                both = {place: top1[place] - theirs[place] for place in top1 if place in theirs}
                differences[f"{model}: better than {other} by"] = both
    return {**models, **baselines, **differences}


if __name__ == "__main__":
    sys.exit(run_tool("tools.study.real", main))
