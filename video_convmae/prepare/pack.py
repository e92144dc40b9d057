"""Pack a list: re-encode its videos once, so that training reads them several times as fast (encode.py says why).

Written to the output folder:

    NAME.txt       the rows of the list NAME with new paths, relative to the folder; labels, order and line numbers stay
                   (so a record shows the same samples), and bad rows become comments. Beside it NAME.labels.txt, if the
                   list has one
    videos/        the packed videos; or shards/, tar archives
    faults.csv     line, record, error
    summary.json   bytes and frames before and after; PSNR against the decoded source at the packed size, in RGB; notes
                   on good videos (the size of the picture changes)
    settings.json  the settings: one folder holds videos of one kind
    packed.jsonl   one line a video, written as videos are done (job.py)

Every packed video is decoded once to verify its number of frames. Frames keep their times, and all are kept, unless a
lower frame rate is asked for: then data.stride covers more time.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any, BinaryIO

from video_convmae.atomic import read_json, replacing, write_text
from video_convmae.data import labels
from video_convmae.data.decoding import DecodeError
from video_convmae.data.decoding.errors import decode_errors
from video_convmae.data.decoding.process import ChildDied, ChildProcess, ChildTimeout, Handler
from video_convmae.data.labels import list_name
from video_convmae.data.records import ListError, Record
from video_convmae.data.shards import file_of, read_member, split_path
from video_convmae.data.text import read_text
from video_convmae.prepare.encode import PackedVideo, pack_video
from video_convmae.prepare.job import RecordResult, ResumableJob, Row, first_rows, list_notes, read_rows, write_report
from video_convmae.prepare.options import LIST_TEXT, PackSettings


@dataclass(frozen=True)
class PackResult(RecordResult):
    """Place and properties of a packed video.

    Attributes:
        target: path relative to the output folder.
        end: bytes from the start of its shard to its end; None for a file of its own.
        source_bytes, bytes: size before and after.
        source_frames, frames: number before and after.
        width, height: pixels.
        psnr: dB.
    """

    target: str = ""
    end: int | None = None
    source_bytes: int = 0
    bytes: int = 0
    source_frames: int = 0
    frames: int = 0
    width: int = 0
    height: int = 0
    psnr: float = 0.0


# ---- child processes -------------------------------------------------------------------------------------------------


class PackingProcess:
    """`pack_video` in a child process, which is started when first needed and again after it was lost.

    Args:
        settings: as for `pack_video`.
        timeout: seconds without progress after which the child is killed.
    """

    def __init__(self, settings: PackSettings, timeout: float) -> None:
        self.settings, self.timeout = settings, timeout
        self._child: ChildProcess | None = None

    def pack(self, record: Record) -> PackedVideo:
        """Pack a video as `pack_video` does; a hang or a crash of the codec raises DecodeError too."""
        if self._child is None or not self._child.is_alive():
            self._child = ChildProcess(serve_packing, self.settings)
        try:
            return self._child.ask(record, self.timeout)
        except ChildTimeout:
            message = f"{record.path}: nothing was decoded within {self.timeout:g} s; the process was killed"
            raise DecodeError(message) from None
        except ChildDied as error:
            raise DecodeError(f"{record.path}: the packing process {error}") from None

    def close(self) -> None:
        """End the child process."""
        if self._child is not None:
            self._child.kill()


def serve_packing(progress: Callable[[], None], settings: PackSettings) -> Handler:
    """Return the handler of a packing process: from a record to its packed video."""

    def handle(record: Record) -> PackedVideo:
        with decode_errors(record.path):
            return pack_video(record, settings, progress)

    return handle


# ---- stores of packed videos -----------------------------------------------------------------------------------------


class FolderStore:
    """A file for each video, under videos/."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def holds(self, result: PackResult) -> bool:
        """Return whether the video of a result is still in its place."""
        path = self.out / result.target
        return path.is_file() and path.stat().st_size == result.bytes

    def add(self, row: Row, video: PackedVideo) -> dict[str, Any]:
        """Store a video; returns the fields `target` and `end` of its result."""
        path = self.out / "videos" / packed_name(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as file:
            file.write(video.data)
        return {"target": path.relative_to(self.out).as_posix()}

    def close(self) -> None:
        """Do nothing: no file is open."""


class ShardStore:
    """Tar archives under shards/ in webdataset's layout: KEY.mp4, and KEY.cls with the label.

    A resumed run appends to the last archive, after the last video that has a result. An archive ends with two empty
    blocks; they are written by `close` and overwritten by the next `add`.

    Args:
        out: the output folder.
        count: number of videos in each archive, in the list's order.
        results: results of earlier runs.
    """

    def __init__(self, out: Path, count: int, results: Iterable[PackResult]) -> None:
        self.out, self.count = out, count
        (out / "shards").mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = None
        stored = [(Path(file_of(result.target)), result.end or 0) for result in results if self.holds(result)]
        last = max((shard for shard, _ in stored), default=None)
        ends = [end for shard, end in stored if shard == last]
        self._number = 0 if last is None else int(last.stem)
        self._videos, self._end = len(ends), max(ends, default=0)

    def holds(self, result: PackResult) -> bool:
        """Return whether the archive of a result reaches to the video's end."""
        path = self.out / file_of(result.target)
        return result.end is not None and path.is_file() and path.stat().st_size >= result.end

    def add(self, row: Row, video: PackedVideo) -> dict[str, Any]:
        """Append a video; returns the fields `target` and `end` of its result."""
        if self._videos >= self.count:
            self.close()
            self._number, self._videos, self._end = self._number + 1, 0, 0
        file = self._open()
        stem = PurePosixPath(packed_name(row)).stem.replace(".", "_")  # webdataset's keys end at the first dot
        key = f"{row.line:08d}_{stem}".replace("#", "_")[:80]
        if row.record.label is not None:
            _append_member(file, f"{key}.cls", row.record.label_text.encode())
        _append_member(file, f"{key}.mp4", video.data)
        file.flush()
        self._videos, self._end = self._videos + 1, file.tell()
        return {"target": f"{self._name}#{key}.mp4", "end": self._end}

    def close(self) -> None:
        """Write the end of the last archive, unless it is there."""
        path, ending = self.out / self._name, bytes(2 * tarfile.BLOCKSIZE)
        if self._videos and path.stat().st_size != self._end + len(ending):
            self._open()
        if self._file is not None:
            self._file.write(ending)
            self._file.close()
            self._file = None

    @property
    def _name(self) -> str:
        return f"shards/{self._number:06d}.tar"

    def _open(self) -> BinaryIO:
        """Open the last archive after its last video with a result; bytes behind it, left by a kill, are cut off."""
        if self._file is None:
            path = self.out / self._name
            self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115, closed in close()
            self._file.truncate(self._end)
            self._file.seek(self._end)
        return self._file


def packed_name(row: Row) -> str:
    """Return the path of a packed video under videos/: as written in the list, without parts that lead elsewhere."""
    written = row.written_path.replace(".tar#", ".tar/")
    name = "/".join(part for part in PurePosixPath(written).parts if part not in ("/", "..", "."))
    return name if name.endswith(".mp4") else f"{name}.mp4"


def _append_member(file: BinaryIO, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    file.write(entry.tobuf() + data + bytes(-len(data) % tarfile.BLOCKSIZE))


# ---- the whole list --------------------------------------------------------------------------------------------------


class PackJob(ResumableJob[PackingProcess, PackedVideo, PackResult]):
    """Packing of videos into a folder of files or of shards.

    Args:
        out: the output folder.
        settings: as for `pack_video`.
        tar: number of videos in a shard; 0: a file for each.
        timeout: as for `PackingProcess`.
    """

    result_type = PackResult
    title = "packing"

    def __init__(self, out: Path, settings: PackSettings, tar: int, timeout: float) -> None:
        super().__init__(out / "packed.jsonl", in_order=tar > 0)
        self.settings, self.timeout = settings, timeout
        self.store = ShardStore(out, tar, self.earlier.values()) if tar else FolderStore(out)

    def start_worker(self) -> PackingProcess:
        """Return a process that packs."""
        return PackingProcess(self.settings, self.timeout)

    def work_on(self, record: Record, worker: PackingProcess) -> PackedVideo:
        """Pack a video."""
        return worker.pack(record)

    def store_outcome(self, row: Row, outcome: PackedVideo) -> dict[str, Any]:
        """Write a packed video to the store; returns the fields of its result."""
        facts = {
            name: getattr(outcome, name) for name in ("source_frames", "frames", "width", "height", "psnr", "note")
        }
        sizes = {"source_bytes": _size_of(row.record.path), "bytes": len(outcome.data)}
        return {**self.store.add(row, outcome), **sizes, **facts}

    def is_valid(self, result: PackResult) -> bool:
        """Return whether an earlier result still holds: source and packed video are unchanged."""
        return super().is_valid(result) and self.store.holds(result)


def pack_videos(
    path: Path, root: Path, out: Path, settings: PackSettings, tar: int = 0, workers: int = 1, timeout: float = 60.0
) -> dict[str, Any]:
    """Pack a list and write the files named at the head of this module.

    Args:
        path: the list.
        root: folder that its paths are relative to.
        out: folder to write to.
        settings: as for `pack_video`.
        tar: number of videos in a shard; 0: a file for each.
        workers: number of videos that are packed at the same time.
        timeout: seconds without a decoded frame after which a video is given up.

    Returns:
        The contents of summary.json.

    Raises:
        ListError: the list cannot be used, or `out` holds videos packed with other settings.
    """
    rows = [_normalise_path(row) for row in read_rows(path, "video", root)]
    if not tar:
        _check_names(first_rows(rows).values())
    written = out / f"{list_name(path)}.txt"
    if written.resolve() == path.resolve():
        raise ListError(f"{path} lies in --out {out} and would be overwritten; choose another folder")
    _check_targets(out, written, rows, tar)
    class_names = labels.class_names(path)
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(out / "settings.json", {**asdict(settings), "tar": tar})
    job = PackJob(out, settings, tar, timeout)
    with closing(job.store):
        results = job.run(rows, workers)
    summary = {"settings": asdict(settings), **summarize_packing([results[row.record.path] for row in rows])}
    summary["notes"] = list_notes(rows, results)
    _write_packed_list(path, written, rows, results, class_names)
    write_report(out, rows, results, summary)
    return summary


def summarize_packing(results: Sequence[PackResult]) -> dict[str, Any]:
    """Return totals over the results of all rows. A video that is listed twice counts once in bytes, frames, PSNR."""
    bad = sum(result.error is not None for result in results)
    videos = {result.path: result for result in results if result.error is None}.values()
    summary: dict[str, Any] = {"rows": len(results), "good": len(results) - bad, "bad": bad}
    for name in ("source_bytes", "bytes", "source_frames", "frames"):
        summary[name] = sum(getattr(result, name) for result in videos)
    if videos:
        psnr = [round(result.psnr, 2) for result in videos]
        summary["psnr"] = {"min": min(psnr), "median": median(psnr), "max": max(psnr)}
    return summary


def _normalise_path(row: Row) -> Row:
    """Return a row whose record has one spelling of its path: ./a.mp4 is a.mp4."""
    return replace(row, record=replace(row.record, path=os.path.normpath(row.record.path)))


def _check_names(rows: Iterable[Row]) -> None:
    names: dict[str, Row] = {}
    for row in rows:
        other = names.setdefault(packed_name(row), row)
        if other is not row:
            raise ListError(
                f"lines {other.line} and {row.line} would both be packed into videos/{packed_name(row)}: rename one, "
                "or pack into shards (--tar 1000)"
            )


def _check_targets(out: Path, written: Path, rows: Sequence[Row], tar: int) -> None:
    """Raise a ListError if packing would write over a source, or, in a folder that is new to it, over any file."""
    sources = {os.path.realpath(file_of(row.record.path)) for row in rows}
    folder = out / ("shards" if tar else "videos")
    if tar:
        targets = sorted(folder.glob("[0-9]*.tar"))
    else:
        targets = [path for row in rows if (path := folder / packed_name(row)).exists()]
    for target in targets:
        if os.path.realpath(target) in sources:
            raise ListError(f"{target} is a source, and would be overwritten by its packed copy; choose another --out")
    if not (out / "settings.json").exists() and (taken := [*targets, *([written] if written.exists() else [])]):
        raise ListError(f"{taken[0]} exists and was not packed here; choose another --out, or move it away")


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Compare the settings with those of an earlier run, or write them."""
    if not path.exists():
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    earlier = read_json(path)
    if earlier != settings:
        changed = ", ".join(f"{name} {earlier.get(name)}" for name in settings if earlier.get(name) != settings[name])
        raise ListError(f"{path.parent} holds videos packed with other settings ({changed}); choose another --out")


def _write_packed_list(
    path: Path,
    written: Path,
    rows: Sequence[Row],
    results: Mapping[str, PackResult],
    class_names: Sequence[str] | None,
) -> None:
    """Write the list with new paths, and its class names."""
    names_file = labels.labels_file(written)
    row_at = {row.line: row for row in rows}
    lines = read_text(path, "the list").split("\n")
    with replacing(written, **LIST_TEXT) as file:
        for number, text in enumerate(lines, start=1):
            if row := row_at.get(number):
                result = results[row.record.path]
                bad = result.error is not None
                text = f"# left out, see faults.csv: {text.strip()}" if bad else _with_path(row, result.target)
            file.write(text + ("\n" if number < len(lines) or text else ""))
        if class_names is not None:
            write_text(names_file, "".join(f"{name}\n" for name in class_names))
    if class_names is None:
        names_file.unlink(missing_ok=True)  # of another list


def _with_path(row: Row, target: str) -> str:
    """Return the text of a row with another path; the fields behind the path stay."""
    text, old = row.text.strip(), row.written_path
    if not text.startswith(old):  # the path ends in numbers, with several spaces before them
        return target if row.record.label is None else f"{target} {row.record.label_text}"
    return target + text[len(old) :]


def _size_of(path: str) -> int:
    """Return the bytes of a video, a file or a member of an archive."""
    parts = split_path(path)
    return os.path.getsize(path) if parts is None else len(read_member(*parts))
