"""Measure the loader: clips a second, where the time goes, against a floor and against VideoMAE's way.

    python tools/benchmark.py loader                                # both kinds of files, made for it
    python tools/benchmark.py loader --vs videomae --repeats 2 --json loader.json
    python tools/benchmark.py loader --vs videomae --views 5x3      # multi-view evaluation
    python tools/benchmark.py loader --list LIST --root DIR --sampling dense --reader torchcodec --workers 8

Everything is done to the same records, at the same frames, in turns, so that a machine whose speed drifts slows all; a
ratio is the median over the pairs. Without workers one core does the work: the decoding process and this one wait for
each other.

The floor is the codec alone: on one thread PyAV seeks to the keyframe before the first frame that is needed and decodes
every frame from there to the last (for each group of pictures that is touched). Opening, scanning, conversion, the
transform and the way between processes are not in it. The loader can come out above the floor: in H.264 it leaves
frames undecoded that no other refers to.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from video_convmae.benchmark.files import KINDS, make_files

from video_convmae import masking
from video_convmae.data.datasets import CLIP, ClipDataset, SampleKey, TestViewDataset, sample_generator
from video_convmae.data.decoding import DecodeError, FrameReader, open_frames, pyav_reader, resolve_reader
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.loader import BatchPlan, ResumableBatchSampler, collate, iter_batches
from video_convmae.data.options import AugmentationConfig, ReaderName, ViewConfig
from video_convmae.data.records import Record, Records, read_list
from video_convmae.data.sampling import Sampling
from video_convmae.data.transforms import Augmentation, view_crops

MASK_RATIO = 0.9
VIDEOMAE_STRIDE = 4  # its test reads every fourth frame of the whole video, for each view again


@dataclass(frozen=True)
class Case:
    """One list and how it is read."""

    name: str
    records: Records
    sampling: Sampling
    size: int
    repeats: int
    views: ViewConfig | None
    augmentation: Augmentation
    reader: str
    clock: str  # wall, or cpu: the seconds that this process and the decoding one had a core

    def now(self, child: ReaderProcess | None = None) -> float:
        """The clock, in seconds."""
        if self.clock == "wall":
            return time.perf_counter()
        return time.process_time() + (0.0 if child is None or child._child is None else _cpu_of(child._child.pid))

    def data(self, reader: Any, seed: int = 0) -> ClipDataset | TestViewDataset:
        """The data set, reading through `reader`, a ReaderProcess or the like."""
        size = (self.size, self.size)
        if self.views is not None:
            return TestViewDataset(self.records, self.sampling, self.views, self.augmentation, size, reader)
        grid = (self.sampling.num_frames // 2, self.size // 16, self.size // 16)
        mask = partial(_draw_mask, grid)
        return ClipDataset(self.records, self.sampling, self.augmentation, size, mask, reader, self.repeats, seed)

    def key(self, turn: int) -> Any:
        """What the data set is asked for in this turn: each record once before any comes again."""
        epoch, index = divmod(turn, len(self.records))
        return index if self.views is not None else SampleKey(epoch, index)

    def indices(self, turn: int, count: int) -> np.ndarray:
        """The frames of each clip or segment of that sample, `(R, T)`, in a video of `count` frames."""
        if self.views is not None:
            return self.sampling.views(count, self.views.segments)
        epoch, index = divmod(turn, len(self.records))
        line = int(self.records.lines[index])
        generators = [sample_generator(0, epoch, line, repeat, 1, CLIP) for repeat in range(self.repeats)]
        return np.stack([self.sampling.clip(count, generator) for generator in generators])

    @property
    def clips(self) -> int:
        """Clips of one sample."""
        return self.repeats if self.views is None else self.views.count


def _draw_mask(grid: masking.Grid, generator: torch.Generator) -> tuple[Tensor, None]:
    return masking.tube(grid, MASK_RATIO, generator), None


def _cpu_of(pid: int) -> float:
    """CPU seconds of a process that runs: on Linux its number names its clock (clock_getcpuclockid)."""
    return time.clock_gettime((~pid << 3) | 2)


# ---- the sides: each does sample number `turn` and returns its seconds ----------------------------------------------


class Ours:
    """The training path of one core: a sample and its batch of one, the reader in a process of its own."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.reader = ReaderProcess(case.reader)
        self.data = case.data(self.reader)

    def __call__(self, turn: int) -> float:
        start = self.case.now(self.reader)
        sample = self.data[self.case.key(turn)]
        collate([sample])
        seconds = self.case.now(self.reader) - start
        if sample.faults:
            raise DecodeError(f"{sample.faults[0].error}; measure a list that tools/check_videos.py found clean")
        return seconds


