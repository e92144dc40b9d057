"""Make a data list from a data set's own annotation and the folder its files lie in.

    python tools/make_list.py kinetics400 --annotation train.csv --root videos --out k400_train.txt
    python tools/make_list.py ssv2 --annotation train.json --root 20bn-something-something-v2 --out ssv2_train.txt
    python tools/make_list.py ucf101 --splits ucfTrainTestlist --part train --root UCF-101 --out ucf_train.txt
    python tools/make_list.py hmdb51 --splits testTrainMulti_7030_splits --part train --root hmdb51 --out hmdb_train.txt
    python tools/make_list.py folders --root my_videos --out mine.txt

Written: LIST (`path label`, paths relative to --root), beside it the label names (train.txt -> train.labels.txt), and,
if there are any, the annotated videos that are not on the disk (train.missing.txt). Files are found by name anywhere
under --root, so flat folders and class folders both do. No video is opened: tools/check_videos.py does that.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from video_convmae.data.options import IMAGE_SUFFIXES
from video_convmae.data.records import ListError, read_list

DATA_LISTS = Path(__file__).parents[1] / "data_lists"
SUFFIXES = {
    "video": (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp"),
    "image": IMAGE_SUFFIXES,
}
SHOWN = 3  # names in a message, so that it stays a message


@dataclass(frozen=True)
class Entry:
    """One annotated video: the names its file may have (without suffix), best first, and its class, if it has one."""

    names: tuple[str, ...]
    label: str | None = None


@dataclass(frozen=True)
class Annotation:
    """What a data set says of one split. A class's number is its place in `labels`."""

    entries: list[Entry]
    labels: list[str]


@dataclass
class Tree:
    """The files under a folder: by name without suffix, and how many others there are of each suffix."""

    root: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return sum(len(paths) for paths in self.files.values())


@dataclass(frozen=True)
class Matches:
    """Rows of a list (path, class number), and what did not become one."""

    rows: list[tuple[str, int | None]]
    missing: list[str]
    unlisted: int
    repeated: list[str]


# What the data sets' annotations say


def kinetics400(annotation: Path, labels: Path | None = None) -> Annotation:
    """The csv of Kinetics-400: label, youtube_id, time_start, time_end; the official test split has no label.

    The names in use are `<id>_000010_000020.mp4` (CVDF, the official crawler) and `<id>.mp4`.
    """
    names = read_labels(labels or DATA_LISTS / "kinetics400.txt")
    plain = {_plain(name): name for name in names}
    entries = []
    with _reading(annotation, newline="") as file:
        rows = csv.DictReader(file)
        _expect_columns(annotation, rows.fieldnames, ("youtube_id", "time_start", "time_end"))
        for row in rows:
            where = f"{annotation}, line {rows.line_num}"
            label = plain.get(_plain(row["label"])) if row.get("label") else None
            if row.get("label") and label is None:
                raise ListError(f"{where}: the class {row['label']!r} is none of the {len(names)} known; give --labels")
            try:
                span = f"_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
            except (TypeError, ValueError):
                raise ListError(
                    f"{where}: the times are {row['time_start']!r} and {row['time_end']!r}; expected seconds"
                ) from None
            entries.append(Entry((row["youtube_id"] + span, row["youtube_id"]), label))
    return Annotation(entries, names)


def ssv2(annotation: Path, labels: Path | None = None) -> Annotation:
    """A json of Something-Something V2: [{"id", "template"}], the template being the class with [brackets].

    `labels`: the official json of {class: number}; by default the names in data_lists/, which are in that order.
    """
    names = read_labels(labels or DATA_LISTS / "something_something_v2.txt")
    known = set(names)
    entries = []
    for number, video in enumerate(_read_json(annotation, list), start=1):
        where = f"{annotation}, video {number}"
        if not isinstance(video, dict) or "id" not in video:
            raise ListError(f"{where}: it is {video!r:.80}; expected an object with an 'id'")
        label = video.get("template")
        if label is not None:
            label = label.replace("[", "").replace("]", "")
            if label not in known:
                raise ListError(f"{where}: the class {label!r} is none of the {len(names)} known; give --labels")
        entries.append(Entry((str(video["id"]),), label))
    return Annotation(entries, names)


