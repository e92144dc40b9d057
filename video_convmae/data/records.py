"""List files, one record a line; read nowhere else.

Three formats, named by `data.format`; fields are split off from the right, so paths may hold spaces:

    video    path label  |  path  |  path start -1        (the last is VideoMAE V2's: no label)
    frames   folder count label  |  folder 0 count        (the last is VideoMAE V2's: no label)
    image    path label  |  path

Empty lines and lines that begin with `#` are skipped. Relative paths are joined to `root`. In place of a list, a folder
of class folders is accepted (ImageNet, as torchvision's ImageFolder reads it); classes are numbered by name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from video_convmae.errors import UserError
from video_convmae.shipped import find_labels

from .options import IMAGE_SUFFIXES, ListFormat


@dataclass(frozen=True)
class Record:
    """Row of a list.

    Attributes:
        path: file, folder of frames, or member of an archive (shards.py).
        label: class; None where the list has none.
        num_frames: number of frames of a folder; None: all pictures in it, or not a folder.
        format: kind of record.
    """

    path: str
    label: int | None = None
    num_frames: int | None = None
    format: ListFormat = "video"


class ListError(UserError):
    """A list file that cannot be used; the message names file, line and what was expected."""


class Records(Sequence[Record]):
    """Records of one list, held in arrays.

    A list of Python objects is copied page by page into every forked worker as reference counts change (about 400
    bytes a record: 100 MB a worker for Kinetics-400); arrays are shared, and cheap to pickle for spawned workers.

    Args:
        records: in the order of the list, all of one format.
        format: their format.
        lines: the line of each in its list file, counted from 0; None: no line was skipped.

    Attributes:
        labels: class of every record, int64; -1 where the list has none.
        lines: line of every record in its list file, int64, counted from 0.
    """

    def __init__(
        self, records: Iterable[Record], format: ListFormat = "video", lines: Sequence[int] | None = None
    ) -> None:
        records = list(records)
        paths = [os.fsencode(record.path) for record in records]
        self.format = format
        self._paths = np.frombuffer(b"".join(paths), dtype=np.uint8)
        self._ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
        self.labels = _int_array([record.label for record in records])
        self._num_frames = _int_array([record.num_frames for record in records])
        self.lines = np.arange(len(records)) if lines is None else np.array(lines, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # nobody slices a list
        count = len(self._ends)
        if not -count <= index < count:
            raise IndexError(f"record {index} was asked for; the list has {count}")
        index %= count
        start = self._ends[index - 1] if index else 0
        path = os.fsdecode(self._paths[start : self._ends[index]].tobytes())
        label, frames = int(self.labels[index]), int(self._num_frames[index])
        return Record(path, label if label >= 0 else None, frames if frames >= 0 else None, self.format)

    def digest(self, root: str | Path | None = None) -> str:
        """Return the SHA-256 of the records in their order: the same for the same list under another file name.

        With the folder that its paths were joined to, it is also the same where that folder has moved.
        """
        digest = hashlib.sha256()
        if root is None:
            digest.update(self._paths.tobytes())
            digest.update(self._ends.tobytes())
        else:
            for record in self:
                digest.update(os.fsencode(record.path.removeprefix(os.path.join(root, ""))) + b"\0")
        digest.update(self.labels.tobytes())
        digest.update(self._num_frames.tobytes())
        return digest.hexdigest()


def read_list(path: str | Path, format: ListFormat = "video", root: str | Path = "") -> Records:
    """Read a list file.

    Args:
        path: the list, or a folder of class folders.
        format: format of its lines (see the head of this file).
        root: folder that relative paths are joined to; empty: the working directory.

    Raises:
        ListError: the list is missing or empty, or a line does not match its format (the message has its number).
    """
    if format not in get_args(ListFormat):
        raise ListError(f"data.format is {format!r}; expected one of {', '.join(get_args(ListFormat))}")
    if Path(root, path).is_dir():
        return _read_tree(Path(root, path), format)
    try:
        text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ListError(f"cannot read the list {path}: {error.strerror or error}") from error
    records, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            try:
                record = parse_line(line, format)
            except ValueError as error:
                raise ListError(f"{path}, line {number}: {error}; the line is {line!r}") from None
            records.append(Record(os.path.join(root, record.path), record.label, record.num_frames, format))
            lines.append(number - 1)
    if not records:
        raise ListError(f"the list {path} holds no records")
    return Records(records, format, lines)


def class_names(path: str | Path, root: str | Path = "", labels: str | Path | None = None) -> list[str] | None:
    """Return the names of a list's classes, class n being the n-th; None if they are not known.

    Args:
        path: the list, or a folder of class folders, as in `read_list`.
        root: as in `read_list`.
        labels: a file of names, one a line, or the name of a shipped one (`kinetics400`). None: `NAME.labels.txt`
            beside `NAME.txt` (make-list writes it), or the names of the class folders.

    Raises:
        UserError: the file of names is missing, cannot be read (ListError) or is empty (ListError).
    """
    if labels is None:
        if Path(root, path).is_dir():
            return _class_folders(Path(root, path))
        labels = Path(path).with_suffix(".labels.txt")
        if not labels.exists():
            return None
    labels = find_labels(labels)
    try:
        names = labels.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ListError(f"cannot read the class names {labels}: {error.strerror or error}") from error
    if not names:
        raise ListError(f"the file of class names {labels} is empty")
    return names


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _read_tree(folder: Path, format: ListFormat) -> Records:
    """Return the files (for `frames`, the folders) one level down in each class folder, in the order of their names."""
    records = []
    for label, name in enumerate(_class_folders(folder)):
        entries = sorted(os.scandir(folder / name), key=lambda entry: entry.name)
        for entry in entries:
            wanted = entry.name.lower().endswith(IMAGE_SUFFIXES) if format == "image" else entry.name[0] != "."
            if wanted and entry.is_dir() == (format == "frames"):
                records.append(Record(entry.path, label, None, format))
    if not records:
        raise ListError(f"the folder {folder} holds no class folders with {format} files in them")
    return Records(records, format)


def parse_line(line: str, format: ListFormat) -> Record:
    """Parse one line (not a comment) to a record, its path as written. Raises ValueError: what was expected."""
    head, numbers = _split_off_integers(line)
    if format == "frames":
        if len(numbers) < 2:
            raise ValueError("expected 'folder count label' or 'folder 0 count'")
        head = _rejoin(head, numbers[:-2])
        first, second = numbers[-2:]
        if first == "0":  # no folder holds 0 frames: this is VideoMAE V2's 'folder start count'
            return Record(head, None, _at_least(1, second, "frame count"), format)
        return Record(head, _at_least(0, second, "label"), _at_least(1, first, "frame count"), format)
    if not numbers:
        return Record(head, None, None, format)
    if format == "video" and len(numbers) >= 2 and numbers[-1] == "-1":
        return Record(_rejoin(head, numbers[:-2]), None, None, format)
    return Record(_rejoin(head, numbers[:-1]), _at_least(0, numbers[-1], "label"), None, format)


def _split_off_integers(line: str) -> tuple[str, list[str]]:
    """Split off the integers at the end; the path before them stays as written: 'a b.mp4  3' -> ('a b.mp4', ['3'])."""
    numbers: list[str] = []
    head = line
    while True:
        parts = head.rsplit(None, 1)
        if len(parts) < 2 or not parts[1].removeprefix("-").isdecimal():
            return head, numbers
        head = parts[0]
        numbers.insert(0, parts[1])


def _rejoin(head: str, numbers: list[str]) -> str:
    """Put back integers that belong to the path: 'take 2 7' is the path 'take 2' and the label 7."""
    return " ".join([head, *numbers])


def _at_least(least: int, text: str, name: str) -> int:
    if int(text) < least:
        raise ValueError(f"the {name} is {text}, expected {least} or more")
    return int(text)


def _int_array(values: list[int | None]) -> np.ndarray:
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)
