"""Read every record of a list as training would, and say which are good.

    python tools/check_videos.py LIST --root DIR --out DIR

Of each record the first, middle and last frames are decoded, and a clip of 16 frames, 4 apart, from the middle
(`--full`: every frame). In the --out folder:

    clean.txt         the good rows, unchanged and in order: train on this
    clean.labels.txt  its class names, where the list has a file of them beside it (NAME.labels.txt)
    faults.csv        line, record, error
    summary.json      sizes, frame rates, lengths and codecs of the good ones; how often which error came
    checked.jsonl     a line a record, written as they are read: an interrupted check goes on from here, and one that
                      is repeated reads only what was bad, or has changed

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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TextIO, get_args

import av
import numpy as np
from tqdm import tqdm

from video_convmae.data import shards
from video_convmae.data.decoding import DecodeError, resolve_reader
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.options import ListFormat, ReaderName
from video_convmae.data.records import ListError, Record, parse_line, read_list
from video_convmae.data.sampling import dense_views

CLIP_FRAMES, CLIP_STRIDE = 16, 4
OUTPUTS = ("clean.txt", "clean.labels.txt", "faults.csv", "summary.json")
CHUNK_BYTES = 64 * 2**20  # of frames held at once by --full, for each worker


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
    `decoder` read it, which is not always the one asked for: a file that one reads wrong is given to another.
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
    decoder: str | None = None


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
    if path.is_dir():
        raise ListError(f"{path} is a folder; make a list of it first: python tools/make_list.py folders --root {path}")
    records = read_list(path, format, root)
    lines = enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").split("\n"), start=1)
    kept = [(number, line) for number, line in lines if line.strip() and not line.strip().startswith("#")]
    return [Row(number, line, record) for (number, line), record in zip(kept, records, strict=True)]


def check_all(rows: Sequence[Row], check: Check, results_file: Path, workers: int) -> dict[str, Result]:
    """The result of every row by its path. Good ones are taken over from the file, the others read and appended to it.

    What was bad is read again: the disk may have been to blame, or a timeout that was too short.
    """
    records = {row.record.path: row.record for row in rows}
    results = {
        path: result
        for path, result in read_results(results_file).items()
        if path in records and result.error is None and result.how == check.how and result.stamp == stamp(path)
    }
    unread = [record for path, record in records.items() if path not in results]
    bad = 0
    with (
        appending(results_file) as file,
        tqdm(total=len(records), initial=len(results), desc="checking", unit="file", smoothing=0.05) as progress,
        closing(_check_in_parallel(unread, check, workers)) as new_results,
    ):
        for result in new_results:
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            results[result.path] = result
            bad += result.error is not None
            progress.set_postfix(bad=bad, refresh=False)
            progress.update()
    return results


def check_record(record: Record, check: Check, process: ReaderProcess) -> Result:
    """Decode what is to be decoded of one record."""
    known = {"path": record.path, "how": check.how, "stamp": stamp(record.path)}
    try:
        with process.open(record) as reader:
            count = len(reader)
            height, width = _read_every_frame(reader) if check.full else _read_some_frames(reader)
            read_by = reader.name
    except DecodeError as error:
        return Result(**known, error=str(error))
    fps, codec = stream_facts(record)
    return Result(**known, frames=count, width=width, height=height, fps=fps, codec=codec, decoder=read_by)


def frames_to_read(count: int) -> np.ndarray:
    """What training touches, near enough: the ends, the middle, and a clip from the middle. Ascending, each once."""
    clip = dense_views(count, CLIP_FRAMES, CLIP_STRIDE, segments=1)[0]
    return np.unique(np.concatenate([[0, count // 2, count - 1], clip]))


def stream_facts(record: Record) -> tuple[float | None, str]:
    """Frame rate and codec as the header says them; of pictures the kind of file. For records that did decode."""
    if record.format != "video":
        return None, Path(record.path).suffix.lstrip(".").lower() or record.format
    with av.open(shards.source(record.path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        rate = stream.average_rate or stream.guessed_rate
        return (round(float(rate), 3) if rate else None), stream.codec_context.codec.canonical_name


def stamp(path: str) -> list[int] | None:
    """Size and time of change; None where there is nothing. A file that was replaced has another one.

    A file in a tar archive has the archive's."""
    try:
        status = os.stat(shards.file_of(path))
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
        "decoders": _counts(result.decoder for result in good),
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
    for name in ("sizes", "frame_rates", "codecs", "decoders"):
        most = list(summary[name].items())[:8]
        more = f", and {len(summary[name]) - len(most)} more" if len(summary[name]) > len(most) else ""
        lines.append(f"{name.replace('_', ' ')}: " + ", ".join(f"{value} ({count:,})" for value, count in most) + more)
    for name in ("frames", "seconds"):
        if spread := summary[name]:
            lines.append(f"{name}: {spread['min']:g} to {spread['max']:g}, median {spread['median']:g}")
    lines += [f"{count:,} x {error}" for error, count in list(summary["errors"].items())[:10]]
    return "\n".join(lines)


