"""Everything a run writes but checkpoints: console, JSON lines, traces, bad records, metrics.json; loggers.py has
TensorBoard and the like."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence, Sized
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from video_convmae import __version__
from video_convmae.atomic import read_json, read_json_lines, whole_lines, write_text
from video_convmae.data.datasets import BadRecord
from video_convmae.data.mixture import Mixture
from video_convmae.errors import UserError
from video_convmae.machine import current_commit, describe_machine

from .checkpoint import BEST, checkpoint_name
from .distributed import DistInfo
from .loggers import open_loggers
from .metrics import Values
from .options import LoggerName

SCORES = {
    "top1": "top-1",
    "map": "mAP",
    "box_ap": "box AP",
    "miou": "mIoU",
}  # by which checkpoints are compared, and their names


class TooManyBadRecords(UserError, RuntimeError):
    """More records cannot be read than `data.max_bad_fraction` allows."""


class NullLog:
    """The log of a rank that writes nothing.

    is_finished: no further step is to come, though not all were taken.
    """

    is_finished = False

    def values(self, name: str) -> Values:
        """Return a logged value by step."""
        return {}

    def write(self, values: Values) -> None:
        """Log a step."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG."""

    def print(self, text: str) -> None:
        """Print a console message."""

    def close(self) -> None:
        """Close the files."""


class RunLog(NullLog):
    """Log of rank 0: log.jsonl, a progress line, and the loggers of `log.to`.

    A resumed run appends to its own log; lines of steps that will be repeated are dropped.

    Args:
        folder: the run folder.
        first_step, steps: where this process starts, and where the run ends.
        to: names of loggers.
        config: of the run, as plain data, for loggers that keep it.

    Raises:
        UserError: a new run's logger cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        steps: int,
        to: Sequence[LoggerName] = ("tensorboard",),
        config: dict[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        if self._path.exists():
            kept = [line for line in read_json_lines(self._path) if line.get("step", 0) <= first_step]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = open(self._path, "a", encoding="utf-8")  # noqa: SIM115, closed in close()
        # disable=None: a bar on a terminal, plain lines elsewhere.
        self._bar = tqdm(total=steps, initial=first_step, unit="step", disable=None, dynamic_ncols=True)
        self._step, self._steps = first_step, steps
        self._loggers = open_loggers(to, folder, config or {}, first_step, self._warn)

    def values(self, name: str) -> Values:
        """Return a logged value by step."""
        return {line["step"]: line[name] for line in read_json_lines(self._path) if name in line}

    def write(self, values: Values) -> None:
        """Log a step: `values` has "step"; all of them go to the JSON lines and to the loggers."""
        self._step = step = values["step"]
        self._lines.write(json.dumps(values) + "\n")
        self._lines.flush()
        for logger in self._loggers:
            logger.write(values)
        if self._bar.disable:
            print(f"step {step}/{self._steps}  {_progress_line(values)}", flush=True)
        elif "loss" not in values:  # a measurement: it stays
            self.print(f"step {step}/{self._steps}  {_progress_line(values)}")
        else:
            self._bar.set_postfix_str(_progress_line(values), refresh=False)
            self._bar.update(step - self._bar.n)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG."""
        for logger in self._loggers:
            logger.picture(name, path, step)

    def print(self, text: str) -> None:
        """Print a console message."""
        self._bar.write(text)

    def close(self) -> None:
        """Close the files, and the loggers."""
        for logger in self._loggers:
            logger.close(finished=self.is_finished or self._step == self._steps)
        self._bar.close()
        self._lines.close()

    def _warn(self, text: str) -> None:
        self.print(f"warning: {text}")


def _progress_line(values: Values) -> str:
    parts = []
    if "loss" in values:
        remaining = int(values["eta_seconds"])
        loss = "loss not finite" if values["loss"] is None else f"loss {values['loss']:.4f}"
        if "loss_nothing" in values and "loss_pixels" not in values:
            loss += f" (predicting nothing: {values['loss_nothing']:.4f})"
        for name, each in values.items():  # of several targets
            if name.startswith("loss_") and name not in ("loss_nothing", "loss_scale"):
                loss += f"  {name.removeprefix('loss_')} " + ("not finite" if each is None else f"{each:.4f}")
                loss += f" (predicting nothing: {values['loss_nothing']:.4f})" if name == "loss_pixels" else ""
        if "feature_rank" in values:
            loss += f"  feature rank {values['feature_rank']:.1f}"
        parts = [
            loss,
            *([f"train top-1 {values['train_top1']:.4f}"] if "train_top1" in values else []),
            f"lr {values['lr']:.2e}",
            f"{values['clips_per_second']:.1f} clips/s",
            f"data wait {values['data_wait']:.0%}",
            f"ETA {remaining // 3600}:{remaining // 60 % 60:02d}:{remaining % 60:02d}",
        ]
    if values.get("val_top1") is not None:
        largest = values.get("val_largest_class")
        beside = "" if largest is None else f" (largest class: {largest:.4f})"
        parts.append(f"validation top-1 {values['val_top1']:.4f}{beside}")
    for name, words in SCORES.items():
        if name != "top1" and values.get(f"val_{name}") is not None:
            chance = values.get(f"val_chance_{name}")
            beside = "" if chance is None else f" (chance: {chance:.4f})"
            parts.append(f"validation {words} {values[f'val_{name}']:.4f}{beside}")
    if values.get("held_out_top1") is not None:
        parts.append(f"held-out top-1 of the best head {values['held_out_top1']:.4f}")
    if values.get("probe_knn_top1") is not None:
        parts += [
            f"probe: nearest neighbours {values['probe_knn_top1']:.4f}",
            f"linear {values['probe_linear_top1']:.4f}",
            f"rank {values['probe_rank']:.1f}",
            f"deviation {values['probe_std']:.3f}",
        ]
    return "  ".join(parts)


