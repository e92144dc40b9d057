"""COCO's format: what is read, mended, left out, reported and refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import compressed, ellipse, ellipse_polygon, rewrite, uncompressed, write_coco
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as pycocotools_mask

from video_convmae.data.coco import read_coco
from video_convmae.data.datasets import SampleKey
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.detection import DetectionDataset, DetectionTestDataset
from video_convmae.data.masks import draw_mask, encode_mask, mask_api, run_lengths, tight_box, usable_segmentation
from video_convmae.data.options import JitterConfig
from video_convmae.data.text import ListError

SQUARE = [10.0, 10, 20, 10, 20, 20, 10, 20]


def test_every_object_is_read_with_its_class_box_and_mask(tmp_path: Path) -> None:
    path, content = write_coco(tmp_path)
    records = read_coco(path, tmp_path / "pictures")
    assert records.names == ("round", "flat", "tall")
    assert len(records) == 6
    assert records.lines.tolist() == list(range(6))
    found = [each for record in records for each in record.objects]
    for each, annotation in zip(found, content["annotations"], strict=True):
        assert records.categories[each.label - 1][0] == annotation["category_id"]
        assert list(each.box) == annotation["bbox"]
        assert each.crowd == annotation["iscrowd"]
        mask = draw_mask(each.segmentation, 48, 64)
        assert abs(int(mask.sum()) - annotation["area"]) <= 0.1 * annotation["area"] + 4
    assert records.report.crowd == 3
    assert records.report.objects == 15
    assert str(records.report) == "6 pictures, 15 objects; 3 crowd regions"


def defects(content: dict[str, Any]) -> None:
    """Give the objects of the first three pictures every defect; the objects of the last become a crowd."""
    changes: list[dict[str, Any]] = [
        {"bbox": [5, 5, 0, 8], "segmentation": [SQUARE]},  # an empty box, which becomes that of the mask
        {"bbox": [5, 5, 0, 8], "segmentation": []},  # left out
        {"bbox": [5, 5, float("nan"), 8], "segmentation": [[1, 1, 2, 2]]},  # left out
        {"bbox": [5, 5, 8, 8], "segmentation": compressed(np.zeros((48, 64), np.uint8))},  # a mask of no area
        {"bbox": [5, 5, 8, 8], "segmentation": {"size": [48, 64], "counts": [10, 20]}},  # too short
        {"bbox": [5, 5, 8, 8], "segmentation": {"size": [48, 64], "counts": "~~~broken"}},
        {"bbox": [5, 5, 8, 8], "segmentation": [[5, 5, 9, 9, 5, 5], [3, 3, 3, 9, 3, 5]]},  # lines
        {"bbox": [5, 5, 8, 8], "segmentation": [[4, 4, 9, 9], SQUARE]},  # the first is no polygon
        {"image_id": 999},  # of no picture
    ]
    for annotation, change in zip(content["annotations"], changes):
        annotation |= {"iscrowd": 0} | change
    content["annotations"][1].pop("area")
    for annotation in content["annotations"][-3:]:
        annotation["iscrowd"] = 1


def test_defects_are_mended_or_left_out_and_counted(tmp_path: Path) -> None:
    path, content = write_coco(tmp_path)
    defects(content)
    records = read_coco(rewrite(tmp_path, content), tmp_path / "pictures", training=True)
    assert len(records) == 5  # the last picture shows a crowd alone
    report = records.report
    assert (report.images, report.without_objects, report.strays) == (6, 1, 1)
    assert (report.boxes_from_masks, report.left_out, report.without_mask) == (1, 2, 4)
    first = records[0].objects[0]
    assert first.box == (10, 10, 10, 10)
    assert [each.segmentation for each in records[2].objects] == [None, [SQUARE]]
    assert "1 objects whose empty box became that of their mask" in str(report)
    assert len(read_coco(path, tmp_path / "pictures")) == 6  # a test keeps every picture


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x, y, w, h: [x, y, x + w, y + h], "beyond their pictures"),
        (lambda x, y, w, h: [x / 64, y / 48, w / 64, h / 48], "18 are smaller than a pixel"),
        (lambda x, y, w, h: [(x + w / 2) / 64, (y + h / 2) / 48, w / 64, h / 48], "18 are smaller than a pixel"),
    ],
    ids=["corners", "fractions", "centres"],
)
def test_boxes_of_another_convention_are_an_error(
    tmp_path: Path, change: Callable[..., list[float]], found: str
) -> None:
    _, content = write_coco(tmp_path)
    for annotation in content["annotations"]:
        annotation["bbox"] = change(*annotation["bbox"])
    with pytest.raises(ListError, match=rf"objects.json: of 18 boxes .*{found}.*; expected \[x, y, width, height\] in"):
        read_coco(rewrite(tmp_path, content), tmp_path / "pictures")


def test_single_boxes_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    _, content = write_coco(tmp_path)
    boxes = [70, 10, 5, 5], [60, 40, 5, 9], [60, 40, 5, 9.5], [-3, 0, 9, 9], [4, 4, 0.5, 20]  # the second: 1 pixel
    for annotation, box in zip(content["annotations"], boxes):
        annotation["bbox"] = box
    report = read_coco(rewrite(tmp_path, content), tmp_path / "pictures").report
    assert (report.beyond, report.tiny, report.objects + report.crowd) == (3, 1, 18)
    assert "; 3 boxes that reach beyond their picture; 1 boxes smaller than a pixel" in str(report)


def drop(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: [content.pop(name) for name in names] and content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"], "is a list (results of a detector?) without images, annotations, categories"),
        (drop("categories", "images"), "is an object without images, categories"),
        (lambda c: c | {"images": []}, "holds no pictures"),
        (lambda c: c | {"categories": []}, "has no categories"),
        (lambda c: c | {"images": c["images"] * 2}, "two pictures have the id 10"),
        (lambda c: c["annotations"][3].update(category_id=4) or c, "has the category_id 4; expected one of its"),
        (lambda c: c["annotations"][3].pop("image_id") and c, "image_id of annotations[3] is 'missing'"),
        (lambda c: c["images"][2].update(height=0) or c, "height of images[2] is 0; expected a whole number"),
        (lambda c: c["images"][2].pop("file_name") and c, "images[2] has no file_name"),
        (lambda c: c | {"images": [each | {"file_name": "none.png"} for each in c["images"]]}, "set data.root"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    _, content = write_coco(tmp_path)
    path = rewrite(tmp_path, change(copy.deepcopy(content)))
    with pytest.raises(ListError) as error:
        read_coco(path, tmp_path / "pictures")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_off_or_no_json_is_refused(tmp_path: Path) -> None:
    path, _ = write_coco(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ListError, match="is cut off"):
        read_coco(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ListError, match="git lfs pull"):
        read_coco(path)


@pytest.mark.parametrize(
    ("file", "pictures", "given"),
    [
        ("annotations/instances_val2017.json", "val2017", "val2017"),  # COCO's own
        ("annotations/instances_val2017.json", "val2017", "annotations/instances_val2017.json"),
        ("annotations/instances_val2017.json", "images/val2017", "annotations/instances_val2017.json"),
        ("train/_annotations.coco.json", "train", "train"),  # Roboflow
        ("annotations/instances_default.json", "images", "annotations/instances_default.json"),  # CVAT
        ("result.json", ".", "result.json"),
    ],
)
def test_pictures_and_annotations_find_each_other(tmp_path: Path, file: str, pictures: str, given: str) -> None:
    source, _ = write_coco(tmp_path / "source", images=2)
    for folder in (tmp_path / file).parent, tmp_path / pictures:
        folder.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(source.read_bytes())
    for picture in (tmp_path / "source" / "pictures").iterdir():
        picture.rename(tmp_path / pictures / picture.name)
    for records in (read_coco(tmp_path / given), read_coco(given, tmp_path)):
        assert all(Path(record.path).is_file() for record in records)


def test_the_digest_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    first, content = write_coco(tmp_path / "a")
    second, _ = write_coco(tmp_path / "b")
    digest = read_coco(first, tmp_path / "a" / "pictures").digest()
    assert read_coco(second, tmp_path / "b" / "pictures").digest(tmp_path) == digest
    content["annotations"][0]["bbox"][0] += 1
    assert read_coco(rewrite(tmp_path / "a", content), tmp_path / "a" / "pictures").digest() != digest


# Masks


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    noise = np.random.default_rng(draw(st.integers(0, 99))).random((height, width))
    return (noise < draw(st.sampled_from([0, 0.05, 0.5, 1]))).astype(np.uint8)


@given(masks())
def test_run_lengths_are_those_of_pycocotools(mask: np.ndarray) -> None:
    for form in (compressed(mask), uncompressed(mask)):
        assert sum(run_lengths(form["counts"])) == mask.size
        assert np.array_equal(draw_mask(form, *mask.shape), mask)
    assert encode_mask(mask) == compressed(mask)
    encoded = pycocotools_mask.encode(np.asfortranarray(mask))
    x, y, width, height = pycocotools_mask.toBbox(encoded).tolist()
    assert tight_box(mask) == ((x, y, x + width, y + height) if mask.any() else None)


@given(st.integers(0, 999))
def test_polygons_are_those_of_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    polygons = [(rng.uniform(-5, 45, (rng.integers(3, 9), 2))).ravel().tolist() for _ in range(rng.integers(1, 4))]
    expected = pycocotools_mask.decode(pycocotools_mask.merge(pycocotools_mask.frPyObjects(polygons, 30, 40)))
    assert np.array_equal(draw_mask(polygons, 30, 40), expected)


@given(st.integers(0, 9999), st.sampled_from([0.5, 2, 10, 60]), st.sampled_from([-20, 0, 15, 50]))
def test_a_usable_mask_covers_a_pixel_and_others_do_not(seed: int, spread: float, place: float) -> None:
    """Lines, specks, and polygons outside of their picture among them; lengths as other programs write them, too."""
    rng = np.random.default_rng(seed)
    polygons = [(place + spread * rng.random((rng.integers(3, 7), 2))).ravel().tolist() for _ in range(2)]
    polygons.append([place, place, place + spread, place + spread, place, place])
    for polygon in polygons:
        mask = pycocotools_mask.decode(pycocotools_mask.frPyObjects([polygon], 30, 40))
        usable = usable_segmentation([polygon], 30, 40)
        assert (usable is not None) == bool(mask.any())
        pointed = {"size": [30.0, 40.0], "counts": [float(each) for each in uncompressed(mask[..., 0])["counts"]]}
        usable = usable_segmentation(pointed, 30, 40)
        assert (usable is not None) == bool(mask.any())
        if usable is not None:
            encoded = mask_api().frPyObjects(usable, 30, 40)
            assert np.array_equal(mask_api().decode(encoded), mask[..., 0])


def test_damaged_coordinates_are_no_mask() -> None:
    """COCO's code would follow such an outline for seconds, or take all memory."""
    for number in (1e7, 1e9, -1e30):
        assert usable_segmentation([[3.0, 3, number, 9, 9, 9], SQUARE], 30, 40) == [SQUARE]


