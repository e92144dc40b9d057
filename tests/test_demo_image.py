"""The demo on images: its split, interrupted and finished runs, its numbers; and it learns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools.study import demo_image
from video_convmae.data.decoding import open_frames
from video_convmae.data.records import Record, read_list

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    demo_image.make_digits(folder)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*/*.png")}


def test_no_validation_digit_is_trained_on(data: Path) -> None:
    train, labelled, validation = (names(data / split) for split in ("train", "labelled", "validation"))
    assert not train & validation
    assert labelled < train
    assert len(train | validation) == 1797


def test_the_lists_are_balanced_and_read_back(data: Path) -> None:
    for split, count in (("labelled", 10), ("validation", 50)):
        records = read_list(data / split, "image")
        assert Counter(records.labels.tolist()) == dict.fromkeys(range(10), count)
    with open_frames(Record(records[0].path, format="image")) as reader:
        assert reader.read([0]).shape == (1, 32, 32, 3)


def test_the_split_is_always_the_same_and_leaves_no_other_behind(data: Path, tmp_path: Path) -> None:
    validation = next((data / "validation" / "3").iterdir())
    stray = tmp_path / "train" / "3" / validation.name  # as another split would have left it
    mine = tmp_path / "train" / "3" / "holiday.png"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"stray")
    mine.write_bytes(b"mine")
    demo_image.make_digits(tmp_path)
    assert not stray.exists()
    assert mine.read_bytes() == b"mine"
    mine.unlink()
    for split in ("train", "labelled", "validation"):
        assert names(tmp_path / split) == names(data / split)
    assert (tmp_path / "validation" / "3" / validation.name).read_bytes() == validation.read_bytes()


def test_runs_of_an_interrupted_demo_stay_and_of_a_finished_one_go(tmp_path: Path) -> None:
    demo_image.remove_outdated_runs(tmp_path)
    run = tmp_path / "seed0" / "pretrain"
    run.mkdir(parents=True)
    demo_image.remove_outdated_runs(tmp_path)
    assert run.exists()
    (tmp_path / "metrics.json").write_text("{}")
    demo_image.remove_outdated_runs(tmp_path)
    assert not run.exists()
    assert not (tmp_path / "metrics.json").exists()


def test_runs_with_other_settings_go(tmp_path: Path) -> None:
    demo_image.remove_outdated_runs(tmp_path)
    run = tmp_path / "seed0" / "pretrain"
    run.mkdir(parents=True)
    (tmp_path / "settings.json").write_text(json.dumps({"pretrain": "epochs: 1"}))
    demo_image.remove_outdated_runs(tmp_path)
    assert not run.exists()


def test_an_interrupted_run_ends_the_demo(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="was interrupted"):
        demo_image.require_finished(tmp_path)


def test_metrics_are_mean_deviation_and_seeds() -> None:
    top1 = [{"finetuned": value, "probed": 0.5, "scratch": 0.25} for value in (0.8, 0.9, 1.0)]
    metrics = demo_image.summarize_seeds(top1)
    assert list(metrics) == ["finetuned", "probed", "scratch"]
    assert metrics["finetuned"] == {
        "top1": pytest.approx(0.9),
        "top1_std": pytest.approx(0.1),
        "seeds": [0.8, 0.9, 1.0],
    }
    assert metrics["probed"] == {"top1": 0.5, "top1_std": 0, "seeds": [0.5] * 3}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_demo_learns(tmp_path: Path) -> None:
    """`make demo-image` without its installation: about five minutes."""
    command = [sys.executable, "-m", "tools.study.demo_image", f"--output={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True, timeout=1800)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["finetuned"]["top1"] > 0.8
    assert metrics["finetuned"]["top1"] > metrics["scratch"]["top1"]
