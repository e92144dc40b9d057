"""List files, one record a line; read nowhere else.

Three formats, named by `data.format`; fields are split off from the right, so paths may hold spaces:

    video    path label  |  path  |  path start -1        (the last is VideoMAE V2's: no label)
    frames   folder count label  |  folder 0 count        (the last is VideoMAE V2's: no label)
    image    path label  |  path

A label may be several with commas between, `path 3,7`: a record of both classes (multi-label).

Empty lines and lines that begin with `#` are skipped. Relative paths are joined to `root`. In place of a list, a folder
of class folders is accepted (ImageNet, as torchvision's ImageFolder reads it); classes are numbered by name.

A line that can be read in two ways is settled by the file that exists: a name in cp1252 or with Windows' backslashes,
one that begins with `#`, one that ends like fields of another form (`a.mp4,3`). Where no such file exists, a line of
another program's form is an error that says so: read as a path it would only be a file that is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from . import remote, shards
from .folders import class_folders
from .labels import class_names
from .options import IMAGE_SUFFIXES, VIDEO_SUFFIXES, ListFormat
from .text import ListError, read_text, readable

__all__ = [
    "ListError",
    "Record",
    "Records",
    "class_names",
    "format_line",
    "hash_order",
    "hold_out",
    "parse_line",
    "read_list",
]

LARGEST = 2**31 - 1  # label or frame count; a larger one is a mistake, and no model has as many classes


@dataclass(frozen=True)
class Record:
    """Row of a list.

    Attributes:
        path: file, folder of frames, or member of an archive (shards.py).
        label: class; None where the list has none.
        num_frames: number of frames of a folder; None: all pictures in it, or not a folder.
        format: kind of record.
        others: further classes of a record that has several.
        source: of a mixture, the place of its list.
    """

    path: str
    label: int | None = None
    num_frames: int | None = None
    format: ListFormat = "video"
    others: tuple[int, ...] = ()
    source: int = 0

    @property
    def labels(self) -> tuple[int, ...]:
        """All classes, as the list has them."""
        return () if self.label is None else (self.label, *self.others)

    @property
    def label_text(self) -> str:
        """The classes as a list has them: `3`, or `3,7`; empty without any."""
        return ",".join(map(str, self.labels))


class Records(Sequence[Record]):
    """Records of one list, held in arrays.

    A list of Python objects is copied page by page into every forked worker as reference counts change (about 400
    bytes a record: 100 MB a worker for Kinetics-400); arrays are shared, and cheap to pickle for spawned workers.

    Args:
        records: in the order of the list, all of one format.
        format: their format.
        lines: the line of each in its list file, counted from 0; None: no line was skipped.

    Attributes:
        labels: class of every record, int64, the first of several; -1 where the list has none.
        all_labels: these, and behind them the other classes of records that have several.
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
        others = [label for record in records for label in record.others]
        self.all_labels = np.concatenate([self.labels, np.array(others, dtype=np.int64)]) if others else self.labels
        self._others_ends = np.cumsum([len(record.others) for record in records], dtype=np.int64) if others else None
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
        others = tuple(self._others_of(index).tolist())
        return Record(path, label if label >= 0 else None, frames if frames >= 0 else None, self.format, others)

    @property
    def is_multi_label(self) -> bool:
        """Whether a record has several classes."""
        return self._others_ends is not None

    def _others_of(self, index: int) -> np.ndarray:
        if self._others_ends is None:
            return self.all_labels[:0]
        start = self._others_ends[index - 1] if index else 0
        return self.all_labels[len(self) + start : len(self) + self._others_ends[index]]

    def targets(self, num_classes: int) -> np.ndarray:
        """Return the classes of every record, `(R, num_classes)` bool."""
        targets = np.zeros((len(self), num_classes), bool)
        labelled = np.flatnonzero(self.labels >= 0)
        targets[labelled, self.labels[labelled]] = True
        targets[np.repeat(np.arange(len(self)), self.count_others()), self.all_labels[len(self) :]] = True
        return targets

    def count_others(self) -> np.ndarray:
        """Return how many classes beside the first every record has, `(R,)`."""
        return np.zeros(len(self), np.int64) if self._others_ends is None else np.diff(self._others_ends, prepend=0)

    def same_list(self, index: int) -> range:
        """Return the indices of the records in a record's list: all of them."""
        return range(len(self))

    def select(self, indices: Sequence[int] | np.ndarray) -> Records:
        """Return some of the records, in this order, each with its line."""
        return Records([self[int(index)] for index in indices], self.format, self.lines[indices].tolist())

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
        digest.update(self.all_labels.tobytes())
        if self._others_ends is not None:
            digest.update(self._others_ends.tobytes())
        digest.update(self._num_frames.tobytes())
        return digest.hexdigest()


