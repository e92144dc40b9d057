"""Videos to measure the loader on, made on request: no data set is needed.

A camera pans and zooms over a photograph while a piece of another one crosses the picture, under a little noise. The
encoders, sizes and settings are those of the distributed data sets; bytes a frame lie near those of real clips
(Kinetics at 340x256: 1,300 to 2,500; a Something-Something clip: 2,900).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

# Shipped in the wheels of scikit-image and scikit-learn. Left out: drawings and diagrams, pictures under 300 pixels,
# and those with next to no texture (moon, cell, clock). The two motorcycles are one scene through two lenses, so they
# stand on the same side.
PHOTOGRAPHS = {
    "train": (
        "skimage/data/astronaut.png",
        "skimage/data/brick.png",
        "skimage/data/coins.png",
        "skimage/data/grass.png",
        "skimage/data/gravel.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/ihc.png",
        "skimage/data/motorcycle_left.png",
        "skimage/data/motorcycle_right.png",
        "skimage/data/retina.jpg",
        "skimage/data/rocket.jpg",
        "sklearn/datasets/images/flower.jpg",
    ),
    "validation": (
        "skimage/data/camera.png",
        "skimage/data/chelsea.png",
        "skimage/data/coffee.png",
        "sklearn/datasets/images/china.jpg",
    ),
}


@dataclass(frozen=True)
class FileKind:
    """Encoding and sampling of a data set's files."""

    suffix: str
    codec: str
    width: int
    height: int
    fps: tuple[int, ...]  # files take turns
    seconds: tuple[float, float]  # shortest, longest
    keyframe_every: int
    options: dict[str, str]
    sampling: Literal["dense", "uniform"]
    noise: float  # standard deviation in grey levels


KINDS = {
    "kinetics": FileKind(
        ".mp4", "libx264", 340, 256, (30, 25), (10.0, 10.0), 250, {"crf": "23", "preset": "medium"}, "dense", 1.5
    ),
    "something": FileKind(
        ".webm",
        "libvpx-vp9",
        427,
        240,
        (12,),
        (2.5, 5.5),
        128,
        {"crf": "31", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "0"},
        "uniform",
        2.0,
    ),
}


class VideoList(NamedTuple):
    """A list of videos to measure: its name, its file, the folder of its paths, and how its clips are sampled."""

    name: str
    path: Path
    root: Path
    sampling: Literal["dense", "uniform"]


def video_lists(args: argparse.Namespace) -> list[VideoList]:
    """Return the list on the command line, or one of made files for each kind."""
    if args.list is not None:
        return [VideoList(args.list.stem, args.list, args.root, args.sampling)]
    return [
        VideoList(f"{name}-like", make_files(args.folder, name, args.files), args.folder, kind.sampling)
        for name, kind in KINDS.items()
    ]


def make_files(folder: Path, name: str, count: int, seed: int = 0) -> Path:
    """Make `count` files of a kind in a folder, or find them there.

    Args:
        folder: destination.
        name: "kinetics" or "something".
        count: number of files.
        seed: seed of the motions.

    Returns:
        Their list, `path label`, relative to the folder.
    """
    kind = KINDS[name]
    settings = {"kind": asdict(kind), "count": count, "seed": seed}
    path, done = folder / f"{name}.txt", folder / f"{name}.json"
    if done.exists() and json.loads(done.read_text()) == json.loads(json.dumps(settings)):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in tqdm(range(count), desc=f"making {name}-like files", unit="file"):
        file = f"{name}_{index:03d}{kind.suffix}"
        _write_video(folder / file, kind, index, np.random.default_rng([seed, index]))
        lines.append(f"{file} {index}\n")
    path.write_text("".join(lines))
    done.write_text(json.dumps(settings))
    return path


@cache
def photograph(name: str) -> Image.Image:
    """Load a photograph that ships inside an installed package, such as 'skimage/data/coffee.png', as RGB.

    Its short side is reduced to 512 pixels: otherwise most of the time goes into shrinking the 1411 pixels of the
    retina for each clip.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    path = next((path for folder in folders if (path := Path(folder) / inside).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"the photograph {name} is not installed; run: pip install scikit-image scikit-learn")
    with Image.open(path) as file:
        photo = file.convert("RGB")
    ratio = min(1.0, 512 / min(photo.size))
    width, height = (round(side * ratio) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.LANCZOS)


def _write_video(path: Path, kind: FileKind, index: int, rng: np.random.Generator) -> None:
    fps = kind.fps[index % len(kind.fps)]
    count = round(fps * rng.uniform(*kind.seconds))
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(kind.codec, rate=fps, options=kind.options)
        stream.width, stream.height, stream.pix_fmt = kind.width, kind.height, "yuv420p"
        stream.codec_context.gop_size = kind.keyframe_every
        stream.codec_context.thread_count = 1
        for place, picture in enumerate(_draw_frames(kind, count, fps, rng)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = place, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _draw_frames(kind: FileKind, count: int, fps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draw the frames of a video, uint8 (height, width, 3)."""
    names = [name for group in PHOTOGRAPHS.values() for name in group]
    scene, other = (photograph(names[place]) for place in rng.choice(len(names), 2, replace=False))
    size = (kind.width, kind.height)
    piece = other.resize((kind.height // 2, kind.height // 2))
    shape = Image.new("L", piece.size)
    ImageDraw.Draw(shape).ellipse((0, 0, *piece.size), fill=255)
    noise = rng.normal(0, kind.noise, (8, kind.height, kind.width, 1))
    largest = min(scene.width / kind.width, scene.height / kind.height)
    x, y, zoom, across, down = (_smooth_path(count, fps, rng) for _ in range(5))
    for place in range(count):
        scale = largest * (0.65 + 0.25 * zoom[place])
        width, height = kind.width * scale, kind.height * scale
        left, top = x[place] * (scene.width - width), y[place] * (scene.height - height)
        view = scene.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
        spare = kind.width - piece.width, kind.height - piece.height
        view.paste(piece, (round(across[place] * spare[0]), round(down[place] * spare[1])), shape)
        yield (np.asarray(view) + noise[rng.integers(8)]).round().clip(0, 255).astype(np.uint8)


def _smooth_path(count: int, fps: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a smooth path between 0 and 1, `(count,)`: the mean of three sines of 1.5 to 8 seconds."""
    seconds = np.arange(count) / fps
    sines = [np.sin(2 * np.pi * (seconds / rng.uniform(1.5, 8) + rng.uniform())) for _ in range(3)]
    return 0.5 + np.mean(sines, axis=0) / 2
