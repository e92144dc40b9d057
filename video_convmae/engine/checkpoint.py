"""Checkpoints: save, load the newest that is whole, prune.

A file is written beside its place, flushed to the disk and renamed, so that a kill at any instant leaves the last good
one. Files load with `weights_only=True`: no code of a stranger's is ever run.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step_(\d+)\.pt")


def save(folder: Path, step: int, state: dict[str, Any], keep: int | None = None) -> Path:
    """Write `state` (tensors and plain data) as `folder/step_N.pt`.

    Args:
        folder: made if it is not there.
        step: optimizer steps done.
        state: what `load` returns.
        keep: how many files stay, this one and those before it; None: all.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"train.keep is {keep}; expected at least 1 checkpoint to stay")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if (
        keep is not None
    ):  # a newer file than this one is damaged, or it would have been gone on from: it counts for none
        for old in [p for p in checkpoints(folder) if p.name <= path.name][:-keep]:
            old.unlink()
    return path


def mark_best(folder: Path, step: int) -> None:
    """Keep the checkpoint of a step as `folder/best.pt`, which no pruning removes."""
    path, partial = folder / f"step_{step:08d}.pt", folder / "best.partial"
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:  # not every file system has links
        shutil.copyfile(path, partial)
    os.replace(partial, folder / "best.pt")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted((p for p in folder.glob("step_*.pt") if _NAME.fullmatch(p.name)), key=lambda p: p.name)


def load(path: Path, lazily: bool = False) -> dict[str, Any]:
    """Read one checkpoint, on the CPU; `lazily`, a tensor is read when it is used.

    Raises:
        ValueError: the file is missing, damaged or holds more than tensors and plain data.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint that can be read: {type(error).__name__}: {error}") from error


def load_latest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that can be read (None if there is none), and a line for each newer one that cannot."""
    complaints: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return load(path), complaints
        except ValueError as error:
            complaints.append(str(error))
    return None, complaints


def find(path: str | Path) -> Path:
    """The checkpoint that a path means: a file, or the newest of a run folder that can be read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are some, and none can be read.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = checkpoints(path / "checkpoints") or checkpoints(path)
    if not found:
        raise FileNotFoundError(f"no checkpoint at {path}: expected a .pt file or a run folder with checkpoints/ in it")
    complaints = []
    for candidate in reversed(found):
        try:
            load(candidate)
        except ValueError as error:
            complaints.append(str(error))
        else:
            return candidate
    raise ValueError("; ".join(complaints))
