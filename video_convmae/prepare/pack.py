"""Re-encode the videos of a list once, so that training reads them several times as fast.

    python tools/pack_videos.py LIST --root DIR --out DIR               # --preset fast: 256 pixels, a keyframe every 16
    python tools/pack_videos.py LIST --root DIR --out DIR --preset small --short-side 320
    python tools/pack_videos.py LIST --root DIR --out DIR --tar 1000    # shards of 1,000 videos

What is done to a video, and why that is fast: encode_video.py. The table over its settings:
`python tools/benchmark.py packing`. In the --out folder:

    NAME.txt       the rows of LIST with their new paths, relative to --out; same labels, order and line numbers (so a
                   record shows the same samples); bad ones as comments. Beside it NAME.labels.txt, if LIST has one
    videos/        the packed videos, or shards/ with --tar
    faults.csv     line, record, error
    summary.json   bytes and frames before and after; PSNR against the decoded source at the packed size, in RGB
    packed.jsonl   a line a video, written as they are done: after an interruption, and that may be a kill, the same
                   command goes on from here

Every packed video is decoded once to see that it holds the frames it should. Frames keep their times, and all of them
are kept, unless --fps asks for fewer: then data.stride means more seconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any

from tqdm import tqdm

from video_convmae.data.decoding import DecodeError
from video_convmae.data.decoding.errors import decode_errors
from video_convmae.data.decoding.process import ChildDied, ChildProcess, ChildTimeout
from video_convmae.data.records import ListError, Record, parse_line
from video_convmae.data.shards import file_of, read_member, split_path
from video_convmae.prepare.check import Row, appending, read_rows, replacing, stamp
from video_convmae.prepare.encode import ENCODERS, PRESETS, Packed, Settings, pack


@dataclass(frozen=True)
class Result:
    """What packed.jsonl says of a video. `stamp` is that of its source; `end`: where it ends in its shard."""

    path: str
    stamp: list[int] | None
    error: str | None = None
    target: str | None = None
    source_bytes: int | None = None
    bytes: int | None = None
    end: int | None = None
    frames: int | None = None
    source_frames: int | None = None
    width: int | None = None
    height: int | None = None
    psnr: float | None = None


# ---- workers: processes that can be killed --------------------------------------------------------------------------


class _Worker:
    """A child process that packs one video after the other; a hang or a crash costs the video, not the run."""

    def __init__(self, settings: Settings, timeout: float) -> None:
        self.settings, self.timeout = settings, timeout
        self._child: ChildProcess | None = None

    def pack(self, record: Record) -> tuple[Packed, int]:
        """Pack a video as `encode.pack` does.

        Raises:
            DecodeError: of `encode.pack`; no frame was decoded for `timeout` seconds; the child ended.
            RuntimeError: the child does not start; no video is to blame.
        """
        if self._child is None or not self._child.is_alive():
            self._child = ChildProcess(make_packer, self.settings)
        try:
            return self._child.ask(record, self.timeout)
        except ChildTimeout:
            message = f"{record.path}: nothing was decoded within {self.timeout:g} s; the process was killed"
            raise DecodeError(message) from None
        except ChildDied as error:
            raise DecodeError(f"{record.path}: the packing process {error}") from None

    def close(self) -> None:
        """Kill the child."""
        if self._child is not None:
            self._child.kill()


def make_packer(progress: Callable[[], None], settings: Settings) -> Callable[[Record], tuple[Packed, int]]:
    """Return the handler of a packing process: from a record to its packed video and its number of frames."""

    def handle(record: Record) -> tuple[Packed, int]:
        with decode_errors(record.path):
            return pack(record, settings, progress)

    return handle


# ---- where packed videos go ------------------------------------------------------------------------------------------


class Folder:
    """A file for each video, written beside and renamed."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def is_there(self, result: Result) -> bool:
        """Whether the video of this result is still in its place."""
        path = self.out / result.target
        return path.is_file() and path.stat().st_size == result.bytes

    def add(self, row: Row, packed: Packed) -> dict[str, Any]:
        """Store a video; returns what its result says of the place."""
        path = self.out / "videos" / own_name(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(packed.data)
        os.replace(partial, path)
        return {"target": path.relative_to(self.out).as_posix()}

    def close(self) -> None:
        """Nothing is open."""


class Shards:
    """Tar archives of `count` videos in the list's order; webdataset's layout: KEY.mp4, and KEY.cls with the label.

    An interrupted run goes on in the last archive, behind the last video that its results tell of.
    """

    def __init__(self, out: Path, count: int, results: Sequence[Result]) -> None:
        self.out, self.count = out, count
        (out / "shards").mkdir(parents=True, exist_ok=True)
        self._file = None
        stored = [(Path(file_of(result.target)), result.end) for result in results if self.is_there(result)]
        last = max((shard for shard, _ in stored), default=None)
        ends = [end for shard, end in stored if shard == last]
        self.number, self.held, self._end = 0 if last is None else int(last.stem), len(ends), max(ends, default=0)

    def is_there(self, result: Result) -> bool:
        """Whether the archive of this result reaches to its end."""
        path = self.out / file_of(result.target or "")
        return result.end is not None and path.is_file() and path.stat().st_size >= result.end

    def add(self, row: Row, packed: Packed) -> dict[str, Any]:
        """Append a video; returns what its result says of the place."""
        if self.held >= self.count:
            self.close()
            self.number, self.held, self._end = self.number + 1, 0, 0
        self._open()
        stem = PurePosixPath(own_name(row)).stem.replace(".", "_")  # webdataset's keys end at the first dot
        key = f"{row.line:08d}_{stem}".replace("#", "_")[:80]
        if row.record.label is not None:
            self._append(f"{key}.cls", str(row.record.label).encode())
        self._append(f"{key}.mp4", packed.data)
        self._file.flush()
        self.held, self._end = self.held + 1, self._file.tell()
        return {"target": f"{self._name}#{key}.mp4", "end": self._end}

    def close(self) -> None:
        """End the archive as tar wants it, unless that was done."""
        path, closing = self.out / self._name, bytes(2 * tarfile.BLOCKSIZE)
        if self.held and path.stat().st_size != self._end + len(closing):
            self._open()
        if self._file is not None:
            self._file.write(closing)
            self._file.close()
            self._file = None

    @property
    def _name(self) -> str:
        return f"shards/{self.number:06d}.tar"

    def _open(self) -> None:
        """Behind the last video whose result was written; what a kill left behind that is cut off."""
        if self._file is None:
            path = self.out / self._name
            self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
            self._file.truncate(self._end)
            self._file.seek(self._end)

    def _append(self, name: str, data: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        self._file.write(entry.tobuf() + data + bytes(-len(data) % tarfile.BLOCKSIZE))


def own_name(row: Row) -> str:
    """The path of a packed video below its folder: as the list has it, without what would lead out of the folder."""
    written = parse_line(row.text.strip(), row.record.format).path
    parts = [part for part in PurePosixPath(written.replace(".tar#", ".tar/")).parts if part not in ("/", "..", ".")]
    name = "/".join(parts)
    return name if name.endswith(".mp4") else f"{name}.mp4"


# ---- the whole list --------------------------------------------------------------------------------------------------


def pack_videos(
    path: Path, root: Path, out: Path, settings: Settings, tar: int = 0, workers: int = 1, timeout: float = 60.0
) -> dict[str, Any]:
    """Pack a whole list; see the head of this file. Returns the summary.

    Raises:
        ListError: the list cannot be used, or `out` holds videos that were packed otherwise.
    """
    rows = [_plain(row) for row in read_rows(path, "video", root)]
    first = {row.record.path: row for row in reversed(rows)}  # a video that is listed twice is packed once
    _check_names(sorted(first.values(), key=lambda row: row.line), tar)
    out.mkdir(parents=True, exist_ok=True)
    _keep_settings(out, {**asdict(settings), "tar": tar})
    written = out / f"{path.stem}.txt"
    if written.resolve() == path.resolve():
        raise ListError(f"{path} lies in --out {out} and would be overwritten; choose another folder")
    for stale in (written, out / "faults.csv", out / "summary.json"):
        stale.unlink(missing_ok=True)
    results = pack_all([first[row.record.path] for row in rows], out, settings, tar, workers, timeout)
    summary = summarize(rows, results, settings)
    write_outputs(path, written, rows, results, summary)
    return summary


def _plain(row: Row) -> Row:
    """A path has one spelling: ./a.mp4 is a.mp4."""
    return replace(row, record=replace(row.record, path=os.path.normpath(row.record.path)))


def _check_names(rows: Sequence[Row], tar: int) -> None:
    names: dict[str, Row] = {}
    for row in () if tar else rows:
        other = names.setdefault(own_name(row), row)
        if other is not row:
            raise ListError(
                f"lines {other.line} and {row.line} would both be packed into videos/{own_name(row)}: rename one, or "
                "pack into shards (--tar 1000)"
            )


def _keep_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write them down; one folder holds videos of one kind."""
    path = out / "settings.json"
    if path.exists():
        held = json.loads(path.read_text())
        if held != settings:
            changed = ", ".join(f"{name} {held.get(name)}" for name in settings if held.get(name) != settings[name])
            raise ListError(f"{out} holds videos packed with other settings ({changed}); choose another --out")
        return
    with replacing(path) as file:
        file.write(json.dumps(settings, indent=2) + "\n")


def pack_all(
    rows: Sequence[Row], out: Path, settings: Settings, tar: int, workers: int, timeout: float
) -> dict[str, Result]:
    """The result of every row by its path: taken over from packed.jsonl if it still holds, else as it comes."""
    log = out / "packed.jsonl"
    held = read_results(log)
    store = Shards(out, tar, list(held.values())) if tar else Folder(out)
    rows = list({row.record.path: row for row in rows}.values())
    results = {
        row.record.path: result
        for row in rows
        if (result := held.get(row.record.path)) is not None
        and result.error is None
        and result.stamp == stamp(row.record.path)
        and store.is_there(result)
    }
    missing = [row for row in rows if row.record.path not in results]
    bad = 0
    with (
        appending(log) as file,
        closing(store),
        tqdm(total=len(rows), initial=len(results), desc="packing", unit="video", smoothing=0.05) as progress,
        closing(_in_parallel(missing, settings, workers, timeout)) as packed,
    ):
        for row, outcome in packed:
            result = _store(row, outcome, store)
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            results[result.path] = result
            bad += result.error is not None
            progress.set_postfix(bad=bad, refresh=False)
            progress.update()
    return results


def _store(row: Row, outcome: tuple[Packed, int] | DecodeError, store: Folder | Shards) -> Result:
    path = row.record.path
    if isinstance(outcome, DecodeError):
        return Result(path, stamp(path), error=str(outcome))
    packed, source_frames = outcome
    facts = {name: getattr(packed, name) for name in ("frames", "width", "height", "psnr")}
    return Result(
        path,
        stamp(path),
        source_bytes=source_bytes(path),
        bytes=len(packed.data),
        source_frames=source_frames,
        **store.add(row, packed),
        **facts,
    )


def source_bytes(path: str) -> int:
    """Size of a video, be it a file or in an archive."""
    parts = split_path(path)
    return os.path.getsize(path) if parts is None else len(read_member(*parts))


def _in_parallel(
    rows: Sequence[Row], settings: Settings, workers: int, timeout: float
) -> Iterator[tuple[Row, tuple[Packed, int] | DecodeError]]:
    """Outcomes in the order of the rows; a few are kept while one before them is in the making."""
    own = threading.local()
    processes: list[_Worker] = []

    def start() -> None:
        own.worker = _Worker(settings, timeout)
        processes.append(own.worker)

    def work(record: Record) -> tuple[Packed, int] | DecodeError:
        try:
            return own.worker.pack(record)
        except DecodeError as error:
            return error

    pool = ThreadPoolExecutor(workers, initializer=start)
    waiting: deque[tuple[Row, Future]] = deque()
    try:
        for row in rows:
            waiting.append((row, pool.submit(work, row.record)))
            while waiting and (len(waiting) >= 3 * workers or waiting[0][1].done()):
                row, future = waiting.popleft()
                yield row, future.result()
        for row, future in waiting:
            yield row, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.close()
        pool.shutdown()


def read_results(path: Path) -> dict[str, Result]:
    """The results so far by path, the last of each; a line that an interruption cut off is passed over."""
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError):
            result = Result(**json.loads(line))
            results[result.path] = result
    return results


def write_outputs(
    path: Path, written: Path, rows: Sequence[Row], results: dict[str, Result], summary: dict[str, Any]
) -> None:
    """The list, its class names, faults.csv and summary.json, each whole or not at all."""
    out = written.parent
    by_line = {row.line: row for row in rows}
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    with replacing(written) as file:
        for number, text in enumerate(lines, start=1):
            row = by_line.get(number)
            if row is not None:
                result = results[row.record.path]
                bad = result.error is not None
                text = f"# left out, see faults.csv: {text.strip()}" if bad else _moved(row, result.target)
            file.write(text + ("\n" if number < len(lines) or text else ""))
    names = path.with_suffix(".labels.txt")
    if names.is_file():
        shutil.copyfile(names, written.with_suffix(".labels.txt"))
    with replacing(out / "faults.csv") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["line", "record", "error"])
        for row in rows:
            if (error := results[row.record.path].error) is not None:
                table.writerow([row.line, parse_line(row.text.strip(), "video").path, error])
    with replacing(out / "summary.json") as file:
        file.write(json.dumps(summary, indent=2) + "\n")


def _moved(row: Row, target: str) -> str:
    """The row with another path; what stands behind the path stays."""
    text = row.text.strip()
    old = parse_line(text, "video").path
    if not text.startswith(old):  # several spaces in front of a number that belongs to the path
        return target if row.record.label is None else f"{target} {row.record.label}"
    return target + text[len(old) :]


def summarize(rows: Sequence[Row], results: dict[str, Result], settings: Settings) -> dict[str, Any]:
    """What summary.json holds. A video that is listed twice counts once in bytes, frames and PSNR."""
    bad = sum(results[row.record.path].error is not None for row in rows)
    videos = {row.record.path: results[row.record.path] for row in rows}
    good = [result for result in videos.values() if result.error is None]
    summary: dict[str, Any] = {"rows": len(rows), "good": len(rows) - bad, "bad": bad, "settings": asdict(settings)}
    for name in ("source_bytes", "bytes", "source_frames", "frames"):
        summary[name] = sum(getattr(result, name) for result in good)
    if good:
        psnr = [round(result.psnr, 2) for result in good]
        summary["psnr"] = {"min": min(psnr), "median": median(psnr), "max": max(psnr)}
    return summary


def describe(summary: dict[str, Any], out: Path, name: str) -> str:
    """The summary for the reader of the terminal."""
    text = f"{summary['rows']:,} rows: {summary['good']:,} packed ({out / name}), {summary['bad']:,} bad"
    text += f" ({out / 'faults.csv'})" if summary["bad"] else ""
    if psnr := summary.get("psnr"):
        before, after = summary["source_bytes"], summary["bytes"]
        text += f"\n{before / 1e6:,.1f} MB became {after / 1e6:,.1f} MB ({after / before:.2f} of it), "
        text += f"{summary['source_frames']:,} frames {summary['frames']:,}"
        text += f"\nPSNR {psnr['min']} to {psnr['max']} dB, median {psnr['median']}, against the source at this size"
    return text


def settings_of(given: argparse.Namespace) -> Settings:
    """The preset, and what the command line says otherwise."""
    edits = {field.name: getattr(given, field.name) for field in fields(Settings)}
    return replace(PRESETS[given.preset], **{name: value for name, value in edits.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, metavar="LIST", help="the list of videos")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that its paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="folder for the packed videos and their list")
    parser.add_argument("--preset", choices=PRESETS, default="fast", help="settings that go together (default fast)")
    parser.add_argument("--short-side", type=int, help="pixels (256); smaller videos are not enlarged")
    parser.add_argument("--fps", type=float, help="at most so many frames a second (default: all)")
    parser.add_argument("--keyframe-every", type=int, help="frames (16)")
    parser.add_argument("--codec", choices=ENCODERS, help="(h264)")
    parser.add_argument("--tune", choices=["fastdecode", "none"], help="(fastdecode)")
    parser.add_argument("--crf", type=int, help="quality; 6 more are half of the bytes (22)")
    parser.add_argument("--b-frames", type=int, help="frames in a row that no other leans on (3)")
    parser.add_argument("--speed", help="the encoder's preset (medium)")
    parser.add_argument("--tar", type=int, default=0, metavar="N", help="write tar shards of N videos")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="videos at once (default: one a core)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds without a decoded frame (%(default)g)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.workers < 1 or given.tar < 0 or not given.timeout > 0:
        parser.error(f"--workers {given.workers} --tar {given.tar} --timeout {given.timeout}: expected 1, 0, above 0")
    try:
        settings = settings_of(given)
        summary = pack_videos(given.list, given.root, given.out, settings, given.tar, given.workers, given.timeout)
    except (ListError, ValueError, RuntimeError) as error:
        parser.exit(1, f"pack_videos: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "pack_videos: interrupted; the same command goes on from here\n")
    print(describe(summary, given.out, f"{given.list.stem}.txt"))
