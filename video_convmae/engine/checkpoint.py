"""Checkpoints: written in the background by all processes, committed atomically, pruned by a rule, verified before use.

    checkpoints/
        step_00001000/          shard-*.safetensors and checkpoint.json (step, configuration, size and CRC of each file)
        step_00002000/
        best -> step_00001000   the best by the validation

A checkpoint is written beside its place, flushed to the disk and renamed, so that a kill at any instant leaves the last
good one. It holds tensors and plain data, so that reading one never executes code. Any number of processes reads what
any other number has written, replicated or sharded.
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
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from video_convmae.errors import UserError
from video_convmae.shipped import explain_download, find_shipped_weights, suggest_weights
from video_convmae.weights.files import find_file, parts_of, read_shards, shard_shapes
from video_convmae.weights.formats import read_weights
from video_convmae.weights.state import Weights

from .distributed import all_gather_object
from .watchdog import heartbeat

_NAME = re.compile(r"step_(\d+)")
_INFO = "checkpoint.json"
_ADVICE = "earlier checkpoints are whole. Fix this, and the same command resumes from the newest one"
BEST = "best"
PUBLISHED = "model.safetensors"  # the weights of a finished run, in one file


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written; earlier ones are whole."""


class NoWeights(UserError, FileNotFoundError):
    """Nothing that a path may mean has weights."""


class Checkpoint:
    """One checkpoint folder: its plain data at once, its tensors on request. Every byte is verified once.

    Args:
        path: the folder.
        verified: the bytes need no check, since this process or another has just done it.

    Attributes:
        info: plain data: step, configuration and, under `files`, size and CRC-32 of each file.

    Raises:
        ValueError: there is no checkpoint.json that can be read.
    """

    def __init__(self, path: str | Path, *, verified: bool = False) -> None:
        self.path = Path(path)
        self._verified = verified
        try:
            self.info: dict[str, Any] = json.loads((self.path / _INFO).read_text(encoding="utf-8"))
            self.info["step"], self.info["config"], self.info["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a readable checkpoint: {type(error).__name__}: {error}") from error

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.info["step"]

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the run, as plain data."""
        return self.info["config"]

    def verify(self) -> None:
        """Check size and CRC of every file, once.

        Raises:
            ValueError: a file is missing, truncated or damaged.
        """
        if self._verified:
            return
        for name, (size, crc) in self.info["files"].items():
            file = self.path / name
            found = file.stat().st_size if file.exists() else None
            if found != size:
                raise UserError(f"{self.path} is not whole: {name} has {found} bytes, expected {size}")
            if _crc(file) != crc:
                raise UserError(f"{self.path} is damaged: {name} has changed since it was written")
        self._verified = True

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Read the whole tensors of one part ("model", "ema", "optimizer"), by name; nothing else is read.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        self.verify()
        return read_shards(self.path, part)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors `part/name`, sharded or not, in place. All processes call it together.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        self.verify()
        reader = dcp.HuggingFaceStorageReader(str(self.path))
        dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name `part/name` of every tensor with the shape of a piece of it."""
        return shard_shapes(self.path)

    def digest(self) -> str:
        """Return a SHA-256 that identifies the contents."""
        return hashlib.sha256((self.path / _INFO).read_bytes()).hexdigest()


def file_digest(path: Path) -> str:
    """Return a SHA-256 that identifies the contents of a file of weights, or of an index and its shards."""
    digest = hashlib.sha256(path.read_bytes())
    for part in parts_of(path):
        if part != path:  # of an index
            digest.update(part.read_bytes())
    return digest.hexdigest()


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's folder name."""
    match = _NAME.fullmatch(path.resolve().name)
    if match is None:
        raise UserError(f"{path} is not named like a checkpoint; expected step_ and a number")
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, damaged ones included."""
    return sorted((p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)), key=step_of)


def find_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole (None if there is none), and an error for each newer one."""
    errors: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = Checkpoint(path)
            checkpoint.verify()
        except ValueError as error:
            errors.append(str(error))
        else:
            return checkpoint, errors
    return None, errors


def newest_config(folder: Path) -> dict[str, Any] | None:
    """Return the configuration that the newest readable checkpoint states, reading no tensors; None: there is none."""
    for path in reversed(list_checkpoints(folder)):
        with suppress(ValueError):
            return Checkpoint(path).config
    return None


def find_weights(path: str | Path) -> Checkpoint | Path:
    """Find what a path means: a file of weights, a checkpoint, or the newest checkpoint of a run folder, verified.

    A run folder without checkpoints may still have its `model.safetensors`; a folder of Hugging Face's has a file of
    weights, or an index of its shards. Where nothing of this name exists, it may be that of shipped weights
    (`tiny-moving-digits`). `~` is the home folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are some, and none is whole.
    """
    if shipped := find_shipped_weights(path):
        return shipped
    given, path = path, Path(path).expanduser()
    if path.is_file():
        return path
    if (path / _INFO).exists():
        checkpoint = Checkpoint(path)
        checkpoint.verify()
        return checkpoint
    for folder in (path / "checkpoints", path):
        found, errors = find_latest(folder)
        if found is not None:
            return found
        if errors:
            raise UserError("; ".join(errors))
    if (file := find_file(path)) is not None:
        return file
    hint = "" if path.exists() else explain_download(given)
    raise NoWeights(
        f"no checkpoint at {given}{hint}: expected a file of weights, a checkpoint, a folder of Hugging Face's or a "
        "run folder with checkpoints/ in it" + suggest_weights(given)
    )


