"""Measure the loader: clips a second, the share of each stage, the distance from a floor and from VideoMAE's loader.

    video-convmae benchmark loader                                # both kinds of files, made on request
    video-convmae benchmark loader --vs videomae --repeats 2 --json loader.json
    video-convmae benchmark loader --vs videomae --views 5x3      # multi-view evaluation
    video-convmae benchmark loader --list LIST --root DIR --sampling dense --reader torchcodec --workers 8

All sides read the same frames of the same records in turns, so a machine whose speed drifts slows all of them; a ratio
is the median over the pairs. Without workers one core does the work: the reading process and this one wait for each
other.

The floor is the codec alone: on one thread PyAV seeks to the keyframe before the first wanted frame and decodes every
frame from there to the last (for each group of pictures that holds one). Opening, scanning, conversion, the transform
and the way between processes are left out. The loader can come out above the floor: in H.264 it leaves frames undecoded
that no other refers to.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from video_convmae.data.datasets import ClipDataset
from video_convmae.data.decoding import resolve_reader
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.loader import BatchPlan, ResumableBatchSampler, iter_batches
from video_convmae.data.options import AugmentationConfig, ViewConfig
from video_convmae.data.records import Records, read_list
from video_convmae.data.sampling import Sampling
from video_convmae.data.transforms import Augmentation
from video_convmae.machine import describe_machine

from .files import video_lists
from .reading import RIVALS, CodecFloor, LoaderSide, ReadCase, ReadSide, StageTimer


def run_loader(args: argparse.Namespace) -> dict[str, Any] | list[dict[str, Any]]:
    """Measure and print every case; returns one result, or a list of them."""
    torch.set_num_threads(1)
    results = []
    for case in read_cases(args):
        result = measure_loader(case, args.vs, args.turns) | describe_machine()
        if args.workers:
            result["workers"] = measure_workers(case, args.workers, args.batch, max(1, args.turns // args.batch))
        print(*report_loader(result), sep="\n", flush=True)
        results.append(result)
    return results if len(results) > 1 else results[0]


def read_cases(args: argparse.Namespace) -> Iterator[ReadCase]:
    """Yield each list with each reader."""
    views = ViewConfig(*map(int, args.views.split("x"))) if args.views else None
    for name, path, root, kind in video_lists(args):
        for reader in args.reader:
            yield ReadCase(
                name=name,
                records=read_list(path, root=root),
                sampling=Sampling(kind, args.frames, args.stride),
                size=args.size,
                repeats=args.repeats if views is None else 1,
                views=views,
                augmentation=Augmentation(AugmentationConfig(crop=args.crop, flip=args.flip, on_device=args.on_device)),
                reader=resolve_reader(reader),
                clock=args.clock,
            )


def measure_loader(case: ReadCase, against: str, turns: int) -> dict[str, Any]:
    """Let the loader, the other side, the floor and the timed stages take turns, after one turn that is not counted."""
    ours, stages = LoaderSide(case), StageTimer(case)
    sides: dict[str, ReadSide] = {"ours": ours, "floor": CodecFloor(case), "stages": stages}
    if against not in sides:
        sides[against] = RIVALS[against](case)
    for side in sides.values():
        side(0)
    stages.seconds.clear()
    taken = [{name: side(turn) for name, side in sides.items()} for turn in range(turns)]
    ours.reader.close()

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
            "shares": stages.shares(sum(each["ours"] for each in taken) / turns, turns),
        },
        "theirs": {"clips_per_second": rate(against)},
        "floor": {"clips_per_second": rate("floor")},
    }


def measure_workers(case: ReadCase, workers: int, batch: int, batches: int) -> dict[str, Any]:
    """Measure the clips a second of the whole loader, from the second batch of each worker on."""
    dataset = case.dataset(ReaderProcess(case.reader))
    warm, total = 2 * workers, 2 * workers + batches
    if isinstance(dataset, ClipDataset):  # a list shorter than a batch is repeated
        dataset.records = Records([case.records[i % len(case.records)] for i in range(max(len(case.records), batch))])
        sampler: Any = ResumableBatchSampler(len(dataset.records), BatchPlan(batch), 0, 0, total)
    else:
        sampler = [[(number * batch + i) % len(case.records) for i in range(batch)] for number in range(total)]
    start = 0.0
    for number, _ in enumerate(iter_batches(dataset, sampler, workers), start=1):
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


def report_loader(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a result for a reader."""
    ours, floor = result["ours"], result["floor"]
    yield f"{result['model']}, {len(result['pairs'])} samples, {result['device']}, commit {result['commit']}"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in ours["shares"].items() if share is not None)
    yield f"  ours       {ours['clips_per_second']:8.2f} clips/s a core: {shares}"
    yield f"  floor      {floor['clips_per_second']:8.2f} clips/s (ours is {ours['over_floor']:.2f} of it)"
    if result["against"] != "floor":
        theirs = result["theirs"]["clips_per_second"]
        yield f"  {result['against']:10s} {theirs:8.2f} clips/s; ratio {result['ratio']:.2f} (median of the pairs)"
    if workers := result.get("workers"):
        yield (
            f"  {workers['workers']} workers  {workers['clips_per_second']:8.2f} clips/s, "
            f"{workers['clips_per_second_per_core']:.2f} a core"
        )
