"""Tasks on pictures whose targets belong to pixels: a batch -> a loss and named values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from video_convmae.data.datasets import PROPOSALS, sample_generator
from video_convmae.data.loader import PictureBatch
from video_convmae.data.segmentation import IGNORED

from .distributed import all_reduce_mean
from .tasks import Normalizer, Task


def stack_pictures(images: Sequence[Tensor], normalizer: Normalizer, size: tuple[int, int]) -> Tensor:
    """Normalise pictures on the device and pad them with zeros, at the bottom and at the right.

    Args:
        images: `(3, H, W)` uint8 each, none larger than `size`.
        normalizer: bytes -> the model's input.
        size: (height, width) of the result; fixed, so that no picture's result depends on those beside it.

    Returns:
        `(B, 3, *size)` float32.
    """
    stacked = torch.zeros(len(images), 3, *size, device=normalizer.mean.device)
    for place, image in enumerate(images):
        height, width = image.shape[1:]
        stacked[place, :, :height, :width] = normalizer.normalise(image[None, :, None])[0, :, 0]
    return stacked


def to_device(target: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a target."""
    return {name: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for name, v in target.items()}


class Detection(Task):
    """Object detection: the losses of Mask R-CNN, each a mean over what the batch of all processes holds.

    Anchors and proposals are drawn by (seed, step, record): the loss of a step is the same on any number of processes.

    Args:
        model: a `Detector`, wrapped or not.
        normalizer: bytes -> the model's input.
        size: (height, width) that pictures are padded to.
        seed: of the run.
    """

    def __init__(self, model: nn.Module, normalizer: Normalizer, size: tuple[int, int], seed: int) -> None:
        self.model = model
        self.normalizer = normalizer
        self.size = size
        self.seed = seed

    def __call__(self, batch: PictureBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the losses, and each of them."""
        images = stack_pictures(batch.images, self.normalizer, self.size)
        sizes = [(image.shape[1], image.shape[2]) for image in batch.images]
        targets = [to_device(target, images.device) for target in batch.targets]
        seeds = [
            sample_generator(self.seed, self.step, record, PROPOSALS).initial_seed()
            for record in batch.records.tolist()
        ]
        sums, counts = self.model(images, sizes, targets, seeds)
        # A mean over each process's own objects would weigh those of crowded pictures less.
        counts = all_reduce_mean(torch.stack(list(counts.values())))
        losses = torch.stack(list(sums.values())).float() / counts.clamp(min=1e-6)
        return losses.sum(), {f"loss_{name}": loss for name, loss in zip(sums, losses.detach())}


class Segmentation(Task):
    """Semantic segmentation: cross-entropy of both heads, each a mean over the pixels of the batch of all processes.

    Args:
        model: a `Segmenter`, wrapped or not.
        normalizer: bytes -> the model's input.
        losses: logits `(B, K, h, w)`, labels `(B, H, W)` -> the sum over pixels, and their number.
        auxiliary_weight: of the auxiliary head's loss.
    """

    def __init__(
        self,
        model: nn.Module,
        normalizer: Normalizer,
        losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        auxiliary_weight: float,
    ) -> None:
        self.model = model
        self.normalizer = normalizer
        self.losses = losses
        self.auxiliary_weight = auxiliary_weight

    def __call__(self, batch: PictureBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the losses, each of them, and the share of pixels that are right."""
        images = self.normalizer.normalise(torch.stack(batch.images)[:, :, None])[:, :, 0]
        labels = torch.stack(batch.targets).to(images.device, non_blocking=True)
        logits, auxiliary = self.model(images)
        (main, pixels), (second, _) = (self.losses(each, labels) for each in (logits, auxiliary))
        small = labels[:, :: images.shape[2] // logits.shape[2], :: images.shape[3] // logits.shape[3]]
        small = small[:, : logits.shape[2], : logits.shape[3]]
        right = (logits.detach().argmax(dim=1) == small) & (small != IGNORED)
        # A mean of each process's own pixels would weigh them by how few they are.
        counts = all_reduce_mean(torch.stack([pixels.float(), right.sum().float(), (small != IGNORED).sum().float()]))
        count, hits, seen = counts.unbind()
        main, second = main / count.clamp(min=1), second / count.clamp(min=1)
        accuracy = hits / seen.clamp(min=1e-6)
        values = {"loss_decode": main.detach(), "loss_auxiliary": second.detach(), "train_aacc": accuracy}
        return main + self.auxiliary_weight * second, values