def ucf101(splits: Path, part: str, fold: int = 1) -> Annotation:
    """The official lists of UCF101: classInd.txt, trainlist01.txt, testlist01.txt and so on."""
    names = []
    for where, line in _lines(splits / "classInd.txt"):
        number, _, name = line.partition(" ")
        if number != str(len(names) + 1) or not name:
            raise ListError(f"{where}: it is {line!r}; expected '{len(names) + 1} ClassName'")
        names.append(name)
    entries = []
    for where, line in _lines(splits / f"{part}list{fold:02d}.txt"):
        label, slash, file = line.partition("/")
        if not slash or label not in names:
            raise ListError(f"{where}: it is {line!r}; expected 'ClassName/v_ClassName_g01_c01.avi' of a known class")
        file = re.sub(r"\s+\d+$", "", file)  # training lists repeat the class's number
        entries.append(Entry((os.path.splitext(file)[0],), label))
    return Annotation(entries, names)


def hmdb51(splits: Path, part: str, fold: int = 1) -> Annotation:
    """The official splits of HMDB51: `<class>_test_split1.txt` with lines 'file.avi 0|1|2'; 1 = train, 2 = test."""
    ending = f"_test_split{fold}.txt"
    files = sorted(path for path in _listing(splits) if path.name.endswith(ending))
    if not files:
        raise ListError(f"no files named <class>{ending} in {splits}; expected those of testTrainMulti_7030_splits")
    names = [path.name.removesuffix(ending) for path in files]
    wanted = {"train": "1", "test": "2"}[part]
    entries = []
    for label, path in zip(names, files):
        for where, line in _lines(path):
            file, _, flag = line.rpartition(" ")
            if flag not in ("0", "1", "2"):
                raise ListError(f"{where}: it is {line!r}; expected 'file.avi' and 0, 1 (train) or 2 (test)")
            if flag == wanted:
                entries.append(Entry((os.path.splitext(file.strip())[0],), label))
    return Annotation(entries, names)


def read_labels(path: Path) -> list[str]:
    """Class names in the order of their numbers: a text file with one a line, or a json of {name: number}."""
    if path.suffix != ".json":
        return [line for _, line in _lines(path)]
    numbers = {name: int(number) for name, number in _read_json(path, dict).items()}
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise ListError(f"{path}: its {len(numbers)} classes are not numbered 0 to {len(numbers) - 1}, each once")
    return sorted(numbers, key=numbers.__getitem__)


# What is on the disk


def scan(root: Path, suffixes: Iterable[str] = SUFFIXES["video"]) -> Tree:
    """Every file under a folder, links followed; hidden files and folders are passed over."""
    if not root.is_dir():
        raise ListError(f"--root {root} is not a folder")
    suffixes = tuple(suffixes)
    tree, entered = Tree(root), set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_raise):
        identity = os.stat(folder)
        if (identity.st_dev, identity.st_ino) in entered:  # a link to a folder above would never end
            folders.clear()
            continue
        entered.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in suffixes:
                path = os.path.relpath(os.path.join(folder, name), root)
                tree.files.setdefault(_composed(stem), []).append(path)
            else:
                tree.others[suffix.lower() or "no suffix"] += 1
    return tree


def match(annotation: Annotation, tree: Tree) -> Matches:
    """Find each annotated video on the disk. Of several files of one name, that in the folder of its class is taken."""
    numbers = {label: number for number, label in enumerate(annotation.labels)}
    rows, missing, repeated = [], [], []
    for entry in annotation.entries:
        paths = next((paths for name in entry.names if (paths := tree.files.get(_composed(name)))), [])
        if not paths:
            missing.append(entry.names[0])
            continue
        in_class = [path for path in paths if entry.label and _plain(Path(path).parent.name) == _plain(entry.label)]
        candidates = in_class or paths
        if len(candidates) > 1:
            repeated.append(candidates[0])
        rows.append((candidates[0], None if entry.label is None else numbers[entry.label]))
    unlisted = len(tree) - len({path for path, _ in rows})
    return Matches(rows, missing, unlisted, repeated)


