"""Read every record of a list as training would, and say which are good.

    python tools/check_videos.py LIST --root DIR --out DIR

Of each record the first, middle and last frames are decoded, and a clip of 16 frames, 4 apart, from the middle
(`--full`: every frame). In the --out folder:

    clean.txt      the good rows, unchanged and in order: train on this
    faults.csv     line, record, error
    summary.json   sizes, frame rates, lengths and codecs of the good ones; how often which error came
    checked.jsonl  a line a record, written as they are read: an interrupted check goes on from here

Records are decoded in processes of their own, and a file that hangs its decoder is given up after --timeout seconds.
The exit status is 0 once all are read, however many are bad.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

import av
import numpy as np
from tqdm import tqdm

from video_convmae.data.decoding import DecodeError, Decoder, resolve
from video_convmae.data.isolation import DecodeTimeout, IsolatedDecoder
from video_convmae.data.records import ListError, ListFormat, Record, parse_line, read_list
from video_convmae.data.sampling import dense_views

CLIP_FRAMES, CLIP_STRIDE = 16, 4
CHUNK_BYTES = 128 * 2**20  # of frames held at once by --full, for each worker


@dataclass(frozen=True)
class Row:
    """A row of the list as it stands there, and as it is read."""

    line: int
    text: str
    record: Record


@dataclass(frozen=True)
class Result:
    """What reading a record told.

    `how` and `stamp` say what the result is valid for: the way of checking, and the file's size and time of change.
    """

    path: str
    how: str
    stamp: list[int] | None
    error: str | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    codec: str | None = None


@dataclass(frozen=True)
class Check:
    """How records are checked."""

    decoder: str
    timeout: float
    full: bool

    @property
    def how(self) -> str:
        """Results of another way of checking are not taken over."""
        return f"{self.decoder}, {'every frame' if self.full else 'some frames'}"


def read_rows(path: Path, format: ListFormat, root: Path) -> list[Row]:
    """The rows of a list with their numbers and their text."""
    records = read_list(path, format, root)
    lines = enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").split("\n"), start=1)
    kept = [(number, line) for number, line in lines if line.strip() and not line.strip().startswith("#")]
    return [Row(number, line, record) for (number, line), record in zip(kept, records, strict=True)]


def check_all(rows: Sequence[Row], check: Check, results_file: Path, workers: int) -> dict[str, Result]:
    """The result of every row by its path, those in the file taken over, the others read and appended to it."""
    done = {row.record.path: row.record for row in rows}
    results = {
        path: result
        for path, result in read_results(results_file).items()
        if path in done and result.how == check.how and result.stamp == stamp(path)
    }
    records = [record for path, record in done.items() if path not in results]
    bad = sum(result.error is not None for result in results.values())
    with (
        _appending(results_file) as file,
        tqdm(total=len(done), initial=len(results), desc="checking", unit="file", smoothing=0.05) as progress,
    ):
        for result in _check_in_parallel(records, check, workers):
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            results[result.path] = result
            bad += result.error is not None
            progress.set_postfix(bad=bad, refresh=False)
            progress.update()
    return results


def check_record(record: Record, check: Check, decoder: IsolatedDecoder) -> Result:
    """Decode what is to be decoded of one record."""
    known = {"path": record.path, "how": check.how, "stamp": stamp(record.path)}
    try:
        with decoder.open(record) as reader:
            count = len(reader)
            height, width = _read_every_frame(reader) if check.full else _read_some_frames(reader)
    except (DecodeError, DecodeTimeout) as error:
        return Result(**known, error=str(error))
    fps, codec = stream_facts(record)
    return Result(**known, frames=count, width=width, height=height, fps=fps, codec=codec)


def frames_to_read(count: int) -> np.ndarray:
    """What training touches, near enough: the ends, the middle, and a clip from the middle. Ascending, each once."""
    clip = dense_views(count, CLIP_FRAMES, CLIP_STRIDE, segments=1)[0]
    return np.unique(np.concatenate([[0, count // 2, count - 1], clip]))


def stream_facts(record: Record) -> tuple[float | None, str]:
    """Frame rate and codec as the header says them; of pictures the kind of file. For records that did decode."""
    if record.format != "video":
        return None, Path(record.path).suffix.lstrip(".").lower() or record.format
    with av.open(os.path.abspath(record.path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        rate = stream.average_rate or stream.guessed_rate
        return (round(float(rate), 3) if rate else None), stream.codec_context.name


def stamp(path: str) -> list[int] | None:
    """Size and time of change; None where there is nothing. A file that was replaced has another one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def read_results(path: Path) -> dict[str, Result]:
    """The results so far by path, the last of each; a line that an interruption cut off is passed over."""
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError):
            continue
        results[result.path] = result
    return results


def summarize(rows: Sequence[Row], results: dict[str, Result], check: Check) -> dict[str, Any]:
    """What summary.json holds. Rows are counted, so a video that is listed twice counts twice."""
    of_rows = [results[row.record.path] for row in rows]
    good = [result for result in of_rows if result.error is None]
    seconds = [result.frames / result.fps for result in good if result.fps]
    return {
        "rows": len(rows),
        "good": len(good),
        "bad": len(rows) - len(good),
        "decoder": check.decoder,
        "full": check.full,
        "sizes": _counts(f"{result.width}x{result.height}" for result in good),
        "frame_rates": _counts(f"{result.fps:g}" for result in good if result.fps),
        "codecs": _counts(result.codec for result in good),
        "frames": _spread([result.frames for result in good]),
        "seconds": _spread([round(value, 3) for value in seconds]),
        "errors": _counts(_without_path(result) for result in of_rows if result.error is not None),
    }


def describe(summary: dict[str, Any], out: Path) -> str:
    """The summary for the reader of the terminal."""
    lines = [
        f"{summary['rows']:,} rows: {summary['good']:,} good ({out / 'clean.txt'}), "
        f"{summary['bad']:,} bad ({out / 'faults.csv'}); decoder {summary['decoder']}, "
        + ("every frame" if summary["full"] else "first, middle, last frame and a clip")
    ]
    for name in ("sizes", "frame_rates", "codecs"):
        most = list(summary[name].items())[:8]
        more = f", and {len(summary[name]) - len(most)} more" if len(summary[name]) > len(most) else ""
        lines.append(f"{name.replace('_', ' ')}: " + ", ".join(f"{value} ({count:,})" for value, count in most) + more)
    for name in ("frames", "seconds"):
        if spread := summary[name]:
            lines.append(f"{name}: {spread['min']:g} to {spread['max']:g}, median {spread['median']:g}")
    lines += [f"{count:,} x {error}" for error, count in list(summary["errors"].items())[:10]]
    return "\n".join(lines)


def write_outputs(out: Path, rows: Sequence[Row], results: dict[str, Result], summary: dict[str, Any]) -> None:
    """clean.txt, faults.csv and summary.json, each whole or not at all."""
    good = [row for row in rows if results[row.record.path].error is None]
    with _replacing(out / "clean.txt") as file:
        file.writelines(f"{row.text}\n" for row in good)
    with _replacing(out / "faults.csv") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["line", "record", "error"])
        for row in rows:
            if (error := results[row.record.path].error) is not None:
                table.writerow([row.line, parse_line(row.text.strip(), row.record.format).path, error])
    with _replacing(out / "summary.json") as file:
        file.write(json.dumps(summary, indent=2) + "\n")