class Floor:
    """The codec alone; see the head of this file. The index of each file is made beforehand."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, turn: int) -> float:
        record = self.case.records[turn % len(self.case.records)]
        with open_frames(record, "pyav") as reader:
            if record.format != "video" or not reader.scan.timed:
                raise ValueError(f"{record.path}: the floor is measured on videos that say when frames are shown")
            wanted = np.unique(self.case.indices(turn, len(reader)))
            times = reader.scan.times[wanted]
            groups = np.searchsorted(reader.scan.keyframes[:, 0], times, side="right") - 1
            lasts = [(group, times[groups == group][-1]) for group in np.unique(groups)]
            start = self.case.now()
            for group, last in lasts:
                for frame in reader._frames_from(group):
                    if frame.pts >= last:
                        break
            return self.case.now() - start


class VideoMAE:
    """What VideoMAE's loader does to the same frames, from the published facts, in one process.

    Pretraining: a decord reader with one thread for each clip, frames as PIL pictures, multi-scale crop and bilinear
    resize frame by frame, stacked, to float, normalised; a mask. Testing: the whole video decoded at every fourth frame
    for each of the views. There only the frames of the view are resized here; the original resizes all.
    """

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)

    def __init__(self, case: Case) -> None:
        import decord

        self.case, self.decord = case, decord
        self.augmentation = Augmentation()

    def __call__(self, turn: int) -> float:
        path = self.case.records[turn % len(self.case.records)].path
        with open_frames(Record(path), "pyav") as reader:
            clips = self.case.indices(turn, len(reader))
        start = self.case.now()
        if self.case.views is None:
            for indices in clips:
                self._clip(path, indices)
        else:
            for indices in clips:
                for place in range(self.case.views.crops):
                    self._view(path, indices, place)
        return self.case.now() - start

    def _open(self, path: str) -> Any:
        return self.decord.VideoReader(path, ctx=self.decord.cpu(0), num_threads=1)

    def _clip(self, path: str, indices: np.ndarray) -> Tensor:
        frames = self._open(path).get_batch(indices.tolist()).asnumpy()
        pictures = [Image.fromarray(frame).convert("RGB") for frame in frames]
        crop = self.augmentation.draw(*frames.shape[1:3])
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        pictures = [picture.crop(box).resize([self.case.size] * 2, Image.Resampling.BILINEAR) for picture in pictures]
        clip = self._normalised(pictures)
        np.random.shuffle(np.hstack([np.zeros(20), np.ones(176)]))
        return clip

    def _view(self, path: str, indices: np.ndarray, place: int) -> Tensor:
        video = self._open(path)
        every = list(range(0, len(video), VIDEOMAE_STRIDE))
        frames = video.get_batch(every).asnumpy()[np.minimum(indices // VIDEOMAE_STRIDE, len(every) - 1)]
        height, width = frames.shape[1:3]
        crop = view_crops(height, width, (self.case.size,) * 2, self.case.views.crops)[place]
        scale = self.case.size / min(height, width)
        size = (round(width * scale), round(height * scale))
        left, top = round(crop.left * scale), round(crop.top * scale)
        box = (left, top, left + self.case.size, top + self.case.size)
        return self._normalised(
            [Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR).crop(box) for frame in frames]
        )

    def _normalised(self, pictures: Sequence[Image.Image]) -> Tensor:
        stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        return (stacked.permute(3, 0, 1, 2).contiguous().float() / 255 - self.mean) / self.std


RIVALS: dict[str, Callable[[Case], Callable[[int], float]]] = {"floor": Floor, "videomae": VideoMAE}


# ---- where the time goes --------------------------------------------------------------------------------------------


class Stages:
    """The same samples within this process, with a clock at each stage."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.seconds: Counter[str] = Counter()

    def __call__(self, turn: int) -> float:
        before = self.seconds.copy()
        data = self.case.data(self)
        with self._timed_convert(), self._timed("augment"):
            sample = data[self.case.key(turn)]
        with self._timed("collate"):
            collate([sample])
        spent = Counter({name: seconds - before[name] for name, seconds in self.seconds.items()})
        # Each clock holds those within it: conversion is a part of reading, reading a part of making the sample.
        self.seconds["decode"] -= spent["convert"]
        self.seconds["augment"] -= spent["decode"]
        return spent["augment"] + spent["collate"]

    def open(self, record: Record) -> FrameReader:
        """A reader whose time is taken, in place of a RemoteReader."""
        with self._timed("decode"):
            reader = open_frames(record, self.case.reader)
        read = reader.read

        def timed_read(indices: np.ndarray) -> np.ndarray:
            with self._timed("decode"):
                return read(indices)

        reader.read = timed_read
        return reader

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = self.case.now()
        yield
        self.seconds[name] += self.case.now() - start

    @contextmanager
    def _timed_convert(self) -> Iterator[None]:
        make_converter = pyav_reader.rgb_converter

        def timed_converter() -> Callable[[Any], np.ndarray]:
            convert = make_converter()

            def timed_convert(frame: Any) -> np.ndarray:
                with self._timed("convert"):
                    return convert(frame)

            return timed_convert

        pyav_reader.rgb_converter = timed_converter
        try:
            yield
        finally:
            pyav_reader.rgb_converter = make_converter

    def shares(self, seconds: float, turns: int) -> dict[str, float | None]:
        """Share of each stage in samples that take `seconds` on the whole path; "transfer" is what remains: the way
        between the decoding process and this one. Where the reader is not PyAV, conversion is a part of decoding."""
        shares = {name: self.seconds[name] / turns / seconds for name in ("decode", "convert", "augment", "collate")}
        shares["transfer"] = max(0.0, 1 - sum(shares.values()))
        if not shares["convert"]:
            shares["convert"] = None
        return shares


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(case: Case, against: str, turns: int) -> dict[str, Any]:
    """Let ours, the other and the floor take turns, after one turn that does not count; then clock the stages."""
    sides = {"ours": Ours(case), "floor": Floor(case), "stages": Stages(case)}
    sides[against] = sides.get(against) or RIVALS[against](case)
    for side in sides.values():
        side(0)
    sides["stages"].seconds.clear()
    taken = [{name: side(turn) for name, side in sides.items()} for turn in range(turns)]
    sides["ours"].reader.close()

    def rate(name: str) -> float:
        return case.clips * turns / sum(each[name] for each in taken)

    return {
        "model": f"{case.name}, {case.reader}, {case.sampling.kind} {case.sampling.num_frames} frames, {case.clips} "
        + ("clips a decode" if case.views is None else "views"),
        "against": against,
        "precision": "uint8",
        "clock": case.clock,
        "threads": 1,
        "batch": case.clips,
        "ratio": statistics.median(each[against] / each["ours"] for each in taken),
        "pairs": [[each["ours"], each[against]] for each in taken],
        "ours": {
            "clips_per_second": rate("ours"),
            "over_floor": statistics.median(each["floor"] / each["ours"] for each in taken),
            "shares": sides["stages"].shares(sum(each["ours"] for each in taken) / turns, turns),
        },
        "theirs": {"clips_per_second": rate(against)},
        "floor": {"clips_per_second": rate("floor")},
    }


