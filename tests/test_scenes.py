"""The scenes of the dense demo: their files read back, agree with each other, and are the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.study import scenes as tool
from video_convmae.data.coco import read_coco
from video_convmae.data.masks import draw_mask, tight_box

SMALL = {"train": 12, "validation": 4, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scenes")
    tool.make_scenes(output, **SMALL)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pictures_objects_and_label_maps_agree(folder: Path) -> None:
    for split, count in (("train", 12), ("validation", 4)):
        records = read_coco(folder / "annotations" / f"instances_{split}.json")
        assert len(records) == count
        assert records.names == tool.CLASSES
        assert [id_ for id_, _ in records.categories] == list(tool.CATEGORY_IDS)
        assert records.report.without_objects == records.report.without_mask == 0
        for record in records:
            with Image.open(record.path) as picture:
                assert picture.size == (record.width, record.height)
            labels = np.asarray(Image.open(folder / "labels" / split / f"{Path(record.path).stem}.png"))
            drawn = np.zeros_like(labels)
            for each in record.objects:
                mask = draw_mask(each.segmentation, record.height, record.width) > 0
                drawn[mask] = each.label
                assert abs(mask.sum() - each.area) <= 0.15 * each.area  # outlines are drawn by another rule
                x, y, width, height = each.box
                assert np.abs(np.array(tight_box(mask)) - [x, y, x + width, y + height]).max() <= 1
            assert (drawn == labels).mean() > 0.97
            assert labels.any()


def test_all_classes_and_forms_of_masks_come(folder: Path) -> None:
    records = read_coco(folder / "annotations" / "instances_train.json")
    objects = [each for record in records for each in record.objects]
    assert {each.label for each in objects} == {1, 2, 3, 4, 5}
    assert {type(each.segmentation) for each in objects} == {list, dict}
    assert {(record.height, record.width) for record in records} == {(96, 128), (128, 96)}


def test_every_object_is_seen() -> None:
    for index in range(30):
        _, objects = tool.draw_scene("train", index, 0)
        assert len(objects) >= 2
        assert min(each.mask.sum() for each in objects) > 20
        assert sum(each.mask for each in objects).max() == 1  # masks are of what is seen


def test_the_same_settings_give_the_same_bytes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = contents(folder)
    tool.make_scenes(folder, **SMALL)
    assert "already holds these scenes" in capsys.readouterr().out
    tool.make_scenes(tmp_path, **SMALL | {"train": 20})
    tool.make_scenes(tmp_path, **SMALL)
    assert contents(tmp_path) == before


def test_the_splits_share_no_photograph_and_no_digit() -> None:
    names = [{photo.tobytes() for photo in tool.photographs(split)} for split in tool.SPLITS]
    assert not names[0] & names[1]
    drawn = [{each.tobytes() for digit in tool.digit_drawings(split) for each in digit} for split in tool.SPLITS]
    assert not drawn[0] & drawn[1]
