"""Visible cells <-> dense grid: what makes the masked convolutions exact at the price of the visible tokens alone.

Letters: B clips; t h w the token grid, N = t*h*w; n visible tokens of a clip; m tokens that the convolutional stages
compute (n packed, N dense); P pixels along a token's side; C channels.

Every operation of stages 1 and 2 but the depthwise convolution works inside one cell, so features are kept as
`(B, m, cells, C)`: for each computed token, its cells. Cells are *nested*: with strides (4, 2, 2) a token holds 2x2
stage-2 cells and each of those 2x2 stage-1 cells, stored in that order. Row and column of the sixteen stage-1 cells:

    stored     0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12 13 14 15
    row        0  0  1  1 |  0  0  1  1 |  2  2  3  3 |  2  2  3  3
    column     0  1  0  1 |  2  3  2  3 |  0  1  0  1 |  2  3  2  3

Then a convolution with kernel = stride is a Linear on a plain reshape, `(B, m, 16, C) -> (B, m, 4, 4 C)`, and nothing
moves between stages. Only the depthwise convolution looks at neighbours: it goes through the dense grid.
"""

from __future__ import annotations

from functools import cached_property
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from video_convmae.kernels import Neighbours, find_neighbours
from video_convmae.masking import Grid

from .sizes import Implementation


class Packing:
    """Where the visible tokens of one batch lie, worked out once and used by every stage.

    Args:
        visible: `(B, t, h, w)` bool with equally many True for every clip. On the CPU, finding the indices makes no
            accelerator wait.
        device: where the features are.
        implementation: `packed` computes the visible tokens alone, `dense` all of them and masks the convolutions'
            input, as the released ConvMAE does. Both give the same tokens.

    Raises:
        ValueError: the clips have different numbers of visible tokens, or one has none.
    """

    def __init__(self, visible: Tensor, device: torch.device, implementation: Implementation = "packed") -> None:
        if visible.ndim != 4 or visible.dtype != torch.bool:
            raise ValueError(f"visible is {visible.dtype} {tuple(visible.shape)}; expected bool (B, t, h, w)")
        batch, *grid = visible.shape
        self.batch, self.grid = batch, (grid[0], grid[1], grid[2])
        self.keep, self.hidden = (index.to(device, non_blocking=True) for index in split_tokens(visible))
        self.packed = implementation == "packed"
        self.all_computed = not self.packed or self.hidden.shape[1] == 0
        # Dense only: which computed tokens the convolutions may see, (B, N, 1, 1).
        masked = self.all_computed and self.hidden.shape[1] > 0
        self.shown = visible.flatten(1)[..., None, None].to(device, non_blocking=True) if masked else None

    @cached_property
    def computed(self) -> Tensor:
        """`(B, m)` indices of the tokens that the convolutional stages compute."""
        if not self.all_computed:
            return self.keep
        tokens = prod(self.grid)
        return torch.arange(tokens, device=self.keep.device).expand(self.batch, tokens)

    def visible_of_computed(self, x: Tensor) -> Tensor:
        """`(B, m, ...)` over the computed tokens -> `(B, n, ...)` over the visible ones."""
        return x if self.shown is None else take_tokens(x, self.keep)

    def cells(self, factors: tuple[int, ...], kernel: Grid | None = None) -> Cells:
        """The cells of a stage whose later strides are `factors`, for depthwise convolutions of one kernel."""
        return Cells(self, factors, kernel)


class Cells:
    """One stage's cells: packed `(B, m, cells, C)` <-> dense `(B, t, H, W, C)`, hidden positions zero.

    Args:
        packing: of the batch.
        factors: strides of the later stages.
        kernel: of the stage's depthwise convolutions, which find in `neighbours` who lies around each visible token.
    """

    def __init__(self, packing: Packing, factors: tuple[int, ...], kernel: Grid | None = None) -> None:
        self.packing = packing
        self.factors = factors
        side = prod(factors)
        t, h, w = packing.grid
        self.grid: Grid = (t, h * side, w * side)
        self.count = side * side
        self.neighbours = self._neighbours(kernel) if packing.packed and kernel else None

    def _neighbours(self, kernel: Grid) -> Neighbours:
        side, device = prod(self.factors), self.packing.keep.device
        places = torch.arange(self.count, device=device).view(1, 1, side, side, 1)
        order = nest(places, self.factors).flatten().argsort().view(side, side)
        return find_neighbours(self.packing.keep, self.packing.grid, order, kernel)

    @cached_property
    def rows(self) -> Tensor:
        """`(B * n * cells)`: the row of every visible cell in the dense grid flattened to `(B * t * H * W, C)`."""
        device, size = self.packing.keep.device, prod(self.grid)
        table = torch.arange(size, device=device).view(1, *self.grid, 1)
        within = nest(table, self.factors).view(-1, self.count)[self.packing.keep]  # (B, n, cells)
        start = torch.arange(self.packing.batch, device=device)[:, None, None] * size
        return (within + start).flatten()

    def to_grid(self, x: Tensor) -> Tensor:
        """`(B, m, cells, C)` -> `(B, t, H, W, C)`. Hidden positions are selected away, never multiplied by zero."""
        if self.packing.shown is None:
            return self.visible_to_grid(x)
        x = torch.where(self.packing.shown, x, x.new_zeros(()))
        return unnest(x, self.factors, self.grid)

    def visible_to_grid(self, x: Tensor) -> Tensor:
        """Cells of the visible tokens alone, `(B, n, cells, C)` -> `(B, t, H, W, C)`."""
        if self.packing.hidden.shape[1] == 0:
            return unnest(x, self.factors, self.grid)
        channels = x.shape[-1]
        dense = x.new_zeros(self.packing.batch * prod(self.grid), channels)
        return dense.index_copy(0, self.rows, x.reshape(-1, channels)).view(-1, *self.grid, channels)

    def from_grid(self, x: Tensor) -> Tensor:
        """`(B, t, H, W, C)` -> `(B, m, cells, C)`."""
        if self.packing.all_computed:
            return nest(x, self.factors)
        channels = x.shape[-1]
        return x.reshape(-1, channels).index_select(0, self.rows).view(self.packing.batch, -1, self.count, channels)