def measure_workers(case: Case, workers: int, batch: int, batches: int) -> dict[str, Any]:
    """Clips a second of the whole loader, from the second batch of each worker on."""
    data = case.data(ReaderProcess(case.reader))
    warm, total = 2 * workers, 2 * workers + batches
    if case.views is None:
        records = Records([case.records[i % len(case.records)] for i in range(max(len(case.records), batch))])
        data.records = records
        asked = ResumableBatchSampler(len(records), BatchPlan(batch), 0, 0, total)
    else:
        places = iter(range(total * batch))
        asked = [[next(places) % len(case.records) for _ in range(batch)] for _ in range(total)]
    iterator = iter_batches(data, asked, workers)
    start = 0.0
    for number, _ in enumerate(iterator, start=1):
        if number == warm:
            start = time.perf_counter()
    seconds = time.perf_counter() - start
    rate = case.clips * batch * batches / seconds
    return {
        "workers": workers,
        "batch": batch,
        "clips_per_second": rate,
        "clips_per_second_per_core": rate / min(workers, os.cpu_count() or 1),
    }


def report(result: dict[str, Any]) -> None:
    """Print one result for a person."""
    ours, floor = result["ours"], result["floor"]
    print(f"{result['model']}, {len(result['pairs'])} samples, {result['device']}, commit {result['commit']}")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in ours["shares"].items() if share is not None)
    print(f"  ours       {ours['clips_per_second']:8.2f} clips/s a core: {shares}")
    print(f"  floor      {floor['clips_per_second']:8.2f} clips/s (ours is {ours['over_floor']:.2f} of it)")
    if result["against"] != "floor":
        theirs = result["theirs"]["clips_per_second"]
        print(f"  {result['against']:10s} {theirs:8.2f} clips/s; ratio {result['ratio']:.2f} (median of the pairs)")
    if workers := result.get("workers"):
        print(
            f"  {workers['workers']} workers  {workers['clips_per_second']:8.2f} clips/s, "
            f"{workers['clips_per_second_per_core']:.2f} a core"
        )


