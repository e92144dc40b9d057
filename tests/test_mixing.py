"""Mixing: targets follow the mixed clips, all frames are mixed alike, global generators are left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from video_convmae.data.mixing import Mixing
from video_convmae.data.options import MixingConfig

MIXUP, CUTMIX, BOTH = MixingConfig(cutmix=0.0), MixingConfig(mixup=0.0), MixingConfig()

seeds = st.integers(0, 2**31)
kinds = st.sampled_from([MIXUP, CUTMIX, BOTH])


def mixed(config: MixingConfig, clips: Tensor, labels: Tensor, seed: int, classes: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return Mixing(config, classes)(clips, labels)


def flat_clips(count: int, frames: int = 2, height: int = 9, width: int = 13) -> tuple[Tensor, Tensor]:
    """Clips of constant pixels: clip i has the label i and the value i."""
    labels = torch.arange(count)
    return labels.float().view(-1, 1, 1, 1, 1).expand(-1, 3, frames, height, width).clone(), labels


@given(
    kind=kinds,
    half=st.integers(1, 4),
    frames=st.integers(1, 4),
    height=st.integers(4, 20),
    width=st.integers(4, 20),
    seed=seeds,
)
def test_targets_follow_the_mixed_clips(
    kind: MixingConfig, half: int, frames: int, height: int, width: int, seed: int
) -> None:
    clips, labels = flat_clips(2 * half, frames, height, width)
    config = MixingConfig(kind.mixup, kind.cutmix, smoothing=0.0)
    out, targets = mixed(config, clips, labels, seed)
    assert out.shape == clips.shape
    assert (targets.shape, targets.dtype) == ((2 * half, 8), torch.float32)
    assert torch.allclose(targets.sum(1), torch.ones(2 * half))
    assert torch.allclose(targets @ torch.arange(8.0), out.mean((1, 2, 3, 4)), atol=1e-5)
    assert ((targets > 0).sum(1) <= 2).all()


@given(kind=kinds, smoothing=st.floats(0, 1), seed=seeds)
def test_smoothed_targets_sum_to_one(kind: MixingConfig, smoothing: float, seed: int) -> None:
    _, targets = mixed(MixingConfig(kind.mixup, kind.cutmix, smoothing=smoothing), *flat_clips(4), seed)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert (targets >= smoothing / 8 - 1e-6).all()


@given(seed=seeds)
def test_a_cutmix_rectangle_spans_all_frames_and_channels(seed: int) -> None:
    clips, labels = flat_clips(2, frames=5, height=16, width=24)
    changed = mixed(CUTMIX, clips, labels, seed)[0] != clips
    assert (changed == changed[:1, :1, :1]).all()
    rectangle = changed[0, 0, 0]
    assert rectangle.sum() == rectangle.any(0).sum() * rectangle.any(1).sum()


def test_cutmix_cuts_rows_and_columns() -> None:
    clips, labels = flat_clips(2, frames=5, height=16, width=24)
    rectangles = [(mixed(CUTMIX, clips, labels, seed)[0] != clips)[0, 0, 0] for seed in range(50)]
    assert {int(rectangle.any(1).sum()) for rectangle in rectangles} > set(range(4, 10))
    assert {int(rectangle.any(0).sum()) for rectangle in rectangles} > set(range(6, 12))


@given(kind=kinds, seed=seeds)
def test_frames_are_mixed_alike(kind: MixingConfig, seed: int) -> None:
    clips, labels = torch.randn(4, 3, 3, 8, 10, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    out, targets = mixed(kind, clips, labels, seed)
    for frame in range(3):
        alone, same = mixed(kind, clips[:, :, frame : frame + 1], labels, seed)
        assert torch.equal(out[:, :, frame : frame + 1], alone)
        assert torch.equal(targets, same)


@given(kind=kinds, seed=seeds, state=st.integers(0, 100))
def test_mixing_follows_torchs_generator_and_leaves_numpys_alone(kind: MixingConfig, seed: int, state: int) -> None:
    clips, labels = flat_clips(4)
    out, targets = mixed(kind, clips, labels, seed)
    np.random.seed(state)
    expected = np.random.rand()
    np.random.seed(state)
    again, same = mixed(kind, clips, labels, seed)
    assert np.random.rand() == expected
    assert torch.equal(out, again)
    assert torch.equal(targets, same)


def test_batches_are_mixed_differently() -> None:
    mixing, (clips, labels) = Mixing(MIXUP, 8), flat_clips(4)
    torch.manual_seed(0)
    assert len({mixing(clips, labels)[1].numpy().tobytes() for _ in range(20)}) == 20


@given(kind=kinds, seed=seeds, frames_first=st.booleans())
def test_the_given_clips_are_not_changed(kind: MixingConfig, seed: int, frames_first: bool) -> None:
    clips, labels = flat_clips(4)
    if frames_first:
        clips = clips.transpose(1, 2).contiguous().transpose(1, 2)
    before = clips.clone()
    mixed(kind, clips, labels, seed)
    assert torch.equal(clips, before)


def test_shares_of_mixed_batches_and_of_cutmix() -> None:
    clips, labels = flat_clips(2)

    def counts(config: MixingConfig) -> tuple[int, int]:
        """Count, of 200 batches, the unchanged ones and those that hold only the given values (cutmix)."""
        outs = [mixed(config, clips, labels, seed)[0] for seed in range(200)]
        same = sum(torch.equal(out, clips) for out in outs)
        return same, sum(bool(((out == 0) | (out == 1)).all()) for out in outs) - same

    assert 70 < counts(MixingConfig(cutmix=0.0, probability=0.5))[0] < 130
    assert 70 < counts(MixingConfig(switch=0.5))[1] < 130
    assert counts(MixingConfig(switch=0.0))[1] == 0
    same, cut = counts(MixingConfig(switch=1.0))
    assert same + cut == 200


def test_an_odd_batch_is_an_error_where_clips_are_mixed() -> None:
    with pytest.raises(ValueError, match=r"a batch has 5 clips.*an even train\.batch_size x data\.repeats"):
        Mixing(BOTH, 8)(*flat_clips(5))


@pytest.mark.parametrize("config", [MixingConfig(0.0, 0.0), MixingConfig(probability=0.0)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_labels_alone_can_be_smoothed(config: MixingConfig, count: int) -> None:
    clips, labels = flat_clips(count)
    state = torch.get_rng_state()
    out, targets = Mixing(config, 8)(clips, labels)
    expected = torch.full((count, 8), 0.1 / 8)
    expected[range(count), labels] += 0.9
    assert torch.equal(out, clips)
    assert torch.allclose(targets, expected)
    assert targets.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["mixup", "cutmix", "probability", "switch", "smoothing"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_values_out_of_range_are_errors(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"mixing\.{name} is {value}; expected"):
        MixingConfig(**{name: value})


@pytest.mark.parametrize("name", ["probability", "switch", "smoothing"])
def test_shares_end_at_one(name: str) -> None:
    with pytest.raises(ValueError, match=rf"mixing\.{name} is 1\.5; expected a share"):
        MixingConfig(**{name: 1.5})