def read_list(path: str | Path, format: ListFormat = "video", root: str | Path = "") -> Records:
    """Read a list file.

    Args:
        path: the list, or its URL, or a folder of class folders.
        format: format of its lines (see the head of this file).
        root: folder or URL that relative paths are joined to; empty: the working directory.

    Raises:
        ListError: the list is missing or empty, or a line does not match its format (the message has its number).
    """
    if format not in get_args(ListFormat):
        raise ListError(f"data.format is {format!r}; expected one of {', '.join(get_args(ListFormat))}")
    if Path(root, path).is_dir():
        return _read_tree(Path(root, path), format)
    text = read_text(path, "the list")
    _refuse_other_files(path, text)
    records: list[Record] = []
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or (line[0] == "#" and not _names_file(line, format, root)):
            continue
        try:
            place, record = _read_line(line, format, root, is_first=not records)
        except ValueError as error:
            raise ListError(f"{path}, line {number}: {error}; the line is {line!r:.300}") from None
        records.append(replace(record, path=place))
        lines.append(number - 1)
    if not records:
        raise ListError(f"the list {path} holds no records")
    urls = (record.path for record in records if remote.is_url(record.path))
    for url in {url.partition("://")[0]: url for url in urls}.values():
        remote.check_url(url)
    return Records(records, format, lines)


def _read_tree(folder: Path, format: ListFormat) -> Records:
    """Return the files (for `frames`, the folders of pictures) at any depth in each class folder, by name."""
    classes = class_folders(folder, format)
    return Records([Record(path, n, None, format) for n, name in enumerate(classes) for path in classes[name]], format)


# Lines


def parse_line(line: str, format: ListFormat) -> Record:
    """Parse one line (not a comment) to a record, its path as written. Raises ValueError: what was expected."""
    if several := _SEVERAL_LABELS.fullmatch(line):
        record = parse_line(f"{several[1]} {several[2]}", format)
        others = tuple(_at_least(0, label, "label") for label in several[3].split(",")[1:])
        if record.label is None or len({record.label, *others}) <= len(others):
            raise ValueError(f"the labels are {several[2]}{several[3]}; expected different classes, each once")
        return replace(record, others=others)
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


def format_line(record: Record) -> str:
    """Return the line of a record, which `parse_line` reads back. Raises ValueError: frames without their number."""
    label = [] if record.label is None else [record.label_text]
    if record.format != "frames":
        return " ".join(map(str, [record.path, *label]))
    if record.num_frames is None:
        raise ValueError(f"{record.path} has no frame count")
    return " ".join(map(str, [record.path, *([record.num_frames, *label] if label else [0, record.num_frames])]))


_SEVERAL_LABELS = re.compile(r"(.*[^\s,;|:])\s+(\d+)((?:,\d+)+)", re.DOTALL)  # path 3,7


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


# Lines that can be read in two ways


def _exists(path: str) -> bool:
    """Return whether a record is there: a file, a folder, or a member of an archive."""
    parts = shards.split_path(path)
    if parts is not None:
        return shards.holds(*parts)
    return remote.exists(path) if remote.is_url(path) else os.path.exists(path)


def _as_stored(path: str, root: str | Path) -> str:
    """Return a listed path under the root, as the disk has it.

    Bytes that are no UTF-8 may be cp1252 in the list alone, and backslashes Windows'.
    """
    written = remote.join(root, path)
    if "\\" not in path and path.isprintable():  # a byte that is no UTF-8 is not printable
        return written
    others = [readable(path), path.replace("\\", "/"), readable(path).replace("\\", "/")]
    places = [written, *(remote.join(root, each) for each in others)]
    return next((place for place in places if _exists(place)), written)


def _read_line(line: str, format: ListFormat, root: str | Path, is_first: bool) -> tuple[str, Record]:
    """Return the place of a line's record, and the record as written. Raises ValueError: what was expected."""
    several = _SEVERAL_LABELS.fullmatch(line)
    if several and _exists(os.path.join(root, line)):  # a file of such a name, without a label
        return _as_stored(line, root), Record(line, format=format)
    single = f"{several[1]} {several[2]}" if several else line
    doubt = _other_form(single, format, is_first)
    try:
        record = parse_line(line, format)
    except ValueError as error:
        raise ValueError(doubt or error) from None
    place = _as_stored(record.path, root)
    doubt = doubt or _several_numbers(single, record, root)
    if doubt and not _exists(place):
        raise ValueError(doubt)
    return place, record


def _several_numbers(line: str, record: Record, root: str | Path) -> str | None:
    """Return what is wrong with a line of more numbers than its form has, and what to do; None: they are the name's.

    A name may end in a number (`take 2`), and its file may be missing like any other. With `take` on the disk, or with
    two numbers, a missing file is more likely one of several labels.
    """
    head, behind = _split_off_integers(record.path)
    if not behind or (len(behind) == 1 and not _exists(remote.join(root, head))):
        return None
    numbers = _split_off_integers(line)[1]
    return (
        f"{len(numbers)} numbers stand behind {head!r} ({' '.join(numbers)}), and no {record.path!r} is there; "
        f"expected {_EXPECTED[record.format]!r}: a record is read whole, and has one label"
    )


