"""Tasks: a batch -> a loss and named values, one class a recipe."""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae.data.loader import Batch
from video_convmae.data.mixing import Mixing
from video_convmae.data.ragged import RaggedCrops
from video_convmae.models.autoencoder import Autoencoder, predict_nothing

from .parallel import unwrap


class Task(Protocol):
    """A model and its training loss."""

    model: nn.Module

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss, and detached scalars to log beside it; the host does not wait for the device."""
        ...


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

    def restore(self, clips: Tensor) -> Tensor:
        """Invert `normalise`: floats -> uint8, rounded and clamped to 0 .. 255."""
        return (clips.float() * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


class Pretraining:
    """Masked autoencoding.

    Args:
        model: an `Autoencoder`, wrapped or not.
        normalizer: bytes -> the model's input.
    """

    def __init__(self, model: nn.Module, normalizer: Normalizer) -> None:
        self.model = model
        self.normalizer = normalizer
        self.target = cast(Autoencoder, unwrap(model)).target

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reconstruction loss over the predicted patches, and the same of predicting nothing.

        Masks stay on the CPU: see `Packing`.
        """
        assert batch.visible is not None
        clips = self.normalizer.normalise(batch.clips)
        output = self.model(clips, batch.visible, batch.predicted)
        return output.loss, {"loss_nothing": predict_nothing(clips, batch.visible, output.target, self.target)}


class Classification:
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
        hits = (logits.argmax(dim=1) == targets.argmax(dim=1)).float().mean()
        return F.cross_entropy(logits, targets), {"train_top1": hits.detach()}
