"""Trivial baselines on real videos whose class is known to be their brightness, or whether something moves in them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from processes import ENVIRONMENT, torchrun

from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.config import EvaluateConfig, FinetuneConfig
from video_convmae.data.records import Record, Records
from video_convmae.engine import baselines
from video_convmae.engine.baselines import Table, compare, fit_and_score, mean_frame, motion_energy
from video_convmae.engine.evaluation import Evaluation

ROOT = Path(__file__).parent.parent
TRAIN, TEST = 24, 15


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encode frames `(T, H, W)`, uint8 grey."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"preset": "veryfast", "qp": "10"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:], "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.repeat(frame[..., None], 3, axis=2), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())


def brightness(label: int, rng: np.random.Generator) -> np.ndarray:
    """A square that moves over a dark (0) or a bright (1) ground."""
    frames = np.full((10, 32, 32), (40, 190)[label] + rng.integers(0, 30), np.uint8)
    row, column, step = (int(rng.integers(0, limit)) for limit in (12, 12, 2))
    for time, frame in enumerate(frames):
        frame[row : row + 8, column + step * time : column + step * time + 8] = 120
    return frames


def motion(label: int, rng: np.random.Generator) -> np.ndarray:
    """A square of any brightness that stands still (0) or moves to the right (1)."""
    frames = np.full((10, 32, 32), rng.integers(0, 256), np.uint8)
    (row, column), level = rng.integers(0, 5, 2), frames[0, 0, 0] ^ 128
    for time, frame in enumerate(frames):
        frame[row : row + 8, column + label * time : column + label * time + 8] = level
    return frames


def make(folder: Path, draw: Callable[[int, np.random.Generator], np.ndarray]) -> Path:
    """Write videos, their lists with a bad record in each, and a model that has learned nothing."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(TRAIN + TEST):
        write_video(folder / f"{i}.mp4", draw(i % 2, rng))
        rows.append(f"{i}.mp4 {i % 2}")
    (folder / "bad.mp4").write_text("no video")
    for name, part in (("train", rows[:TRAIN]), ("test", rows[TRAIN:])):
        (folder / f"{name}.txt").write_text("\n".join([*part[:3], "bad.mp4 1", *part[3:]]))
    edits = ["--config=debug/finetune", "--model.num_frames=4", "--model.image_size=32", "--data.stride=2"]
    edits += [f"--data.train={folder / 'train.txt'}", f"--data.validation={folder / 'test.txt'}"]
    edits += [f"--data.root={folder}", "--data.workers=0", "--data.max_bad_fraction=0.5", "--device=cpu"]
    edits += [
        "--train.max_steps=1",
        "--optim.warmup_steps=0",
        "--optim.lr=0",
        "--train.batch_size=4",
        f"--output={folder / 'run'}",
    ]
    finetune(parse(FinetuneConfig, edits))
    return folder


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("bright"), brightness)


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("moving"), motion)


def options(folder: Path, output: Path) -> list[str]:
    return [f"--weights={folder / 'run'}", f"--output={output}", "--device=cpu", "--workers=0", "--baselines"]


def test_brightness_is_read_from_the_mean_frame(bright: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    metrics = evaluate(parse(EvaluateConfig, options(bright, tmp_path)))
    assert metrics["scored"] == TEST
    assert metrics["baselines"]["mean_frame"] == 1
    assert metrics["baselines"]["largest_class"] == pytest.approx(8 / 15)  # training has 12 of each and a bad one
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    said = capsys.readouterr().out
    assert "baselines read 25 of 25 training records" in said
    assert "top-1 on 15 records; baselines are fitted to 24 training records" in said
    assert "the model is no better than mean frame + logistic regression (100.0% against " in said
    assert not (tmp_path / "partial").exists()


def test_motion_is_read_from_the_motion_energy(moving: Path, tmp_path: Path) -> None:
    metrics = evaluate(parse(EvaluateConfig, options(moving, tmp_path)))
    assert metrics["baselines"]["motion_energy"] == 1
    assert "motion energy" in metrics["baselines_verdict"]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_numbers(moving: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        arguments = [*options(moving, tmp_path / str(processes)), "--batch_size=2"]
        command = torchrun(processes, str(ROOT / "tools" / "evaluate.py"), *arguments)
        subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=500)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("1", "2"))
    for name in ("top1", "baselines", "baselines_verdict", "scored", "failed"):
        assert one[name] == two[name]