def _names_file(line: str, format: ListFormat, root: str | Path) -> bool:
    """Return whether a line that begins with # is the record of a file whose name does (HMDB51 has such names)."""
    try:
        return _exists(remote.join(root, parse_line(line, format).path))
    except ValueError:
        return False


_SUFFIXES = "|".join(sorted(suffix[1:] for suffix in {*VIDEO_SUFFIXES, *IMAGE_SUFFIXES}))
_BEHIND_THE_NAME = re.compile(rf"""^.*\.(?:{_SUFFIXES})(?=[\s,;|"'])(.*)$""", re.IGNORECASE)
_SEPARATED = re.compile(
    r"""^.+?["']?\s*(,|;|\||::)\s*["']?-?\d+["']?(?:\s+\d+)*$"""  # before the last field, or behind a first number
    r"""|^["']?\d+["']?\s*([,;|])"""
)
_OF_FILES = {"path", "file", "filename", "filepath", "video", "videos", "videopath", "videoname", "vid", "clip",
             "image", "img", "name", "id", "folder", "dir"}  # fmt: skip
_OF_OTHERS = {"label", "labels", "class", "category", "target", "action", "start", "end", "time", "num", "frame",
              "frames", "count", "total", "duration", "length", "fps", "width", "height", "split", "subset", "index",
              "is", "cc", "youtube", "caption", "text"}  # fmt: skip
_EXPECTED = {"video": "path label", "image": "path label", "frames": "folder count label"}


def _other_form(line: str, format: ListFormat, is_first: bool) -> str | None:
    """Return what is wrong with a line of another program's form, and what to do; None: it looks like ours."""
    expected = f"expected {_EXPECTED[format]!r}, a space before each number"
    if is_first and _is_header(line):
        return f"a header; {expected}: remove it, and write the columns of the other lines in this form"
    if found := _SEPARATED.match(line):
        mark = found[1] or found[2]
        return (
            f"{mark!r} separates the fields; {expected}, and no quotes: sed 's/{mark}/ /g' FILE > list.txt writes that"
        )
    if format == "frames" or not (found := _BEHIND_THE_NAME.match(line)) or "/" in found[1]:
        return None
    behind = found[1].strip()
    if behind[0] in ",;|\"'":
        return f"{behind[:20]!r} stands behind the file name; {expected}, without quotes"
    numbers = behind.split()
    if not all(number.removeprefix("-").isdecimal() for number in numbers):
        return f"{behind[:80]!r} stands behind the file name; {expected}: classes are numbers, from 0"
    if len(numbers) == 1 or (format == "video" and len(numbers) == 2 and numbers[1] == "-1"):
        return None
    return (
        f"{len(numbers)} numbers stand behind the file name ({behind[:40]}); {expected}: a record is read "
        "whole, and has one label"
    )


def _is_header(line: str) -> bool:
    """Return whether a line names columns: of words that columns have, or of any words with commas between."""
    words = set(re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", line).lower()))
    if re.search(r"[\d/.#]", line) or not words & _OF_FILES:
        return False
    return words <= _OF_FILES | _OF_OTHERS or any(mark in line for mark in ",;|\t")


def _refuse_other_files(path: str | Path, text: str) -> None:
    """Raise a ListError for files that are often given in place of a list."""
    start = text.lstrip()[:200]
    if start.startswith("version https://git-lfs"):
        raise ListError(f"{path} is a pointer of Git LFS, not the list itself: get it with git lfs pull")
    if start.lower().startswith(("<!doctype", "<html")):
        raise ListError(f"{path} is a web page, not a list: download the file itself")
    if start[:1] in ("[", "{"):
        try:
            json.loads(text)
        except ValueError:
            return  # a name that begins so
        raise ListError(f"{path} is JSON; expected a line a record: data_lists/README.md has the forms")


def _at_least(least: int, text: str, name: str) -> int:
    if not least <= int(text) <= LARGEST:
        raise ValueError(f"the {name} is {text}, expected {least} or more" + (f" to {LARGEST}" if least == 0 else ""))
    return int(text)


def _int_array(values: list[int | None]) -> np.ndarray:
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)


# Splitting


def hold_out(names: Sequence[str], share: float) -> list[int]:
    """Return the places of the names of one class that are held out: those with the smallest SHA-256.

    Of n names `share * n` are, rounded, and of two or more at least one and not all. A name that is added, renamed or
    removed moves at most one other.
    """
    count = round(share * len(names))
    if len(names) > 1:
        count = min(max(count, 1), len(names) - 1)
    return hash_order(names)[:count]


def hash_order(names: Sequence[str]) -> list[int]:
    """Return the places of names, sorted by their SHA-256: an order that no other name changes."""
    digests = [hashlib.sha256(os.fsencode(name)).digest() for name in names]
    return sorted(range(len(names)), key=digests.__getitem__)
