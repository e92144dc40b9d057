"""The parts of the encoder and the decoder: patch embedding, masked-convolution block, attention block.

Letters: B clips, m computed tokens, C channels, N tokens, D width of a token; t H W a stage's grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from video_convmae.kernels import masked_depthwise

from .packing import Cells, nest


class PatchEmbedding(nn.Module):
    """A convolution with kernel = stride, as a Linear on the cells it covers; then LayerNorm and GELU.

    Args:
        inputs: values that one output covers (pixels of a cell, or channels of the cells it joins).
        width: output channels.
        norm: add LayerNorm (eps 1e-5, as the published weights need) and GELU; a plain ViT has neither.
    """

    def __init__(self, inputs: int, width: int, norm: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.norm = nn.LayerNorm(width, eps=1e-5) if norm else nn.Identity()
        self.activation = nn.GELU() if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`(..., inputs)` -> `(..., width)`."""
        return self.activation(self.norm(self.linear(x)))


class DepthwiseConv(nn.Module):
    """Depthwise convolution over (t, H, W) that reads zeros at hidden cells; zero padding.

    Packed features go through kernels/depthwise.py and never see a dense grid. `dense` is the reference: the grid and
    PyTorch's own convolution.
    """

    def __init__(self, channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        if any(size % 2 == 0 for size in kernel):
            raise ValueError(f"the depthwise kernel is {kernel}; expected odd sizes (kt, kh, kw)")
        self.weight = nn.Parameter(torch.empty(channels, 1, *kernel))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise by PyTorch's default for convolutions, as released."""
        bound = 1 / math.sqrt(math.prod(self.weight.shape[2:]))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, cells: Cells | None) -> Tensor:
        """`(B, m, cells, C)`, or without cells a plain grid `(B, t, H, W, C)`, -> the same shape."""
        if cells is None:
            return self._on_grid(x)
        if cells.neighbours is not None:
            return masked_depthwise(x, self.weight, self.bias, cells.neighbours)
        return nest(self._on_grid(cells.to_grid(x)), cells.factors)

    def _on_grid(self, x: Tensor) -> Tensor:
        """Convolve `(B, t, H, W, C)`; return the same shape.

        A kernel of kt frames is kt two-dimensional convolutions whose outputs are shifted in time and summed: 0.32 s,
        where `conv3d` takes 0.57 s, forward and backward, on 1x8x56x56x256 float32 with two cores (AMD EPYC, Zen 4).
        """
        batch, t, height, width, channels = x.shape
        kt, kh, kw = self.weight.shape[2:]
        frames = x.reshape(batch * t, height, width, channels).permute(0, 3, 1, 2)  # channels-last in memory
        total = None
        for tap in range(kt):
            shift = tap - kt // 2  # this tap reads the frame `shift` later
            if abs(shift) >= t:
                continue  # only padding
            bias = self.bias if shift == 0 else None
            y = F.conv2d(frames, self.weight[:, :, tap], bias, padding=(kh // 2, kw // 2), groups=channels)
            y = y.permute(0, 2, 3, 1).reshape(x.shape)
            if shift:
                y = F.pad(y[:, max(shift, 0) : t + min(shift, 0)], (0,) * 6 + (max(-shift, 0), max(shift, 0)))
            total = y if total is None else total + y
        assert total is not None  # the middle tap reads every frame
        return total


class ConvBlock(nn.Module):
    """Masked convolution in place of attention, then an MLP; both in the residual, as ConvMAE's CBlock.

        x = x + proj_out(depthwise(where(visible, proj_in(norm1(x)), 0)))
        x = x + mlp(norm2(x))

    The residual is not masked. LayerNorm eps is 1e-5 here and 1e-6 in attention blocks: the published weights need it.
    """

    def __init__(self, width: int, kernel: tuple[int, int, int], mlp_ratio: float = 4, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.proj_in = nn.Linear(width, width)
        self.depthwise = DepthwiseConv(width, kernel)
        self.proj_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, cells: Cells | None) -> Tensor:
        """`(B, m, cells, C)`, or without cells a plain grid `(B, t, H, W, C)`, -> the same shape."""
        y = self.depthwise(self.proj_in(self.norm1(x)), cells)
        x = x + self.drop_path(self.proj_out(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, D)` -> the same shape."""
        return self.join_heads(F.scaled_dot_product_attention(*self.split_heads(x)))

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, N, D)` -> queries, keys and values, `(B, heads, N, D / heads)` each."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def join_heads(self, y: Tensor) -> Tensor:
        """Outputs of the heads `(B, heads, N, D / heads)` -> `(B, N, D)`."""
        return self.proj(y.transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, D)` -> the same shape."""
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def multiply_adds(module: nn.Module, positions: int) -> int:
    """Return the multiply-adds of a module's blocks or Linear layers on `positions` cells or tokens of one clip.

    Norms and activations are not counted.
    """
    total = 0
    for part in module.modules():
        if isinstance(part, (nn.Linear, DepthwiseConv)):
            total += positions * part.weight.numel()
        elif isinstance(part, Attention):  # queries x keys, and weights x values
            total += 2 * positions**2 * part.proj.in_features
    return total
