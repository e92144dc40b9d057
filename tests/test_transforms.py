"""Crops and flips: one draw for every frame, windows inside the frame, pixels where they should be."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from video_convmae.data.transforms import Augmentation, Crop, multi_scale_crop, random_resized_crop, view_crops

sides = st.integers(8, 400)
seeds = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inside(window: tuple[int, int, int, int], height: int, width: int) -> bool:
    top, left, h, w = window
    return top >= 0 and left >= 0 and h >= 1 and w >= 1 and top + h <= height and left + w <= width


@given(height=sides, width=sides, seed=seeds)
def test_multi_scale_windows(height: int, width: int, seed: int) -> None:
    scales = (1.0, 0.875, 0.75, 0.66)
    window = multi_scale_crop(height, width, scales, generator(seed))
    assert inside(window, height, width)
    allowed = [int(min(height, width) * scale) for scale in scales]
    assert abs(allowed.index(window[2]) - allowed.index(window[3])) <= 1


def test_multi_scale_windows_take_thirteen_places_and_ten_shapes() -> None:
    windows = [multi_scale_crop(256, 340, (1.0, 0.875, 0.75, 0.66), generator(seed)) for seed in range(2000)]
    assert len({window[2:] for window in windows}) == 10
    assert len({window[:2] for window in windows if window[2:] == (168, 168)}) == 13


@given(height=sides, width=sides, low=st.floats(0.05, 1), seed=seeds)
def test_random_resized_windows(height: int, width: int, low: float, seed: int) -> None:
    assert inside(random_resized_crop(height, width, (low, 1.0), (3 / 4, 4 / 3), generator(seed)), height, width)


def test_random_resized_windows_have_the_area_and_aspect_asked_for() -> None:
    windows = np.array([random_resized_crop(240, 320, (0.2, 0.5), (3 / 4, 4 / 3), generator(s)) for s in range(500)])
    area = windows[:, 2] * windows[:, 3] / (240 * 320)
    aspect = windows[:, 3] / windows[:, 2]
    assert 0.19 < area.min() < 0.25
    assert 0.45 < area.max() < 0.51
    assert 0.73 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.36


@given(height=sides, width=sides, count=st.integers(1, 5))
def test_view_windows_span_the_longer_side(height: int, width: int, count: int) -> None:
    crops = view_crops(height, width, (56, 56), count)
    assert len(crops) == count
    for crop in crops:
        assert inside((crop.top, crop.left, crop.height, crop.width), height, width)
        assert crop.height == crop.width == min(height, width)
    if count > 1:
        assert crops[0].top == crops[0].left == 0
        assert (crops[-1].top + crops[-1].height, crops[-1].left + crops[-1].width) == (height, width)


def test_one_draw_for_every_frame() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    augmentation = Augmentation(flip=True)
    crop = augmentation.draw(60, 80, generator(1))
    clip = augmentation.apply(np.stack([frame] * 5), crop, (32, 32))
    assert clip.shape == (3, 5, 32, 32)
    assert clip.dtype == torch.uint8
    assert (clip == clip[:, :1]).all()


def test_a_flip_mirrors_and_a_full_window_keeps_the_pixels() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    plain = Augmentation().apply(frames, Crop(0, 0, 40, 40), (40, 40))
    mirrored = Augmentation().apply(frames, Crop(0, 0, 40, 40, flip=True), (40, 40))
    assert torch.equal(plain, torch.from_numpy(frames).permute(3, 0, 1, 2))
    assert torch.equal(mirrored, plain.flip(-1))


def test_flips_are_drawn_only_where_asked_for() -> None:
    assert not any(Augmentation().draw(64, 64, generator(seed)).flip for seed in range(50))
    assert 10 < sum(Augmentation(flip=True).draw(64, 64, generator(seed)).flip for seed in range(50)) < 40
