"""The demo's clips: what the classes show, and that a folder of them is complete, balanced and reproducible."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tools.study import clips as tool
from video_convmae.data.records import read_list

SMALL = {"train": 16, "validation": 8, "size": 32, "seconds": 1.0, "fps": 12, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("clips")
    tool.make_motion_clips(output, **SMALL)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@given(
    motion=st.sampled_from(tool.CLASSES),
    width=st.integers(100, 1000),
    height=st.integers(100, 1000),
    frames=st.integers(2, 60),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_the_camera_never_leaves_the_photograph(motion: str, width: int, height: int, frames: int, seed: int) -> None:
    path = tool.draw_path(motion, frames, (width, height), np.random.default_rng(seed))
    (left, top), (right, bottom) = path.bounds()
    assert min(left, top) > -1e-6
    assert right < width + 1e-6
    assert bottom < height + 1e-6
    assert len(path.width) == frames


@pytest.mark.parametrize("motion", tool.CLASSES)
def test_each_class_shows_its_motion(motion: str) -> None:
    """Follow a light that the first frame shows right of and above the centre (or the camera's way) to the last."""
    photo_size = (400, 300)
    path = tool.draw_path(motion, 16, photo_size, np.random.default_rng(5))
    light_uv = np.array([0.3, -0.3, 1.0])
    light = path.matrices()[0] @ light_uv
    rows, columns = np.mgrid[0 : photo_size[1], 0 : photo_size[0]] + 0.5
    glow = 255 * np.exp(-((columns - light[0]) ** 2 + (rows - light[1]) ** 2) / 200)
    frames = tool.render(Image.fromarray(np.repeat(glow[..., None], 3, -1).astype(np.uint8)), path, 64)

    def brightest(frame: np.ndarray) -> np.ndarray:
        row, column = np.unravel_index(frame[..., 0].argmax(), frame.shape[:2])
        return (np.array([column, row]) + 0.5) / 32 - 1

    before, after = brightest(frames[0]), brightest(frames[3])
    np.testing.assert_allclose(before, light_uv[:2], atol=0.08)
    moved = after - before
    kind, _, way = motion.partition(" ")
    if kind == "pan":  # the picture goes the other way than the camera
        expected = {"left": (1, 0), "right": (-1, 0), "up": (0, 1), "down": (0, -1)}[way]
        assert moved @ expected > 0.06
        assert abs(moved @ expected[::-1]) < 0.05
    elif kind == "zoom":
        growth = np.linalg.norm(after) / np.linalg.norm(before)
        assert growth > 1.05 if way == "in" else growth < 0.95
    else:  # y grows downwards, so a picture that turns counter-clockwise turns from (0.3, -0.3) towards (0, -0.4)
        turned = before[0] * after[1] - before[1] * after[0]
        assert turned < -0.02 if way == "clockwise" else turned > 0.02


def test_lists_are_balanced_and_read_back(folder: Path) -> None:
    assert (folder / "labels.txt").read_text().splitlines() == list(tool.CLASSES)
    for split, count in (("train", 16), ("validation", 8)):
        records = read_list(folder / f"{split}.txt", root=folder)
        assert all(Path(record.path).is_file() for record in records)
        assert Counter(record.label for record in records) == dict.fromkeys(range(8), count // 8)


def test_training_and_validation_share_no_photograph(folder: Path) -> None:
    train, validation = (set(tool.PHOTOGRAPHS[split]) for split in ("train", "validation"))
    assert not train & validation
    assert not any("motorcycle" in name for name in validation)
    shown = {split: {path.stem.split("_", 3)[-1] for path in (folder / split).iterdir()} for split in tool.PHOTOGRAPHS}
    assert not shown["train"] & shown["validation"]


def test_clips_are_h264_with_b_frames(folder: Path) -> None:
    path = next((folder / "train").iterdir())
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12
    assert [(frame.width, frame.height) for frame in frames] == [(32, 32)] * 12
    assert PictureType.B in {int(frame.pict_type) for frame in frames}
    images = [frame.to_ndarray(format="rgb24").astype(int) for frame in frames]
    assert np.abs(images[0] - images[-1]).mean() > 3, "nothing moves"


def test_a_longer_clip_has_a_keyframe_a_second(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    tool.write_h264(path, np.random.default_rng(0).integers(0, 255, (32, 32, 32, 3), dtype=np.uint8), fps=16)
    with av.open(str(path)) as container:
        keys = [index for index, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert keys[0] == 0
    assert 2 <= len(keys) <= 4


def test_same_seed_same_bytes_other_seed_other_bytes(folder: Path, tmp_path: Path) -> None:
    tool.make_motion_clips(tmp_path / "same", **SMALL)
    assert contents(tmp_path / "same") == contents(folder)
    tool.make_motion_clips(tmp_path / "other", **{**SMALL, "seed": 4})
    clip = "train/00000_pan_left_astronaut.mp4"
    assert (tmp_path / "other" / clip).read_bytes() != (folder / clip).read_bytes()


def test_a_finished_folder_is_left_alone_and_a_broken_one_redone(tmp_path: Path) -> None:
    few = {**SMALL, "train": 2, "validation": 1}
    tool.make_motion_clips(tmp_path, **few)
    clips = sorted((tmp_path / "train").glob("*.mp4"))
    good = contents(tmp_path)
    changed = clips[0].stat().st_mtime_ns

    tool.make_motion_clips(tmp_path, **few)
    assert clips[0].stat().st_mtime_ns == changed

    (tmp_path / tool.SETTINGS_FILE).unlink()  # as a run leaves it that was stopped
    clips[0].write_bytes(b"half a cl")
    tool.make_motion_clips(tmp_path, **few)
    assert contents(tmp_path) == good

    clips[1].unlink()
    tool.make_motion_clips(tmp_path, **few)
    assert contents(tmp_path) == good


def test_other_settings_replace_our_clips_and_nobody_elses_files(tmp_path: Path) -> None:
    mine = tmp_path / "train" / "holiday.mp4"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    tool.make_motion_clips(tmp_path, **{**SMALL, "train": 3, "validation": 1})
    tool.make_motion_clips(tmp_path, **{**SMALL, "train": 2, "validation": 1})
    assert mine.read_bytes() == b"mine"
    assert len(list((tmp_path / "train").glob("0*.mp4"))) == 2
    assert json.loads((tmp_path / tool.SETTINGS_FILE).read_text())["train"] == 2


@pytest.mark.parametrize(
    ("change", "message"), [({"size": 33}, "even"), ({"train": 0}, "train"), ({"fps": 0}, "frames")]
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tool.make_motion_clips(tmp_path / "out", **{**SMALL, **change})
    assert not (tmp_path / "out").exists()
