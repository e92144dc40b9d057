"""Optimizer and schedules: everything is a function of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from . import distributed


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    optimizer: Literal["adamw", "lars"] = "adamw"
    """adamw, or lars (large-batch linear probes)."""
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
    layer_decay: float = 1.0
    """Finetuning: what a layer's learning rate is over that of the layer after it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages; the first is the momentum of LARS."""
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


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, scales: Mapping[str, float] | None = None
) -> list[dict]:
    """Groups by learning-rate scale (`lr_scale`), each with and without weight decay; every parameter that learns is in
    exactly one.

    Vectors and position tables are not decayed (MAE decays its 3-D mask token; ours is a vector).

    Args:
        named: the parameters by name.
        weight_decay: of the groups that are decayed.
        scales: what each parameter's learning rate is multiplied with (layer decay); None: 1.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and not name.endswith("positions")
            groups.setdefault((scales[name] if scales else 1.0, decayed), []).append(parameter)
    return [
        {"params": groups[scale, decayed], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        for scale, decayed in sorted(groups, reverse=True)
    ]


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
    """The optimizer and its schedule.

    AdamW is fused: it can pass over a step with non-finite gradients without the host ever waiting for the device.

    Args:
        model: whose parameters learn; with layer decay, one that has `layer_scales`.
        config: the optimizer's settings.
        effective_batch: records of one optimizer step, repeats not counted.
        epochs: length of the run.
        steps_per_epoch: optimizer steps of one pass over the list.

    Raises:
        ValueError: so few epochs that there is no step.
    """
    if round(epochs * steps_per_epoch) < 1:
        raise ValueError(
            f"train.epochs is {epochs}, with {steps_per_epoch} steps an epoch not one step; expected at least "
            f"{1 / steps_per_epoch:.2g}"
        )
    if config.lr is not None:
        peak, end = config.lr, config.base_min_lr
        origin = f"lr {peak:.3g} as configured"
    else:
        peak, end = (base * effective_batch / 256 for base in (config.base_lr, config.base_min_lr))
        origin = f"lr {peak:.3g} = base_lr {config.base_lr:.3g} x effective batch {effective_batch} / 256"
    schedule = Schedule(peak, end, round(config.warmup_epochs * steps_per_epoch), round(epochs * steps_per_epoch))
    scales = None if config.layer_decay == 1 else model.layer_scales(config.layer_decay)
    groups = parameter_groups(model.named_parameters(), config.weight_decay, scales)
    if config.optimizer == "lars":
        for group in groups:  # MAE's LARS: the trust ratio is for matrices, with or without weight decay
            group["always_adapt"] = any(p.ndim > 1 for p in group["params"])
        optimizer: torch.optim.Optimizer = Lars(groups, lr=0.0, momentum=config.betas[0])
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
    return Optimization(optimizer, schedule, config.clip_grad, steps_per_epoch, origin)


def clip_gradients(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """The total gradient norm, left on its device; gradients are scaled down to `limit` where it is given."""
    if limit is None:
        return distributed.full_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    return distributed.full_tensor(nn.utils.clip_grad_norm_(parameters, limit))


class EMA:
    """An exponential moving average of a model's weights; running statistics are taken as they are.

    Args:
        model: whose tensors it begins with; where they are sharded, so is this.
        decay: what remains of the average at each step.

    tensors: by name, as in the model's state_dict.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self._mix = get_ema_multi_avg_fn(decay)
        self._is_begun = False

    def begin(self, model: nn.Module | None) -> None:
        """Go on from the tensors as they were filled, or from a model's."""
        if model is not None:
            self._copy(model.state_dict(), self.tensors)
        self._is_begun = True

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step; the first ones replace what a new model was made with."""
        now = model.state_dict()
        averaged = [name for name, _ in model.named_parameters()] if self._is_begun else []
        if averaged:
            self._mix([self.tensors[name] for name in averaged], [now[name] for name in averaged], None)
        self._copy(now, now.keys() - set(averaged))
        self._is_begun = True

    def _copy(self, now: Mapping[str, Tensor], names: Iterable[str]) -> None:
        for name in names:
            self.tensors[name].copy_(now[name])
