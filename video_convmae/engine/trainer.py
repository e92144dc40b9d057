"""train(): the loop.

It is written for one process; what several agree on stands in distributed.py. The device is read only where a step is
logged. A step's random numbers (drop path and the like) are a function of (seed, step, rank), and its records of
(seed, step), so that a checkpoint is weights, optimizer and a number, and a resumed run ends bit-equal.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from video_convmae.data.datasets import STEP, sample_generator
from video_convmae.data.decoding import DecodeError
from video_convmae.data.loader import Batch
from video_convmae.data.workers import LoaderError
from video_convmae.weights import files

from . import checkpoint, distributed
from .checkpoint import CheckpointError, Saver
from .distributed import DistInfo, Parallel
from .log import BadRecords, LogConfig, NullLog, RankLog, RunLog, Stopwatch, TooManyBadRecords, Trace
from .metrics import StepMetrics
from .optim import EMA, Optimization, clip_gradients
from .tasks import Task, autocast


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained, whatever the task."""

    epochs: float = 800
    """Passes over the list; a repeated clip counts with its record."""
    batch_size: int = 32
    """Records of one device in one forward pass, repeats not counted."""
    accumulate: int = 1
    """Forward passes whose gradients make one step, where effective_batch does not say it."""
    effective_batch: int | None = None
    """Records of one step on all devices, repeats not counted: accumulation and, if need be, batch_size adapt to the
    number of devices. none: batch_size x devices x accumulate as the run begins; kept when it goes on with others."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast type; fp16 comes with loss scaling, for GPUs older than Ampere."""
    parallel: Parallel = "ddp"
    """Several devices: ddp keeps all weights on each; fsdp shards weights, gradients and optimizer (large, huge)."""
    compress_gradients: bool = False
    """Send gradients between devices as bfloat16: half the bytes."""
    activation_checkpointing: Literal["none", "conv", "all"] = "none"
    """Blocks that compute their activations again in the backward pass instead of keeping them: those of the
    convolutional stages, or all, which is a third more arithmetic."""
    compile: bool = False
    """torch.compile each block."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, kept beside them; none: no average."""
    log_every: int = 20
    """Steps between two logged ones; only then does the host wait for the device."""
    save_every: float = 1.0
    """Epochs between two checkpoints, or a part of one. Before a validation and at the end there always is one."""
    keep: int = 2
    """Newest checkpoints that stay; the best by the validation stays too."""
    keep_every: float | None = None
    """Epochs between checkpoints that stay for good; none: none does."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A non-finite loss or gradient never reaches the weights; after it, stop the run or go on without that step."""

    def __post_init__(self) -> None:
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise ValueError("train.precision is fp16 and train.parallel is fsdp; expected bf16 or fp32 with fsdp")


class NonFiniteLoss(RuntimeError):
    """A loss or gradient was not finite; the message names steps and records."""