def folders(tree: Tree, part: str, fraction: float, seed: int) -> tuple[Matches, list[str]]:
    """A tree of one folder a class: every file of the part, and the class names (the folders' names, sorted).

    `fraction` of each class, drawn by `seed`, is the part "validation", the others are "train"; the part "all" is both.
    """
    if not 0 <= fraction < 1:
        raise ListError(f"--validation-fraction is {fraction}; expected 0 or more and less than 1")
    if (part == "all") != (fraction == 0):
        raise ListError(f"--part {part} with --validation-fraction {fraction}: a split needs both, the whole tree none")
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
            (path, number) for i, path in enumerate(paths) if part == "all" or (i in held_out) == (part != "train")
        ]
    listable = sum(len(paths) for paths in classes.values())
    return Matches(rows, [], len(tree) - listable, []), sorted(classes)


# What is written


def write(out: Path, rows: list[tuple[str, int | None]], labels: list[str], format: str = "video") -> None:
    """Write the list and its label names; the list appears only if `read_list` reads these same rows back from it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    _write_lines(partial, [path if label is None else f"{path} {label}" for path, label in rows])
    try:
        _check_read_back(partial, rows, format)
        _write_lines(labels_file(out), labels)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def labels_file(out: Path) -> Path:
    """Where the label names of a list lie: train.txt -> train.labels.txt."""
    return _beside(out, "labels")


def missing_file(out: Path) -> Path:
    """Where the annotated videos lie that were not found: train.txt -> train.missing.txt."""
    return _beside(out, "missing")


def report(out: Path, matches: Matches, labels: list[str], tree: Tree) -> str:
    """What was listed and what was not, for the reader of the terminal."""
    used = {label for _, label in matches.rows if label is not None}
    lines = [f"{len(matches.rows):,} listed in {out}, of {len(used)} classes (names: {labels_file(out)})"]
    if used and len(used) < len(labels):
        lines.append(f"{len(labels) - len(used)} of the {len(labels)} classes have no video here")
    if matches.missing:
        names = f"their names: {missing_file(out)}"
        lines.append(f"{len(matches.missing):,} in the annotation are missing under {tree.root} ({names})")
    else:
        lines.append("0 missing")
    lines.append(f"{matches.unlisted:,} files under {tree.root} were not listed")
    if matches.repeated:
        lines.append(
            f"{len(matches.repeated):,} are there more than once, the first was taken: {_few(matches.repeated)}"
        )
    if tree.others:
        others = ", ".join(f"{suffix} {count:,}" for suffix, count in tree.others.most_common(8))
        lines.append(f"{sum(tree.others.values()):,} files of other kinds were passed over ({others})")
    return "\n".join(lines)


def make_list(arguments: argparse.Namespace) -> str:
    """Do what the command line asks; returns the report."""
    format = getattr(arguments, "format", "video")
    tree = scan(arguments.root, SUFFIXES[format])
    if arguments.dataset == "folders":
        matches, labels = folders(tree, arguments.part, arguments.validation_fraction, arguments.seed)
        expected = "expected a folder a class with files in it"
    else:
        annotation = arguments.read(arguments)
        matches, labels = match(annotation, tree), annotation.labels
        expected = f"the annotation has {_few([entry.names[0] for entry in annotation.entries])}"
    if not matches.rows:
        found = [paths[0] for paths in list(tree.files.values())[:SHOWN]]
        raise ListError(f"nothing to list: {len(tree)} {format} files under {tree.root} ({_few(found)}); {expected}")
    write(arguments.out, matches.rows, labels, format)
    missing_file(arguments.out).unlink(missing_ok=True)
    if matches.missing:
        _write_lines(missing_file(arguments.out), matches.missing)
    return report(arguments.out, matches, labels, tree)


def _beside(out: Path, what: str) -> Path:
    name = out.stem if out.suffix in (".txt", ".csv", ".list") else out.name  # k400.train and k400.val are two lists
    return out.with_name(f"{name}.{what}.txt")


def _check_read_back(path: Path, rows: list[tuple[str, int | None]], format: str) -> None:
    """Hold what was written against what is read. Which names a list cannot hold, only its reader knows."""
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


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    """`surrogateescape`: names that are not UTF-8 are written as the bytes they are."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def _reading(path: Path, **options: str) -> TextIO:
    try:
        return open(path, encoding="utf-8-sig", errors="surrogateescape", **options)
    except OSError as error:
        raise ListError(f"cannot read {path}: {error.strerror or error}") from error


