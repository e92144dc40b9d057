"""The masked autoencoder: encoder, multi-scale fusion, decoder, target.

Letters: B clips, N tokens, n visible tokens of a clip, D width of a token, P pixels along a token's side; pixels of a
token run over (pt, ph, pw, c).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae import masking

from . import positions
from .blocks import AttentionBlock, block_multiply_adds
from .encoder import (
    Encoder,
    EncoderConfig,
    Features,
    encoder_config,
    init_as_convolution,
    init_as_transformer,
)
from .packing import Packing, put_patches, split_tokens, take_patches, take_tokens
from .sizes import size_named

Target = Literal["patch", "patch_channel", "none"]


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder in numbers.

    ratio: share of the hidden tokens that training predicts, in running cells; None: all of them.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"decoder_ratio is {self.ratio}; expected 0 < ratio <= 1, or none for all hidden tokens")

    def predicted(self, hidden: int) -> int:
        """How many of so many hidden tokens are predicted."""
        return hidden if self.ratio is None else int(self.ratio * hidden)


class AutoencoderOutput(NamedTuple):
    """What a training step needs and what a person wants to look at.

    loss: scalar float32, mean squared error over the predicted patches: the hidden ones, or a part of them with
        `decoder_ratio`.
    prediction, target: `(B, N - n, pixels of a token)`, hidden tokens in ascending order; with `decoder_ratio` those
        that `masking.running_cell` chooses, `(B, int(ratio * (N - n)), pixels of a token)`.
    tokens: `(B, n, D)`, visible tokens in ascending order, after fusion and the final norm.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    tokens: Tensor


