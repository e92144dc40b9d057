"""Classes from clips: the classifier, which is finetuned whole, and the probe, which reads a frozen encoder.

Letters: B clips, N tokens, n visible tokens of a clip, D width of a token.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from .autoencoder import FusedEncoder
from .encoder import Encoder, EncoderConfig, encoder_config, init_as_convolution, init_as_transformer

ProbeKind = Literal["linear", "attentive", "knn"]


class Classifier(nn.Module):
    """The encoder with nothing hidden, the mean over tokens, LayerNorm, Linear; for finetuning.

    There is no fusion and no norm before the mean (ConvViT, VideoMAE).

    Args:
        encoder: the encoder in numbers; its positions should be learnable.
        num_classes: classes.
        head_init_std: deviation of the head's first weights. Finetuning starts from 2e-5 (ConvMAE; VideoMAE scales
            0.02 by 0.001).
        head_dropout: share of the pooled values that are dropped before the head in training (VideoMAE on small data,
            mae_st).
    """

    def __init__(
        self, encoder: EncoderConfig, num_classes: int, head_init_std: float = 0.02, head_dropout: float = 0.0
    ) -> None:
        super().__init__()
        _check_head(num_classes, head_init_std)
        if not 0 <= head_dropout < 1:
            raise ValueError(f"head_dropout is {head_dropout}; expected a share, 0 or more and less than 1")
        self.head_init_std = head_init_std
        self.encoder = Encoder(encoder)
        self.norm = nn.LayerNorm(self.encoder.width, eps=1e-6)
        self.dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(self.encoder.width, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """As the autoencoder's encoder; the head normal with deviation `head_init_std`."""
        self.encoder.init_weights()
        self.norm.reset_parameters()
        _init_head(self.head, self.head_init_std)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` -> logits `(B, num_classes)`."""
        return self.head(self.dropout(self.norm(self.encode(clips).mean(dim=1))))

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
    head_init_std: float = 0.02,
    head_dropout: float = 0.0,
    **overrides: Any,
) -> Classifier:
    """A classifier of a named size; arguments as in `create_autoencoder`, overrides any field of `EncoderConfig`.

    Positions are learnable, started from the table. `head_init_std`, `head_dropout`: see `Classifier`.
    """
    overrides = {"learnable_positions": True, **overrides}
    encoder = encoder_config(size, num_frames, image_size, **overrides)
    return Classifier(encoder, num_classes, head_init_std, head_dropout)


class Probe(FusedEncoder):
    """What a frozen encoder's features tell: pretrained encoder, fusion and norm that stay as they are, and a head.

    The features are an autoencoder's, after fusion and the norm over tokens; `load_weights` fills those parts by their
    names. Only the head learns. The rest has no gradients, keeps no activations, and stays in evaluation mode.

    Two traps of the released ConvMAE probe are not here. Its documented command lacks --global_pool and so reads the
    top-left token alone; with it, the trained norm is dropped and an untrained, frozen `fc_norm` is read.

    Args:
        encoder: the encoder in numbers. Positions that were learnt need `learnable_positions`; they are frozen too.
        num_classes: classes.
        msd: whether the fusion is there, as in pretraining.
        kind: the head, `linear`, `attentive` or `knn`.
        head_init_std: deviation of the first weights of the head's last Linear.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        num_classes: int,
        msd: bool = True,
        kind: ProbeKind = "linear",
        head_init_std: float = 0.01,
    ) -> None:
        if kind not in get_args(ProbeKind):
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(get_args(ProbeKind))}")
        _check_head(num_classes, head_init_std)
        super().__init__(encoder, msd)
        self.requires_grad_(False)
        width = self.encoder.width
        if kind == "linear":
            self.head = LinearHead(width, num_classes, head_init_std)
        elif kind == "knn":
            self.head = KNNHead(width, num_classes)
        else:
            self.head = AttentiveHead(width, encoder.heads, num_classes, head_init_std)
        self.init_weights()
        self.train()

    def init_weights(self) -> None:
        """The frozen part as an autoencoder's, to be loaded over; the head as it says."""
        self.encoder.init_weights()
        self.norm.reset_parameters()
        if self.fusion is not None:
            init_as_convolution(self.fusion)
        self.head.init_weights()

    def train(self, mode: bool = True) -> Probe:
        """Switch the head alone: in the frozen part drop path stays off."""
        super().train(False)
        self.training = mode
        self.head.train(mode)
        return self

    @torch.no_grad()
    def encode(self, clips: Tensor, visible: Tensor | None = None) -> Tensor:
        """The autoencoder's features `(B, n, D)`, without gradients; `None` = all visible."""
        return super().encode(clips, visible)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` -> logits `(B, num_classes)`."""
        return self.head(self.encode(clips))


class LinearHead(nn.Module):
    """The mean over tokens, standardised over the batch, then Linear (the probe of MAE and ConvMAE).

    BatchNorm without affine parameters puts features of any scale under one learning rate. Training needs two clips a
    batch. Several processes share its statistics (engine/distributed.py).
    """

    def __init__(self, width: int, num_classes: int, head_init_std: float) -> None:
        super().__init__()
        self.head_init_std = head_init_std
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.linear = nn.Linear(width, num_classes)

    def init_weights(self) -> None:
        """The Linear normal with deviation `head_init_std`; nothing seen by the BatchNorm."""
        self.norm.reset_running_stats()
        _init_head(self.linear, self.head_init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` -> `(B, num_classes)`."""
        return self.linear(self.norm(tokens.mean(dim=1)))


