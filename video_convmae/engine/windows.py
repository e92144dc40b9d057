"""Features of videos of any length, window by window: computed, kept over interruptions, and written.

    features.npz    a row for each window, videos in the list's order (engine/features.py reads it)
    windows.csv     row, record, start_frame, end_frame, start_seconds, end_seconds
    windows/*.npy   `(W, D)` of each video that was read to its end: what detectors of actions in time read
    windows.json    of each video its file's name, seconds, frames a second, frames: in ActivityNet's form

Each video is decoded once. Finished windows are stored at once, so an interrupted run goes on within a video. The
windows before the place where a video cannot be read are kept; it is reported, and has no file in windows/.

Letters: W windows of a video, D width of a feature.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from video_convmae.atomic import read_json, replacing, whole_lines, write_text
from video_convmae.data.datasets import BadRecord
from video_convmae.data.labels import label_array
from video_convmae.data.loader import iter_stream
from video_convmae.data.records import Records
from video_convmae.data.remote import is_url
from video_convmae.data.windows import Span, WindowBatch, WindowDataset, WindowPlan

from .distributed import DistInfo, barrier, broadcast_object
from .features import open_archive, write_npy, write_parts
from .inference import ChunkStore, ListInference, Progress
from .watchdog import heartbeat

ARRAYS, ABOUT_ARRAYS = "windows", "windows.json"
_WRITTEN = 1024  # rows copied at a time


class VideoEnd(NamedTuple):
    """What is known of a video when its last window was stored."""

    record: int
    windows: int
    frames: int
    seconds: float | None
    error: str | None


class WindowStore(ChunkStore):
    """Finished windows on the disk, and the ends of videos; each process of each attempt appends to files of its own.

    Args:
        folder: created with the first window.
        shape: of a window's values.
        rank: of this process.
    """

    lines = ".videos.jsonl"

    def __init__(self, folder: Path, shape: tuple[int, ...], rank: int) -> None:
        super().__init__(folder, shape, rank)
        self.row = np.dtype([("record", "<i8"), ("window", "<i8"), ("span", "<f8", 4), ("values", "<f4", shape)])

    def add_windows(self, batch: WindowBatch, values: np.ndarray) -> None:
        """Store a batch and its `(n, ...)` values; then, if it is the video's last one, that the video ends."""
        rows = np.zeros(len(batch.spans), self.row)
        rows["record"], rows["window"] = batch.record, batch.first + np.arange(len(rows))
        rows["span"], rows["values"] = np.array(batch.spans).reshape(-1, 4), values
        rows_file, lines_file = self._open()
        rows_file.write(rows.tobytes())
        rows_file.flush()
        if batch.is_last:
            seconds = None if math.isnan(batch.seconds) else batch.seconds
            end = VideoEnd(batch.record, batch.total, batch.frames, seconds, batch.error)
            lines_file.write(json.dumps(end._asdict()) + "\n")
            lines_file.flush()

    def ends(self) -> dict[int, VideoEnd]:
        """Return the ends of videos in every file that this process sees, by record; the newest counts."""
        assert self.folder is not None
        files = sorted(self.folder.glob(f"*{self.lines}"))
        every = [VideoEnd(**json.loads(line)) for path in files for line in whole_lines(path)]
        return {end.record: end for end in every}

    def places(self) -> np.ndarray:
        """Return where each stored window lies, ordered by record and window: record, window, file, row."""
        kind = [(name, "<i8") for name in ("record", "window", "file", "row")]
        parts = [np.zeros(0, kind)]
        for number, rows in enumerate(self.mapped_rows()):
            part = np.zeros(len(rows), kind)
            part["record"], part["window"] = rows["record"], rows["window"]
            part["file"], part["row"] = number, np.arange(len(rows))
            parts.append(part)
        every = np.concatenate(parts)
        every = every[np.lexsort((every["row"], every["file"], every["window"], every["record"]))]
        # A window that was computed again (a kill in the middle of a batch, a video tried again): the newest counts.
        newest = np.ones(len(every), bool)
        newest[:-1] = (every["record"][1:] != every["record"][:-1]) | (every["window"][1:] != every["window"][:-1])
        return every[newest]

    def pending(self, count: int, batch: int) -> list[tuple[int, int]]:
        """Return the records that are not read to their end, and of each the first window that is missing.

        The same on every rank. A batch of `batch` windows that is not whole is computed again; so is the rest of a
        video that could not be read: the disk may be back.
        """
        places = self.places()
        stored = Counter(places["record"].tolist())
        whole = {record for record, end in self.ends().items() if end.error is None}
        mine = [(record, stored[record] // batch * batch) for record in range(count) if record not in whole]
        return broadcast_object(mine)


def extract_windows(
    inference: ListInference, compute: Callable[[Tensor], Tensor], shape: tuple[int, ...], hop: int, folder: Path
) -> None:
    """Compute the values of every window that the folder does not hold yet; `write_windows` joins them.

    Args:
        inference: the model over the list; batches of `protocol.batch_size` windows.
        compute: clips `(B, C, T, H, W)` -> values `(B, *shape)`.
        shape: of a window's values.
        hop: frames of the file between the starts of two windows.
        folder: visible to all processes.
    """
    info, views = inference.info, inference.views
    store = WindowStore(folder, shape, info.rank)
    videos = store.pending(len(views), inference.protocol.batch_size)
    dataset = WindowDataset(views, hop, inference.protocol.batch_size, videos[info.rank :: info.world_size])
    pin_memory = info.device.type == "cuda"
    batches = iter_stream(dataset, inference.workers, pin_memory, inference.start_method)
    progress = Progress(len(views), len(views) - len(videos), info.is_main)
    inference.model.eval()
    with closing(store), closing(batches), closing(progress):
        for batch in batches:
            path = views.records[batch.record].path
            heartbeat(f"computes {path}, window {batch.first}")
            values = np.zeros((0, *shape), np.float32)
            if batch.spans:
                names = f"{path}, windows {batch.first} to {batch.first + len(batch.spans) - 1}"
                values = inference.forward(compute, batch.clips, views.views.count, names)
            store.add_windows(batch, values)
            done = batch.first + len(batch.spans)
            progress.update(info.world_size * batch.is_last, f"{os.path.basename(path)}: window {done}/{batch.total}")
    _wait_for_all(folder, info)


def _wait_for_all(folder: Path, info: DistInfo) -> None:
    """Wait until every process has finished its videos; those that wait report progress to the watchdog.

    A barrier alone would give up where one process reads a video of hours and the others are done.
    """
    if info.world_size > 1:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"finished-{info.rank}").touch()
        while len(list(folder.glob("finished-*"))) < info.world_size:
            heartbeat("waits for the videos of the other processes")
            time.sleep(0.2)
    barrier()


def forget_finished(folder: Path, info: DistInfo) -> None:
    """Remove what an interrupted run left of `_wait_for_all`; all processes call it together, before they begin."""
    if info.is_main:
        for path in folder.glob("finished-*"):
            path.unlink()
    barrier()


def write_windows(
    store: WindowStore, records: Records, root: str, plan: WindowPlan, folder: Path, about: dict[str, Any]
) -> tuple[BadRecord, ...]:
    """Join what `extract_windows` stored into the files at the head of this module. The same windows, the same bytes.

    Args:
        store: of the windows; left unchanged.
        records: the list.
        root: folder of the list's relative paths, for the names in windows/.
        plan: which windows there are.
        folder: of the files; those of an earlier run there are replaced.
        about: model, list and views, as plain data.

    Returns:
        Records that could not be read, or not to their end, in the list's order.

    Raises:
        RuntimeError: videos are missing.
    """
    ends, places, maps = store.ends(), store.places(), store.mapped_rows()
    if missing := len(records) - len(ends):
        raise RuntimeError(
            f"the windows of {missing} of {len(records)} videos are not in {store.folder}: the processes of all "
            "machines must write to the same file system"
        )
    values = _Values(places, maps)
    _write_index(values, records, folder / "windows.csv")
    shape = store.row["values"].shape
    _write_features(values, shape, records, folder / "features.npz", about)
    _write_videos(values, shape, ends, records, root, plan, folder)
    return tuple(
        BadRecord(index, records[index].path, _explain(end, values.count(index)))
        for index, end in sorted(ends.items())
        if end.error is not None
    )


def _explain(end: VideoEnd, windows: int) -> str:
    """Return why a video could not be read, and what was kept of it."""
    kept = f"; the {windows} windows of {end.windows} before that are kept" if windows else ""
    return f"{end.error}{kept}"


class _Values:
    """Stored windows in order: of a record, or of all."""

    def __init__(self, places: np.ndarray, maps: list[np.ndarray]) -> None:
        self._places, self._maps = places, maps
        self.records = places["record"]

    def __len__(self) -> int:
        return len(self._places)

    def count(self, record: int) -> int:
        return len(self.rows_of(record))

    def rows_of(self, record: int) -> range:
        first, last = np.searchsorted(self.records, [record, record + 1]).tolist()
        return range(first, last)

    def read(self, rows: range, column: str) -> Iterator[np.ndarray]:
        """Yield a column of the windows in `rows`, some at a time."""
        for start in range(rows.start, rows.stop, _WRITTEN):
            some = self._places[start : min(start + _WRITTEN, rows.stop)]
            runs = np.flatnonzero((np.diff(some["file"]) != 0) | (np.diff(some["row"]) != 1)) + 1
            for run in np.split(some, runs):  # rows that lie behind one another in a file
                yield self._maps[run["file"][0]][column][run["row"][0] : run["row"][-1] + 1]


def _write_index(values: _Values, records: Records, path: Path) -> None:
    with replacing(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "record", *Span._fields])
        row = 0
        for spans in values.read(range(len(values)), "span"):
            for span in spans.tolist():
                seconds = ["" if math.isnan(each) else round(each, 6) for each in span[2:]]
                writer.writerow([row, records[int(values.records[row])].path, int(span[0]), int(span[1]), *seconds])
                row += 1


