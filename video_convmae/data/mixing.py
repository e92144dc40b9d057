"""Mixup, cutmix and label smoothing on a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from .transforms import kept_random_state


@dataclass(frozen=True)
class MixingConfig:
    """What becomes of a batch's clips and labels."""

    mixup: float = 0.8
    """Alpha of the beta distribution that two clips' shares are drawn from; 0: no mixup."""
    cutmix: float = 1.0
    """Alpha of the beta distribution that a rectangle's area is drawn from; 0: no cutmix."""
    probability: float = 1.0
    """Share of the batches that are mixed."""
    switch: float = 0.5
    """Share of the mixed batches that are cutmix, where both are on."""
    smoothing: float = 0.1
    """Share of a label that is spread evenly over all classes."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"mixing.{name} is {value}; expected a number above 0, or 0 for none")
        for name in ("probability", "switch", "smoothing"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"mixing.{name} is {value}; expected a share, from 0 to 1")

    @property
    def mixes(self) -> bool:
        """Whether any batch is mixed; else labels are smoothed and nothing more."""
        return self.probability > 0 and (self.mixup > 0 or self.cutmix > 0)


class Mixing:
    """Each clip of a batch with its counterpart from the batch's other end, in one share for the whole batch.

    Its numbers follow from torch's default CPU generator, from which one is drawn for each batch where anything is
    mixed. NumPy's global generator is left as it was.
    """

    def __init__(self, config: MixingConfig, num_classes: int) -> None:
        self.config = config
        self.num_classes = num_classes
        self._mixup = Mixup(
            config.mixup,
            config.cutmix,
            prob=config.probability,
            switch_prob=config.switch,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )

    def __call__(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed clips and the targets that go with them.

        Args:
            clips: `(B, C, T, H, W)` float; it is not changed.
            labels: `(B,)` int64, 0 to `num_classes` - 1.

        Returns:
            clips: `(B, C, T, H, W)`. A cutmix rectangle spans all frames.
            targets: `(B, num_classes)` float32; rows sum to 1.

        Raises:
            ValueError: B is odd and batches are mixed.
        """
        if not self.config.mixes:
            return clips, mixup_target(labels, self.num_classes, smoothing=self.config.smoothing)
        if len(clips) % 2:
            raise ValueError(
                f"a batch has {len(clips)} clips; mixup and cutmix take pairs: choose an even "
                f"train.batch_size x data.repeats, or set mixing.mixup and mixing.cutmix to 0"
            )
        seed = int(torch.randint(2**32, (), device="cpu"))
        # timm counts axes from both ends and means images: of five axes its rectangle would cut frames and rows, by the
        # share of rows and columns. It also works in place.
        frames_as_channels = clips.clone(memory_format=torch.contiguous_format).flatten(1, 2)
        with kept_random_state():
            np.random.seed(seed)
            mixed, targets = self._mixup(frames_as_channels, labels)
        return mixed.view(clips.shape), targets
