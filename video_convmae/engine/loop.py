"""train(): the loop.

It is written for one process; what several agree on stands in distributed.py. The device is read only where a step is
logged. A step's random numbers (drop path and the like) are a function of (seed, step, rank), and its records of
(seed, step), so that a checkpoint is weights, optimizer and a number, and a resumed run ends bit-equal.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from video_convmae.data.datasets import STEP, Fault, sample_generator
from video_convmae.data.decoding import DecodeError
from video_convmae.data.loader import Batch, LoaderError

from . import checkpoint, distributed
from .distributed import Processes
from .log import BadRecords, NoLog, RunLog, TooManyBadRecords
from .optim import Optimization, clip_gradients
from .tasks import Task, autocast


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained, whatever the task."""

    epochs: float = 800
    """Passes over the list; a repeated clip counts with its record."""
    batch_size: int = 32
    """Records of one device in one forward pass, repeats not counted."""
    accumulate: int = 1
    """Forward passes whose gradients make one step."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast type; fp16 comes with loss scaling, for GPUs older than Ampere."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more arithmetic."""
    compile: bool = False
    """torch.compile each block."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, kept beside them; none: no average."""
    log_every: int = 20
    """Steps between two logged ones; only then does the host wait for the device."""
    save_every: float = 1.0
    """Epochs between two checkpoints, or a part of one. Before a validation and at the end there always is one."""
    keep: int = 2
    """Newest checkpoints that stay."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A non-finite loss or gradient never reaches the weights; after it, stop the run or go on without that step."""


class NonFiniteLoss(RuntimeError):
    """A loss or gradient was not finite; the message names steps and records."""


