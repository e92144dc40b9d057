"""Pooling: what the encoder makes of a clip -> one vector, for the heads of classifiers and probes.

Letters: B clips; t h w the token grid, N = t*h*w; D width of a token; C channels of a convolutional stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sizes import EncoderConfig, Pool


def pooled_width(config: EncoderConfig, pool: Pool) -> int:
    """Return the length of a pooled vector."""
    *stages, width = config.widths
    return width if pool == "mean" else width + 2 * sum(stages or [width])


def pool_features(tokens: Tensor, pyramid: Sequence[Tensor], pool: Pool, frames: int) -> Tensor:
    """Pool the features of whole clips.

    `motion` puts beside the mean over tokens, for each convolutional stage, how much its output changes: the absolute
    difference of neighbours in time, averaged over time and over the cells of a token; of that the mean and, value by
    value, the maximum over the places. (Of a plain ViT, the change of the tokens.) The mean over tokens hardly depends
    on what moves. The maximum does not fade where little of the picture moves. The stages tell motion apart better than
    the tokens do, whose own positions change with time (docs/results.md).

    Args:
        tokens: `(B, N, D)`, all tokens of the grid in its order.
        pyramid: the convolutional stages' outputs, `(B, N, cells, C)` each.
        pool: the kind.
        frames: t; 2 or more for `motion`.

    Returns:
        `(B, pooled_width)`.
    """
    pooled = [tokens.mean(dim=1)]
    if pool == "motion":
        for level in pyramid or [tokens[:, :, None]]:
            change = level.unflatten(1, (frames, -1)).diff(dim=1).abs().mean(dim=(1, 3))
            pooled += [change.mean(dim=1), change.amax(dim=1)]
    return torch.cat(pooled, dim=1)
