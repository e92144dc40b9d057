"""Videos of the kinds that the loader is measured on, made when they are asked for: no data set is needed.

A camera pans and zooms over a photograph (those of make_motion_clips.py) while a piece of another one crosses the
picture, under a little noise. Real encoders at the sizes and settings in which the data sets are had; bytes a frame lie
near those of real clips (Kinetics at 340x256: 1,300 to 2,500; a Something-Something clip: 2,900).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from tools.study.clips import PHOTOGRAPHS, photograph


@dataclass(frozen=True)
class Kind:
    """How the files of a data set are encoded."""

    suffix: str
    codec: str
    width: int
    height: int
    fps: tuple[int, ...]  # files take turns
    seconds: tuple[float, float]  # shortest, longest
    keyframe_every: int
    options: dict[str, str]
    sampling: str  # with which the data set is sampled: dense or uniform
    noise: float  # deviation in grey levels


KINDS = {
    "kinetics": Kind(
        ".mp4", "libx264", 340, 256, (30, 25), (10.0, 10.0), 250, {"crf": "23", "preset": "medium"}, "dense", 1.5
    ),
    "something": Kind(
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


def make_files(folder: Path, name: str, count: int, seed: int = 0) -> Path:
    """Make `count` files of a kind in a folder, or find them there.

    Args:
        folder: for the files.
        name: "kinetics" or "something".
        count: files.
        seed: of the motions.

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
        _write(folder / file, kind, index, np.random.default_rng([seed, index]))
        lines.append(f"{file} {index}\n")
    path.write_text("".join(lines))
    done.write_text(json.dumps(settings))
    return path


def _write(path: Path, kind: Kind, index: int, rng: np.random.Generator) -> None:
    fps = kind.fps[index % len(kind.fps)]
    count = round(fps * rng.uniform(*kind.seconds))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(kind.codec, rate=fps, options=kind.options)
        stream.width, stream.height, stream.pix_fmt = kind.width, kind.height, "yuv420p"
        stream.codec_context.gop_size = kind.keyframe_every
        stream.codec_context.thread_count = 1
        for place, picture in enumerate(_film(kind, count, fps, rng)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = place, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _film(kind: Kind, count: int, fps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Frames, uint8 (height, width, 3)."""
    names = [name for group in PHOTOGRAPHS.values() for name in group]
    scene, other = (photograph(names[place]) for place in rng.choice(len(names), 2, replace=False))
    size = (kind.width, kind.height)
    piece = other.resize((kind.height // 2, kind.height // 2))
    shape = Image.new("L", piece.size)
    ImageDraw.Draw(shape).ellipse((0, 0, *piece.size), fill=255)
    noise = rng.normal(0, kind.noise, (8, kind.height, kind.width, 1))
    largest = min(scene.width / kind.width, scene.height / kind.height)
    x, y, zoom, across, down = (_wander(count, fps, rng) for _ in range(5))
    for place in range(count):
        scale = largest * (0.65 + 0.25 * zoom[place])
        width, height = kind.width * scale, kind.height * scale
        left, top = x[place] * (scene.width - width), y[place] * (scene.height - height)
        view = scene.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
        spare = kind.width - piece.width, kind.height - piece.height
        view.paste(piece, (round(across[place] * spare[0]), round(down[place] * spare[1])), shape)
        yield (np.asarray(view) + noise[rng.integers(8)]).round().clip(0, 255).astype(np.uint8)


def _wander(count: int, fps: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) a smooth way between 0 and 1: three swings of 1.5 to 8 seconds."""
    seconds = np.arange(count) / fps
    swings = [np.sin(2 * np.pi * (seconds / rng.uniform(1.5, 8) + rng.uniform())) for _ in range(3)]
    return 0.5 + np.mean(swings, axis=0) / 2
