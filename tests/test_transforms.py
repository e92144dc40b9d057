"""Crops, flips, RandAugment, erasing: one draw for every frame, crops inside it, pixels where they should be."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from video_convmae.data.options import AugmentationConfig
from video_convmae.data.transforms import Augmentation, ClipTransform, multi_scale_crop, random_resized_crop, view_crops

VIDEOMAE = "rand-m7-n4-mstd0.5-inc1"

sides = st.integers(8, 400)
seeds = st.integers(0, 2**31)
policies = st.sampled_from([VIDEOMAE, "rand", "rand-m9-n3-mstd101-p1", "rand-m10-n2-tweights", "rand-m9-t3a-p0.9"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augment(**fields: Any) -> Augmentation:
    return Augmentation(AugmentationConfig(**fields))


def noise(count: int, height: int, width: int) -> np.ndarray:
    """Frames `(count, height, width, 3)` that have nothing in common."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def inside(crop: tuple[int, int, int, int], height: int, width: int) -> bool:
    top, left, h, w = crop
    return top >= 0 and left >= 0 and h >= 1 and w >= 1 and top + h <= height and left + w <= width


@given(height=sides, width=sides, seed=seeds)
def test_multi_scale_crops(height: int, width: int, seed: int) -> None:
    scales = (1.0, 0.875, 0.75, 0.66)
    crop = multi_scale_crop(height, width, scales, generator(seed))
    assert inside(crop, height, width)
    allowed = [int(min(height, width) * scale) for scale in scales]
    assert abs(allowed.index(crop[2]) - allowed.index(crop[3])) <= 1


def test_multi_scale_crops_take_thirteen_places_and_ten_shapes() -> None:
    crops = [multi_scale_crop(256, 340, (1.0, 0.875, 0.75, 0.66), generator(seed)) for seed in range(2000)]
    assert len({crop[2:] for crop in crops}) == 10
    assert len({crop[:2] for crop in crops if crop[2:] == (168, 168)}) == 13


@given(height=sides, width=sides, low=st.floats(0.05, 1), seed=seeds)
def test_random_resized_crops(height: int, width: int, low: float, seed: int) -> None:
    assert inside(random_resized_crop(height, width, (low, 1.0), (3 / 4, 4 / 3), generator(seed)), height, width)


def test_random_resized_crops_have_the_area_and_aspect_asked_for() -> None:
    crops = np.array([random_resized_crop(240, 320, (0.2, 0.5), (3 / 4, 4 / 3), generator(s)) for s in range(500)])
    area = crops[:, 2] * crops[:, 3] / (240 * 320)
    aspect = crops[:, 3] / crops[:, 2]
    assert 0.19 < area.min() < 0.25
    assert 0.45 < area.max() < 0.51
    assert 0.73 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.36


@given(height=sides, width=sides, count=st.integers(1, 5))
def test_view_crops_span_the_longer_side(height: int, width: int, count: int) -> None:
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
    augmentation = augment(flip=True)
    crop = augmentation.draw(60, 80, generator(1))
    clip = augmentation.apply(np.stack([frame] * 5), crop, (32, 32))
    assert clip.shape == (3, 5, 32, 32)
    assert clip.dtype == torch.uint8
    assert (clip == clip[:, :1]).all()


def test_a_flip_mirrors_and_a_full_crop_keeps_the_pixels() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    plain = Augmentation().apply(frames, ClipTransform(0, 0, 40, 40), (40, 40))
    mirrored = Augmentation().apply(frames, ClipTransform(0, 0, 40, 40, flip=True), (40, 40))
    assert torch.equal(plain, torch.from_numpy(frames).permute(3, 0, 1, 2))
    assert torch.equal(mirrored, plain.flip(-1))


def test_flips_are_drawn_only_where_asked_for() -> None:
    assert not any(Augmentation().draw(64, 64, generator(seed)).flip for seed in range(50))
    assert 10 < sum(augment(flip=True).draw(64, 64, generator(seed)).flip for seed in range(50)) < 40


def test_the_whole_frame_can_be_kept() -> None:
    frames = noise(3, 28, 28)
    augmentation = augment(crop="whole")
    crop = augmentation.draw(28, 28, generator(0))
    assert torch.equal(augmentation.apply(frames, crop, (28, 28)), torch.from_numpy(frames).permute(3, 0, 1, 2))
    assert augmentation.draw(20, 30) == ClipTransform(0, 0, 20, 30)


