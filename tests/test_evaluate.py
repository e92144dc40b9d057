"""Evaluation on real encoded files: every record once, the same numbers for any number of processes."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import encode
from processes import ENVIRONMENT, torchrun
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from states import interrupt_and_resume, load_state

from video_convmae.build import build_views
from video_convmae.cli import run as run_cli
from video_convmae.cli.evaluate import evaluate as run
from video_convmae.cli.evaluate import metrics_line as summary
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.config import EvaluateConfig, FinetuneConfig
from video_convmae.data.sampling import dense_views
from video_convmae.data.transforms import Augmentation, view_crops
from video_convmae.engine import checkpoint
from video_convmae.engine.inference import Progress, chunk_folder
from video_convmae.lists import read_validation_records
from video_convmae.predictor import load

ROOT = Path(__file__).parent.parent
COUNT, CLASSES, CHUNK = 12, 6, 2  # with the bad record 13 in 7 chunks: 2 and 3 processes get unequal shares


def test_no_number_of_processes_divides_the_list() -> None:
    records = COUNT + 1
    assert all(number % processes for number in (records, -(-records // CHUNK)) for processes in (2, 3))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(COUNT):
        encode(folder / f"{i}.mp4", 8 + 3 * i, size=(48, 80))
    (folder / "bad.mp4").write_text("no video")
    rows = [f"{i}.mp4 {i % CLASSES}" for i in range(COUNT)]
    (folder / "list.txt").write_text("\n".join(rows))
    for name, path in (("with_bad", "bad"), ("with_good", 0)):  # the same slot: a bad file, or one that can be read
        (folder / f"{name}.txt").write_text("\n".join([*rows[:4], f"{path}.mp4 1", *rows[4:]]))
    return folder


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    finetune(
        parse(
            FinetuneConfig,
            [
                f"--config={ROOT / 'configs' / 'debug' / 'finetune.yaml'}",
                f"--data.train={videos / 'list.txt'}",
                f"--data.validation={videos / 'list.txt'}",
                f"--data.root={videos}",
                "--data.reader=pyav",
                "--data.workers=0",
                "--model.image_size=32",
                "--model.head_init_std=0.5",
                "--device=cpu",
                "--train.epochs=1",
                f"--output={output}",
            ],
        )
    )
    return output


def options(trained: Path, videos: Path, output: Path, *edits: str, name: str = "list.txt") -> list[str]:
    return [f"--weights={trained}", f"--list={videos / name}", f"--output={output}", "--device=cpu", *edits]


def in_processes(arguments: list[str], processes: int) -> subprocess.CompletedProcess:
    program = (str(ROOT / "tools" / "evaluate.py"), *arguments)
    command = torchrun(processes, *program) if processes > 1 else [sys.executable, *program]
    return subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=300)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def alone(trained: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    in_processes(options(trained, videos, output, "--workers=1", name="with_bad.txt"), 1)
    return output


@pytest.mark.parametrize(
    "processes", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_any_number_of_processes_gives_the_same_predictions(
    trained: Path, videos: Path, alone: Path, tmp_path: Path, processes: int
) -> None:
    in_processes(options(trained, videos, tmp_path, "--workers=1", name="with_bad.txt"), processes)
    assert (tmp_path / "predictions.csv").read_bytes() == (alone / "predictions.csv").read_bytes()
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, alone))
    for name in ("top1", "top5", "mean_class_accuracy", "scored", "failed"):
        assert ours[name] == theirs[name]
    assert (tmp_path / "bad_records.jsonl").read_bytes() == (alone / "bad_records.jsonl").read_bytes()


def test_the_metrics_are_those_of_scikit_learn(alone: Path) -> None:
    metrics, rows = json.loads((alone / "metrics.json").read_text()), rows_of(alone)
    labels = [int(row["label"]) for row in rows]
    first = [int(row["pred1"]) for row in rows]
    assert len(rows) == metrics["scored"] == COUNT
    assert metrics["failed"] == 1
    assert metrics["top1"] == pytest.approx(accuracy_score(labels, first))
    assert metrics["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, first))
    with np.load(alone / "scores.npz") as file:
        scores, failed = file["scores"], file["failed"]
        assert metrics["top5"] == pytest.approx(top_k_accuracy_score(labels, scores[~failed], k=5))
        assert list(file["records"][~failed]) == [row["record"] for row in rows]
    np.testing.assert_allclose(scores[~failed].sum(axis=1), 1, rtol=1e-5)
    assert not scores[failed].any()
    assert list(rows[0]) == ["record", "label", *(f"pred{i}" for i in range(1, 6)), *(f"score{i}" for i in range(1, 6))]


@pytest.mark.parametrize("size", [CHUNK, 3])
def test_a_bad_record_is_reported_and_changes_no_other_row(
    trained: Path, videos: Path, alone: Path, tmp_path: Path, size: int
) -> None:
    """Not even in its own chunk, against the same list with a good file in its slot."""
    (fault,) = [json.loads(line) for line in (alone / "bad_records.jsonl").read_text().splitlines()]
    assert fault["path"] == str(videos / "bad.mp4")
    for name in ("with_good.txt", "with_bad.txt"):
        edits = (f"--batch_size={size}", "--workers=0")
        run(parse(EvaluateConfig, options(trained, videos, tmp_path / name, *edits, name=name)))
    with_good, with_bad = (rows_of(tmp_path / name) for name in ("with_good.txt", "with_bad.txt"))
    assert (with_good.pop(4)["record"], len(with_bad)) == (str(videos / "0.mp4"), COUNT)
    assert with_good == with_bad


def test_scores_are_the_mean_softmax_of_the_views(trained: Path, videos: Path, alone: Path) -> None:
    """Made anew from the frames, segment by segment and crop by crop."""
    predictor = load(trained)
    data, number = predictor.config.data, 7
    records = read_validation_records(data)
    views = build_views(data, records, predictor.model.encoder.config, predictor.config.test)
    with views.reader.open(records[number]) as reader:
        frames = reader.read(list(range(len(reader))))
    scores = []
    for segment in dense_views(len(frames), 4, 2, 2):
        for crop in view_crops(48, 80, (32, 32), 3):
            clip = Augmentation(data.augmentation).apply(frames[segment], crop, (32, 32))[None]
            mean, std = (255 * torch.tensor(v).view(1, 3, 1, 1, 1) for v in (data.mean, data.std))
            with torch.inference_mode():
                scores.append(predictor.model((clip - mean) / std).softmax(dim=1))
    with np.load(alone / "scores.npz") as file:
        (place,) = np.flatnonzero(file["records"] == str(videos / f"{number}.mp4"))
        np.testing.assert_allclose(file["scores"][place], torch.stack(scores).mean(dim=0)[0], atol=1e-6)


def test_an_interrupted_test_goes_on_from_what_was_scored(
    trained: Path, videos: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = options(trained, videos, tmp_path, "--workers=0", name="with_bad.txt")
    metrics, seen = interrupt_and_resume(
        lambda: run(parse(EvaluateConfig, arguments)), tmp_path, after=4, patch=monkeypatch
    )
    assert metrics["videos_per_second"] == pytest.approx((len(seen) - 8) / metrics["seconds"])
    # The chunk with the bad record is tried again, the one with the torn row is scored again.
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, *range(6, COUNT + 1)]
    assert (tmp_path / "predictions.csv").read_bytes() == (alone / "predictions.csv").read_bytes()
    assert (tmp_path / "bad_records.jsonl").read_bytes() == (alone / "bad_records.jsonl").read_bytes()
    assert not (tmp_path / "partial").exists()


def test_chunks_of_another_evaluation_are_not_mixed_in(trained: Path, videos: Path, tmp_path: Path) -> None:
    settings = {"weights": "a", "data": {"stride": 4, "workers": 1}}
    folder = chunk_folder(tmp_path, settings)
    assert chunk_folder(tmp_path, {"weights": "a", "data": {"stride": 4, "workers": 8}}) == folder
    assert chunk_folder(tmp_path, {"weights": "b", "data": {"stride": 4, "workers": 1}}) != folder
    assert chunk_folder(tmp_path, {"weights": "a", "data": {"stride": 2, "workers": 1}}) != folder


def test_scores_that_are_not_finite_are_no_predictions(trained: Path, videos: Path, tmp_path: Path) -> None:
    state = load_state(trained, "model")
    state["model"]["head.weight"][:] = 3e38  # finite; its products are not
    broken = checkpoint.save_checkpoint(tmp_path, state.pop("step"), state)
    with pytest.raises(FloatingPointError, match="not finite for the records"):
        run(parse(EvaluateConfig, options(broken, videos, tmp_path / "test", "--workers=0")))


def test_a_list_without_labels_is_scored(trained: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{videos / '0.mp4'}\n{videos / '1.mp4'}\n")
    metrics = run(parse(EvaluateConfig, options(trained, tmp_path, tmp_path / "test", "--workers=0")))
    assert metrics["top1"] is None
    assert metrics["scored"] == 2
    assert [row["label"] for row in rows_of(tmp_path / "test")] == ["", ""]


def test_labels_that_the_model_does_not_know_are_errors(trained: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{videos / '0.mp4'} {CLASSES}\n")
    with pytest.raises(ValueError, match=f"label {CLASSES}; expected 0 to {CLASSES - 1}"):
        run(parse(EvaluateConfig, options(trained, tmp_path, tmp_path / "test")))


def test_a_list_of_bad_files_says_so(trained: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{videos / 'bad.mp4'} 1\n")
    metrics = run(parse(EvaluateConfig, options(trained, tmp_path, tmp_path / "test", "--workers=0")))
    assert (metrics["top1"], metrics["scored"], metrics["failed"]) == (None, 0, 1)
    assert summary(metrics).startswith("no record could be read; 0 records scored, 1 failed")
    assert summary(metrics | {"scored": 1}).startswith("no record that was scored has a label")


def test_a_test_of_nothing_has_failed(
    trained: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What says why is written; a record that was read is enough."""
    (tmp_path / "list.txt").write_text(f"{videos / 'bad.mp4'} 1\nnowhere.mp4 0\n")
    assert run_cli("evaluate", options(trained, tmp_path, tmp_path / "test", "--workers=0")) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "none of the 2 records could be read" in error
    assert json.loads((tmp_path / "test" / "metrics.json").read_text())["failed"] == 2
    assert len((tmp_path / "test" / "bad_records.jsonl").read_text().splitlines()) == 2
    (tmp_path / "list.txt").write_text(f"{videos / 'bad.mp4'} 1\n{videos / '0.mp4'} 0\n")
    assert run_cli("evaluate", options(trained, tmp_path, tmp_path / "some", "--workers=0")) == 0


