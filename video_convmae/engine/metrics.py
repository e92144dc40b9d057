"""Sums over the steps between two logged ones, kept on the device until they are logged."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from video_convmae.data.datasets import BadRecord
from video_convmae.data.loader import AnyBatch

from .distributed import DistInfo, all_gather_object, all_reduce_mean
from .optim import Optimization

Values = dict[str, Any]  # numbers by name; None where one is not finite or not measured


class StepMetrics:
    """Losses, norms, records and times since the last logged step. Losses and norms stay on the device until then."""

    def __init__(self) -> None:
        self.records: list[list[int]] = []  # of each step
        self.bad_records: list[BadRecord] = []
        self.own: Values = {}  # of this rank alone, for its own log
        self._started = time.perf_counter()
        self._waited = 0.0
        self._clips = 0
        self._step_records: list[int] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._named: dict[str, list[Tensor]] = {}
        self._own_losses: list[float] = []
        self._mean_losses: list[float] = []
        self._norm_values: list[float] = []

    def __len__(self) -> int:
        return len(self.records)

    def add_batch(self, batch: AnyBatch, waited: float) -> None:
        """Count a batch that took `waited` seconds to arrive."""
        self._waited += waited
        self._clips += len(batch.records)
        self._step_records += batch.records.tolist()
        self.bad_records += batch.bad_records

    def add_values(self, values: dict[str, Tensor]) -> None:
        """Keep what a task wants logged of one forward pass."""
        for name, value in values.items():
            self._named.setdefault(name, []).append(value)

    def add_step(self, loss: Tensor, norm: Tensor) -> None:
        """Count an optimizer step of the batches added since the last one."""
        self.records.append(self._step_records)
        self._step_records = []
        self._losses.append(loss)
        self._norms.append(norm.to(loss.dtype))

    def summarize(self, step: int, optimization: Optimization, info: DistInfo, phases: Values) -> Values:
        """Return the logged values: means over the steps and the ranks. The host waits for the device here.

        Args:
            step: optimizer steps done.
            optimization: gives learning rate and length.
            info: the processes.
            phases: `seconds_PHASE` of this rank, from a `Stopwatch`.
        """
        steps, seconds = len(self.records), time.perf_counter() - self._started
        values = torch.stack([torch.stack(self._losses), torch.stack(self._norms)])
        self._own_losses = values[0].tolist()
        self._mean_losses, self._norm_values = all_reduce_mean(values).tolist()
        named = {name: _finite_mean(all_reduce_mean(torch.stack(each)).tolist()) for name, each in self._named.items()}
        if phases:
            phases = {"seconds_data": self._waited / steps} | phases
            every = all_gather_object(phases)
            phases_mean = {name: sum(rank[name] for rank in every) / info.world_size for name in phases}
        self.own = {
            "step": step,
            "loss": _finite_mean(self._own_losses),
            "data_wait": self._waited / seconds,
            "bad_records": len(self.bad_records),
            **phases,
        }
        return {
            "step": step,
            "epoch": step / optimization.steps_per_epoch,
            "loss": _finite_mean(self._mean_losses),
            "lr": optimization.schedule.lr(step - 1),
            "grad_norm": _finite_mean(self._norm_values),
            "clips_per_second": self._clips * info.world_size / seconds,
            "data_wait": self._waited / seconds,
            "seconds_per_step": seconds / steps,
            "eta_seconds": (optimization.schedule.steps - step) * seconds / steps,
            **(phases_mean if phases else {}),
            **named,
        }

    def nonfinite_steps(self, step: int, precision: str, info: DistInfo) -> str | None:
        """Name the steps that were not finite, and the records of the ranks whose own loss it was; None: all finite.

        The loss scale of fp16 finds its size by overflowing gradients, so only the loss counts there. Call it after
        `summarize`, on all ranks: the means are the same on each.
        """
        first = step - len(self.records) + 1
        broken = [
            i
            for i, (loss, norm) in enumerate(zip(self._mean_losses, self._norm_values))
            if not math.isfinite(loss) or (precision != "fp16" and not math.isfinite(norm))
        ]
        if not broken:
            return None
        own = [
            f"step {first + i}: loss {self._own_losses[i]}, gradient norm {self._norm_values[i]}, "
            f"rank {info.rank}'s records {self.records[i]}"
            for i in broken
            if math.isfinite(self._mean_losses[i]) or not math.isfinite(self._own_losses[i])
        ]
        return "not finite at " + "; ".join(line for lines in all_gather_object(own) for line in lines)

    def count_skipped(self, before: int) -> int:
        """Return how many steps in a row, up to the last, had gradients that are not finite; `before`: so far."""
        for norm in self._norm_values:
            before = 0 if math.isfinite(norm) else before + 1
        return before


def effective_rank(features: np.ndarray) -> float:
    """Return RankMe (Garrido et al., 2023) of features `(R, D)`: exp of the entropy of the normalised singular values.

    From 1 (all features on one line) to min(R, D); features are not centred, as in the paper. 0 where all are zero.
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def _finite_mean(values: list[float]) -> float | None:
    """Return the mean of the finite values; None if there are none (JSON has no NaN)."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


class Stopwatch:
    """Seconds of each phase of a step. CUDA events are read only when they are taken, so that the host need not wait.

    Phases are named in torch.profiler's traces in any case.

    Args:
        device: of the work.
        on: otherwise nothing is timed.
    """

    def __init__(self, device: torch.device, on: bool) -> None:
        self._on_cuda, self._on = device.type == "cuda", on
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._communication: float | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Record the first step since the last `take` with torch.profiler, for the communication between processes."""
        if not self._on or self._communication is not None:
            yield
            return
        with torch.profiler.profile() as recorded:
            yield
        self._communication = communication_seconds(recorded)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase."""
        with torch.profiler.record_function(name):
            if not self._on:
                yield
                return
            start = self._now()
            yield
            self._spans.setdefault(name, []).append((start, self._now()))

    def take(self, steps: int) -> Values:
        """Return `seconds_PHASE` a step since the last call; on CUDA after a synchronisation. Empty if not on."""
        if not self._on:
            return {}
        spans, self._spans = self._spans, {}
        communication, self._communication = self._communication, None
        seconds = {f"seconds_{name}": sum(map(self._seconds, each)) / steps for name, each in spans.items()}
        return seconds | {"seconds_communication": communication}

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, span: tuple[Any, Any]) -> float:
        start, end = span
        return start.elapsed_time(end) / 1e3 if self._on_cuda else end - start


def communication_seconds(recorded: torch.profiler.profile) -> float:
    """Return the seconds of a recording in which processes exchanged gradients or weights; overlaps count once.

    Most of that time overlaps with the forward and backward pass.
    """
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.name.startswith(("gloo:", "ncclDevKernel"))  # on CUDA the kernels; an event "nccl:" is their launch
    )
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6
