"""Masks: which tokens of one sample the encoder sees.

Every function maps a token grid `(t, h, w)` and a ratio to `visible`, a boolean tensor of that shape, True = the
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
    """One spatial mask, the same in every frame (VideoMAE): a hidden patch cannot be copied from a neighbour in time.

    Hides `int(ratio * h * w)` positions of each frame: 176 of 196 at 0.9, so 20 stay visible.
    """
    t, h, w = _checked(grid)
    plane = _random_visible(h * w, _hidden(h * w, ratio), generator)
    return plane.view(1, h, w).expand(t, h, w).clone()


def random(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Every token for itself (MAE; for video, masked autoencoders as spatiotemporal learners)."""
    t, h, w = _checked(grid)
    return _random_visible(t * h * w, _hidden(t * h * w, ratio), generator).view(t, h, w)


def frame(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Whole frames are hidden or visible, in random order of time.

    Where the visible tokens do not fill whole frames, one frame is visible in part: 157 tokens of 8 x 196 at 0.9 lie in
    one frame, 49 of 4 x 49 at 0.75 fill exactly one.
    """
    t, h, w = _checked(grid)
    visible = torch.zeros(t * h * w, dtype=torch.bool)
    frames = torch.randperm(t, generator=generator)
    within = torch.randperm(h * w, generator=generator)  # the order in which a partly visible frame fills
    order = (frames[:, None] * (h * w) + within).flatten()
    visible[order[: visible.numel() - _hidden(visible.numel(), ratio)]] = True
    return visible.view(t, h, w)


def block(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Hidden tokens form cuboids in time and space, drawn until enough are hidden (the last one is cut to fit).

    A cuboid spans an eighth to a half of the tokens that are to be hidden, with the aspect ratios of BEiT's blocks
    (0.3 to 1 / 0.3), over at least half of the frames.
    """
    t, h, w = _checked(grid)
    target = _hidden(t * h * w, ratio)
    visible = torch.ones(t, h, w, dtype=torch.bool)
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
        newly = (cuboid & visible).flatten().nonzero().flatten()[:missing]
        visible.view(-1)[newly] = False
    return visible


def complementary(grid: Grid, ratio: float, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` masks with no visible token in common (FastConvMAE), shape `(count, t, h, w)`.

    Four masks at 0.75 cover the grid: every token is visible in exactly one. Where `count * n < N` the rest is hidden
    in all of them.

    Raises:
        ValueError: `count` masks of that many visible tokens do not fit into the grid.
    """
    t, h, w = _checked(grid)
    tokens = t * h * w
    n = tokens - _hidden(tokens, ratio)
    if count < 1 or count * n > tokens:
        raise ValueError(
            f"{count} complementary masks of {n} visible tokens each do not fit into {tokens} tokens; "
            f"at ratio {ratio} there can be 1 to {tokens // n}"
        )
    visible = torch.zeros(count, tokens, dtype=torch.bool)
    groups = torch.randperm(tokens, generator=generator)[: count * n].view(count, n)
    visible.scatter_(1, groups, True)
    return visible.view(count, t, h, w)


def running_cell(visible: Tensor, ratio: float) -> Tensor:
    """Which hidden tokens are predicted: cells of 2x2 tokens whose chosen places turn from frame to frame.

    VideoMAE V2 (Wang et al., 2023) drops the other targets: neighbouring tokens tell much the same. Here the places
    turn clockwise, one a frame. Where the turn begins follows from the mask, so that over many masks every token is a
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
        raise ValueError(f"the share of predicted tokens is {ratio}; expected 0 < share <= 1")
    hidden = ~visible
    available = int(hidden.sum())
    count = int(ratio * available)
    if count == 0:
        raise ValueError(f"a share of {ratio} of {available} hidden tokens predicts none; expected at least one")
    clockwise = torch.tensor([[0, 1], [3, 2]])
    frame, row, column = torch.meshgrid(*(torch.arange(size) for size in visible.shape), indexing="ij")
    start = visible.any(0).flatten().nonzero().sum() + visible.any(2).any(1).nonzero().sum()
    turn = (clockwise[row % 2, column % 2] - frame - start) % 4
    # What the count cuts off among places of one turn is spread evenly, by multiples of the golden ratio.
    place = torch.arange(visible.numel(), dtype=torch.float64).view(visible.shape) + start
    spread = (place * 0.6180339887498949).frac()
    order = torch.where(hidden, turn + spread, math.inf).flatten().argsort()
    predicted = torch.zeros(visible.numel(), dtype=torch.bool)
    predicted[order[:count]] = True
    return predicted.view(visible.shape)


MASKS: dict[str, Mask] = {"tube": tube, "random": random, "frame": frame, "block": block}


def draw(
    kind: str, grid: Grid, ratio: float, decoder_ratio: float | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """Draw the mask of one sample: `visible`, and the hidden tokens to predict, both `(t, h, w)` bool.

    `predicted` is None without `decoder_ratio`: all hidden tokens are.
    """
    visible = MASKS[kind](grid, ratio, generator)
    return visible, None if decoder_ratio is None else running_cell(visible, decoder_ratio)


def _checked(grid: Grid) -> Grid:
    if len(grid) != 3 or any(size < 1 for size in grid):
        raise ValueError(f"the token grid is {tuple(grid)}; expected three positive sizes (t, h, w)")
    t, h, w = grid
    return t, h, w


def _hidden(tokens: int, ratio: float) -> int:
    """`int(ratio * tokens)`, as every released masked autoencoder counts."""
    if not 0 <= ratio < 1:
        raise ValueError(f"the mask ratio is {ratio}; expected 0 <= ratio < 1")
    return int(ratio * tokens)


def _random_visible(tokens: int, hidden: int, generator: torch.Generator | None) -> Tensor:
    visible = torch.ones(tokens, dtype=torch.bool)
    visible[torch.randperm(tokens, generator=generator)[:hidden]] = False
    return visible
