"""Position tables for a token grid `(t, h, w)`: fixed sine-cosine, `(N, D)` float32, tokens in the order t, h, w."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from video_convmae.masking import Grid


def sincos(grid: Grid, width: int) -> Tensor:
    """Return MAE's table over (h, w), columns in the first half of the channels; for t > 1 a table over t is added.

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
    return (table + _time(t, width)[:, None, None, :]).reshape(t * h * w, width).float()


def time(t: int, width: int) -> Tensor:
    """Return the part of `sincos` over `t` token frames, `(t, width)` float32; zeros for one frame."""
    return _time(t, width).float()


def flat(grid: Grid, width: int) -> Tensor:
    """Return VideoMAE's table: one axis over all N tokens, sine on even and cosine on odd channels."""
    t, h, w = grid
    column = torch.arange(width, dtype=torch.float64)
    frequency = 10000.0 ** (-2 * (column // 2) / width)
    angle = torch.arange(t * h * w, dtype=torch.float64)[:, None] * frequency
    return torch.where(column.long() % 2 == 0, angle.sin(), angle.cos()).float()


TABLES = {"sincos": sincos, "flat": flat}


def resize(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resize a table `(N, D)` from one grid to another: bicubic over (h, w) as in MAE and DeiT, then linear over t.

    Equal sizes are left as they are, bit for bit.

    Raises:
        ValueError: the table does not have the old grid's tokens.
    """
    t, h, w = old
    if table.shape[0] != t * h * w:
        raise ValueError(f"the table has {table.shape[0]} tokens; expected {t * h * w} for the grid {old}")
    x = table.float().view(t, h, w, -1).permute(0, 3, 1, 2)
    if (h, w) != new[1:]:
        x = F.interpolate(x, size=new[1:], mode="bicubic", align_corners=False)
    if t != new[0]:
        over_time = x.permute(2, 3, 1, 0).flatten(0, 1)  # (h * w, D, t)
        x = F.interpolate(over_time, size=new[0], mode="linear", align_corners=False)
        x = x.unflatten(0, new[1:]).permute(3, 2, 0, 1)
    return x.permute(0, 2, 3, 1).reshape(-1, table.shape[1]).to(table.dtype)


def _time(t: int, width: int) -> Tensor:
    return _sincos_axis(t, width) if t > 1 else torch.zeros(1, width, dtype=torch.float64)


def _sincos_axis(length: int, width: int) -> Tensor:
    """Encode positions 0 .. length-1 as `(length, width)`: sines in the first half, cosines in the second."""
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
