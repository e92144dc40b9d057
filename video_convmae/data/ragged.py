"""Crops of different sizes in one batch, for resizing, flipping and normalising on the device.

In place of `(B, C, T, H, W)` bytes the batch then holds one run of bytes and a table of shapes. The crops drawn are the
same as without. The resized clips differ by rounding alone: the CPU rounds them to whole grey levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RaggedCrops:
    """The crops of B clips, each in its own size.

    Args:
        pixels: `(P,)` uint8, the `(T, h, w, 3)` of each clip, one after the other.
        shapes: (T, h, w) of each clip.
        flips: True for a clip to be mirrored.
        size: (height, width) of the resized clips.
        interpolation: bilinear or bicubic.
    """

    pixels: Tensor
    shapes: tuple[tuple[int, int, int], ...]
    flips: tuple[bool, ...]
    size: tuple[int, int]
    interpolation: str

    def __len__(self) -> int:
        """B."""
        return len(self.shapes)

    def pin_memory(self) -> RaggedCrops:
        """Copy to page-locked memory; PyTorch's loader calls this."""
        return replace(self, pixels=self.pixels.pin_memory())

    def clips(self, device: torch.device) -> Tensor:
        """Resize and flip on the device: `(B, 3, T, *size)` float32 from 0 to 255."""
        pixels = self.pixels.to(device, non_blocking=True)
        parts = pixels.split([3 * frames * height * width for frames, height, width in self.shapes])
        clips = []
        for part, shape, flip in zip(parts, self.shapes, self.flips, strict=True):
            frames = part.view(*shape, 3).permute(0, 3, 1, 2).float()
            frames = F.interpolate(frames, self.size, mode=self.interpolation, align_corners=False, antialias=True)
            clips.append(frames.flip(-1) if flip else frames)
        return torch.stack(clips).clamp_(0, 255).transpose(1, 2)  # bicubic overshoots


def concatenate_crops(
    crops: Sequence[RaggedCrops], concatenate: Callable[[list[Tensor]], Tensor] = torch.cat
) -> RaggedCrops:
    """Concatenate the crops of several clips or samples; `concatenate` does it to their bytes."""
    return replace(
        crops[0],
        pixels=concatenate([each.pixels for each in crops]),
        shapes=tuple(shape for each in crops for shape in each.shapes),
        flips=tuple(flip for each in crops for flip in each.flips),
    )
