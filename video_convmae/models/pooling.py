"""Pooling: what the encoder makes of a clip -> one vector, for the heads of classifiers and probes, and for features.

Letters: B clips; t h w the token grid, N = t*h*w; D width of a token; C channels of a convolutional stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from .blocks import AttentionBlock, multiply_adds
from .encoder import init_as_transformer
from .sizes import EncoderConfig, Pool


def pooled_width(config: EncoderConfig, pool: Pool) -> int:
    """Return the length of a pooled vector."""
    *stages, width = config.widths
    widths: dict[Pool, int] = {
        "mean": width,
        "difference": 2 * width,
        "motion": width + 2 * sum(stages or [width]),
        "frames": config.grid[0] * width,
        "attentive": width,
    }
    return widths[pool]


def pool_features(tokens: Tensor, pyramid: Sequence[Tensor], pool: Pool, frames: int) -> Tensor:
    """Pool the features of whole clips, without parameters.

    - `mean`: over all tokens. It hardly depends on what moves.
    - `difference`: the mean and, beside it, the mean absolute difference of tokens that are neighbours in time.
    - `frames`: the mean over the tokens of each time, one after the other.
    - `motion`: the mean and, for each convolutional stage, how much its output changes: the absolute difference of
      neighbours in time, averaged over time and over the cells of a token; of that the mean and, value by value, the
      maximum over the places. (Of a plain ViT, the change of the tokens.) The maximum does not fade where little of the
      picture moves. The stages tell motion apart better than the tokens do, whose own positions change with time
      (docs/results.md).

    Args:
        tokens: `(B, N, D)`, all tokens of the grid in its order.
        pyramid: the convolutional stages' outputs, `(B, N, cells, C)` each; only `motion` reads them.
        pool: the kind; not `attentive`, which is an `AttentivePool`.
        frames: t; 2 or more for `motion` and `difference`.

    Returns:
        `(B, pooled_width)`.
    """
    if pool == "frames":
        return tokens.unflatten(1, (frames, -1)).mean(dim=2).flatten(1)
    pooled = [tokens.mean(dim=1)]
    if pool == "difference":
        pooled.append(tokens.unflatten(1, (frames, -1)).diff(dim=1).abs().mean(dim=(1, 2)))
    elif pool == "motion":
        for level in pyramid or [tokens[:, :, None]]:
            change = level.unflatten(1, (frames, -1)).diff(dim=1).abs().mean(dim=(1, 3))
            pooled += [change.mean(dim=1), change.amax(dim=1)]
    elif pool != "mean":
        raise ValueError(f"pool is {pool!r}, which has parameters; expected mean, difference, frames or motion")
    return torch.cat(pooled, dim=1)


class AttentivePool(nn.Module):
    """One learnt query reads the tokens by cross-attention, then an MLP; before it, blocks of self-attention.

        tokens = blocks(tokens)
        x = query + attention(query, norm1(tokens))
        x = x + mlp(norm2(x))

    As V-JEPA's attentive probes: pre-norm blocks, no projection behind the query's attention. V-JEPA has depth 1,
    V-JEPA 2 depth 4 with 16 heads.

    Args:
        width: D.
        heads: of every attention.
        depth: blocks, the query's among them.
    """

    def __init__(self, width: int, heads: int, depth: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(AttentionBlock(width, heads) for _ in range(depth - 1))
        self.query = nn.Parameter(torch.zeros(width))  # a vector: it is not decayed
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def init_weights(self) -> None:
        """Xavier as an attention block; the query normal with deviation 0.02."""
        init_as_transformer(self)
        nn.init.normal_(self.query, std=0.02)

    def read(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` -> `(B, D)`."""
        for block in self.blocks:
            tokens = block(tokens)
        batch, count, width = tokens.shape
        q = self.q(self.query).view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        k, v = self.kv(self.norm1(tokens)).view(batch, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = self.query + F.scaled_dot_product_attention(q, k, v).reshape(batch, width)
        return x + self.mlp(self.norm2(x))

    def multiply_adds(self, tokens: int) -> int:
        """Return the multiply-adds of one clip."""
        width = self.query.numel()
        many = multiply_adds(self.blocks, tokens) + multiply_adds(self.kv, tokens) + 2 * tokens * width
        return many + multiply_adds(self.q, 1) + multiply_adds(self.mlp, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` -> `(B, D)`."""
        return self.read(tokens)
