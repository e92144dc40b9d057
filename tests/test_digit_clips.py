"""The study's clips: what the classes show, and that a folder of them is complete, balanced and reproducible."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from PIL import Image

from tools.study import clips as tool
from video_convmae.data.records import class_names, read_list

SMALL = {"train": 16, "validation": 8, "size": 32, "frames": 8, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("clips")
    tool.make_digit_clips(output, **SMALL)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("how", "way"), enumerate([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
)
def test_each_class_moves_the_digit_its_way(how: int, way: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a grey background the digit is what differs from it; y grows downwards."""
    monkeypatch.setattr(tool, "photographs", lambda split: [Image.new("RGB", (400, 300), (128, 128, 128))])
    size, direction = 64, np.array(way) / np.linalg.norm(way)
    for seed in range(3):
        frames = tool.draw_clip("train", 3, how, size, 8, np.random.default_rng(seed)).astype(float)
        weight = np.abs(frames - 128).sum(axis=3)
        rows, columns = np.mgrid[:size, :size]
        mass = weight.sum(axis=(1, 2))
        centre = np.stack([(weight * columns).sum(axis=(1, 2)) / mass, (weight * rows).sum(axis=(1, 2)) / mass], axis=1)
        moved = (centre[-1] - centre[0]) / size
        assert moved @ direction > 0.15  # its way is 0.25 or more, and an edge may cut the digit
        assert abs(moved[0] * direction[1] - moved[1] * direction[0]) < 0.12


def test_lists_of_both_tasks_are_balanced_and_read_back(folder: Path, tmp_path: Path) -> None:
    for task, names in tool.TASKS.items():
        for split, count in (("train", 16), ("validation", 8)):
            records = read_list(folder / f"{split}_{task}.txt", root=folder)
            assert all(Path(record.path).is_file() for record in records)
            assert tuple(class_names(str(folder / f"{split}_{task}.txt")) or ()) == names
            shown = [names[record.label or 0].replace(" ", "_") for record in records]
            parts = [Path(record.path).stem.split("_", 2) for record in records]
            assert shown == [part[2 if task == "how" else 1] for part in parts]
            if task == "how":
                assert Counter(record.label for record in records) == dict.fromkeys(range(8), count // 8)
    pairs = Counter(tuple(tool.clip_classes(index).values()) for index in range(160))
    assert len(pairs) == 80
    assert set(pairs.values()) == {2}


def test_validation_shows_other_digits_and_photographs() -> None:
    train, validation = (set(tool.PHOTOGRAPHS[split]) for split in ("train", "validation"))
    assert not train & validation
    for known, new in zip(tool.digit_drawings("train"), tool.digit_drawings("validation")):
        assert len(new) == tool.VALIDATION_DIGITS
        assert not {drawing.tobytes() for drawing in known} & {drawing.tobytes() for drawing in new}


def test_clips_are_h264_with_b_frames(folder: Path) -> None:
    for path in folder.glob("*/*.mp4"):
        side = 40 if path.parent.name == "train" else 32  # room for random crops
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert stream.average_rate == 8
        assert [(frame.width, frame.height) for frame in frames] == [(side, side)] * 8
        assert PictureType.B in {int(frame.pict_type) for frame in frames}
        images = [frame.to_ndarray(format="rgb24").astype(int) for frame in frames]
        assert np.abs(images[0] - images[-1]).mean() > 1, "nothing moves"


def test_same_seed_same_bytes_whatever_the_number_of_processes(folder: Path, tmp_path: Path) -> None:
    tool.make_digit_clips(tmp_path / "same", **SMALL, processes=1)
    assert contents(tmp_path / "same") == contents(folder)
    tool.make_digit_clips(tmp_path / "other", **{**SMALL, "train": 1, "validation": 1, "seed": 4}, processes=1)
    clip = "train/00000_0_right.mp4"
    assert (tmp_path / "other" / clip).read_bytes() != (folder / clip).read_bytes()


def test_a_finished_folder_is_left_alone_and_a_broken_one_redone(tmp_path: Path) -> None:
    few = {**SMALL, "train": 2, "validation": 1, "processes": 1}
    tool.make_digit_clips(tmp_path, **few)
    clips = sorted((tmp_path / "train").glob("*.mp4"))
    good = contents(tmp_path)
    changed = clips[0].stat().st_mtime_ns

    tool.make_digit_clips(tmp_path, **few)
    assert clips[0].stat().st_mtime_ns == changed

    (tmp_path / tool.SETTINGS_FILE).unlink()  # as a run leaves it that was stopped
    clips[0].write_bytes(b"half a cl")
    tool.make_digit_clips(tmp_path, **few)
    assert contents(tmp_path) == good

    clips[1].unlink()
    tool.make_digit_clips(tmp_path, **few)
    assert contents(tmp_path) == good


def test_other_settings_replace_our_clips_and_nobody_elses_files(tmp_path: Path) -> None:
    mine = tmp_path / "train" / "holiday.mp4"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    for train in (3, 2):
        tool.make_digit_clips(tmp_path, **{**SMALL, "train": train, "validation": 1}, processes=1)
    assert mine.read_bytes() == b"mine"
    assert len(list((tmp_path / "train").glob("0*.mp4"))) == 2
    assert json.loads((tmp_path / tool.SETTINGS_FILE).read_text())["train"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 33}, "size is 33; expected an even number"),
        ({"train": 0}, "train is 0; expected 1 clip or more"),
        ({"validation": 0}, "validation is 0"),
        ({"frames": 1}, "frames is 1; expected 2 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tool.make_digit_clips(tmp_path / "out", **{**SMALL, **change})
    assert not (tmp_path / "out").exists()
