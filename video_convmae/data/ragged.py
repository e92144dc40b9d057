"""What crops leave of a batch's frames, in their own sizes: for resizing, flipping and normalising on the device.

In place of `(B, C, T, H, W)` bytes a batch then holds one run of bytes and a table of shapes. The crops are those that
would be drawn without; what the device makes of them differs from the CPU's clip by rounding alone: that one is rounded
to whole grey levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RaggedCrops:
    """The windows of B clips.

    pixels: `(P,)` uint8, the `(T, h, w, 3)` of each clip, one after the other.
    shapes: of each clip (T, h, w).
    flips: whether it is to be mirrored.
    size: (height, width) of the clips that they become.
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
        """The same in page-locked memory; PyTorch's loader calls this."""
        return replace(self, pixels=self.pixels.pin_memory())

    def clips(self, device: torch.device) -> Tensor:
        """Resized and flipped: `(B, 3, T, *size)` float32 from 0 to 255, on the device."""
        pixels = self.pixels.to(device, non_blocking=True)
        parts = pixels.split([3 * frames * height * width for frames, height, width in self.shapes])
        clips = []
        for part, shape, flip in zip(parts, self.shapes, self.flips, strict=True):
            frames = part.view(*shape, 3).permute(0, 3, 1, 2).float()
            frames = F.interpolate(frames, self.size, mode=self.interpolation, align_corners=False, antialias=True)
            clips.append(frames.flip(-1) if flip else frames)
        return torch.stack(clips).clamp_(0, 255).transpose(1, 2)  # bicubic overshoots


def join(windows: Sequence[RaggedCrops], concatenate: Callable[[list[Tensor]], Tensor] = torch.cat) -> RaggedCrops:
    """The windows of several samples as those of one batch; `concatenate` joins their bytes."""
    return replace(
        windows[0],
        pixels=concatenate([each.pixels for each in windows]),
        shapes=tuple(shape for each in windows for shape in each.shapes),
        flips=tuple(flip for each in windows for flip in each.flips),
    )
