"""Make a data list from the annotation of a data set (annotations.py), or its folders, and the files on the disk.

The list is written with the names of its classes (train.txt -> train.labels.txt) and, if there are any, the annotated
files that are not on the disk (train.missing.txt). Files are found by name anywhere under the folder, so flat folders
and class folders both work. No video is opened: check.py does that.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn

from video_convmae.atomic import refuse_overwriting, replacing
from video_convmae.data import remote, shards
from video_convmae.data.folders import SUFFIXES, Tree, normalise_accents
from video_convmae.data.labels import check_names, labels_file, list_name, read_names
from video_convmae.data.options import ListFormat
from video_convmae.data.records import ListError, Record, format_line, hash_order, hold_out, read_list
from video_convmae.data.text import readable
from video_convmae.prepare.annotations import Annotation, simplify
from video_convmae.prepare.options import LIST_TEXT

Part = Literal["all", "train", "validation"]
EXAMPLES = 3  # names quoted in a message


@dataclass(frozen=True)
class Listing:
    """Contents of a list, and the files and annotations that are not in it.

    Attributes:
        rows: path relative to the root, and class number; None without a label.
        labels: class names.
        missing: names of annotated files that are not on the disk.
        unlisted: number of files that have no row.
        repeated: paths of rows whose file exists more than once.
        notes: what else a user should know, a sentence each.
    """

    rows: list[tuple[str, int | None]]
    labels: list[str]
    missing: list[str] = field(default_factory=list)
    unlisted: int = 0
    repeated: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# ---- files on the disk -----------------------------------------------------------------------------------------------


def match_files(annotation: Annotation, tree: Tree) -> Listing:
    """Find each annotated file in a tree. Among files of the same name, one in the folder of its class is preferred.

    Raises:
        ListError: none of them is there.
    """
    numbers = {label: number for number, label in enumerate(annotation.labels)}
    rows: list[tuple[str, int | None]] = []
    missing, repeated = [], []
    for entry in annotation.entries:
        paths = next((paths for name in entry.names if (paths := tree.files.get(normalise_accents(name)))), [])
        if not paths:
            missing.append(entry.names[0])
            continue
        label = entry.label
        in_class = [path for path in paths if label and simplify(Path(path).parent.name) == simplify(label)]
        candidates = in_class or paths
        if len(candidates) > 1:
            repeated.append(candidates[0])
        rows.append((candidates[0], None if label is None else numbers[label]))
    if not rows:
        _raise_empty(tree, f"the annotation has {quote_names([entry.names[0] for entry in annotation.entries])}")
    unlisted = len(tree) - len({path for path, _ in rows})
    return Listing(rows, annotation.labels, missing, unlisted, repeated)


def list_folders(
    tree: Tree, part: Part = "all", fraction: float = 0.0, seed: int = 0, group: str | None = None
) -> Listing:
    """List a tree of class folders; class names are the sorted names of the folders.

    Args:
        tree: the files.
        part: "validation" is a `fraction` of each class, "train" the rest, "all" both. Which files depends on the
            SHA-256 of their paths (`hold_out`), so a file that is added moves at most one other.
        fraction: 0 if and only if `part` is "all".
        seed: hashed before each path; another one makes another split.
        group: regular expression. Files in whose paths it finds the same text (that of its groups, if it has any) come
            from one recording and stay in one part.

    Raises:
        ListError: `fraction` or `group` does not fit, or no file is in a class folder.
    """
    if not 0 <= fraction < 1:
        raise ListError(f"--validation-fraction is {fraction}; expected 0 or more and less than 1")
    if (part == "all") != (fraction == 0):
        raise ListError(
            f"--part {part} with --validation-fraction {fraction}: a split needs both, the whole tree neither"
        )
    classes = tree.classes()
    if not classes:
        _raise_empty(tree, "expected a folder a class with files in it")
    notes = [
        f"{folder} is the same folder as {other} (a link): its files are listed in both"
        for folder, other in tree.linked.items()
    ]
    held_out: set[str] = set()
    if group is not None:
        recordings, more = _recordings(classes, group)
        held_out = _split_recordings(classes, recordings, fraction, seed)
        notes += more
    elif part != "all":
        for paths in classes.values():
            held_out |= {paths[place] for place in hold_out(_seeded(paths, seed), fraction)}
        notes.append("files are split one by one; if some are cut from one recording, keep them together with --group")
    if part != "all":
        notes += _lopsided(classes, held_out)
    rows: list[tuple[str, int | None]] = [
        (path, number)
        for number, paths in enumerate(classes.values())
        for path in paths
        if part == "all" or (path in held_out) == (part == "validation")
    ]
    if not rows:
        raise ListError(
            f"--part {part} with --validation-fraction {fraction} holds no file: the classes have "
            f"{min(map(len, classes.values()))} to {max(map(len, classes.values()))} files"
        )
    in_classes = sum(len(paths) for paths in classes.values())
    return Listing(rows, [readable(name) for name in classes], unlisted=len(tree) - in_classes, notes=notes)


def list_shards(root: str | Path, kind: ListFormat = "video", labels: Path | None = None) -> Listing:
    """List the members of webdataset's shards: each video or picture, with the class that lies beside it.

    A sample is the files of one name up to its first dot: `0001.mp4` and `0001.cls`, which holds a number, or the name
    of a class. Classes that are named are numbered by name.

    Args:
        root: folder or URL of the shards (`*.tar`).
        kind: video or image.
        labels: file of the names of numbered classes.

    Raises:
        ListError: there is no shard, one cannot be read, or not all samples have classes of one kind.
    """
    paths = sorted(name for name in _shard_names(root) if name.endswith(".tar"))
    if not paths:
        raise ListError(f"--root {root} holds no shards (*.tar)")
    found: list[tuple[str, str | None]] = []
    unlisted = 0
    for path in paths:
        place = remote.join(root, path)
        try:
            names = shards.members(place)
            classes = {_key(name): name for name in names if name.endswith(".cls")}
            for name in names:
                if name.lower().endswith(SUFFIXES[kind]):
                    beside = classes.get(_key(name))
                    label = None if beside is None else shards.read_member(place, beside).decode("utf-8", "replace")
                    found.append((f"{path}#{name}", None if label is None else label.strip()))
                else:
                    unlisted += not name.endswith(".cls")
        except OSError as error:
            raise ListError(f"{place} cannot be read: {error.strerror or error}") from error
    if not found:
        raise ListError(f"the {len(paths)} shards in {root} hold no {kind} ({', '.join(SUFFIXES[kind][:4])}, ...)")
    numbers, names_of = _numbered([label for _, label in found], root)
    return Listing(
        rows=[(path, number) for (path, _), number in zip(found, numbers)],
        labels=read_names(labels) if labels is not None else names_of,
        unlisted=unlisted,
    )


def _shard_names(root: str | Path) -> list[str]:
    try:
        return remote.list_names(str(root))
    except OSError as error:
        raise ListError(f"--root {root} cannot be read: {error.strerror or error}") from error


def _key(member: str) -> str:
    """Return the part of a member's name that the files of a sample share, as webdataset cuts it."""
    folder, _, name = member.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _numbered(labels: list[str | None], root: str | Path) -> tuple[list[int | None], list[str]]:
    """Return the number of each label, and the names of the classes; none, where they are numbers."""
    missing = labels.count(None)
    if 0 < missing < len(labels):
        raise ListError(
            f"{missing} of the {len(labels)} samples in {root} have no .cls beside them; expected all or none"
        )
    if missing:
        return list(labels), []  # type: ignore[arg-type]  # all None
    texts = [str(label) for label in labels]
    if all(text.isdecimal() for text in texts):
        return [int(text) for text in texts], []
    names = sorted(set(texts))
    places = {name: number for number, name in enumerate(names)}
    return [places[text] for text in texts], names


