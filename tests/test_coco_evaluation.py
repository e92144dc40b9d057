"""COCO's numbers are those of pycocotools, and do not depend on the number of processes."""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from coco_files import ellipse, rewrite, write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from video_convmae.data.coco import CocoRecords, image_results, read_coco
from video_convmae.data.masks import draw_mask
from video_convmae.engine.coco import NUMBERS, evaluate_coco, evaluate_everywhere

SIZE = (240, 320)  # so that there are small, medium and large objects


def pycocotools_numbers(content: dict[str, Any], results: list[dict[str, Any]], kind: str) -> list[float]:
    """COCO's own numbers; annotations are numbered from 1, as pycocotools needs it."""
    truth = COCO()
    annotations = [each | {"id": number} for number, each in enumerate(content["annotations"], start=1)]
    truth.dataset = copy.deepcopy(content | {"annotations": annotations})
    results = copy.deepcopy(results)
    if kind == "segm":
        for result in results:
            del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def detections(records: CocoRecords, seed: int = 0) -> list[dict[str, Any]]:
    """Results that a detector might give: displaced objects, some of a wrong class, some twice, some of nothing."""
    rng = np.random.default_rng(seed)
    results = []
    for record in records:
        boxes, masks, labels = [], [], []
        for each in [*record.objects, *record.objects[:2], *record.objects]:
            x, y, width, height = np.array(each.box) * rng.uniform(0.85, 1.15, 4)
            x, y = (x, y) if rng.random() < 0.9 else rng.uniform(0, 100, 2)
            boxes.append([x, y, x + width, y + height])
            masks.append(ellipse(*SIZE, (x + width / 2, y + height / 2), (width / 2 + 0.5, height / 2 + 0.5)))
            labels.append(each.label if rng.random() < 0.8 else 1 + rng.integers(len(records.names)))
        scores = rng.random(len(boxes)).round(1)  # ties
        order = np.argsort(-scores, kind="stable")
        results += image_results(
            record,
            records.categories,
            np.array(boxes)[order],
            np.array(labels)[order],
            scores[order],
            [masks[place] for place in order],
        )
    return results


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], CocoRecords, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("coco")
    path, content = write_coco(folder, images=16, size=SIZE, objects=9)
    records = read_coco(path, folder / "pictures")
    assert sum(each["iscrowd"] for each in content["annotations"]) > 20
    return content, records, detections(records)


def test_all_twelve_numbers_equal_those_of_pycocotools(data: tuple[Any, CocoRecords, list[dict[str, Any]]]) -> None:
    content, records, results = data
    before = copy.deepcopy(results)
    metrics = evaluate_coco(results, records)
    assert results == before
    for prefix, kind in (("box", "bbox"), ("mask", "segm")):
        expected = pycocotools_numbers(content, results, kind)
        ours = [metrics[f"{prefix}_{name}"] for name in NUMBERS]
        assert ours == pytest.approx(expected, abs=1e-12)
        assert all(0 < value < 1 for value in ours)
    assert len(metrics) == 24


def test_a_perfect_detector_scores_one_and_a_silent_one_nothing(tmp_path: Path) -> None:
    path, _ = write_coco(tmp_path, images=3)
    records = read_coco(path, tmp_path / "pictures")
    results = []
    for record in records:
        objects = [each for each in record.objects if not each.crowd]
        boxes = np.array([each.box for each in objects]) @ np.array(
            [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0] * 3 + [1]]
        )
        labels = np.array([each.label for each in objects])
        masks = [draw_mask(each.segmentation, record.height, record.width) for each in objects]
        results += image_results(record, records.categories, boxes, labels, np.ones(len(boxes)), masks)
    perfect, silent = evaluate_coco(results, records), evaluate_coco([], records)
    for kind in ("box", "mask"):
        assert perfect[f"{kind}_ap"] == pytest.approx(1)
        assert silent[f"{kind}_ap"] == 0
        assert perfect[f"{kind}_ap_large"] is silent[f"{kind}_ap_large"] is None  # no object is large


def test_objects_without_a_mask_count_as_boxes_alone(tmp_path: Path) -> None:
    """pycocotools ends with an exception here."""
    _, content = write_coco(tmp_path, size=SIZE)
    without = copy.deepcopy(content)
    for annotation in without["annotations"][::4]:
        annotation["segmentation"] = []
    records = read_coco(rewrite(tmp_path, without), tmp_path / "pictures")
    results = detections(records)
    metrics = evaluate_coco(results, records)
    assert metrics["box_ap"] == pytest.approx(pycocotools_numbers(content, results, "bbox")[0])
    kept = content | {"annotations": [each for place, each in enumerate(content["annotations"]) if place % 4]}
    assert metrics["mask_ap"] == pytest.approx(pycocotools_numbers(kept, results, "segm")[0])


def test_pictures_that_could_not_be_read_do_not_count(data: tuple[Any, CocoRecords, list[dict[str, Any]]]) -> None:
    content, records, results = data
    missing = content["images"][3]["id"]
    kept = {
        "images": [each for each in content["images"] if each["id"] != missing],
        "annotations": [each for each in content["annotations"] if each["image_id"] != missing],
        "categories": content["categories"],
    }
    ours = evaluate_coco(results, records, failed=[3], masks=False)
    seen = [each for each in results if each["image_id"] != missing]
    assert list(ours.values()) == pytest.approx(pycocotools_numbers(kept, seen, "bbox"))


def evaluate_as(rank: int, count: int, store: str, data: Any, answers: Any) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=count)
    _, records, results = data
    mine = {record.image_id for index, record in enumerate(records) if (index * 7) % count == rank}
    metrics, every = evaluate_everywhere([each for each in results if each["image_id"] in mine], records)
    answers.put((rank, metrics, every))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [2, 3])
def test_the_number_of_processes_changes_nothing(
    data: tuple[Any, CocoRecords, list[dict[str, Any]]], tmp_path: Path, count: int
) -> None:
    alone, every = evaluate_everywhere(data[2], data[1])
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    arguments = (count, str(tmp_path / "store"), data, answers)
    processes = [context.Process(target=evaluate_as, args=(rank, *arguments), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    for rank, metrics, gathered in sorted((answers.get(timeout=60) for _ in processes), key=lambda each: each[0]):
        assert metrics == alone
        assert gathered == (every if rank == 0 else None)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
