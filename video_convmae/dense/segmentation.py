"""Semantic segmentation: UperNet with an auxiliary head on a backbone, its loss, and sliding-window inference.

Letters: B pictures, C channels, H W pixels; K classes. Label maps hold classes 0 .. K - 1 and IGNORED.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone
from .options import SegmenterConfig

IGNORED = 255  # label of a pixel that is neither trained on nor scored
AUXILIARY_LEVEL = 2


class ConvNorm(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )


class UperNet(nn.Module):
    """UperNet's head: pyramid pooling on the last level, a top-down pyramid, all levels fused at the finest.

    Source: Xiao et al., Unified perceptual parsing for scene understanding, 2018, as in mmsegmentation.

    Args:
        channels: of the levels, finest first.
        classes: K.
        width: channels of the head.
        pools: sides of the grids that the last level is pooled to.
        dropout: rate before the last convolution, of whole channels.
    """

    def __init__(
        self, channels: tuple[int, ...], classes: int, width: int, pools: tuple[int, ...], dropout: float
    ) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNorm(channels[-1], width, 1)) for side in pools
        )
        self.bottleneck = ConvNorm(channels[-1] + len(pools) * width, width, 3)
        self.laterals = nn.ModuleList(ConvNorm(inputs, width, 1) for inputs in channels[:-1])
        self.smoothing = nn.ModuleList(ConvNorm(width, width, 3) for _ in channels[:-1])
        self.fusion = ConvNorm(len(channels) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Map levels `(B, C_i, h_i, w_i)`, finest first, to logits `(B, K, h_0, w_0)`."""
        last = levels[-1]
        pooled = [_resize(pool(last), last) for pool in self.pools]
        maps = [lateral(level) for lateral, level in zip(self.laterals, levels)]
        maps.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for finer in range(len(maps) - 2, -1, -1):
            maps[finer] = maps[finer] + _resize(maps[finer + 1], maps[finer])
        smooth = [conv(x) for conv, x in zip(self.smoothing, maps)] + maps[-1:]
        fused = self.fusion(torch.cat([_resize(x, smooth[0]) for x in smooth], dim=1))
        return self.classifier(self.dropout(fused))


class AuxiliaryHead(nn.Sequential):
    """One 3x3 convolution and a classifier on one level (FCN), for training alone."""

    def __init__(self, inputs: int, classes: int, width: int, dropout: float) -> None:
        super().__init__(ConvNorm(inputs, width, 3), nn.Dropout2d(dropout), nn.Conv2d(width, classes, 1))


class Segmenter(nn.Module):
    """A backbone with UperNet and, for training, an auxiliary head on its third level.

    Args:
        config: backbone and heads.
        num_classes: K.

    OF_CLASSES: prefixes of the parameters that belong to single classes.
    """

    OF_CLASSES = ("head.classifier.", "auxiliary.2.")

    def __init__(self, config: SegmenterConfig, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"the number of classes is {num_classes}; expected 1 or more")
        self.config, self.num_classes = config, num_classes
        self.backbone = Backbone(config)
        channels = self.backbone.channels
        if len(channels) <= AUXILIARY_LEVEL:
            raise ValueError(
                f"the backbone has {len(channels)} levels; expected {AUXILIARY_LEVEL + 1} or more: pyramid simple"
            )
        self.head = UperNet(channels, num_classes, config.head_width, config.pools, config.head_dropout)
        inputs = channels[AUXILIARY_LEVEL]
        self.auxiliary = AuxiliaryHead(inputs, num_classes, config.auxiliary_width, config.head_dropout)
        for module in (*self.head.modules(), *self.auxiliary.modules()):
            if isinstance(module, nn.Conv2d) and module.bias is not None:  # the classifiers, as in mmsegmentation
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map images `(B, 3, H, W)` to logits `(B, K, H / 4, W / 4)` and, in training, the auxiliary head's."""
        levels = self.backbone(images)
        auxiliary = self.auxiliary(levels[AUXILIARY_LEVEL]) if self.training else None
        return self.head(levels), auxiliary

    def layer_scales(self, decay: float) -> dict[str, float]:
        """Return every parameter's learning-rate scale under layer decay: `Backbone.layer_scales`, and 1 of heads."""
        scales = self.backbone.layer_scales(decay)
        return {name: scales.get(name.removeprefix("backbone."), 1.0) for name, _ in self.named_parameters()}


def pixel_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropy over the pixels that are not ignored, and their number.

    Args:
        logits: `(B, K, h, w)`; resized bilinearly to the labels.
        labels: `(B, H, W)` int64.
    """
    logits = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return loss, (labels != IGNORED).sum()


@torch.no_grad()
def slide(model: nn.Module, images: Tensor, window: int, stride: int, classes: int, batch: int = 4) -> Tensor:
    """Return the mean of the logits of overlapping windows, at the resolution of the images.

    Windows start every `stride` pixels, and the last one ends at the border; a smaller picture is one window. Each
    window's logits are resized to its pixels before they are added (mmsegmentation).

    Args:
        model: a `Segmenter` in evaluation mode.
        images: `(B, 3, H, W)`.
        window, stride: in pixels.
        classes: K.
        batch: windows that go through the model together.

    Returns:
        `(B, K, H, W)` float32.
    """
    count, _, height, width = images.shape
    places = list(product(_starts(height, window, stride), _starts(width, window, stride)))
    total = torch.zeros(count, classes, height, width, device=images.device)
    seen = torch.zeros(1, 1, height, width, device=images.device)
    for start in range(0, len(places), batch):
        some = places[start : start + batch]
        crops = torch.cat([images[:, :, top : top + window, left : left + window] for top, left in some])
        logits = model(crops)[0].float()
        logits = F.interpolate(logits, size=crops.shape[2:], mode="bilinear", align_corners=False)
        for (top, left), part in zip(some, logits.split(count)):
            area = (slice(None), slice(None), slice(top, top + window), slice(left, left + window))
            total[area] += part
            seen[area] += 1
    return total / seen


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows along a side start."""
    last = max(0, length - window)
    return [min(place, last) for place in range(0, last + stride, stride)] if last else [0]


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
