"""Frame sampling: small cases by hand, properties for any frame count, stride and T."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from video_convmae.data.sampling import Sampling, dense_clip, dense_views, uniform_clip, uniform_views

counts = st.integers(1, 400)
lengths = st.integers(1, 32)
strides = st.integers(1, 8)
seeds = st.integers(0, 2**31)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(count=counts, length=lengths, stride=strides, seed=seeds)
def test_dense_clip(count: int, length: int, stride: int, seed: int) -> None:
    indices = dense_clip(count, length, stride, generator(seed))
    span = (length - 1) * stride + 1
    assert indices.shape == (length,)
    assert indices.dtype == np.int64
    assert 0 <= indices.min() <= indices.max() < count
    if count >= span:
        assert (np.diff(indices) == stride).all()
    else:
        assert indices.tolist() == [min(k * stride, count - 1) for k in range(length)]
    assert (indices == dense_clip(count, length, stride, generator(seed))).all()


def test_every_dense_start_is_drawn() -> None:
    """4 frames at stride 2 span 7: a video of 10 has the starts 0 to 3, its last frame among them."""
    draws = {tuple(dense_clip(10, 4, 2, generator(seed))) for seed in range(100)}
    assert draws == {(s, s + 2, s + 4, s + 6) for s in range(4)}


@given(count=counts, length=lengths, stride=strides, segments=st.integers(1, 10))
def test_dense_views_go_from_the_first_to_the_last_start(count: int, length: int, stride: int, segments: int) -> None:
    views = dense_views(count, length, stride, segments)
    last = max(0, count - ((length - 1) * stride + 1))
    assert views.shape == (segments, length)
    assert views.max() < count
    starts = views[:, 0].tolist()
    assert starts == ([last // 2] if segments == 1 else [i * last // (segments - 1) for i in range(segments)])
    if segments > 1:
        assert (starts[0], starts[-1]) == (0, last)


@given(count=counts, length=lengths, seed=seeds)
def test_uniform_clip_takes_one_frame_of_each_segment(count: int, length: int, seed: int) -> None:
    indices = uniform_clip(count, length, generator(seed))
    assert indices.shape == (length,)
    assert (np.diff(indices) >= 0).all()
    edges = [k * count // length for k in range(length + 1)]
    for index, low, high in zip(indices, edges[:-1], edges[1:]):
        assert low <= index < max(high, low + 1)
    assert indices.max() < count


@given(count=counts, length=lengths, segments=st.integers(1, 6))
def test_uniform_views_run_through_the_video(count: int, length: int, segments: int) -> None:
    views = uniform_views(count, length, segments)
    assert views.shape == (segments, length)
    assert views.min() >= 0
    assert views.max() < count
    assert (np.diff(views, axis=1) >= 0).all()
    assert (np.diff(views, axis=0) >= 0).all()


@pytest.mark.parametrize("count", [16, 31, 48, 49, 117])
def test_uniform_views_are_videomaes(count: int) -> None:
    """Two views, as in VideoMAE's test on Something-Something: the starts and the centres of 16 segments, sorted and
    dealt out in turn; one view: the centres."""
    tick = count / 16
    starts = [int(tick * x) for x in range(16)]
    centres = [int(tick / 2 + tick * x) for x in range(16)]
    both = sorted(starts + centres)
    assert uniform_views(count, 16, 2).tolist() == [both[0::2], both[1::2]]
    assert uniform_views(count, 16, 1).tolist() == [centres]


def test_a_short_video_runs_through_where_videomae_stands_still() -> None:
    assert uniform_views(4, 8, 1).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    assert uniform_clip(1, 4, generator()).tolist() == [0, 0, 0, 0]


def test_sampling_chooses() -> None:
    assert Sampling("dense", 4, 2).views(10, 2).tolist() == dense_views(10, 4, 2, 2).tolist()
    assert Sampling("uniform", 4).views(10, 2).tolist() == uniform_views(10, 4, 2).tolist()
    assert Sampling("uniform", 4).clip(10, generator(3)).tolist() == uniform_clip(10, 4, generator(3)).tolist()
    with pytest.raises(ValueError, match="sampling is 'sparse'"):
        Sampling("sparse")
    with pytest.raises(ValueError, match="at least one"):
        Sampling().clip(0)


@given(count=st.integers(61, 600), segments=st.integers(2, 10))
def test_dense_views_start_within_two_strides_of_videomaes(count: int, segments: int) -> None:
    """VideoMAE first keeps every 4th frame, then spreads the starts over those: its starts are multiples of 4.

    So its last view can end up to 3 frames before the video does; ours ends on the last frame.
    """
    kept = np.arange(0, count, 4)
    theirs = [kept[int(view * (len(kept) - 16) / (segments - 1))] for view in range(segments)]
    ours = dense_views(count, 16, 4, segments)
    assert (np.abs(ours[:, 0] - theirs) < 8).all()
    assert ours[-1, -1] == count - 1


def test_dense_starts_are_videomaes_and_the_last_three() -> None:
    """VideoMAE pretrains on 16 frames, 4 apart, from one of the first `count - 64 + 1` frames; the clip spans 61."""
    starts = {int(dense_clip(300, 16, 4, generator(seed))[0]) for seed in range(4000)}
    assert starts == set(range(300 - 64 + 1)) | {237, 238, 239}


@pytest.mark.parametrize("count", [16, 48, 160])
def test_uniform_segments_are_videomaes_where_they_divide_the_video(count: int) -> None:
    """VideoMAE draws from segments of `count // 16` frames and so never shows what is left over; ours cover it."""
    width = count // 16
    draws = np.stack([uniform_clip(count, 16, generator(seed)) for seed in range(300)])
    assert (draws.min(0) == np.arange(16) * width).all()
    assert (draws.max(0) == np.arange(16) * width + width - 1).all()
    assert uniform_clip(31, 16, generator()).max() >= 29  # theirs would stop at frame 15
