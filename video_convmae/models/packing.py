"""Visible cells <-> dense grid: masked convolutions that are exact and cost the visible tokens alone.

Letters: B clips, C channels, T H W frames and pixels of a clip; t h w the token grid, N = t*h*w; n visible and k chosen
tokens of a clip; m tokens that the convolutional stages compute (n packed, N dense); P pixels along a token's side.
Where a clip has several masks, each counts as a clip: B is then clips x masks, and only pixels are looked up by clip.

Every operation of stages 1 and 2 but the depthwise convolution works inside one cell, so features are kept as
`(B, m, cells, C)`: for each computed token, its cells. Cells are *nested*: with strides (4, 2, 2) a token holds 2x2
stage-2 cells and each of those 2x2 stage-1 cells, stored in that order. Row and column of the sixteen stage-1 cells:

    stored     0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12 13 14 15
    row        0  0  1  1 |  0  0  1  1 |  2  2  3  3 |  2  2  3  3
    column     0  1  0  1 |  2  3  2  3 |  0  1  0  1 |  2  3  2  3

Then a convolution with kernel = stride is a Linear on a plain reshape, `(B, m, 16, C) -> (B, m, 4, 4 C)`, and nothing
moves between stages. Only the depthwise convolution looks at neighbours: packed, through a table of them
(kernels/neighbours.py); dense, on the grid.
"""

from __future__ import annotations

from functools import cached_property
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from video_convmae.kernels import Kernel, find_neighbours
from video_convmae.masking import Grid

from .sizes import Implementation


class Packing:
    """Token indices of one batch, worked out once and used by every stage.

    clips: their number; batch: that of all their masks, B.
    keep: `(B, n)` visible tokens; hidden: `(B, N - n)`; predicted: `(B, k)`; computed: `(B, m)` tokens that the
    convolutional stages compute. All ascending.

    Several masks of a clip (FastConvMAE) are as many clips that share their pixels. Packed, masks with no token in
    common compute each cell once, and a convolution sees the cells of its own mask alone.

    Args:
        visible: `(clips, t, h, w)` or `(clips, masks, t, h, w)` bool with equally many True in every mask. On the CPU,
            finding the indices makes no accelerator wait.
        device: of the features.
        implementation: `packed` computes the visible tokens alone, `dense` all of them and masks the convolutions'
            input, as the released ConvMAE does. Both give the same tokens.
        predicted: bool of the same shape, hidden tokens that the decoder predicts, equally many in every mask;
            `None` = all hidden.
        is_whole: nothing is hidden. Then no value of `visible` is read, and torch.export and torch.compile can trace
            the packing for any number of clips.

    Raises:
        ValueError: a wrong type or shape; the masks have different numbers of visible or predicted tokens, or one has
            none; a predicted token is visible.
    """

    def __init__(
        self,
        visible: Tensor,
        device: torch.device,
        implementation: Implementation = "packed",
        predicted: Tensor | None = None,
        is_whole: bool = False,
    ) -> None:
        if visible.ndim not in (4, 5) or visible.dtype != torch.bool:
            raise ValueError(
                f"visible is {visible.dtype} {tuple(visible.shape)}; expected bool (clips, t, h, w) or "
                "(clips, masks, t, h, w)"
            )
        *batch, t, h, w = visible.shape
        self.clips, self.batch, grid = visible.shape[0], prod(batch), (t, h, w)
        self.grid: Grid = grid
        everything = torch.arange(prod(grid), device=device).expand(self.batch, -1)
        if is_whole:
            self.keep, self.hidden = everything, everything[:, :0]
        else:
            self.keep, self.hidden = (index.to(device, non_blocking=True) for index in split_tokens(visible))
        self.predicted = self.hidden
        if predicted is not None:
            if predicted.shape != visible.shape or predicted.dtype != torch.bool:
                raise ValueError(
                    f"predicted is {predicted.dtype} {tuple(predicted.shape)}; expected bool {tuple(visible.shape)}, "
                    "as visible"
                )
            if (predicted & visible).any():
                raise ValueError("a predicted token is visible; expected hidden tokens alone")
            self.predicted = split_tokens(predicted, "predicted")[0].to(device, non_blocking=True)
        self.packed = implementation == "packed"
        # Dense only: the computed tokens that the convolutions may see, (B, N, 1, 1).
        self.shown: Tensor | None = None
        self.computed = self.keep
        if not self.packed and self.hidden.shape[1]:
            self.shown = visible.reshape(self.batch, -1, 1, 1).to(device, non_blocking=True)
            self.computed = everything

    def visible_of_computed(self, x: Tensor) -> Tensor:
        """Take the visible tokens, `(B, n, ...)`, of the computed ones, `(B, m, ...)`."""
        return x if self.shown is None else take_tokens(x, self.keep)


