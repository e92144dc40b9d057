"""Where a run writes: console, JSON lines, TensorBoard, bad records."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from video_convmae.data.datasets import BadRecord
from video_convmae.errors import UserError

from . import distributed


@dataclass(frozen=True)
class LogConfig:
    """What is logged besides the usual; how often, says train.log_every."""

    profile: bool = False
    """Split the time of a step into data wait, forward, backward, optimizer and communication, most of which passes
    beside the others. For the last, torch.profiler records one step of each logged window."""
    trace: int = 0
    """Steps, after the first few, that each rank records in logs/trace_rank_NNNN.json.gz for ui.perfetto.dev."""

    def __post_init__(self) -> None:
        if self.profile and self.trace:
            raise ValueError("log.profile and log.trace are both on; expected one: PyTorch records for one at a time")


class TooManyBadRecords(UserError, RuntimeError):
    """More of the list cannot be read than `data.max_bad_fraction` allows."""


class NullLog:
    """The log of a rank that writes nothing."""

    writes = False

    def values(self, name: str) -> dict[int, float | int | None]:
        """A value of the steps that were logged with it."""
        return {}

    def step(self) -> None:
        """One optimizer step is done."""

    def write(self, values: dict[str, float | int | None]) -> None:
        """A logged step."""

    def say(self, text: str) -> None:
        """A line for the person who watches."""

    def close(self) -> None:
        """The run ends."""


class RunLog(NullLog):
    """The files of a run folder that grow while it runs, and its progress line. Only rank 0 has one.

    A resumed run takes up its own log: lines of steps that will be done again are dropped.

    Args:
        folder: the run folder.
        first_step, steps: where this process starts, and where the run ends.
    """

    writes = True

    def __init__(self, folder: Path, first_step: int, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._keep_until(folder / "log.jsonl", first_step)
        self._path = folder / "log.jsonl"
        self._lines = open(self._path, "a", encoding="utf-8")  # noqa: SIM115, closed in close()
        self._board = SummaryWriter(str(folder), purge_step=first_step + 1)
        # disable=None: a bar on a terminal, plain lines elsewhere.
        self._bar = tqdm(total=steps, initial=first_step, unit="step", disable=None, dynamic_ncols=True)
        self._steps = steps

    def values(self, name: str) -> dict[int, float | int | None]:
        """A value of the steps that were logged with it."""
        lines = (json.loads(line) for line in whole_lines(self._path))
        return {line["step"]: line[name] for line in lines if name in line}

    def step(self) -> None:
        """One optimizer step is done."""
        self._bar.update()

    def write(self, values: dict[str, float | int | None]) -> None:
        """A logged step: `values` has "step"; all of them go to the JSON lines and to TensorBoard."""
        self._lines.write(json.dumps(values) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, values["step"])
        if self._bar.disable:
            print(f"step {values['step']}/{self._steps}  {_line(values)}", flush=True)
        else:
            self._bar.set_postfix_str(_line(values))

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._lines.close()

    @staticmethod
    def _keep_until(path: Path, step: int) -> None:
        if path.exists():
            write_text(path, "".join(line for line in whole_lines(path) if json.loads(line)["step"] <= step))


class RankLog:
    """What one rank did: a line a logged step in `logs/rank_NNNN.jsonl`, and the error that ended it, if one did."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / "logs" / f"rank_{rank:04d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed in __exit__

    def __enter__(self) -> RankLog:
        self.write({"host": platform.node(), "pid": os.getpid()})
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            self.write({"error": f"{kind.__name__}: {error}"})
        self._file.close()

    def write(self, values: dict[str, Any]) -> None:
        """Add a line, with the time."""
        line = {"time": datetime.now().astimezone().isoformat(timespec="milliseconds")} | values
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


class Stopwatch:
    """Seconds of each phase of a step; on CUDA they are read when they are taken, so that the host need not wait.

    Args:
        device: what the work is done on.
        on: else nothing is timed.
    """

    def __init__(self, device: torch.device, on: bool) -> None:
        self._on_cuda, self._on = device.type == "cuda", on
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._communication: float | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A context for one step; the first is recorded for what the processes send each other."""
        if not self._on or self._communication is not None:
            yield
            return
        with torch.profiler.profile() as recorded:
            yield
        self._communication = distributed.communication_seconds(recorded)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """A context whose time counts for a phase."""
        if not self._on:
            with torch.profiler.record_function(phase):
                yield
            return
        start = self._now()
        with torch.profiler.record_function(phase):
            yield
        self._spans.setdefault(phase, []).append((start, self._now()))

    def take(self, steps: int) -> dict[str, float]:
        """`seconds_PHASE` a step, since the last call; on CUDA after a synchronisation."""
        if not self._on:
            return {}
        spans, self._spans = self._spans, {}
        seconds = {f"seconds_{phase}": sum(map(self._seconds, each)) / steps for phase, each in spans.items()}
        return seconds | {"seconds_communication": self._communication}

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, span: tuple[Any, Any]) -> float:
        start, end = span
        return start.elapsed_time(end) / 1e3 if self._on_cuda else end - start


class Trace:
    """A recording of some steps: operators, kernels and phases, for Perfetto; and a table of what takes longest.

    Args:
        folder: the run folder.
        rank: of this process.
        steps: how many are recorded; 0: none.
    """

    WARM_UP = 3  # steps that are not recorded: kernels are chosen and compiled, memory is taken
    ends_the_run = False  # tools/profile.py: a run that is made for its trace alone

    def __init__(self, folder: Path, rank: int, steps: int) -> None:
        self._path = folder / "logs" / f"trace_rank_{rank:04d}.json.gz"
        self._profiler = None
        if steps:
            plan = torch.profiler.schedule(wait=self.WARM_UP - 1, warmup=1, active=steps, repeat=1)
            self._profiler = torch.profiler.profile(schedule=plan, on_trace_ready=self._write, record_shapes=True)

    def __enter__(self) -> Trace:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()

    def step(self) -> None:
        """One optimizer step is done."""
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(self._path))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=70)
        write_text(self._path.with_name(self._path.name.replace(".json.gz", ".txt")), table + "\n")
        if self.ends_the_run:
            signal.raise_signal(signal.SIGTERM)  # as a scheduler would: after this step the run saves and leaves


class BadRecords:
    """Records that could not be read: each is written to `bad_records.jsonl` once, and counted.

    Args:
        path: the file; its lines of an earlier part of the run count.
        records: records in the list.
        max_fraction: the largest share of the list that may be bad.
    """

    def __init__(self, path: Path, records: int, max_fraction: float) -> None:
        self.path = path
        self.records = records
        self.max_fraction = max_fraction
        self.faults: dict[int, BadRecord] = {}
        if path.exists():
            for line in whole_lines(path):
                self._known(BadRecord(**json.loads(line)))

    def __len__(self) -> int:
        return len(self.faults)

    def add(self, faults: Iterable[BadRecord], write: bool) -> list[BadRecord]:
        """Count the faults that are new, write them if `write`, and return them.

        Raises:
            TooManyBadRecords: after they were written.
        """
        new = [fault for fault in faults if self._known(fault)]
        if new and write:
            if self.path.exists():  # a last line that was cut off would swallow the next
                write_text(self.path, "".join(whole_lines(self.path)))
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(fault._asdict()) + "\n" for fault in new)
        if len(self) > self.max_fraction * self.records:
            first = "".join(f"\n  {fault.path}: {fault.error}" for fault in list(self.faults.values())[:5])
            raise TooManyBadRecords(
                f"{len(self)} of {self.records} records cannot be read, more than data.max_bad_fraction "
                f"{self.max_fraction} allows; all are in {self.path}, the first:{first}"
            )
        return new

    def _known(self, fault: BadRecord) -> bool:
        """Take note of a fault; whether it is a new one."""
        return self.faults.setdefault(fault.index, fault) is fault


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, but not a last one that was cut off as it was written (a kill, a full disk)."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def write_text(path: Path, text: str) -> None:
    """Write a small file beside its place and rename it: readers see the old or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _line(values: dict[str, float | int | None]) -> str:
    parts = []
    if "loss" in values:
        remaining = int(values["eta_seconds"])
        parts = [
            "loss not finite" if values["loss"] is None else f"loss {values['loss']:.4f}",
            f"lr {values['lr']:.2e}",
            f"{values['clips_per_second']:.1f} clips/s",
            f"data wait {values['data_wait']:.0%}",
            f"ETA {remaining // 3600}:{remaining // 60 % 60:02d}:{remaining % 60:02d}",
        ]
    if values.get("val_top1") is not None:
        parts.append(f"validation top-1 {values['val_top1']:.4f}")
    return "  ".join(parts)
