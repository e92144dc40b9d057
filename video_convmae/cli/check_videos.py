"""Read every record of a list as training would, and write the list of the good ones.

    video-convmae check-videos LIST --root DIR --out DIR

Of each record the first, middle and last frames are decoded, and a clip of 16 frames, 4 apart, from the middle
(--full: every frame). Written to the --out folder:

    clean.txt         the good rows, unchanged and in order: train on this
    clean.before.txt  LIST, if it is the clean.txt of an earlier check in this folder and some of its rows are bad now
    clean.labels.txt  their class names, if the list has a file of them beside it (NAME.labels.txt)
    faults.csv        line, record, error
    summary.json      sizes, frame rates, lengths and codecs of the good records, and notes on them (the size of the
                      picture changes: training scales all to the first); number of records for each error
    checked.jsonl     one line a record, written as records are read: an interrupted check resumes from here, and a
                      repeated one reads only files that were bad or have changed

A child process decodes; if it hangs, it is killed after --timeout seconds and the record counts as bad. The exit code
is 0 once all records are read, however many are bad.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from video_convmae.cli.parser import CommandLine, local_path, within
from video_convmae.data.options import ListFormat, ReaderName
from video_convmae.errors import UserError


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = CommandLine("check-videos", __doc__)
    parser.add_argument("list", type=local_path, metavar="LIST", help="list to check")
    parser.add_argument("--root", type=local_path, default=Path(), help="folder that its paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--full", action="store_true", help="decode every frame")
    parser.add_argument(
        "--workers", type=within(int, least=1), default=os.cpu_count(), help="records read at once (default: CPU cores)"
    )
    parser.add_argument("--format", choices=get_args(ListFormat), default="video", help="data.format (default video)")
    parser.add_argument("--reader", choices=get_args(ReaderName), default="auto", help="data.reader (default auto)")
    parser.add_argument(
        "--timeout",
        type=within(float, above=0, most=1e9),
        default=60.0,
        help="seconds for one read (default %(default)g)",
    )
    args = parser.parse_args(arguments)

    from video_convmae.prepare.check import check_videos

    options = vars(args)
    try:
        summary = check_videos(options.pop("list"), **options)
    except RuntimeError as error:  # a child process does not start
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command resumes", file=sys.stderr)
        return 130
    print(_report(summary, args.out))
    return 0


def _report(summary: dict[str, Any], out: Path) -> str:
    """Return a summary as text."""
    from video_convmae.prepare.job import format_notes

    lines = [
        f"{summary['rows']:,} rows: {summary['good']:,} good ({out / 'clean.txt'}), "
        f"{summary['bad']:,} bad ({out / 'faults.csv'}); reader {summary['reader']}, "
        + ("every frame" if summary["full"] else "first, middle, last frame and a clip")
    ]
    for name in ("sizes", "frame_rates", "codecs", "readers"):
        most = list(summary[name].items())[:8]
        more = f", and {len(summary[name]) - len(most)} more" if len(summary[name]) > len(most) else ""
        lines.append(f"{name.replace('_', ' ')}: " + ", ".join(f"{value} ({count:,})" for value, count in most) + more)
    for name in ("frames", "seconds"):
        if spread := summary[name]:
            lines.append(f"{name}: {spread['min']:g} to {spread['max']:g}, median {spread['median']:g}")
    lines += [f"{count:,} x {error}" for error, count in list(summary["errors"].items())[:10]]
    lines += [f"labels: {note}" for note in summary["labels"]]
    lines += format_notes(summary["notes"], out)
    return "\n".join(lines)
