"""Make the demo's data: H.264 clips of a camera that moves over photographs, in eight classes of motion.

    python -m tools.study.clips --output runs/demo/data

The photographs ship inside the wheels of scikit-image and scikit-learn; nothing is downloaded. Training and validation
clips show different photographs, so a model has to learn the motion, not the picture.

A class is named by the motion of the CAMERA: in "pan left" the camera moves left, so the picture moves to the right; in
"rotate clockwise" the camera turns clockwise, so the picture turns counter-clockwise; in "zoom in" the picture grows.
Left and right are labels here, so training on these clips must not flip them.

Output: `train/*.mp4`, `validation/*.mp4`, the lists `train.txt` and `validation.txt` (`path label`, relative to the
output folder), `labels.txt` (a class a line) and, last of all, `settings.json`: a folder that holds it is complete.
Same settings, same bytes (with the same versions of the libraries on the same kind of machine).
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample
from tqdm import tqdm
from video_convmae.benchmark.files import PHOTOGRAPHS, photograph

CLASSES = (
    "pan left",
    "pan right",
    "pan up",
    "pan down",
    "zoom in",
    "zoom out",
    "rotate clockwise",
    "rotate counter-clockwise",
)

RECIPE = 2  # raise it when the same settings give other clips, so that earlier folders are made again
SETTINGS_FILE = "settings.json"
MIN_TEXTURE = 4.0  # grey levels; measured on 64-pixel views: sky and retina 1 to 2, a face 6, grass 15
CLIP_NAME = re.compile(r"\d{5}_(pan|zoom|rotate)_.+\.mp4")


@dataclass(frozen=True)
class ClipSettings:
    """Everything that determines the contents of the folder."""

    train: int
    validation: int
    size: int
    seconds: float
    fps: int
    seed: int
    recipe: int = RECIPE

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 clip or more")
        if self.size < 16 or self.size % 2:
            raise ValueError(f"size is {self.size}; expected an even number of pixels, 16 or more (yuv420p needs even)")
        if self.fps < 1 or self.num_frames < 2:
            raise ValueError(f"{self.seconds} seconds at {self.fps} frames a second; expected 2 frames or more")

    @property
    def num_frames(self) -> int:
        """Frames of one clip."""
        return round(self.seconds * self.fps)


@dataclass(frozen=True)
class CameraPath:
    """The view of the camera in each frame: arrays of T values.

    `x`, `y`: the centre of the view; `width`: the side of the square view; `angle`: its turn in radians, positive
    clockwise as seen on the picture (y grows downwards). Lengths are in pixels of the photograph.
    """

    x: np.ndarray
    y: np.ndarray
    width: np.ndarray
    angle: np.ndarray

    def matrices(self) -> np.ndarray:
        """Return the maps (T, 2, 3) from a view's point (u, v, 1), -1 to 1 from edge to edge, to the photograph."""
        cos, sin = self.width / 2 * np.cos(self.angle), self.width / 2 * np.sin(self.angle)
        return np.stack([cos, -sin, self.x, sin, cos, self.y], -1).reshape(-1, 2, 3)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the box around everything seen in the clip: (left, top), (right, bottom)."""
        corners = self.matrices() @ np.array([[-1, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
        return corners.min((0, 2)), corners.max((0, 2))

    def at(self, frames: slice) -> CameraPath:
        """Return the path at some of its frames."""
        return CameraPath(self.x[frames], self.y[frames], self.width[frames], self.angle[frames])


def make_motion_clips(
    output: str | Path,
    train: int = 640,
    validation: int = 128,
    size: int = 32,
    seconds: float = 2.0,
    fps: int = 16,
    seed: int = 0,
) -> None:
    """Make the clips; do nothing if the folder already holds these clips, complete.

    Args:
        output: destination folder. Clips that an earlier call with other settings left there are removed.
        train: training clips; classes and photographs come equally often.
        validation: validation clips.
        size: side of a clip in pixels.
        seconds: length of a clip.
        fps: frames a second.
        seed: clips of another seed show other places at other speeds.
    """
    settings = ClipSettings(train, validation, size, float(seconds), fps, seed)
    output = Path(output)
    if _is_complete(output, settings):
        print(f"{output} already holds these clips")
        return
    _remove_own_files(output)
    with tqdm(total=train + validation, desc="making clips", unit="clip") as progress:
        for split, count in (("train", train), ("validation", validation)):
            (output / split).mkdir(parents=True, exist_ok=True)
            lines = []
            for index in range(count):
                lines.append(_make_clip(output, split, index, settings))
                progress.update()
            (output / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    (output / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    (output / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def draw_path(motion: str, num_frames: int, photo_size: tuple[int, int], rng: np.random.Generator) -> CameraPath:
    """Draw a camera path of a class whose view lies inside a photograph of (width, height) in every frame.

    The camera passes 0.5 to 1 of its view in a pan (1 to 2 pixels a frame for 32 frames of 64 pixels), zooms by 1.5 to
    2.2, or turns by 45 to 100 degrees, with a speed that swells or sinks by up to 30% on the way.
    """
    time = np.linspace(0.0, 1.0, num_frames)
    time = time + rng.uniform(-0.3, 0.3) * np.sin(2 * math.pi * time) / (2 * math.pi)
    roll = math.radians(rng.uniform(-15, 15))
    travel, zoom, turn = rng.uniform(0.5, 1.0), rng.uniform(1.5, 2.2), math.radians(rng.uniform(45, 100))
    still = np.zeros(num_frames)

    kind, _, way = motion.partition(" ")
    x, y, width, angle = still, still, still + 1, still + roll
    if kind == "pan":
        right, down = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[way]
        x = travel * time * (right * math.cos(roll) - down * math.sin(roll))
        y = travel * time * (right * math.sin(roll) + down * math.cos(roll))
    elif kind == "zoom":
        width = zoom ** (-time if way == "in" else time - 1)
    else:
        angle = roll + turn * (time if way == "clockwise" else -time)
    return _place_path(CameraPath(x, y, width, angle), photo_size, rng)


def render(photo: Image.Image, path: CameraPath, size: int) -> np.ndarray:
    """Render the view of the camera: uint8 (T, size, size, 3).

    Against aliasing the photograph is first shrunk until the closest view has one of its pixels for each output pixel;
    then each output pixel is the mean of 2 x 2 bilinear samples, enough for views up to twice as wide.
    """
    shrink = max(1.0, path.width.min() / size)
    width, height = (max(1, round(side / shrink)) for side in photo.size)
    small = photo.resize((width, height), Image.Resampling.LANCZOS)
    picture = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float()
    matrices = path.matrices() * (2 / np.array(photo.size))[:, None] - [0, 0, 1]  # grid_sample's -1 to 1
    grid = affine_grid(torch.from_numpy(matrices).float(), [len(matrices), 3, 2 * size, 2 * size], align_corners=False)
    seen = grid_sample(picture, grid.view(1, -1, 2 * size, 2), padding_mode="border", align_corners=False)
    seen = avg_pool2d(seen, 2)[0].view(3, -1, size, size)
    return seen.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()


def write_h264(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write frames, uint8 (T, H, W, 3), as an H.264 mp4 with B-frames and a keyframe a second.

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
        stream.options = {"crf": "20", "g": str(fps), "threads": "1", "mbtree": "0", **b_frames}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _make_clip(output: Path, split: str, index: int, settings: ClipSettings) -> str:
    """Make one clip; returns its line of the list. Classes alternate first, then photographs."""
    label = index % len(CLASSES)
    names = PHOTOGRAPHS[split]
    photo_name = names[index // len(CLASSES) % len(names)]
    rng = np.random.default_rng([settings.seed, list(PHOTOGRAPHS).index(split), index])
    frames = _draw_frames(photograph(photo_name), CLASSES[label], settings, rng)
    name = f"{split}/{index:05d}_{CLASSES[label].replace(' ', '_')}_{Path(photo_name).stem}.mp4"
    write_h264(output / name, frames, settings.fps)
    return f"{name} {label}\n"


def _draw_frames(photo: Image.Image, motion: str, settings: ClipSettings, rng: np.random.Generator) -> np.ndarray:
    """Draw one clip over a photograph, mirrored half of the time, where its motion can be seen.

    An empty sky shows no motion, so of four paths the first that begins and ends on enough texture is taken, else the
    one with the most.
    """
    if rng.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    candidates = []
    for _ in range(4):
        path = draw_path(motion, settings.num_frames, photo.size, rng)
        ends = render(photo, path.at(slice(None, None, settings.num_frames - 1)), settings.size)
        candidates.append((min(_texture(frame) for frame in ends), path))
        if candidates[-1][0] >= MIN_TEXTURE:
            break
    _, best = max(candidates, key=lambda candidate: candidate[0])
    return render(photo, best, settings.size)


def _texture(frame: np.ndarray) -> float:
    """Return the mean absolute difference of neighbouring pixels, in grey levels of 255."""
    grey = frame.astype(np.float32).mean(-1)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2


def _place_path(path: CameraPath, photo_size: tuple[int, int], rng: np.random.Generator) -> CameraPath:
    """Give a path in units of its own view a random scale and place at which every view lies on the photograph."""
    (left, top), (right, bottom) = path.bounds()
    extent = np.array([right - left, bottom - top])
    scale = (np.array(photo_size) / extent).min() * rng.uniform(0.3, 0.7)
    x, y = rng.uniform(size=2) * (np.array(photo_size) - scale * extent) - scale * np.array([left, top])
    return CameraPath(x + scale * path.x, y + scale * path.y, scale * path.width, path.angle)


def _is_complete(output: Path, settings: ClipSettings) -> bool:
    try:
        held = json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
        lines = [line for split in PHOTOGRAPHS for line in (output / f"{split}.txt").read_text().splitlines()]
    except (OSError, ValueError):
        return False
    return held == asdict(settings) and all((output / line.rsplit(" ", 1)[0]).is_file() for line in lines)


def _remove_own_files(output: Path) -> None:
    """Remove clips of earlier calls, and nothing else: the folder may hold a user's files."""
    (output / SETTINGS_FILE).unlink(missing_ok=True)
    for split in PHOTOGRAPHS:
        for path in output.glob(f"{split}/*.mp4"):
            if CLIP_NAME.fullmatch(path.name):
                path.unlink()


def main() -> None:
    """Make the clips that the command line asks for."""
    parser = argparse.ArgumentParser(
        "python -m tools.study.clips", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make the clips in")
    parser.add_argument("--train", type=int, default=640, help="training clips (default %(default)s)")
    parser.add_argument("--validation", type=int, default=128, help="validation clips (default %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="side of a clip in pixels (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a clip (default %(default)s)")
    parser.add_argument("--fps", type=int, default=16, help="frames a second (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of places and speeds (default %(default)s)")
    arguments = parser.parse_args()
    try:
        make_motion_clips(**vars(arguments))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
