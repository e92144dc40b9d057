"""Validation during training, and the best checkpoint by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .checkpoint import Saver
from .distributed import broadcast_object
from .log import SCORES, NullLog
from .metrics import Values


@dataclass(frozen=True)
class Validation:
    """A measurement beside training.

    measure: unwrapped model -> named values, called on every rank; one of them is "scored".
    build_model: a model of the same kind on this process's device, for weights other than the trained ones (their
        average) or sharded ones.
    every: epochs between two measurements; the last step is always followed by one.
    every_steps: optimizer steps between them; replaces `every`.
    prefix: of the logged names.
    best: name of the value that decides which checkpoint is the best; None: no checkpoint is.
    from_start: also measure before the first step.
    own_model: always measure a model from `build_model`.
    patience: measurements in a row without a better one after which the run ends; None: it does not.
    """

    measure: Callable[[nn.Module], Values]
    build_model: Callable[[], nn.Module]
    every: float = 1.0
    every_steps: int | None = None
    prefix: str = "val_"
    best: str | None = "top1"
    from_start: bool = False
    own_model: bool = False
    patience: int | None = None


class Validator:
    """Runs a `Validation` on its schedule and marks the best checkpoint, if it decides on one.

    Measured values are in log.jsonl, and a resumed run finds them there: one that was killed while it measured does so
    again.

    Args:
        validation: the measurement.
        steps_per_epoch, steps: of the run.
        log: of the run.
        saver: has the checkpoint of every measured step, if one is marked.
    """

    def __init__(self, validation: Validation, steps_per_epoch: int, steps: int, log: NullLog, saver: Saver) -> None:
        self.validation = validation
        every = validation.every_steps or max(1, round(validation.every * steps_per_epoch))
        self._every, self._steps = every, steps
        self._log, self._saver = log, saver
        names = [f"{validation.prefix}{name}" for name in ("scored", validation.best) if name]
        measured, *known = broadcast_object([log.values(name) for name in names])
        self._measured = set(measured)
        self._scores: dict[int, float | None] = dict(known[0]) if known else {}  # by step

    def is_due(self, step: int) -> bool:
        """Return True if the step is one to measure after."""
        if step == 0:
            return self.validation.from_start
        return step % self._every == 0 or step == self._steps

    def is_missing(self, step: int) -> bool:
        """Return True if a run still has to measure the step that it starts or resumes from."""
        return self.is_due(step) and step not in self._measured

    @property
    def _best(self) -> float:
        return max((score for score in self._scores.values() if score is not None), default=-math.inf)

    @property
    def best_step(self) -> int | None:
        """The step of the best measurement, the first of equals."""
        return next((step for step, score in sorted(self._scores.items()) if score == self._best), None)

    @property
    def is_exhausted(self) -> bool:
        """True if the last measurements, `patience` of them, were no better than one before."""
        best = self.best_step
        if self.validation.patience is None or best is None:
            return False
        return sum(step > best for step in self._scores) >= self.validation.patience

    def measure(self, step: int, model: nn.Module | None, weights: Callable[[], dict]) -> Values:
        """Return the measured values, with the prefix. A checkpoint that may be the best is already being written.

        Args:
            step: optimizer steps done.
            model: the one to measure; None: build one and load `weights()`.
            weights: all processes call it together.
        """
        if model is None:
            model = self.validation.build_model()
            model.load_state_dict(weights())
        values = self.validation.measure(model)
        best = self.validation.best
        score = None if best is None else values.get(best)
        is_better = score is not None and score > self._best
        self._scores[step] = score
        if best is not None and is_better:
            self._saver.mark_best(step)
            self._log.print(f"step {step}: best {SCORES.get(best, best)} so far, {score:.4f}")
        return {f"{self.validation.prefix}{name}": value for name, value in values.items()}