@pytest.mark.parametrize(("arguments", "expected"), [(["--plot"], True), (["--plot", "true"], True), ([], False)])
def test_plot_is_a_switch(arguments: list[str], expected: bool) -> None:
    for place in ([*arguments, "--weights=a", "--output=b"], ["--weights=a", "--output=b", *arguments]):
        assert parse(EvaluateConfig, place).plot is expected


def test_off_a_terminal_lines_tell_the_speed(
    trained: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    metrics = run(parse(EvaluateConfig, options(trained, videos, tmp_path, "--workers=0", name="with_bad.txt")))
    said = capsys.readouterr().out
    lines = re.findall(r"^(\d+)/13 videos, \d+\.\d videos/s$", said, re.MULTILINE)
    assert lines == ["2", "4", "6", "8", "10", "12", "13"]
    assert metrics["videos_per_second"] == pytest.approx(13 / metrics["seconds"])
    assert re.search(r"12 records scored, 1 failed; \d+\.\d videos/s$", said, re.MULTILINE)
    monkeypatch.setattr(Progress, "EVERY", 1000.0)
    run(parse(EvaluateConfig, options(trained, videos, tmp_path, "--workers=0")))
    assert "/12 videos" not in capsys.readouterr().out


def test_weights_that_are_not_there_are_an_error_of_one_line() -> None:
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "--weights=/nowhere", "--output=/nowhere"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.startswith("video-convmae evaluate: error: no checkpoint at /nowhere")
    assert "Traceback" not in result.stderr
