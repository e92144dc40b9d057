"""The classifier, which is finetuned whole.

Letters: B clips, N tokens, n visible tokens of a clip, D width of a token.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, nn

from .encoder import Encoder
from .sizes import ClassifierConfig, build_options


class Classifier(nn.Module):
    """The encoder with nothing hidden, the mean over tokens, LayerNorm, Linear; for finetuning.

    There is no fusion and no norm before the mean (ConvViT, VideoMAE).

    Args:
        config: options of encoder and head; its positions are learnable by default.
        num_classes: number of classes.
    """

    def __init__(self, config: ClassifierConfig, num_classes: int) -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.config = config
        self.encoder = Encoder(config)
        self.norm = nn.LayerNorm(self.encoder.width, eps=1e-6)
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(self.encoder.width, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as the autoencoder's encoder; the head normal with deviation `head_init_std`."""
        self.encoder.init_weights()
        self.norm.reset_parameters()
        init_head(self.head, self.config.head_init_std)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` -> logits `(B, num_classes)`."""
        return self.head(self.dropout(self.norm(self.encode(clips).mean(dim=1))))

    def encode(self, clips: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return tokens `(B, n, D)` after the last attention block; `visible` None = all visible."""
        return self.encoder(clips, self.encoder.packing(clips, visible)).tokens

    def layer_scales(self, decay: float) -> dict[str, float]:
        """Return every parameter's learning-rate scale under layer decay, grouped as in the released ConvMAE.

        Convolutional stages, embeddings, projection and positions are layer 0, attention block i is layer i + 1, norm
        and head are the last layer, k = attention blocks + 1; the scale is `decay ** (k - layer)`. With 11 blocks and
        0.65: 0.65 ** 12 = 0.0057 for layer 0, 0.65 for the last block, 1 for the head.
        """
        last = len(self.encoder.attention_blocks) + 1

        def layer(name: str) -> int:
            if not name.startswith("encoder."):
                return last
            return int(name.split(".")[2]) + 1 if name.startswith("encoder.attention_blocks.") else 0

        return {name: decay ** (last - layer(name)) for name, _ in self.named_parameters()}

    def multiply_adds(self) -> dict[str, int]:
        """Count the forward multiply-adds of one clip by part."""
        return self.encoder.multiply_adds(prod(self.config.grid)) | {"head": self.head.weight.numel()}


def create_classifier(
    size: str,
    *,
    num_classes: int,
    num_frames: int = 16,
    image_size: int | tuple[int, int] = 224,
    head_init_std: float = 0.02,
    head_dropout: float = 0.0,
    **overrides: Any,
) -> Classifier:
    """Create a classifier of a named size; arguments as in `create_autoencoder`, overrides as `ClassifierConfig`.

    Positions are learnable, initialised with the table.
    """
    overrides |= {"head_init_std": head_init_std, "head_dropout": head_dropout}
    config = build_options(ClassifierConfig, size=size, num_frames=num_frames, image_size=image_size, **overrides)
    return Classifier(config, num_classes)


def check_num_classes(num_classes: int) -> None:
    """Raise a ValueError unless there is at least one class."""
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected 1 or more")


def init_head(linear: nn.Linear, deviation: float | None) -> None:
    """Initialise a classifying Linear: truncated normal weights, zero bias."""
    assert deviation is not None  # resolved by ClassifierConfig
    nn.init.trunc_normal_(linear.weight, std=deviation)
    nn.init.zeros_(linear.bias)