@given(height=sides, width=sides, count=st.integers(1, 5), share=st.floats(0.5, 1))
def test_smaller_view_crops_keep_to_the_middle_of_the_shorter_side(
    height: int, width: int, count: int, share: float
) -> None:
    crops = view_crops(height, width, (56, 56), count, share)
    assert len(crops) == count
    for crop in crops:
        assert inside((crop.top, crop.left, crop.height, crop.width), height, width)
        assert crop.height == crop.width == round(share * min(height, width))
        spare = (crop.left, width - crop.width) if height > width else (crop.top, height - crop.height)
        assert abs(spare[0] - spare[1] / 2) <= 0.5


def test_a_view_of_seven_eighths_is_what_resizing_to_256_and_cropping_224_shows() -> None:
    assert view_crops(256, 320, (224, 224), 1, 0.875) == [ClipTransform(16, 48, 224, 224)]
    assert view_crops(256, 320, (224, 224), 3, 0.875) == [ClipTransform(16, left, 224, 224) for left in (0, 48, 96)]
    with pytest.raises(ValueError, match=r"crop_pct is 1\.5; expected"):
        view_crops(256, 320, (224, 224), 1, 1.5)


@given(height=sides, width=sides, flip=st.booleans(), seed=seeds)
def test_what_is_off_draws_nothing_and_what_is_on_moves_no_crop(height: int, width: int, flip: bool, seed: int) -> None:
    by_hand, ours, more = generator(seed), generator(seed), generator(seed)
    crop = multi_scale_crop(height, width, (1.0, 0.875, 0.75, 0.66), by_hand)
    mirrored = flip and bool(torch.rand((), generator=by_hand) < 0.5)
    plain = augment(flip=flip).draw(height, width, ours)
    assert plain == ClipTransform(*crop, flip=mirrored)
    assert torch.equal(by_hand.get_state(), ours.get_state())  # masks are drawn next
    rich = augment(flip=flip, rand_augment=VIDEOMAE, reprob=1.0).draw(height, width, more)
    assert (rich.top, rich.left, rich.height, rich.width, rich.flip) == (*crop, mirrored)
    assert rich.rand_augment_seed is not None
    assert rich.erase_seed is not None


@given(policy=policies, seed=seeds)
def test_rand_augment_treats_every_frame_alike(policy: str, seed: int) -> None:
    frames = noise(3, 40, 48)
    frames[2] = frames[0]
    augmentation = augment(rand_augment=policy, flip=True)
    crop = augmentation.draw(40, 48, generator(seed))
    clip = augmentation.apply(frames, crop, (24, 32))
    assert clip.shape == (3, 3, 24, 32)
    assert clip.dtype == torch.uint8
    assert torch.equal(clip[:, 0], clip[:, 2])
    assert all(torch.equal(clip[:, i : i + 1], augmentation.apply(frames[i : i + 1], crop, (24, 32))) for i in range(3))


@given(seed=seeds, state=st.integers(0, 100))
def test_clips_follow_from_the_generator_alone_and_leave_global_generators_alone(seed: int, state: int) -> None:
    frames = noise(2, 40, 48)

    def made() -> torch.Tensor:
        augmentation = augment(flip=True, rand_augment=VIDEOMAE, reprob=0.5)
        return augmentation.apply(frames, augmentation.draw(40, 48, generator(seed)), (32, 32))

    first = made()
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)
    assert torch.equal(made(), first)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


@pytest.mark.parametrize(
    "policy", ["rand-m20-n15-p1-mmax20", "rand-m0-n15-p1", "rand-m10-n15-inc1-p1", "rand-m10-n14-t3aw-p1"]
)
def test_rand_augment_works_at_its_strongest_and_weakest(policy: str) -> None:
    augmentation = augment(crop="whole", rand_augment=policy)
    for seed in range(50):
        augmentation.apply(noise(1, 16, 16), augmentation.draw(16, 16, generator(seed)), (16, 16))


