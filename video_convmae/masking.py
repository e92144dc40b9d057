"""Masks: the tokens of one sample that the encoder sees, and those that the decoder predicts.

Letters: t h w the token grid, N = t*h*w; n visible tokens of a mask.

Every mask function maps a token grid `(t, h, w)` and a ratio to `visible`, a boolean tensor of that shape, True = the
encoder sees the token. Masks are drawn for one sample, with that sample's generator; the loader stacks them. The number
of visible tokens depends on the grid and the ratio alone, so that every sample of a batch has the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Grid = tuple[int, int, int]
Mask = Callable[[Grid, float, torch.Generator | None], Tensor]


def tube(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw one spatial mask for all frames (VideoMAE): a hidden patch cannot be copied from a neighbour in time.

    Hides `int(ratio * h * w)` positions of each frame: 176 of 196 at 0.9, so 20 stay visible.
    """
    t, h, w = _check(grid, ratio)
    return _random_visible(h * w, ratio, generator).view(1, h, w).expand(t, h, w).clone()


def random(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw every token for itself (MAE; for video, masked autoencoders as spatiotemporal learners)."""
    t, h, w = _check(grid, ratio)
    return _random_visible(t * h * w, ratio, generator).view(t, h, w)


def frame(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Hide whole frames, drawn at random.

    If the visible tokens do not fill whole frames, one frame is visible in part: 157 tokens of 8 x 196 at 0.9 lie in
    one frame, 49 of 4 x 49 at 0.75 fill exactly one.
    """
    t, h, w = _check(grid, ratio)
    visible = torch.zeros(t * h * w, dtype=torch.bool)
    visible[_frame_by_frame(grid, generator)[: visible.numel() - int(ratio * visible.numel())]] = True
    return visible.view(t, h, w)


def block(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Hide cuboids in time and space, drawn until enough tokens are hidden (the last one is cut to fit).

    A cuboid spans an eighth to a half of the tokens that are to be hidden, with the aspect ratios of BEiT's blocks
    (0.3 to 1 / 0.3), over at least half of the frames.
    """
    t, h, w = _check(grid, ratio)
    target = int(ratio * (t * h * w))
    visible = torch.ones(t, h, w, dtype=torch.bool)
    # One cuboid from six numbers in 0 .. 1. All at 0.5, in a grid of 8 x 14 x 14 with 784 to hide: 6 of the 8 frames,
    # an area of 784 * 2.5 / 8 / 6 = 41 tokens of a frame, as high as wide, so 6 x 6; it starts at (1, 4, 4) and hides
    # 216 tokens. A cuboid may overlap those before it: only its still visible tokens count.
    while (missing := target - int((~visible).sum())) > 0:
        share, log_aspect, depth, *place = torch.rand(6, generator=generator).tolist()
        frames = math.ceil(t * (1 + depth) / 2)
        area = max(1.0, target * (1 + 3 * share) / 8 / frames)
        aspect = math.exp((2 * log_aspect - 1) * math.log(1 / 0.3))
        rows = min(h, max(1, round(math.sqrt(area * aspect))))
        columns = min(w, max(1, round(math.sqrt(area / aspect))))
        starts = [int(p * (size - extent + 1)) for p, size, extent in zip(place, (t, h, w), (frames, rows, columns))]
        cuboid = torch.zeros_like(visible)
        cuboid[tuple(slice(s, s + e) for s, e in zip(starts, (frames, rows, columns)))] = True
        newly = (cuboid & visible).flatten().nonzero().flatten()[:missing]  # in the order t, h, w
        visible.view(-1)[newly] = False
    return visible


def complementary(
    grid: Grid, ratio: float, count: int, generator: torch.Generator | None = None, kind: str = "random"
) -> Tensor:
    """Draw `count` masks with no visible token in common (FastConvMAE), shape `(count, t, h, w)`.

    Each hides as many tokens as one mask of its kind. Four at 0.75 cover the grid: every token is visible in exactly
    one. If `count * n < N`, the rest is hidden in all of them: of 196 tubes, nine masks at 0.9 show 20 each and 16 are
    never shown.

    Args:
        grid: (t, h, w), the token grid.
        ratio: share of the tokens that each mask hides, 0 or more and below 1.
        count: number of masks.
        generator: of the sample.
        kind: random, tube or frame.

    Raises:
        ValueError: `count` masks of that many visible tokens do not fit into the grid, or no such kind.
    """
    t, h, w = _check(grid, ratio)
    if kind == "tube":
        return complementary((1, h, w), ratio, count, generator).expand(count, t, h, w).clone()
    if kind not in ("random", "frame"):
        raise ValueError(f"complementary masks of kind {kind!r} do not exist; expected random, tube or frame")
    tokens = t * h * w
    n = tokens - int(ratio * tokens)
    if count < 1 or count * n > tokens:
        raise ValueError(
            f"{count} complementary masks of {n} visible tokens each do not fit into {tokens} tokens; "
            f"at ratio {ratio} there can be 1 to {tokens // n}"
        )
    visible = torch.zeros(count, tokens, dtype=torch.bool)
    order = torch.randperm(tokens, generator=generator) if kind == "random" else _frame_by_frame(grid, generator)
    visible.scatter_(1, order[: count * n].view(count, n), True)
    return visible.view(count, t, h, w)


def running_cell(visible: Tensor, ratio: float) -> Tensor:
    """Choose the hidden tokens to predict: in cells of 2x2 tokens, places that turn from frame to frame.

    VideoMAE V2 (Wang et al., 2023) drops the other targets, since neighbouring tokens hold much the same. Here the
    places turn clockwise, one a frame. The turn's start follows from the mask, so that over many masks every token is a
    target; and exactly `int(ratio * hidden)` are chosen, so that every clip of a batch has the same number.

    Args:
        visible: `(t, h, w)` of one sample.
        ratio: share of the hidden tokens, above 0 and up to 1.

    Returns:
        `predicted (t, h, w)` bool, no token of which is visible.

    Raises:
        ValueError: a share outside that range, or so small that nothing is predicted.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"decoder_ratio, the share of hidden tokens to predict, is {ratio}; expected 0 < share <= 1")
    hidden = ~visible
    available = int(hidden.sum())
    count = int(ratio * available)
    if count == 0:
        raise ValueError(f"a share of {ratio} of {available} hidden tokens predicts none; expected at least one")
    # The rank of the four places of a cell: with start 0, in frames 0 to 3:
    #     0 1        3 0        2 3        1 2
    #     3 2        2 1        1 0        0 3
    # Tokens are taken by rising rank: at 0.5 those of ranks 0 and 1, two neighbours of each cell.
    clockwise = torch.tensor([[0, 1], [3, 2]])
    frame, row, column = torch.meshgrid(*(torch.arange(size) for size in visible.shape), indexing="ij")
    start = visible.any(0).flatten().nonzero().sum() + visible.any(2).any(1).nonzero().sum()
    rank = (clockwise[row % 2, column % 2] - frame - start) % 4
    # If the count ends within one rank, the tokens taken are spread evenly, by multiples of the golden ratio: places
    # 0 1 2 3 4 have the fractions 0 .62 .24 .85 .47, so they are taken in the order 0 2 4 1 3.
    place = torch.arange(visible.numel(), dtype=torch.float64).view(visible.shape) + start
    spread = (place * 0.6180339887498949).frac()
    order = torch.where(hidden, rank + spread, math.inf).flatten().argsort()
    predicted = torch.zeros(visible.numel(), dtype=torch.bool)
    predicted[order[:count]] = True
    return predicted.view(visible.shape)


MASKS: dict[str, Mask] = {"tube": tube, "random": random, "frame": frame, "block": block}


def draw(
    kind: str,
    grid: Grid,
    ratio: float,
    decoder_ratio: float | None = None,
    generator: torch.Generator | None = None,
    count: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Draw the mask of one sample, or several complementary ones; with decoder masking, choose the tokens to predict.

    Args:
        kind: tube, random, frame or block (one mask alone).
        grid: (t, h, w), the token grid.
        ratio: share of the tokens that is hidden, 0 or more and below 1.
        decoder_ratio: share of the hidden tokens to predict (see `running_cell`); `None` = all.
        generator: of the sample.
        count: masks with no visible token in common (see `complementary`).

    Returns:
        `visible` and `predicted`, `(t, h, w)` bool each, of several masks `(count, t, h, w)`; `predicted` is `None`
        where all hidden tokens are predicted.

    Raises:
        ValueError: an unknown kind, an impossible grid, share or count.
    """
    if kind not in MASKS:
        raise ValueError(f"the mask is {kind!r}; expected one of {', '.join(MASKS)}")
    if count != 1:
        visible = complementary(grid, ratio, count, generator, kind)
        if decoder_ratio is None:
            return visible, None
        return visible, torch.stack([running_cell(mask, decoder_ratio) for mask in visible])
    visible = MASKS[kind](grid, ratio, generator)
    return visible, None if decoder_ratio is None else running_cell(visible, decoder_ratio)


def _check(grid: Grid, ratio: float) -> Grid:
    """Return the grid; raise a ValueError if the grid or the ratio is impossible.

    Callers hide `int(ratio * tokens)`, as every released masked autoencoder counts.
    """
    if len(grid) != 3 or any(size < 1 for size in grid):
        raise ValueError(f"the token grid is {tuple(grid)}; expected three positive sizes (t, h, w)")
    if not 0 <= ratio < 1:
        raise ValueError(f"the mask ratio is {ratio}; expected 0 <= ratio < 1")
    t, h, w = grid
    return t, h, w


def _random_visible(tokens: int, ratio: float, generator: torch.Generator | None) -> Tensor:
    visible = torch.ones(tokens, dtype=torch.bool)
    visible[torch.randperm(tokens, generator=generator)[: int(ratio * tokens)]] = False
    return visible


def _frame_by_frame(grid: Grid, generator: torch.Generator | None) -> Tensor:
    """Draw an order of the tokens `(N,)`: all of one frame, then all of the next.

    With 2 frames of 2 tokens, frames (1, 0) and within (0, 1) give 2 3 0 1; the first three are all of frame 1 and half
    of frame 0.
    """
    t, h, w = grid
    frames = torch.randperm(t, generator=generator)
    within = torch.randperm(h * w, generator=generator)
    return (frames[:, None] * (h * w) + within).flatten()