def _write_features(
    values: _Values, shape: tuple[int, ...], records: Records, path: Path, about: dict[str, Any]
) -> None:
    rows = range(len(values))
    shown = np.unique(values.records).tolist()
    widest = max((len(records[index].path) for index in shown), default=1)
    with open_archive(path) as archive:
        write_parts(archive, "features", np.dtype("<f4"), (len(rows), *shape), values.read(rows, "values"))
        labels = label_array(records)
        write_parts(archive, "labels", labels.dtype, (len(rows), *labels.shape[1:]), [labels[values.records]])
        write_parts(archive, "failed", np.dtype("?"), (len(rows),), [np.zeros(len(rows), bool)])
        paths = (np.array([records[index].path] * values.count(index), f"<U{widest}") for index in shown)
        write_parts(archive, "records", np.dtype(f"<U{widest}"), (len(rows),), paths)
        text = np.array(json.dumps(about))
        write_parts(archive, "about", text.dtype, (), [text])


def _write_videos(
    values: _Values,
    shape: tuple[int, ...],
    ends: dict[int, VideoEnd],
    records: Records,
    root: str,
    plan: WindowPlan,
    folder: Path,
) -> None:
    """Write windows/ and windows.json, of the videos that were read to their end."""
    if (folder / ABOUT_ARRAYS).exists():  # of another list, or of a video that breaks now
        for name in read_json(folder / ABOUT_ARRAYS)["database"]:
            (folder / ARRAYS / f"{name}.npy").unlink(missing_ok=True)
    database: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(video_names(records, root)):
        end, rows = ends[index], values.rows_of(index)
        if end.error is not None:
            continue
        path = folder / ARRAYS / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as file:
            write_npy(file, np.dtype("<f4"), (len(rows), *shape), values.read(rows, "values"))
        fps = None if not end.seconds else round(end.frames / end.seconds, 6)
        seconds = None if end.seconds is None else round(end.seconds, 6)
        facts = {"duration": seconds, "fps": fps, "frame": end.frames, "windows": len(rows)}
        database[name] = {**facts, "record": records[index].path, "annotations": []}
    index_file = {"feat_stride": plan.hop, "num_frames": plan.span, "database": database}
    write_text(folder / ABOUT_ARRAYS, json.dumps(index_file, indent=1) + "\n")


def video_names(records: Records, root: str) -> list[str]:
    """Return a name for each video: its path below `root` without the ending; of several of one name with the line.

    A folder of the path stays one; a video outside of the root is named by its file alone.
    """
    names = []
    for record in records:
        relative = os.path.relpath(record.path, root or ".").replace("#", "/")
        inside = not (
            relative.startswith("..") or os.path.isabs(relative) or (is_url(record.path) and not is_url(root))
        )
        names.append(os.path.splitext(relative if inside else os.path.basename(record.path))[0])
    several = {name for name, count in Counter(names).items() if count > 1}
    numbered = [f"{name}-{line + 1}" for name, line in zip(names, records.lines)]
    some = [number if name in several else name for name, number in zip(names, numbered)]
    return some if len({*some}) == len(some) else numbered