class AttentiveHead(nn.Module):
    """One learnt query reads the tokens by cross-attention, then an MLP, LayerNorm and Linear.

        x = query + attention(query, norm1(tokens))
        x = x + mlp(norm2(x))

    As V-JEPA's attentive probes: one pre-norm block, no projection behind the attention. The LayerNorm before the
    Linear is ours: it is what reads a pre-norm block everywhere else here.
    """

    def __init__(self, width: int, heads: int, num_classes: int, head_init_std: float) -> None:
        super().__init__()
        self.heads = heads
        self.head_init_std = head_init_std
        self.query = nn.Parameter(torch.zeros(width))  # a vector: it is not decayed
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, num_classes)

    def init_weights(self) -> None:
        """Xavier as an attention block; the query normal with deviation 0.02, the last Linear with `head_init_std`."""
        init_as_transformer(self)
        nn.init.normal_(self.query, std=0.02)
        _init_head(self.linear, self.head_init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` -> `(B, num_classes)`."""
        x = self.query + self._attention(self.norm1(tokens))
        x = x + self.mlp(self.norm2(x))
        return self.linear(self.norm(x))

    def _attention(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` -> what the query takes from them, `(B, D)`."""
        batch, count, width = tokens.shape
        q = self.q(self.query).view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        k, v = self.kv(tokens).view(batch, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).reshape(batch, width)


class KNNHead(nn.Module):
    """The classes of the nearest remembered features, each with a vote of exp(cosine / temperature).

    A feature is the mean over tokens, scaled to length 1. Nothing is trained: `remember` takes the features of a
    labelled list. 20 neighbours and a temperature of 0.07 are those of the probes of DINO (Caron et al., 2021).
    """

    def __init__(self, width: int, num_classes: int, neighbours: int = 20, temperature: float = 0.07) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.neighbours = neighbours
        self.temperature = temperature
        self.register_buffer("features", torch.zeros(0, width))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))

    def init_weights(self) -> None:
        """Nothing is remembered."""
        self.remember(self.features[:0], self.labels[:0])

    def describe(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, N, D)` -> features `(B, D)` of length 1."""
        return F.normalize(tokens.float().mean(dim=1), dim=1)

    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Take labelled features, `(R, D)` of length 1 and `(R,)`, in place of those before."""
        self.features, self.labels = features, labels

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` -> `(B, num_classes)`, whose softmax is each class's share of the votes."""
        if not len(self.features):
            raise RuntimeError("nothing is remembered yet; tools/finetune.py with model.probe knn does it")
        with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 cannot tell near neighbours apart
            cosines = self.describe(tokens) @ self.features.T
            nearest = cosines.topk(min(self.neighbours, len(self.features)), dim=1)
            votes = torch.zeros(len(tokens), self.num_classes, device=tokens.device)
            votes.scatter_add_(1, self.labels[nearest.indices], (nearest.values / self.temperature).exp())
            return votes.log()  # minus infinity where no neighbour is of the class

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """How many were remembered, the file says."""
        for name in ("features", "labels"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def create_probe(
    size: str,
    *,
    num_classes: int,
    num_frames: int = 16,
    image_size: int | tuple[int, int] = 224,
    msd: bool = True,
    kind: ProbeKind = "linear",
    head_init_std: float = 0.01,
    **overrides: Any,
) -> Probe:
    """A probe of a named size; arguments as in `create_autoencoder`, overrides any field of `EncoderConfig`.

    Positions are fixed, as in an autoencoder. `kind` and `head_init_std`: see `Probe`.
    """
    return Probe(encoder_config(size, num_frames, image_size, **overrides), num_classes, msd, kind, head_init_std)


def _check_head(num_classes: int, head_init_std: float) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected 1 or more")
    if not head_init_std > 0:
        raise ValueError(f"head_init_std is {head_init_std}; expected a deviation above 0")


def _init_head(linear: nn.Linear, deviation: float) -> None:
    nn.init.trunc_normal_(linear.weight, std=deviation)
    nn.init.zeros_(linear.bias)
