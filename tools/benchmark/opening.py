"""Measure the opening of a long file, in pairs: its packets are walked, then its kept scan is read.

    video-convmae benchmark opening --json opening.json
    video-convmae benchmark opening --file film.mp4

Each time a clip of 16 frames in the middle is read, too. The file is made by writing the packets of a short
Kinetics-like clip again and again (nothing is encoded twice), and lies in the system's page cache.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import av

from video_convmae.data.decoding import count_frames, open_frames
from video_convmae.data.records import Record
from video_convmae.machine import describe_machine

from .files import make_files

SIDES = ("first", "again")


def run_opening(args: argparse.Namespace) -> dict[str, Any]:
    """Measure pairs of openings and print the medians; returns them with every pair."""
    path = args.file or make_film(args.folder, args.hours)
    pairs = []
    for _ in range(args.repeats):
        with TemporaryDirectory() as cache, mock.patch.dict(os.environ, XDG_CACHE_HOME=cache):
            pairs.append({side: measure_opening(path) for side in SIDES})
            frames = count_frames(path)
    medians = {
        side: {name: round(median(pair[side][name] for pair in pairs), 4) for name in pairs[0][side]} for side in SIDES
    }
    result = {"file": path.name, "frames": frames, "bytes": path.stat().st_size, **medians, "pairs": pairs}
    result |= describe_machine()
    print(*report_opening(result), sep="\n", flush=True)
    return result


def make_film(folder: Path, hours: float) -> Path:
    """Return an mp4 of about this length, made of the packets of a clip of ten seconds or found in the folder."""
    path = folder / f"film of {hours:g} hours.mp4"
    if path.exists():
        return path
    make_files(folder, "kinetics", 1)
    partial = path.with_suffix(".part")
    with av.open(str(folder / "kinetics_000.mp4")) as source, av.open(str(partial), "w", format="mp4") as film:
        given = source.streams.video[0]
        stream: Any = film.add_stream_from_template(given)
        packets = [
            (bytes(packet), packet.pts, packet.dts, packet.duration, packet.is_keyframe)
            for packet in source.demux(given)
            if packet.size and packet.pts is not None and packet.dts is not None
        ]
        length = sum(duration or 0 for *_, duration, _ in packets)
        assert given.time_base is not None  # of mp4
        for turn in range(round(hours * 3600 / float(length * given.time_base))):
            for data, pts, dts, duration, is_key in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts, packet.duration = pts + turn * length, dts + turn * length, duration
                packet.time_base, packet.stream, packet.is_keyframe = given.time_base, stream, is_key
                film.mux(packet)
    partial.replace(path)
    return path


def measure_opening(path: Path) -> dict[str, float]:
    """Open a file and read a clip: seconds until it is open and until the clip is read, by the wall and of a core."""
    wall, cpu = time.perf_counter(), time.process_time()
    with open_frames(Record(str(path)), "pyav") as reader:
        opened = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        middle = len(reader) // 2
        reader.read(range(middle, min(middle + 64, len(reader)), 4))
    with_clip = {"with_clip_wall": time.perf_counter() - wall, "with_clip_cpu": time.process_time() - cpu}
    return opened | with_clip


def report_opening(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a result for a reader."""
    pairs = len(result["pairs"])
    yield f"{result['file']}: {result['frames']:,} frames, {result['bytes'] / 1e6:,.0f} MB; medians of {pairs} pairs"
    for side in SIDES:
        times = result[side]
        yield (
            f"  opened {side}: {times['wall']:.3f} s ({times['cpu']:.3f} s of a core), with a clip "
            f"{times['with_clip_wall']:.3f} s ({times['with_clip_cpu']:.3f} s)"
        )
    yield f"  {result['device']}, commit {result['commit']}"