class RankLog:
    """Log of one rank: `logs/rank_NNNN.jsonl` with a line a logged step, and the error that ended it, if any."""

    def __init__(self, folder: Path, info: DistInfo) -> None:
        self._path, self._info = folder / "logs" / f"rank_{info.rank:04d}.jsonl", info

    def __enter__(self) -> RankLog:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a", encoding="utf-8")
        about = describe_process(self._info) if self._info.is_main else {}
        self.write({"host": platform.node(), "pid": os.getpid()} | about)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            self.write({"error": f"{type(error).__name__}: {error}"})
        self._file.close()

    def write(self, values: dict[str, Any]) -> None:
        """Append a line, with the time."""
        line = {"time": datetime.now().astimezone().isoformat(timespec="milliseconds")} | values
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def describe_process(info: DistInfo) -> dict[str, Any]:
    """Return what a run is of: the command, the version, in a clone its commit, torch, and the device's name."""
    versions = {"version": __version__, "commit": current_commit(), "torch": torch.__version__}
    device = describe_machine(str(info.device))["device"]
    return {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), **versions, "device": device}


class Trace:
    """torch.profiler over a few steps: a trace for Perfetto, and a table of the longest operators.

    Args:
        folder: the run folder.
        info: this process and its device.
        steps: number of recorded steps; 0: none.
    """

    WARM_UP = 3  # steps before: kernels are chosen and compiled, memory is allocated

    def __init__(self, folder: Path, info: DistInfo, steps: int) -> None:
        self._path = folder / "logs" / f"trace_rank_{info.rank:04d}.json.gz"
        self._by = "self_cuda_time_total" if info.device.type == "cuda" else "self_cpu_time_total"
        self.profiler: torch.profiler.profile | None = None
        if steps:
            plan = torch.profiler.schedule(wait=self.WARM_UP - 1, warmup=1, active=steps, repeat=1)
            self.profiler = torch.profiler.profile(schedule=plan, on_trace_ready=self._write, record_shapes=True)

    def __enter__(self) -> Trace:
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.profiler is not None:
            self.profiler.stop()

    def _write(self, profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(self._path))
        table = profiler.key_averages().table(sort_by=self._by, row_limit=30, max_name_column_width=70)
        write_text(self._path.with_name(self._path.name.replace(".json.gz", ".txt")), table + "\n")


class BadRecordLog:
    """Records that could not be read: each is written to `bad_records.jsonl` once, and counted.

    Args:
        path: the file; lines of an earlier part of the run count.
        records: of the list, or their number. Each list of a mixture is counted for itself, and named.
        max_fraction: largest allowed fraction of bad records.
    """

    def __init__(self, path: Path, records: int | Sized, max_fraction: float) -> None:
        self.path = path
        self.records = records
        self.max_fraction = max_fraction
        self._known: dict[int, BadRecord] = {}
        for line in read_json_lines(path) if path.exists() else ():
            record = BadRecord(**{name: line[name] for name in BadRecord._fields})
            self._known.setdefault(record.index, record)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, records: Iterable[BadRecord], write: bool) -> list[BadRecord]:
        """Count the bad records that are new, write them if `write`, and return them.

        Raises:
            TooManyBadRecords: after they were written.
        """
        new = [record for record in records if self._known.setdefault(record.index, record) is record]
        if new and write:
            if self.path.exists():  # an incomplete last line would swallow the next one
                write_text(self.path, "".join(whole_lines(self.path)))
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record._asdict() | self._list_of(record)) + "\n" for record in new)
        for name, indices in self._lists():
            bad = [record for record in self._known.values() if record.index in indices]
            if len(bad) > self.max_fraction * len(indices):
                first = "; ".join(record.error for record in bad[:3])
                raise TooManyBadRecords(
                    f"{len(bad)} of {len(indices)} records{name} cannot be read, more than data.max_bad_fraction "
                    f"{self.max_fraction} allows; all are in {self.path}, the first: {first}"
                )
        return new

    def _lists(self) -> list[tuple[str, range]]:
        """Return the words for each list in messages, and the indices of its records."""
        if isinstance(self.records, Mixture):
            return [(f" of {name}", indices) for name, indices in self.records.spans()]
        return [("", range(self.records if isinstance(self.records, int) else len(self.records)))]

    def _list_of(self, record: BadRecord) -> dict[str, str]:
        """Return the name of a record's list, where there are several."""
        spans = self.records.spans() if isinstance(self.records, Mixture) else []
        return next(({"list": name} for name, indices in spans if record.index in indices), {})


