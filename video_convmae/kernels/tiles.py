"""The passes of depthwise.py in PyTorch: every token with the cells around it becomes one small padded tile.

A tile holds S + kh - 1 by S + kw - 1 cells, at S = 4 and 5x5 four times the token. That is gathered for each kernel
frame, and a convolution without padding leaves the token's own S x S cells. Compared with writing the pack into a dense
grid, a tenth of the tokens costs four tenths of the grid's traffic, and nothing is filled with zeros first.

The weight gradient is one matrix product a channel, `(S², M) x (M, halo cells)`, whose entries a tap's offset apart
are summed. oneDNN's own takes 0.52 s for one 5x5 tap frame of 16x56x56x256 float32 (one Xeon core), which was
35% of the whole step; these passes over the visible tenth take a hundredth of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .depthwise import Neighbours

# Bytes of the tiles made at once. Above 32 MB glibc maps fresh pages for every tensor: gathering 63 MB took 40 ms,
# three times 21 MB took 4 ms.
CHUNK = 2**23


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Neighbours) -> Tensor:
    """`(M, S², C)`, `(C, 1, kt, kh, kw)`, `(C)` -> `(M, S², C)`.

    The bias joins the middle frame's taps, as on the dense grid: then packed and dense sum in one order, and their
    float32 tokens have the same bits.
    """
    channels, middle = x.shape[2], neighbours.kernel[0] // 2
    padded = F.pad(x.reshape(-1, channels), (0, 0, 0, x.shape[1]))
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    sum_dtype = torch.promote_types(x.dtype, torch.float32)
    rows, stored = neighbours.rows(), neighbours.stored()
    out = torch.empty_like(x)
    for tokens in _chunks(x, rows):
        total = None
        for dt, of_tile in enumerate(rows[:, tokens]):
            tile = padded.index_select(0, of_tile.flatten()).view(*of_tile.shape, channels).permute(0, 3, 1, 2)
            y = F.conv2d(tile, weight[:, :, dt], bias if dt == middle else None, groups=channels)
            total = y.to(sum_dtype) if total is None else total.add_(y)
        out[tokens] = total.permute(0, 2, 3, 1).flatten(1, 2)[:, stored].to(x.dtype)
    return out


def weight_gradient(x: Tensor, gradient: Tensor, neighbours: Neighbours) -> Tensor:
    """`x` and the output's gradient, `(M, S², C)` -> `(C, 1, kt, kh, kw)`, float32 at least."""
    cells, channels = x.shape[1:]
    (kt, kh, kw), side = neighbours.kernel, neighbours.side
    dtype = torch.promote_types(x.dtype, torch.float32)
    padded = F.pad(x.to(dtype).reshape(-1, channels).t(), (0, cells))  # (C, (M + 1) S²)
    by_row = neighbours.order.flatten()  # the gradient's cells in order of rows and columns
    gradient = gradient.to(dtype)[:, by_row].permute(2, 1, 0).contiguous()  # (C, S², M)
    rows = neighbours.rows()
    halo = rows[0, 0].numel()
    products = padded.new_zeros(kt, channels, cells, halo)
    for tokens in _chunks(x, rows):
        for dt, of_tile in enumerate(rows[:, tokens]):
            tile = padded.index_select(1, of_tile.flatten()).view(channels, -1, halo)
            products[dt].baddbmm_(gradient[:, :, tokens], tile)
    products = products.view(kt, channels, side, side, side + kh - 1, side + kw - 1)
    taps = sum(products[:, :, i, j, i : i + kh, j : j + kw] for i in range(side) for j in range(side))
    return taps.transpose(0, 1)[:, None]


def _chunks(x: Tensor, rows: Tensor) -> Iterator[slice]:
    """The tokens in parts whose tiles take up to `CHUNK` bytes."""
    size = max(1, CHUNK // (rows[0, 0].numel() * x.shape[2] * x.element_size()))
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))
