"""Over which grid of tokens the positions of a file lie, where the file does not say it."""

from __future__ import annotations

from math import isqrt, prod

from video_convmae.masking import Grid
from video_convmae.models.sizes import EncoderConfig

from .state import POSITIONS, Weights


def find_grid(weights: Weights, config: EncoderConfig) -> tuple[Grid, bool]:
    """Return the grid of the file's positions, and whether it is assumed: neither stated nor evident from their values.

    Raises:
        ValueError: several grids, or none, are plausible.
    """
    if weights.grid is not None:
        return weights.grid, False
    name = POSITIONS[0]
    tokens = weights.tensors[name].shape[-2]
    if tokens == prod(config.grid) and weights.fixed_grids(name, "flat"):
        return config.grid, False  # the flat table is the same over any grid of as many tokens
    grids = _plausible_grids(weights, config)
    counts = {weights.frames}
    if weights.frames is None:  # a fixed table says its grid, of whatever clip it is
        squares = {tokens // side**2 for side in range(4, isqrt(tokens // 2) + 1)}
        counts = {1, *squares, *(grid[0] for grid in grids)}
    evident = {grid for count in counts for grid in weights.fixed_grids(name, frames=count)}
    if len(evident) == 1:
        return evident.pop(), False
    if weights.guessed and tokens == prod(config.grid):
        return config.grid, True  # as of this very model
    if len(grids) == 1:
        return grids[0], True
    fault = f"may be over the grid {' or '.join(map(str, grids))}" if grids else "are over no grid that is known here"
    raise ValueError(
        f"{weights.names.get(name, name)} has {tokens} tokens, which {fault}; the model's grid is {config.grid}. Set "
        "dataclasses.replace(read_weights(path), grid=...), or exclude positions (--init.exclude [positions])"
    )


def _plausible_grids(weights: Weights, config: EncoderConfig) -> list[Grid]:
    """Return grids that the file's positions, of unknown grid, may be over.

    Those are the usual one (16 frames, or one, of 224 x 224 pixels) and those with the frames or the pixels of the
    model's; of positions that fill the model's grid, that and the usual one.
    """
    name, patch, (_, h, w) = POSITIONS[0], prod(weights.strides), config.grid
    tokens = weights.tensors[name].shape[-2]
    frames = weights.frames or (1 if weights.is_image else max(1, 16 // weights.tubelet))
    usual = (frames, 224 // patch, 224 // patch)
    if tokens == prod(config.grid):
        grids = {usual, config.grid}
    else:
        counts = possible_frames(weights, name, config.grid)
        grids = {usual, *((count, h, w) for count in counts)}
        grids |= {(count, side, side) for count in counts for side in [isqrt(tokens // count)]}
    return sorted(grid for grid in grids if prod(grid) == tokens)


def possible_frames(weights: Weights, name: str, model: Grid) -> set[int]:
    """Return numbers of token frames: the stated one; else the model's, that of the model's height and width, and 1."""
    if weights.frames is not None:
        return {weights.frames}
    t, h, w = model
    return {t, weights.tensors[name].shape[-2] // (h * w), *([1] if weights.is_image else [])} - {0}