# ---- the command line -----------------------------------------------------------------------------------------------


def add_command(commands: Any, environment: Callable[[], dict[str, Any]]) -> None:
    """Add `loader` to the subcommands of tools/benchmark.py.

    Args:
        commands: what `add_subparsers` returned.
        environment: gives the device and the commit that a result is stamped with.
    """
    parser = commands.add_parser(
        "loader",
        help="clips a second from files to batches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", type=Path, help="videos to read; none: files like those of both data sets are made")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that its paths are relative to")
    parser.add_argument("--sampling", choices=["dense", "uniform"], default="dense", help="of the list's clips")
    parser.add_argument("--reader", nargs="+", choices=get_args(ReaderName), default=["pyav"], help="each is measured")
    parser.add_argument("--vs", default="floor", choices=RIVALS, help="what it is measured against")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--size", type=int, default=224, help="side of a clip in pixels")
    parser.add_argument("--crop", choices=["multi_scale", "random_resized", "whole"], default="multi_scale")
    parser.add_argument("--flip", action="store_true", help="mirror half of the clips")
    parser.add_argument("--on-device", action="store_true", help="leave resizing and flipping to the device")
    parser.add_argument("--repeats", type=int, default=1, help="clips a decode")
    parser.add_argument("--views", help="multi-view evaluation in place of training: segments x crops, as in 5x3")
    parser.add_argument("--workers", type=int, default=0, help="also measure the whole loader with so many processes")
    parser.add_argument("--batch", type=int, default=8, help="records of a batch, with --workers")
    parser.add_argument("--files", type=int, default=12, help="files of each kind that are made")
    parser.add_argument("--turns", type=int, default=48, help="samples that count, of each side")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: where others use the machine too"
    )
    parser.add_argument("--folder", type=Path, default=Path(gettempdir()) / "videoconvmae_files", help="for made files")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.set_defaults(run=partial(run, environment=environment))


def run(given: argparse.Namespace, environment: Callable[[], dict[str, Any]]) -> None:
    """Measure every case, print, and write JSON if asked: one result, or a list of them."""
    torch.set_num_threads(1)
    results = []
    for case in cases(given):
        result = measure(case, given.vs, given.turns) | environment()
        if given.workers:
            result["workers"] = measure_workers(case, given.workers, given.batch, max(1, given.turns // given.batch))
        report(result)
        results.append(result)
    if given.json:
        given.json.write_text(json.dumps(results if len(results) > 1 else results[0], indent=2) + "\n")


def cases(given: argparse.Namespace) -> Iterator[Case]:
    """Measure each list with each reader."""
    if given.list is not None:
        lists = [(given.list.stem, given.list, given.root, given.sampling)]
    else:
        lists = [
            (f"{name}-like", make_files(given.folder, name, given.files), given.folder, kind.sampling)
            for name, kind in KINDS.items()
        ]
    views = ViewConfig(*map(int, given.views.split("x"))) if given.views else None
    for name, path, root, kind in lists:
        records = read_list(path, root=root)
        sampling = Sampling(kind, given.frames, given.stride)
        for reader in given.reader:
            yield Case(
                name,
                records,
                sampling,
                given.size,
                given.repeats if views is None else 1,
                views,
                Augmentation(AugmentationConfig(crop=given.crop, flip=given.flip, on_device=given.on_device)),
                resolve_reader(reader),
                given.clock,
            )