def test_images_have_no_motion(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(8):
        Image.new("RGB", (32, 32), (200 * (i % 2),) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "list.txt").write_text("".join(f"{tmp_path / str(i)}.png {i % 2}\n" for i in range(8)))
    edits = ["--config=debug/finetune", "--model.num_frames=1", "--model.image_size=32", "--data.format=image"]
    edits += [f"--data.train={tmp_path / 'list.txt'}", f"--data.validation={tmp_path / 'list.txt'}"]
    edits += [
        "--data.workers=0",
        "--device=cpu",
        "--train.max_steps=1",
        "--optim.warmup_steps=0",
        "--train.batch_size=4",
    ]
    edits += ["--test.segments=1"]
    finetune(parse(FinetuneConfig, [*edits, f"--output={tmp_path / 'run'}"]))
    metrics = evaluate(parse(EvaluateConfig, options(tmp_path, tmp_path / "test")))
    assert metrics["baselines"] == {"largest_class": 0.5, "mean_frame": 1}
    assert "no motion energy: a clip is one frame" in capsys.readouterr().out


def test_features_are_differences_and_means() -> None:
    clips = torch.zeros(2, 3, 4, 32, 32)
    clips[0, :, 2:, 8:12, 16:20] = 6.0  # cell (2, 4) lights up between the second and the third frame
    energy = motion_energy(clips).view(2, 3, 8, 8)
    assert energy[0, 1, 2, 4] == 6
    assert energy.sum() == 6
    mean = mean_frame(clips).view(2, 3, 16, 16)
    assert torch.equal(mean[0, :, 4:6, 8:10], torch.full((3, 2, 2), 3.0))
    assert mean.sum() == 3 * 4 * 3
    assert torch.equal(motion_energy(clips.byte()), motion_energy(clips))


def test_a_fit_is_repeatable_and_takes_any_labels() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = rng.normal(size=(60, 20)) + np.eye(20)[labels]
    first, again = (fit_and_score(features[:40], labels[:40], features[40:], labels[40:]) for _ in range(2))
    assert first.strength == again.strength
    assert np.array_equal(first.answers, again.answers)
    assert first.top1 == pytest.approx((first.answers == labels[40:]).mean())
    for few in ([7, 7, 7], [0, 1, 2], [0, 0, 0, 0, 5]):  # one class; a record of each; one of them alone
        fit = fit_and_score(features[: len(few)], np.array(few), features, labels)
        assert set(fit.answers) <= set(few)


def test_a_long_training_list_is_cut_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MAX_RECORDS", 10)
    records = Records([Record(f"{i}.mp4", None if i % 7 == 0 else int(i % 4 == 0)) for i in range(100)])
    chosen = baselines.choose_training_records(records)
    assert len(chosen) == 10
    assert np.bincount(chosen.labels).tolist() == [8, 2]
    paths = [int(record.path.removesuffix(".mp4")) for record in chosen]
    assert paths == sorted(paths)
    assert max(paths) > 80
    with pytest.raises(ValueError, match="no record of the training list has a label"):
        baselines.choose_training_records(Records([Record("a.mp4")]))


@pytest.mark.parametrize(("right", "beaten"), [(60, True), (56, False), (40, False)])
def test_a_model_must_be_above_the_best_baseline_by_a_standard_error(right: int, beaten: bool) -> None:
    """Of 80 test records the mean frame gets 55 right; differences of up to a standard error are noise."""
    labels = np.arange(80) % 2
    signal = np.where(np.arange(80) < 55, labels, 1 - labels)[:, None].astype(np.float32)
    failed = np.zeros(80, bool)
    training = Table({"mean_frame": labels[:, None].astype(np.float32)}, labels, failed)
    answers = np.where(np.arange(80) < right, labels, 1 - labels)
    evaluation = Evaluation(np.eye(2, dtype=np.float32)[answers], labels, failed, ())
    comparison = compare(evaluation, training, Table({"mean_frame": signal}, labels, failed))
    assert comparison is not None
    assert comparison.top1 == {"largest_class": 0.5, "mean_frame": 55 / 80}
    assert (comparison.verdict is None) == beaten


def test_only_records_that_the_model_scored_count() -> None:
    labels = np.array([0, 0, 1, 1, -1])
    table = Table(
        {"mean_frame": np.array([[0], [0], [1], [0], [1]], np.float32)}, labels, np.array([0, 0, 0, 1, 0], bool)
    )
    known = np.arange(19) % 2
    training = Table({"mean_frame": known[:, None].astype(np.float32)}, known, np.zeros(19, bool))
    failed = np.array([1, 0, 0, 0, 0], bool)
    comparison = compare(Evaluation(np.eye(2)[[0, 0, 1, 1, 1]], labels, failed, ()), training, table)
    assert comparison is not None
    assert comparison.top1["largest_class"] == pytest.approx(1 / 3)
    assert comparison.top1["mean_frame"] == pytest.approx(2 / 3)  # the one it could not read: the most frequent class
    nothing = Evaluation(np.eye(2)[[0, 0, 1, 1, 1]], labels, np.ones(5, bool), ())
    assert compare(nothing, training, table) is None
