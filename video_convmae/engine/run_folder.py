"""A run folder has one writer, and its run keeps the configuration that it began with.

A field that differs when a run is resumed is one of three: fixed, because the weights, the order of the data or the
schedule are made of it, and the command is refused; changed, and a line says so; or free, because no result depends on
it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from video_convmae.atomic import write_text
from video_convmae.data.options import LOADING
from video_convmae.errors import UserError

from .distributed import DistInfo, broadcast_object
from .options import is_path_of_teacher

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"

# Names of fields and groups; a field in neither is fixed. The effective batch is compared when it is dealt out, the
# records of data.train by their digest.
FREE = (
    *("output", "device", "hang_timeout", "log", "probe", "test"),
    *("data.train", *(f"data.{name}" for name in LOADING)),
    *("train.batch_size", "train.accumulate", "train.effective_batch", "train.parallel"),
    *("train.log_every", "train.save_every", "train.keep", "train.keep_every", "train.activation_checkpointing"),
)
TOLD = (
    *("data.root", "data.reader", "data.validation", "data.max_bad_fraction", "data.augmentation.on_device"),
    *("model.implementation", "train.precision", "train.compile", "train.compress_gradients", "train.ema"),
    *("train.on_nonfinite", "validate"),
)


def check_unchanged(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare the configuration of a run with that of the command which resumes it: dotted names and plain values.

    Fields that only one of them knows are left out. Targets are compared field by field: what a target is stays, its
    teacher's file may lie elsewhere.

    Returns:
        The fields that changed and may, each with both values.

    Raises:
        UserError: a field differs that is fixed once the run has begun.
    """
    old, new = (_split_targets(json.loads(json.dumps(each))) for each in (before, now))  # tuples become lists
    changed = [name for name in old if name in new and old[name] != new[name]]
    changed = [name for name in changed if not _is_in(name, FREE)]
    if fixed := [name for name in changed if not (_is_in(name, TOLD) or _is_place(name, old[name], new[name]))]:
        many = f" (and {len(fixed) - 5} more)" if len(fixed) > 5 else ""
        raise UserError(
            f"{folder} was begun with {_join(fixed, old)}{many}; this command has {_join(fixed, new)}. Weights, data "
            f"order and schedule are made of these: give the old values to go on, or another --output for another run "
            f"(--init.weights {folder} starts it from these weights)"
        )
    return [f"{name}: {old[name]} -> {new[name]}" for name in changed]


def _split_targets(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the list `targets` by their names and `targets.NAME.FIELD`."""
    targets = values.get("targets")
    if not isinstance(targets, list):
        return values
    fields = {f"targets.{each['name']}.{field}": value for each in targets for field, value in each.items()}
    return values | {"targets": [each["name"] for each in targets]} | fields


def _is_place(name: str, *values: str | None) -> bool:
    """Return whether a field says where a teacher's file lies, and not what the teacher is."""
    if not name.startswith("targets."):
        return False
    field = name.rpartition(".")[2]
    return field == "weights" or (field == "teacher" and all(map(is_path_of_teacher, values)))


def write_config(folder: Path, config: dict[str, Any], step: int) -> None:
    """Write config.yaml; one that says something else becomes config.before_step_N.yaml, unless that is there already:
    the first of a step made the steps before.
    """
    path, text = folder / "config.yaml", yaml.safe_dump(config, sort_keys=False)
    before = folder / f"config.before_step_{step}.yaml"
    if path.exists() and path.read_bytes() != text.encode() and not before.exists():
        path.replace(before)
    write_text(path, text)


@contextmanager
def claim(folder: Path, info: DistInfo) -> Iterator[None]:
    """Make the folder, and keep other runs from writing into it; the system ends the claim of a process that dies.

    All processes call it together.

    Raises:
        UserError: another run writes into the folder.
    """
    file, error = None, None
    if info.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  # closed below, which ends the claim
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in forked loading processes
        except (BlockingIOError, PermissionError):
            file.seek(0)
            error = (
                f"{folder} is in use by {file.read().strip() or 'another process'}; expected one run a folder: wait "
                "until it ends, or give another --output"
            )
        except OSError:  # a file system without locks
            pass
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
    try:
        if (error := broadcast_object(error)) is not None:
            raise UserError(error)
        yield
    finally:
        if file is not None:
            file.close()


def _is_in(name: str, names: tuple[str, ...]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in names)


def _join(names: list[str], values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names[:5])
