"""Samples and batches: a function of (seed, epoch, index, repeat) alone; bad files replaced, reported and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import encode
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from video_convmae import masking
from video_convmae.data.datasets import ClipDataset, Sample, SampleKey
from video_convmae.data.decoding import DecodeError
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.loader import BatchPlan, ResumableBatchSampler, collate, epoch_order, iter_batches
from video_convmae.data.options import AugmentationConfig
from video_convmae.data.records import Record, Records, read_list
from video_convmae.data.sampling import Sampling
from video_convmae.data.transforms import Augmentation

GRID = (2, 4, 4)


def draw_mask(generator: torch.Generator) -> tuple[Tensor, None]:
    return masking.tube(GRID, 0.75, generator), None


def draw_masks(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A mask, and the hidden tokens that a masked decoder predicts."""
    visible = masking.tube(GRID, 0.75, generator)
    return visible, masking.running_cell(visible, 0.5)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six h264 and two vp9 videos, three bad files, and their list."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        encode(folder / f"{i}.mp4", 24 + 4 * i)
    for i in range(6, 8):
        encode(folder / f"{i}.webm", 30, "libvpx-vp9")
    (folder / "text.mp4").write_text("not a video\n" * 200)
    (folder / "empty.mp4").touch()
    good = [f"{i}.{'mp4' if i < 6 else 'webm'} {i}" for i in range(8)]
    bad = ["text.mp4 8", "empty.mp4 9", "missing.mp4 10"]
    (folder / "good.txt").write_text("\n".join(good))
    (folder / "mixed.txt").write_text("\n".join(good + bad))
    (folder / "bad.txt").write_text("\n".join(bad))
    return folder


def clips(folder: Path, name: str, **changes: Any) -> ClipDataset:
    return clips_of(read_list(folder / name, root=folder), **changes)


def clips_of(records: Records, **changes: Any) -> ClipDataset:
    return ClipDataset(
        records,
        **{
            "sampling": Sampling("dense", 4, 3),
            "augmentation": Augmentation(AugmentationConfig(flip=True)),
            "size": (32, 32),
            "draw_mask": draw_mask,
            "reader": ReaderProcess("pyav", timeout=20),
            "seed": 5,
            **changes,
        },
    )


def equal(a: Sample, b: Sample) -> bool:
    return torch.equal(a.clips, b.clips) and torch.equal(a.visible, b.visible) and a[3:] == b[3:]


def test_a_sample(videos: Path) -> None:
    sample = clips(videos, "good.txt", repeats=3)[SampleKey(0, 6)]
    assert sample.clips.shape == (3, 3, 4, 32, 32)
    assert sample.clips.dtype == torch.uint8
    assert sample.visible.shape == (3, *GRID)
    assert (sample.label, sample.index, sample.bad_records) == (6, 6, ())
    assert len({clip.numpy().tobytes() for clip in sample.clips}) == 3  # repeats differ
    assert len({mask.numpy().tobytes() for mask in sample.visible}) == 3


def test_readers_give_the_same_sample(videos: Path) -> None:
    pytest.importorskip("decord", reason="decord has no wheel here")
    ours, theirs = (clips(videos, "good.txt", reader=ReaderProcess(name)) for name in ("pyav", "decord"))
    assert all(equal(ours[SampleKey(0, i)], theirs[SampleKey(0, i)]) for i in range(8))


def test_samples_depend_on_seed_epoch_and_index_alone(videos: Path) -> None:
    data = clips(videos, "good.txt")
    sample = data[SampleKey(3, 2)]
    torch.manual_seed(99)  # no global generator is used
    np.random.seed(99)
    data[SampleKey(0, 1)]
    assert equal(data[SampleKey(3, 2)], sample)
    assert equal(clips(videos, "good.txt")[SampleKey(3, 2)], sample)
    assert not equal(data[SampleKey(4, 2)], sample)
    assert not equal(clips(videos, "good.txt", seed=6)[SampleKey(3, 2)], sample)


def test_predicted_tokens_are_drawn_with_the_mask(videos: Path) -> None:
    data = clips(videos, "good.txt", draw_mask=draw_masks, repeats=2)
    sample, plain = data[SampleKey(0, 1)], clips(videos, "good.txt", repeats=2)[SampleKey(0, 1)]
    assert plain.predicted is None
    assert torch.equal(sample.visible, plain.visible)
    assert torch.equal(sample.clips, plain.clips)
    for visible, predicted in zip(sample.visible, sample.predicted, strict=True):
        assert torch.equal(predicted, masking.running_cell(visible, 0.5))
    batch = collate([sample, data[SampleKey(0, 2)]])
    assert torch.equal(batch.predicted[:2], sample.predicted)
    assert batch.predicted.shape == batch.visible.shape == (4, *GRID)
    assert collate([plain]).predicted is None


def test_repeats_do_not_change_the_first_clip(videos: Path) -> None:
    once, thrice = (clips(videos, "good.txt", repeats=r)[SampleKey(0, 0)] for r in (1, 3))
    assert torch.equal(once.clips[0], thrice.clips[0])
    assert torch.equal(once.visible[0], thrice.visible[0])