def _recordings(classes: Mapping[str, Sequence[str]], group: str) -> tuple[dict[str, str], list[str]]:
    """Return the recording that each file comes from, and notes. A file without a match is a recording of its own."""
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ListError(f"--group {group!r} is no regular expression: {error}") from error
    found = {path: pattern.search(path) for paths in classes.values() for path in paths}
    recordings = {
        path: path if match is None else "\0".join(["", *map(str, match.groups() or [match[0]])])
        for path, match in found.items()
    }
    without = [path for path, match in found.items() if match is None]
    if len(without) == len(found):
        raise ListError(f"--group {group!r} matches none of the {len(found)} paths, such as {quote_names(without)}")
    notes = [f"{len(found):,} files of {len(set(recordings.values())):,} recordings, by --group {group!r}"]
    if without:
        notes.append(f"{len(without):,} files do not match --group and stand for themselves: {quote_names(without)}")
    return recordings, notes


def _split_recordings(
    classes: Mapping[str, Sequence[str]], recordings: Mapping[str, str], fraction: float, seed: int
) -> set[str]:
    """Return the files of a validation part that holds each recording, of whichever classes, whole or not at all.

    In the order of their hashes, a recording is taken if it brings the parts of its classes closer to `fraction`; then
    each class that has none of two or more recordings gets its smallest.
    """
    members: dict[str, list[tuple[str, str]]] = {}
    for name, paths in classes.items():
        for path in paths:
            members.setdefault(recordings[path], []).append((name, path))
    sizes = {each: Counter(name for name, _ in files) for each, files in members.items()}
    missing = {name: fraction * len(paths) for name, paths in classes.items()}  # files that the part still needs

    def gain(recording: str) -> float:
        """How much closer the part gets to the fraction, in files."""
        return sum(abs(missing[name]) - abs(missing[name] - size) for name, size in sizes[recording].items())

    taken: set[str] = set()

    def take(recording: str) -> None:
        taken.add(recording)
        for name, size in sizes[recording].items():
            missing[name] -= size

    names = list(members)
    for place in hash_order(_seeded(names, seed)):
        if gain(names[place]) > 0:
            take(names[place])
    for paths in classes.values():
        own = sorted({recordings[path] for path in paths}, key=lambda each: (sum(sizes[each].values()), each))
        if len(own) > 1 and not taken & set(own):
            take(own[0])
    return {path for recording in taken for _, path in members[recording]}


