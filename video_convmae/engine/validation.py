"""Validation during training, and the best checkpoint by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .checkpoint import Saver
from .distributed import all_gather_object
from .log import NullLog
from .metrics import Values


@dataclass(frozen=True)
class Validation:
    """A measurement beside training.

    measure: unwrapped model -> named values, called on every rank; "top1" decides which checkpoint is the best.
    build_model: a model of the same kind on this process's device, for weights other than the trained ones (their
        average) or sharded ones.
    every: epochs between two measurements; the last step is always followed by one.
    every_steps: optimizer steps between them; replaces `every`.
    """

    measure: Callable[[nn.Module], Values]
    build_model: Callable[[], nn.Module]
    every: float = 1.0
    every_steps: int | None = None


class Validator:
    """Runs a `Validation` on its schedule and marks the best checkpoint.

    Measured values are in log.jsonl, and a resumed run finds them there: one that was killed while it measured does so
    again.

    Args:
        validation: the measurement.
        steps_per_epoch, steps: of the run.
        log: of the run.
        saver: has the checkpoint of every measured step.
    """

    def __init__(self, validation: Validation, steps_per_epoch: int, steps: int, log: NullLog, saver: Saver) -> None:
        self._validation = validation
        every = validation.every_steps or max(1, round(validation.every * steps_per_epoch))
        self._every, self._steps = every, steps
        self._log, self._saver = log, saver
        known = all_gather_object(log.values("val_top1"))[0]
        self._measured = set(known)
        self._best = max((value for value in known.values() if value is not None), default=-math.inf)

    def is_due(self, step: int) -> bool:
        """Return True if the step is one to measure after."""
        return step > 0 and (step % self._every == 0 or step == self._steps)

    def is_missing(self, step: int) -> bool:
        """Return True if a resumed run still has to measure the step of its checkpoint."""
        return self.is_due(step) and step not in self._measured

    def measure(self, step: int, model: nn.Module | None, weights: Callable[[], dict]) -> Values:
        """Return the measured values, prefixed with val_. The step's checkpoint is already being written.

        Args:
            step: optimizer steps done.
            model: the one to measure; None: build one and load `weights()`.
            weights: all processes call it together.
        """
        if model is None:
            model = self._validation.build_model()
            model.load_state_dict(weights())
        values = self._validation.measure(model)
        top1 = values.get("top1")
        if top1 is not None and top1 > self._best:
            self._best = top1
            self._saver.mark_best(step)
            self._log.print(f"step {step}: best top-1 so far, {top1:.4f}")
        return {f"val_{name}": value for name, value in values.items()}
