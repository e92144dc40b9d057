"""The encoder: convolutional stages on packed cells, then attention over the visible tokens.

Letters: B clips, C channels, T H W frames and pixels; t h w the token grid, N = t*h*w; n visible tokens; m tokens that
the convolutional stages compute (n packed, N dense); D width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import positions
from .blocks import AttentionBlock, ConvBlock, DepthwiseConv, PatchEmbedding, multiply_adds
from .packing import Cells, Packing, patch_cells, take_patches, take_tokens
from .sizes import EncoderConfig


class Features(NamedTuple):
    """Outputs of the stages.

    pyramid: the convolutional stages' outputs, `(B, m, cells, C)` each, cells nested as packing.py says.
    tokens: `(B, n, D)` visible tokens in ascending order: of `Encoder` after the last attention block, before any norm;
        of `FusedEncoder.features` after fusion and norm.
    """

    pyramid: list[Tensor]
    tokens: Tensor


class EncoderParts(nn.Module):
    """The parameters of an encoder, under the names that weights have; `Encoder` and dense.Backbone compute with them.

    added: names of this model's parameters that weights of an encoder never hold (those of dense.Backbone).
    """

    added: frozenset[str] = frozenset()

    positions: Tensor  # (1, N, D), a parameter or a buffer

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
                ConvBlock(config.widths[i], config.kernel, config.mlp_ratios[i], next(rates))
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
        self.attention_blocks = nn.ModuleList(self.attention_block(i, next(rates)) for i in range(config.depths[last]))

    def attention_block(self, index: int, drop_path: float) -> AttentionBlock:
        """Make attention block `index`, with its drop rate."""
        config = self.config
        return AttentionBlock(config.widths[-1], config.heads, config.mlp_ratios[-1], drop_path)

    @property
    def width(self) -> int:
        """Width of a token, D."""
        return self.config.widths[-1]

    def init_weights(self) -> None:
        """Initialise as released: stages 1 and 2 as PyTorch convolutions, the last by Xavier; fill in the positions."""
        for embedding in self.embeddings[:-1]:
            init_as_convolution(embedding)
        init_as_convolution(self.conv_stages)
        for module in (self.embeddings[-1], self.projection, self.attention_blocks):
            init_as_transformer(module)
        with torch.no_grad():
            self.positions.copy_(positions.TABLES[self.config.position_table](self.config.grid, self.width))


class Encoder(EncoderParts):
    """ConvMAE's encoder for clips and images; with one stage, a plain ViT.

    Sources: ConvMAE (Gao et al., 2022) and its released code for images. The third dimension is ours: tubelets in the
    first embedding, strides (1, s, s) after it, depthwise kernels (kt, 5, 5).
    """

    def packing(self, clips: Tensor, visible: Tensor | None, predicted: Tensor | None = None) -> Packing:
        """Check a batch against the configuration and find its visible and predicted tokens.

        Raises:
            ValueError: clips or visible do not have the shape that this encoder was built for; see also `Packing`.
        """
        expected = self.config.clip_shape
        if clips.ndim != 5 or tuple(clips.shape[1:]) != expected:
            raise ValueError(f"clips are {tuple(clips.shape)}; expected (B, C, T, H, W) = (B, {str(expected)[1:]}")
        if is_whole := visible is None:
            visible = torch.ones(clips.shape[0], *self.config.grid, dtype=torch.bool)
        if visible.ndim not in (4, 5) or visible.shape[0] != clips.shape[0] or visible.shape[-3:] != self.config.grid:
            raise ValueError(
                f"visible is {tuple(visible.shape)}; expected (B, t, h, w) = {(clips.shape[0], *self.config.grid)}, or "
                "several masks a clip, (B, masks, t, h, w)"
            )
        return Packing(visible, clips.device, self.config.implementation, predicted, is_whole)

    def forward(self, clips: Tensor, packing: Packing) -> Features:
        """Map clips `(B, C, T, H, W)` to the pyramid and the visible tokens, of each mask of each clip."""
        config = self.config
        patches = take_patches(clips, config.tubelet, config.patch, packing.computed)
        x = patch_cells(patches, config.later_strides[0])
        pyramid = []
        for stage, blocks in enumerate(self.conv_stages):
            x = self.embeddings[stage](x)
            cells = Cells(packing, config.later_strides[stage], config.kernel)
            for block in blocks.children():
                x = block(x, cells)
            pyramid.append(x)
            # Join the s x s cells that one of the next stage covers: (B, m, cells, C) -> (B, m, cells / s², s² C).
            x = x.flatten(2).unflatten(2, (-1, config.strides[stage + 1] ** 2 * x.shape[3]))
        x = self.projection(self.embeddings[-1](x)).squeeze(2)
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
        """Return the tokens and the feature pyramid as dense grids; name and arguments are timm's.

        A stage's grid is `(B, C, t, H, W)`, at strides (4, 2, 2) 1/4, 1/8 and 1/16 of the pixels. An image is a clip of
        one frame, here too: t = 1 stays. The last grid holds the tokens, before any final norm and without fusion.

        Args:
            clips: `(B, C, T, H, W)`.
            visible: `(B, t, h, w)`; grids are zero where a token is hidden. `None` = all visible.
            indices: stages to return: the last so many, a list of stages (from 0, or back from -1), or `None` = all.
                They come in the order of the stages.
            intermediates_only: leave out the tokens.

        Returns:
            The visible tokens `(B, n, D)` and the grids, or the grids alone.

        Raises:
            ValueError: clips or visible do not have the encoder's shape; a stage that does not exist.
        """
        chosen = _stages(len(self.config.widths), indices)
        packing = self.packing(clips, visible)
        features = self(clips, packing)
        grids = [self._grid(features, packing, stage).permute(0, 4, 1, 2, 3) for stage in chosen]
        return grids if intermediates_only else (features.tokens, grids)

    def multiply_adds(self, num_visible: int) -> dict[str, int]:
        """Return the multiply-adds of one clip of `num_visible` tokens, by part, as `implementation` has it."""
        config, last = self.config, len(self.conv_stages)
        computed = num_visible if config.implementation == "packed" else prod(config.grid)
        cells = [computed * prod(later) ** 2 for later in config.later_strides]
        embeddings = sum(multiply_adds(embedding, count) for embedding, count in zip(self.embeddings, cells))
        parts = {"embeddings": embeddings + multiply_adds(self.projection, computed)}
        for stage, blocks in enumerate(self.conv_stages):
            parts[f"stage {stage + 1}"] = multiply_adds(blocks, cells[stage])
        parts[f"stage {last + 1}"] = multiply_adds(self.attention_blocks, num_visible)
        return parts

    def _grid(self, features: Features, packing: Packing, stage: int) -> Tensor:
        """Return a stage's output as `(B, t, H, W, C)`, hidden positions zero."""
        cells = Cells(packing, self.config.later_strides[stage])
        if stage == len(features.pyramid):
            return cells.visible_to_grid(features.tokens[:, :, None])
        return cells.to_grid(features.pyramid[stage])


def _stages(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return timm's `indices` as stages 0 .. count - 1, ascending."""
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


def encoder_layer(name: str) -> int:
    """Return the layer of an encoder's parameter for layer decay: 0, or of attention block i, i + 1."""
    return int(name.split(".")[1]) + 1 if name.startswith("attention_blocks.") else 0


def init_as_convolution(root: nn.Module) -> None:
    """Reset every module to PyTorch's default; a Linear's is that of a convolution with kernel = stride."""
    for module in root.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, DepthwiseConv)):
            module.reset_parameters()


def init_as_transformer(root: nn.Module) -> None:
    """Initialise Linear layers Xavier-uniform with zero bias, LayerNorm at one and zero (MAE)."""
    for module in root.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
