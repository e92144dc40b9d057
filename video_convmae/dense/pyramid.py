"""Pyramids: the maps of a backbone's stages -> the levels that heads read.

Letters: B pictures, C channels, H W pixels of a picture.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .options import BackboneConfig


class StagePyramid(nn.Module):
    """The stages' maps, and one level below them, if any.

    channels, strides: of the levels.

    Args:
        channels, strides: of the stages.
        coarsest: makes the last level of the last map, at half its size.
    """

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], coarsest: nn.Module | None) -> None:
        super().__init__()
        more = coarsest is not None
        self.channels = (*channels, channels[-1]) if more else channels
        self.strides = (*strides, 2 * strides[-1]) if more else strides
        self.coarsest = coarsest

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps `(B, C, h, w)`, finest first -> levels, finest first."""
        return maps if self.coarsest is None else [*maps, self.coarsest(maps[-1])]


class SimplePyramid(nn.Module):
    """ViTDet's simple feature pyramid: levels at 4, 2, 1 and 1/2 of the last map's size.

    Channel LayerNorm follows every convolution. Source: Li et al., Exploring plain vision transformer backbones for
    object detection, 2022.

    Args:
        width: channels of the last map.
        stride: of the last map, in pixels.
        out: channels of the levels.
    """

    def __init__(self, width: int, stride: int, out: int) -> None:
        super().__init__()
        self.channels = (out,) * 4
        self.strides = (stride // 4, stride // 2, stride, 2 * stride)
        up = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        twice = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        again = nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2)
        self.levels = nn.ModuleList(
            [
                nn.Sequential(twice, LayerNorm2d(width // 2), nn.GELU(), again, *_to_level(width // 4, out)),
                nn.Sequential(up, *_to_level(width // 2, out)),
                nn.Sequential(*_to_level(width, out)),
                nn.Sequential(nn.MaxPool2d(2, 2, ceil_mode=True), *_to_level(width, out)),
            ]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps `(B, C, h, w)`, of which the last is read -> four levels, finest first."""
        return [level(maps[-1]) for level in self.levels]


class Halving(nn.Conv2d):
    """A 3x3 convolution of stride 2 without padding, as released: 32x32 tokens make 15x15.

    Fewer than three rows or columns are padded with zeros to three.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, C, (h - 1) // 2, (w - 1) // 2)`, at least one row and column."""
        height, width = x.shape[2:]
        return super().forward(F.pad(x, (0, max(0, 3 - width), 0, max(0, 3 - height))))


def build_pyramid(config: BackboneConfig) -> StagePyramid | SimplePyramid:
    """Build the pyramid that a configuration names."""
    strides, width = config.stage_strides, config.widths[-1]
    if config.pyramid == "simple":
        return SimplePyramid(width, strides[-1], config.pyramid_width)
    coarsest: nn.Module | None = None
    if config.pyramid == "max_pool":
        coarsest = nn.MaxPool2d(2, 2, ceil_mode=True)
    elif config.pyramid == "convolution":
        coarsest = nn.Sequential(Halving(width, width, 3, stride=2), nn.BatchNorm2d(width), nn.GELU())
    return StagePyramid(config.widths, strides, coarsest)


def _to_level(width: int, out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width, out, 1, bias=False),
        LayerNorm2d(out),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        LayerNorm2d(out),
    ]
