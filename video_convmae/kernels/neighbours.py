"""The table of neighbours: for each packed token, the packed tokens around it.

Letters: B clips, n visible tokens of a clip, M = B*n packed tokens of a batch; S cells along a token's side; t h w the
token grid; kt kh kw the kernel; r tokens that the kernel reaches beyond a token, ceil((kh // 2) / S).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from video_convmae.masking import Grid

Kernel = tuple[int, int, int]


@dataclass(frozen=True)
class Neighbours:
    """Position in the pack of the tokens around each token of the pack. Built once a batch, shared by a stage's blocks.

    tokens: `(M, kt, 2r + 1, 2r + 1)` int32, the packed token at each offset; M where there is none.
    order: `(S, S)` int32, the place of row, column in a token's stored cells.
    kernel: (kt, kh, kw), odd.
    """

    tokens: Tensor
    order: Tensor
    kernel: Kernel

    def stored(self) -> Tensor:
        """Return the cell at each stored place, counted row by row, `(S²)` int32: the inverse of `order`."""
        return self.order.flatten().argsort().int()

    def halo_rows(self) -> Tensor:
        """Return each token's cells and those around it, `(kt, M, S + kh - 1, S + kw - 1)` int32.

        The values are rows of the pack flattened to `(M S², C)` with one token of zeros behind it.

        A row -1 of S = 2 cells is row 1 of the token above: for a kernel of 3 the rows -1 0 1 2 around a token (r = 1)
        lie in the tokens 0 1 1 2 of `tokens`, in their rows 1 0 1 0.
        """
        side, reach = self.order.shape[0], self.tokens.shape[-1] // 2
        axes = [torch.arange(-(size // 2), side + size // 2, device=self.order.device) for size in self.kernel[1:]]
        row, column = (axis.div(side, rounding_mode="floor") + reach for axis in axes)
        cell = self.order[(axes[0] % side)[:, None], axes[1] % side]
        return self.tokens[:, :, row[:, None], column].transpose(0, 1) * side**2 + cell


def find_neighbours(keep: Tensor, grid: Grid, order: Tensor, kernel: Kernel) -> Neighbours:
    """Write each token's number into a grid with a border, then read the box around each token.

    With one frame of 1 x 3 tokens, the first and the last of them packed, and r = 1, the grid is

        2 2 2 2 2
        2 0 2 1 2        2 = M: not packed, or outside
        2 2 2 2 2

    and the boxes are its columns 0 to 2 for token 0, and 2 to 4 for token 1.

    Args:
        keep: `(B, n)` positions of the packed tokens in their clip's grid.
        grid: (t, h, w), the token grid.
        order: `(S, S)`, see `Neighbours`.
        kernel: (kt, kh, kw), odd.
    """
    (batch, n), (t, h, w), device = keep.shape, grid, keep.device
    reach = math.ceil(max(kernel[1:]) // 2 / order.shape[0])
    kt, across, count = kernel[0], 2 * reach + 1, batch * n
    h_, w_ = h + across - 1, w + across - 1
    clip_size = (t + kt - 1) * h_ * w_
    clip = torch.arange(batch, device=device)[:, None] * clip_size
    corner = clip + keep // (h * w) * (h_ * w_) + keep // w % h * w_ + keep % w  # first position of the token's box
    frame, row, column = (torch.arange(size, device=device) for size in (kt, across, across))
    box = frame[:, None, None] * (h_ * w_) + row[:, None] * w_ + column
    centre = (kt // 2 * h_ + reach) * w_ + reach
    numbers = torch.full((batch * clip_size,), count, dtype=torch.int32, device=device)
    numbers[(corner + centre).flatten()] = torch.arange(count, dtype=torch.int32, device=device)
    return Neighbours(numbers[corner.view(-1, 1, 1, 1) + box], order.int(), kernel)