class CountingReader:
    """Record the requests to a reader process, in its place."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.asked: list[list[int]] = []

    def open(self, record: Record) -> CountingReader:
        self.opened.append(record.path)
        return self

    def __enter__(self) -> CountingReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __len__(self) -> int:
        return 30

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.asked.append(indices.tolist())
        return np.broadcast_to(np.asarray(indices, np.uint8)[:, None, None, None], (len(indices), 40, 40, 3))


def test_only_the_frames_asked_for_are_read_and_once() -> None:
    reader = CountingReader()
    data = clips_of(Records([Record("a.mp4")]), reader=reader, repeats=4)
    sample = data[SampleKey(0, 0)]
    (asked,) = reader.asked
    assert reader.opened == ["a.mp4"]
    assert asked == sorted(set(asked))
    shown = sample.clips[:, 0, :, 0, 0]  # every pixel of frame i is i
    assert set(asked) == set(shown.flatten().tolist())
    assert (shown.diff(dim=1) == 3).all()


def test_a_bad_record_is_replaced_and_reported(videos: Path) -> None:
    data = clips(videos, "mixed.txt")
    for index, name in ((8, "text.mp4"), (9, "empty.mp4"), (10, "missing.mp4")):
        sample = data[SampleKey(0, index)]
        assert sample.bad_records[0].index == index
        assert sample.bad_records[0].path == str(videos / name)
        assert name in sample.bad_records[0].error
        assert sample.index != index
        assert equal(data[SampleKey(0, index)], sample)
        assert len({data[SampleKey(epoch, index)].index for epoch in range(8)}) > 2  # not always the same replacement


def test_good_samples_do_not_depend_on_bad_ones(videos: Path) -> None:
    good, mixed = clips(videos, "good.txt"), clips(videos, "mixed.txt")
    assert all(equal(good[SampleKey(1, index)], mixed[SampleKey(1, index)]) for index in range(8))


def test_nothing_but_bad_records_is_an_error(videos: Path) -> None:
    with pytest.raises(DecodeError, match="10 records in a row"):
        clips(videos, "bad.txt")[SampleKey(0, 0)]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_batches_do_not_depend_on_the_workers(videos: Path, start_method: str) -> None:
    data = clips(videos, "mixed.txt", repeats=2)

    def loaded(workers: int) -> list:
        batches = ResumableBatchSampler(len(data), BatchPlan(3), seed=1, first_step=1, last_step=5)
        return list(iter_batches(data, batches, workers, start_method=start_method))

    alone, together = loaded(0), loaded(2)
    assert len(alone) == len(together) == 4
    for a, b in zip(alone, together):
        assert torch.equal(a.clips, b.clips)
        assert torch.equal(a.visible, b.visible)
        assert torch.equal(a.records, b.records)
        assert [tuple(fault) for fault in a.bad_records] == [tuple(fault) for fault in b.bad_records]
    assert alone[0].clips.shape == (6, 3, 4, 32, 32)
    assert (alone[0].records.view(3, 2).diff(dim=1) == 0).all()  # the clips of a record next to each other
    assert torch.equal(alone[0].records, alone[0].labels)
    assert sum(len(batch.bad_records) for batch in alone) > 0


def draws(count: int, plan: BatchPlan, first: int, last: int) -> list[list[SampleKey]]:
    return list(ResumableBatchSampler(count, plan, seed=0, first_step=first, last_step=last))


@given(
    batch=st.sampled_from([(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]),
    count=st.integers(4, 30),
    first=st.integers(0, 20),
)
def test_global_batches_do_not_depend_on_ranks_and_accumulation(batch: tuple, count: int, first: int) -> None:
    per_device, ranks, accumulate = batch
    steps = 7
    whole = draws(count, BatchPlan(4), first, first + steps)
    of_ranks = [
        draws(count, BatchPlan(per_device, ranks, rank, accumulate), first, first + steps) for rank in range(ranks)
    ]
    for step in range(steps):
        parts = [rank[step * accumulate + part] for part in range(accumulate) for rank in of_ranks]
        assert [draw for part in parts for draw in part] == whole[step]


def test_an_epoch_shows_every_record_once_and_resuming_continues() -> None:
    everything = draws(12, BatchPlan(4), 0, 9)
    for epoch in range(3):
        shown = [draw for batch in everything[3 * epoch : 3 * epoch + 3] for draw in batch]
        assert {draw.epoch for draw in shown} == {epoch}
        assert sorted(draw.index for draw in shown) == list(range(12))
    assert draws(12, BatchPlan(4), 5, 9) == everything[5:]
    assert epoch_order(12, 0, 0) != epoch_order(12, 0, 1)


def test_a_list_smaller_than_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="the list has 7 records and a step takes 8"):
        ResumableBatchSampler(7, BatchPlan(2, 2, 0, 2), 0, 0, 1)


def test_collate() -> None:
    tokens = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    sample = Sample(torch.zeros(2, 3, 1, 4, 4, dtype=torch.uint8), tokens, None, 3, 5, ())
    batch = collate([sample, sample])
    assert batch.labels.tolist() == [3] * 4
    assert batch.records.tolist() == [5] * 4
