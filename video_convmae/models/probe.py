"""Probes: a frozen pretrained encoder and a head on its features.

Letters: B clips, N tokens, n visible tokens of a clip, D width of a token, R stored records.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from .autoencoder import FusedEncoder
from .classifier import check_num_classes, init_head
from .encoder import init_as_convolution, init_as_transformer
from .sizes import ClassifierConfig, ProbeKind, build_options


class Probe(FusedEncoder):
    """Frozen pretrained encoder, fusion and norm, and a head on their features.

    The features are an autoencoder's, after fusion and the norm over tokens; `load_weights` fills those parts by their
    names. Only the head learns. The rest has no gradients, keeps no activations, and stays in evaluation mode.

    Two traps of the released ConvMAE probe are not here. Its documented command lacks --global_pool and so reads the
    top-left token alone; with it, the trained norm is dropped and an untrained, frozen `fc_norm` is read.

    Args:
        config: options of encoder and head, `config.probe` names the head. Positions that were learnt need
            `learnable_positions`; they are frozen too.
        num_classes: number of classes.
    """

    def __init__(self, config: ClassifierConfig, num_classes: int) -> None:
        check_num_classes(num_classes)
        super().__init__(config, config.msd)
        self.requires_grad_(False)
        width = self.encoder.width
        self.head: LinearHead | AttentiveHead | KNNHead
        if config.probe == "linear":
            self.head = LinearHead(width, num_classes, config.head_init_std)
        elif config.probe == "attentive":
            self.head = AttentiveHead(width, config.heads, num_classes, config.head_init_std)
        elif config.probe == "knn":
            self.head = KNNHead(width, num_classes)
        else:
            raise ValueError(f"probe is {config.probe!r}; expected linear, attentive or knn")
        self.init_weights()
        self.train()

    def init_weights(self) -> None:
        """Initialise the frozen part as an autoencoder's, and the head."""
        self.encoder.init_weights()
        self.norm.reset_parameters()
        if self.fusion is not None:
            init_as_convolution(self.fusion)
        self.head.init_weights()

    def train(self, mode: bool = True) -> Probe:
        """Switch the head alone: drop path stays off in the frozen part."""
        super().train(False)
        self.training = mode
        self.head.train(mode)
        return self

    @torch.no_grad()
    def encode(self, clips: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the autoencoder's features `(B, n, D)`, without gradients; `visible` None = all visible."""
        return super().encode(clips, visible)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` -> logits `(B, num_classes)`."""
        return self.head(self.encode(clips))


class LinearHead(nn.Module):
    """The mean over tokens, standardised over the batch, then Linear (the probe of MAE and ConvMAE).

    BatchNorm without affine parameters puts features of any scale under one learning rate. Training needs two clips a
    batch. Several processes share its statistics (engine/distributed.py).
    """

    def __init__(self, width: int, num_classes: int, head_init_std: float | None) -> None:
        super().__init__()
        self.head_init_std = head_init_std
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.linear = nn.Linear(width, num_classes)

    def init_weights(self) -> None:
        """Initialise the Linear with deviation `head_init_std`; reset the running statistics."""
        self.norm.reset_running_stats()
        init_head(self.linear, self.head_init_std)

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

    def __init__(self, width: int, heads: int, num_classes: int, head_init_std: float | None) -> None:
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
        """Initialise as an attention block; the query with deviation 0.02, the last Linear with `head_init_std`."""
        init_as_transformer(self)
        nn.init.normal_(self.query, std=0.02)
        init_head(self.linear, self.head_init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` -> `(B, num_classes)`."""
        x = self.query + self._attention(self.norm1(tokens))
        x = x + self.mlp(self.norm2(x))
        return self.linear(self.norm(x))

    def _attention(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` -> the query's output, `(B, D)`."""
        batch, count, width = tokens.shape
        q = self.q(self.query).view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        k, v = self.kv(tokens).view(batch, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).reshape(batch, width)


class KNNHead(nn.Module):
    """Nearest neighbours: each votes for its class with exp(cosine / temperature).

    A feature is the mean over tokens, scaled to length 1. Nothing is trained: `fit` stores the features of a labelled
    list. 20 neighbours and a temperature of 0.07 are those of the probes of DINO (Caron et al., 2021).
    """

    def __init__(self, width: int, num_classes: int, neighbours: int = 20, temperature: float = 0.07) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.neighbours = neighbours
        self.temperature = temperature
        self.register_buffer("features", torch.zeros(0, width))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))

    def init_weights(self) -> None:
        """Forget the stored features."""
        self.fit(self.features[:0], self.labels[:0])

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, N, D)` -> features `(B, D)` of length 1."""
        return F.normalize(tokens.float().mean(dim=1), dim=1)

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Store labelled features, `(R, D)` of length 1 and `(R,)`, in place of earlier ones."""
        self.features, self.labels = features, labels

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` -> `(B, num_classes)`, whose softmax is each class's share of the votes."""
        if not len(self.features):
            raise RuntimeError("no features are stored yet; `video-convmae finetune` with model.probe knn stores them")
        with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 cannot separate near neighbours
            cosines = self.embed(tokens) @ self.features.T
            nearest = cosines.topk(min(self.neighbours, len(self.features)), dim=1)
            votes = torch.zeros(len(tokens), self.num_classes, device=tokens.device)
            votes.scatter_add_(1, self.labels[nearest.indices], (nearest.values / self.temperature).exp())
            return votes.log()  # minus infinity where no neighbour is of the class

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Resize the buffers to the checkpoint's."""
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
    """Create a probe of a named size; arguments as in `create_autoencoder`, overrides as `ClassifierConfig`.

    Positions are fixed, as in an autoencoder. kind: the head.
    """
    overrides |= {"msd": msd, "probe": kind, "head_init_std": head_init_std}
    config = build_options(ClassifierConfig, size=size, num_frames=num_frames, image_size=image_size, **overrides)
    return Probe(config, num_classes)
