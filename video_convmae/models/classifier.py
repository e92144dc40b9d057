"""The classifier: the encoder with nothing hidden, the mean over tokens, LayerNorm, Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .encoder import Encoder, EncoderConfig, encoder_config


class Classifier(nn.Module):
    """Finetuning and probing. There is no fusion and no norm before the mean (ConvViT, VideoMAE).

    Args:
        encoder: the encoder in numbers; its positions should be learnable.
        num_classes: classes.
    """

    def __init__(self, encoder: EncoderConfig, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected 1 or more")
        self.encoder = Encoder(encoder)
        self.norm = nn.LayerNorm(self.encoder.width, eps=1e-6)
        self.head = nn.Linear(self.encoder.width, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """As the autoencoder's encoder; the head normal with deviation 0.02, cut at two deviations."""
        self.encoder.init_weights()
        self.norm.reset_parameters()
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` -> logits `(B, num_classes)`."""
        return self.head(self.norm(self.encode(clips).mean(dim=1)))

    def encode(self, clips: Tensor, visible: Tensor | None = None) -> Tensor:
        """Tokens `(B, n, D)` after the last attention block; `None` = all visible."""
        return self.encoder(clips, self.encoder.packing(clips, visible)).tokens

    def layer_scales(self, decay: float) -> dict[str, float]:
        """Every parameter's learning-rate scale under layer decay, grouped as in the released ConvMAE.

        Convolutional stages, embeddings, projection and positions are layer 0, attention block i is layer i + 1, norm
        and head are the last layer, k = attention blocks + 1; the scale is `decay ** (k - layer)`. With 11 blocks and
        0.65: 0.65 ** 12 = 0.0057 for layer 0, 0.65 for the last block, 1 for the head.
        """
        last = len(self.encoder.attention_blocks) + 1
        return {name: decay ** (last - _layer(name, last)) for name, _ in self.named_parameters()}

    def multiply_adds(self) -> dict[str, int]:
        """Forward multiply-adds of one clip, by part."""
        tokens = torch.Size(self.encoder.config.grid).numel()
        return self.encoder.multiply_adds(tokens) | {"head": self.head.weight.numel()}


def _layer(name: str, last: int) -> int:
    """The layer of a classifier's parameter, 0 .. last."""
    if not name.startswith("encoder."):
        return last
    if name.startswith("encoder.attention_blocks."):
        return int(name.split(".")[2]) + 1
    return 0


def create_classifier(
    size: str,
    *,
    num_classes: int,
    num_frames: int = 16,
    image_size: int | tuple[int, int] = 224,
    **overrides: Any,
) -> Classifier:
    """A classifier of a named size; arguments as in `create_autoencoder`, overrides any field of `EncoderConfig`.

    Positions are learnable, started from the table.
    """
    overrides = {"learnable_positions": True, **overrides}
    return Classifier(encoder_config(size, num_frames, image_size, **overrides), num_classes)
