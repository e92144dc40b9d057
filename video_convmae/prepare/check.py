"""Check a list: decode a part of every record as training would, and write the list of the good ones.

Of each record the first, middle and last frames are decoded, and a clip of 16 frames, 4 apart, from the middle; or
every frame. A file that is cut off (half of a download) is bad, though the frames that are left decode. Written to the
output folder:

    clean.txt         the good rows, unchanged and in order, for training; as UTF-8
    clean.before.txt  the list itself, if it was the clean.txt of an earlier check and rows of it are bad now
    clean.labels.txt  their class names, if the list has a file of them beside it (NAME.labels.txt)
    faults.csv        line, record, error
    summary.json      sizes, frame rates, lengths and codecs of the good records, and notes on them (the size of the
                      picture changes); number of records for each error
    checked.jsonl     one line a record, written as records are read (job.py)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np

from video_convmae.atomic import refuse_overwriting, replacing, write_text
from video_convmae.data import shards
from video_convmae.data.decoding import DecodeError, resolve_reader
from video_convmae.data.decoding.process import ChildProcess, Handler, ReaderProcess, RemoteReader
from video_convmae.data.labels import check_labels, class_names, count_labels, label_notes
from video_convmae.data.options import ListFormat, ReaderName
from video_convmae.data.records import ListError, Record, Records
from video_convmae.prepare.job import RecordResult, ResumableJob, Row, list_notes, read_rows, write_report
from video_convmae.prepare.options import LIST_TEXT

CLIP_FRAMES, CLIP_STRIDE = 16, 4
CHUNK_BYTES = 64 * 2**20  # of frames in memory at once in a full check, for each worker


@dataclass(frozen=True)
class CheckResult(RecordResult):
    """Properties of a record that was read.

    `reader` is the library that decoded it, not always the one asked for: PyAV reads files that others read wrong.
    """

    frames: int = 0
    width: int = 0
    height: int = 0
    fps: float | None = None
    codec: str = ""
    reader: str = ""


class CheckJob(ResumableJob[ReaderProcess, dict[str, Any], CheckResult]):
    """Decoding of some or all frames of each record.

    Args:
        results_file: as in `ResumableJob`.
        reader: a name that `ReaderProcess` takes.
        timeout: seconds that one read may take.
        full: decode every frame.
    """

    result_type = CheckResult
    title = "checking"

    def __init__(self, results_file: Path, reader: ReaderName, timeout: float, full: bool) -> None:
        super().__init__(results_file, method=f"{reader}, {'every frame' if full else 'some frames'}, length")
        self.reader, self.timeout, self.full = reader, timeout, full

    def start_worker(self) -> ReaderProcess:
        """Return a process that reads."""
        return ReaderProcess(self.reader, self.timeout)

    def work_on(self, record: Record, worker: ReaderProcess) -> dict[str, Any]:
        """Decode frames of a record; returns the fields of its result."""
        with worker.open(record) as reader:
            if self.full:
                height, width = _read_every_frame(reader)
            else:
                height, width = reader.read(frames_to_check(len(reader))).shape[1:3]
            if reader.damaged:
                raise DecodeError(f"{record.path}: {reader.note}")
            facts = {"frames": len(reader), "reader": reader.name, "note": reader.note}
        fps, codec = read_header(record)
        return {**facts, "width": width, "height": height, "fps": fps, "codec": codec}

    def store_outcome(self, row: Row, outcome: dict[str, Any]) -> dict[str, Any]:
        """Return the fields unchanged."""
        return outcome


def check_videos(
    path: Path,
    root: Path,
    out: Path,
    *,
    full: bool = False,
    workers: int = 1,
    format: ListFormat = "video",
    reader: ReaderName = "auto",
    timeout: float = 60.0,
) -> dict[str, Any]:
    """Check a list and write the files named at the head of this module, each whole, once all records are read.

    Args:
        path: the list; it may be the clean.txt of an earlier check in `out`, which is then replaced.
        root: folder that its paths are relative to.
        out: folder to write to.
        full: decode every frame.
        workers: number of records that are read at the same time.
        format: format of the list.
        reader: library that decodes.
        timeout: seconds that one read may take.

    Returns:
        The contents of summary.json.

    Raises:
        ListError: the list cannot be used.
        ImportError: the reader is not installed.
    """
    rows = read_rows(path, format, root)
    clean, clean_names = out / "clean.txt", out / "clean.labels.txt"
    others = ("clean.before.txt", "clean.labels.txt", "faults.csv", "summary.json", "checked.jsonl")
    refuse_overwriting([out / name for name in others], [path])
    names = class_names(path)
    notes = check_classes(rows, names)
    if reader == "auto":
        reader = _resolve_in_child(reader)
    out.mkdir(parents=True, exist_ok=True)
    results = CheckJob(out / "checked.jsonl", reader, timeout, full).run(rows, workers)
    summary = {"reader": reader, "full": full, **summarize_check([results[row.record.path] for row in rows])}
    summary |= {"labels": notes, "notes": list_notes(rows, results)}
    good = [row for row in rows if results[row.record.path].error is None]
    if len(good) < len(rows) and os.path.realpath(path) == os.path.realpath(clean):
        write_text(out / "clean.before.txt", "".join(f"{row.text}\n" for row in rows), **LIST_TEXT)
    with replacing(clean, **LIST_TEXT) as file:
        file.writelines(f"{row.text}\n" for row in good)
        if names is not None:
            write_text(clean_names, "".join(f"{name}\n" for name in names))
    if names is None:
        clean_names.unlink(missing_ok=True)  # of another list
    write_report(out, rows, results, summary)
    return summary


def check_classes(rows: Sequence[Row], names: Sequence[str] | None) -> list[str]:
    """Return what is wrong or remarkable with the labels of a list, a sentence each; nothing if it has none."""
    records = Records([row.record for row in rows], rows[0].record.format)
    if records.labels.max() < 0:
        return []
    try:
        count = len(names) if names else count_labels(records)
        check_labels(records, count)
    except ListError as error:
        return [str(error)]
    return label_notes(count, names, records)


def frames_to_check(count: int) -> np.ndarray:
    """Return the indices of frames to decode, ascending: both ends, the middle, and a clip from the middle.

    The clip is the one of `sampling.dense_views`, whose module needs torch.
    """
    start = max(0, count - ((CLIP_FRAMES - 1) * CLIP_STRIDE + 1)) // 2
    clip = np.minimum(start + CLIP_STRIDE * np.arange(CLIP_FRAMES), count - 1)
    return np.unique(np.concatenate([[0, count // 2, count - 1], clip]))


def read_header(record: Record) -> tuple[float | None, str]:
    """Return frame rate and codec of a video from its header; None and the file type of images."""
    if record.format != "video":
        return None, Path(record.path).suffix.lstrip(".").lower() or record.format
    with av.open(shards.path_or_bytes(record.path), metadata_errors="ignore") as container:
        stream: Any = container.streams.best("video")
        rate = stream.average_rate or stream.guessed_rate
        return (round(float(rate), 3) if rate else None), stream.codec_context.codec.canonical_name


def summarize_check(results: Sequence[CheckResult]) -> dict[str, Any]:
    """Return counts and ranges over the results of all rows; a video that is listed twice counts twice."""
    good = [result for result in results if result.error is None]
    return {
        "rows": len(results),
        "good": len(good),
        "bad": len(results) - len(good),
        "sizes": _counts(f"{result.width}x{result.height}" for result in good),
        "frame_rates": _counts(f"{result.fps:g}" for result in good if result.fps),
        "codecs": _counts(result.codec for result in good),
        "readers": _counts(result.reader for result in good),
        "frames": _range([result.frames for result in good]),
        "seconds": _range([round(result.frames / result.fps, 3) for result in good if result.fps]),
        # without the path, so that records with the same error are counted together
        "errors": _counts(
            result.error.replace(result.path, "").lstrip(": ") for result in results if result.error is not None
        ),
    }


def _resolve_in_child(reader: ReaderName) -> ReaderName:
    """Return the reader that "auto" stands for. Trying torchcodec imports torch, so a child process does it."""
    child = ChildProcess(_serve_reader_name, reader)
    try:
        return child.ask(None, timeout=60.0)
    finally:
        child.kill()


def _serve_reader_name(progress: Any, reader: ReaderName) -> Handler:
    name = resolve_reader(reader)
    return lambda request: name


def _read_every_frame(reader: RemoteReader) -> tuple[int, int]:
    """Decode all frames; returns height and width.

    Chunks are as large as memory allows, since each begins with a seek to the keyframe before it.
    """
    height, width = reader.read([0]).shape[1:3]
    chunk = max(1, CHUNK_BYTES // (height * width * 3))
    for start in range(0, len(reader), chunk):
        reader.read(range(start, min(start + chunk, len(reader))))
    return height, width


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _range(values: Sequence[float]) -> Mapping[str, float] | None:
    return {"min": min(values), "median": median(values), "max": max(values)} if values else None