def _seeded(names: Iterable[str], seed: int) -> list[str]:
    """Return what is hashed to split names."""
    return [f"{seed}/{name}" for name in names]


def _lopsided(classes: Mapping[str, Sequence[str]], held_out: set[str]) -> list[str]:
    """Return notes on classes that lie in one part of a split only."""
    counts = {name: sum(path in held_out for path in paths) for name, paths in classes.items()}
    none = [name for name, count in counts.items() if not count]
    every = [name for name, count in counts.items() if count == len(classes[name])]
    return [
        f"{len(names)} classes have no file in the {part} part, too few files or recordings: {quote_names(names)}"
        for part, names in (("validation", none), ("training", every))
        if names
    ]


# ---- files written ---------------------------------------------------------------------------------------------------


def write_listing(
    out: Path, listing: Listing, tree: Tree, annotation: Iterable[Path] = (), labels: Path | None = None
) -> None:
    """Write the list, its class names and the names of missing files, and remove those names if none is missing.

    Args:
        out: the list.
        listing: its contents.
        tree: the files that it lists.
        annotation: files that were read, and must not be overwritten.
        labels: file of class names that was read; the new file of names may take its place, as it holds the same.

    Raises:
        UserError: an output is one of the files that were read.
        ListError: as `write_list`.
    """
    read = list(annotation)
    refuse_overwriting([out, labels_file(out), missing_file(out)], read)
    if labels is not None:
        refuse_overwriting([out, missing_file(out)], [labels])
    write_list(out, listing.rows, listing.labels, tree.kind, tree.counts, tree.root)
    if listing.missing:
        with replacing(missing_file(out), **LIST_TEXT) as file:
            file.writelines(f"{name}\n" for name in listing.missing)
    else:
        missing_file(out).unlink(missing_ok=True)


def write_list(
    out: Path,
    rows: Sequence[tuple[str, int | None]],
    labels: Sequence[str],
    format: ListFormat = "video",
    counts: Mapping[str, int] | None = None,
    root: str | Path = "",
) -> None:
    """Write a list and its class names; the list is replaced only if `read_list` reads the same rows back.

    Args:
        out: the list.
        rows: path and class number of each record.
        labels: class names.
        format: of the list.
        counts: number of frames of each path, for the format `frames`.
        root: folder that the paths are relative to.

    Raises:
        ListError: the list cannot hold one of the paths, or is the place of a folder, or the names are none of classes
            (`check_names`).
    """
    if out.is_dir():
        raise ListError(f"--out {out} is a folder; expected the list to write, such as {out / 'train.txt'}")
    if labels:
        check_names(labels, labels_file(out))
    records = [Record(path, label, (counts or {}).get(path), format) for path, label in rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, **LIST_TEXT) as file:
        file.writelines(f"{format_line(record)}\n" for record in records)
        file.flush()
        _check_read_back(Path(file.name), records, root)
        if not labels:  # numbers without names, or no classes
            labels_file(out).unlink(missing_ok=True)
            return
        with replacing(labels_file(out), encoding="utf-8", newline="\n") as names:
            names.writelines(f"{label}\n" for label in labels)


def missing_file(out: Path) -> Path:
    """Return the path of the names of annotated files that were not found: train.txt -> train.missing.txt."""
    return out.with_name(f"{list_name(out)}.missing.txt")


def quote_names(names: Sequence[str]) -> str:
    """Quote the first few names for a message."""
    return ", ".join(repr(name) for name in names[:EXAMPLES]) + (", ..." if len(names) > EXAMPLES else "") or "none"


def _check_read_back(path: Path, records: Sequence[Record], root: str | Path) -> None:
    """Compare a written list with its records. Only the reader of lists knows the names that a list cannot hold."""
    problem = ""
    try:
        read = list(read_list(path, records[0].format, root))
    except ListError as error:
        read, problem = [], f" ({error})"
    for index, record in enumerate(records):
        meant = replace(record, path=os.path.join(root, record.path))
        if index >= len(read) or read[index] != meant:
            found = f"reads back as {read[index]!r}" if index < len(read) else f"does not read back{problem}"
            raise ListError(
                f"a list file cannot hold {record.path!r} with the label {record.label}: it {found}. Rename it: no "
                "line break, no space at either end or twice in a row before a number, no # in front"
            )


def _raise_empty(tree: Tree, expected: str) -> NoReturn:
    found = quote_names([paths[0] for paths in list(tree.files.values())[:EXAMPLES]])
    raise ListError(f"nothing to list: {len(tree)} {tree.kind} files under {tree.root} ({found}); {expected}")
