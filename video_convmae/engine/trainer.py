"""The training loop.

It is written for one process; what several agree on is in distributed.py. The device is read only where a step is
logged. A step's random numbers (drop path and the like) are a function of (seed, step, rank), and its records of
(seed, step), so that a checkpoint is weights, optimizer and a number, and a resumed run ends bit-equal.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from video_convmae.data.datasets import STEP, sample_generator
from video_convmae.data.decoding import DecodeError
from video_convmae.data.loader import AnyBatch
from video_convmae.data.workers import LoaderError
from video_convmae.errors import UserError
from video_convmae.models.lora import merge_lora, stated_scale
from video_convmae.weights.files import save_file

from .checkpoint import PUBLISHED, Checkpoint, CheckpointError, Saver
from .distributed import DistInfo, all_gather_object, all_reduce_max, barrier, broadcast_object
from .ema import EMA
from .log import (
    BadRecordLog,
    NullLog,
    RankLog,
    RunLog,
    TooManyBadRecords,
    Trace,
    last_words,
    write_run_metrics,
)
from .metrics import StepMetrics, Stopwatch
from .optim import Optimization
from .options import LogConfig, TrainConfig
from .parallel import full_tensor, is_sharded, no_sync, running_statistics, unwrap
from .run_folder import claim, write_config
from .tasks import Task, autocast
from .validation import Validation, Validator
from .watchdog import heartbeat

TENSOR_PARTS = ("model", "ema", "teacher", "optimizer")  # of a checkpoint
MAX_SKIPPED = 50  # steps in a row; fp16's loss scale has then fallen from 65,536 to less than 1e-10


class NonFiniteLoss(UserError, RuntimeError):
    """A loss or gradient was not finite; the message names steps and records."""


class StopRequested(Exception):
    """A signal asked some process to stop; all processes leave before the same step."""


@dataclass
class TrainState:
    """Everything that a checkpoint holds."""

    model: nn.Module  # not under DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None
    config: dict[str, Any]
    records: str | None = None  # digest of the training list
    step: int = 0
    teacher: EMA | None = None  # a target's average of the encoder

    def parts(self) -> dict[str, Any]:
        """Return the parts of a checkpoint; tensors as they lie on this process's device."""
        slots = self.optimizer.state
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.tensors,
            **({} if self.teacher is None else {"teacher": self.teacher.tensors}),
            "optimizer": {
                f"{name}/{slot}": value
                for name, parameter in self.model.named_parameters()
                for slot, value in slots.get(parameter, {}).items()
            },
            "scaler": self.scaler.state_dict(),
            "config": self.config,
            "records": self.records,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint, whatever number of processes wrote it, replicated or sharded."""
        parameters = dict(self.model.named_parameters())
        for name, shape in checkpoint.shapes().items():
            part, _, rest = name.partition("/")
            if part == "optimizer":  # make its slots: a number, or a tensor of the parameter's shape
                owner, _, slot = rest.rpartition("/")
                parameter = parameters[owner]
                value = torch.zeros((), device=parameter.device) if shape == () else torch.zeros_like(parameter)
                self.optimizer.state[parameter][slot] = value
        parts = {part: values for part, values in self.parts().items() if part in TENSOR_PARTS}
        if "ema" in checkpoint.info:  # plain data, None: the run started without an average
            parts["ema"] = None
        checkpoint.fill({f"{part}/{name}": t for part, values in parts.items() for name, t in (values or {}).items()})
        self.model.load_state_dict(parts["model"])
        if checkpoint.info["scaler"]:  # empty if it was not fp16 so far: the scale is found anew
            self.scaler.load_state_dict(checkpoint.info["scaler"])
        if self.ema is not None:
            self.ema.resume(self.model if parts["ema"] is None else None)
        if self.teacher is not None:
            self.teacher.resume(None)
        self.step = checkpoint.step

    def weights(self) -> dict[str, Tensor]:
        """Return what is measured and published: the average if there is one, whole, on the CPU.

        All processes call it together.
        """
        tensors = self.model.state_dict() if self.ema is None else self.ema.tensors
        return {name: full_tensor(tensor).detach().cpu() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Pictures:
    """Pictures of a model beside its training.

    name: of the files and in the loggers.
    every: epochs between two; the last step is always followed by one.
    draw: the model's whole weights (their average if there is one) and the path of a PNG; called on the main process.
    """

    name: str
    every: float
    draw: Callable[[dict[str, Tensor], Path], None]


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


class Trainer:
    """Trains until the schedule ends, or a signal asks to stop.

    Args:
        task: the wrapped model and its loss.
        optimization: optimizer, schedule, clipping.
        batches: first step -> the batches of this process, `train.accumulate` a step, from that step to the last.
        train, log: options.
        info: the processes.
        folder: the run folder.
        bad_records: log of records that could not be read.
        run_config: configuration of the run as plain data, kept in config.yaml and every checkpoint.
        records: digest of the training list, kept in every checkpoint.
        seed: of the run.
        validation: measurement beside training; its values are logged in a line of their own.
        resume_from: checkpoint to resume from, the same on every rank.
    """

    def __init__(
        self,
        *,
        task: Task,
        optimization: Optimization,
        batches: Callable[[int], Generator[AnyBatch]],
        train: TrainConfig,
        log: LogConfig,
        info: DistInfo,
        folder: Path,
        bad_records: BadRecordLog,
        run_config: dict[str, Any],
        records: str | None = None,
        seed: int = 0,
        validation: Validation | None = None,
        resume_from: Checkpoint | None = None,
    ) -> None:
        self.task, self.optimization, self.batches = task, optimization, batches
        self.train, self.log_config, self.info, self.folder, self.seed = train, log, info, folder, seed
        self.bad_records, self.validation, self.resume_from = bad_records, validation, resume_from
        model = unwrap(task.model)
        scaler = torch.amp.GradScaler(info.device.type, enabled=train.precision == "fp16")
        ema = None if train.ema is None else EMA(model, train.ema)
        self.state = TrainState(model, optimization.optimizer, scaler, ema, run_config, records, teacher=task.average)
        self.statistics = running_statistics(model)
        self.metrics = StepMetrics()
        self.skipped = 0  # steps in a row, up to now, whose gradients were not finite
        self.stopwatch = Stopwatch(info.device, log.profile)
        self.stop_signal = StopSignal()
        self.trace = Trace(folder, info, log.trace)
        self.pictures: Pictures | None = None  # the commands set it: the engine draws nothing itself
        self.log = NullLog()  # a RunLog on rank 0, while `fit` runs
        self.rank_log = RankLog(folder, info)
        self.publishes = True  # the weights of a finished run, in one file
        self.stopped_early = False
        self.keep_every = None if train.keep_every is None else self._epochs_to_steps(train.keep_every)
        saved = None if resume_from is None else resume_from.step
        self.saver = Saver(folder / "checkpoints", info.is_main, train.keep, self.keep_every, saved)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.optimization.schedule.steps

    @property
    def is_finished(self) -> bool:
        """True if nothing is left to train: all steps are done, or no validation was better for long."""
        return self.stopped_early or self.state.step == self.steps

    def fit(self) -> int:
        """Train; return the steps done: all of the schedule's, or fewer where a signal or early stopping ended the run.

        Raises:
            UserError: another run writes into the folder.
            NonFiniteLoss: with `on_nonfinite: stop`.
            TooManyBadRecords: see `BadRecordLog`.
            LoaderError: a loading process ended, of this rank or of another.
            DecodeError: many records in a row could not be read (a disk that is gone, a wrong data.root).
            CheckpointError: a checkpoint could not be written; earlier ones are whole.

        After a LoaderError, a DecodeError or TooManyBadRecords the state of the last whole step is saved.
        """
        with claim(self.folder, self.info):
            return self._fit()

    def _fit(self) -> int:
        started, state = time.perf_counter(), self.state
        if self.info.is_main:
            self.saver.folder.mkdir(exist_ok=True)  # what cannot be written is known before the first step
            write_config(self.folder, state.config, 0 if self.resume_from is None else self.resume_from.step)
        if self.resume_from is not None:
            heartbeat(f"reading {self.resume_from.path}")
            state.restore(self.resume_from)
            if self.info.is_main:
                print(f"resumes from step {state.step}, read from {self.resume_from.path.parent}", flush=True)
                if state.step == self.steps:
                    print(
                        f"{self.folder} is finished: all of its {self.steps} steps are done and nothing is trained; "
                        f"another run has another --output, and --init.weights {self.folder} starts it from this one"
                    )
        first_step = state.step
        self._open_log(first_step)
        with (
            self.stop_signal,
            contextlib.closing(self.log),
            self.rank_log,
            contextlib.closing(self.saver),
            self.trace,
            contextlib.closing(self.batches(first_step)) as batches,
        ):
            self._train(batches)
            self.saver.wait()
            if self.publishes and self.is_finished:
                self._publish()
        barrier()
        if self.info.is_main and self.is_finished:
            if state.step != first_step or not (self.folder / "metrics.json").exists():
                extra = {"stopped_early": True} if self.stopped_early else {}
                write_run_metrics(self.folder, time.perf_counter() - started, extra)
            print(last_words(self.folder), flush=True)
        return state.step

    def _open_log(self, first_step: int) -> None:
        """Open the log on the main process; where that fails, all processes raise a UserError."""
        error = None
        if self.info.is_main:
            try:
                self.log = RunLog(self.folder, first_step, self.steps, self.log_config.to, self.state.config)
            except UserError as met:
                error = str(met)
        if (error := broadcast_object(error)) is not None:
            raise UserError(error)

    def _train(self, batches: Iterator[AnyBatch]) -> None:
        """Step until the schedule ends or a signal stops the run; log, save and validate between steps."""
        state, save_every = self.state, self._epochs_to_steps(self.train.save_every)
        validator = None
        if self.validation is not None:
            per_epoch = self.optimization.steps_per_epoch
            validator = Validator(self.validation, per_epoch, self.steps, self.log, self.saver)
            if validator.is_missing(state.step):
                self._validate(validator)
            self._check_patience(validator)
        draw_every = None if self.pictures is None else self._epochs_to_steps(self.pictures.every)
        self.metrics = StepMetrics()
        while not self.is_finished:
            try:
                with self.stopwatch.step() if self.log_config.profile else contextlib.nullcontext():
                    self.train_step(batches)
            except StopRequested:
                if len(self.metrics):
                    self._log_step()
                self._save()
                self.saver.wait()
                self.log.print(f"stopped by a signal after step {state.step}; the same command resumes from there")
                return
            if self.trace.profiler is not None:
                self.trace.profiler.step()
            validates = validator is not None and validator.is_due(state.step)
            saves = validates and self.validation is not None and self.validation.best is not None
            saves = saves or state.step % save_every == 0 or state.step == self.steps
            saves = saves or (self.keep_every is not None and state.step % self.keep_every == 0)
            if saves or validates or state.step % self.train.log_every == 0:
                self._log_step(saves)
                if validator is not None and validates:
                    self._validate(validator)
                    self._check_patience(validator)
                self.metrics = StepMetrics()
            if draw_every is not None and (state.step % draw_every == 0 or state.step == self.steps):
                self._draw()

    def train_step(self, batches: Iterator[AnyBatch]) -> None:
        """Take one optimizer step: gradients of `accumulate` batches, clipped; the weights, and their average.

        Non-finite gradients leave the model untouched. A fused optimizer skips a step whose `found_inf` is 1: the way
        in which GradScaler tells it, used here at every precision, so that the host does not wait for the device. For
        an optimizer that is not fused (LARS) the host waits. Running statistics, which the forward pass has changed
        before anything is known, are put back. The norm is that of all ranks, so all do the same.
        """
        state, optimizer, scaler, parts = self.state, self.state.optimizer, self.state.scaler, self.train.accumulate
        torch.manual_seed(sample_generator(self.seed, state.step, self.info.rank, STEP).initial_seed())
        step_loss = torch.zeros((), device=self.info.device)
        self.task.step = state.step
        before = [statistic.clone() for statistic in self.statistics]
        for part in range(parts):
            batch = self._next_batch(batches, may_stop=part == 0)
            heartbeat(f"step {state.step + 1}: forward and backward pass, with the other ranks' gradients")
            with no_sync(self.task.model) if part + 1 < parts else contextlib.nullcontext():
                with self.stopwatch.phase("forward"), autocast(self.info.device, self.train.precision):
                    loss, values = self.task(batch)
                with self.stopwatch.phase("backward"):
                    scaler.scale(loss / parts).backward()
            step_loss += loss.detach() / parts
            if values:
                self.metrics.add_values(values)
        heartbeat(f"step {state.step + 1}: optimizer")
        with self.stopwatch.phase("optimizer"):
            lr = self.optimization.schedule.lr(state.step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            scaler.unscale_(optimizer)
            norm = self.optimization.clip_gradients()
            is_finite = norm.isfinite()
            fused = optimizer.defaults.get("fused", False)
            if fused and not scaler.is_enabled():
                optimizer.grad_scale = None  # type: ignore[attr-defined]  # both are how GradScaler speaks to it
                optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
            if fused or scaler.is_enabled() or is_finite:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            for statistic, old in zip(self.statistics, before):
                torch.where(is_finite, statistic, old, out=statistic)
            for average in filter(None, (state.ema, state.teacher)):
                average.update(state.model, state.step)
        state.step += 1
        self.metrics.add_step(step_loss, norm)

    def _next_batch(self, batches: Iterator[AnyBatch], may_stop: bool) -> AnyBatch:
        """Return the next batch once all processes have theirs and none was asked to stop.

        One small all-reduce before each forward pass: so no process is left alone in a collective, and all leave after
        the same step.

        Raises:
            StopRequested: some process was asked to stop.
            LoaderError, DecodeError, CheckpointError: some process has met it.
        """
        heartbeat(f"waiting for the data of step {self.state.step + 1}")
        batch: AnyBatch | None = None
        error: Exception | None = self.saver.error
        stops = may_stop and self.stop_signal.received is not None
        if error is None and not stops:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except (LoaderError, DecodeError) as met:
                error = met
            else:
                self.metrics.add_batch(batch, time.perf_counter() - started)
        heartbeat(f"has its data of step {self.state.step + 1}, waiting until the other ranks have theirs")
        worst = all_reduce_max(2 if error else int(stops))
        if worst == 2:
            self._fail(error)
        if worst == 1:
            raise StopRequested
        assert batch is not None  # no process has met an error
        return batch

    def _fail(self, error: Exception | None) -> NoReturn:
        """Save the state of the last whole step and raise the first error that any process has met."""
        met = all_gather_object(None if error is None else (type(error), str(error)))
        rank, (kind, text) = next((rank, each) for rank, each in enumerate(met) if each)
        where = f" (rank {rank})" if self.info.world_size > 1 else ""
        if kind is CheckpointError:
            raise CheckpointError(text + where)
        saved = self._save_now()
        self.bad_records.add(self._all_bad_records(), write=self.info.is_main)
        raise kind(f"{text}{where}. {saved}") from None

    def _log_step(self, saves: bool = False) -> None:
        """Log the steps since the last logged one, and save; the host waits for the device here.

        Raises:
            NonFiniteLoss, TooManyBadRecords, CheckpointError
        """
        state, metrics, info = self.state, self.metrics, self.info
        heartbeat(f"logging step {state.step}")
        values = metrics.summarize(state.step, self.optimization, info, self.stopwatch.take(len(metrics)))
        values |= self.task.measure()
        if state.scaler.is_enabled():
            values["loss_scale"] = state.scaler.get_scale()
        if nonfinite := metrics.nonfinite_steps(state.step, self.train.precision, info):
            if self.train.on_nonfinite == "stop":
                raise NonFiniteLoss(
                    f"{nonfinite}. The newest checkpoint is from before; try a smaller optim.lr, optim.clip_grad, "
                    "another train.precision, or train.on_nonfinite skip"
                )
            self.log.print(f"{nonfinite}; skipped")
        self.skipped = metrics.count_skipped(self.skipped)
        if self.skipped >= min(MAX_SKIPPED, self.steps):
            scale = f", fp16's loss scale is {values['loss_scale']:g}" if "loss_scale" in values else ""
            raise NonFiniteLoss(
                f"the gradients of the last {self.skipped} steps were not finite{scale}: no weight has changed; "
                "try bf16 or fp32, a smaller optim.lr, or optim.clip_grad"
            )
        try:
            new = self.bad_records.add(self._all_bad_records(), write=info.is_main)
        except TooManyBadRecords as error:
            raise TooManyBadRecords(f"{error}. {self._save_now()}") from None
        for record in new:
            self.log.print(f"bad record, replaced by another: {record.error}")
        if saves:
            self._save()
        self.log.write(values | {"bad_records": len(self.bad_records)})
        self.rank_log.write(metrics.own)

    def _validate(self, validator: Validator) -> None:
        """Measure, and log it in a line of its own."""
        state = self.state
        own = validator.validation.own_model or state.ema is not None or is_sharded(state.model)
        values = validator.measure(state.step, None if own else state.model, state.weights)
        self.log.write({"step": state.step, "epoch": state.step / self.optimization.steps_per_epoch} | values)

    def _draw(self) -> None:
        """Draw and log a picture; what goes wrong is a line, not the end of the run."""
        weights, step = self.state.weights(), self.state.step
        if not self.info.is_main or self.pictures is None:
            return
        heartbeat(f"draws a picture after step {step}")
        path = self.folder / "pictures" / f"{self.pictures.name}_step_{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            self.pictures.draw(weights, path)
        except Exception as error:
            self.log.print(f"warning: no picture of step {step}: {type(error).__name__}: {error}")
        else:
            self.log.picture(self.pictures.name, path, step)

    def _check_patience(self, validator: Validator) -> None:
        """End the run if no validation was better for long; a resumed run finds that in its log."""
        if validator.is_exhausted and self.state.step < self.steps:
            self.stopped_early = self.log.is_finished = True
            best, patience = validator.best_step, validator.validation.patience
            self.log.print(
                f"stopped early after step {self.state.step} of {self.steps}: no better validation than that of step "
                f"{best} in the last {patience} (validate.patience); its weights are in {self.saver.folder / 'best'}"
            )

    def _publish(self) -> None:
        """Write the weights in one file for use elsewhere; `video_convmae.load` reads it."""
        weights = merge_lora(self.state.weights(), stated_scale(self.state.config.get("model")))
        if self.info.is_main:
            save_file(weights, self.folder / PUBLISHED, self.state.config)

    def _all_bad_records(self) -> list:
        return [record for records in all_gather_object(self.metrics.bad_records) for record in records]

    def _epochs_to_steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.optimization.steps_per_epoch))

    def _save(self) -> None:
        self.saver.save(self.state.step, self.state.parts())

    def _save_now(self) -> str:
        """Save and wait; return a sentence that says so."""
        self._save()
        self.saver.wait()
        return f"The state after step {self.state.step} is saved; the same command resumes from there"
