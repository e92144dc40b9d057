"""Position tables for a token grid `(t, h, w)`: fixed sine-cosine, `(N, D)` float32, tokens in the order t, h, w."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos(grid: tuple[int, int, int], width: int) -> Tensor:
    """The table of MAE over (h, w), the column in the first half of the channels; for t > 1 a table over t is added.

    At t = 1 it is MAE's image table exactly.

    Raises:
        ValueError: the width is not divisible by 4 (sine and cosine for each of two axes).
    """
    if width % 4:
        raise ValueError(f"the width of a sine-cosine table is {width}; expected a multiple of 4")
    t, h, w = grid
    rows = _sincos_axis(h, width // 2)[:, None, :].expand(h, w, -1)
    columns = _sincos_axis(w, width // 2)[None, :, :].expand(h, w, -1)
    table = torch.cat([columns, rows], dim=-1).expand(t, h, w, width)
    if t > 1:
        table = table + _sincos_axis(t, width)[:, None, None, :]
    return table.reshape(t * h * w, width).float()


def flat(grid: tuple[int, int, int], width: int) -> Tensor:
    """VideoMAE's table: tokens numbered through, sine on even and cosine on odd columns."""
    t, h, w = grid
    column = torch.arange(width, dtype=torch.float64)
    frequency = 10000.0 ** (-2 * (column // 2) / width)
    angle = torch.arange(t * h * w, dtype=torch.float64)[:, None] * frequency
    return torch.where(column.long() % 2 == 0, angle.sin(), angle.cos()).float()


TABLES = {"sincos": sincos, "flat": flat}


def _sincos_axis(length: int, width: int) -> Tensor:
    """Positions 0 .. length-1 as `(length, width)`: sines in the first half, cosines in the second."""
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