def write_run_metrics(folder: Path, seconds: float, extra: Values | None = None) -> None:
    """Write metrics.json of a finished run: last logged values, last and best checkpoint with their validation top-1.

    `learned` and `verdict` say whether the run learned anything, where that can be told. Paths are relative to the run
    folder; `seconds` is this process's time; `extra` are further entries.
    """
    lines = read_json_lines(folder / "log.jsonl")
    metrics = {name: value for line in lines if line["step"] == lines[-1]["step"] for name, value in line.items()}
    metrics["last"] = {"path": f"checkpoints/{checkpoint_name(metrics['step'])}", "step": metrics["step"]}
    for name in SCORES:
        validated = [line for line in lines if line.get(f"val_{name}") is not None]
        if validated:
            best = max(validated, key=lambda line: line[f"val_{name}"])  # the first of equals
            metrics["last"][name] = metrics.get(f"val_{name}")
            metrics["best"] = {"path": f"checkpoints/{BEST}", "step": best["step"], name: best[f"val_{name}"]}
    if "loss_nothing" in metrics:
        metrics |= judge_log(lines, metrics)
    elif "val_learned" in metrics:
        metrics |= {name: metrics.pop(f"val_{name}") for name in ("learned", "verdict")}
    write_text(folder / "metrics.json", json.dumps(metrics | (extra or {}) | {"seconds": seconds}) + "\n")


def judge_log(lines: Sequence[Values], last: Values) -> dict[str, Any]:
    """Judge a pretraining by its logged lines and the last value of each; see `judge_pretraining`."""
    probes = [line for line in lines if line.get("probe_rank") is not None]
    return judge_pretraining(last.get("loss_pixels", last["loss"]), last["loss_nothing"], probes)


def judge_pretraining(loss: float | None, nothing: float, probes: Sequence[Values] = ()) -> dict[str, Any]:
    """Judge a run: `learned`, and a `verdict` where it has not.

    Args:
        loss: the last one; None: not finite.
        nothing: that of predicting nothing.
        probes: logged lines with the features' effective rank and deviation, in order; the first is the baseline.
    """
    if loss is None or loss >= 0.95 * nothing:
        last = "not finite" if loss is None else f"{loss:.3f}"
        verdict = (
            f"hardly better than predicting nothing, which costs {nothing:.3f}: the last loss is {last}. "
            "Try a longer run, another optim.lr or mask.ratio, and look at the clips with `video-convmae reconstruct`: "
            "docs/pretraining.md, Is it learning?"
        )
        return {"learned": False, "verdict": verdict}
    (rank, last_rank), (std, last_std) = (
        (probes[0][name], probes[-1][name]) if probes else (0, 0) for name in ("probe_rank", "probe_std")
    )
    # A third and a fifth of them in a run whose features were worth less than random ones; both rise, or fall by an
    # eighth at most, in those that learned (docs/results.md, What is normal).
    if last_rank < rank / 2 and last_std < std / 2:
        verdict = (
            f"the features have died, though the loss fell: their effective rank is {last_rank:.1f}, {rank:.1f} at the "
            f"start, and their deviation {last_std:.3f}, {std:.3f} at the start. Try another mask.kind, a smaller "
            "optim.lr or a longer warm-up: docs/pretraining.md, Is it learning?"
        )
        return {"learned": False, "verdict": verdict}
    return {"learned": True, "verdict": None}


def last_words(folder: Path) -> str:
    """Return what a finished run says: its verdict, if it has not learned, and its last and best checkpoint."""
    metrics = read_json(folder / "metrics.json")
    verdict = metrics.get("verdict")
    checkpoints = _final_checkpoints(folder, metrics)
    return checkpoints if verdict is None else f"{verdict}\n{checkpoints}"


def _final_checkpoints(folder: Path, metrics: Values) -> str:
    parts = []
    for name in ("last", "best"):
        if (entry := metrics.get(name)) is not None:
            scores = [f", validation {words} {entry[n]:.4f}" for n, words in SCORES.items() if entry.get(n) is not None]
            parts.append(f"{name} checkpoint {folder / entry['path']} (step {entry['step']}{''.join(scores)})")
    return "; ".join(parts)
