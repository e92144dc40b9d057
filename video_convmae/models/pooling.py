"""Pooling: the tokens of a clip -> one vector, for the heads of classifiers and probes.

Letters: B clips; t h w the token grid, N = t*h*w; D width of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sizes import Pool

POOLED_PARTS: dict[Pool, int] = {"mean": 1, "motion": 3}
"""Width of a pooled vector over that of a token."""


def pool_tokens(tokens: Tensor, pool: Pool, frames: int) -> Tensor:
    """Pool all tokens of each clip.

    `motion` puts three vectors side by side: the mean over tokens, and of the change at each place (the mean over time
    of the absolute difference of tokens that are neighbours in time) the mean and, value by value, the maximum over the
    places. The mean over tokens hardly depends on what moves; the maximum does not shrink with the share of the picture
    that moves.

    Args:
        tokens: `(B, N, D)`, all tokens of the grid in its order.
        pool: the kind.
        frames: t; 2 or more for `motion`.

    Returns:
        `(B, D)`, or `(B, 3 D)` of `motion`.
    """
    mean = tokens.mean(dim=1)
    if pool == "mean":
        return mean
    change = tokens.unflatten(1, (frames, -1)).diff(dim=1).abs().mean(dim=1)
    return torch.cat([mean, change.mean(dim=1), change.amax(dim=1)], dim=1)