class Fusion(nn.Module):
    """The multi-scale decoder (MSD): what stages 1 and 2 know joins the tokens before the final norm.

    Each convolutional stage's output goes through a convolution with kernel = stride = the token, to the token's width
    (ConvMAE's `stage1_output_decode`, `stage2_output_decode`). A plain ViT has nothing to fuse.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.joints = nn.ModuleList(
            nn.Linear(widths[stage] * prod(config.later_strides(stage)) ** 2, widths[last]) for stage in range(last)
        )

    def forward(self, features: Features, packing: Packing) -> Tensor:
        """Visible tokens `(B, n, D)` with the convolutional stages added."""
        tokens = features.tokens
        for joint, x in zip(self.joints, features.pyramid):
            tokens = tokens + packing.visible_of_computed(joint(x.flatten(2)))
        return tokens


class Decoder(nn.Module):
    """Visible tokens and mask tokens, each with its position, through attention to pixels of the hidden tokens.

    With decoder masking (`DecoderConfig.ratio`) mask tokens stand only at the predicted positions, so attention sees
    fewer of them: the predictions are not those of the whole decoder at the same places.
    """

    def __init__(self, config: DecoderConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.encoder_config = encoder
        self.embedding = nn.Linear(encoder.widths[-1], width)
        # One-dimensional, so that the rule "no weight decay on vectors" covers it; the released 3-D one is decayed.
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", torch.zeros(1, prod(encoder.grid), width), persistent=False)
        self.blocks = nn.ModuleList(AttentionBlock(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.prediction = nn.Linear(width, encoder.tubelet * encoder.patch**2 * encoder.channels)

    def init_weights(self) -> None:
        """Xavier as in MAE; the mask token normal with deviation 0.02; the position table recomputed."""
        init_as_transformer(self)
        nn.init.normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            table = positions.TABLES[self.encoder_config.position_table]
            self.positions.copy_(table(self.encoder_config.grid, self.mask_token.numel()))

    def forward(self, tokens: Tensor, packing: Packing, predicted: Tensor | None = None) -> Tensor:
        """Visible tokens `(B, n, D)` -> pixels of the tokens at `predicted (B, k)`, `(B, k, pixels)`; None: all hidden.

        Attention does not mind the order of its tokens, so the hidden ones simply follow the visible ones.
        """
        predicted = packing.hidden if predicted is None else predicted
        positions = self.positions.expand(packing.batch, -1, -1)
        shown = self.embedding(tokens) + take_tokens(positions, packing.keep)
        hidden = self.mask_token + take_tokens(positions, predicted)
        x = torch.cat([shown, hidden.to(shown.dtype)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.prediction(self.norm(x[:, tokens.shape[1] :]))

    def multiply_adds(self, visible: int) -> int:
        """Multiply-adds for one clip."""
        predicted = self.config.predicted(prod(self.encoder_config.grid) - visible)
        linear = visible * self.embedding.weight.numel() + predicted * self.prediction.weight.numel()
        return linear + sum(block_multiply_adds(block, visible + predicted) for block in self.blocks)


class FusedEncoder(nn.Module):
    """Encoder, fusion and the norm over tokens: what features of pretraining are read from.

    The three were trained together, so features are read after all of them.

    Args:
        encoder: the encoder in numbers.
        msd: whether the multi-scale fusion is there.
    """

    def __init__(self, encoder: EncoderConfig, msd: bool = True) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)
        self.fusion = Fusion(encoder) if msd else None
        self.norm = nn.LayerNorm(self.encoder.width, eps=1e-6)

    @property
    def grid(self) -> tuple[int, int, int]:
        """The token grid (t, h, w)."""
        return self.encoder.config.grid

    def encode(self, clips: Tensor, visible: Tensor | None = None) -> Tensor:
        """Features `(B, n, D)` after fusion and final norm, which were trained together; `None` = all visible."""
        return self._encode(clips, self.encoder.packing(clips, visible))

    def _encode(self, clips: Tensor, packing: Packing) -> Tensor:
        features = self.encoder(clips, packing)
        tokens = features.tokens if self.fusion is None else self.fusion(features, packing)
        return self.norm(tokens)


class Autoencoder(FusedEncoder):
    """A masked autoencoder over clips; an image is a clip of one frame.

    Args:
        encoder: the encoder in numbers.
        decoder: the decoder in numbers.
        msd: whether the multi-scale fusion is there.
        target: how the pixels of a patch are normalised (see `patch_target`).
    """

    def __init__(self, encoder: EncoderConfig, decoder: DecoderConfig, msd: bool = True, target: Target = "patch"):
        if target not in get_args(Target):
            raise ValueError(f"target is {target!r}; expected one of {', '.join(get_args(Target))}")
        super().__init__(encoder, msd)
        self.target = target
        self.decoder = Decoder(decoder, encoder)
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter and table; works after `to_empty` on a model built on the meta device."""
        self.encoder.init_weights()
        self.decoder.init_weights()
        self.norm.reset_parameters()
        if self.fusion is not None:
            init_as_convolution(self.fusion)

    def forward(self, clips: Tensor, visible: Tensor) -> AutoencoderOutput:
        """Predict the hidden patches, or with decoder masking a part of them.

        Args:
            clips: `(B, C, T, H, W)` float, normalised as the data is.
            visible: `(B, t, h, w)` bool, equally many True for every clip. Best left on the CPU: see `Packing`.

        Raises:
            ValueError: wrong shapes, unequal counts, or nothing hidden.
        """
        packing = self.encoder.packing(clips, visible)
        if packing.hidden.shape[1] == 0:
            raise ValueError("nothing is hidden, so there is nothing to predict; encode() takes whole clips")
        predicted = self._predicted(visible, packing)
        tokens = self._encode(clips, packing)
        prediction = self.decoder(tokens, packing, predicted)
        config = self.encoder.config
        target = patch_target(take_patches(clips, config.tubelet, config.patch, predicted), self.target)
        dtype = torch.promote_types(target.dtype, torch.float32)  # at least float32, whatever autocast made of the rest
        loss = F.mse_loss(prediction.to(dtype), target.to(dtype))
        return AutoencoderOutput(loss, prediction, target, tokens)

    def _predicted(self, visible: Tensor, packing: Packing) -> Tensor:
        """`(B, k)` indices of the tokens that are predicted, ascending."""
        ratio = self.decoder.config.ratio
        if ratio is None:
            return packing.hidden
        predicted = torch.stack([masking.running_cell(of_clip, ratio) for of_clip in visible.cpu()])
        return split_tokens(predicted)[0].to(packing.hidden.device, non_blocking=True)

    @torch.no_grad()
    def reconstruct(self, clips: Tensor, visible: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` whose hidden patches are the model's, all of them, with decoder masking too.

        With a normalised target the model predicts no patch mean or variance: those of the original are put back, and
        whoever shows the result must say so.
        """
        packing = self.encoder.packing(clips, visible)
        prediction = self.decoder(self._encode(clips, packing), packing)
        config = self.encoder.config
        everything = torch.arange(prod(config.grid), device=clips.device).expand(len(clips), -1)
        patches = take_patches(clips, config.tubelet, config.patch, everything)
        hidden = undo_target(prediction, take_tokens(patches, packing.hidden), self.target)
        clip = torch.arange(len(clips), device=clips.device)[:, None]
        patches[clip, packing.hidden] = hidden.to(patches.dtype)
        return put_patches(patches, config.grid)

    def multiply_adds(self, visible: int) -> dict[str, int]:
        """Forward multiply-adds of one clip with `visible` visible tokens, by part."""
        parts = self.encoder.multiply_adds(visible)
        if self.fusion is not None:
            computed = visible if self.encoder.config.implementation == "packed" else prod(self.grid)
            parts["fusion"] = computed * sum(joint.weight.numel() for joint in self.fusion.joints)
        parts["decoder"] = self.decoder.multiply_adds(visible)
        return parts


def patch_target(patches: Tensor, target: Target) -> Tensor:
    """Pixels `(B, k, pt, P, P, C)` -> what is predicted, `(B, k, pixels)` in the order (pt, ph, pw, c).

    `patch` normalises over all values of a patch (MAE: `sqrt(var + 1e-6)`), `patch_channel` over each channel's
    (VideoMAE: `sqrt(var) + 1e-6`), both with unbiased variance; `none` leaves the pixels.
    """
    if target != "none":
        mean, scale = _patch_statistics(patches, target)
        patches = (patches - mean) / scale
    return patches.flatten(2)


def undo_target(prediction: Tensor, patches: Tensor, target: Target) -> Tensor:
    """Predictions `(B, k, pixels)` -> pixels `(B, k, pt, P, P, C)`, scaled back as the original `patches` were."""
    pixels = prediction.view(patches.shape)
    if target == "none":
        return pixels
    mean, scale = _patch_statistics(patches, target)
    return pixels * scale + mean


def _patch_statistics(patches: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    axes = (2, 3, 4, 5) if target == "patch" else (2, 3, 4)
    variance, mean = torch.var_mean(patches, dim=axes, correction=1, keepdim=True)
    return mean, (variance + 1e-6).sqrt() if target == "patch" else variance.sqrt() + 1e-6


def create_autoencoder(
    size: str,
    *,
    num_frames: int = 16,
    image_size: int | tuple[int, int] = 224,
    msd: bool = True,
    implementation: Literal["packed", "dense"] = "packed",
    **overrides: Any,
) -> Autoencoder:
    """A masked autoencoder of a named size.

    Args:
        size: tiny, small, base, large, huge; vit_tiny .. vit_huge are plain ViTs.
        num_frames: 1 makes an image model: tubelet 1, temporal kernel 1, the image decoder, target `patch`. More make a
            video model: tubelet 2, temporal kernel 3, the video decoder, target `patch_channel`.
        image_size: pixels, one number or (height, width).
        msd: the multi-scale fusion.
        implementation: `packed` or `dense`.
        **overrides: any field of `EncoderConfig`; `decoder=(width, depth, heads)`; `decoder_mlp_ratio`;
            `decoder_ratio`, the share of the hidden tokens that training predicts (default: all); `target`.

    Raises:
        ValueError: an unknown size or a number that does not fit.
        TypeError: an unknown override.
    """
    named = size_named(size)
    width, depth, heads = overrides.pop("decoder", named.image_decoder if num_frames == 1 else named.video_decoder)
    mlp_ratio, ratio = overrides.pop("decoder_mlp_ratio", 4), overrides.pop("decoder_ratio", None)
    decoder = DecoderConfig(width, depth, heads, mlp_ratio, ratio)
    target = overrides.pop("target", "patch" if num_frames == 1 else "patch_channel")
    encoder = encoder_config(size, num_frames, image_size, implementation=implementation, **overrides)
    return Autoencoder(encoder, decoder, msd=msd, target=target)
