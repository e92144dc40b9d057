"""Resumable work on the records of a list; check.py and pack.py say what the work is.

Records are worked on in threads, each with a child process of its own, so a codec that hangs or crashes costs one
record. Results are appended to a file of JSON lines as they come. The next run reads them first and works only on
records without a valid result; after an interruption, kills included, the same command resumes.
"""

from __future__ import annotations

import csv
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tqdm import tqdm

from video_convmae.atomic import replacing, whole_lines, write_text
from video_convmae.data import shards
from video_convmae.data.decoding import DecodeError
from video_convmae.data.decoding.pictures import split_pattern
from video_convmae.data.options import ListFormat
from video_convmae.data.records import ListError, Record, parse_line, read_list
from video_convmae.data.text import read_text
from video_convmae.prepare.options import LIST_TEXT

AHEAD = 3  # records in work or waiting to be stored, for each worker


@dataclass(frozen=True)
class Row:
    """A row of a list.

    Attributes:
        line: line number, from 1.
        text: the line as written.
        record: the line as `read_list` reads it.
    """

    line: int
    text: str
    record: Record

    @property
    def written_path(self) -> str:
        """The path as written in the list, not joined to the root."""
        return parse_line(self.text.strip(), self.record.format).path


@dataclass(frozen=True)
class RecordResult:
    """Result of the work on one record; subclasses add fields.

    Attributes:
        path: path of the record.
        stamp: `file_stamp` before the work began.
        method: `ResumableJob.method`.
        error: description of the failure; None if the record is good.
        note: what a user should know of a good record (`FrameReader.note`).
    """

    path: str
    stamp: list[int] | None
    method: str
    error: str | None = None
    note: str | None = None


class Closable(Protocol):
    """Anything with `close`."""

    def close(self) -> None:
        """End it; a thread that waits for it gets an error."""


WorkerT = TypeVar("WorkerT", bound=Closable)
OutcomeT = TypeVar("OutcomeT")
ResultT = TypeVar("ResultT", bound=RecordResult)


class ResumableJob(ABC, Generic[WorkerT, OutcomeT, ResultT]):
    """Work on the records of a list.

    Attributes:
        result_type: dataclass of a result.
        title: verb for the progress bar.
        earlier: results that the file held at the start, by path.

    Args:
        results_file: file of JSON lines, one for each result.
        method: description of the way of working; results of another method are not reused.
        in_order: store outcomes in the order of the rows, not as they come.
    """

    result_type: type[ResultT]
    title: str

    def __init__(self, results_file: Path, method: str = "", in_order: bool = False) -> None:
        self.results_file, self.method, self.in_order = results_file, method, in_order
        self.earlier: dict[str, ResultT] = {}
        if results_file.exists():
            lines = whole_lines(results_file)
            if sum(map(len, lines)) < results_file.stat().st_size:  # JSON is ASCII
                write_text(results_file, "".join(lines))  # a last line that was cut off would swallow the next
            for line in lines:
                with suppress(ValueError, TypeError):  # of another version
                    result = self.result_type(**json.loads(line))
                    self.earlier[result.path] = result

    @abstractmethod
    def start_worker(self) -> WorkerT:
        """Return the child process of a thread."""

    @abstractmethod
    def work_on(self, record: Record, worker: WorkerT) -> OutcomeT:
        """Work on a record, in one of the threads.

        Raises:
            DecodeError: the record is bad.
        """

    @abstractmethod
    def store_outcome(self, row: Row, outcome: OutcomeT) -> dict[str, Any]:
        """Store an outcome, in the main thread; returns the fields that the subclass adds to the result."""

    def is_valid(self, result: ResultT) -> bool:
        """Return whether an earlier result still holds.

        Errors do not: the disk may have been the cause, or a timeout that was too short.
        """
        return result.error is None and result.method == self.method and result.stamp == file_stamp(result.path)

    def run(self, rows: Sequence[Row], workers: int) -> dict[str, ResultT]:
        """Work on every record that has no valid result; returns the results of all rows by path.

        Args:
            rows: rows of the list. Of rows with the same path only the first is worked on.
            workers: number of threads.
        """
        first = first_rows(rows)
        results = {path: self.earlier[path] for path in first if path in self.earlier}
        results = {path: result for path, result in results.items() if self.is_valid(result)}
        unfinished = [row for path, row in first.items() if path not in results]
        bad = 0
        with (
            open(self.results_file, "a", encoding="utf-8") as file,
            tqdm(
                total=len(first), initial=len(results), desc=self.title, unit="file", smoothing=0.05, disable=None
            ) as progress,
            closing(self._outcomes(unfinished, workers)) as outcomes,
        ):
            for row, stamp, outcome in outcomes:
                failed = isinstance(outcome, DecodeError)
                fields = {"error": str(outcome)} if failed else self.store_outcome(row, outcome)
                result = self.result_type(row.record.path, stamp, self.method, **fields)
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                results[result.path] = result
                bad += failed
                progress.set_postfix(bad=bad, refresh=False)
                progress.update()
        return results

    def _outcomes(self, rows: Sequence[Row], workers: int) -> Generator[tuple[Row, list[int] | None, Any], None, None]:
        """Yield each row with its file's stamp before the work, and its outcome or DecodeError."""
        own = threading.local()
        started: list[WorkerT] = []

        def start() -> None:
            own.worker = self.start_worker()
            started.append(own.worker)

        def work(row: Row) -> tuple[Row, list[int] | None, OutcomeT | DecodeError]:
            stamp = file_stamp(row.record.path)
            try:
                return row, stamp, self.work_on(row.record, own.worker)
            except DecodeError as error:
                return row, stamp, error

        pool = ThreadPoolExecutor(workers, initializer=start)
        remaining = iter(rows)
        pending: list[Future] = []
        try:
            while True:
                pending += [pool.submit(work, row) for row in islice(remaining, AHEAD * workers - len(pending))]
                if not pending:
                    return
                done = pending[0] if self.in_order else next(iter(wait(pending, return_when=FIRST_COMPLETED).done))
                yield done.result()
                pending.remove(done)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in started:  # after an interrupt, so that no thread waits for its timeout
                worker.close()
            pool.shutdown()


