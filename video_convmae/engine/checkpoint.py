"""Checkpoints: written in the background by all processes, committed at once, kept by a rule, checked before use.

    checkpoints/
        step_00001000/          shard-*.safetensors and checkpoint.json (step, configuration, size and CRC of each file)
        step_00002000/
        best -> step_00001000   the best by the validation

A checkpoint is written beside its place, flushed to the disk and renamed, so that a kill at any instant leaves the last
good one. It holds tensors and plain data, so that reading one never runs a stranger's code. Any number of processes
reads what any other number has written, replicated or sharded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from video_convmae.errors import UserError
from video_convmae.weights.files import read_shards

from . import distributed

_NAME = re.compile(r"step_(\d+)")
_ABOUT = "checkpoint.json"
_ADVICE = "the checkpoints before it are whole. Mend this, and the same command goes on from the newest"
BEST = "best"
PUBLISHED = "model.safetensors"  # the weights of a run that ended, for use elsewhere


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written; those before it are whole."""


class Saver:
    """Writes the checkpoints of a run. Every process has one and calls the same methods in the same order.

    Args:
        folder: made if it is not there.
        writes: whether this is the process that commits and prunes.
        keep: how many of the newest stay; None: all.
        keep_every: the checkpoints of steps that are multiples of this stay too; None: none does.
        saved: the step whose checkpoint is there and whole: it is not written again.

    Raises:
        ValueError: `keep` is less than 1.
    """

    def __init__(
        self,
        folder: Path,
        writes: bool = True,
        keep: int | None = None,
        keep_every: int | None = None,
        saved: int | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"train.keep is {keep}; expected at least 1 checkpoint to stay")
        self.folder = folder
        self._writes, self._keep, self._keep_every = writes, keep, keep_every
        self._saved = saved
        self._shards = distributed.ShardWriter()
        self._thread: threading.Thread | None = None
        self.error: CheckpointError | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy a state to host memory and write it as `folder/step_N` in the background.

        Args:
            step: optimizer steps done.
            state: parts: tensors by name, or plain data. What `load` returns.

        Raises:
            CheckpointError: the checkpoint before this one could not be written, or the disk has no room for this one.
        """
        self.wait()
        if step == self._saved:
            return
        parts = {part: values for part, values in state.items() if _holds_tensors(values)}
        tensors = {f"{part}/{name}": tensor for part, values in parts.items() for name, tensor in values.items()}
        about = {"step": step} | {part: values for part, values in state.items() if part not in parts}
        partial = self.folder / f"{name_of(step)}.partial"
        size = sum(tensor.nbytes for tensor in tensors.values())
        complaints = distributed.all_gather_object(_prepare(partial, size) if self._writes else None)
        if any(complaints):
            raise CheckpointError(next(filter(None, complaints)))
        future = self._shards.start(tensors, partial)
        self._thread = threading.Thread(target=self._finish, args=(future, partial, about), name="checkpoint")
        self._thread.start()
        self._saved = step

    def wait(self) -> None:
        """Wait until the last checkpoint lies in its place.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            distributed.heartbeat("waits for a checkpoint to be written")
            self._thread.join()
            self._thread = None
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Let the last checkpoint be written, whatever ended the run."""
        if self._thread is not None:
            self._thread.join()

    def mark_best(self, step: int) -> None:
        """Name the checkpoint of a step `best`: no pruning removes it."""
        self.wait()
        if self._writes:
            partial = self.folder / f"{BEST}.partial"
            partial.unlink(missing_ok=True)
            partial.symlink_to(name_of(step), target_is_directory=True)
            partial.replace(self.folder / BEST)

    def is_kept(self, step: int) -> bool:
        """Whether the checkpoint of a step stays for good."""
        return self._keep_every is not None and step % self._keep_every == 0

    def _finish(self, future: Any, partial: Path, about: dict[str, Any]) -> None:
        path = partial.with_suffix("")
        try:
            future.result()
            if self._writes:
                _commit(partial, path, about)
                self._prune(path)
        except BaseException as error:  # in a thread of its own: whoever waits for it raises this
            if self._writes:
                shutil.rmtree(partial, ignore_errors=True)
            self.error = CheckpointError(f"{path} could not be written: {_reason(error)}; {_ADVICE}")
            self.error.__cause__ = error

    def _prune(self, path: Path) -> None:
        if self._keep is None:
            return
        # A newer one than this is damaged, or it would have been gone on from: it counts for none.
        old = [p for p in checkpoints(self.folder) if p.name <= path.name][: -self._keep]
        best = (self.folder / BEST).resolve()
        for each in old:
            if not self.is_kept(step_of(each)) and each.resolve() != best:
                shutil.rmtree(each)


def save(folder: Path, step: int, state: Mapping[str, Any], writes: bool = True, keep: int | None = None) -> Path:
    """Write one checkpoint and wait for it; arguments and errors as those of `Saver`. Every process calls it."""
    saver = Saver(folder, writes, keep)
    saver.save(step, state)
    saver.wait()
    return folder / name_of(step)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; those that are damaged too."""
    return sorted((p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)), key=step_of)


