"""The masked autoencoder: encoder, multi-scale fusion, decoder, target.

Letters: B clips, N tokens, n visible tokens of a clip, D width of a token, P pixels along a token's side; pixels of a
token run over (pt, ph, pw, c).
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import positions
from .blocks import AttentionBlock, block_multiply_adds
from .encoder import Encoder, Features, init_as_convolution, init_as_transformer
from .packing import Packing, put_patches, split_tokens, take_patches, take_tokens
from .sizes import AutoencoderConfig, EncoderConfig, Implementation, build_options


class AutoencoderOutput(NamedTuple):
    """Output of a training step.

    Attributes:
        loss: scalar float32, mean squared error over the predicted patches: the hidden ones, or a part of them.
        prediction, target: `(B, k, pixels of a token)` at the k predicted tokens in ascending order; N - n unless the
            caller names fewer.
        tokens: `(B, n, D)`, visible tokens in ascending order, after fusion and the final norm.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    tokens: Tensor


class Fusion(nn.Module):
    """The multi-scale decoder (MSD): add the convolutional stages to the tokens before the final norm.

    Each stage's output goes through a convolution with kernel = stride = the token, to the token's width (ConvMAE's
    `stage1_output_decode`, `stage2_output_decode`). A plain ViT has nothing to fuse.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        *conv_widths, width = config.widths
        self.joints = nn.ModuleList(
            nn.Linear(channels * prod(config.cell_factors[stage]) ** 2, width)
            for stage, channels in enumerate(conv_widths)
        )

    def forward(self, features: Features, packing: Packing) -> Tensor:
        """Return the visible tokens `(B, n, D)` with the convolutional stages added."""
        tokens = features.tokens
        for joint, x in zip(self.joints, features.pyramid):
            tokens = tokens + packing.visible_of_computed(joint(x.flatten(2)))
        return tokens


class Decoder(nn.Module):
    """Attention over visible tokens and mask tokens, each with its position, to the pixels of the predicted tokens.

    With decoder masking, mask tokens stand only at the predicted positions and attention sees fewer of them: the
    predictions are not those of the whole decoder at the same places.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width, depth, heads = config.decoder
        self.config = config
        self.embedding = nn.Linear(config.widths[-1], width)
        # One-dimensional, so that the rule "no weight decay on vectors" covers it; the released 3-D one is decayed.
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", torch.zeros(1, prod(config.grid), width), persistent=False)
        self.blocks = nn.ModuleList(AttentionBlock(width, heads, config.decoder_mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.prediction = nn.Linear(width, config.tubelet * config.patch**2 * config.channels)

    def init_weights(self) -> None:
        """Initialise as in MAE: Xavier, the mask token normal with deviation 0.02; recompute the position table."""
        init_as_transformer(self)
        nn.init.normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            table = positions.TABLES[self.config.position_table]
            self.positions.copy_(table(self.config.grid, self.mask_token.numel()))

    def forward(self, tokens: Tensor, packing: Packing, predicted: Tensor) -> Tensor:
        """Visible tokens `(B, n, D)` -> pixels of the tokens at `predicted (B, k)`, `(B, k, pixels)`.

        Attention is invariant to the order of its tokens, so the predicted ones simply follow the visible ones.
        """
        table = self.positions.expand(packing.batch, -1, -1)
        shown = self.embedding(tokens) + take_tokens(table, packing.keep)
        hidden = self.mask_token + take_tokens(table, predicted)
        x = torch.cat([shown, hidden.to(shown.dtype)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.prediction(self.norm(x[:, tokens.shape[1] :]))

    def multiply_adds(self, visible: int, predicted: int) -> int:
        """Count the multiply-adds of one clip."""
        linear = visible * self.embedding.weight.numel() + predicted * self.prediction.weight.numel()
        return linear + sum(block_multiply_adds(block, visible + predicted) for block in self.blocks)


class FusedEncoder(nn.Module):
    """Encoder, fusion and the norm over tokens: the part of an autoencoder that features are read from.

    The three were trained together, so features are read after all of them.

    Args:
        config: options of the encoder.
        msd: with the multi-scale fusion.
    """

    def __init__(self, config: EncoderConfig, msd: bool = True) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.fusion = Fusion(config) if msd else None
        self.norm = nn.LayerNorm(self.encoder.width, eps=1e-6)

    @property
    def grid(self) -> tuple[int, int, int]:
        """The token grid (t, h, w)."""
        return self.encoder.config.grid

    def encode(self, clips: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return features `(B, n, D)` after fusion and final norm; `visible` None = all visible."""
        return self._encode(clips, self.encoder.packing(clips, visible))

    def _encode(self, clips: Tensor, packing: Packing) -> Tensor:
        features = self.encoder(clips, packing)
        tokens = features.tokens if self.fusion is None else self.fusion(features, packing)
        return self.norm(tokens)


class Autoencoder(FusedEncoder):
    """A masked autoencoder over clips; an image is a clip of one frame.

    Args:
        config: options of encoder, fusion, decoder and target.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config, config.msd)
        self.config = config
        self.target = config.target
        self.decoder = Decoder(config)
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter and table; works after `to_empty` on a model built on the meta device."""
        self.encoder.init_weights()
        self.decoder.init_weights()
        self.norm.reset_parameters()
        if self.fusion is not None:
            init_as_convolution(self.fusion)

    def forward(self, clips: Tensor, visible: Tensor, predicted: Tensor | None = None) -> AutoencoderOutput:
        """Predict the hidden patches, or a part of them.

        Args:
            clips: `(B, C, T, H, W)` float, normalised as the data is.
            visible: `(B, t, h, w)` bool, equally many True for every clip. Best left on the CPU: see `Packing`.
            predicted: `(B, t, h, w)` bool, the hidden tokens to predict, equally many for every clip; None: all.

        Raises:
            ValueError: wrong shapes, unequal counts, nothing hidden, or a visible token that is predicted.
        """
        packing = self.encoder.packing(clips, visible)
        if packing.hidden.shape[1] == 0:
            raise ValueError("nothing is hidden, so there is nothing to predict; encode() takes whole clips")
        index = packing.hidden
        if predicted is not None:
            if predicted.shape != visible.shape or bool((predicted & visible).any()):
                raise ValueError(
                    f"predicted is {tuple(predicted.shape)}; expected hidden tokens only, in the shape of visible, "
                    f"{tuple(visible.shape)}"
                )
            index = split_tokens(predicted)[0].to(packing.hidden.device, non_blocking=True)
        tokens = self._encode(clips, packing)
        prediction = self.decoder(tokens, packing, index)
        target = patch_target(take_patches(clips, self.config.tubelet, self.config.patch, index), self.target)
        dtype = torch.promote_types(target.dtype, torch.float32)  # at least float32, whatever autocast did
        loss = F.mse_loss(prediction.to(dtype), target.to(dtype))
        return AutoencoderOutput(loss, prediction, target, tokens)

    @torch.no_grad()
    def reconstruct(self, clips: Tensor, visible: Tensor) -> Tensor:
        """Return clips `(B, C, T, H, W)` in which every hidden patch is the model's prediction.

        With a normalised target the model predicts no patch mean or variance: those of the original are put back, and
        a caption of the result must say so.
        """
        packing = self.encoder.packing(clips, visible)
        prediction = self.decoder(self._encode(clips, packing), packing, packing.hidden)
        everything = torch.arange(prod(self.grid), device=clips.device).expand(len(clips), -1)
        patches = take_patches(clips, self.config.tubelet, self.config.patch, everything)
        hidden = undo_target(prediction, take_tokens(patches, packing.hidden), self.target)
        clip = torch.arange(len(clips), device=clips.device)[:, None]
        patches[clip, packing.hidden] = hidden.to(patches.dtype)
        return put_patches(patches, self.grid)

    def multiply_adds(self, visible: int, predicted: int | None = None) -> dict[str, int]:
        """Count the forward multiply-adds of one clip by part.

        Args:
            visible: visible tokens.
            predicted: predicted tokens; None: all hidden ones.
        """
        parts = self.encoder.multiply_adds(visible)
        if self.fusion is not None:
            computed = visible if self.config.implementation == "packed" else prod(self.grid)
            parts["fusion"] = computed * sum(joint.weight.numel() for joint in self.fusion.joints)
        parts["decoder"] = self.decoder.multiply_adds(
            visible, prod(self.grid) - visible if predicted is None else predicted
        )
        return parts


def patch_target(patches: Tensor, target: str) -> Tensor:
    """Normalise pixels `(B, k, pt, P, P, C)` to the target `(B, k, pixels)` in the order (pt, ph, pw, c).

    `patch` normalises over all values of a patch (MAE: `sqrt(var + 1e-6)`), `patch_channel` over each channel's
    (VideoMAE: `sqrt(var) + 1e-6`), both with unbiased variance; `none` leaves the pixels.
    """
    if target != "none":
        mean, scale = _patch_statistics(patches, target)
        patches = (patches - mean) / scale
    return patches.flatten(2)


def undo_target(prediction: Tensor, patches: Tensor, target: str) -> Tensor:
    """Predictions `(B, k, pixels)` -> pixels `(B, k, pt, P, P, C)`, with mean and scale of the original `patches`."""
    pixels = prediction.view(patches.shape)
    if target == "none":
        return pixels
    mean, scale = _patch_statistics(patches, target)
    return pixels * scale + mean


def _patch_statistics(patches: Tensor, target: str) -> tuple[Tensor, Tensor]:
    axes = (2, 3, 4, 5) if target == "patch" else (2, 3, 4)
    variance, mean = torch.var_mean(patches, dim=axes, correction=1, keepdim=True)
    return mean, (variance + 1e-6).sqrt() if target == "patch" else variance.sqrt() + 1e-6


def create_autoencoder(
    size: str,
    *,
    num_frames: int = 16,
    image_size: int | tuple[int, int] = 224,
    msd: bool = True,
    implementation: Implementation = "packed",
    **overrides: Any,
) -> Autoencoder:
    """Create a masked autoencoder of a named size.

    Args:
        size: tiny, small, base, large, huge; vit_tiny .. vit_huge are plain ViTs.
        num_frames: 1 makes an image model: tubelet 1, temporal kernel 1, the image decoder, target `patch`. More make a
            video model: tubelet 2, temporal kernel 3, the video decoder, target `patch_channel`.
        image_size: pixels, one number or (height, width).
        msd: the multi-scale fusion.
        implementation: `packed` or `dense`.
        **overrides: any field of `AutoencoderConfig`.

    Raises:
        ValueError: an unknown size or a number that does not fit.
        TypeError: an unknown override.
    """
    overrides |= {"msd": msd, "implementation": implementation}
    config = build_options(AutoencoderConfig, size=size, num_frames=num_frames, image_size=image_size, **overrides)
    return Autoencoder(config)
