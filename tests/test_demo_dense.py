"""The dense demo: what its baselines score, what it calls a failure, its pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools.study import demo_dense as tool
from tools.study.scenes import CLASSES, make_scenes
from video_convmae.data.coco import CocoRecords, read_coco

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, train=1, validation=24, seed=5)
    return folder


@pytest.fixture(scope="module")
def records(data: Path) -> CocoRecords:
    return read_coco(data / "annotations" / "instances_validation.json")


def test_the_largest_class_scores_what_its_share_is_worth(data: Path, records: CocoRecords) -> None:
    """Found exactly, all called one of five classes: that class alone counts, and its precision is its share."""
    label_maps = data / "labels" / "validation"
    scores = tool.baselines(records, label_maps)
    labels = [each.label for record in records for each in record.objects]
    share = np.bincount(labels).max() / len(labels)
    assert 0.5 * share / len(CLASSES) < scores["largest_class"]["box_ap"] < 2 * share / len(CLASSES)
    assert scores["largest_class"]["mask_ap"] == pytest.approx(scores["largest_class"]["box_ap"], abs=0.02)
    assert scores["nothing"]["box_ap"] == scores["nothing"]["mask_ap"] == 0
    maps = np.concatenate([np.asarray(Image.open(path)).ravel() for path in label_maps.iterdir()])
    assert scores["nothing"]["miou"] == pytest.approx((maps == 0).mean() / 6)


def test_a_model_that_is_no_better_than_the_baselines_fails(data: Path, records: CocoRecords) -> None:
    scores = tool.baselines(records, data / "labels" / "validation")
    good = {"box_ap": 0.4, "mask_ap": 0.4, "miou": 0.6}
    assert not tool.what_failed({"pretrained": good, "scratch": good})
    for baseline in ("nothing", "largest_class"):
        failed = tool.what_failed({"pretrained": scores[baseline], "scratch": good})
        assert [each.split(" is ")[0] for each in failed] == [f"{name} pretrained" for name in tool.NUMBERS]
    metrics: dict[str, Any] = {"pretrained": good, "scratch": good, **scores}
    report = tool.report_demo_dense(metrics, Path("runs"))
    assert json.dumps(metrics)
    assert [line.split()[-1] for line in report.splitlines()[2:6]] == ["60.0%", "60.0%"] + [
        f"{scores['nothing']['miou']:.1%}"
    ] * 2


def test_pictures_show_objects_and_labels_where_they_are(data: Path, records: CocoRecords) -> None:
    results = [each for each in tool.true_results(records) if each["image_id"] == records[0].image_id]
    pixels = np.asarray(Image.open(records[0].path))
    drawn = np.asarray(tool.draw_objects(pixels, results, records))
    assert drawn.shape == (2 * pixels.shape[0], 2 * pixels.shape[1], 3)
    labels = np.asarray(Image.open(data / "labels" / "validation" / f"{Path(records[0].path).stem}.png"))
    over = np.asarray(tool.draw_labels(pixels, labels))[::2, ::2]
    assert np.array_equal(over[labels == 0], pixels[labels == 0])
    assert (over != pixels).any(axis=2)[labels > 0].mean() > 0.9
    sheet = tool.sheet([[Image.fromarray(drawn), Image.fromarray(over)]] * 2, ["a", "b"])
    assert sheet.width >= 2 * drawn.shape[1]


@pytest.mark.slow
def test_a_few_steps_of_both_heads_leave_results_and_pictures(data: Path, tmp_path: Path) -> None:
    scenes = tmp_path / "scenes"
    make_scenes(scenes, train=4, validation=1)
    few = ("--train.max_steps=1", "--train.batch_size=2", "--optim.warmup_steps=0", "--data.workers=0")
    for start in tool.STARTS:
        assert set(tool.detect(tmp_path / "detection" / start, scenes, None, *few)) == {"box_ap", "mask_ap"}
        assert 0 <= tool.segment(tmp_path / "segmentation" / start, scenes, None, *few)["miou"] < 0.3
    records = read_coco(scenes / "annotations" / "instances_validation.json")
    for sheet in (tool.draw_detections(tmp_path, records), tool.draw_segmentation(tmp_path, scenes)):
        assert sheet.width > 3 * tool.SCALE * records[0].width


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_dense_demo_learns(tmp_path: Path) -> None:
    """`make demo-dense` without its installation."""
    command = [sys.executable, "-m", "tools.study.demo_dense", f"--output={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True, timeout=7200)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for start in tool.STARTS:
        assert all(metrics[start][name] > 1.2 * metrics["largest_class"][name] for name in tool.NUMBERS)
    assert (tmp_path / "detections.png").exists()
    assert (tmp_path / "segmentation.png").exists()
