"""Re-encode the videos of a list once, so that training reads them several times as fast.

    video-convmae pack-videos LIST --root DIR --out DIR                # --preset fast: 256 pixels, a keyframe every 16
    video-convmae pack-videos LIST --root DIR --out DIR --preset small --short-side 320
    video-convmae pack-videos LIST --root DIR --out DIR --tar 1000     # shards of 1,000 videos

`video-convmae benchmark packing` measures the settings. Written to the --out folder:

    NAME.txt       the rows of LIST with new paths, relative to --out; labels, order and line numbers stay (so a record
                   shows the same samples), and bad rows become comments. Beside it NAME.labels.txt, if LIST has one
    videos/        the packed videos; with --tar shards/
    faults.csv     line, record, error
    summary.json   bytes and frames before and after; PSNR against the decoded source at the packed size, in RGB; notes
                   on good videos (the size of the picture changes: packed at the size of the first)
    settings.json  the settings: one folder holds videos of one kind
    packed.jsonl   one line a video, written as videos are done: after an interruption, kills included, the same
                   command resumes

Every packed video is decoded once to verify its number of frames. Frames keep their times, and all are kept, unless
--fps asks for fewer: then data.stride covers more time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from video_convmae.cli.parser import CommandLine, local_path, within
from video_convmae.errors import UserError
from video_convmae.prepare.options import ENCODERS, PRESETS, SPEEDS, PackSettings


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = CommandLine("pack-videos", __doc__)
    parser.add_argument("list", type=local_path, metavar="LIST", help="list of videos")
    parser.add_argument("--root", type=local_path, default=Path(), help="folder that its paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="folder for the packed videos and their list")
    parser.add_argument("--preset", choices=PRESETS, default="fast", help="values of the next options (default fast)")
    parser.add_argument(
        "--short-side", type=within(int, least=16), help="pixels (256); smaller videos are not enlarged"
    )
    parser.add_argument("--fps", type=within(float, above=0), help="highest frame rate (default: all frames are kept)")
    parser.add_argument("--keyframe-every", type=within(int, least=1), help="frames from one keyframe to the next (16)")
    parser.add_argument("--codec", choices=ENCODERS, help="video codec (h264)")
    parser.add_argument("--tune", choices=["fastdecode", "none"], help="tuning of the encoder (fastdecode)")
    parser.add_argument("--crf", type=within(int, least=0, most=51), help="quality; 6 more halve the bytes (22)")
    parser.add_argument(
        "--b-frames", type=within(int, least=0, most=16), help="consecutive frames that no other frame refers to (3)"
    )
    parser.add_argument("--speed", choices=SPEEDS, help="preset of the encoder (medium)")
    parser.add_argument("--tar", type=within(int, least=0), default=0, metavar="N", help="write tar shards of N videos")
    parser.add_argument(
        "--workers", type=within(int, least=1), default=os.cpu_count(), help="videos at once (default: CPU cores)"
    )
    parser.add_argument(
        "--timeout",
        type=within(float, above=0, most=1e9),
        default=60.0,
        help="seconds without a decoded frame (%(default)g)",
    )
    args = parser.parse_args(arguments)
    edits = {field.name: getattr(args, field.name) for field in fields(PackSettings)}
    settings = replace(PRESETS[args.preset], **{name: value for name, value in edits.items() if value is not None})

    from video_convmae.data.labels import list_name
    from video_convmae.prepare.pack import pack_videos

    try:
        summary = pack_videos(args.list, args.root, args.out, settings, args.tar, args.workers, args.timeout)
    except RuntimeError as error:  # a child process does not start
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command resumes", file=sys.stderr)
        return 130
    print(_report(summary, args.out, f"{list_name(args.list)}.txt"))
    return 0


def _report(summary: dict[str, Any], out: Path, name: str) -> str:
    """Return a summary as text."""
    from video_convmae.prepare.job import format_notes

    text = f"{summary['rows']:,} rows: {summary['good']:,} packed ({out / name}), {summary['bad']:,} bad"
    text += f" ({out / 'faults.csv'})" if summary["bad"] else ""
    if psnr := summary.get("psnr"):
        before, after = summary["source_bytes"], summary["bytes"]
        text += f"\n{before / 1e6:,.1f} MB became {after / 1e6:,.1f} MB ({after / before:.2f} of it), "
        text += f"{summary['source_frames']:,} frames {summary['frames']:,}"
        text += f"\nPSNR {psnr['min']} to {psnr['max']} dB, median {psnr['median']}, against the source at this size"
    return "\n".join([text, *format_notes(summary["notes"], out)])