def test_seeds_give_different_clips() -> None:
    frames = noise(1, 32, 32)
    for augmentation in (
        augment(crop="whole", rand_augment="rand-m7-n4-mstd0.5-p1"),
        augment(crop="whole", reprob=1.0),
    ):
        clips = [augmentation.apply(frames, augmentation.draw(32, 32, generator(seed)), (32, 32)) for seed in range(20)]
        assert len({clip.numpy().tobytes() for clip in clips}) == 20


@pytest.mark.parametrize(
    "policy", ["", "m7-n4", "rand-m7-n4-foo", "rand-mx", "rand_m7", "rand-m7 ", "augmix-m5", "rand-tnone", "rand-p.5.5"]
)
def test_a_policy_that_timm_would_misread_is_an_error(policy: str) -> None:
    with pytest.raises(ValueError, match=rf"rand_augment is '{policy}'.*for example rand-m7-n4-mstd0.5-inc1"):
        AugmentationConfig(rand_augment=policy)


def test_a_policy_that_timm_cannot_follow_is_an_error() -> None:
    with pytest.raises(ValueError, match="rand_augment is 'rand-n20-tweights', which timm cannot follow"):
        augment(rand_augment="rand-n20-tweights")


@given(height=st.integers(8, 64), width=st.integers(8, 64), seed=seeds)
def test_erasing_takes_one_rectangle_of_all_frames(height: int, width: int, seed: int) -> None:
    frames = noise(4, height, width)
    before = frames.copy()
    augmentation = augment(crop="whole", reprob=1.0)
    clip = augmentation.apply(frames, augmentation.draw(height, width, generator(seed)), (height, width))
    assert (frames == before).all()
    changed = (clip != torch.from_numpy(frames).permute(3, 0, 1, 2)).any(0).any(0)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    high, wide = len(rows), len(columns)
    assert changed.sum() == high * wide == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    # The area and the shape asked for, but for sides that are rounded to whole pixels.
    assert (high - 0.5) * (wide - 0.5) <= height * width / 3
    assert (high + 0.5) * (wide + 0.5) >= height * width * 0.02
    assert (high - 0.5) / (wide + 0.5) <= 1 / 0.3
    assert (high + 0.5) / (wide - 0.5) >= 0.3


def test_erased_pixels_are_noise_of_their_own() -> None:
    black = np.zeros((8, 200, 200, 3), dtype=np.uint8)
    augmentation = augment(crop="whole", reprob=1.0)
    clip = augmentation.apply(black, augmentation.draw(200, 200, generator(2)), (200, 200))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    erased = clip[:, :, clip.amax((0, 1)) > 0].permute(1, 2, 0)  # frames, pixels, channels
    normalised = (erased.float() / 255 - mean) / std
    assert normalised.mean((0, 1)).abs().max() < 0.05
    assert (normalised.std((0, 1)) - 1).abs().max() < 0.06  # a little is lost where bytes end
    frames = normalised.flatten(1)
    assert (torch.corrcoef(frames) - torch.eye(8)).abs().max() < 0.1


def test_erasing_is_as_frequent_as_asked_for() -> None:
    def erased(share: float) -> int:
        return sum(augment(reprob=share).draw(64, 64, generator(s)).erase_seed is not None for s in range(400))

    assert 70 < erased(0.25) < 130
    assert (erased(0.0), erased(1.0)) == (0, 400)
    with pytest.raises(ValueError, match=r"augmentation\.reprob is 25.*from 0 to 1"):
        AugmentationConfig(reprob=25)


def test_test_crops_are_not_augmented() -> None:
    frames = noise(2, 32, 48)
    (crop,) = view_crops(32, 48, (32, 32), 1)
    rich = augment(flip=True, rand_augment=VIDEOMAE, reprob=1.0)
    assert torch.equal(rich.apply(frames, crop, (32, 32)), Augmentation().apply(frames, crop, (32, 32)))


def test_settings_can_be_sent_to_workers() -> None:
    augmentation = augment(rand_augment=VIDEOMAE, reprob=0.25)
    augmentation.apply(noise(1, 32, 32), augmentation.draw(32, 32), (32, 32))
    assert pickle.loads(pickle.dumps(augmentation)) == augmentation
    assert len({augmentation, augment(rand_augment=VIDEOMAE, reprob=0.25), Augmentation()}) == 2
