"""Measure the speed, size and quality of pack-videos' settings: a table for each kind of files.

    video-convmae benchmark packing --json packing.json
    video-convmae benchmark packing --list LIST --root DIR --only small "fast, crf 18"

Each variant is packed once; then clips of the same records are read from all of them in turns, as training reads them
(one core: the reading process and the crop). "x" is the speed over that of the files as they are. Without --only the
presets are measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from video_convmae.data.records import read_list
from video_convmae.data.sampling import Sampling
from video_convmae.data.transforms import Augmentation
from video_convmae.machine import describe_machine
from video_convmae.prepare.options import PRESETS, PackSettings
from video_convmae.prepare.pack import pack_videos

from .files import VideoList, video_lists
from .reading import LoaderSide, ReadCase

FAST = PRESETS["fast"]
ORIGINAL = "as it is"

VARIANTS: dict[str, PackSettings] = {
    **PRESETS,
    # the settings of `fast`, one after the other
    "keyframe every 16": PackSettings(tune="none", b_frames=0),
    "+ 3 B-frames": PackSettings(tune="none"),
    # `fast` with one setting changed
    "fast, keyframe every 4": replace(FAST, keyframe_every=4),
    "fast, 7 B-frames": replace(FAST, b_frames=7),
    "fast, crf 18": replace(FAST, crf=18),
    "fast, crf 26": replace(FAST, crf=26),
    "fast, short side 224": replace(FAST, short_side=224),
    "fast, half of the frames": replace(FAST, fps=15.0),
}


def run_packing(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every list and print its table; returns the rows of all.

    Raises:
        ValueError: `args.only` names an unknown variant.
    """
    torch.set_num_threads(1)
    names = args.only or list(PRESETS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"--only is {unknown[0]!r}; expected some of {', '.join(map(repr, VARIANTS))}")
    rows = []
    for videos in video_lists(args):
        of_list = measure_packing(videos, {name: VARIANTS[name] for name in names}, args)
        print(*packing_table(of_list), sep="\n", flush=True)
        rows += [row | describe_machine() for row in of_list]
    return rows


def measure_packing(
    videos: VideoList, variants: dict[str, PackSettings], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Pack every variant of a list and read them in turns; returns a row for each, the files as they are first."""
    lists = {ORIGINAL: (videos.path, videos.root)}
    rows: dict[str, dict[str, Any]] = {ORIGINAL: {"bytes": 1.0, "psnr": None}}
    for title, settings in variants.items():
        out = args.folder / f"{videos.path.stem}_{title.replace(' ', '_').replace(',', '')}"
        summary = pack_videos(videos.path, videos.root, out, settings, workers=args.workers)
        rows[title] = {"bytes": summary["bytes"] / summary["source_bytes"], "psnr": summary["psnr"]["median"]}
        lists[title] = (out / videos.path.with_suffix(".txt").name, out)
    sides = {}
    for title, (path, root) in lists.items():
        halved = title in variants and variants[title].fps is not None  # half the stride spans the same time
        sides[title] = LoaderSide(
            ReadCase(
                name=videos.name,
                records=read_list(path, root=root),
                sampling=Sampling(videos.sampling, 16, max(1, args.stride // (2 if halved else 1))),
                size=224,
                repeats=1,
                views=None,
                augmentation=Augmentation(),
                reader=args.reader,
                clock=args.clock,
            )
        )
        sides[title](0)
    taken = [{title: side(turn) for title, side in sides.items()} for turn in range(args.turns)]
    for title, row in rows.items():
        sides[title].reader.close()
        row["clips_per_second"] = args.turns / sum(each[title] for each in taken)
        row["times"] = row["clips_per_second"] / rows[ORIGINAL]["clips_per_second"]
    return [{"files": videos.name, "variant": title, "sampling": videos.sampling, **row} for title, row in rows.items()]


def packing_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"\n{rows[0]['files']}, {rows[0]['sampling']} sampling\n"
    yield "| settings | clips/s a core | x | bytes | PSNR, dB |\n|---|---|---|---|---|"
    for row in rows:
        psnr = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
        rates = f"{row['clips_per_second']:.1f} | {row['times']:.2f}"
        yield f"| {row['variant']} | {rates} | {row['bytes']:.2f} | {psnr} |"
