"""The encoder: convolutional stages on packed cells, then attention over the visible tokens.

Letters: B clips, T H W frames and pixels, t h w the token grid, N = t*h*w, n visible tokens, m tokens that the
convolutional stages compute (n packed, N dense), D width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import positions
from .blocks import AttentionBlock, ConvBlock, DepthwiseConv, PatchEmbedding, block_multiply_adds
from .packing import Packing, patch_cells, take_patches, take_tokens
from .sizes import EncoderConfig


class Features(NamedTuple):
    """What the stages leave.

    pyramid: the convolutional stages' outputs, `(B, m, cells, C)` each, cells nested as packing.py says.
    tokens: `(B, n, D)` visible tokens in ascending order, after the last attention block, before any final norm.
    """

    pyramid: list[Tensor]
    tokens: Tensor


class Encoder(nn.Module):
    """ConvMAE's encoder for clips and images; with one stage, a plain ViT.

    Sources: ConvMAE (Gao et al., 2022) and its released code for images. The third dimension is ours: tubelets in the
    first embedding, strides (1, s, s) after it, depthwise kernels (kt, 5, 5).
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        stages, last = len(config.widths), len(config.widths) - 1
        rates = iter(torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist())

        inputs = [config.channels * config.tubelet, *config.widths[:-1]]
        self.embeddings = nn.ModuleList(
            PatchEmbedding(inputs[i] * config.strides[i] ** 2, config.widths[i], norm=stages > 1) for i in range(stages)
        )
        self.conv_stages = nn.ModuleList(
            nn.ModuleList(
                ConvBlock(config.widths[i], config.kernel, config.mlp_ratio, next(rates))
                for _ in range(config.depths[i])
            )
            for i in range(last)
        )
        width = config.widths[last]
        self.projection = nn.Linear(width, width) if last else nn.Identity()
        table = torch.zeros(1, prod(config.grid), width)
        if config.learnable_positions:
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table, persistent=False)
        self.attention_blocks = nn.ModuleList(
            AttentionBlock(width, config.heads, config.mlp_ratio, next(rates)) for _ in range(config.depths[last])
        )

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.config.widths[-1]

    def init_weights(self) -> None:
        """As released: PyTorch's convolution default in stages 1 and 2, Xavier in the last one, tables recomputed."""
        for embedding in self.embeddings[:-1]:
            init_as_convolution(embedding)
        init_as_convolution(self.conv_stages)
        for module in (self.embeddings[-1], self.projection, self.attention_blocks):
            init_as_transformer(module)
        with torch.no_grad():
            self.positions.copy_(positions.TABLES[self.config.position_table](self.config.grid, self.width))

    def packing(self, clips: Tensor, visible: Tensor | None) -> Packing:
        """Check a batch against the configuration and find its visible tokens.

        Raises:
            ValueError: clips or visible do not have the shape that this encoder was built for.
        """
        expected = self.config.clip_shape
        if clips.ndim != 5 or tuple(clips.shape[1:]) != expected:
            raise ValueError(f"clips are {tuple(clips.shape)}; expected (B, C, T, H, W) = (B, {str(expected)[1:]}")
        if visible is None:
            visible = torch.ones(clips.shape[0], *self.config.grid, dtype=torch.bool)
        if tuple(visible.shape) != (clips.shape[0], *self.config.grid):
            raise ValueError(
                f"visible is {tuple(visible.shape)}; expected (B, t, h, w) = {(clips.shape[0], *self.config.grid)}"
            )
        return Packing(visible, clips.device, self.config.implementation)

    def forward(self, clips: Tensor, packing: Packing) -> Features:
        """Clips `(B, C, T, H, W)` -> the pyramid and the visible tokens."""
        config, last = self.config, len(self.conv_stages)
        patches = take_patches(clips, config.tubelet, config.patch, packing.computed)
        x = patch_cells(patches, config.cell_factors[0])
        pyramid = []
        for stage, blocks in enumerate(self.conv_stages):
            x = self.embeddings[stage](x)
            cells = packing.cells(config.cell_factors[stage], config.kernel)
            for block in blocks:
                x = block(x, cells)
            pyramid.append(x)
            x = self._join_cells(x, stage + 1)
        x = self.projection(self.embeddings[last](x)).squeeze(2)
        x = packing.visible_of_computed(x)
        x = x + take_tokens(self.positions.expand(packing.batch, -1, -1), packing.keep)
        for block in self.attention_blocks:
            x = block(x)
        return Features(pyramid, x)

    def forward_intermediates(
        self,
        clips: Tensor,
        visible: Tensor | None = None,
        indices: int | Sequence[int] | None = None,
        *,
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """The tokens and the feature pyramid as dense grids; name and arguments are timm's.

        A stage's grid is `(B, C, t, H, W)`, at strides (4, 2, 2) 1/4, 1/8 and 1/16 of the pixels. An image is a clip of
        one frame, here too: t = 1 stays. The last grid holds the tokens, before any final norm and without fusion.

        Args:
            clips: `(B, C, T, H, W)`.
            visible: `(B, t, h, w)`; grids are zero where a token is hidden. `None` = all visible.
            indices: the stages whose grids are returned: the last so many, those named (counted from 0, or back from
                -1), or all. They come in the order of the stages.
            intermediates_only: leave out the tokens.

        Returns:
            The visible tokens `(B, n, D)` and the grids, or the grids alone.

        Raises:
            ValueError: clips or visible do not have the encoder's shape; a stage that there is not.
        """
        chosen = _stages(len(self.config.widths), indices)
        packing = self.packing(clips, visible)
        features = self(clips, packing)
        grids = [self._grid(features, packing, stage).permute(0, 4, 1, 2, 3) for stage in chosen]
        return grids if intermediates_only else (features.tokens, grids)

    def multiply_adds(self, visible: int) -> dict[str, int]:
        """Multiply-adds of one clip with `visible` visible tokens, by part, as the implementation computes them."""
        config, last = self.config, len(self.conv_stages)
        computed = visible if config.implementation == "packed" else prod(config.grid)
        cells = [computed * prod(config.cell_factors[stage]) ** 2 for stage in range(last + 1)]
        parts = {"embeddings": sum(e.linear.weight.numel() * count for e, count in zip(self.embeddings, cells))}
        if last:
            parts["embeddings"] += computed * self.projection.weight.numel()
        for stage, blocks in enumerate(self.conv_stages):
            parts[f"stage {stage + 1}"] = sum(block_multiply_adds(block, cells[stage]) for block in blocks)
        parts[f"stage {last + 1}"] = sum(block_multiply_adds(block, visible) for block in self.attention_blocks)
        return parts

    def _grid(self, features: Features, packing: Packing, stage: int) -> Tensor:
        """What a stage left as `(B, t, H, W, C)`, hidden positions zero."""
        cells = packing.cells(self.config.cell_factors[stage])
        if stage == len(features.pyramid):
            return cells.visible_to_grid(features.tokens[:, :, None])
        return cells.to_grid(features.pyramid[stage])

    def _join_cells(self, x: Tensor, stage: int) -> Tensor:
        """Join the cells under each window of embedding `stage`: `(B, m, cells, C)` -> `(B, m, cells / s², s² C)`."""
        window = self.config.strides[stage] ** 2
        return x.reshape(*x.shape[:2], x.shape[2] // window, window * x.shape[3])


def _stages(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """timm's `indices` as stages 0 .. count - 1, ascending."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        chosen = set(range(count - indices, count))
    else:
        chosen = {count + index if index < 0 else index for index in indices}
    if not chosen or not chosen <= set(range(count)):
        raise ValueError(
            f"indices is {indices}; expected how many of the last stages, 1 to {count}, or a list of stages, "
            f"{-count} to {count - 1}"
        )
    return sorted(chosen)


def init_as_convolution(root: nn.Module) -> None:
    """Every module's PyTorch default; a Linear's is that of a convolution with kernel = stride."""
    for module in root.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, DepthwiseConv)):
            module.reset_parameters()


def init_as_transformer(root: nn.Module) -> None:
    """Xavier-uniform Linear layers with zero bias, LayerNorm at one and zero (MAE)."""
    for module in root.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
