"""Make a data list from a data set's own annotation and the folder that holds its files.

The list is written with the names of its classes (train.txt -> train.labels.txt) and, if there are any, the annotated
files that are not on the disk (train.missing.txt). Files are found by name anywhere under the folder, so flat folders
and class folders both work. No video is opened: check.py does that.
"""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

import numpy as np

from video_convmae.atomic import replacing
from video_convmae.data.options import IMAGE_SUFFIXES, ListFormat
from video_convmae.data.records import ListError, read_list
from video_convmae.prepare.options import LIST_TEXT
from video_convmae.shipped import shipped_labels

FileKind = Literal["video", "image"]
SUFFIXES: dict[FileKind, tuple[str, ...]] = {
    "video": (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp"),
    "image": IMAGE_SUFFIXES,
}
EXAMPLES = 3  # names quoted in a message


@dataclass(frozen=True)
class Entry:
    """One annotated file.

    Attributes:
        names: possible file names without suffix, in order of preference.
        label: class name; None in a test split.
    """

    names: tuple[str, ...]
    label: str | None = None


@dataclass(frozen=True)
class Annotation:
    """Annotation of one split; the number of a class is its index in `labels`."""

    entries: list[Entry]
    labels: list[str]


@dataclass
class Tree:
    """Files under a folder.

    Attributes:
        root: the folder.
        kind: files that are listed.
        files: paths relative to `root`, by file name without suffix.
        others: number of files of other kinds, by suffix.
    """

    root: Path
    kind: FileKind = "video"
    files: dict[str, list[str]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return sum(len(paths) for paths in self.files.values())


@dataclass(frozen=True)
class Listing:
    """Contents of a list, and the files and annotations that are not in it.

    Attributes:
        rows: path relative to the root, and class number; None without a label.
        labels: class names.
        missing: names of annotated files that are not on the disk.
        unlisted: number of files that have no row.
        repeated: paths of rows whose file exists more than once.
    """

    rows: list[tuple[str, int | None]]
    labels: list[str]
    missing: list[str] = field(default_factory=list)
    unlisted: int = 0
    repeated: list[str] = field(default_factory=list)


# ---- annotations of the data sets ------------------------------------------------------------------------------------


def read_kinetics400(annotation: Path, labels: Path | None = None) -> Annotation:
    """Read a CSV file of Kinetics-400: label, youtube_id, time_start, time_end; the official test split has no label.

    Files are named `<id>_000010_000020.mp4` (CVDF, the official crawler) or `<id>.mp4`.

    Args:
        annotation: the CSV file.
        labels: file for `read_labels`; by default the shipped names.

    Raises:
        ListError: a file cannot be read, or a row holds an unknown class or no times.
    """
    names = read_labels(labels or shipped_labels("kinetics400"))
    by_simple_name = {_simplify(name): name for name in names}
    entries = []
    with _open_text(annotation, newline="") as file:
        rows = csv.DictReader(file)
        _expect_columns(annotation, rows.fieldnames, ("youtube_id", "time_start", "time_end"))
        for row in rows:
            where = f"{annotation}, line {rows.line_num}"
            label = by_simple_name.get(_simplify(row["label"])) if row.get("label") else None
            if row.get("label") and label is None:
                raise ListError(
                    f"{where}: the class {row['label']!r} is not among the {len(names)} known; give --labels"
                )
            try:
                span = f"_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
            except (TypeError, ValueError):
                raise ListError(
                    f"{where}: the times are {row['time_start']!r} and {row['time_end']!r}; expected seconds"
                ) from None
            entries.append(Entry((row["youtube_id"] + span, row["youtube_id"]), label))
    return Annotation(entries, names)


def read_ssv2(annotation: Path, labels: Path | None = None) -> Annotation:
    """Read a JSON file of Something-Something V2: [{"id", "template"}]; the template is the class with [brackets].

    Args:
        annotation: the JSON file.
        labels: file for `read_labels`, such as the official labels.json; by default the shipped names, in its order.

    Raises:
        ListError: a file cannot be read, or an object has no "id" or an unknown class.
    """
    names = read_labels(labels or shipped_labels("something_something_v2"))
    known = set(names)
    entries = []
    for number, video in enumerate(_read_json(annotation, list), start=1):
        where = f"{annotation}, video {number}"
        if not isinstance(video, dict) or "id" not in video:
            raise ListError(f"{where}: found {video!r:.80}; expected an object with an 'id'")
        label = video.get("template")
        if label is not None:
            label = label.replace("[", "").replace("]", "")
            if label not in known:
                raise ListError(f"{where}: class {label!r} is not among the {len(names)} known; give --labels")
        entries.append(Entry((str(video["id"]),), label))
    return Annotation(entries, names)


def read_ucf101(splits: Path, part: Literal["train", "test"], fold: int = 1) -> Annotation:
    """Read the official lists of UCF101: classInd.txt and trainlist01.txt, testlist01.txt, trainlist02.txt, ...

    Args:
        splits: folder of these files, ucfTrainTestlist.
        part: train or test.
        fold: official split, 1 to 3.

    Raises:
        ListError: a file is missing, or a line has another form.
    """
    names: list[str] = []
    for where, line in _lines(splits / "classInd.txt"):
        number, _, name = line.partition(" ")
        if number != str(len(names) + 1) or not name:
            raise ListError(f"{where}: found {line!r}; expected '{len(names) + 1} ClassName'")
        names.append(name)
    entries = []
    for where, line in _lines(splits / f"{part}list{fold:02d}.txt"):
        label, slash, file = line.partition("/")
        if not slash or label not in names:
            raise ListError(f"{where}: found {line!r}; expected 'ClassName/v_ClassName_g01_c01.avi' of a known class")
        file = re.sub(r"\s+\d+$", "", file)  # only training lists end with the class number
        entries.append(Entry((os.path.splitext(file)[0],), label))
    return Annotation(entries, names)


def read_hmdb51(splits: Path, part: Literal["train", "test"], fold: int = 1) -> Annotation:
    """Read the official splits of HMDB51: `<class>_test_split1.txt` with lines 'file.avi 0|1|2'; 1 = train, 2 = test.

    Args:
        splits: folder of these files, testTrainMulti_7030_splits.
        part: train or test.
        fold: official split, 1 to 3.

    Raises:
        ListError: the files are missing, or a line has another form.
    """
    ending = f"_test_split{fold}.txt"
    try:
        files = sorted(path for path in splits.iterdir() if path.name.endswith(ending))
    except OSError as error:
        _raise_unreadable(error)
    if not files:
        raise ListError(f"no files named <class>{ending} in {splits}; expected the folder testTrainMulti_7030_splits")
    names = [path.name.removesuffix(ending) for path in files]
    wanted = {"train": "1", "test": "2"}[part]
    entries = []
    for label, path in zip(names, files):
        for where, line in _lines(path):
            file, _, flag = line.rpartition(" ")
            if flag not in ("0", "1", "2"):
                raise ListError(f"{where}: found {line!r}; expected 'file.avi' and 0, 1 (train) or 2 (test)")
            if flag == wanted:
                entries.append(Entry((os.path.splitext(file.strip())[0],), label))
    return Annotation(entries, names)


def read_labels(path: Path) -> list[str]:
    """Return class names in the order of their numbers, from a text file of one a line or a JSON file {name: number}.

    Raises:
        ListError: the file cannot be read, or its numbers are not 0 to n - 1.
    """
    if path.suffix != ".json":
        return [line for _, line in _lines(path)]
    numbers = {name: int(number) for name, number in _read_json(path, dict).items()}
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise ListError(f"{path}: its {len(numbers)} classes are not numbered 0 to {len(numbers) - 1}, each once")
    return sorted(numbers, key=numbers.__getitem__)


# ---- files on the disk -----------------------------------------------------------------------------------------------


def scan_folder(root: Path, kind: FileKind = "video") -> Tree:
    """Find every file under a folder. Links are followed; hidden files and folders are skipped.

    Raises:
        ListError: `root` or a folder below it cannot be read.
    """
    if not root.is_dir():
        raise ListError(f"--root {root} is not a folder")
    tree, entered = Tree(root, kind), set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        status = os.stat(folder)
        identity = status.st_dev, status.st_ino
        if identity in entered:  # a link to a parent folder is an endless loop
            folders.clear()
            continue
        entered.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES[kind]:
                path = os.path.relpath(os.path.join(folder, name), root)
                tree.files.setdefault(_normalise_accents(stem), []).append(path)
            else:
                tree.others[suffix.lower() or "no suffix"] += 1
    return tree


def match_files(annotation: Annotation, tree: Tree) -> Listing:
    """Find each annotated file in a tree. Among files of the same name, one in the folder of its class is preferred.

    Raises:
        ListError: none of them is there.
    """
    numbers = {label: number for number, label in enumerate(annotation.labels)}
    rows: list[tuple[str, int | None]] = []
    missing, repeated = [], []
    for entry in annotation.entries:
        paths = next((paths for name in entry.names if (paths := tree.files.get(_normalise_accents(name)))), [])
        if not paths:
            missing.append(entry.names[0])
            continue
        label = entry.label
        in_class = [path for path in paths if label and _simplify(Path(path).parent.name) == _simplify(label)]
        candidates = in_class or paths
        if len(candidates) > 1:
            repeated.append(candidates[0])
        rows.append((candidates[0], None if label is None else numbers[label]))
    if not rows:
        _raise_empty(tree, f"the annotation has {quote_names([entry.names[0] for entry in annotation.entries])}")
    unlisted = len(tree) - len({path for path, _ in rows})
    return Listing(rows, annotation.labels, missing, unlisted, repeated)


def list_folders(
    tree: Tree, part: Literal["all", "train", "validation"] = "all", fraction: float = 0.0, seed: int = 0
) -> Listing:
    """List a tree of class folders; class names are the sorted names of the folders.

    Args:
        tree: the files.
        part: "validation" is a random `fraction` of each class, "train" the rest, "all" both.
        fraction: 0 if and only if `part` is "all".
        seed: seed of the split.

    Raises:
        ListError: `fraction` does not fit, or no file is in a class folder.
    """
    if not 0 <= fraction < 1:
        raise ListError(f"--validation-fraction is {fraction}; expected 0 or more and less than 1")
    if (part == "all") != (fraction == 0):
        raise ListError(
            f"--part {part} with --validation-fraction {fraction}: a split needs both, the whole tree neither"
        )
    classes: dict[str, list[str]] = {}
    for paths in tree.files.values():
        for path in paths:
            if len(parts := Path(path).parts) > 1:
                classes.setdefault(parts[0], []).append(path)
    rows: list[tuple[str, int | None]] = []
    for number, label in enumerate(sorted(classes)):
        paths = sorted(classes[label])
        order = np.random.default_rng([seed, number]).permutation(len(paths))
        held_out = set(order[: round(fraction * len(paths))].tolist())
        rows += [
            (path, number) for i, path in enumerate(paths) if part == "all" or (i in held_out) == (part == "validation")
        ]
    if not rows:
        _raise_empty(tree, "expected a folder a class with files in it")
    in_classes = sum(len(paths) for paths in classes.values())
    return Listing(rows, sorted(classes), unlisted=len(tree) - in_classes)


# ---- files written ---------------------------------------------------------------------------------------------------


def write_listing(out: Path, listing: Listing, kind: FileKind = "video") -> None:
    """Write the list, its class names and the names of missing files, and remove those names if none is missing.

    Raises:
        ListError: as `write_list`.
    """
    write_list(out, listing.rows, listing.labels, kind)
    if listing.missing:
        with replacing(missing_file(out), **LIST_TEXT) as file:
            file.writelines(f"{name}\n" for name in listing.missing)
    else:
        missing_file(out).unlink(missing_ok=True)


def write_list(
    out: Path, rows: Sequence[tuple[str, int | None]], labels: Sequence[str], format: ListFormat = "video"
) -> None:
    """Write a list and its class names; the list is replaced only if `read_list` reads the same rows back.

    Raises:
        ListError: the list cannot hold one of the paths.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, **LIST_TEXT) as file:
        file.writelines(f"{path}\n" if label is None else f"{path} {label}\n" for path, label in rows)
        file.flush()
        _check_read_back(Path(file.name), rows, format)
        with replacing(labels_file(out), **LIST_TEXT) as names:
            names.writelines(f"{label}\n" for label in labels)


def labels_file(out: Path) -> Path:
    """Return the path of a list's class names: train.txt -> train.labels.txt."""
    return _beside(out, "labels")


def missing_file(out: Path) -> Path:
    """Return the path of the names of annotated files that were not found: train.txt -> train.missing.txt."""
    return _beside(out, "missing")


def quote_names(names: Sequence[str]) -> str:
    """Quote the first few names for a message."""
    return ", ".join(repr(name) for name in names[:EXAMPLES]) + (", ..." if len(names) > EXAMPLES else "") or "none"


def _beside(out: Path, kind: str) -> Path:
    name = out.stem if out.suffix in (".txt", ".csv", ".list") else out.name  # k400.train and k400.val are two lists
    return out.with_name(f"{name}.{kind}.txt")


def _check_read_back(path: Path, rows: Sequence[tuple[str, int | None]], format: ListFormat) -> None:
    """Compare a written list with its rows. Only the reader of lists knows the names that a list cannot hold."""
    try:
        records = list(read_list(path, format))
        problem = ""
    except ListError as error:
        records, problem = [], f" ({error})"
    read = [(record.path, record.label) for record in records]
    for index, row in enumerate(rows):
        if index >= len(read) or read[index] != row:
            found = f"reads back as {read[index]!r}" if index < len(read) else f"does not read back{problem}"
            raise ListError(
                f"a list file cannot hold {row[0]!r} with the label {row[1]}: it {found}. Rename it: no line break, no "
                "space at either end or twice in a row before a number, no # in front"
            )


# ---- reading annotations ---------------------------------------------------------------------------------------------


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    try:
        return open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    except OSError as error:
        raise ListError(f"cannot read {path}: {error.strerror or error}") from error


def _lines(path: Path) -> list[tuple[str, str]]:
    """Return the lines that are not empty, each after its place for messages: ('classInd.txt, line 3', 'text')."""
    with _open_text(path) as file:
        lines = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(file, start=1)]
    return [(where, line) for where, line in lines if line]


def _read_json(path: Path, kind: type) -> Any:
    with _open_text(path) as file:
        try:
            value = json.load(file)
        except ValueError as error:
            raise ListError(f"{path} is not json: {error}") from error
    if not isinstance(value, kind):
        raise ListError(f"{path} holds a {type(value).__name__}; expected a {kind.__name__}")
    return value


def _expect_columns(path: Path, columns: Iterable[str] | None, expected: Iterable[str]) -> None:
    absent = [name for name in expected if name not in (columns or ())]
    if absent:
        raise ListError(f"{path} has the columns {list(columns or ())}; expected also {', '.join(absent)}")


def _normalise_accents(name: str) -> str:
    """Return a name in Unicode's form NFC: macOS stores an accent as a character of its own, others do not."""
    return unicodedata.normalize("NFC", name)


def _simplify(name: str) -> str:
    """Return a class name in the form that folder names are compared in: 'air_drumming' equals 'air drumming'."""
    return _normalise_accents(name).replace("_", " ").casefold()


def _raise_empty(tree: Tree, expected: str) -> NoReturn:
    found = quote_names([paths[0] for paths in list(tree.files.values())[:EXAMPLES]])
    raise ListError(f"nothing to list: {len(tree)} {tree.kind} files under {tree.root} ({found}); {expected}")


def _raise_unreadable(error: OSError) -> NoReturn:
    raise ListError(f"cannot read the folder {error.filename}: {error.strerror or error}") from error