def test_missing_pictures_are_counted(tmp_path: Path) -> None:
    path, content = write_coco(tmp_path)
    for image in content["images"][1:3]:
        (tmp_path / "pictures" / image["file_name"]).unlink()
    report = read_coco(path, tmp_path / "pictures").report
    assert report.missing == 2
    assert "2 pictures are missing" in str(report)


# Data sets


@pytest.fixture(scope="module")
def reader() -> Any:
    with ReaderProcess("pyav", timeout=60.0) as process:
        yield process


JITTER = JitterConfig(size=40, test_shortest=40, test_longest=60)


def test_a_sample_depends_on_seed_epoch_and_line_alone(tmp_path: Path, reader: ReaderProcess) -> None:
    _, content = write_coco(tmp_path)
    whole = DetectionDataset(read_coco(tmp_path / "objects.json", tmp_path / "pictures"), JITTER, reader, seed=3)
    others = copy.deepcopy(content)
    others["annotations"] = [each for each in others["annotations"] if each["image_id"] > 11]  # two pictures are empty
    records = read_coco(rewrite(tmp_path, others), tmp_path / "pictures", training=True)
    fewer = DetectionDataset(records, JITTER, reader, seed=3)
    assert len(fewer) == 4
    ours, theirs = whole[SampleKey(1, 3)], fewer[SampleKey(1, 1)]
    assert ours.image.equal(theirs.image)
    assert all(ours.target[name].equal(theirs.target[name]) for name in ("boxes", "labels", "masks"))
    assert ours.target["image_id"] == theirs.target["image_id"] == 13
    other_seed = DetectionDataset(whole.records, JITTER, reader, seed=4)
    assert len({each.transform for each in (ours, whole[SampleKey(2, 3)], other_seed[SampleKey(1, 3)])}) == 3


