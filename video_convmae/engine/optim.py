"""Parameter groups, learning-rate schedule and clipping: everything is a function of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .options import Decay


@runtime_checkable
class HasLayers(Protocol):
    """A model that says how layer decay scales the learning rate of each parameter, by name."""

    def layer_scales(self, decay: float) -> dict[str, float]: ...


@runtime_checkable
class NamesUndecayed(Protocol):
    """A model whose recipe has a rule of its own for the parameters without weight decay."""

    def no_weight_decay(self) -> set[str]: ...


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then a fall to the end, over optimizer steps.

    peak, end: learning rates. warmup, steps: optimizer steps.
    decay: a half cosine, a line, or steps: a tenth after each of the milestones, which are shares of the run.
    """

    peak: float
    end: float
    warmup: int
    steps: int
    decay: Decay = "cosine"
    milestones: tuple[float, ...] = ()

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        if self.decay == "steps":
            return self.peak * 0.1 ** sum(step >= share * self.steps for share in self.milestones)
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.decay == "linear":
            return self.end + (self.peak - self.end) * (1 - progress)
        return self.end + (self.peak - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Optimization:
    """Optimizer, schedule and clipping of a run.

    clip_grad: largest gradient norm; None: no clipping.
    steps_per_epoch: optimizer steps of one pass over the list.
    origin: a sentence that derives the learning rate.
    """

    optimizer: torch.optim.Optimizer
    schedule: Schedule
    clip_grad: float | None
    steps_per_epoch: int
    origin: str

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to `clip_grad`; return their total norm before that, left on its device.

        Of heads in a sweep each is clipped by its own norm, and one whose gradients are not finite has none in this
        step: no head depends on another. The total is of the others; NaN if no head's gradients are finite.
        """
        if any("head" in group for group in self.optimizer.param_groups):
            return self._clip_heads()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.clip_grad is not None:
            norm = nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded gradients: a DTensor

    def _clip_heads(self) -> Tensor:
        gradients: dict[int, list[Tensor]] = {}
        for group in self.optimizer.param_groups:
            gradients.setdefault(group["head"], []).extend(p.grad for p in group["params"] if p.grad is not None)
        norms = []
        for own in gradients.values():
            norm = nn.utils.get_total_norm(own)
            scale = torch.ones_like(norm) if self.clip_grad is None else (self.clip_grad / (norm + 1e-6)).clamp(max=1)
            scale = scale.where(norm.isfinite(), 0)
            for gradient in own:
                gradient.nan_to_num_(0, 0, 0).mul_(scale)
            norms.append(norm)
        every = torch.stack(norms)
        return every.where(every.isfinite(), 0).norm().where(every.isfinite().any(), torch.nan)


def head_groups(named: Iterable[tuple[str, nn.Parameter]], heads: Sequence[tuple[float, float]]) -> list[dict]:
    """Group the parameters of a sweep's heads, `head.NUMBER.*`: each head with its own options, marked by its number.

    Args:
        named: the parameters by name.
        heads: learning-rate scale and weight decay of each.
    """
    every = list(named)
    groups = []
    for number, (scale, weight_decay) in enumerate(heads):
        own = [(name, parameter) for name, parameter in every if name.startswith(f"head.{number}.")]
        of_head = parameter_groups(own, weight_decay, dict.fromkeys((name for name, _ in own), scale))
        groups += [group | {"head": number} for group in of_head]
    return groups


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    scales: Mapping[str, float] | None = None,
    undecayed: Collection[str] | None = None,
) -> list[dict]:
    """Group parameters by learning-rate scale (`lr_scale`), with and without weight decay.

    Every parameter that learns is in exactly one group. Vectors and position tables have no weight decay (MAE decays
    its 3-D mask token; ours is a vector). The 3-D positions and class token of pytorchvideo's MViT have: PySlowFast's
    configurations for Kinetics set MVIT.ZERO_DECAY_POS_CLS to False.

    Args:
        named: the parameters by name.
        weight_decay: of the groups that have it.
        scales: factor of each parameter's learning rate (layer decay); None: 1.
        undecayed: names of those without weight decay; None: vectors and position tables.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            if undecayed is None:
                decayed = parameter.ndim > 1 and not name.endswith("positions")
            else:
                decayed = name not in undecayed
            groups.setdefault((scales[name] if scales else 1.0, decayed), []).append(parameter)
    return [
        {"params": groups[scale, decayed], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        for scale, decayed in sorted(groups, reverse=True)
    ]
