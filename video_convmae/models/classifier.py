"""The classifier: the encoder with nothing hidden and a linear head, finetuned whole.

Letters: B clips, C T H W their channels, frames and pixels; n visible tokens of a clip, D width of a token.
"""

from __future__ import annotations

from dataclasses import asdict
from math import prod
from typing import Any

from torch import Tensor, nn

from video_convmae.hub import Folder, PretrainedModel

from .blocks import multiply_adds
from .encoder import Encoder, Features, encoder_layer
from .lora import add_lora
from .pooling import AttentivePool, pool_features, pooled_width
from .sizes import ClassifierConfig, apply_overrides


class PretrainedHead(PretrainedModel):
    """`save_pretrained` and `from_pretrained` of a classifier or a probe."""

    encoder: Encoder
    num_classes: int

    def _hub_folder(self) -> Folder:
        return Folder(self.architecture, {"model": asdict(self.encoder.config)}, self.num_classes)

    def _hub_tensors(self) -> dict[str, Tensor]:
        assert isinstance(self, nn.Module)
        return self.state_dict()

    @classmethod
    def _from_config(cls, found: Folder) -> Any:
        build: Any = cls  # of a configuration and the number of classes, as both subclasses are
        return build(ClassifierConfig(**found.model), found.num_classes)


class Classifier(nn.Module, PretrainedHead):
    """The encoder with nothing hidden, its tokens pooled, LayerNorm, Linear; for finetuning.

    There is no fusion and no norm before the pooling (ConvViT, VideoMAE).

    Args:
        config: encoder and head. `head_init_std`: finetuning starts from 2e-5 (ConvMAE; VideoMAE scales 0.02 by 0.001).
            `head_dropout` as in VideoMAE on small data and in mae_st.
        num_classes: number of classes.

    Raises:
        ValueError: fewer than one class, or the options of a probe.
    """

    architecture = "Classifier"

    def __init__(self, config: ClassifierConfig, num_classes: int) -> None:
        super().__init__()
        check_num_classes(num_classes)
        if config.probe is not None:
            raise ValueError(f"probe is {config.probe!r}; expected none in a Classifier: build a Probe")
        if config.of_library:
            raise ValueError(f"size is {config.size}; expected one of ours in a Classifier: build a LibraryClassifier")
        self.config, self.num_classes = config, num_classes
        self.encoder = Encoder(config)
        width = pooled_width(config, config.pool)
        self.pooling: AttentivePool | None = None
        if config.pools_attentively:
            self.pooling = AttentivePool(width, config.pool_heads or config.heads, config.pool_depth)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(width, num_classes)
        self.init_weights()
        self._freeze()

    def init_weights(self) -> None:
        """Initialise the encoder as an autoencoder's, and the head normal with deviation `head_init_std`."""
        self.encoder.init_weights()
        if self.pooling is not None:
            self.pooling.init_weights()
        self.norm.reset_parameters()
        init_head(self.head, self.config.head_init_std)

    def _freeze(self) -> None:
        """Take the gradients from the parts that `freeze` and `freeze_blocks` name; of the encoder, with LoRA."""
        encoder, config = self.encoder, self.config
        if config.lora_rank:
            encoder.requires_grad_(False)
            add_lora(encoder.attention_blocks, config.lora_rank, config.lora_alpha)
        parts: dict[str, list[nn.Module]] = {
            "embeddings": [encoder.embeddings, encoder.projection],
            "conv_stages": [encoder.conv_stages],
            "positions": [],
        }
        self._frozen = [part for name in config.freeze for part in parts[name]]
        self._frozen += list(encoder.attention_blocks)[: config.freeze_blocks]
        for part in self._frozen:
            part.requires_grad_(False)
        if "positions" in config.freeze:
            encoder.positions.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """Switch the model; in frozen parts drop path stays off."""
        super().train(mode)
        for part in getattr(self, "_frozen", ()):
            part.train(False)
        return self

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips `(B, C, T, H, W)` to logits `(B, num_classes)`."""
        return self.head(self.dropout(self.norm(self.pool(self.features(clips)))))

    def features(self, clips: Tensor) -> Features:
        """Return the stages' outputs and the tokens of clips `(B, C, T, H, W)`."""
        return self.encoder(clips, self.encoder.packing(clips, None))

    def pool(self, features: Features) -> Tensor:
        """Return what the norm before the head reads, `(B, K)`."""
        if self.pooling is not None:
            return self.pooling(features.tokens)
        return pool_features(features.tokens, features.pyramid, self.config.pool, self.config.grid[0])

    def encode(self, clips: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return tokens `(B, n, D)` after the last attention block; `None` = all visible."""
        return self.encoder(clips, self.encoder.packing(clips, visible)).tokens

    def layer_scales(self, decay: float) -> dict[str, float]:
        """Return every parameter's learning-rate scale under layer decay, grouped as in the released ConvMAE.

        Convolutional stages, embeddings, projection and positions are layer 0, attention block i is layer i + 1, norm
        and head are the last layer, k = attention blocks + 1; the scale is `decay ** (k - layer)`. With 11 blocks and
        0.65: 0.65 ** 12 = 0.0057 for layer 0, 0.65 for the last block, 1 for the head.
        """
        last = len(self.encoder.attention_blocks) + 1
        return {name: decay ** (last - _layer(name, last)) for name, _ in self.named_parameters()}

    def multiply_adds(self) -> dict[str, int]:
        """Return the forward multiply-adds of one clip, by part."""
        tokens = prod(self.encoder.config.grid)
        pooling = {} if self.pooling is None else {"pooling": self.pooling.multiply_adds(tokens)}
        return self.encoder.multiply_adds(tokens) | pooling | {"head": multiply_adds(self.head, 1)}


def _layer(name: str, last: int) -> int:
    """Return the layer of a classifier's parameter, 0 .. last."""
    return encoder_layer(name.removeprefix("encoder.")) if name.startswith("encoder.") else last


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
    """Build a classifier of a named size; arguments as in `create_autoencoder`, overrides any other field of
    `ClassifierConfig`.

    Positions are learnable, started from the table. `head_init_std`: 0.02 here; a finetuning run begins with 2e-5.
    """
    given = {"size": size, "num_frames": num_frames, "image_size": image_size, "probe": None, "msd": True}
    given["from_weights"] = False
    head = {"head_init_std": head_init_std, "head_dropout": head_dropout}
    return Classifier(apply_overrides(ClassifierConfig, overrides, **given, **head), num_classes)


def check_num_classes(num_classes: int) -> None:
    """Raise a ValueError unless there is a class."""
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected 1 or more")


def init_head(linear: nn.Linear, std: float | None) -> None:
    """Initialise the last Linear of a head: truncated normal with deviation `std` (resolved by the config), no bias."""
    assert std is not None
    nn.init.trunc_normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
