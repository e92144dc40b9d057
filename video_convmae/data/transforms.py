"""Crops and flips: one draw for every frame of a clip.

A draw is data (`Crop`), made from the frame size and a generator; `apply` does the work on uint8 frames. Nothing is
converted to float here: the batch crosses to the device as bytes and is normalised there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf


@dataclass(frozen=True)
class Crop:
    """A window in pixels of the frame, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training clip.

    crop: multi_scale (VideoMAE) or random_resized (MAE).
    scales: multi_scale: side of the window over the frame's short side.
    area: random_resized: share of the frame's area.
    aspect: random_resized: width over height.
    flip: mirror half of the clips. Never where a label names left or right.
    interpolation: bilinear or bicubic.
    """

    crop: Literal["multi_scale", "random_resized"] = "multi_scale"
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    area: tuple[float, float] = (0.5, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.crop not in ("multi_scale", "random_resized"):
            raise ValueError(f"augmentation.crop is {self.crop!r}; expected 'multi_scale' or 'random_resized'")
        if not all(0 < scale <= 1 for scale in self.scales) or not self.scales:
            raise ValueError(f"augmentation.scales is {self.scales}; expected numbers above 0 and up to 1")

    def draw(self, height: int, width: int, generator: torch.Generator | None = None) -> Crop:
        """A crop for frames of that size."""
        if self.crop == "multi_scale":
            window = multi_scale_crop(height, width, self.scales, generator)
        else:
            window = random_resized_crop(height, width, self.area, self.aspect, generator)
        flip = self.flip and bool(torch.rand((), generator=generator) < 0.5)
        return Crop(*window, flip=flip)

    def apply(self, frames: np.ndarray, crop: Crop, size: tuple[int, int]) -> Tensor:
        """Frames `(T, H, W, C)` uint8 -> clip `(C, T, *size)` uint8."""
        window = frames[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        if crop.flip:
            window = window[:, :, ::-1]
        # Channels-last bytes are what torchvision's fast resize wants: 2-3 ms for 16 frames of 340x256 to 224.
        clip = torch.from_numpy(np.ascontiguousarray(window)).permute(0, 3, 1, 2)
        clip = tvf.resize(clip, list(size), InterpolationMode(self.interpolation), antialias=True)
        return clip.transpose(0, 1).contiguous()


def multi_scale_crop(
    height: int, width: int, scales: tuple[float, ...], generator: torch.Generator | None = None
) -> tuple[int, int, int, int]:
    """VideoMAE's multi-scale crop: (top, left, height, width).

    Height and width are scales of the short side that lie next to each other in the list at most; the window sits at
    one of 13 places: corners, edge centres, the centre, and the quarter points between them.
    """
    short = min(height, width)
    pairs = [(i, j) for i in range(len(scales)) for j in range(len(scales)) if abs(i - j) <= 1]
    i, j = pairs[_pick(len(pairs), generator)]
    crop_height, crop_width = max(1, int(short * scales[i])), max(1, int(short * scales[j]))
    places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(y, x) for y in (1, 3) for x in (1, 3)]
    y, x = places[_pick(len(places), generator)]
    return y * ((height - crop_height) // 4), x * ((width - crop_width) // 4), crop_height, crop_width


def random_resized_crop(
    height: int,
    width: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator | None = None,
) -> tuple[int, int, int, int]:
    """Inception's crop: (top, left, height, width) of a random area and aspect ratio.

    After ten draws that do not fit, the largest centred window whose aspect ratio is allowed.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        share, position = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        pixels = height * width * (area[0] + share * (area[1] - area[0]))
        ratio = math.exp(low + position * (high - low))
        crop_height, crop_width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = _pick(height - crop_height + 1, generator)
            left = _pick(width - crop_width + 1, generator)
            return top, left, crop_height, crop_width
    crop_height, crop_width = min(height, round(width / aspect[0])), min(width, round(height * aspect[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _pick(count: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(count, (), generator=generator))


def view_crops(height: int, width: int, size: tuple[int, int], count: int) -> list[Crop]:
    """Test windows: the largest of the shape of `size`, spread evenly along the longer side; one lies in the middle.

    Three windows on a wide frame are left, centre, right. Resized by `Augmentation.apply`, a window shows what resizing
    the short side and cropping would.
    """
    scale = min(height / size[0], width / size[1])
    window_height, window_width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    spare_height, spare_width = height - window_height, width - window_width
    places = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
    return [Crop(round(p * spare_height), round(p * spare_width), window_height, window_width) for p in places]
