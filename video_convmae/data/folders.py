"""Files under a folder, and class folders: one rule for `make-list` and for folders in place of lists."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from .options import IMAGE_SUFFIXES, VIDEO_SUFFIXES, ListFormat
from .text import ListError

SUFFIXES: dict[ListFormat, tuple[str, ...]] = {
    "video": VIDEO_SUFFIXES,
    "frames": IMAGE_SUFFIXES,  # of the pictures in a folder of frames
    "image": (*IMAGE_SUFFIXES, ".gif"),
}
# Written by macOS, Synology, QNAP, Windows and Linux beside the user's own folders.
_NOT_THE_USERS = {
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "@Recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
}
# Folders of the parts of a data set, which are no classes.
_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "trainval"}


@dataclass
class Tree:
    """Files under a folder; of format `frames`, the folders that hold pictures.

    Attributes:
        root: the folder.
        kind: format of the records.
        files: paths relative to `root`, by `file_key`.
        others: number of files of other kinds, by suffix.
        counts: number of pictures of each folder of frames.
        linked: folders that are links to a folder listed before, and that folder.
    """

    root: Path
    kind: ListFormat = "video"
    files: dict[str, list[str]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=dict)
    linked: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(paths) for paths in self.files.values())

    def classes(self) -> dict[str, list[str]]:
        """Return the paths in each folder under the root, both sorted; files in no folder belong to no class.

        Raises:
            ListError: the folders are the parts of a split.
        """
        classes: dict[str, list[str]] = {}
        for path in sorted(path for paths in self.files.values() for path in paths):
            folder, _, name = path.partition(os.sep)
            if name:
                classes.setdefault(folder, []).append(path)
        nested = all(path.count(os.sep) > 1 for paths in classes.values() for path in paths)
        if classes and all(name.lower() in _PARTS for name in classes) and (len(classes) > 1 or nested):
            raise ListError(
                f"{self.root} holds the parts of a split ({', '.join(sorted(classes))}), not classes; expected class "
                f"folders: name each part by itself, as {self.root / min(classes)}"
            )
        return {name: classes[name] for name in sorted(classes)}

    def add(self, path: str) -> None:
        """Add a record."""
        self.files.setdefault(file_key(path), []).append(path)


def scan_folder(root: Path, kind: ListFormat = "video") -> Tree:
    """Find every record under a folder, at any depth.

    Links are followed, except to a folder that they lie in. Skipped are hidden files and folders, and the folders that
    file systems keep for themselves.

    Raises:
        ListError: `root` or a folder below it cannot be read.
    """
    if not root.is_dir():
        raise ListError(f"--root {root} is not a folder")
    tree = Tree(root, kind)
    first: dict[tuple[int, int], str] = {}
    for path, identity, files in _walk(root, "", ()):
        known = first.setdefault(identity, path)
        if known != path and not any(path.startswith(other + os.sep) for other in tree.linked):
            tree.linked[path] = known
        wanted = 0
        for name, is_file in files:
            suffix = os.path.splitext(name)[1].lower()
            if is_file and suffix in SUFFIXES[kind]:
                wanted += 1
                if kind != "frames":
                    tree.add(os.path.join(path, name))
            else:
                tree.others[(suffix or "no suffix") if is_file else "broken link or no file"] += 1
        if kind == "frames" and wanted and path:
            tree.add(path)
            tree.counts[path] = wanted
    return tree


def class_folders(folder: Path, format: ListFormat | None = None) -> dict[str, list[str]]:
    """Return the class folders of a folder, by name, and the paths of the records in each; without a format, none.

    Raises:
        ListError: a class folder holds no record, so the numbers of the classes behind it would depend on that.
    """
    names = [name for name, is_folder, _ in _entries(folder) if is_folder]
    if format is None:
        return {name: [] for name in names}
    found = scan_folder(folder, format).classes()
    if not found:
        raise ListError(f"the folder {folder} holds no class folders with {format} files in them")
    if empty := [name for name in names if name not in found]:
        raise ListError(
            f"{len(empty)} class folders of {folder} hold no {format} files, the first {empty[0]!r}: move them away, "
            "or list the folder without them (video-convmae make-list folders)"
        )
    return {name: [os.path.join(folder, path) for path in found[name]] for name in names}


def file_key(path: str) -> str:
    """Return the name of a record without folder and suffix, to compare with the names in annotations."""
    stem, suffix = os.path.splitext(os.path.basename(path))
    known = suffix.lower() in (*VIDEO_SUFFIXES, *SUFFIXES["image"])  # a folder of frames may have a dot in its name
    return normalise_accents(stem if known else stem + suffix)


def normalise_accents(name: str) -> str:
    """Return a name in Unicode's form NFC: macOS stores an accent as a character of its own, others do not."""
    return unicodedata.normalize("NFC", name)


def _walk(
    root: Path, path: str, parents: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, tuple[int, int], list[tuple[str, bool]]]]:
    """Yield each folder: its path relative to the root, its identity, and its files with whether they are there."""
    status = os.stat(os.path.join(root, path))
    identity = status.st_dev, status.st_ino
    if identity in parents:  # a link to a folder that it lies in: an endless loop
        return
    entries = _entries(os.path.join(root, path))
    yield path, identity, [(name, is_file) for name, is_folder, is_file in entries if not is_folder]
    for name, is_folder, _ in entries:
        if is_folder:
            yield from _walk(root, os.path.join(path, name), (*parents, identity))


def _entries(folder: str | Path) -> list[tuple[str, bool, bool]]:
    """Return the name of each visible entry, and whether it is, or links to, a folder or a file; sorted."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir(), entry.is_file()) for entry in entries if entry.name[0] != "."]
    except OSError as error:
        _raise_unreadable(error)
    return sorted(entry for entry in found if not (entry[1] and entry[0] in _NOT_THE_USERS))


def _raise_unreadable(error: OSError) -> NoReturn:
    raise ListError(f"cannot read the folder {error.filename}: {error.strerror or error}") from error
