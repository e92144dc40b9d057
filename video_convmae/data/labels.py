"""Classes of a list: their names, and what can be wrong with their numbers.

Letters: R records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from video_convmae.shipped import find_labels

from .folders import class_folders
from .remote import exists, is_url
from .text import ListError, read_text, readable

if TYPE_CHECKING:
    from .records import Record, Records

# A list without class names may leave gaps, as a part of a data set does; more are a mistake, and no head is built.
_CLASSES_FOR_EACH_SEEN, _CLASSES_ALWAYS = 10, 100
_LIST_SUFFIXES = r"(?<=[^/])\.(txt|csv|tsv|list|lst)$"
_NAMED = 8  # ranges and names quoted in a note
_NUMBERED = re.compile(r"(\d+)[\s,;:]+\S")


# Names


def class_names(path: str | Path, root: str | Path = "", labels: str | Path | None = None) -> list[str] | None:
    """Return the names of a list's classes, class n being the n-th; None if they are not known.

    Args:
        path: the list, or a folder of class folders, as in `read_list`.
        root: as in `read_list`.
        labels: a file of names, one a line, or its URL, or the name of a shipped one (`kinetics400`). None:
            `NAME.labels.txt` beside `NAME.txt` (make-list writes it), or the names of the class folders.

    Raises:
        UserError: the file of names is missing, cannot be read (ListError) or is empty (ListError).
    """
    if Path(root, path).is_dir() and path != "":
        folders = [readable(name) for name in class_folders(Path(root, path))]
        if labels is None:
            return folders
        names = find_names(labels)
        if len(names) != len(folders):
            raise ListError(
                f"{labels} names {len(names)} classes and {Path(root, path)} holds {len(folders)} class folders; "
                "expected as many: folder n, sorted by name, is the class of line n"
            )
        if names != folders and sorted(names) == sorted(folders):
            raise ListError(
                f"{labels} names the class folders of {Path(root, path)} in another order, and folders are numbered by "
                "name; make a list that is numbered as the names are (video-convmae make-list), or give no data.labels"
            )
        return names
    if labels is None and is_url(path):
        url = f"{re.sub(_LIST_SUFFIXES, '', str(path), flags=re.IGNORECASE)}.labels.txt"
        return read_names(url) if exists(url) else None
    if labels is None:
        beside = labels_file(Path(path))
        labels = beside if beside.exists() else Path(path).with_suffix(".labels.txt")  # one for k400.train and k400.val
        if not labels.exists():
            return None
    return find_names(labels)


def find_names(labels: str | Path) -> list[str]:
    """Read class names: of a file, of its URL, or those that are shipped under a name. Raises as `class_names` does."""
    return read_names(labels if is_url(labels) else find_labels(labels))


def labels_file(path: Path) -> Path:
    """Return the place of the class names beside a list: train.txt -> train.labels.txt."""
    return path.with_name(f"{list_name(path)}.labels.txt")


def list_name(path: Path) -> str:
    """Return the name of a list without its suffix; `k400.train` and `k400.val` have none: they are two lists."""
    return re.sub(_LIST_SUFFIXES, "", path.name, flags=re.IGNORECASE)


def read_names(path: str | Path) -> list[str]:
    """Return class names in the order of their numbers: one a line, or a JSON file {name: number} or [name, ...].

    Raises:
        ListError: the file cannot be read or is empty, a line is, numbers are not 0 to n - 1, or as `check_names`.
    """
    text = read_text(path, "the class names")
    if str(path).lower().endswith(".json"):
        return _names_of_json(path, text)
    lines = [readable(line).strip() for line in text.rstrip().split("\n")]
    if not any(lines):
        raise ListError(f"the file of class names {path} is empty")
    if "" in lines:
        raise ListError(f"{path}, line {lines.index('') + 1} is empty; expected a name in each: line n names class n")
    check_names(lines, path)
    return lines


def check_names(names: Sequence[str], path: str | Path) -> None:
    """Raise a ListError if the lines of a file of names are not its classes in order.

    A comment in the first line shifts them, and numbers before all names, from 0 or 1, in another order than the lines
    contradict them. Lines in the order of their text are allowed, as class folders `1 a`, `10 j`, `2 b` are numbered
    so, and so are two classes of one name, which ImageNet has ("crane").
    """
    if names[0].startswith("#"):
        raise ListError(f"{path}, line 1 is {names[0]!r:.80}; expected the name of class 0: remove the line, or the #")
    matches = [_NUMBERED.match(name) for name in names]
    numbers = [int(match[1]) for match in matches if match is not None]
    in_order = list(range(min(numbers, default=0), min(numbers, default=0) + len(names)))
    if sorted(numbers) == in_order and in_order[0] <= 1 and numbers != in_order and list(names) != sorted(names):
        raise ListError(
            f"{path}: the numbers before its names are in another order than the lines, the first is {names[0]!r:.80}; "
            "expected class n in line n: sort the lines by these numbers and remove them"
        )


def _names_of_json(path: str | Path, text: str) -> list[str]:
    try:
        names: Any = json.loads(text)
        if not isinstance(names, dict | list):
            raise TypeError(f"a {type(names).__name__}")
        numbers = [int(number) for number in names.values()] if isinstance(names, dict) else list(range(len(names)))
    except (ValueError, TypeError) as error:
        raise ListError(f"{path} is not json of the form {{name: number}} or [name, ...]: {error}") from error
    if not numbers or sorted(numbers) != list(range(len(numbers))):
        raise ListError(f"{path}: its {len(numbers)} classes are not numbered 0 to {len(numbers) - 1}, each once")
    found = [str(name) for _, name in sorted(zip(numbers, names))]
    check_names(found, path)
    return found


# Numbers


def count_labels(*lists: Records) -> int:
    """Return the number of classes of lists without class names: the largest label and one.

    Raises:
        ListError: the largest label is far beyond the others, so it is a mistake.
    """
    labels = np.concatenate([records.all_labels for records in lists])
    seen = np.unique(labels[labels >= 0])
    count = int(seen[-1]) + 1 if len(seen) else 0
    if count > max(_CLASSES_ALWAYS, _CLASSES_FOR_EACH_SEEN * len(seen)):
        records = next(each for each in lists if count - 1 in each.all_labels)
        record = next(record for record in records if count - 1 in record.labels)
        raise ListError(
            f"{record.path} has the label {count - 1}, and the list has {len(seen)} labels, {_ranges(seen)}: with so "
            "many gaps the number of classes is not known; correct it, or say data.num_classes or data.labels"
        )
    return count


def label_array(records: Records) -> np.ndarray:
    """Return the classes of a list: `(R,)` int64, or `(R, classes)` bool where a record has several.

    Raises:
        ListError: as `count_labels`.
    """
    return records.targets(count_labels(records)) if records.is_multi_label else records.labels


def check_labels(records: Records, num_classes: int, least: int = 0) -> None:
    """Raise a ListError unless every label lies in `least` (-1: may be missing) to `num_classes - 1`."""
    if records.is_multi_label and records.all_labels.max() >= num_classes:
        record = next(record for record in records if max(record.labels, default=-1) >= num_classes)
        raise ListError(
            f"{record.path} has the label {max(record.labels)}; expected 0 to {num_classes - 1}: there are "
            f"{num_classes} classes, according to data.num_classes, the class names or the trained model"
        )
    for wrong in np.flatnonzero((records.labels < least) | (records.labels >= num_classes))[:1]:
        record = records[int(wrong)]
        if record.label is None:
            raise ListError(
                f"{record.path} has no label, like {int((records.labels < 0).sum())} of the {len(records)} records of "
                "its list; expected 'path label' in every line (data_lists/README.md)"
            )
        given = records.labels[records.labels >= 0]
        from_one = given.min() == 1 and given.max() == num_classes
        raise ListError(
            f"{record.path} has the label {record.label}; expected 0 to {num_classes - 1}: there are {num_classes} "
            "classes, according to data.num_classes, the class names or the trained model"
            + ("; the list counts from 1: subtract 1 from every label" if from_one else "")
        )


def check_single(records: Records, multi_label: bool | None) -> None:
    """Raise a ListError if a record has several classes and a model has one answer."""
    if records.is_multi_label and not multi_label:
        record = next(record for record in records if record.others)
        raise ListError(
            f"{record.path} has the classes {', '.join(map(str, record.labels))}; expected one of each record "
            "(data.multi_label is off, or the model was trained with one class of each)"
        )


def label_notes(
    num_classes: int, names: Sequence[str] | None, records: Records, validation: Records | None = None
) -> list[str]:
    """Return what a user should know of the labels of a list, a sentence each: counted from 1, gaps, unseen classes.

    Args:
        num_classes: number of classes.
        names: their names, if they are known.
        records: the list that is trained on.
        validation: the list that is tested on.
    """
    seen = np.unique(records.all_labels[records.all_labels >= 0])
    gaps = _gaps(seen, num_classes) if len(seen) else []
    notes = []
    if gaps[:1] == [(0, 0)] and not names:
        gaps = gaps[1:]
        notes.append(
            f"labels begin at 1, so the model has a class 0 without records: {num_classes} classes, not "
            f"{num_classes - 1}; if the list counts from 1, subtract 1 from every label"
        )
    if gaps:
        missing = [n for first, last in gaps[:_NAMED] for n in range(first, min(last, first + _NAMED) + 1)]
        quoted = f" ({', '.join(repr(names[n]) for n in missing[:_NAMED])})" if names else ""
        count = sum(last - first + 1 for first, last in gaps)
        notes.append(f"{count} of the {num_classes} classes have no record in the list: {_text(gaps)}{quoted}")
    if validation is not None:
        unseen = np.setdiff1d(validation.all_labels[validation.all_labels >= 0], seen)
        if len(unseen):
            notes.append(
                f"{len(unseen)} classes have records in the validation list and none in the training list: "
                f"{_ranges(unseen)}"
            )
    return notes


def path_notes(records: Sequence[Record], validation: Sequence[Record] | None = None) -> list[str]:
    """Return what a user should know of the files of lists, a sentence each: those in both, or in several lines.

    Args:
        records: the list that is trained on.
        validation: the list that is tested on.
    """
    trained: dict[str, tuple[int, ...]] = {}
    differing: dict[str, set[int]] = {}
    for record in records:
        if (first := trained.setdefault(record.path, record.labels)) != record.labels:
            differing.setdefault(record.path, {*first}).update(record.labels)
    notes = []
    if differing:
        path, labels = next(iter(differing.items()))
        line = f"{Path(path).name} {','.join(map(str, sorted(labels)))}"
        notes.append(
            f"{len(differing)} files have different classes in different lines, the first {path}, and each line is "
            f"trained on; of several classes write one line: '{line}'"
        )
    if repeated := len(records) - len(trained):
        notes.append(f"{repeated} records of the training list are files that it names before")
    if validation is not None and (seen := sum(record.path in trained for record in validation)):
        notes.append(
            f"{seen} of the {len(validation)} records of the validation list are in the training list, too: their "
            "accuracy says nothing of new files"
        )
    return notes


def _gaps(seen: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Return first and last of each range of classes that ascending labels leave out."""
    ends = np.concatenate([[-1], seen, [count]])
    return [(int(a) + 1, int(b) - 1) for a, b in pairwise(ends) if b - a > 1]


def _ranges(labels: np.ndarray) -> str:
    """Return ascending labels as text: 0 to 3, 7."""
    starts = np.flatnonzero(np.diff(labels, prepend=-2) > 1)
    return _text([(int(part[0]), int(part[-1])) for part in np.split(labels, starts[1:])])


def _text(ranges: list[tuple[int, int]]) -> str:
    parts = [f"{first} to {last}" if last > first else str(first) for first, last in ranges[:_NAMED]]
    return ", ".join(parts) + (", ..." if len(ranges) > _NAMED else "")
