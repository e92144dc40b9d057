"""The masked autoencoder: encoder, multi-scale fusion, decoder, targets.

Letters: B clips; t h w the token grid, N = t*h*w; n visible and k predicted tokens of a clip; D width of a token; P
pixels along a token's side. Pixels of a token run over (pt, ph, pw, c).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import prod
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae.hub import Folder, PretrainedModel

from . import positions
from .blocks import AttentionBlock, multiply_adds
from .encoder import Encoder, Features, init_as_convolution, init_as_transformer
from .packing import Packing, put_patches, take_patches, take_tokens, take_tokens_of_clips
from .sizes import AutoencoderConfig, EncoderConfig, FeatureTarget, Implementation, Target, apply_overrides
from .targets import HiddenHead, VisibleHead, feature_loss


class AutoencoderOutput(NamedTuple):
    """Result of a forward pass.

    loss: scalar, float32 at least: mean squared error over the predicted patches; of several targets a weighted sum.
    prediction, target: `(B, k, pixels of a token)`, the predicted tokens in ascending order: all hidden ones,
        k = N - n, unless `predicted` was given; k = 0 where pixels are no target. Where clips have several masks, B is
        clips x masks, here and below.
    tokens: `(B, n, D)`, visible tokens in ascending order, after fusion and the final norm.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    tokens: Tensor


