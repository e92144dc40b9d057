"""The annotations of data sets as their authors publish them: which files there are, and of which class each is."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from video_convmae.data.folders import normalise_accents
from video_convmae.data.labels import read_names
from video_convmae.data.records import ListError
from video_convmae.data.text import read_text
from video_convmae.shipped import shipped_labels


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


def read_kinetics400(annotation: Path, labels: Path | None = None) -> Annotation:
    """Read a CSV file of Kinetics-400: label, youtube_id, time_start, time_end; the official test split has no label.

    Files are named `<id>_000010_000020.mp4` (CVDF, the official crawler) or `<id>.mp4`.

    Args:
        annotation: the CSV file.
        labels: file for `read_names`; by default the shipped names.

    Raises:
        ListError: a file cannot be read, or a row holds an unknown class or no times.
    """
    names = read_names(labels or shipped_labels("kinetics400"))
    by_simple_name = {simplify(name): name for name in names}
    entries = []
    rows = csv.DictReader(io.StringIO(read_text(annotation)))
    try:
        _expect_columns(annotation, rows.fieldnames, ("youtube_id", "time_start", "time_end"))
        for row in rows:
            where = f"{annotation}, line {rows.line_num}"
            label = by_simple_name.get(simplify(row["label"])) if row.get("label") else None
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
    except csv.Error as error:
        raise ListError(f"{annotation}, line {rows.line_num}: {error}") from error
    return Annotation(entries, names)


def read_ssv2(annotation: Path, labels: Path | None = None) -> Annotation:
    """Read a JSON file of Something-Something V2: [{"id", "template"}]; the template is the class with [brackets].

    Args:
        annotation: the JSON file.
        labels: file for `read_names`, such as the official labels.json; by default the shipped names, in its order.

    Raises:
        ListError: a file cannot be read, or an object has no "id" or an unknown class.
    """
    names = read_names(labels or shipped_labels("something_something_v2"))
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
        raise ListError(f"cannot read the folder {error.filename}: {error.strerror or error}") from error
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


def simplify(name: str) -> str:
    """Return a class name in the form that folder names are compared in: 'air_drumming' equals 'air drumming'."""
    return normalise_accents(name).replace("_", " ").casefold()


def _lines(path: Path) -> list[tuple[str, str]]:
    """Return the lines that are not empty, each after its place for messages: ('classInd.txt, line 3', 'text')."""
    lines = [line.strip() for line in read_text(path).split("\n")]
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line]


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ListError(f"{path} is not json: {error}") from error
    if not isinstance(value, kind):
        raise ListError(f"{path} holds a {type(value).__name__}; expected a {kind.__name__}")
    return value


def _expect_columns(path: Path, columns: Iterable[str] | None, expected: Iterable[str]) -> None:
    absent = [name for name in expected if name not in (columns or ())]
    if absent:
        raise ListError(f"{path} has the columns {list(columns or ())}; expected also {', '.join(absent)}")