@dataclass
class State:
    """All that a checkpoint holds."""

    model: nn.Module  # not under DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None
    settings: dict[str, Any]
    step: int = 0

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds, by part; tensors as they lie on this process's device."""
        slots = self.optimizer.state
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.tensors,
            "optimizer": {
                f"{name}/{slot}": value
                for name, parameter in self.model.named_parameters()
                for slot, value in slots.get(parameter, {}).items()
            },
            "scaler": self.scaler.state_dict(),
            "config": self.settings,
        }

    def restore(self, path: Path) -> None:
        """Take up a checkpoint, whatever number of processes wrote it, replicated or sharded."""
        about, shapes = checkpoint.about(path), files.shard_shapes(path)
        self._make_slots([name.split("/", 1)[1] for name in shapes if name.startswith("optimizer/")], shapes)
        parts = {part: values for part, values in self.parts().items() if part in ("model", "ema", "optimizer")}
        if "ema" in about:  # as none: the run began without
            parts["ema"] = None
        tensors = {f"{part}/{name}": t for part, values in parts.items() for name, t in (values or {}).items()}
        distributed.read_shards(tensors, path)
        self.model.load_state_dict(parts["model"])
        self.scaler.load_state_dict(about["scaler"])
        if self.ema is not None:
            self.ema.begin(self.model if parts["ema"] is None else None)
        self.step = about["step"]

    def _make_slots(self, names: list[str], shapes: dict[str, tuple[int, ...]]) -> None:
        """Room for what the optimizer remembers of each parameter: a number, or something of the parameter's shape."""
        parameters = dict(self.model.named_parameters())
        for name in names:
            owner, _, slot = name.rpartition("/")
            parameter = parameters[owner]
            is_number = shapes[f"optimizer/{name}"] == ()
            value = torch.zeros((), device=parameter.device) if is_number else torch.zeros_like(parameter)
            self.optimizer.state[parameter][slot] = value

    def weights(self) -> dict[str, Tensor]:
        """What is measured and published: the average where there is one, whole, on the CPU. All processes call it."""
        tensors = self.model.state_dict() if self.ema is None else self.ema.tensors
        return {name: distributed.full_tensor(tensor).detach().cpu() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Validation:
    """What is measured while a model is trained.

    measure: model, not wrapped -> named values; called on every rank. "top1" says which checkpoint is the best.
    build: a model of the same kind on this process's device, for weights that are not those of the trained one.
    every: epochs between two measurements; the last step is always followed by one.
    """

    measure: Callable[[nn.Module], dict[str, float | int | None]]
    build: Callable[[], nn.Module]
    every: float = 1.0


class _Validator:
    """Measures the average of the weights where there is one, else the weights, and keeps the best checkpoint.

    What was measured stands in log.jsonl, and there it is looked up when a run goes on: a run that was killed while it
    measured does so again.
    """

    def __init__(self, validation: Validation, state: State, optimization: Optimization, log: NullLog, saver: Saver):
        self._validation = validation
        self._every = max(1, round(validation.every * optimization.steps_per_epoch))
        self._steps = optimization.schedule.steps
        self._state, self._log, self._saver = state, log, saver
        known = distributed.all_gather_object(log.values("val_top1"))[0]
        self._best = max((value for value in known.values() if value is not None), default=-math.inf)
        self.is_missing = self.is_due() and state.step not in known

    def is_due(self) -> bool:
        """Whether the step that was just done is one to measure after."""
        step = self._state.step
        return step > 0 and (step % self._every == 0 or step == self._steps)

    def __call__(self) -> dict[str, float | int | None]:
        """The measured values, for the log. Its checkpoint is on its way already: a kill loses none of the steps."""
        state = self._state
        values = self._validation.measure(self._model())
        top1 = values.get("top1")
        if top1 is not None and top1 > self._best:
            self._best = top1
            self._saver.mark_best(state.step)
            self._log.say(f"step {state.step}: best top-1 so far, {top1:.4f}")
        return {f"val_{name}": value for name, value in values.items()}

    def _model(self) -> nn.Module:
        """The model to measure: where it is not the one that is trained, or that is sharded, a copy."""
        state = self._state
        if state.ema is None and not distributed.is_sharded(state.model):
            return state.model
        model = self._validation.build()
        model.load_state_dict(state.weights())
        return model


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


class _StopRequested(Exception):
    """A signal asked some process to stop; all have heard of it before the same step."""


def train(
    task: Task,
    optimization: Optimization,
    load_from: Callable[[int], Generator[Batch]],
    config: TrainConfig,
    group: DistInfo,
    folder: Path,
    bad_records: BadRecords,
    settings: dict[str, Any],
    seed: int = 0,
    validation: Validation | None = None,
    log_config: LogConfig | None = None,
    begun: Path | None = None,
) -> int:
    """Train until the schedule ends, or a signal asks to stop.

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
        log_config: what is logged besides the usual; None: nothing.
        begun: the checkpoint that the run goes on from, the same on every rank.

    Returns:
        Steps done: all of the schedule's, or fewer where a signal ended the run (its checkpoint is written).

    Raises:
        NonFiniteLoss: with `on_nonfinite: stop`.
        TooManyBadRecords: see `BadRecords`.
        LoaderError: a loading process ended, of this rank or of another.
        DecodeError: many records in a row could not be read (a disk that is gone, a wrong data.root).
            After these and after TooManyBadRecords the state of the last step that was done is saved.
        CheckpointError: a checkpoint could not be written; those before it are whole.
    """
    log_config = log_config or LogConfig()
    state = _begin(task, optimization, config, group, settings, begun)
    per_epoch = optimization.steps_per_epoch
    keep_every = None if config.keep_every is None else max(1, round(config.keep_every * per_epoch))
    saver = Saver(folder / "checkpoints", group.is_main, config.keep, keep_every, None if begun is None else state.step)
    log = RunLog(folder, state.step, optimization.schedule.steps) if group.is_main else NullLog()
    with (
        StopSignal() as stop,
        contextlib.closing(log),
        RankLog(folder, group.rank) as rank_log,
        contextlib.closing(saver),
        Trace(folder, group.rank, log_config.trace) as trace,
        contextlib.closing(load_from(state.step)) as batches,
    ):
        run = _Run(task, state, optimization, config, group, saver, log, rank_log, bad_records, stop, trace)
        run.profile = log_config.profile
        if validation is not None:
            run.validator = _Validator(validation, state, optimization, log, saver)
        run.train(batches, seed)
        saver.wait()
        if state.step == optimization.schedule.steps:
            _publish(state, folder / checkpoint.PUBLISHED, group)
    distributed.barrier()
    return state.step


def _begin(
    task: Task,
    optimization: Optimization,
    config: TrainConfig,
    group: DistInfo,
    settings: dict[str, Any],
    begun: Path | None,
) -> State:
    """A new run's state, or that of the checkpoint that it goes on from."""
    model = distributed.unwrap(task.model)
    scaler = torch.amp.GradScaler(group.device.type, enabled=config.precision == "fp16")
    ema = None if config.ema is None else EMA(model, config.ema)
    state = State(model, optimization.optimizer, scaler, ema, settings)
    if begun is not None:
        distributed.heartbeat(f"reads {begun}")
        state.restore(begun)
        if group.is_main:
            print(f"goes on from step {state.step}, read from {begun.parent}", flush=True)
    return state


def _publish(state: State, path: Path, group: DistInfo) -> None:
    """The weights in one file for use elsewhere; `video_convmae.load` reads it."""
    weights = state.weights()
    if group.is_main:
        partial = path.with_name("partial.safetensors")
        files.save(weights, partial, state.settings)
        partial.replace(path)


@dataclass
class _Run:
    """The steps of a run, and what is done between them."""

    task: Task
    state: State
    optimization: Optimization
    config: TrainConfig
    group: DistInfo
    saver: Saver
    log: NullLog
    rank_log: RankLog
    bad_records: BadRecords
    stop: StopSignal
    trace: Trace
    profile: bool = False
    validator: _Validator | None = None

    def train(self, batches: Iterator[Batch], seed: int) -> None:
        """From the state's step to the last, or until all have heard of a signal."""
        state, steps = self.state, self.optimization.schedule.steps
        save_every = max(1, round(self.config.save_every * self.optimization.steps_per_epoch))
        if self.validator is not None and self.validator.is_missing:
            self._validate()
        self._open_window()
        while state.step < steps:
            torch.manual_seed(sample_generator(seed, state.step, self.group.rank, STEP).initial_seed())
            try:
                with self.window.stopwatch.step():
                    loss, records = self._accumulate_gradients(batches)
                    norm = self._update()
            except _StopRequested:
                self._leave()
                return
            self.window.add(records, loss, norm)
            self.log.step()
            self.trace.step()
            validates = self.validator is not None and self.validator.is_due()
            saves = state.step % save_every == 0 or validates or state.step == steps or self.saver.is_kept(state.step)
            if saves or state.step % self.config.log_every == 0:
                self._close_window(saves)
                if validates:
                    self._validate()
                self._open_window()

    def _open_window(self) -> None:
        self.window = StepMetrics(Stopwatch(self.group.device, self.profile))

    def _accumulate_gradients(self, batches: Iterator[Batch]) -> tuple[Tensor, list[int]]:
        """Forward and backward over the parts of one step: the step's loss, on its device, and its records."""
        total, records = torch.zeros((), device=self.group.device), []
        parts, number = self.config.accumulate, self.state.step + 1
        for part in range(parts):
            distributed.heartbeat(f"waits for the data of step {number}")
            batch = self._next_batch(batches, may_stop=part == 0)
            records += batch.records.tolist()
            distributed.heartbeat(f"step {number}: forward and backward pass, with the other ranks' gradients")
            with distributed.gradient_sync(self.task.model, sync=part == parts - 1):
                with self.window.stopwatch("forward"), autocast(self.group.device, self.config.precision):
                    loss, values = self.task(batch)
                with self.window.stopwatch("backward"):
                    self.state.scaler.scale(loss / parts).backward()
            total += loss.detach() / parts
            self.window.note(values)
        return total, records

    def _next_batch(self, batches: Iterator[Batch], may_stop: bool) -> Batch:
        """The next batch, once all processes have theirs and none was asked to stop.

        So none is left alone in a collective: what one meets, all leave with, after the same step.

        Raises:
            _StopRequested: some process was asked to stop.
            LoaderError, DecodeError, CheckpointError: some process has met this.
        """
        batch, error = None, self.saver.error
        stops = may_stop and self.stop.received is not None
        if error is None and not stops:
            try:
                batch = self.window.next_batch(batches)
            except (LoaderError, DecodeError) as trouble:
                error = trouble
        distributed.heartbeat(f"has its data of step {self.state.step + 1}, waits until the other ranks have theirs")
        worst = distributed.all_reduce_max(2 if error else int(stops))
        if worst == 2:
            self._give_up(error)
        if worst == 1:
            raise _StopRequested
        return batch

    def _give_up(self, error: Exception | None) -> NoReturn:
        """Save the state of the last whole step and raise what the first process that has met something has met."""
        met = distributed.all_gather_object(None if error is None else (type(error), str(error)))
        rank, (kind, text) = next((rank, each) for rank, each in enumerate(met) if each)
        where = f" (rank {rank})" if self.group.count > 1 else ""
        if kind is CheckpointError:
            raise CheckpointError(text + where)
        self._save_now()
        faults = [fault for faults in distributed.all_gather_object(self.window.faults) for fault in faults]
        self.bad_records.add(faults, write=self.group.is_main)
        raise kind(f"{text}{where}. {self._saved()}") from None

    def _update(self) -> Tensor:
        """One optimizer step; the gradient norm before clipping. Non-finite gradients leave the weights untouched.

        A fused optimizer passes over a step whose `found_inf` is 1. That is how GradScaler speaks to it; here it is
        used at every precision, so that the host does not wait for the device to know. For one that is not fused
        (LARS) it waits.
        """
        state, optimizer, scaler = self.state, self.state.optimizer, self.state.scaler
        distributed.heartbeat(f"step {state.step + 1}: optimizer")
        with self.window.stopwatch("optimizer"):
            lr = self.optimization.schedule.lr(state.step)
            for options in optimizer.param_groups:
                options["lr"] = lr * options["lr_scale"]
            scaler.unscale_(optimizer)
            parameters = [p for options in optimizer.param_groups for p in options["params"]]
            norm = clip_gradients(parameters, self.optimization.clip_grad)
            fused = optimizer.defaults.get("fused", False)
            if fused and not scaler.is_enabled():
                optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
            if fused or scaler.is_enabled() or norm.isfinite():
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if state.ema is not None:
                state.ema.update(state.model)
            state.step += 1
        return norm

    def _close_window(self, saves: bool) -> None:
        """Log what happened, and save; here the host waits for the device.

        Raises:
            NonFiniteLoss, TooManyBadRecords, CheckpointError
        """
        state, window, group = self.state, self.window, self.group
        distributed.heartbeat(f"logs step {state.step}")
        values = window.summary(state.step, self.optimization, group)
        if complaint := window.complaint(state.step, self.config.precision, group):
            if self.config.on_nonfinite == "stop":
                raise NonFiniteLoss(f"{complaint}; the newest checkpoint is from before")
            self.log.say(f"{complaint}; skipped")
        faults = [fault for faults in distributed.all_gather_object(window.faults) for fault in faults]
        try:
            new = self.bad_records.add(faults, write=group.is_main)
        except TooManyBadRecords as error:
            self._save_now()
            raise TooManyBadRecords(f"{error}\n{self._saved()}") from None
        for fault in new:
            self.log.say(f"bad record, another was shown in its place: {fault.error}")
        values |= {"bad_records": len(self.bad_records)}
        if saves:
            self.saver.save(state.step, state.parts())
        self.log.write(values)
        self.rank_log.write(window.own)

    def _validate(self) -> None:
        """Measure, and log it in a line of its own."""
        epoch = self.state.step / self.optimization.steps_per_epoch
        self.log.write({"step": self.state.step, "epoch": epoch} | self.validator())

    def _leave(self) -> None:
        """A signal asked to stop: log what was not logged yet, and save."""
        if len(self.window):
            self._close_window(saves=False)
        self._save_now()
        self.log.say(f"stopped by a signal after step {self.state.step}; the same command goes on from there")

    def _save_now(self) -> None:
        self.saver.save(self.state.step, self.state.parts())
        self.saver.wait()

    def _saved(self) -> str:
        return f"The state after step {self.state.step} is saved; the same command goes on from there"
