"""Tasks: a batch -> a loss and named values, one class a recipe. The loop only steps."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae.data.loader import Batch
from video_convmae.data.mixing import Mixing
from video_convmae.data.ragged import RaggedCrops


class Task(Protocol):
    """A model and what it is trained on."""

    model: nn.Module

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss to step on, and detached scalars to log beside it; the host does not wait for the device."""
        ...


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a model computes at `bf16`, `fp16` or, unchanged, at `fp32`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


class Normalizer(nn.Module):
    """Bytes as they cross to the device -> normalised floats there.

    Args:
        mean, std: of each channel, for pixels from 0 to 1.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        super().__init__()
        self.mean = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1, 1)

    def normalise(self, clips: Tensor | RaggedCrops) -> Tensor:
        """`(B, C, T, H, W)` uint8, on any device, or windows of B clips -> `(B, C, T, H, W)` float32 on this one."""
        if isinstance(clips, RaggedCrops):
            clips = clips.clips(self.mean.device)
        return (clips.to(self.mean.device, non_blocking=True).float() - self.mean) / self.std

    def restore(self, clips: Tensor) -> Tensor:
        """Normalised floats -> uint8, rounded and cut to 0 .. 255."""
        return (clips.float() * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


class Pretraining:
    """Masked autoencoding.

    Args:
        model: an `Autoencoder`, wrapped or not.
        pixels: how bytes become the model's input.
    """

    def __init__(self, model: nn.Module, pixels: Normalizer) -> None:
        self.model = model
        self.pixels = pixels

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction loss over the hidden patches. `visible` stays on the CPU: see `Packing`."""
        return self.model(self.pixels.normalise(batch.clips), batch.visible).loss, {}


class Classification:
    """Finetuning and probing: cross-entropy over mixed clips and smoothed labels.

    Args:
        model: clips -> logits, wrapped or not.
        pixels: how bytes become the model's input.
        mixing: mixup, cutmix and label smoothing.
    """

    def __init__(self, model: nn.Module, pixels: Normalizer, mixing: Mixing) -> None:
        self.model = model
        self.pixels = pixels
        self.mixing = mixing

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and how often the class with the largest share of a mixed clip is predicted."""
        clips = self.pixels.normalise(batch.clips)
        clips, targets = self.mixing(clips, batch.labels.to(clips.device, non_blocking=True))
        logits = self.model(clips).float()
        hits = (logits.argmax(dim=1) == targets.argmax(dim=1)).float().mean()
        return F.cross_entropy(logits, targets), {"train_top1": hits.detach()}
