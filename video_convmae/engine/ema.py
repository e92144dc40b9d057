"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """An exponential moving average of the weights; running statistics are copied.

    Args:
        model: whose tensors it starts with; if they are sharded, so is the average.
        decay: weight of the average in each update.

    Attributes:
        tensors: by name, as in the model's state_dict.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self._mix = get_ema_multi_avg_fn(decay)
        self._is_started = False

    def resume(self, model: nn.Module | None) -> None:
        """Continue from the tensors as they were filled, or from a model's."""
        if model is not None:
            self._copy(model.state_dict(), self.tensors)
        self._is_started = True

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average in the weights after a step; the first update replaces the initial weights of a new model."""
        now = model.state_dict()
        averaged = [name for name, _ in model.named_parameters()] if self._is_started else []
        if averaged:
            self._mix([self.tensors[name] for name in averaged], [now[name] for name in averaged], None)
        self._copy(now, now.keys() - set(averaged))
        self._is_started = True

    def _copy(self, now: Mapping[str, Tensor], names: Iterable[str]) -> None:
        for name in names:
            self.tensors[name].copy_(now[name])