@dataclass
class State:
    """All that a checkpoint holds."""

    task: Task
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    settings: dict[str, Any]
    step: int = 0

    def save(self, folder: Path, keep: int) -> None:
        """Write a checkpoint of the step that was just done."""
        state = {
            "step": self.step,
            "model": distributed.unwrap(self.task.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "config": self.settings,
        }
        checkpoint.save(folder, self.step, state, keep)

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint."""
        distributed.unwrap(self.task.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["step"])
        self.step = state["step"]


class Window:
    """What happened since the last logged step; losses and norms stay on the device until then."""

    def __init__(self) -> None:
        self.records: list[list[int]] = []
        self.faults: list[Fault] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._clips = 0
        self._waited = 0.0
        self._started = time.perf_counter()
        self._named: dict[str, list[Tensor]] = {}
        self._values: list[list[float]] = []
        self._own_losses: list[float] = []

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time until it is there counts as waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        self._clips += len(batch.clips)
        self.faults += batch.faults
        return batch

    def note(self, values: dict[str, Tensor]) -> None:
        """What a task wants logged of one forward pass."""
        for name, value in values.items():
            self._named.setdefault(name, []).append(value)

    def add(self, records: list[int], loss: Tensor, norm: Tensor) -> None:
        """A step was done."""
        self.records.append(records)
        self._losses.append(loss)
        self._norms.append(norm.to(loss.dtype))

    def summary(self, step: int, optimization: Optimization, group: Processes) -> dict[str, float | int | None]:
        """The logged values: means over the window's steps and over the ranks. Here the host waits for the device."""
        values = torch.stack([torch.stack(self._losses), torch.stack(self._norms)])
        self._own_losses = values[0].tolist()
        self._values = distributed.mean_over_ranks(values).tolist()
        named = {name: float(distributed.mean_over_ranks(torch.stack(v).mean())) for name, v in self._named.items()}
        seconds = time.perf_counter() - self._started
        schedule = optimization.schedule
        return {
            "step": step,
            "epoch": step / optimization.steps_per_epoch,
            "loss": _finite_mean(self._values[0]),
            "lr": schedule.lr(step - 1),
            "grad_norm": _finite_mean(self._values[1]),
            "clips_per_second": self._clips * group.count / seconds,
            "data_wait": self._waited / seconds,
            "seconds_per_step": seconds / len(self.records),
            "eta_seconds": (schedule.steps - step) * seconds / len(self.records),
            **named,
        }

    def complaint(self, step: int, config: TrainConfig, group: Processes) -> str | None:
        """What was not finite: steps, and the records of the ranks whose own loss it was. Call after `summary`.

        fp16's loss scale finds its size by overflowing gradients, so there the loss alone counts.
        """
        losses, norms = self._values
        first = step - len(losses) + 1
        broken = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if config.precision != "fp16":
            broken = [i for i, norm in enumerate(norms) if i in broken or not math.isfinite(norm)]
        if not broken:  # means over the ranks: all of them know
            return None
        own = [
            f"step {first + i}: loss {self._own_losses[i]}, gradient norm {norms[i]}, rank {group.rank}'s "
            f"records {self.records[i]}"
            for i in broken
            if math.isfinite(losses[i]) or not math.isfinite(self._own_losses[i])
        ]
        return "not finite at " + "; ".join(line for lines in distributed.gather(own) for line in lines)


@dataclass(frozen=True)
class Validation:
    """What is measured while a model is trained.

    measure: model, not wrapped -> named values; called on every rank. "top1" says which checkpoint is the best.
    every: epochs between two measurements; the last step is always followed by one.
    """

    measure: Callable[[nn.Module], dict[str, float | int | None]]
    every: float = 1.0


class _Validator:
    """Measures the average of the weights where there is one, else the weights, and keeps the best checkpoint.

    What was measured stands in log.jsonl, and there it is looked up when a run goes on: a run that was killed while it
    measured does so again.
    """

    def __init__(self, validation: Validation, state: State, optimization: Optimization, log: NoLog, folder: Path):
        self._measure = validation.measure
        self._every = max(1, round(validation.every * optimization.steps_per_epoch))
        self._steps = optimization.schedule.steps
        self._state, self._log, self._folder = state, log, folder
        known = distributed.gather(log.values("val_top1"))[0]
        self._best = max((value for value in known.values() if value is not None), default=-math.inf)
        self.is_missing = self.is_due() and state.step not in known

    def is_due(self) -> bool:
        """Whether the step that was just done is one to measure after."""
        step = self._state.step
        return step > 0 and (step % self._every == 0 or step == self._steps)

    def __call__(self) -> dict[str, float | int | None]:
        """The measured values, for the log. Its checkpoint is there already: a kill loses none of the steps."""
        state = self._state
        model = distributed.unwrap(state.task.model) if state.ema is None else state.ema.module
        distributed.share_buffers(model)
        values = self._measure(model)
        top1 = values.get("top1")
        if top1 is not None and top1 > self._best:
            self._best = top1
            if self._log.writes:
                checkpoint.mark_best(self._folder / "checkpoints", state.step)
            self._log.say(f"step {state.step}: best top-1 so far, {top1:.4f}")
        return {f"val_{name}": value for name, value in values.items()}


class StopSignal:
    """Remembers SIGTERM, SIGINT and SIGUSR1, so that the loop can save and leave between two steps.

    Only a second SIGINT, a person's Ctrl-C, ends at once. Slurm sends SIGTERM to every process of a job, and torchrun
    passes its own on to its workers: two of them are one request, and the second arrives while the first saves.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._take) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def train(
    task: Task,
    optimization: Optimization,
    load_from: Callable[[int], Generator[Batch]],
    config: TrainConfig,
    group: Processes,
    folder: Path,
    bad_records: BadRecords,
    settings: dict[str, Any],
    seed: int = 0,
    validation: Validation | None = None,
) -> int:
    """Train until the schedule ends, or a signal asks to stop; the run goes on from its newest checkpoint.

    Args:
        task: the wrapped model and its loss.
        optimization: what steps, and its learning rate at each step.
        load_from: first step -> the batches of this process, `accumulate` a step, from that step to the last.
        config: how to train.
        group: the processes.
        folder: the run folder.
        bad_records: what could not be read.
        settings: the run's configuration as plain data, kept in every checkpoint.
        seed: of the run.
        validation: what is measured beside training; its values are logged as val_NAME, in a line of their own.

    Returns:
        Steps done: all of the schedule's, or fewer where a signal ended the run (its checkpoint is written).

    Raises:
        NonFiniteLoss: with `on_nonfinite: stop`.
        TooManyBadRecords: see `BadRecords`.
        LoaderError: a loading process ended.
        DecodeError: many records in a row could not be read (a disk that is gone, a wrong data.root).
            After these and after TooManyBadRecords the state of the last step that was done is saved.
    """
    schedule = optimization.schedule
    state = _resume(task, optimization, config, group, folder / "checkpoints", settings)
    first = state.step
    log = RunLog(folder, first, schedule.steps) if group.is_main else NoLog()
    save_every = max(1, round(config.save_every * optimization.steps_per_epoch))
    with StopSignal() as stop, contextlib.closing(log), contextlib.closing(load_from(first)) as batches:
        validator = None if validation is None else _Validator(validation, state, optimization, log, folder)
        if validator is not None and validator.is_missing:
            log.write({"step": first, "epoch": first / optimization.steps_per_epoch} | validator())
        window = Window()
        for step in range(first, schedule.steps):
            torch.manual_seed(sample_generator(seed, step, group.rank, STEP).initial_seed())
            try:
                loss, records = _accumulate_gradients(state, batches, window, config, group)
            except (LoaderError, DecodeError) as error:  # of any rank: the others hold the same state, but do not hear
                state.save(folder / "checkpoints", config.keep)
                bad_records.add(window.faults, write=True)
                raise type(error)(f"{error}. {_saved(state)}") from None
            norm = _update(state, optimization, schedule.lr(step))
            window.add(records, loss, norm)
            log.step()

            validates = validator is not None and validator.is_due()
            ends, saves = state.step == schedule.steps, state.step % save_every == 0 or validates
            # One process leaves after any step; several decide it where they speak to each other anyway.
            leaves = stop.received is not None and group.count == 1
            if not (ends or saves or leaves or state.step % config.log_every == 0):
                continue
            reports = distributed.gather((window.faults, stop.received is not None))
            leaves = any(asked for _, asked in reports)
            values = window.summary(state.step, optimization, group)
            if complaint := window.complaint(state.step, config, group):
                if config.on_nonfinite == "stop":
                    raise NonFiniteLoss(f"{complaint}; the newest checkpoint is from before")
                log.say(f"{complaint}; skipped")
            try:
                new = bad_records.add((fault for faults, _ in reports for fault in faults), write=group.is_main)
            except TooManyBadRecords as error:
                if group.is_main:
                    state.save(folder / "checkpoints", config.keep)
                raise TooManyBadRecords(f"{error}\n{_saved(state)}") from None
            for fault in new:
                log.say(f"bad record, another was shown in its place: {fault.error}")
            values |= {"bad_records": len(bad_records)}
            if group.is_main and (ends or saves or leaves):
                state.save(folder / "checkpoints", config.keep)
            log.write(values)
            if validates and (ends or not leaves):
                distributed.barrier()
                log.write({"step": state.step, "epoch": values["epoch"]} | validator())
            if leaves:
                log.say(f"stopped by a signal after step {state.step}; the same command goes on from there")
                break
            window = Window()
    distributed.barrier()
    return state.step


def _saved(state: State) -> str:
    return f"The state after step {state.step} is saved; the same command goes on from there"


def _resume(
    task: Task,
    optimization: Optimization,
    config: TrainConfig,
    group: Processes,
    checkpoints: Path,
    settings: dict[str, Any],
) -> State:
    """The state at the newest checkpoint that can be read; a new run's where there is none."""
    model = distributed.unwrap(task.model)
    scaler = torch.amp.GradScaler(group.device.type, enabled=config.precision == "fp16")
    ema = None if config.ema is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    state = State(task, optimization.optimizer, scaler, ema, settings)
    saved, complaints = checkpoint.load_latest(checkpoints)
    if saved is not None:
        state.restore(saved)
    if group.is_main:
        for complaint in complaints:
            print(f"passed over: {complaint}", flush=True)
        if saved is not None:
            print(f"goes on from step {state.step}, read from {checkpoints}", flush=True)
    return state


def _accumulate_gradients(
    state: State, batches: Iterator[Batch], window: Window, config: TrainConfig, group: Processes
) -> tuple[Tensor, list[int]]:
    """Forward and backward over the parts of one step: the step's loss, on its device, and its records."""
    total, records = torch.zeros((), device=group.device), []
    for part in range(config.accumulate):
        batch = window.next_batch(batches)
        records += batch.records.tolist()
        with distributed.gradient_sync(state.task.model, sync=part == config.accumulate - 1):
            with autocast(group.device, config.precision):
                loss, values = state.task(batch)
            state.scaler.scale(loss / config.accumulate).backward()
        total += loss.detach() / config.accumulate
        window.note(values)
    return total, records


def _update(state: State, optimization: Optimization, lr: float) -> Tensor:
    """One optimizer step; the gradient norm before clipping. Non-finite gradients leave the weights untouched.

    A fused optimizer passes over a step whose `found_inf` is 1. That is how GradScaler speaks to it; here it is used at
    every precision, so that the host does not wait for the device to know. For one that is not fused (LARS) it waits.
    """
    optimizer = state.optimizer
    for options in optimizer.param_groups:
        options["lr"] = lr * options["lr_scale"]
    state.scaler.unscale_(optimizer)
    norm = clip_gradients([p for options in optimizer.param_groups for p in options["params"]], optimization.clip_grad)
    fused = optimizer.defaults.get("fused", False)
    if fused and not state.scaler.is_enabled():
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
    if fused or state.scaler.is_enabled() or norm.isfinite():
        state.scaler.step(optimizer)
    state.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if state.ema:
        state.ema.update_parameters(distributed.unwrap(state.task.model))
    state.step += 1
    return norm


def _finite_mean(values: list[float]) -> float | None:
    """The mean of what is finite; None (JSON knows no NaN) where nothing is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
