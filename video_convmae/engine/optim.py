"""Optimizer and schedules: everything is a function of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

    base_lr: float = 1.5e-4
    """Learning rate for an effective batch of 256: lr = base_lr x effective batch / 256."""
    base_min_lr: float = 0.0
    """Where the half cosine ends, for an effective batch of 256."""
    lr: float | None = None
    """The learning rate itself; replaces the rule above (base_min_lr then counts as it stands)."""
    warmup_epochs: float = 40
    """Epochs of linear rise from 0."""
    weight_decay: float = 0.05
    """On matrices and kernels only; never on vectors (biases, norms, the mask token) and positions."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages."""
    clip_grad: float | None = None
    """Largest gradient norm; none: gradients are not clipped."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then a half cosine, over optimizer steps.

    peak, end: learning rates. warmup, steps: optimizer steps.
    """

    peak: float
    end: float
    warmup: int
    steps: int

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.end + (self.peak - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two groups, with and without weight decay; every parameter that learns is in exactly one.

    Vectors and position tables are not decayed (MAE decays its 3-D mask token; ours is a vector).
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            undecayed = parameter.ndim <= 1 or name.endswith("positions")
            (free if undecayed else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


@dataclass(frozen=True)
class Optimization:
    """What turns gradients into steps.

    steps_per_epoch: optimizer steps of one pass over the list.
    origin: the sentence that says where the learning rate comes from.
    """

    optimizer: torch.optim.Optimizer
    schedule: Schedule
    clip_grad: float | None
    steps_per_epoch: int
    origin: str


def build_optimization(
    model: nn.Module, config: OptimConfig, effective_batch: int, epochs: float, steps_per_epoch: int
) -> Optimization:
    """AdamW and its schedule.

    AdamW is fused: it can pass over a step with non-finite gradients without the host ever waiting for the device.

    Args:
        model: whose parameters learn.
        config: the optimizer's settings.
        effective_batch: records of one optimizer step, repeats not counted.
        epochs: length of the run.
        steps_per_epoch: optimizer steps of one pass over the list.
    """
    if config.lr is not None:
        peak, end = config.lr, config.base_min_lr
        origin = f"lr {peak:.3g} as configured"
    else:
        peak, end = (base * effective_batch / 256 for base in (config.base_lr, config.base_min_lr))
        origin = f"lr {peak:.3g} = base_lr {config.base_lr:.3g} x effective batch {effective_batch} / 256"
    schedule = Schedule(peak, end, round(config.warmup_epochs * steps_per_epoch), round(epochs * steps_per_epoch))
    groups = parameter_groups(model.named_parameters(), config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
    return Optimization(optimizer, schedule, config.clip_grad, steps_per_epoch, origin)


def clip_gradients(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """The total gradient norm, left on its device; gradients are scaled down to `limit` where it is given."""
    if limit is None:
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return nn.utils.clip_grad_norm_(parameters, limit)
