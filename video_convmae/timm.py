"""The image encoders as models of timm. Importing this registers them:

    import timm, video_convmae.timm
    timm.create_model("convmae_base", num_classes=10, drop_path_rate=0.1)
    timm.create_model("convmae_base", features_only=True, img_size=512)
    timm.create_model("convmae_base", num_classes=0, checkpoint_path="convmae_base.pth")

Names: convmae_tiny, _small, _base, _large, _huge. Pictures may have any size: positions are resized, and a size that is
no multiple of 16 is padded with zeros, as in `dense.Backbone`. Weights of any format that `load_weights` reads load.

Letters: B pictures, H W their pixels; h w the token grid, N = h*w; D width of a token, C channels of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from video_convmae.dense.backbone import Backbone
from video_convmae.dense.options import BackboneConfig
from video_convmae.models.blocks import AttentionBlock, ConvBlock
from video_convmae.models.classifier import init_head
from video_convmae.models.sizes import SIZES, size_named
from video_convmae.weights.formats import read_weights
from video_convmae.weights.load import load_weights

NAMES = [f"convmae_{size}" for size in SIZES if not size.startswith("vit_")]


class ConvMAE(nn.Module):
    """An image classifier with timm's methods; the tensors have the names of `Classifier`, and compute the same.

    Args:
        size: tiny to huge.
        num_classes: 0 for pooled features.
        img_size: pixels that the positions are made for, rounded up to whole tokens; inputs may have others.
        in_chans: channels of a picture.
        global_pool: avg, max, avgmax, catavgmax, or nothing for maps.
        drop_rate: of dropout before the classifier. drop_path_rate: stochastic depth of the last block.
        head_init_std: deviation of the classifier's initial weights.
        device, dtype: of the parameters.
        options: other fields of `BackboneConfig`.
    """

    output_fmt = "NCHW"

    def __init__(
        self,
        size: str = "base",
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        head_init_std: float = 2e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        token = prod(options.get("strides") or size_named(size).strides)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        config = BackboneConfig(
            size=size,
            image_size=(height + -height % token, width + -width % token),
            channels=in_chans,
            drop_path=drop_path_rate,
            **options,
        )
        self.encoder = Backbone(config)
        self.in_chans, self.head_init_std = in_chans, head_init_std
        self.num_features = self.head_hidden_size = self.encoder.width
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=1e-6)
        self.global_pool: nn.Module = nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        strides = accumulate(config.strides, mul)
        modules = [*(f"encoder.conv_stages.{i}" for i in range(len(config.widths) - 1)), "encoder.attention_blocks"]
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": module}
            for width, stride, module in zip(config.widths, strides, modules)
        ]
        self.reset_classifier(num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    # Forward passes

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures `(B, C, H, W)` to logits, or without a classifier to features."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map pictures `(B, C, H, W)` to the tokens' map `(B, D, h, w)`, before the norm."""
        return self.encoder(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map `(B, D, h, w)`, normalise it, and classify unless `pre_logits`."""
        x = self.global_pool(x)
        x = self.norm(x) if x.ndim == 2 else self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.head_drop(x)
        if pre_logits or isinstance(self.head, nn.Identity):
            return x
        return self.head(x) if x.ndim == 2 else self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the stages' maps, and the output of `forward_features` first unless `intermediates_only`.

        Args:
            x: `(B, C, H, W)`.
            indices: the last so many stages, or their numbers; None: all.
            norm: apply the norm to the last stage's map; the others have none.
            stop_early: compute no stage after the last one wanted; the output is then its map.
            output_fmt: NCHW or NHWC.
            intermediates_only: return the maps alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; expected NCHW or NHWC")
        chosen, furthest = _taken(len(self.encoder.embeddings), indices)
        maps = self.encoder(x, furthest + 1 if stop_early else None)
        last = maps[-1]
        if norm and len(maps) == len(self.feature_info):
            maps = [*maps[:-1], self.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]
        taken = [maps[i] if output_fmt == "NCHW" else maps[i].permute(0, 2, 3, 1) for i in chosen]
        return taken if intermediates_only else (last, taken)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return the tokens after attention blocks, as DINO's and timm's vision transformers do.

        Args:
            x: `(B, C, H, W)`.
            n: the last so many blocks, or their numbers.
            reshape: maps `(B, D, h, w)` in place of tokens `(B, N, D)`.
            return_prefix_tokens: there are none; must be False.
            norm: apply the norm.
        """
        if return_prefix_tokens:
            raise ValueError("return_prefix_tokens is True; expected False: this encoder has no class token")
        chosen, _ = _taken(len(self.encoder.attention_blocks), n)
        outputs: list[Tensor] = []
        hooks = [
            self.encoder.attention_blocks[i].register_forward_hook(lambda *call: outputs.append(call[-1]))
            for i in sorted(set(chosen))
        ]
        try:
            last = self.encoder(x)[-1]
        finally:
            for hook in hooks:
                hook.remove()
        height, width = last.shape[2:]
        maps = dict(zip(sorted(set(chosen)), outputs))
        tokens = [self.norm(maps[i]) if norm else maps[i] for i in chosen]  # (B, h, w, D)
        tokens = [each[:, :height, :width] for each in tokens]
        return tuple(each.permute(0, 3, 1, 2) if reshape else each.flatten(1, 2) for each in tokens)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvMAE:
        """Change all tensors, as a module's `to` and the like do; depthwise kernels (C, 1, 1, k, k) without the frame.

        `to(memory_format=torch.channels_last)`, as of timm's train.py, refuses five dimensions.
        """
        return super()._apply(lambda t: fn(t.squeeze(2)).unsqueeze(2) if t.ndim == 5 else fn(t), recurse)

    # The classifier, and parts that timm removes

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier; 0 classes: none."""
        if global_pool is not None:
            pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
            width = self.num_features * pool.feat_mult()
            if width != self.head_hidden_size:
                norm = nn.LayerNorm(width, eps=1e-6).to(next(self.encoder.parameters()))
                self.norm, self.head_hidden_size = norm, width
            self.global_pool = pool
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.head_hidden_size, num_classes).to(next(self.encoder.parameters()))
            init_head(self.head, self.head_init_std)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the stages at `indices` do not need, and return their numbers.

        The norm and the head are of the last stage, and go with it; pictures are then mapped to the last map left.
        """
        stages = len(self.encoder.embeddings)
        chosen, furthest = _taken(stages, indices)
        is_cut = furthest + 1 < stages
        if is_cut:
            self.encoder.prune(furthest + 1)
            self.num_features = self.head_hidden_size = self.feature_info[furthest]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        if prune_norm or is_cut:
            self.norm = nn.Identity()
        return chosen

    # Training

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that do not decay, beside vectors."""
        return {"encoder.positions"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the groups of layer decay, as released: all before the attention blocks is the first."""
        stem = r"^encoder\.(?:positions|embeddings|conv_stages|projection)"
        return {"stem": stem, "blocks": [(r"^encoder\.attention_blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass."""
        for block in self.encoder.modules():
            if isinstance(block, (ConvBlock, AttentionBlock)):
                block.__dict__.pop("forward", None)
                if enable:  # the method is wrapped, not the module, whose parameters would change their names
                    block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]

    # Weights

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of this model or, what it also takes, weights of any format that `load_weights` reads.

        Those are translated; positions are resized. Without `strict`, or in a model without a head, a head or norm
        that is missing or of another shape stays new.

        Raises:
            RuntimeError: `strict`, and the head or its norm is missing or of another shape; the model is unchanged.
            ValueError: as `load_weights`.
        """
        own = self.state_dict()
        same = {n: t for n, t in state_dict.items() if n in own and getattr(t, "shape", None) == own[n].shape}
        if same.keys() == state_dict.keys():
            return super().load_state_dict(state_dict, strict, assign)
        weights = read_weights(state_dict)
        found = {n.removeprefix("fc_"): t for n, t in weights.tensors.items() if n.startswith(("fc_norm.", "head."))}
        head = {n: t for n, t in found.items() if n in own and t.shape == own[n].shape}
        missing = [n for n in own if not n.startswith("encoder.") and n not in head]
        if strict and self.num_classes and missing:
            ours = ", ".join(f"{n} {tuple(own[n].shape)}" for n in missing)
            theirs = ", ".join(f"{n} {tuple(found[n].shape)}" for n in missing if n in found) or "none of them"
            raise RuntimeError(
                f"the model has {ours} and the weights have {theirs}; expected the same: create the model with the "
                "file's num_classes, or with num_classes=0 and call reset_classifier() after loading; "
                "load_state_dict(..., strict=False) keeps what is new"
            )
        load_weights(self.encoder, weights)
        super().load_state_dict(head, strict=False)
        unexpected = [n for n in state_dict if n.startswith("head.") and n not in head]
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)


def _taken(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    given = indices if indices is None or isinstance(indices, int) else list(indices)
    return feature_take_indices(count, given)


def _register(name: str, size: str) -> None:
    """Register a size under a name."""

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        options.setdefault("size", size)
        return build_model_with_cfg(
            ConvMAE, name, pretrained, feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"}, **options
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"ConvMAE's image encoder, {size}."
    create.__module__ = __name__
    register_model(create)


__all__ = ["ConvMAE"]

default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (14, 14),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "fixed_input_size": False,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "encoder.embeddings.0.linear",
            "classifier": "head",
        }
        for name in NAMES
    }
)
for _name in NAMES:
    _register(_name, _name.removeprefix("convmae_"))
