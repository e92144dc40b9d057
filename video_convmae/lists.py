"""The lists that a configuration names: read, and checked before any work."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np

from video_convmae.config import DataConfig, FinetuneConfig, LabelledDataConfig
from video_convmae.data.decoding import DecodeError
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.labels import check_labels, check_single, class_names, count_labels
from video_convmae.data.mixture import MixedList, Mixture
from video_convmae.data.records import ListError, Records, read_list
from video_convmae.data.remote import ObjectCache, is_url, join, use_cache
from video_convmae.engine.distributed import DistInfo, broadcast_object
from video_convmae.errors import Note

_CAMEL_CASE = re.compile("([a-z])([A-Z])")
_SIDES = {"left", "right", "leftward", "rightward", "leftwards", "rightwards"}
_SIDES |= {"clockwise", "counterclockwise", "anticlockwise"}


def read_records(data: DataConfig) -> Records:
    """Read the training list, or those of a mixture.

    Raises:
        ListError: a list cannot be used, or its root is no folder.
    """
    use_cache(ObjectCache(data.cache, data.cache_size))
    if isinstance(data.train, str):
        check_root(data.root)
        return read_list(data.train, data.format, data.root)
    lists = []
    for config, source in zip(data.train, data.sources):
        check_root(source.root, "data.root" if config.root is None else f"root of {config.list} in data.train")
        records = read_list(config.list, source.format, source.root)
        weight = float(len(records)) if config.weight is None else config.weight
        lists.append(MixedList(config.list, source.root, records, weight, config.options))
    return Mixture(lists)


def open_process(data: DataConfig) -> ReaderProcess:
    """Return the process that reads the records of these data."""
    return ReaderProcess(data.reader, data.decode_timeout, data.max_side, ObjectCache(data.cache, data.cache_size))


def try_training_records(data: DataConfig, records: Records, info: DistInfo) -> None:
    """Read a frame of some of the records of each training list. Raises as `try_records`."""
    parts = [each.records for each in records.lists] if isinstance(records, Mixture) else [records]
    for source, part in zip(data.sources, parts, strict=True):
        try_records(source, str(source.train), part, info)


def check_root(root: str, origin: str = "data.root") -> None:
    """Raise a ListError unless the folder exists that a list's relative paths are joined to."""
    if root and not is_url(root) and not Path(root).is_dir():
        raise ListError(f"{origin} is {root!r}, which is no folder here; expected the one that the list's paths lie in")


def try_records(data: DataConfig, path: str, records: Records, info: DistInfo, count: int = 5) -> None:
    """Read a frame of some of the records, up to the first that can be read: a wrong folder is met before any work.

    The main process does it for all.

    Args:
        data: how records are read.
        path: of their list, for the message.
        records: those of the list.
        info: the processes.
        count: how many are tried at most.

    Raises:
        ListError: none of them can be read.
    """
    error = None
    if info.is_main:
        errors: list[str] = []
        with open_process(data) as process:
            for place in np.linspace(0, len(records) - 1, min(count, len(records))).astype(int):
                try:
                    with process.open(records[int(place)]) as reader:
                        reader.read([0])
                        if reader.note is not None:
                            warnings.warn(Note(f"{records[int(place)].path}: {reader.note}"), stacklevel=2)
                    break
                except DecodeError as met:
                    errors.append(str(met))
            else:
                error = (
                    f"none of {len(errors)} records of {path} that were tried can be read ({errors[0]}); check "
                    f"data.root, which is {data.root!r}, and the files: video-convmae check-videos names the bad ones"
                )
    if (error := broadcast_object(error)) is not None:
        raise ListError(error)


def read_validation_records(data: LabelledDataConfig) -> Records:
    """Read the validation list.

    Raises:
        ListError: the configuration has none, or its classes are not those of the training list.
    """
    if data.validation is None:
        raise ListError("data.validation is none: name a list to validate or test on")
    ours, theirs = read_class_names(data), class_names(data.validation, data.root)
    if ours is not None and theirs is not None and ours != tuple(theirs):
        source = data.train_names if data.labels is None else "data.labels"
        raise ListError(
            f"the classes of {source} ({len(ours)}) and of {data.validation} ({len(theirs)}) differ, so their numbers "
            "mean different things: make both lists with the same class names (video-convmae make-list); for a list "
            "with classes of its own set data.labels to null"
        )
    return read_list(data.validation, data.format, data.root)


def read_class_names(data: LabelledDataConfig) -> tuple[str, ...] | None:
    """Return the names of the classes; None: nothing names them.

    Raises:
        ListError: the lists of a mixture have different ones.
    """
    if isinstance(data.labels, tuple):
        return data.labels or None
    if not data.train and data.labels is None:  # usual settings of a published file: there is no list
        return None
    found = [(str(each.train), each.root) for each in data.sources]
    named = [
        (join(root, path), names) for path, root in found if (names := class_names(path, root, data.labels)) is not None
    ]
    for path, names in named[1:]:
        if names != named[0][1]:
            raise ListError(
                f"the classes of {named[0][0]} ({len(named[0][1])}) and of {path} ({len(names)}) differ, so their "
                "numbers mean different things: make the lists of data.train with the same class names (video-convmae "
                "make-list), or name those of all with data.labels"
            )
    return tuple(named[0][1]) if named else None


def has_several_labels(config: FinetuneConfig, *lists: Records) -> bool:
    """Return whether records have several classes: `data.multi_label`, or what the lists show.

    Raises:
        ListError: they have, and the configuration says or needs one class of each.
    """
    data = config.data
    several = any(records.is_multi_label for records in lists) if data.multi_label is None else data.multi_label
    for records in lists:
        check_single(records, several)
    needs_one = {
        f"model.probe {config.model.probe}": config.is_fitted,
        "a sweep": bool(config.sweep.heads),
        "data.balanced": data.balanced,
    }
    if several and (names := [name for name, is_on in needs_one.items() if is_on]):
        raise ListError(f"records may have several classes (data.multi_label), and {names[0]} takes one of each")
    return several


def count_classes(data: LabelledDataConfig, *lists: Records) -> int:
    """Return the number of classes, and check labels, names and flips against it.

    Raises:
        ListError: a label is missing, beyond `num_classes` or far beyond all others, there are more or fewer names, or
            class names contain left or right and clips are flipped.
    """
    names = read_class_names(data)
    count = data.num_classes or (len(names) if names else count_labels(*lists))
    if names and len(names) != count:
        raise ListError(
            f"data.num_classes is {count} and there are {len(names)} class names, the first {names[0]!r}; expected as "
            "many: leave data.num_classes out, or name the file of all classes with data.labels"
        )
    for records in lists:
        check_labels(records, count)
    if data.augmentation.flip and names is None:
        warnings.warn(
            "data.augmentation.flip is on and no class names are known, so that names with left or right cannot be "
            "checked; name the classes with data.labels",
            Note,
            stacklevel=2,
        )
    sided = [name for name in names or [] if _SIDES & set(re.split(r"[\W_]+", _CAMEL_CASE.sub(r"\1 \2", name).lower()))]
    if sided and data.augmentation.flip:
        raise ListError(
            f"data.augmentation.flip is on and {len(sided)} classes name left or right, or a way to turn, the first "
            f"{sided[0]!r}: a flipped clip would have a wrong label; turn it off"
        )
    return count
