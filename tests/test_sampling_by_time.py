"""Sampling by time (`data.fps`): the same moments of a scene, whatever the frame rate of the file that shows it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import encode, save_series
from hypothesis import given
from hypothesis import strategies as st

from video_convmae.config import DataConfig, replace_options
from video_convmae.data import datasets
from video_convmae.data.datasets import ClipDataset, SampleKey, sample_generator
from video_convmae.data.decoding import DecodeError, open_frames, record_at
from video_convmae.data.decoding.memory import MemoryReader
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.options import AugmentationConfig, ViewConfig
from video_convmae.data.records import Record, Records
from video_convmae.data.sampling import Sampling, dense_views, duration, nearest_frames, timed_clip, timed_views
from video_convmae.data.transforms import Augmentation
from video_convmae.errors import UserError

RATES = [Fraction(10), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(60)]
rates = st.sampled_from(RATES)
seconds = st.integers(1, 40)
lengths = st.integers(1, 32)
wanted = st.sampled_from([0.5, 1.0, 3.7, 4.0, 7.5, 10.0, 24.0, 29.97, 60.0, 120.0])
seeds = st.integers(0, 2**31)


def times_of(rate: Fraction, length: float) -> np.ndarray:
    """When a scene of `length` seconds is shown, filmed at this rate."""
    return np.arange(max(1, round(length * rate))) / float(rate)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(one=rates, other=rates, length=seconds, num_frames=lengths, fps=wanted, seed=seeds)
def test_a_scene_gives_the_same_times_at_any_rate(
    one: Fraction, other: Fraction, length: int, num_frames: int, fps: float, seed: int
) -> None:
    """Within half a frame of each file: its nearest frame to the same moment. (Filmed at 29.97 the scene ends up to
    half a frame earlier or later; above the file's own rate the last moment may lie up to a frame behind its end.)"""
    shown = []
    for rate in (one, other):
        times = times_of(rate, length)
        clip = times[timed_clip(times, num_frames, fps, generator(seed))]
        views = times[timed_views(times, num_frames, fps, 3)]
        shown.append((clip, views, abs(duration(times) - length), 0.5 / rate + max(0.0, 1 / rate - 1 / fps)))
    (clip, views, off, half), (other_clip, other_views, other_off, other_half) = shown
    tolerance = half + other_half + off + other_off + 1e-5
    fits = length >= num_frames / fps  # a shorter one repeats its last frame, which ends the scene in each file
    tolerance += 0.0 if fits else 1 / one + 1 / other
    assert np.abs(clip - other_clip).max() <= tolerance
    assert np.abs(views - other_views).max() <= tolerance


@given(
    gaps=st.lists(st.floats(0.001, 2.0), max_size=60),  # variable frame rates too
    num_frames=lengths,
    fps=wanted,
    segments=st.integers(1, 5),
    seed=seeds,
)
def test_indices_are_in_order_in_range_and_nearest(
    gaps: list[float], num_frames: int, fps: float, segments: int, seed: int
) -> None:
    times = np.cumsum([0.0, *gaps])
    sampling = Sampling("dense", num_frames, fps=fps)
    clip = sampling.clip(len(times), generator(seed), times)
    views = sampling.views(len(times), segments, times)
    assert (clip.shape, clip.dtype) == ((num_frames,), np.int64)
    assert (views.shape, views.dtype) == ((segments, num_frames), np.int64)
    for indices in (clip, *views):
        assert 0 <= indices.min() <= indices.max() < len(times)
        assert (np.diff(indices) >= 0).all()
    assert (np.diff(views, axis=0) >= 0).all()
    asked = views[0][:1] * 0 + np.arange(num_frames) / fps  # the first of several views begins at 0
    distance = np.abs(times[:, None] - asked).min(axis=0)
    if segments > 1:
        assert (np.abs(times[views[0]] - asked) <= distance + 1e-5).all()
    assert (clip == sampling.clip(len(times), generator(seed), times)).all()


@given(rate=rates, length=st.integers(2, 20), above=st.integers(2, 5))
def test_above_the_rate_of_the_file_frames_repeat(rate: Fraction, length: int, above: int) -> None:
    times = times_of(rate, length)
    indices = timed_views(times, 8 * above, float(rate) * above, 2)[0]
    assert (np.bincount(indices, minlength=8)[1:8] == above).all()
    assert set(indices) == set(range(len(set(indices))))


@given(rate=rates, stride=st.integers(1, 8), segments=st.integers(2, 5))
def test_at_a_whole_part_of_the_files_rate_it_is_a_stride(rate: Fraction, stride: int, segments: int) -> None:
    """But for the end: the clip takes 8 times 1 / fps seconds, so it stops `stride - 1` frames before the last one."""
    count = 8 * stride + 90
    views = timed_views(np.arange(count) / float(rate), 8, float(rate / stride), segments)
    assert (np.diff(views, axis=1) == stride).all()
    assert np.abs(views - dense_views(count - (stride - 1), 8, stride, segments)).max() <= 1


def test_the_nearest_frame_and_of_two_the_earlier() -> None:
    times = np.array([0.0, 0.1, 0.2, 0.9])
    asked = np.array([[0.04, 0.05, 0.051], [0.55, 0.56, 7.0]])
    assert nearest_frames(times, asked).tolist() == [[0, 0, 1], [2, 3, 3]]
    assert timed_clip(np.zeros(1), 4, 8.0).tolist() == [0, 0, 0, 0]


def test_rates_that_say_nothing_are_errors() -> None:
    with pytest.raises(ValueError, match="fps is 0; expected a number above 0"):
        Sampling(fps=0)
    with pytest.raises(ValueError, match="fps is 4 and sampling uniform, which takes frames over the whole video"):
        Sampling("uniform", fps=4)
    with pytest.raises(ValueError, match=r"data\.fps is 4 and data\.sampling uniform"):
        DataConfig(train="", sampling="uniform", fps=4)
    with pytest.raises(ValueError, match=r"data\.fps is 4 and data\.format frames: .*expected data\.stride"):
        DataConfig(train="", format="frames", fps=4)


def test_of_stride_and_fps_the_given_one_counts() -> None:
    by_time = DataConfig(train="", stride=4, fps=7.5)
    assert replace_options(by_time, {}).fps == 7.5
    assert replace_options(by_time, {"stride": 2}) == DataConfig(train="", stride=2)
    assert replace_options(by_time, {"fps": 2.0}).fps == 2.0
    assert replace_options(by_time, {"sampling": "uniform"}).fps is None
    for options in ({"stride": 2, "fps": 2.0}, {"format": "frames"}):
        with pytest.raises(UserError):
            replace_options(by_time, options)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """Files of several rates, of a variable rate and without times, with the times at which their frames are shown."""
    folder = tmp_path_factory.mktemp("films")
    films = {}
    for rate in RATES[::3] + RATES[-1:]:
        path = encode(folder / f"{float(rate):.2f}.mp4", round(rate), tick=1 / rate, options={"bf": "2"})
        films[path.stem] = path, np.arange(round(rate)) / float(rate)
    ticks = np.cumsum(np.random.default_rng(0).integers(1, 90, 60))
    variable = encode(folder / "variable.mkv", 60, times=ticks.tolist(), tick=Fraction(1, 1000), options={"bf": "2"})
    films["variable"] = variable, (ticks - ticks[0]) / 1000
    films["without times"] = encode(folder / "raw.h264", 40), np.arange(40) / 25
    return films


def test_every_reader_says_when_frames_are_shown(films: dict[str, tuple[Path, np.ndarray]]) -> None:
    with ReaderProcess("decord") as process:
        for path, expected in films.values():
            for name in ("pyav", "decord"):
                with open_frames(record_at(path), name) as opened:
                    np.testing.assert_allclose(opened.times, expected, atol=1e-3 if path.suffix == ".mkv" else 1e-4)
            with process.open(Record(str(path))) as remote:
                np.testing.assert_allclose(remote.times, expected, atol=1e-3)


def test_a_sample_is_a_function_of_seed_epoch_and_record(films: dict[str, tuple[Path, np.ndarray]]) -> None:
    """From any order, and from records kept in memory; its frames are those that `Sampling` names."""
    records = Records([Record(str(path)) for path, _ in films.values()])
    sampling = Sampling("dense", 4, fps=7.5)
    whole = Augmentation(AugmentationConfig(crop="whole"))
    with ReaderProcess("pyav") as reader:
        samples = [
            ClipDataset(records, sampling, whole, (48, 64), None, reader, seed=5)[SampleKey(2, i)] for i in (0, 3)
        ]
        kept = ClipDataset(records, sampling, whole, (48, 64), None, MemoryReader(reader, 1), seed=5)
        for _ in range(2):  # decoded, then from memory
            for sample in samples[::-1]:
                again = kept[SampleKey(2, sample.index)]
                assert torch.equal(sample.clips, again.clips)
        for sample in samples:
            path, times = list(films.values())[sample.index]
            drawn = sampling.clip(len(times), sample_generator(5, 2, sample.index, 0, 1, 0), times)
            with open_frames(record_at(path), "pyav") as opened:
                expected = torch.from_numpy(opened.read(drawn)).permute(3, 0, 1, 2)
            assert torch.equal(sample.clips[0], expected)


def test_a_folder_without_times_is_a_bad_record_that_says_so(tmp_path: Path) -> None:
    save_series(tmp_path / "frames", 12, "img_*.png")
    records = Records([Record(str(tmp_path / "frames"), format="frames")], "frames")
    with ReaderProcess("pyav") as reader:
        test = datasets.TestViewDataset  # by itself pytest would take it for tests
        views = test(records, Sampling("dense", 4, fps=4), ViewConfig(), Augmentation(), (48, 64), reader)
        (fault,) = views[0].bad_records
        assert "nothing says when its frames are shown, and data.fps is 4; expected a video" in fault.error
        clips = ClipDataset(records, Sampling("dense", 4, fps=4), Augmentation(), (48, 64), None, reader, attempts=1)
        with pytest.raises(DecodeError, match="nothing says when its frames are shown"):
            clips[SampleKey(0, 0)]
