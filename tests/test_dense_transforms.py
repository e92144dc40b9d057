"""Pictures, points, boxes and masks go through the same flip, scale, crop and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from video_convmae.data.dense_transforms import PADDING, PictureTransform, draw_jitter, resize_for_test
from video_convmae.data.detection import transformed_mask
from video_convmae.data.masks import tight_box
from video_convmae.data.options import JitterConfig

SIDES = st.integers(3, 90)
SEEDS = st.integers(0, 10**6)


def jitter(height: int, width: int, seed: int, config: JitterConfig) -> PictureTransform:
    return draw_jitter(height, width, config, torch.Generator().manual_seed(seed))


@given(SIDES, SIDES, st.integers(8, 70), SEEDS, st.booleans())
def test_sizes(height: int, width: int, size: int, seed: int, pad: bool) -> None:
    """At scale s the longer side is s times the size; the crop is inside, and padded or not."""
    config = JitterConfig(size=size, pad=pad)
    drawn = jitter(height, width, seed, config)
    assert 1 <= max(drawn.resized) <= 2 * size
    assert max(drawn.resized) >= int(0.1 * size)
    exact = max(drawn.resized) / max(height, width)
    assert abs(drawn.resized[0] - height * exact) <= 1.5
    assert drawn.crop == (min(drawn.resized[0], size), min(drawn.resized[1], size))
    assert 0 <= drawn.top <= drawn.resized[0] - drawn.crop[0]
    assert 0 <= drawn.left <= drawn.resized[1] - drawn.crop[1]
    picture = drawn.picture(np.zeros((height, width, 3), np.uint8))
    assert picture.shape == (3, *((size, size) if pad else drawn.crop))
    assert (picture[:, drawn.crop[0] :] == PADDING).all()
    assert (picture[:, :, drawn.crop[1] :] == PADDING).all()
    assert not picture[:, : drawn.crop[0], : drawn.crop[1]].any()


@given(SIDES, SIDES, SEEDS)
def test_a_crop_is_the_part_of_the_whole_resized_picture(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    drawn = jitter(height, width, seed, JitterConfig(size=40, pad=False))
    mirrored = np.ascontiguousarray(pixels[:, ::-1]) if drawn.flip else pixels
    whole = np.asarray(Image.fromarray(mirrored).resize(drawn.resized[::-1], Image.Resampling.BILINEAR))
    part = whole[drawn.top : drawn.top + drawn.crop[0], drawn.left : drawn.left + drawn.crop[1]]
    assert np.abs(drawn.picture(pixels).numpy().transpose(1, 2, 0).astype(int) - part).max() <= 1


@given(SIDES, SIDES, SEEDS, st.booleans())
def test_boxes_against_masks(height: int, width: int, seed: int, as_polygon: bool) -> None:
    """A box, transformed and cut, is that of its transformed mask: within a pixel of the crop, or empty like it."""
    rng = np.random.default_rng(seed)
    x1, y1 = rng.integers(0, width), rng.integers(0, height)
    x2, y2 = rng.integers(x1 + 1, width + 1), rng.integers(y1 + 1, height + 1)
    drawn = jitter(height, width, seed, JitterConfig(size=50))
    box = drawn.cut(drawn.boxes(np.array([[x1, y1, x2, y2]], dtype=np.float64)))[0]
    if as_polygon:
        mask = transformed_mask([[float(each) for each in (x1, y1, x2, y1, x2, y2, x1, y2)]], drawn)
    else:
        filled = np.zeros((height, width), np.uint8)
        filled[y1:y2, x1:x2] = 1
        mask = drawn.mask(filled)
    assert mask.shape == drawn.crop
    visible = tight_box(mask)
    if visible is None:
        assert min(box[2] - box[0], box[3] - box[1]) <= 1.01
    else:
        assert np.abs(box - np.array(visible)).max() <= 1.01
        inside = mask[visible[1] : visible[3], visible[0] : visible[2]]
        assert inside.all()  # a rectangle stays one


@given(SIDES, SIDES, SEEDS)
def test_boxes_come_back(height: int, width: int, seed: int) -> None:
    drawn = jitter(height, width, seed, JitterConfig(size=50))
    corners = np.random.default_rng(seed).uniform(0, [width, height], (8, 2, 2))
    boxes = np.sort(corners, axis=1).reshape(-1, 4)
    assert np.allclose(drawn.undo_boxes(drawn.boxes(boxes)), boxes)


def test_a_picture_that_nothing_changes_is_the_same() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    drawn = resize_for_test(30, 40, JitterConfig(size=64, pad=False, test_shortest=30, test_longest=40))
    assert np.array_equal(drawn.picture(pixels).numpy().transpose(1, 2, 0), pixels)
    mirrored = PictureTransform((30, 40), (30, 40), (30, 40), (30, 40), flip=True)
    assert np.array_equal(mirrored.picture(pixels).numpy().transpose(1, 2, 0), pixels[:, ::-1])
    assert np.array_equal(mirrored.mask(pixels[..., 0]), pixels[:, ::-1, 0])


@pytest.mark.parametrize(
    ("source", "config", "resized", "frame"),
    [
        ((480, 640), JitterConfig(), (768, 1024), (1024, 1024)),  # DET pads
        ((480, 640), JitterConfig(pad=False), (768, 1024), (768, 1024)),  # ViTDet does not
        ((480, 640), JitterConfig(test_shortest=800, test_longest=1333), (800, 1067), (800, 1067)),  # does not fit
        ((427, 640), JitterConfig(pad=False), (683, 1024), (683, 1024)),
        ((1, 5000), JitterConfig(pad=False), (1, 1024), (1, 1024)),
    ],
)
def test_test_sizes_are_those_of_detectron2(
    source: tuple[int, int], config: JitterConfig, resized: tuple[int, int], frame: tuple[int, int]
) -> None:
    drawn = resize_for_test(*source, config)
    assert (drawn.resized, drawn.crop, drawn.frame) == (resized, resized, frame)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"scales": (2.0, 0.1)}, {"scales": (0, 1)}, {"test_longest": 0}])
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"^augmentation\.\w+ is .*; expected"):
        JitterConfig(**wrong)