# ---- rows and the outputs of every job -------------------------------------------------------------------------------


def read_rows(path: Path, format: ListFormat, root: Path) -> list[Row]:
    """Read a list with its line numbers and its text.

    Raises:
        ListError: as `read_list`; or `path` is a folder, or `root` is none.
    """
    if not root.is_dir():
        raise ListError(f"--root {root} is not a folder")
    if path.is_dir():
        raise ListError(
            f"{path} is a folder, expected a list; make one first: video-convmae make-list folders --root {path}"
        )
    records = read_list(path, format, root)
    lines = read_text(path, "the list").split("\n")
    return [Row(line + 1, lines[line], record) for line, record in zip(records.lines.tolist(), records, strict=True)]


def first_rows(rows: Sequence[Row]) -> dict[str, Row]:
    """Return the first row of each path, in order."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.record.path, row)
    return first


def file_stamp(path: str) -> list[int] | None:
    """Return size and modification time (ns) of a record's file; None if there is none. A tar archive stands for all
    of its members."""
    try:
        status = os.stat(split_pattern(shards.file_of(path))[0])
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def list_notes(rows: Sequence[Row], results: Mapping[str, RecordResult]) -> list[dict[str, Any]]:
    """Return the notes on good records: line, record, note."""
    noted = [(row, note) for row in rows if (note := results[row.record.path].note) is not None]
    return [{"line": row.line, "record": row.written_path, "note": note} for row, note in noted]


def format_notes(notes: Sequence[Mapping[str, Any]], out: Path) -> list[str]:
    """Return the notes as lines of a report: their number and the first."""
    if not notes:
        return []
    more = f"; all in {out / 'summary.json'}" if len(notes) > 1 else ""
    return [f"{len(notes):,} good with a note: {notes[0]['record']}: {notes[0]['note']}{more}"]


def write_report(
    out: Path, rows: Sequence[Row], results: Mapping[str, RecordResult], summary: Mapping[str, Any]
) -> None:
    """Write faults.csv (line, record, error) and summary.json."""
    with replacing(out / "faults.csv", **LIST_TEXT) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["line", "record", "error"])
        for row in rows:
            if (error := results[row.record.path].error) is not None:
                table.writerow([row.line, row.written_path, error])
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