def name_of(step: int) -> str:
    """What the checkpoint of a step is called."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The steps that were done at a checkpoint."""
    return int(_NAME.fullmatch(path.resolve().name)[1])


def about(path: Path) -> dict[str, Any]:
    """A checkpoint's plain data: step, configuration and, under `files`, size and CRC-32 of each file.

    Raises:
        ValueError: there is none that can be read.
    """
    try:
        return json.loads((path / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be read: {type(error).__name__}: {error}") from error


def verify(path: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint; returns what `about` does.

    Raises:
        ValueError: a file is missing, truncated or damaged.
    """
    known = about(path)
    for name, (size, crc) in known["files"].items():
        file = path / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            raise ValueError(f"{path} is not whole: {name} has {found} bytes, expected {size}")
        if _crc(file) != crc:
            raise ValueError(f"{path} is damaged: {name} has changed since it was written")
    return known


def load(path: Path, *parts: str) -> dict[str, Any]:
    """A checkpoint as it was given to `save`: its plain data and, of its tensors, the parts that are named, or all.

    Raises:
        ValueError: it is damaged.
    """
    known = verify(path)
    del known["files"]
    state: dict[str, Any] = known
    for name, tensor in read_shards(path).items():
        part, _, name = name.partition("/")
        if not parts or part in parts:
            state.setdefault(part, {})[name] = tensor
    return state


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole (None if there is none), and a line for each newer one that is not."""
    complaints: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except ValueError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    return None, complaints


def find(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, a file of weights, or the newest of a run folder that is whole.

    A run folder without checkpoints may still have its `model.safetensors`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are some, and none can be read.
    """
    path = Path(path)
    if path.is_file() or (path / _ABOUT).exists():
        return path
    for folder in (path / "checkpoints", path):
        found, complaints = latest(folder)
        if found is not None:
            return found
        if complaints:
            raise ValueError("; ".join(complaints))
    if (path / PUBLISHED).exists():
        return path / PUBLISHED
    raise FileNotFoundError(
        f"no checkpoint at {path}: expected a file of weights, a checkpoint or a run folder with checkpoints/ in it"
    )


def digest(path: Path) -> str:
    """What tells the contents of a checkpoint or a file of weights from any other's."""
    return hashlib.sha256((path / _ABOUT if path.is_dir() else path).read_bytes()).hexdigest()


def _holds_tensors(values: Any) -> bool:
    return isinstance(values, Mapping) and any(isinstance(value, Tensor) for value in values.values())


def _prepare(partial: Path, size: int) -> str | None:
    """Make the folder that is written into; what is wrong with it, if anything is."""
    folder = partial.parent
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free >= size:
            return None
        partial.rmdir()
        reason = f"{size / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free"
    except OSError as error:
        reason = str(error)
    return f"{partial.with_suffix('')} cannot be written: {reason}; {_ADVICE}"


def _commit(partial: Path, path: Path, about: dict[str, Any]) -> None:
    """All files are written: note what they are, and give the checkpoint its name."""
    files = {file.name: (file.stat().st_size, _crc(file)) for file in sorted(partial.iterdir())}
    with open(partial / _ABOUT, "w", encoding="utf-8") as file:
        json.dump(about | {"files": files}, file)
        file.flush()
        os.fsync(file.fileno())
    _flush(partial)
    if path.exists():  # a damaged one, or the run would have gone on from it
        shutil.rmtree(path)
    partial.replace(path)
    _flush(path.parent)


def _flush(folder: Path) -> None:
    """Names of files on the disk, not only in the system's memory."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _reason(error: BaseException) -> str:
    """The innermost cause in a line: what the system said, not who passed it on."""
    failures = getattr(error, "failures", None)  # of several processes, each with its traceback
    if failures:
        rank, (inner, _) = next(iter(failures.items()))
        return f"rank {rank}: {_reason(inner)}"
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
