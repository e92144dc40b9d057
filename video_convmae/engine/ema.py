"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """An exponential moving average of the weights; running statistics are copied.

    The decay is warmed up as timm's ModelEmaV3 does with its defaults: 1 - (1 + step)^(-2/3) until it reaches `decay`.
    Without that, an average of 0.9999 over 80 steps is still the initial weights.

    Args:
        model: whose tensors it starts with; if they are sharded, so is the average.
        decay: largest weight of the average in an update.
        tensors: to average into in place, of some of the model's names; None: copies of all.

    Attributes:
        tensors: by name, as in the model's state_dict.
    """

    def __init__(self, model: nn.Module, decay: float, tensors: dict[str, Tensor] | None = None) -> None:
        if tensors is None:
            tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.tensors = tensors
        self._decay = decay
        self._is_started = False

    def resume(self, model: nn.Module | None) -> None:
        """Continue from the tensors as they were filled, or from a model's."""
        if model is not None:
            with torch.no_grad():
                self._copy(model.state_dict(), self.tensors)
        self._is_started = True

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in the weights after a step, counted from 0; the first one replaces a new model's initial weights."""
        now = {name: tensor for name, tensor in model.state_dict().items() if name in self.tensors}
        averaged = [name for name, _ in model.named_parameters() if name in self.tensors] if self._is_started else []
        if averaged:
            mix = get_ema_multi_avg_fn(min(self._decay, 1 - (1 + step) ** (-2 / 3)))
            mix([self.tensors[name] for name in averaged], [now[name] for name in averaged], None)
        self._copy(now, now.keys() - set(averaged))
        self._is_started = True

    def _copy(self, now: Mapping[str, Tensor], names: Iterable[str]) -> None:
        for name in names:
            self.tensors[name].copy_(now[name])
