"""The backbone of dense tasks: the encoder with nothing hidden, on plain grids, for pictures of any size.

Letters: B pictures, C channels, H W pixels of a picture; h w its token grid, D width of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae.models import positions
from video_convmae.models.encoder import EncoderParts, encoder_layer

from .attention import GridBlock
from .options import BackboneConfig
from .pyramid import build_pyramid

# Parameters that weights of an encoder do not have, by the last part of their names, beside those of the pyramid.
ADDED = {"relative_positions", "relative_rows", "relative_columns", "scale1", "scale2"}
ADDED |= {"window_positions", "global_positions"}


class Backbone(EncoderParts):
    """An encoder for dense tasks. Its parameters have the encoder's names, so `load_weights` fills it from any image
    checkpoint; what only dense tasks have (`added`) starts new.

    channels, strides: of the levels that `forward` returns.
    """

    config: BackboneConfig

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        self.window_positions, self.global_positions = self._shared_tables()
        self.pyramid = build_pyramid(config)
        self.channels, self.strides = self.pyramid.channels, self.pyramid.strides
        self.added = frozenset(
            name for name in self.state_dict() if name.startswith("pyramid.") or name.split(".")[-1] in ADDED
        )
        self.init_weights()

    def attention_block(self, index: int, drop_path: float) -> GridBlock:
        """Make attention block `index`, with its drop rate."""
        config = self.config
        return GridBlock(
            config.widths[-1],
            config.heads,
            config.mlp_ratios[-1],
            drop_path,
            window=config.window_of(index),
            side=config.relative_size // config.patch,
            relative=config.relative_positions,
            layer_scale=config.layer_scale,
        )

    def forward(self, images: Tensor, count: int | None = None) -> list[Tensor]:
        """Map images `(B, C, H, W)` of any size to levels `(B, C_i, H_i, W_i)`, finest first.

        `count` is that of `stages`, for a backbone without a pyramid.

        The image is padded with zeros, below and to the right, to whole tokens, and the stages' maps are cropped to
        H_i = H / stride, rounded up. A coarser level that the pyramid adds has the size that its operation gives.
        """
        if images.ndim != 4 or images.shape[1] != self.config.channels:
            raise ValueError(f"images are {tuple(images.shape)}; expected (B, {self.config.channels}, H, W)")
        height, width = images.shape[2:]
        patch = self.config.patch
        maps = self.stages(F.pad(images, (0, -width % patch, 0, -height % patch)), count)
        levels = self.pyramid(_crop(maps, height, width, self.config.stage_strides))
        return _crop(levels, height, width, self.strides)

    def stages(self, images: Tensor, count: int | None = None) -> list[Tensor]:
        """Map images `(B, C, H, W)`, H and W multiples of a token's, to the stages' maps `(B, C_i, H_i, W_i)`.

        The first `count` stages are computed; None: all that there are.
        """
        count = len(self.embeddings) if count is None else count
        x = images.permute(0, 2, 3, 1)
        maps = []
        for stage, blocks in zip(range(count), self.conv_stages):
            x = self._embed(x, stage)[:, None]  # one frame
            for block in blocks.children():
                x = block(x, None)
            x = x[:, 0]
            maps.append(x)
        if count > len(self.conv_stages):
            maps.append(self._attend(self._embed(x, len(maps))))
        return [x.permute(0, 3, 1, 2) for x in maps]

    def prune(self, count: int) -> None:
        """Remove the stages after the first `count`."""
        if count >= len(self.embeddings):
            return
        self.embeddings, self.conv_stages = self.embeddings[:count], self.conv_stages[:count]
        self.projection, self.attention_blocks = nn.Identity(), nn.ModuleList()
        self.window_positions = self.global_positions = None
        del self.positions

    def layer_scales(self, decay: float) -> dict[str, float]:
        """Return every parameter's learning-rate scale under layer decay, as of a classifier; the pyramid's is 1.

        Tables of relative positions belong to their block, shared ones to layer 0.
        """
        last = len(self.attention_blocks) + 1
        return {
            name: 1.0 if name.startswith("pyramid.") else decay ** (last - encoder_layer(name))
            for name, _ in self.named_parameters()
        }

    def _shared_tables(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """Make the tables that windows and global blocks share, of offsets of rows and columns; 0 is in the middle."""
        config = self.config
        windows = {config.window_of(block) for block in range(config.depths[-1])}

        def table(is_used: bool, side: int) -> nn.Parameter | None:
            if config.relative_positions != "shared" or not is_used:
                return None
            return nn.Parameter(torch.zeros(2 * side - 1, 2 * side - 1, config.heads))

        return table(windows != {0}, config.window), table(0 in windows, config.relative_size // config.patch)

    def _attend(self, x: Tensor) -> Tensor:
        """Project embedded tokens `(B, h, w, D)`, add their positions, and apply the attention blocks."""
        x = self.projection(x)
        grid = (1, x.shape[1], x.shape[2])
        x = x + positions.resize(self.positions[0], self.config.grid, grid).view(*grid[1:], -1)
        for index, block in enumerate(self.attention_blocks):
            x = block(x, self.window_positions if self.config.window_of(index) else self.global_positions)
        return x

    def _embed(self, x: Tensor, stage: int) -> Tensor:
        """Join the cells `(B, H, W, C)` under one of a stage, row by row, and embed them: `(B, H / s, W / s, C')`."""
        s = self.config.strides[stage]
        x = x.unflatten(2, (-1, s)).unflatten(1, (-1, s))  # (B, h, s, w, s, C)
        return self.embeddings[stage](x.transpose(2, 3).flatten(3))


def _crop(maps: list[Tensor], height: int, width: int, strides: tuple[int, ...]) -> list[Tensor]:
    """Crop maps `(B, C, h, w)` to the rows and columns that an image has at their strides, rounded up."""
    return [x[:, :, : -(-height // s), : -(-width // s)] for x, s in zip(maps, strides)]