class TargetsOutput(NamedTuple):
    """Result of a forward pass with features or weights: an `AutoencoderOutput`, and the losses that `loss` sums.

    losses: that of each target by its name, "pixels" or a `FeatureTarget`'s, without weights.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]


class Fusion(nn.Module):
    """Multi-scale decoder (MSD): add the outputs of stages 1 and 2 to the tokens before the final norm.

    Each convolutional stage's output goes through a convolution with kernel = stride = the token, to the token's width
    (ConvMAE's `stage1_output_decode`, `stage2_output_decode`). A plain ViT has nothing to fuse.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        *widths, width = config.widths
        self.joints = nn.ModuleList(
            nn.Linear(channels * prod(later) ** 2, width) for channels, later in zip(widths, config.later_strides)
        )

    def forward(self, features: Features, packing: Packing) -> Tensor:
        """Return the visible tokens `(B, n, D)` with the convolutional stages added."""
        tokens = features.tokens
        for joint, x in zip(self.joints, features.pyramid):
            tokens = tokens + packing.visible_of_computed(joint(x.flatten(2)))
        return tokens


class Decoder(nn.Module):
    """Visible tokens and mask tokens, each with its position, through attention to pixels of the predicted tokens.

    With decoder masking (VideoMAE V2) mask tokens stand at the predicted positions alone, so attention sees fewer of
    them: the predictions differ from those of the whole decoder at the same places.
    """

    positions: Tensor  # (1, N, decoder width), a buffer

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
        """Initialise as MAE: Xavier, the mask token normal with deviation 0.02; recompute the position table."""
        init_as_transformer(self)
        nn.init.normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            table = positions.TABLES[self.config.position_table]
            self.positions.copy_(table(self.config.grid, self.mask_token.numel()))

    def forward(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Map visible tokens `(B, n, D)` to pixels of the predicted ones, `(B, k, pixels)`."""
        return self.predict(self.trunk(tokens, packing), tokens.shape[1])

    def trunk(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Map visible tokens `(B, n, D)` through all blocks but the last, which all targets share: `(B, n + k, width)`.

        Attention is equivariant to the order of its tokens, so mask tokens simply follow the visible ones.
        """
        table = self.positions.expand(packing.batch, -1, -1)
        shown = self.embedding(tokens) + take_tokens(table, packing.keep)
        masked = self.mask_token + take_tokens(table, packing.predicted)
        x = torch.cat([shown, masked.to(shown.dtype)], dim=1)
        for block in list(self.blocks)[:-1]:
            x = block(x)
        return x

    def predict(self, x: Tensor, num_visible: int) -> Tensor:
        """Map the trunk's tokens, of which the first `num_visible` are visible, to pixels `(B, k, pixels)`."""
        for block in list(self.blocks)[-1:]:  # a decoder may have none
            x = block(x)
        return self.prediction(self.norm(x[:, num_visible:]))

    def multiply_adds(self, num_visible: int, num_predicted: int, pixels: bool = True) -> int:
        """Return the multiply-adds of one clip; without pixels, of the trunk alone."""
        tokens = num_visible + num_predicted
        total = multiply_adds(self.embedding, num_visible) + multiply_adds(self.blocks, tokens)
        if pixels:
            return total + multiply_adds(self.prediction, num_predicted)
        return total - multiply_adds(nn.ModuleList(list(self.blocks)[-1:]), tokens)


class FusedEncoder(nn.Module):
    """Encoder, fusion and the norm over tokens.

    The three are trained together in pretraining, so features are read after all of them.

    Args:
        config: encoder options.
        msd: build the multi-scale fusion.

    Attributes:
        may_lack_fusion: the norm may have been trained behind a fusion that this model does not have; `load_weights`
            tells from the file.
    """

    may_lack_fusion = False

    def __init__(self, config: EncoderConfig, msd: bool) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.fusion = Fusion(config) if msd else None
        self.norm = nn.LayerNorm(self.encoder.width, eps=1e-6)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid (t, h, w)."""
        return self.encoder.config.grid

    def encode(self, clips: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return features `(B, n, D)` after fusion and final norm; `None` = all visible."""
        return self._encode(clips, self.encoder.packing(clips, visible))

    def features(self, clips: Tensor) -> Features:
        """Return the convolutional stages' outputs and the tokens of `encode`, of whole clips."""
        return self._features(clips, self.encoder.packing(clips, None))

    def _encode(self, clips: Tensor, packing: Packing) -> Tensor:
        return self._features(clips, packing).tokens

    def _features(self, clips: Tensor, packing: Packing) -> Features:
        """Return the pyramid, and the tokens after fusion and final norm."""
        features = self.encoder(clips, packing)
        tokens = features.tokens if self.fusion is None else self.fusion(features, packing)
        return Features(features.pyramid, self.norm(tokens))


class Autoencoder(FusedEncoder, PretrainedModel):
    """Masked autoencoder over clips; an image is a clip of one frame.

    It predicts the pixels of hidden tokens and, with `targets`, a teacher's features (ConvMAE-v2). Targets at hidden
    tokens share the decoder but for its last block, norm and head: those of pixels are the decoder's own.

    Args:
        config: encoder, decoder and the target of pixels.
        targets: features that are predicted, each with a head in `feature_heads`.
        pixels: pixels are a target; if not, the decoder's last block, norm and prediction are not trained.

    Raises:
        ValueError: a target with an impossible name or layer, or none at all.
    """

    architecture = "Autoencoder"

    def __init__(self, config: AutoencoderConfig, targets: Sequence[FeatureTarget] = (), pixels: bool = True) -> None:
        super().__init__(config, config.msd)
        self.target = cast(Target, config.target)  # "auto" is resolved
        self.decoder = Decoder(config)
        self.targets, self.predicts_pixels = tuple(targets), pixels
        self.predicts_hidden = pixels or any(each.tokens == "hidden" for each in targets)
        self.feature_heads = nn.ModuleDict()
        for each in self.targets:
            if not each.name.isidentifier() or each.name == "pixels" or hasattr(self.feature_heads, each.name):
                raise ValueError(f"a target of features is named {each.name!r}; expected another word, one for each")
            head = HiddenHead(config, each) if each.tokens == "hidden" else VisibleHead(config, each)
            self.feature_heads[each.name] = head
        if not (pixels or targets):
            raise ValueError("the model has no target; expected pixels, features or both")
        if not self.predicts_hidden:
            self.decoder.requires_grad_(False)
        elif not pixels:
            for part in (*list(self.decoder.blocks)[-1:], self.decoder.norm, self.decoder.prediction):
                part.requires_grad_(False)
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter and table; works after `to_empty` on a model built on the meta device."""
        self.encoder.init_weights()
        self.decoder.init_weights()
        self.norm.reset_parameters()
        if self.fusion is not None:
            init_as_convolution(self.fusion)
        init_as_transformer(self.feature_heads)

    def forward(
        self,
        clips: Tensor,
        visible: Tensor,
        predicted: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> AutoencoderOutput | TargetsOutput:
        """Predict the hidden patches, or a part of them, and a teacher's features.

        Args:
            clips: `(B, C, T, H, W)` float, normalised as the data is.
            visible: `(B, t, h, w)` bool, equally many True for every clip; or several masks a clip,
                `(B, masks, t, h, w)`, whose loss is the mean of theirs. Best left on the CPU: see `Packing`.
            predicted: bool of the same shape, the hidden tokens to predict, equally many in every mask (see
                `masking.running_cell`); `None` = all hidden.
            features: of each of `targets` by its name, `(B, N, width)`, at every token of the clip.
            weights: of the targets' losses in the sum, by name; 1 where it is not given.

        Raises:
            ValueError: wrong shapes, unequal counts, nothing hidden, a predicted token that is visible, or the features
                of a target are missing.
        """
        packing = self.encoder.packing(clips, visible, predicted)
        if packing.hidden.shape[1] == 0:
            raise ValueError("nothing is hidden, so there is nothing to predict; encode() takes whole clips")
        student = self._features(clips, packing)
        tokens, config = student.tokens, self.encoder.config
        trunk = self.decoder.trunk(tokens, packing) if self.predicts_hidden else tokens
        losses: dict[str, Tensor] = {}
        if self.predicts_pixels:
            prediction = self.decoder.predict(trunk, tokens.shape[1])
            target = patch_target(take_patches(clips, config.tubelet, config.patch, packing.predicted), self.target)
            dtype = torch.promote_types(target.dtype, torch.float32)  # float32 at least, under autocast too
            losses["pixels"] = F.mse_loss(prediction.to(dtype), target.to(dtype))
        else:
            prediction = target = tokens.new_zeros(len(tokens), 0, config.tubelet * config.patch**2 * config.channels)
        for each in self.targets:
            losses[each.name] = self._feature_loss(each, student, trunk, packing, features or {})
        weighted = [loss * weights[name] if weights and name in weights else loss for name, loss in losses.items()]
        result = AutoencoderOutput(sum(weighted[1:], weighted[0]), prediction, target, tokens)
        return result if features is None and weights is None else TargetsOutput(*result, losses)

    def _feature_loss(
        self, target: FeatureTarget, student: Features, trunk: Tensor, packing: Packing, features: Mapping[str, Tensor]
    ) -> Tensor:
        """Return how far the head of a target is from the teacher's features."""
        shape = (packing.clips, prod(self.grid), target.width)
        if target.name not in features or features[target.name].shape != shape:
            given = tuple(features[target.name].shape) if target.name in features else "missing"
            raise ValueError(f"the features of the target {target.name} are {given}; expected (B, N, width) = {shape}")
        head = self.feature_heads[target.name]
        if target.tokens == "hidden":
            prediction, index = head(trunk, student.tokens.shape[1]), packing.predicted
        elif target.layer is None:
            prediction, index = head(student.tokens), packing.keep
        else:
            prediction, index = head(packing.visible_of_computed(student.pyramid[target.layer - 1])), packing.keep
        return feature_loss(prediction, take_tokens_of_clips(features[target.name], index), target.loss)

    def _hub_folder(self) -> Folder:
        return Folder(self.architecture, {"model": asdict(self.decoder.config)})

    def _hub_tensors(self) -> dict[str, Tensor]:
        """Return the tensors without the heads of features, as a run's model is loaded."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("feature_heads.")}

    @classmethod
    def _from_config(cls, found: Folder) -> Autoencoder:
        return cls(AutoencoderConfig(**found.model))

    @torch.no_grad()
    def reconstruct(self, clips: Tensor, visible: Tensor) -> Tensor:
        """Return the clips `(B, C, T, H, W)` with every hidden patch replaced by the model's prediction.

        With a normalised target the model predicts no patch mean or variance: those of the original are put back, and
        a caption of the result must say so.
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

    def multiply_adds(self, num_visible: int, num_predicted: int | None = None) -> dict[str, int]:
        """Return the forward multiply-adds of one clip, by part.

        Args:
            num_visible: number of visible tokens.
            num_predicted: number of predicted tokens; `None` = all hidden.
        """
        parts = self.encoder.multiply_adds(num_visible)
        tokens = prod(self.grid)
        if self.fusion is not None:
            computed = num_visible if self.encoder.config.implementation == "packed" else tokens
            parts["fusion"] = multiply_adds(self.fusion, computed)
        num_predicted = tokens - num_visible if num_predicted is None else num_predicted
        parts["decoder"] = 0
        if self.predicts_hidden:
            parts["decoder"] = self.decoder.multiply_adds(num_visible, num_predicted, self.predicts_pixels)
        for each in self.targets:
            head = cast(VisibleHead | HiddenHead, self.feature_heads[each.name])
            parts["decoder"] += head.multiply_adds(num_visible, num_predicted)
        return parts


def patch_target(patches: Tensor, target: Target) -> Tensor:
    """Normalise the pixels `(B, k, pt, P, P, C)` of patches; return `(B, k, pixels)` in the order (pt, ph, pw, c).

    `patch` normalises over all values of a patch (MAE: `sqrt(var + 1e-6)`), `patch_channel` over each channel's
    (VideoMAE: `sqrt(var) + 1e-6`), both with unbiased variance; `none` leaves the pixels.
    """
    if target != "none":
        mean, scale = _patch_statistics(patches, target)
        patches = (patches - mean) / scale
    return patches.flatten(2)


def predict_nothing(clips: Tensor, visible: Tensor, targets: Tensor, target: Target) -> Tensor:
    """Return the loss of a model that has learned nothing: a scalar to compare a model's loss with.

    It knows a mean alone. Of normalised patches that is zero, and the loss nearly 1: a patch of n equal values counts
    0, any other (n - 1) / n (the variance is unbiased; eps aside). Of pixels it is the mean colour of the clip's
    visible patches.

    Args:
        clips: `(B, C, T, H, W)`.
        visible: `(B, t, h, w)` or `(B, masks, t, h, w)` bool, on any device.
        targets: `(B, k, pixels)`, of each mask, as in `AutoencoderOutput`.
        target: their kind.
    """
    if target == "none":
        t, h, w = visible.shape[-3:]
        colours = clips.unflatten(4, (w, -1)).unflatten(3, (h, -1)).unflatten(2, (t, -1)).mean(dim=(3, 5, 7))
        shown = visible.to(clips.device, non_blocking=True).reshape(len(clips), -1, 1, t, h, w)  # by clip and mask
        space = (3, 4, 5)
        colour = torch.where(shown, colours[:, None], 0.0).sum(dim=space) / shown.sum(dim=space)
        targets = targets.unflatten(2, (-1, clips.shape[1])) - colour.flatten(0, 1)[:, None, None]
    return targets.square().mean()


def undo_target(prediction: Tensor, patches: Tensor, target: Target) -> Tensor:
    """Scale predictions `(B, k, pixels)` back to pixels `(B, k, pt, P, P, C)`, by the statistics of `patches`."""
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
    implementation: Implementation = "packed",
    **overrides: Any,
) -> Autoencoder:
    """Build a masked autoencoder of a named size.

    Args:
        size: tiny, small, base, large, huge; vit_tiny .. vit_huge are plain ViTs.
        num_frames: 1 makes an image model: tubelet 1, temporal kernel 1, the image decoder, target `patch`. More make a
            video model: tubelet 2, temporal kernel 3, the video decoder, target `patch_channel`.
        image_size: pixels, one number or (height, width).
        msd: build the multi-scale fusion.
        implementation: `packed` or `dense`.
        **overrides: any other field of `AutoencoderConfig`.

    Raises:
        ValueError: an unknown size or a number that does not fit.
        TypeError: an unknown override.
    """
    given = {"size": size, "num_frames": num_frames, "image_size": image_size}
    return Autoencoder(apply_overrides(AutoencoderConfig, overrides, msd=msd, implementation=implementation, **given))
