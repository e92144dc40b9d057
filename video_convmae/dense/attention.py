"""Attention on a grid with relative positions, in which no bias of all pairs of tokens is held.

Letters: B pictures (or windows), h w their grid, N = h*w tokens, D width of a token, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from video_convmae.models.blocks import Attention, AttentionBlock

from .options import RelativePositions

# Values of a bias that exist at once: 64 MB in float32. The whole of 12 heads on 64 x 64 tokens would be 768 MB, in
# each block and once more for the backward pass.
BIAS_VALUES = 2**24


class GridAttention(Attention):
    """Multi-head attention over a grid, or over square windows of it, with relative positions.

    A grid that windows do not divide is padded with zeros, which take part as keys (ViTDet).

    Args:
        width: D.
        heads: their number.
        window: tokens along a window's side; 0: the whole grid.
        side: tokens along the side of the grid that relative positions are made for.
        relative: their kind. A table that blocks share is given to `forward`.
    """

    def __init__(self, width: int, heads: int, window: int, side: int, relative: RelativePositions) -> None:
        super().__init__(width, heads)
        self.window, self.relative = window, relative
        offsets = 2 * (window or side) - 1
        if relative == "block":
            self.relative_positions = nn.Parameter(torch.zeros(offsets, offsets, heads))
        elif relative == "decomposed":
            self.relative_rows = nn.Parameter(torch.zeros(offsets, width // heads))
            self.relative_columns = nn.Parameter(torch.zeros(offsets, width // heads))

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """`(B, h, w, D)` -> the same shape; `table` is the one that blocks share."""
        if not self.window:
            return self._attend(x, table)
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        padded = x.shape[1:3]
        x = split_windows(x, self.window)
        return join_windows(self._attend(x, table), padded)[:, :height, :width]

    def _attend(self, x: Tensor, table: Tensor | None) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        q, k, v = self.split_heads(x.flatten(1, 2))
        if self.relative == "decomposed":
            y = attend_decomposed(q, k, v, self.relative_rows, self.relative_columns, grid)
        elif self.relative == "none":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            table = self.relative_positions if self.relative == "block" else table
            assert table is not None
            y = attend_with_table(q, k, v, table, grid)
        return self.join_heads(y).unflatten(1, grid)


class GridBlock(AttentionBlock):
    """The encoder's attention block on a grid; with LayerScale if `layer_scale` is not 0."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        drop_path: float,
        *,
        window: int,
        side: int,
        relative: RelativePositions,
        layer_scale: float,
    ) -> None:
        super().__init__(width, heads, mlp_ratio, drop_path)
        self.attention: GridAttention = GridAttention(width, heads, window, side, relative)
        self.scale1 = nn.Parameter(torch.full((width,), float(layer_scale))) if layer_scale else None
        self.scale2 = nn.Parameter(torch.full((width,), float(layer_scale))) if layer_scale else None

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """`(B, h, w, D)` -> the same shape; `table` is the one that blocks share."""
        y = self.attention(self.norm1(x), table)
        x = x + self.drop_path(y if self.scale1 is None else y * self.scale1)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.scale2 is None else y * self.scale2)


