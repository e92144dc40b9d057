"""Make clips of a third-party world: first-person views of Doom maps (ViZDoom), where the held button is the class.

    pip install -e ".[study]" -c constraints.txt
    python -m tools.study.doom --output runs/study/doom

An agent stands somewhere on a map of Freedoom: Phase 2 and holds one of six buttons for 16 frames (two game tics each):
it walks forward or backward, strafes or turns. Every start is played once with every button, so the six clips begin
with the same frame and one frame cannot tell the class; turning and strafing to one side look much alike, except that
near things pass faster. Starts where a wall or a step blocks a walk, or a view has too little texture, are left out. No
monsters, no weapon, no status bar. Training and validation use different maps. As in tools.study.clips, training clips
are a quarter wider.

Output: as of tools.study.clips, with the one task `how`: `train/*.mp4`, `validation/*.mp4`; the lists `train_how.txt`
and `validation_how.txt` (start after start, the six buttons in order), the class names beside them; and, last of all,
`settings.json`: a folder that holds it is complete. Same settings, same bytes, whatever the number of processes (with
the same versions of the libraries on the same kind of machine). Left and right are labels, so training must not flip.

ViZDoom's wheel contains the engine and Freedoom (freedoom.github.io: levels and textures; licence BSD-3-Clause, which
allows use and redistribution with its notice). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import atexit
import json
import math
import os
import re
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from tools.study.clips import MARGIN, SETTINGS_FILE, SPLITS, is_complete, remove_clips, write_h264
from video_convmae.cli import run_tool

# Class names, ViZDoom's buttons, and which way a button moves the agent: degrees counter-clockwise from its view.
BUTTONS = {
    "move forward": ("MOVE_FORWARD", 0),
    "move backward": ("MOVE_BACKWARD", 180),
    "strafe left": ("MOVE_LEFT", 90),
    "strafe right": ("MOVE_RIGHT", -90),
    "turn left": ("TURN_LEFT", None),
    "turn right": ("TURN_RIGHT", None),
}
CLASSES = tuple(BUTTONS)

FRAMES = 16
TICS = 2  # a frame. The game has 35 a second; a turn is 7 degrees a frame, 5 of 64 pixels
FPS = 17
SETTLE_TICS = 12  # after a landing the view sinks and rises
# Map units that must be clear of walls all around a start: 15 frames of walking are 146, half of the agent is 16.
CLEARANCE = 165
MIN_TEXTURE = 4.0  # grey levels; a view of one blank wall or of darkness has 1 to 3
MAX_TRIES = 200  # about one start of three is taken
HEIGHTS = {120: "RES_160X120", 240: "RES_320X240", 480: "RES_640X480"}
MAX_SIZE = max(HEIGHTS) * MARGIN // (MARGIN + 2)

RECIPE = 2  # raise it when the same settings give other clips, so that earlier folders are made again
CLIP_NAME = re.compile(r"\d{5}_(move|strafe|turn)_[a-z]+_map\d\d\.mp4")


@dataclass(frozen=True)
class DoomSettings:
    """Everything that determines the contents of the folder."""

    train: int
    validation: int
    size: int
    seed: int
    recipe: int = RECIPE

    def __post_init__(self) -> None:
        for name in SPLITS:
            count = getattr(self, name)
            if count < 1 or count % len(CLASSES):
                expected = f"a multiple of {len(CLASSES)}: every start is played with every button"
                raise ValueError(f"{name} is {count}; expected {expected}")
        if self.size % 2 or not 16 <= self.size <= MAX_SIZE:
            raise ValueError(f"size is {self.size}; expected an even number of pixels from 16 to {MAX_SIZE}")


@dataclass(frozen=True)
class Start:
    """Where a clip begins: a map ("map07"), a place in map units, and a turn in degrees from the map's own view."""

    map: str
    x: int
    y: int
    turn: float


