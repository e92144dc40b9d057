"""The study's Doom clips: the held button is the class, motion tells it and one frame does not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tools.study import doom as tool
from video_convmae.data.records import read_list

SMALL = {"train": 96, "validation": 48, "size": 32, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vizdoom", reason='ViZDoom is not installed: pip install -e ".[study]"')
    output = tmp_path_factory.mktemp("doom")
    tool.make_doom_clips(output, processes=2, **SMALL)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded(path: str | Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def labelled(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The middles of clips, uint8 `(n, T, 32, 32, 3)`, and labels of a split."""
    records = read_list(folder / f"{split}_how.txt", root=folder)
    clips = np.stack([decoded(record.path) for record in records])
    margin = (clips.shape[2] - SMALL["size"]) // 2
    return clips[:, :, margin : margin + SMALL["size"], margin : margin + SMALL["size"]], records.labels


def test_the_lists_are_balanced_and_read_back(folder: Path) -> None:
    for split in ("train", "validation"):
        records = read_list(folder / f"{split}_how.txt", root=folder)
        assert all(Path(record.path).is_file() for record in records)
        assert Counter(records.labels.tolist()) == dict.fromkeys(range(6), SMALL[split] // 6)
        assert (folder / f"{split}_how.labels.txt").read_text().splitlines() == list(tool.CLASSES)


def test_clips_are_h264(folder: Path) -> None:
    for split, size in (("train", 40), ("validation", 32)):
        with av.open(str(next((folder / split).iterdir()))) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert [(frame.width, frame.height) for frame in container.decode(stream)] == [(size, size)] * 16


def test_training_and_validation_share_no_map(folder: Path) -> None:
    shown = {split: {path.stem[-5:] for path in (folder / split).iterdir()} for split in ("train", "validation")}
    assert all(shown.values())
    assert not shown["train"] & shown["validation"]


def test_the_six_clips_of_a_start_begin_alike_and_move(folder: Path) -> None:
    clips, _ = labelled(folder, "train")
    starts = clips.reshape(-1, 6, *clips.shape[1:]).astype(int)
    first = np.abs(starts[:, :, 0] - starts[:, :1, 0]).mean((2, 3, 4))
    assert first.max() < 3, "the encoder's noise alone"
    assert len(np.unique(starts[:, 0, 0].reshape(len(starts), -1), axis=0)) == len(starts)
    assert np.abs(starts[:, :, -1] - starts[:, :, 0]).mean((2, 3, 4)).min() > 2


def test_motion_tells_the_class_and_one_frame_does_not(folder: Path) -> None:
    """Chance is 17%. Motion: products of brightness gradients over space and time, means of a 2x2 grid."""

    def motion(clips: np.ndarray) -> np.ndarray:
        grey = clips.astype(np.float32).mean(-1)
        change = np.diff(grey, axis=1)[:, :, 1:, 1:]
        across, down = np.diff(grey, axis=3)[:, 1:, 1:], np.diff(grey, axis=2)[:, 1:, :, 1:]
        products = np.stack([change * across, change * down, across**2, down**2], 1)[..., 1:, 1:]
        grid = products.reshape(len(clips), 4, products.shape[2], 2, 15, 2, 15).mean((2, 4, 6))
        return (grid[:, :2] / grid[:, 2:]).reshape(len(clips), -1)

    def accuracy(features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        return model.fit(features["train"], labels["train"]).score(features["validation"], labels["validation"])

    splits = {split: labelled(folder, split) for split in ("train", "validation")}
    labels = {split: values for split, (_, values) in splits.items()}
    first = {split: clips[:, 0].reshape(len(clips), -1) / 255 for split, (clips, _) in splits.items()}
    assert accuracy({split: motion(clips) for split, (clips, _) in splits.items()}, labels) > 0.4
    assert accuracy(first, labels) < 0.3


def test_same_seed_same_bytes_for_any_number_of_processes(folder: Path, tmp_path: Path) -> None:
    few = {**SMALL, "train": 12, "validation": 6}
    tool.make_doom_clips(tmp_path, processes=1, **few)
    clips = {name: data for name, data in contents(tmp_path).items() if name.endswith(".mp4")}
    assert len(clips) == 18
    whole = contents(folder)
    assert all(whole[name] == data for name, data in clips.items())

    changed = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    tool.make_doom_clips(tmp_path, **few)  # a finished folder is left alone
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")} == changed
    assert json.loads((tmp_path / tool.SETTINGS_FILE).read_text())["train"] == 12


@pytest.mark.parametrize(
    ("change", "message"), [({"size": 33}, "even"), ({"size": 512}, "384"), ({"train": 100}, "multiple of 6")]
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tool.make_doom_clips(tmp_path / "out", **{**SMALL, **change})
    assert not (tmp_path / "out").exists()


def test_a_blocked_or_deflected_walk_is_not_free() -> None:
    ahead = np.column_stack([np.cumsum([0.0, 1, 3, 5, 6]), np.zeros(5), np.zeros(5)])
    assert tool.is_free(ahead, 0)
    assert not tool.is_free(ahead, 90)
    assert not tool.is_free(np.minimum(ahead, 9), 0), "a wall"
    assert not tool.is_free(ahead, None), "a turn on the spot"
    assert tool.is_free(ahead * [0, 0, 1], None)