def split_windows(x: Tensor, side: int) -> Tensor:
    """`(B, h, w, D)` -> `(B * windows, side, side, D)`; the side divides h and w."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, rows, side, columns, side, D)
    return x.transpose(2, 3).flatten(0, 2)


def join_windows(x: Tensor, grid: tuple[int, int] | torch.Size) -> Tensor:
    """Invert `split_windows` for windows of a grid (h, w)."""
    side = x.shape[1]
    rows, columns = grid[0] // side, grid[1] // side
    return x.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def attend_with_table(q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention with the bias `table[row of query - row of key, column of query - column of key]` (Swin).

    The bias of a few rows of queries is made at a time, and again in the backward pass. FlexAttention would read the
    table in its kernel, but has no backward pass on a CPU and needs torch.compile on a GPU (PyTorch 2.14).

    Args:
        q, k, v: `(B, heads, N, d)`.
        table: `(2 R - 1, 2 S - 1, heads)`, offset 0 in the middle; for grids of other sizes see `fit_offsets`.
        grid: (h, w).

    Returns:
        `(B, heads, N, d)`.
    """
    height, width = grid
    table = fit_offsets(fit_offsets(table, height, 0), width, 1)
    flipped = table.permute(2, 0, 1).flip(1, 2).to(q.dtype)  # of key - query

    def attend_rows(q: Tensor, k: Tensor, v: Tensor, flipped: Tensor, first: int) -> Tensor:
        bias = _bias_of_rows(flipped, grid, first, first + q.shape[2] // width)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    rows = max(1, BIAS_VALUES // (table.shape[2] * width * height * width))
    if rows >= height:
        return attend_rows(q, k, v, flipped, 0)
    parts = [
        checkpoint(attend_rows, part, k, v, flipped, first, use_reentrant=False, preserve_rng_state=False)
        for first, part in zip(range(0, height, rows), q.split(rows * width, dim=2))
    ]
    return torch.cat(parts, dim=2)


def _bias_of_rows(flipped: Tensor, grid: tuple[int, int], first: int, end: int) -> Tensor:
    """Return the bias `(1, heads, (end - first) * w, N)` of the queries in some rows, of a flipped table.

    The keys' rows of a query in row i are h values from h - 1 - i on: windows of the table, in reverse order.
    """
    height, width = grid
    rows = flipped[:, height - end : 2 * height - 1 - first].unfold(1, height, 1)
    both = rows.unfold(2, width, 1).flip(1, 2)  # (heads, rows, w, h, w)
    return both.flatten(3, 4).flatten(1, 2)[None]


def attend_decomposed(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention with the bias `q . rows[row offset] + q . columns[column offset]` (MViTv2, ViTDet).

    The products of a query with the vectors of every row and column, h + w numbers, become further channels of the
    query, and ones at its own row and column those of a key: their product is the bias, and any kernel takes it.

    Args:
        q, k, v: `(B, heads, N, d)`.
        rows: `(2 R - 1, d)`, offset 0 in the middle; columns alike. For grids of other sizes see `fit_offsets`.
        grid: (h, w).

    Returns:
        `(B, heads, N, d)`.
    """
    height, width = grid
    d = q.shape[-1]
    on_grid = q.unflatten(2, grid)
    to_rows = torch.einsum("bnhwd,had->bnhwa", on_grid, _pairs(rows, height).to(q.dtype))
    to_columns = torch.einsum("bnhwd,wad->bnhwa", on_grid, _pairs(columns, width).to(q.dtype))
    bias = torch.cat([to_rows, to_columns], dim=-1).flatten(2, 3)
    own_row = torch.eye(height, dtype=k.dtype, device=k.device)[:, None].expand(-1, width, -1)
    own_column = torch.eye(width, dtype=k.dtype, device=k.device)[None].expand(height, -1, -1)
    ones = torch.cat([own_row, own_column], dim=-1).flatten(0, 1).expand(*k.shape[:2], -1, -1)
    q = torch.cat([q, bias * d**0.5], dim=-1)  # the kernel divides by the root of d
    k = torch.cat([k, ones], dim=-1)
    v = F.pad(v, (0, height + width))  # flash kernels want equal widths
    return F.scaled_dot_product_attention(q, k, v, scale=d**-0.5)[..., :d]


def _pairs(vectors: Tensor, length: int) -> Tensor:
    """Vectors of the offsets `(2 R - 1, d)` -> of every query and key along an axis, `(length, length, d)`."""
    place = torch.arange(length, device=vectors.device)
    return fit_offsets(vectors, length, 0)[place[:, None] - place[None] + length - 1]


def fit_offsets(table: Tensor, length: int, axis: int) -> Tensor:
    """Fit an axis of offsets, 0 in its middle, to `length` tokens: 2 length - 1 offsets.

    Offsets of a shorter axis are those in the middle, so they mean what they were trained for; for a longer one the
    table is resized linearly.
    """
    given, wanted = table.shape[axis], 2 * length - 1
    if wanted <= given:
        return table.narrow(axis, (given - wanted) // 2, wanted)
    moved = table.movedim(axis, -1)
    flat = F.interpolate(moved.reshape(1, -1, given).float(), size=wanted, mode="linear", align_corners=False)
    return flat.view(*moved.shape[:-1], wanted).movedim(-1, axis).to(table.dtype)
