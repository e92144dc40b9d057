"""The probe: a head (linear, attentive, k nearest neighbours, logistic regression) on a frozen pretrained encoder.

Letters: B clips, C T H W their channels, frames and pixels; N tokens, n visible ones, D width of a token; R stored
features.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae.errors import UserError

from .autoencoder import FusedEncoder
from .classifier import PretrainedHead, check_num_classes, init_head
from .encoder import Features, init_as_convolution
from .pooling import AttentivePool, pool_features, pooled_width
from .sizes import ClassifierConfig, Pool, ProbeKind, apply_overrides


class Probe(FusedEncoder, PretrainedHead):
    """A head on pretrained features: encoder, fusion and norm stay frozen, only the head is trained.

    The features are an autoencoder's, after fusion and the norm over tokens; `load_weights` fills those parts by their
    names. The frozen part has no gradients, keeps no activations, and stays in evaluation mode.

    Two traps of the released ConvMAE probe are not here. Its documented command lacks --global_pool and so reads the
    top-left token alone; with it, the trained norm is dropped and an untrained, frozen `fc_norm` is read.

    Args:
        config: encoder, `probe` (the head's kind), `msd` as in pretraining, and `head_init_std` of the head's last
            Linear. Positions that were learnt need `learnable_positions`; they are frozen too.
        num_classes: number of classes.
        heads: trained side by side, equal at the start (a sweep); 0: one alone.

    Raises:
        ValueError: fewer than one class, or the options of a classifier.
    """

    architecture = "Probe"

    def __init__(self, config: ClassifierConfig, num_classes: int, heads: int = 0) -> None:
        check_num_classes(num_classes)
        super().__init__(config, config.msd)
        self.num_classes = num_classes
        self.may_lack_fusion = self.fusion is None and len(config.widths) > 1  # its pretraining is another run's
        self.requires_grad_(False)
        width, pooled = self.encoder.width, pooled_width(config, config.pool)
        pool, frames = config.pool, config.grid[0]
        self.head: LinearHead | AttentiveHead | KNNHead | LogisticHead | Heads
        if config.probe == "linear":
            self.head = LinearHead(pooled, num_classes, config.head_init_std, pool, frames)
        elif config.probe == "attentive":
            reading = config.pool_heads or config.heads
            self.head = AttentiveHead(width, reading, num_classes, config.head_init_std, config.pool_depth)
        elif config.probe == "knn":
            self.head = KNNHead(pooled, num_classes, pool=pool, frames=frames)
        elif config.probe == "logistic":
            self.head = LogisticHead(pooled, num_classes, config.head_init_std, pool, frames)
        else:
            raise ValueError(
                f"probe is none; expected {', '.join(get_args(ProbeKind))} in a Probe, or build a Classifier"
            )
        self.head_count = heads
        if heads:
            self.head = Heads(self.head, heads)
        self.init_weights()
        self.train()

    def init_weights(self) -> None:
        """Initialise the frozen part as an autoencoder's, to be loaded over, and the head."""
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
        """Return the autoencoder's features `(B, n, D)`, without gradients; `None` = all visible."""
        return super().encode(clips, visible)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips `(B, C, T, H, W)` to logits `(B, num_classes)`; of several heads `(heads, B, num_classes)`."""
        features = self.features(clips)
        return self.head(features.tokens, features.pyramid)

    @torch.no_grad()
    def features(self, clips: Tensor) -> Features:
        """Return what the head reads, without gradients: the stages' outputs and the tokens of `encode`."""
        return super().features(clips)


class Heads(nn.ModuleList):
    """Heads side by side on the same features; they share nothing but their initial weights."""

    def __init__(self, head: nn.Module, count: int) -> None:
        super().__init__([head, *(deepcopy(head) for _ in range(count - 1))])

    def init_weights(self) -> None:
        """Initialise the first, and the others as the first."""
        first = cast(LinearHead | AttentiveHead, self[0])
        first.init_weights()
        for other in list(self)[1:]:
            other.load_state_dict(first.state_dict())

    def forward(self, tokens: Tensor, pyramid: Sequence[Tensor] = ()) -> Tensor:
        """`(B, N, D)` -> `(heads, B, num_classes)`."""
        return torch.stack([head(tokens, pyramid) for head in self])


class LinearHead(nn.Module):
    """The tokens pooled, standardised over the batch, then Linear (of their mean: the probe of MAE and ConvMAE).

    BatchNorm without affine parameters puts features of any scale under one learning rate. Training needs two clips a
    batch. Several processes share its statistics (engine/parallel.py).
    """

    def __init__(
        self, width: int, num_classes: int, head_init_std: float | None, pool: Pool = "mean", frames: int = 1
    ) -> None:
        super().__init__()
        self.head_init_std = head_init_std
        self.pool, self.frames = pool, frames
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.linear = nn.Linear(width, num_classes)

    def init_weights(self) -> None:
        """Initialise the Linear, normal with deviation `head_init_std`, and reset the running statistics."""
        self.norm.reset_running_stats()
        init_head(self.linear, self.head_init_std)

    def forward(self, tokens: Tensor, pyramid: Sequence[Tensor] = ()) -> Tensor:
        """`(B, N, D)` -> `(B, num_classes)`."""
        return self.linear(self.norm(pool_features(tokens, pyramid, self.pool, self.frames)))


class LogisticHead(LinearHead):
    """A LinearHead that is fitted at once, by logistic regression with an L2 penalty on the standardised features.

    For few labels: nothing is to be tuned. The penalty is a prior on standardised features, which more records
    outweigh; choosing it by cross-validation on 80 videos was worse (docs/results.md).
    """

    STRENGTH = 1e-2  # inverse of the penalty, scikit-learn's C

    @property
    def feature_width(self) -> int:
        """Length of a feature."""
        return self.linear.in_features

    def embed(self, tokens: Tensor, pyramid: Sequence[Tensor] = ()) -> Tensor:
        """Return the pooled features `(B, K)` of tokens `(B, N, D)` and the convolutional stages' outputs."""
        return pool_features(tokens, pyramid, self.pool, self.frames).float()

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Fit to labelled features, `(R, K)` and `(R,)`. A class without a record is never answered.

        Raises:
            ValueError: the records have one class.
        """
        from sklearn.linear_model import LogisticRegression  # a second of imports: only where it is fitted

        values, known = features.double().cpu().numpy(), labels.cpu().numpy()
        classes = np.unique(known)
        if len(classes) < 2:
            raise UserError(f"all {len(known)} records that could be read have one class; expected two or more")
        mean, variance = values.mean(0), values.var(0)
        values = (values - mean) / np.sqrt(variance + self.norm.eps)
        model = LogisticRegression(C=self.STRENGTH, max_iter=1000).fit(values, known)
        weight, bias = model.coef_, model.intercept_
        if len(classes) == 2:  # one row, the log of the second's odds
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        with torch.no_grad():
            assert self.norm.running_mean is not None
            assert self.norm.running_var is not None
            self.norm.running_mean.copy_(torch.from_numpy(mean))
            self.norm.running_var.copy_(torch.from_numpy(variance))
            self.linear.weight.zero_()
            self.linear.bias.fill_(-1e4)
            self.linear.weight[classes] = torch.from_numpy(weight).to(self.linear.weight)
            self.linear.bias[classes] = torch.from_numpy(bias).to(self.linear.bias)


class AttentiveHead(AttentivePool):
    """What a learnt query reads (`AttentivePool`), then LayerNorm and Linear.

    The LayerNorm before the Linear is ours, not V-JEPA's: pre-norm blocks are read through a norm everywhere else here.
    """

    def __init__(self, width: int, heads: int, num_classes: int, head_init_std: float | None, depth: int = 1) -> None:
        super().__init__(width, heads, depth)
        self.head_init_std = head_init_std
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, num_classes)

    def init_weights(self) -> None:
        """Initialise the pooling, and the last Linear with `head_init_std`."""
        super().init_weights()
        init_head(self.linear, self.head_init_std)

    def forward(self, tokens: Tensor, pyramid: Sequence[Tensor] = ()) -> Tensor:
        """`(B, N, D)` -> `(B, num_classes)`."""
        return self.linear(self.norm(self.read(tokens)))


class KNNHead(nn.Module):
    """k nearest neighbours: each of the nearest stored features votes for its class, by exp(cosine / temperature).

    A feature is the pooled tokens, scaled to length 1. Nothing is trained: `fit` stores the features of a labelled
    list. 20 neighbours and a temperature of 0.07 are those of the probes of DINO (Caron et al., 2021).
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        neighbours: int = 20,
        temperature: float = 0.07,
        pool: Pool = "mean",
        frames: int = 1,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pool, self.frames = pool, frames
        self.neighbours = neighbours
        self.temperature = temperature
        self.register_buffer("features", torch.zeros(0, width))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))

    def init_weights(self) -> None:
        """Remove the stored features."""
        self.fit(self.features[:0], self.labels[:0])

    @property
    def feature_width(self) -> int:
        """Length of a feature."""
        return self.features.shape[1]

    def embed(self, tokens: Tensor, pyramid: Sequence[Tensor] = ()) -> Tensor:
        """Return the features `(B, K)`, of length 1, of tokens `(B, N, D)` and the convolutional stages' outputs."""
        levels = [level.float() for level in pyramid]
        return F.normalize(pool_features(tokens.float(), levels, self.pool, self.frames), dim=1)

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Store labelled features, `(R, K)` and `(R,)`, scaled to length 1, in place of those before."""
        self.features, self.labels = F.normalize(features, dim=1), labels

    def forward(self, tokens: Tensor, pyramid: Sequence[Tensor] = ()) -> Tensor:
        """`(B, N, D)` -> `(B, num_classes)`; their softmax is each class's share of the votes.

        Raises:
            RuntimeError: no features are stored.
        """
        if not len(self.features):
            raise RuntimeError("no features are stored yet: call fit(), or finetune with model.probe knn")
        with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 cannot tell near neighbours apart
            cosines = self.embed(tokens, pyramid) @ self.features.float().T
            nearest = cosines.topk(min(self.neighbours, len(self.features)), dim=1)
            count = tokens.shape[0]  # len() would fix the batch of an exported file
            votes = torch.zeros(count, self.num_classes, device=tokens.device)
            votes.scatter_add_(1, self.labels[nearest.indices], (nearest.values / self.temperature).exp())
            return votes.log()  # minus infinity where no neighbour is of the class

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Resize the buffers to the checkpoint's, then load."""
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
    """Build a probe of a named size; arguments as in `create_autoencoder`, overrides any other field of
    `ClassifierConfig`.

    Positions are fixed, as in an autoencoder. `kind` is the head's (linear, attentive, knn, logistic); see `Probe`.
    """
    given = {"size": size, "num_frames": num_frames, "image_size": image_size, "msd": msd, "from_weights": False}
    head = {"probe": kind, "head_init_std": head_init_std, "head_dropout": 0.0}
    return Probe(apply_overrides(ClassifierConfig, overrides, **given, **head), num_classes)