def read_found_weights(path: str | Path) -> Weights:
    """Read the weights that a path means, in whatever format. Raises as `find_weights` and `read_weights`."""
    found = find_weights(path)
    return read_weights(found.path if isinstance(found, Checkpoint) else found)


class Saver:
    """Writes the checkpoints of a run. Every process has one and calls the same methods in the same order.

    Args:
        folder: created if missing.
        writes: True on the process that commits and prunes.
        keep: number of newest checkpoints that stay; None: all.
        keep_every: checkpoints of steps that are multiples of this stay too; None: no such rule.
        saved: step whose checkpoint exists and is whole; it is not written again.

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
            raise UserError(f"train.keep is {keep}; expected at least 1 checkpoint to stay")
        self.folder = folder
        self.error: CheckpointError | None = None
        self._writes, self._keep, self._keep_every = writes, keep, keep_every
        self._saved = saved
        self._thread: threading.Thread | None = None

    @cached_property
    def _group(self) -> dist.ProcessGroup | None:
        """Give the writing thread a group of its own, so that its messages do not mix with the training's."""
        if not dist.is_initialized():
            return None
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # this process is in it
        return group

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy a state to host memory and write it as `folder/step_N` in the background.

        Args:
            step: optimizer steps done.
            state: parts by name: tensors by name, or plain data.

        Raises:
            CheckpointError: the previous checkpoint could not be written, or the disk has no room for this one.
        """
        self.wait()
        if step == self._saved:
            return
        parts = {part: values for part, values in state.items() if _holds_tensors(values)}
        tensors = {f"{part}/{name}": tensor for part, values in parts.items() for name, tensor in values.items()}
        info = {"step": step} | {part: values for part, values in state.items() if part not in parts}
        partial = self.folder / f"{checkpoint_name(step)}.partial"
        size = sum(tensor.nbytes for tensor in tensors.values())
        errors = all_gather_object(_prepare(partial, size) if self._writes else None)
        if any(errors):
            raise CheckpointError(next(filter(None, errors)))
        # Safetensors files, each process its shards and its part of the replicated tensors: no pickle is written.
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        group = self._group
        future = dcp.async_save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
        self._thread = threading.Thread(target=self._finish, args=(future, partial, info), name="checkpoint")
        self._thread.start()
        self._saved = step

    def wait(self) -> None:
        """Wait until the last checkpoint is committed.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            heartbeat("waiting for a checkpoint to be written")
            self._thread.join()
            self._thread = None
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Let the last checkpoint be written, whatever ended the run."""
        if self._thread is not None:
            self._thread.join()

    def mark_best(self, step: int) -> None:
        """Link the checkpoint of a step as `best`; pruning never removes it."""
        self.wait()
        if self._writes:
            partial = self.folder / f"{BEST}.partial"
            partial.unlink(missing_ok=True)
            partial.symlink_to(checkpoint_name(step), target_is_directory=True)
            partial.replace(self.folder / BEST)

    def is_kept(self, step: int) -> bool:
        """Return True if `keep_every` protects the checkpoint of a step."""
        return self._keep_every is not None and step % self._keep_every == 0

    def _finish(self, future: Future, partial: Path, info: dict[str, Any]) -> None:
        path = partial.with_suffix("")
        try:
            future.result()
            if self._writes:
                _commit(partial, path, info)
                self._prune(path)
        except BaseException as error:  # raised in a thread: `wait` raises it again
            if self._writes:
                shutil.rmtree(partial, ignore_errors=True)
            self.error = CheckpointError(f"{path} could not be written: {_innermost(error)}; {_ADVICE}")
            self.error.__cause__ = error

    def _prune(self, path: Path) -> None:
        if self._keep is None:
            return
        # A newer checkpoint than this one is damaged, or the run would have resumed from it: it does not count.
        old = [p for p in list_checkpoints(self.folder) if p.name <= path.name][: -self._keep]
        best = (self.folder / BEST).resolve()
        for each in old:
            if not self.is_kept(step_of(each)) and each.resolve() != best:
                shutil.rmtree(each)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], writes: bool = True) -> Path:
    """Write one checkpoint and wait for it. Every process calls it; arguments and errors as those of `Saver`."""
    saver = Saver(folder, writes)
    saver.save(step, state)
    saver.wait()
    return folder / checkpoint_name(step)


def _holds_tensors(values: Any) -> bool:
    return isinstance(values, Mapping) and any(isinstance(value, Tensor) for value in values.values())


def _prepare(partial: Path, size: int) -> str | None:
    """Make the folder to write into; return an error if there is one."""
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


def _commit(partial: Path, path: Path, info: dict[str, Any]) -> None:
    """Record size and CRC of the written files, flush everything and give the checkpoint its name."""
    files = {file.name: (file.stat().st_size, _crc(file)) for file in sorted(partial.iterdir())}
    with open(partial / _INFO, "w", encoding="utf-8") as file:
        json.dump(info | {"files": files}, file)
        file.flush()
        os.fsync(file.fileno())
    _flush(partial)
    if path.exists():  # damaged, or the run would have resumed from it
        shutil.rmtree(path)
    partial.replace(path)
    _flush(path.parent)


def _flush(folder: Path) -> None:
    """Flush the names of a folder's files to the disk."""
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


def _innermost(error: BaseException) -> str:
    """Return the innermost cause in one line."""
    failures = getattr(error, "failures", None)  # of several processes, each with its traceback
    if failures:
        rank, (inner, _) = next(iter(failures.items()))
        return f"rank {rank}: {_innermost(inner)}"
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