def write_outputs(
    out: Path, names: str | None, rows: Sequence[Row], results: dict[str, Result], summary: dict[str, Any]
) -> None:
    """clean.txt with its class names, faults.csv and summary.json, each whole or not at all."""
    good = [row for row in rows if results[row.record.path].error is None]
    if names is not None:
        with replacing(out / "clean.labels.txt") as file:
            file.write(names)
    with replacing(out / "clean.txt") as file:
        file.writelines(f"{row.text}\n" for row in good)
    with replacing(out / "faults.csv") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["line", "record", "error"])
        for row in rows:
            if (error := results[row.record.path].error) is not None:
                table.writerow([row.line, parse_line(row.text.strip(), row.record.format).path, error])
    with replacing(out / "summary.json") as file:
        file.write(json.dumps(summary, indent=2) + "\n")


def check_videos(
    path: Path,
    root: Path,
    out: Path,
    full: bool = False,
    workers: int = 1,
    format: ListFormat = "video",
    decoder: str = "auto",
    timeout: float = 60.0,
) -> dict[str, Any]:
    """Check a whole list; see the head of this file. Returns the summary."""
    rows = read_rows(path, format, root)
    names_file = path.with_suffix(".labels.txt")
    names = names_file.read_text(encoding="utf-8") if names_file.exists() else None
    check = Check(resolve_reader(decoder), timeout, full)
    out.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:  # of an earlier check: not to be taken for this one's
        (out / name).unlink(missing_ok=True)
    results = check_all(rows, check, out / "checked.jsonl", workers)
    summary = summarize(rows, results, check)
    write_outputs(out, names, rows, results, summary)
    return summary


def _check_in_parallel(records: Sequence[Record], check: Check, workers: int) -> Iterator[Result]:
    """Results as they come. A thread for each worker suffices: each waits for a decoding process of its own."""
    own = threading.local()
    processes: list[ReaderProcess] = []

    def start_process() -> None:
        own.process = ReaderProcess(check.decoder, check.timeout)
        processes.append(own.process)

    pool = ThreadPoolExecutor(workers, initializer=start_process)
    try:
        futures = [pool.submit(lambda record: check_record(record, check, own.process), record) for record in records]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # after an interrupt, so that no thread waits for its timeout
            process.close()
        pool.shutdown()


def _read_some_frames(reader: Any) -> tuple[int, int]:
    return reader.read(frames_to_read(len(reader))).shape[1:3]


def _read_every_frame(reader: Any) -> tuple[int, int]:
    """In chunks that fit in memory, as large as may be: each begins with a search for the keyframe before it."""
    height, width = reader.read([0]).shape[1:3]
    chunk = max(1, CHUNK_BYTES // (height * width * 3))
    for start in range(0, len(reader), chunk):
        reader.read(range(start, min(start + chunk, len(reader))))
    return height, width


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """A file of lines opened to go on in, on a new line where the last one was cut off."""
    with open(path, "a+", encoding="utf-8") as file:
        file.seek(0)
        *_, last = file.readlines() or [""]
        if last and not last.endswith("\n"):
            file.write("\n")
        yield file


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A file written beside and renamed."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        yield file
    os.replace(partial, path)


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return {"min": min(values), "median": median(values), "max": max(values)} if values else None


def _without_path(result: Result) -> str:
    """The error without the file's name, so that equal ones are counted together."""
    return result.error.replace(result.path, "").lstrip(": ")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, metavar="LIST", help="the list to check")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that its paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--full", action="store_true", help="decode every frame")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="files read at once (default: one a core)")
    parser.add_argument("--format", choices=get_args(ListFormat), default="video", help="data.format (default video)")
    parser.add_argument("--decoder", choices=get_args(ReaderName), default="auto", help="data.reader (default auto)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one reading (default %(default)g)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.workers < 1 or not arguments.timeout > 0:
        parser.error(
            f"--workers {arguments.workers} --timeout {arguments.timeout}: expected 1 or more, and more than 0"
        )
    options = vars(arguments)
    try:
        summary = check_videos(options.pop("list"), **options)
    except (ListError, ImportError) as error:
        parser.exit(1, f"check_videos: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "check_videos: interrupted; the same command goes on from here\n")
    print(describe(summary, arguments.out))