def make_doom_clips(
    output: str | Path,
    train: int = 6000,
    validation: int = 600,
    size: int = 64,
    seed: int = 0,
    processes: int | None = None,
) -> None:
    """Make the clips; do nothing if the folder already holds these clips, complete.

    Args:
        output: destination folder. Clips that an earlier call with other settings left there are removed.
        train: training clips, a multiple of the six buttons.
        validation: validation clips, likewise.
        size: side of a validation clip in pixels.
        seed: clips of another seed begin elsewhere.
        processes: None: one for each core.

    Raises:
        ImportError: ViZDoom is not installed.
        ValueError: a setting is out of range.
    """
    settings = DoomSettings(train, validation, size, seed)
    output = Path(output).resolve()  # the processes work in another folder
    if is_complete(output, asdict(settings), [f"{split}_how" for split in SPLITS]):
        print(f"{output} already holds these clips")
        return
    _import_vizdoom()
    remove_clips(output, CLIP_NAME)
    with (
        TemporaryDirectory() as scratch,
        ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn"), os.chdir, (scratch,)) as pool,
        tqdm(total=train + validation, desc="making clips", unit="clip") as progress,
    ):
        for split in SPLITS:
            (output / split).mkdir(parents=True, exist_ok=True)
            lines = []
            starts = range(getattr(settings, split) // len(CLASSES))
            make = partial(_make_clips, output, split, find_places(split), settings=settings)
            for names in pool.map(make, starts, chunksize=4):
                lines += [f"{name} {label}\n" for label, name in enumerate(names)]
                progress.update(len(names))
            (output / f"{split}_how.txt").write_text("".join(lines), encoding="utf-8")
            (output / f"{split}_how.labels.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    (output / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


class Engine:
    """A running game that plays a start with a button. It leaves files in the working directory."""

    def __init__(self, size: int) -> None:
        vizdoom = _import_vizdoom()
        self.size = size
        self.game = game = vizdoom.DoomGame()
        height = min(height for height in HEIGHTS if height >= size)
        game.set_doom_game_path(str(_wad_path()))
        game.set_doom_config_path(f"vizdoom_{os.getpid()}.ini")
        game.set_screen_resolution(getattr(vizdoom.ScreenResolution, HEIGHTS[height]))
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_window_visible(False)
        game.set_mode(vizdoom.Mode.PLAYER)
        for hide in ("hud", "weapon", "crosshair", "messages", "screen_flashes"):
            getattr(game, f"set_render_{hide}")(False)
        game.set_available_buttons([getattr(vizdoom.Button, button) for button, _ in BUTTONS.values()])
        game.add_available_button(vizdoom.Button.TURN_LEFT_RIGHT_DELTA)
        for variable in ("POSITION_X", "POSITION_Y", "ANGLE"):
            game.add_available_game_variable(getattr(vizdoom.GameVariable, variable))
        game.add_game_args("-nomonsters +cl_showsecretmessage 0")
        game.init()
        atexit.register(game.close)  # ends the engine's own process

    def play(self, start: Start, label: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Hold the button of a class from a start.

        Returns:
            The frames, uint8 `(T, size, size, 3)`, and where the agent is in each, `(T, 3)`: x, y in map units and the
            direction of its view in degrees counter-clockwise. None where the map ended (an exit, a death).
        """
        idle = [0.0] * (len(CLASSES) + 1)
        held = [float(label == index) for index in range(len(idle))]
        self.game.set_doom_map(start.map)
        self.game.set_seed(0)  # of flickering lights
        self.game.new_episode()
        self.game.send_game_command(f"warp {start.x} {start.y}")
        self.game.make_action([*idle[:-1], start.turn], 1)
        self.game.make_action(idle, SETTLE_TICS)
        frames, path = [], []
        for _ in range(FRAMES):
            if self.game.is_episode_finished():
                return None
            state = self.game.get_state()
            frames.append(self._picture(state.screen_buffer))
            path.append(state.game_variables)
            self.game.make_action(held, TICS)
        return np.stack(frames), np.stack(path)

    def _picture(self, screen: np.ndarray) -> np.ndarray:
        """Return the middle square of the screen `(H, W, 3)` at the size of a clip."""
        height, width, _ = screen.shape
        margin = (width - height) / 2
        box = (margin, 0, width - margin, height)
        return np.asarray(Image.fromarray(screen).resize((self.size, self.size), Image.Resampling.BOX, box=box))


def find_places(split: str) -> dict[str, np.ndarray]:
    """Return, for each map of a split, where things stand clear of walls: `(n, 3)`, x, y, distance of the next wall.

    Every fourth of the 32 maps is for validation.
    """
    places = {}
    for name, lump in _maps(_wad_path().read_bytes()).items():
        if (int(name.removeprefix("map")) % 4 == 0) == (split == "validation"):
            things = np.unique(lump(1, 5)[:, :2], axis=0).astype(float)
            distance = _wall_distance(things, lump(2, 7), lump(4, 2).astype(float))
            places[name] = np.column_stack([things, distance])[distance > CLEARANCE]
    return {name: found for name, found in places.items() if len(found)}


def draw_start(places: dict[str, np.ndarray], rng: np.random.Generator) -> Start:
    """Draw a map, a place on it, a start no further from it than keeps its clearance, and a view anywhere."""
    name = rng.choice(list(places))
    x, y, distance = places[name][rng.integers(len(places[name]))]
    angle, away = rng.uniform(0, 2 * math.pi), rng.uniform(0, distance - CLEARANCE)
    place = round(x + away * math.cos(angle)), round(y + away * math.sin(angle))
    return Start(str(name), *place, turn=rng.uniform(-180, 180))


def is_free(path: np.ndarray, heading: float | None) -> bool:
    """Return whether nothing stopped or deflected an agent on its path `(T, 3)` (of `Engine.play`).

    A walk starts slowly, so its steps grow; a wall shortens them or turns them aside, a teleporter lengthens one.
    `heading` is the walk's direction relative to the view in degrees, None for a turn on the spot.
    """
    steps = np.diff(path[:, :2], axis=0)
    if heading is None:
        return bool(np.abs(steps).max() < 0.1)
    angle = np.deg2rad(path[0, 2] + heading)
    along = steps @ [np.cos(angle), np.sin(angle)]
    aside = steps @ [-np.sin(angle), np.cos(angle)]
    return bool(along[-1] > 1 and np.diff(along).min() > -0.1 and np.abs(aside).max() < 0.5)


def _make_clips(
    output: Path, split: str, places: dict[str, np.ndarray], index: int, settings: DoomSettings
) -> list[str]:
    """Find a start and make its clips, one a class; returns their paths in the folder."""
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    margin = settings.size // MARGIN
    start, clips = _find_start(_engine(settings.size + 2 * margin), partial(draw_start, places, rng))
    names = []
    for label, frames in enumerate(clips):
        if split == "validation":
            frames = frames[:, margin:-margin, margin:-margin]
        button = CLASSES[label].replace(" ", "_")
        names.append(f"{split}/{index * len(CLASSES) + label:05d}_{button}_{start.map}.mp4")
        write_h264(output / names[-1], frames, FPS)
    return names


def _find_start(engine: Engine, draw: Callable[[], Start]) -> tuple[Start, list[np.ndarray]]:
    """Return the first drawn start from which every button works, and the clip of each."""
    for _ in range(MAX_TRIES):
        start, clips = draw(), []
        for label, (_, heading) in enumerate(BUTTONS.values()):
            played = engine.play(start, label)
            if (
                played is None
                or not is_free(played[1], heading)
                or min(map(_texture, played[0][[0, -1]])) < MIN_TEXTURE
            ):
                break
            clips.append(played[0])
        else:
            return start, clips
    raise RuntimeError(f"none of {MAX_TRIES} starts leaves every walk free; the maps of this ViZDoom differ")


@cache
def _engine(size: int) -> Engine:
    return Engine(size)


def _texture(frame: np.ndarray) -> float:
    """Return the mean absolute difference of neighbouring pixels, in grey levels of 255."""
    grey = frame.astype(np.float32).mean(-1)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2


def _maps(wad: bytes) -> dict[str, Callable[[int, int], np.ndarray]]:
    """Return, for each map of a WAD file, a reader of its lumps.

    The reader takes a lump's place behind the map's name (1: things, 2: lines, 4: corners) and its columns, and returns
    16-bit numbers `(rows, columns)`. Format: the Unofficial Doom Specs, chapters 2 and 4.
    """
    count, offset = struct.unpack("<ii", wad[4:12])
    lumps = [struct.unpack("<ii8s", wad[start : start + 16]) for start in range(offset, offset + 16 * count, 16)]

    def read(index: int, place: int, columns: int) -> np.ndarray:
        begin, length, _ = lumps[index + place]
        return np.frombuffer(wad, "<i2", length // 2, begin).reshape(-1, columns)

    names = [name.rstrip(b"\0").decode("ascii", "replace").lower() for _, _, name in lumps]
    return {name: partial(read, index) for index, name in enumerate(names) if re.fullmatch(r"map\d\d", name)}


def _wall_distance(points: np.ndarray, lines: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Return the distance of each point `(P, 2)` from the nearest line that blocks: so marked, or with no back side."""
    walls = lines[(lines[:, 2] & 1 > 0) | (lines[:, 6] == -1)]
    begin, end = (corners[walls[:, column].astype(np.uint16)] for column in (0, 1))
    along = end - begin
    squared = (along**2).sum(-1)

    def distance(point: np.ndarray) -> float:
        place = (((point - begin) * along).sum(-1) / squared).clip(0, 1)
        return float(np.sqrt(((begin + place[:, None] * along - point) ** 2).sum(-1).min()))

    return np.array([distance(point) for point in points])


def _import_vizdoom() -> Any:
    try:
        import vizdoom
    except ImportError as error:
        raise ImportError('ViZDoom is not installed: pip install -e ".[study]" -c constraints.txt') from error
    return vizdoom


def _wad_path() -> Path:
    return Path(_import_vizdoom().__file__).parent / "freedoom2.wad"


def main() -> None:
    """Make the clips that the command line asks for."""
    parser = argparse.ArgumentParser(
        "python -m tools.study.doom", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make the clips in")
    parser.add_argument("--train", type=int, default=6000, help="training clips (default %(default)s)")
    parser.add_argument("--validation", type=int, default=600, help="validation clips (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of a clip in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of places and views (default %(default)s)")
    parser.add_argument("--processes", type=int, help="default: one for each core")
    arguments = parser.parse_args()
    try:
        make_doom_clips(**vars(arguments))
    except (ValueError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(run_tool("tools.study.doom", main))
