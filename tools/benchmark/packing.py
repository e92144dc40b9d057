"""Measure what tools/pack_videos.py's settings cost and bring: a table for each kind of files.

    python tools/benchmark.py packing --json packing.json
    python tools/benchmark.py packing --list LIST --root DIR --only small

Each variant is packed once; then clips of the same records are read from all of them in turns, as training reads them
(one core: the decoding process and the crop). "x" is over the files as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from video_convmae.benchmark.files import KINDS, make_files
from video_convmae.benchmark.loader import Case, Ours

from video_convmae.data.records import read_list
from video_convmae.data.sampling import Sampling
from video_convmae.data.transforms import Augmentation
from video_convmae.prepare.encode import PRESETS, Settings
from video_convmae.prepare.pack import pack_videos

FAST = PRESETS["fast"]

# What is tried, in the order of the table: the settings one after the other, then the presets.
VARIANTS: dict[str, Settings] = {
    "keyframe every 16": Settings(tune="none", b_frames=0),
    "+ 3 B-frames": Settings(tune="none"),
    "+ no deblocking, no CABAC": FAST,
    "fast, keyframe every 8": replace(FAST, keyframe_every=8),
    "fast, keyframe every 4": replace(FAST, keyframe_every=4),
    "fast, keyframes only": PRESETS["keyframes"],
    "fast, 7 B-frames": replace(FAST, b_frames=7),
    "fast, crf 18": replace(FAST, crf=18),
    "fast, crf 26": replace(FAST, crf=26),
    "fast, short side 224": replace(FAST, short_side=224),
    "fastest": PRESETS["fastest"],
    "fast, half of the frames": replace(FAST, fps=15.0),
    "small": PRESETS["small"],
}


def measure(
    name: str, path: Path, root: Path, kind: str, variants: dict[str, Settings], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Pack every variant of a list, read them in turns: a row for each, the files as they are first."""
    lists, rows = {"as it is": (path, root)}, {"as it is": {"bytes": 1.0, "psnr": None}}
    for title, settings in variants.items():
        out = given.folder / f"{path.stem}_{title.replace(' ', '_').replace(',', '')}"
        summary = pack_videos(path, root, out, settings, workers=given.workers)
        rows[title] = {"bytes": summary["bytes"] / summary["source_bytes"], "psnr": summary["psnr"]["median"]}
        lists[title] = (out / path.with_suffix(".txt").name, out)
    sides = {}
    for title, (file, folder) in lists.items():
        records = read_list(file, root=folder)
        halved = 2 if title in variants and variants[title].fps else 1
        sampling = Sampling(kind, 16, max(1, given.stride // halved))
        crop = Augmentation()
        sides[title] = Ours(Case(name, records, sampling, 224, 1, None, crop, given.reader, given.clock))
        sides[title](0)
    taken = [{title: side(turn) for title, side in sides.items()} for turn in range(given.turns)]
    for title, row in rows.items():
        sides[title].reader.close()
        row["clips_per_second"] = given.turns / sum(each[title] for each in taken)
        row["times"] = row["clips_per_second"] / rows["as it is"]["clips_per_second"]
    return [{"files": name, "variant": title, "sampling": kind, **row} for title, row in rows.items()]


def report(rows: list[dict[str, Any]]) -> None:
    """Print a table as Markdown."""
    print(f"\n{rows[0]['files']}, {rows[0]['sampling']} sampling\n")
    print("| settings | clips/s a core | x | bytes | PSNR, dB |\n|---|---|---|---|---|")
    for row in rows:
        psnr = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
        rates = f"{row['clips_per_second']:.1f} | {row['times']:.2f}"
        print(f"| {row['variant']} | {rates} | {row['bytes']:.2f} | {psnr} |")


def add_command(commands: Any, environment: Callable[[], dict[str, Any]]) -> None:
    """Add `packing` to the subcommands of tools/benchmark.py; see `benchmark_loader.add_command`."""
    parser = commands.add_parser(
        "packing",
        help="what re-encoding costs and brings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", type=Path, help="videos to pack; none: files like those of both data sets are made")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that its paths are relative to")
    parser.add_argument("--sampling", choices=["dense", "uniform"], default="dense", help="of the list's clips")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="settings to try")
    parser.add_argument("--reader", default="pyav")
    parser.add_argument("--stride", type=int, default=4, help="of dense clips; half of it where frames are halved")
    parser.add_argument("--files", type=int, default=8, help="files of each kind that are made")
    parser.add_argument("--turns", type=int, default=40, help="samples of each variant")
    parser.add_argument("--workers", type=int, default=1, help="videos packed at once")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for machines in use")
    parser.add_argument("--folder", type=Path, default=Path(gettempdir()) / "videoconvmae_files", help="for all files")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.set_defaults(run=partial(run, environment=environment))


def run(given: argparse.Namespace, environment: Callable[[], dict[str, Any]]) -> None:
    """Measure every list, print the tables, and write JSON if asked."""
    torch.set_num_threads(1)
    if given.list is not None:
        lists = [(given.list.stem, given.list, given.root, given.sampling)]
    else:
        lists = [
            (f"{name}-like", make_files(given.folder, name, given.files), given.folder, kind.sampling)
            for name, kind in KINDS.items()
        ]
    variants = {title: VARIANTS[title] for title in given.only}
    rows = []
    for name, path, root, kind in lists:
        of_list = measure(name, path, root, kind, variants, given)
        report(of_list)
        rows += [row | environment() for row in of_list]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