def test_a_bad_picture_is_replaced_in_training_and_reported_in_a_test(tmp_path: Path, reader: ReaderProcess) -> None:
    path, _ = write_coco(tmp_path)
    pictures = tmp_path / "pictures"
    (pictures / "000010.png").unlink()
    (pictures / "000011.png").write_bytes(b"no picture")
    Image.new("RGB", (48, 64)).save(pictures / "000012.png")  # of another size than the annotations say
    records = read_coco(path, pictures)
    expected = {0: "No such file", 1: "cannot identify", 2: "is 48x64 (turned as its EXIF data says); the annotations"}
    training, test = DetectionDataset(records, JITTER, reader), DetectionTestDataset(records, JITTER, reader)
    for index, message in expected.items():
        sample = training[SampleKey(0, index)]
        assert sample.index > 2
        assert sample.bad_records[0].index == index
        assert message in sample.bad_records[0].error
        grey = test[index]
        assert grey.index == index
        assert message in grey.bad_records[0].error
        assert not len(grey.target["boxes"])
        assert grey.image.unique().tolist() == [128]
    assert not test[4].bad_records


def test_crowds_and_broken_masks_do_not_reach_the_target(tmp_path: Path, reader: ReaderProcess) -> None:
    path, content = write_coco(tmp_path, objects=5)
    test = DetectionTestDataset(read_coco(path, tmp_path / "pictures"), JITTER, reader)
    assert all(len(test[index].target["labels"]) <= 4 for index in range(6))
    content["annotations"][0]["segmentation"] = []
    records = read_coco(rewrite(tmp_path, content), tmp_path / "pictures")
    test = DetectionTestDataset(records, JITTER, reader)
    assert "masks" not in test[0].target  # of this picture one object has none
    assert "masks" in test[1].target


