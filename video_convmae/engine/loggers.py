"""Loggers beside log.jsonl, by the names of `log.to`: TensorBoard, Weights & Biases, MLflow.

Each is a `Logger`, made on the main process alone; its library is imported where it is asked for. Where they log to is
the libraries' own business and said by their own variables (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI ...).

A remote logger works in a thread, and a failure there is one warning: no network can stop or hold up a training. What
it has logged is kept in `logs/NAME.json`, so that a resumed run goes on in the same place and logs no step twice.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from video_convmae.atomic import read_json, write_text
from video_convmae.errors import UserError

from .metrics import Values
from .options import LoggerName

PROJECT = "video-convmae"  # of runs whose environment names none
EXTRAS: dict[LoggerName, tuple[str, str]] = {  # beside TensorBoard, which every installation has: module and extra
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}
MOST_WAITING = 1000  # lines that wait for a remote logger; further ones are dropped
CLOSING = 60.0  # seconds that a finished run waits for what is not yet sent


class Logger(Protocol):
    """Takes what a run logs."""

    def write(self, values: Values) -> None:
        """Log numbers of the step `values["step"]`."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG."""

    def close(self, finished: bool) -> None:
        """Send what is left; `finished`: all steps are done."""


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raise a UserError that names the extra where the library of a logger is not installed."""
    for name in names:
        module, extra = EXTRAS.get(name, (None, None))
        if module is not None and importlib.util.find_spec(module) is None:
            raise UserError(
                f'log.to has {name}, and {module} is not installed: pip install "video-convmae[{extra}]", or leave it '
                "out of log.to"
            )


def open_loggers(
    names: Sequence[LoggerName], folder: Path, config: dict[str, Any], first_step: int, warn: Callable[[str], None]
) -> list[Logger]:
    """Open the loggers of a run.

    Args:
        names: of `log.to`.
        folder: the run folder.
        config: of the run, as plain data.
        first_step: steps done.
        warn: prints a warning.

    Raises:
        UserError: a new run's logger cannot be opened (no login, no server); a resumed run goes on without it.
    """
    loggers: list[Logger] = []
    for name in names:
        if name == "tensorboard":
            loggers.append(TensorBoard(folder, first_step))
            continue
        memory = Memory(folder / "logs" / f"{name}.json")
        try:
            opened: Logger = WandB(folder, config, memory) if name == "wandb" else MLflow(folder, config, memory)
        except Exception as error:
            reason = f"{name} cannot be opened: {_in_a_line(error)}"
            if not first_step:
                raise UserError(f"{reason}; log in or set its server, or leave it out of log.to") from error
            warn(f"{reason}; the run goes on without it")
        else:
            loggers.append(Background(name, opened, memory, warn))
    return loggers


class TensorBoard:
    """TensorBoard's event files in the run folder; those of steps that are repeated are purged."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports that only rank 0 of a run needs

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, values: Values) -> None:
        """Log numbers."""
        for name, value in numbers(values).items():
            self._writer.add_scalar(name, value, values["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG."""
        import numpy as np
        from PIL import Image

        self._writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self, finished: bool) -> None:
        """Close the files."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, named as the run folder.

    The step is a value of its own: W&B's own counter takes no line of a step that it has passed, such as the validation
    of the step before a run was killed.
    """

    def __init__(self, folder: Path, config: dict[str, Any], memory: Memory) -> None:
        import wandb

        self._wandb = wandb
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(
            project=project,
            name=folder.resolve().name,
            id=memory.identity,
            resume="allow" if memory.identity else None,
            dir=str(folder),
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        memory.identity = self._run.id
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, values: Values) -> None:
        """Log numbers."""
        self._run.log(numbers(values) | {"step": values["step"]})

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG."""
        self._run.log({name: self._wandb.Image(str(path)), "step": step})

    def close(self, finished: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow, named as the run folder, in the experiment of MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, folder: Path, config: dict[str, Any], memory: Memory) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._client, self._metric = MlflowClient(), Metric
        self._id = memory.identity or self._create_run(folder.resolve().name)
        memory.identity = self._id
        self._client.update_run(self._id, status="RUNNING")
        self._client.log_dict(self._id, config, "config.yaml")

    def _create_run(self, name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else self._client.create_experiment(experiment)
        return self._client.create_run(place, run_name=name).info.run_id

    def write(self, values: Values) -> None:
        """Log numbers."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, values["step"]) for name, value in numbers(values).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG, whose name has the step."""
        self._client.log_artifact(self._id, str(path), name)

    def close(self, finished: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


class Memory:
    """What a remote logger knows of earlier processes of the run: its id there, and the last step of each name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        state = read_json(path) if path.exists() else {}
        self._identity: str | None = state.get("id")
        self._last: dict[str, int] = state.get("last", {})

    @property
    def identity(self) -> str | None:
        """The id of the run there; None: it has none yet."""
        return self._identity

    @identity.setter
    def identity(self, identity: str) -> None:
        self._identity = identity
        self._write()

    def new(self, values: Values) -> Values:
        """Return the values that were not logged at this step or after it."""
        step = values["step"]
        return {name: value for name, value in values.items() if name == "step" or self._last.get(name, -1) < step}

    def add(self, values: Values) -> None:
        """Remember that values were logged."""
        self._last |= {name: values["step"] for name in values if name != "step"}
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps({"id": self._identity, "last": self._last}) + "\n")


class Background:
    """A remote logger in a thread of its own: nothing that it does holds up or stops the run.

    The first failure is a warning, printed by the run's own thread; later lines are tried all the same.

    Args:
        name: of the logger.
        logger: the one that does the work.
        memory: what it has logged.
        warn: prints a warning.
    """

    def __init__(self, name: str, logger: Logger, memory: Memory, warn: Callable[[str], None]) -> None:
        self._name, self._logger, self._memory, self._warn = name, logger, memory, warn
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(MOST_WAITING)
        self._error: Exception | None = None
        self._has_warned = False
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def write(self, values: Values) -> None:
        """Log numbers, those that are new."""
        line = numbers(values) | {"step": values["step"]}

        def send() -> None:
            if len(new := self._memory.new(line)) > 1:
                self._logger.write(new)
                self._memory.add(new)

        self._put(send)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG, if it is new."""
        line: Values = {"step": step, name: None}

        def send() -> None:
            if len(self._memory.new(line)) > 1:
                self._logger.picture(name, path, step)
                self._memory.add(line)

        self._put(send)

    def close(self, finished: bool) -> None:
        """Wait a while for what is not yet sent."""
        end = time.monotonic() + CLOSING
        with suppress(queue.Full):  # after the lines that wait
            self._tasks.put(lambda: self._logger.close(finished), timeout=CLOSING)
            self._tasks.put(None, timeout=max(0.0, end - time.monotonic()))
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._error = self._error or TimeoutError(f"not all is sent after {CLOSING:.0f} s")
        self._warn_once()

    def _put(self, task: Callable[[], None]) -> None:
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._error = self._error or TimeoutError(f"{MOST_WAITING} lines wait for it, further ones are dropped")
        self._warn_once()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception as error:
                self._error = error

    def _warn_once(self) -> None:
        if self._error is not None and not self._has_warned:
            self._has_warned = True
            self._warn(f"{self._name} cannot log, log.jsonl has all of it; the run goes on: {_in_a_line(self._error)}")


def numbers(values: Values) -> dict[str, float]:
    """Return the numbers of a logged line; what is not finite is None in it, and left out."""
    return {name: value for name, value in values.items() if name != "step" and isinstance(value, (int, float))}


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:700]}"
