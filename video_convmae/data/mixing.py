"""Mixup, cutmix and label smoothing on a batch (timm's, for clips)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from .options import MixingConfig
from .transforms import preserve_random_state


class Mixing:
    """Mix each clip with its counterpart from the batch's other end, all at the same ratio (timm's batch mode).

    One number is drawn from torch's default CPU generator for each batch, where mixup or cutmix is on; everything else
    follows from it. NumPy's global generator is left unchanged.

    Args:
        config: strengths and shares.
        num_classes: classes of the labels.
    """

    def __init__(self, config: MixingConfig, num_classes: int) -> None:
        from timm.data.mixup import Mixup, mixup_target  # here, so that a pretraining does not import timm

        self.config = config
        self._smoothed = partial(mixup_target, num_classes=num_classes, smoothing=config.smoothing)
        self._mixup = Mixup(
            config.mixup,
            config.cutmix,
            prob=config.probability,
            switch_prob=config.switch,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )

    def __call__(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed clips and their targets.

        Args:
            clips: `(B, C, T, H, W)` float; it is not changed.
            labels: `(B,)` int64, 0 to `num_classes` - 1; or of several classes each `(B, num_classes)`, 0 or 1.

        Returns:
            clips: `(B, C, T, H, W)`. A cutmix rectangle spans all frames.
            targets: `(B, num_classes)` float32; rows sum to 1, or to the number of a clip's classes.

        Raises:
            ValueError: B is odd and batches are mixed.
        """
        if not self.config.mixes:
            return clips, self._smoothed(labels) if labels.ndim == 1 else self._smooth(labels)
        if len(clips) % 2:
            raise ValueError(
                f"a batch has {len(clips)} clips; mixup and cutmix take pairs: choose an even "
                f"train.batch_size x data.repeats, or set mixing.mixup and mixing.cutmix to 0"
            )
        seed = int(torch.randint(2**32, (), device="cpu"))
        # timm counts axes from both ends and expects images: of five axes its rectangle would cut frames and rows, by
        # the share of rows and columns. It also works in place.
        frames_as_channels = clips.clone(memory_format=torch.contiguous_format).flatten(1, 2)
        with preserve_random_state():
            np.random.seed(seed)
            if labels.ndim == 1:
                mixed, targets = self._mixup(frames_as_channels, labels)
            else:
                share = self._mixup._mix_batch(frames_as_channels)  # in place; timm's targets are of one class
                mixed, targets = frames_as_channels, self._smooth(share * labels + (1 - share) * labels.flip(0))
        return mixed.view(clips.shape), targets

    def _smooth(self, targets: Tensor) -> Tensor:
        """Smooth `(B, classes)` by the values that timm has for one class: a share goes evenly to all classes."""
        return (1 - self.config.smoothing) * targets + self.config.smoothing / targets.shape[1]