def test_a_box_is_that_of_its_mask(tmp_path: Path, reader: ReaderProcess) -> None:
    """In training and tests, to a pixel: objects that the crop cuts have the box of what is seen."""
    path, _ = write_coco(tmp_path)
    records = read_coco(path, tmp_path / "pictures")
    for jitter in (JITTER, JitterConfig(size=40, pad=False, scales=(1.5, 2), flip=False)):
        dataset = DetectionDataset(records, jitter, reader)
        for epoch in range(8):
            for index in range(len(records)):
                image, target, transform = dataset[SampleKey(epoch, index)][:3]
                assert image.shape[1:] == transform.frame == tuple(target["masks"].shape[1:])
                assert (transform.frame == (40, 40)) or not jitter.pad
                for box, mask in zip(target["boxes"].numpy(), target["masks"].numpy(), strict=True):
                    limit = 1.01 + max(transform.scale)  # the annotated box is that of whole pixels of the file
                    assert np.abs(box - np.array(tight_box(mask))).max() <= limit


def test_masks_lie_where_the_picture_shows_the_object(tmp_path: Path, reader: ReaderProcess) -> None:
    """The painted ellipse and its mask, in each form, under every flip, scale and crop: overlap above 90%."""
    mask = ellipse(96, 128, (40, 60), (30, 20))
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[mask > 0] = 255
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
    image = {"id": 1, "file_name": "a.png", "height": 96, "width": 128}
    for form in (compressed(mask), uncompressed(mask), [ellipse_polygon((40, 60), (30, 20))]):
        annotation = {"image_id": 1, "category_id": 0, "bbox": [10, 40, 60, 40], "segmentation": form}
        content = {"images": [image], "annotations": [annotation], "categories": [{"id": 0, "name": "one"}]}
        records = read_coco(rewrite(tmp_path, json.loads(json.dumps(content))), tmp_path / "pictures")
        dataset = DetectionDataset(records, JitterConfig(size=128, scales=(0.4, 2)), reader)
        for epoch in range(20):
            picture, target, transform = dataset[SampleKey(epoch, 0)][:3]
            height, width = transform.crop
            shown = (picture[0, :height, :width] > 127).numpy()
            drawn = target["masks"][0, :height, :width].numpy() > 0 if len(target["masks"]) else np.zeros_like(shown)
            if shown.sum() > 200:
                assert (shown & drawn).sum() / (shown | drawn).sum() > 0.9
