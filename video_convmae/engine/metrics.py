"""What happened between two logged steps, kept on the device until it is logged."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from video_convmae.data.datasets import BadRecord
from video_convmae.data.loader import Batch

from . import distributed
from .distributed import DistInfo
from .log import Stopwatch
from .optim import Optimization


class StepMetrics:
    """What happened since the last logged step; losses and norms stay on the device until then.

    Args:
        stopwatch: times the phases of a step.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.records: list[list[int]] = []
        self.faults: list[BadRecord] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._clips = 0
        self._waited = 0.0
        self._started = time.perf_counter()
        self._named: dict[str, list[Tensor]] = {}
        self._values: list[list[float]] = []
        self._own_losses: list[float] = []
        self.own: dict[str, float | int | None] = {}

    def __len__(self) -> int:
        return len(self.records)

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

    def summary(self, step: int, optimization: Optimization, group: DistInfo) -> dict[str, float | int | None]:
        """The logged values: means over the window's steps and over the ranks. Here the host waits for the device."""
        values = torch.stack([torch.stack(self._losses), torch.stack(self._norms)])
        self._own_losses = values[0].tolist()
        self._values = distributed.all_reduce_mean(values).tolist()
        named = {name: float(distributed.all_reduce_mean(torch.stack(v).mean())) for name, v in self._named.items()}
        seconds = time.perf_counter() - self._started
        schedule = optimization.schedule
        self.own = {
            "step": step,
            "loss": _finite_mean(self._own_losses),
            "data_wait": self._waited / seconds,
            "bad_records": len(self.faults),
        }
        phases = self.stopwatch.take(len(self))
        if phases:
            phases = {"seconds_data": self._waited / len(self)} | phases
            self.own |= phases
            every = distributed.all_gather_object(phases)
            phases = {name: sum(of[name] for of in every) / group.count for name in phases}
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
            **phases,
            **named,
        }

    def complaint(self, step: int, precision: str, group: DistInfo) -> str | None:
        """What was not finite: steps, and the records of the ranks whose own loss it was. Call after `summary`.

        fp16's loss scale finds its size by overflowing gradients, so there the loss alone counts.
        """
        losses, norms = self._values
        first = step - len(losses) + 1
        broken = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if precision != "fp16":
            broken = [i for i, norm in enumerate(norms) if i in broken or not math.isfinite(norm)]
        if not broken:  # means over the ranks: all of them know
            return None
        own = [
            f"step {first + i}: loss {self._own_losses[i]}, gradient norm {norms[i]}, rank {group.rank}'s "
            f"records {self.records[i]}"
            for i in broken
            if math.isfinite(losses[i]) or not math.isfinite(self._own_losses[i])
        ]
        return "not finite at " + "; ".join(line for lines in distributed.all_gather_object(own) for line in lines)


def _finite_mean(values: list[float]) -> float | None:
    """The mean of what is finite; None (JSON knows no NaN) where nothing is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
