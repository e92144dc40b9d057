"""Tasks: a batch -> a loss and named values, one class a recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae.data.loader import Batch
from video_convmae.data.mixing import Mixing
from video_convmae.data.ragged import RaggedCrops
from video_convmae.models.autoencoder import Autoencoder, predict_nothing

from .distributed import all_gather_object
from .ema import EMA
from .metrics import Values, effective_rank
from .parallel import unwrap
from .teachers import Teachers

RANK_CLIPS = 512  # whose features' effective rank is logged: 0.2 s for 768 values on one core


class Task(ABC):
    """A model and its training loss.

    step: optimizer steps done, set by the trainer.
    average: an average of the model that the loss is made of: updated after each step, and in every checkpoint.
    """

    model: nn.Module
    step: int = 0
    average: EMA | None = None

    @abstractmethod
    def __call__(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss, and detached scalars to log beside it; the host does not wait for the device."""

    def measure(self) -> Values:
        """Return further values of a logged step, for which the host may wait. All processes call it together."""
        return {}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of `bf16` or `fp16`; at `fp32` it changes nothing."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


class Normalizer(nn.Module):
    """Bytes -> normalised floats on the device.

    Args:
        mean, std: of each channel, for pixels from 0 to 1.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        super().__init__()
        self.mean = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1, 1)

    def normalise(self, clips: Tensor | RaggedCrops) -> Tensor:
        """Bytes `(B, C, T, H, W)` on any device, or ragged crops of B clips -> float32 of that shape on this one."""
        if isinstance(clips, RaggedCrops):
            clips = clips.clips(self.mean.device)
        return (clips.to(self.mean.device, non_blocking=True).float() - self.mean) / self.std

    def to_unit(self, clips: Tensor) -> Tensor:
        """Invert `normalise` but for the scale: floats -> pixels from 0 to 1."""
        return (clips * self.std + self.mean) / 255

    def restore(self, clips: Tensor) -> Tensor:
        """Invert `normalise`: floats -> uint8, rounded and clamped to 0 .. 255."""
        return (clips.float() * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


class Pretraining(Task):
    """Masked autoencoding.

    Args:
        model: an `Autoencoder`, wrapped or not.
        normalizer: bytes -> the model's input.
        teachers: of its targets; None: it predicts pixels alone.
    """

    def __init__(self, model: nn.Module, normalizer: Normalizer, teachers: Teachers | None = None) -> None:
        self.model = model
        self.normalizer = normalizer
        self.teachers = teachers
        self.average = None if teachers is None else teachers.average
        self.target = cast(Autoencoder, unwrap(model)).target
        self._pooled: deque[Tensor] = deque()  # features of the clips since the last logged step

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and, of pixels, that of predicting nothing; with targets, the loss of each, unweighted.

        Masks stay on the CPU: see `Packing`.
        """
        assert batch.visible is not None
        clips = self.normalizer.normalise(batch.clips)
        if self.teachers is None:
            output = self.model(clips, batch.visible, batch.predicted)
            return output.loss, {"loss_nothing": predict_nothing(clips, batch.visible, output.target, self.target)}
        features = self.teachers(clips, self.normalizer.to_unit(clips))
        weights = self.teachers.weights(self.step)
        output = self.model(clips, batch.visible, batch.predicted, features=features, weights=weights)
        values = {f"loss_{name}": loss.detach() for name, loss in output.losses.items()}
        if "pixels" in output.losses:
            values["loss_nothing"] = predict_nothing(clips, batch.visible, output.target, self.target)
        if features:
            self._keep(output.tokens.detach().float().mean(dim=1))
        return output.loss, values

    def measure(self) -> Values:
        """Return the effective rank of the student's features, the means over the visible tokens of recent clips.

        A fall towards 1: all features point one way, whatever the losses say.
        """
        if self.teachers is None or not self._pooled:
            return {}
        newest = max(1, RANK_CLIPS // self.teachers.processes)
        own = torch.cat(list(self._pooled))[-newest:].cpu().numpy()
        self._pooled.clear()
        features = np.concatenate(all_gather_object(own))
        features = features[np.isfinite(features).all(axis=1)]  # those of a step that is skipped are not
        return {"feature_rank": effective_rank(features)} if len(features) else {}

    def _keep(self, pooled: Tensor) -> None:
        """Keep the newest features `(B, D)`, those of RANK_CLIPS clips or a few more."""
        self._pooled.append(pooled)
        while sum(map(len, self._pooled)) - len(self._pooled[0]) >= RANK_CLIPS:
            self._pooled.popleft()


class Classification(Task):
    """Finetuning and probing: cross-entropy over mixed clips and smoothed labels.

    Args:
        model: clips -> logits, wrapped or not.
        normalizer: bytes -> the model's input.
        mixing: mixup, cutmix and label smoothing.
    """

    def __init__(self, model: nn.Module, normalizer: Normalizer, mixing: Mixing) -> None:
        self.model = model
        self.normalizer = normalizer
        self.mixing = mixing

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and the accuracy against the class with the largest share of each mixed clip."""
        clips = self.normalizer.normalise(batch.clips)
        clips, targets = self.mixing(clips, batch.labels.to(clips.device, non_blocking=True))
        logits = self.model(clips).float()
        return self.loss(logits, targets), self.values(logits.detach(), targets)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits `(B, classes)` against the classes' shares, of the same shape."""
        return F.cross_entropy(logits, targets)

    def values(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return what is logged beside the loss."""
        return {"train_top1": (logits.argmax(dim=-1) == targets.argmax(dim=1)).float().mean()}


class MultiLabel(Classification):
    """Several classes of a clip, or none: binary cross-entropy of each class, the mean over clips and classes."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits against the classes' shares, `(B, classes)` both."""
        return F.binary_cross_entropy_with_logits(logits, targets)

    def values(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return nothing: mAP is of a whole list."""
        return {}


class ProbeSweep(Classification):
    """Several heads on the same clips: loss and accuracy are their mean, the gradient is that of each alone."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits `(heads, B, classes)`: the mean of those heads whose own is finite; none: NaN."""
        every = F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits), 1), reduction="none")
        losses = every.view(len(logits), -1).mean(dim=1)
        # A head whose loss is not finite adds nothing; its gradients are dropped (`Optimization.clip_gradients`).
        total = losses.where(losses.isfinite(), 0).sum()
        return total + (losses.where(losses.isfinite(), torch.nan).nanmean() - total).detach()