def _lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a file that hold something, each with its place for messages: ('classInd.txt, line 3', 'text')."""
    with _reading(path) as file:
        lines = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(file, start=1)]
    return [(where, line) for where, line in lines if line]


def _read_json(path: Path, kind: type) -> list | dict:
    with _reading(path) as file:
        try:
            value = json.load(file)
        except ValueError as error:
            raise ListError(f"{path} is not json: {error}") from error
    if not isinstance(value, kind):
        raise ListError(f"{path} holds a {type(value).__name__}; expected a {kind.__name__}")
    return value


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ListError(f"cannot read the folder {folder}: {error.strerror or error}") from error


def _expect_columns(path: Path, columns: Iterable[str] | None, expected: Iterable[str]) -> None:
    absent = [name for name in expected if name not in (columns or ())]
    if absent:
        raise ListError(f"{path} has the columns {list(columns or ())}; expected also {', '.join(absent)}")


def _composed(name: str) -> str:
    """One form of a name with accents, which macOS writes in two characters and most others in one."""
    return unicodedata.normalize("NFC", name)


def _plain(name: str) -> str:
    """Class names as folders spell them: 'air_drumming' is 'air drumming'."""
    return _composed(name).replace("_", " ").casefold()


def _few(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") or "none"


def _raise(error: OSError) -> None:
    raise ListError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")

    def add(name: str, help: str, read: Callable[[argparse.Namespace], Annotation] | None) -> argparse.ArgumentParser:
        dataset = datasets.add_parser(name, help=help, description=help)
        dataset.set_defaults(read=read)
        dataset.add_argument("--root", type=Path, required=True, help="folder the files lie in, at any depth")
        dataset.add_argument("--out", type=Path, required=True, help="the list to write")
        return dataset

    for name, read, files, order in (
        ("kinetics400", kinetics400, "the csv of the split (train.csv, val.csv)", "a class a line"),
        (
            "ssv2",
            ssv2,
            "the json of the split (train.json, validation.json)",
            "the official labels.json, or a class a line",
        ),
    ):
        dataset = add(name, f"from {files}", lambda a, read=read: read(a.annotation, a.labels))
        dataset.add_argument("--annotation", type=Path, required=True, help=files)
        dataset.add_argument("--labels", type=Path, help=f"{order}; the default is in data_lists/")
    for name, read, files in (
        ("ucf101", ucf101, "ucfTrainTestlist"),
        ("hmdb51", hmdb51, "testTrainMulti_7030_splits"),
    ):
        dataset = add(name, f"from the folder {files}", lambda a, read=read: read(a.splits, a.part, a.fold))
        dataset.add_argument("--splits", type=Path, required=True, help=f"the folder {files}")
        dataset.add_argument("--part", choices=("train", "test"), required=True, help="which part to list")
        dataset.add_argument("--fold", type=int, choices=(1, 2, 3), default=1, help="official split (default 1)")
    dataset = add("folders", "any tree of one folder a class", None)
    dataset.add_argument("--format", choices=tuple(SUFFIXES), default="video", help="kind of files (default video)")
    dataset.add_argument(
        "--part", choices=("all", "train", "validation"), default="all", help="which part (default all)"
    )
    dataset.add_argument("--validation-fraction", type=float, default=0.0, help="of each class, kept out of train")
    dataset.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        print(make_list(arguments))
    except ListError as error:
        parser.exit(1, f"make_list: {error}\n")