def nest(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Grid `(B, t, H, W, C)` -> nested cells `(B, N, cells, C)`; `factors` are the strides of the later stages."""
    batch, t, height, width, channels = x.shape
    side, k = prod(factors), len(factors)
    h, w = height // side, width // side
    outermost_first = factors[::-1]
    x = x.reshape(batch, t, h, *outermost_first, w, *outermost_first, channels)
    rows, columns = range(3, 3 + k), range(4 + k, 4 + 2 * k)
    nesting = [axis for pair in zip(rows, columns) for axis in pair]
    return x.permute(0, 1, 2, 3 + k, *nesting, 4 + 2 * k).reshape(batch, t * h * w, side * side, channels)


def unnest(x: Tensor, factors: tuple[int, ...], grid: Grid) -> Tensor:
    """Nested cells `(B, N, cells, C)` -> grid `(B, t, H, W, C)`: the inverse of `nest`."""
    batch, channels = x.shape[0], x.shape[-1]
    side, k = prod(factors), len(factors)
    t, h, w = grid[0], grid[1] // side, grid[2] // side
    x = x.reshape(batch, t, h, w, *(f for factor in factors[::-1] for f in (factor, factor)), channels)
    rows, columns = range(4, 4 + 2 * k, 2), range(5, 4 + 2 * k, 2)
    return x.permute(0, 1, 2, *rows, 3, *columns, 4 + 2 * k).reshape(batch, *grid, channels)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """`(B, N, ...)` and indices `(B, k)` -> `(B, k, ...)`."""
    start = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + start).flatten()).view(*index.shape, *x.shape[2:])


def take_patches(clips: Tensor, tubelet: int, side: int, index: Tensor) -> Tensor:
    """Pixels of the tokens at `index`, gathered before any arithmetic.

    Args:
        clips: `(B, C, T, H, W)`.
        tubelet: frames in a token.
        side: pixels along a token's side, P.
        index: `(B, k)`.

    Returns:
        `(B, k, tubelet, P, P, C)`.
    """
    patches = rearrange(clips, "b c (t u) (h p) (w q) -> b t h w u p q c", u=tubelet, p=side, q=side)  # a view
    batch, _, h, w = patches.shape[:4]
    clip = torch.arange(batch, device=clips.device)[:, None]
    return patches[clip, index // (h * w), index // w % h, index % w]


def put_patches(patches: Tensor, grid: Grid) -> Tensor:
    """Pixels of every token `(B, N, tubelet, P, P, C)` -> clips `(B, C, T, H, W)`."""
    t, h, w = grid
    return rearrange(patches, "b (t h w) u p q c -> b c (t u) (h p) (w q)", t=t, h=h, w=w)


def patch_cells(patches: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Pixels of tokens `(B, k, tubelet, P, P, C)` -> of their nested stage-1 cells `(B, k, cells, pixels of a cell)`.

    `factors` are the strides after the first. The pixels of a cell run over (pt, ph, pw, c).
    """
    side = prod(factors)
    cells = rearrange(patches, "b k u (y p) (x q) c -> (b k) 1 y x (u p q c)", y=side, x=side)
    return nest(cells, factors).view(*patches.shape[:2], side * side, -1)


def split_tokens(visible: Tensor) -> tuple[Tensor, Tensor]:
    """`(B, t, h, w)` bool -> indices of the visible `(B, n)` and of the hidden `(B, N - n)` tokens, ascending."""
    visible = visible.flatten(1)
    counts = visible.sum(1).tolist()
    if min(counts) != max(counts) or counts[0] == 0:
        raise ValueError(
            f"the clips have {counts} visible tokens; expected the same number, at least one, for every clip of a batch"
        )
    order = torch.sort((~visible).to(torch.uint8), dim=1, stable=True).indices
    return order[:, : counts[0]], order[:, counts[0] :]
