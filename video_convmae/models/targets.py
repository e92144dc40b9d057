"""Targets beside pixels: the heads that predict a teacher's features, and the distance from them.

Letters: B clips, times masks where they have several; n visible and k predicted tokens; D width of a token, F of a
feature.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import AttentionBlock, multiply_adds
from .sizes import AutoencoderConfig, FeatureLoss, FeatureTarget


class VisibleHead(nn.Module):
    """Predicts features at visible tokens from the encoder's tokens, or from a convolutional stage's cells in them.

    The encoder's tokens have been normalised; cells have not, and are normalised here.

    Raises:
        ValueError: the model has no such convolutional stage.
    """

    def __init__(self, config: AutoencoderConfig, target: FeatureTarget) -> None:
        super().__init__()
        config.check_layer(target.name, target.layer)
        stage = len(config.widths) - 1 if target.layer is None else target.layer - 1
        cells = prod(config.later_strides[stage]) ** 2
        self.norm = nn.Identity() if target.layer is None else nn.LayerNorm(config.widths[stage], eps=1e-6)
        self.prediction = nn.Linear(cells * config.widths[stage], target.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, n, D)` or `(B, n, cells, C)` to `(B, n, F)`."""
        return self.prediction(self.norm(x).flatten(2))

    def multiply_adds(self, num_visible: int, num_predicted: int) -> int:
        """Return the multiply-adds of one clip."""
        return multiply_adds(self, num_visible)


class HiddenHead(nn.Module):
    """Predicts features at hidden tokens: a last decoder block, norm and head of its own, on the shared trunk."""

    def __init__(self, config: AutoencoderConfig, target: FeatureTarget) -> None:
        super().__init__()
        width, _, heads = config.decoder
        self.block = AttentionBlock(width, heads, config.decoder_mlp_ratio)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.prediction = nn.Linear(width, target.width)

    def forward(self, x: Tensor, num_visible: int) -> Tensor:
        """Map the decoder's trunk `(B, n + k, width)`, of which the first n are visible, to `(B, k, F)`."""
        return self.prediction(self.norm(self.block(x)[:, num_visible:]))

    def multiply_adds(self, num_visible: int, num_predicted: int) -> int:
        """Return the multiply-adds of one clip."""
        return multiply_adds(self.block, num_visible + num_predicted) + multiply_adds(self.prediction, num_predicted)


def feature_loss(prediction: Tensor, features: Tensor, loss: FeatureLoss) -> Tensor:
    """Return the mean distance of predictions `(B, k, F)` from a teacher's features, a scalar.

    The features are layer-normalised without weights, so that no teacher's scale or few large channels (CLIP's, for
    one) decide the loss. ConvMAE-v2's own form was never published: both are ours.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)  # float32 at least, under autocast too
    prediction, features = prediction.to(dtype), features.to(dtype)
    if loss == "cosine":
        return 1 - F.cosine_similarity(prediction, features - features.mean(dim=-1, keepdim=True), dim=-1).mean()
    return F.smooth_l1_loss(prediction, F.layer_norm(features, features.shape[-1:]))