class Cells:
    """Cells of one stage: packed `(B, m, cells, C)` <-> dense `(B, t, H, W, C)`, hidden positions zero.

    grid: (t, H, W) of the stage; neighbours: table for the packed depthwise convolution, None where there is none.

    Args:
        packing: of the batch.
        factors: strides of the later stages.
        kernel: of the stage's depthwise convolutions; `None`: there are none.
    """

    def __init__(self, packing: Packing, factors: tuple[int, ...], kernel: Kernel | None = None) -> None:
        self.packing = packing
        self.factors = factors
        side = prod(factors)
        t, h, w = packing.grid
        self.grid: Grid = (t, h * side, w * side)
        self.neighbours = None
        if packing.packed and kernel is not None:
            # Nesting the numbers 0, 1, 2, ... of one token's cells, row by row, shows the cell at each stored place;
            # argsort inverts that to the stored place of each row and column.
            cells = torch.arange(side * side, device=packing.keep.device).view(1, 1, side, side, 1)
            order = nest(cells, factors).flatten().argsort().view(side, side)
            self.neighbours = find_neighbours(packing.keep, packing.grid, order, kernel)

    @cached_property
    def rows(self) -> Tensor:
        """`(B * n * cells)`: row of every visible cell in the dense grid flattened to `(B * t * H * W, C)`."""
        device, size = self.packing.keep.device, prod(self.grid)
        table = torch.arange(size, device=device).view(1, *self.grid, 1)
        within = nest(table, self.factors).squeeze(0).squeeze(-1)[self.packing.keep]  # (B, n, cells)
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


def nest(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Grid `(B, t, H, W, C)` -> nested cells `(B, N, cells, C)`; `factors` are the strides of the later stages.

    Rows and columns of a token are split into one digit a stage, outermost first, and the digits of a cell stored in
    turn. With factors (2, 2), row 1 = digits 0 1 and column 2 = digits 1 0 make 0 1 | 1 0: stored at 0b0110 = 6.
    """
    batch, t, height, width, channels = x.shape
    side, k = prod(factors), len(factors)
    h, w = height // side, width // side
    outermost_first = factors[::-1]
    # Axes: 0 B, 1 t, 2 h, the k digits of the row, 3 + k w, the k digits of the column, 4 + 2 k C. With k = 2:
    # (B, t, h, r1, r0, w, c1, c0, C) -> (B, t, h, w, r1, c1, r0, c0, C).
    x = x.reshape(batch, t, h, *outermost_first, w, *outermost_first, channels)
    rows, columns = range(3, 3 + k), range(4 + k, 4 + 2 * k)
    digits = [axis for pair in zip(rows, columns) for axis in pair]
    return x.permute(0, 1, 2, 3 + k, *digits, 4 + 2 * k).reshape(batch, t * h * w, side * side, channels)


def unnest(x: Tensor, factors: tuple[int, ...], grid: Grid) -> Tensor:
    """Nested cells `(B, N, cells, C)` -> grid `(B, t, H, W, C)`: the inverse of `nest`."""
    batch, channels = x.shape[0], x.shape[-1]
    side, k = prod(factors), len(factors)
    t, h, w = grid[0], grid[1] // side, grid[2] // side
    # With k = 2: (B, t, h, w, r1, c1, r0, c0, C) -> (B, t, h, r1, r0, w, c1, c0, C).
    x = x.reshape(batch, t, h, w, *(f for factor in factors[::-1] for f in (factor, factor)), channels)
    rows, columns = range(4, 4 + 2 * k, 2), range(5, 4 + 2 * k, 2)
    return x.permute(0, 1, 2, *rows, 3, *columns, 4 + 2 * k).reshape(batch, *grid, channels)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Take the tokens at `index (B, k)` of `x (B, N, ...)`; return `(B, k, ...)`."""
    start = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + start).flatten()).view(*index.shape, *x.shape[2:])


def take_tokens_of_clips(x: Tensor, index: Tensor) -> Tensor:
    """Take the tokens at `index (B, k)` of `x (clips, N, ...)`, shared by a clip's masks; return `(B, k, ...)`."""
    return x[_clip_of(index, x.shape[0]), index]


def take_patches(clips: Tensor, tubelet: int, side: int, index: Tensor) -> Tensor:
    """Gather the pixels of the tokens at `index`, before any arithmetic.

    Args:
        clips: `(clips, C, T, H, W)`.
        tubelet: frames in a token.
        side: pixels along a token's side, P.
        index: `(B, k)`, the masks of a clip one after the other.

    Returns:
        `(B, k, tubelet, P, P, C)`.
    """
    patches = rearrange(clips, "b c (t u) (h p) (w q) -> b t h w u p q c", u=tubelet, p=side, q=side)  # a view
    count, _, h, w = patches.shape[:4]
    return patches[_clip_of(index, count), index // (h * w), index // w % h, index % w]


def _clip_of(index: Tensor, clips: int) -> Tensor:
    """Return the clip of each mask of `index (B, k)`, `(B, 1)`."""
    masks = index.shape[0]  # len() would make torch.export take it for a constant
    return torch.arange(masks, device=index.device)[:, None] // (masks // clips)


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


def split_tokens(mask: Tensor, name: str = "visible") -> tuple[Tensor, Tensor]:
    """Return the indices where a mask is True, `(B, n)`, and where it is False, `(B, N - n)`, ascending.

    Args:
        mask: `(clips, t, h, w)` or `(clips, masks, t, h, w)` bool.
        name: stands in the message of an error.

    Raises:
        ValueError: the masks have different counts of True, or none.
    """
    mask = mask.flatten(-3).flatten(0, -2)
    counts = mask.sum(1).tolist()
    if min(counts) != max(counts) or counts[0] == 0:
        raise ValueError(
            f"the clips have {counts} {name} tokens; expected the same number, at least one, for every clip of a batch"
        )
    order = torch.sort((~mask).to(torch.uint8), dim=1, stable=True).indices
    return order[:, : counts[0]], order[:, counts[0] :]
