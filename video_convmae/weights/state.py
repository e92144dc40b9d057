"""`Weights`: the tensors of a model under our names, with the properties that their shapes do not determine.

Letters: N tokens, D width of a token.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from video_convmae.errors import UserError
from video_convmae.masking import Grid
from video_convmae.models.positions import TABLES
from video_convmae.models.sizes import Pool, PositionTable, Target

from .files import Tensors

# Of a model; only the encoder is required. `norm` is over tokens, before a decoder or a probe's head; `fc_norm` is a
# classifier's, over the pooled tokens, `pooling` what pools them with parameters. `feature_heads` predict a teacher's
# features in pretraining.
PARTS = ("encoder", "norm", "fc_norm", "fusion", "decoder", "feature_heads", "pooling", "head")
GEOMETRY = (
    *("strides", "tubelet", "channels", "heads", "frames", "position_table", "decoder_heads", "target"),
    *("preprocessing", "class_names", "pool", "pool_heads"),
)
POSITIONS = ("encoder.positions", "decoder.positions")


@dataclass(frozen=True)
class Weights:
    """Tensors of a model and their origin.

    format: recognised format and kind, for messages: "ConvMAE pretraining".
    tensors: tensors by our names, in our order of values. A classifier's norm is `fc_norm` here. Positions may be
        among them although a model computes its fixed tables itself.
    strides: spatial stride of each stage.
    tubelet: frames of a token.
    channels: channels of a pixel.
    heads: attention heads of the encoder, which no shape tells; None: unknown.
    frames: token frames that the positions cover, 1 for an image; None: unknown.
    grid: token grid of the positions, learnt or fixed; None: unknown.
    position_table: fixed table that the weights were trained with; None: unknown.
    decoder_heads: attention heads of the decoder; None: unknown, or no decoder.
    target: normalisation of the patches that the decoder predicts; None: unknown.
    preprocessing: how clips are made for the model, by names of a run's configuration (`data.mean`, `data.stride`,
        `test.segments`); what is unknown is not there.
    class_names: names of the head's classes; None: unknown.
    pool: what the head reads; None: unknown, or no classifier.
    pool_heads: attention heads of attentive pooling; 0: the encoder's, or none.
    names: our name -> name in the file, where it differs.
    dropped: name in the file without a counterpart here -> reason.
    notes: sentences for the report.
    guessed: strides, tubelet and channels are a guess from shapes, as for a bare state dict of ours; of a model of
        pytorchvideo, its size is.
    size: of a model of pytorchvideo, `pytorchvideo/NAME`, whose tensors are `net.*` and `head.*`; None: one of ours.
    config: configuration of the run that wrote these very tensors, as plain data; None: no run, or they were changed.
    """

    format: str
    tensors: Tensors
    strides: tuple[int, ...]
    tubelet: int = 1
    channels: int = 3
    heads: int | None = None
    frames: int | None = None
    grid: Grid | None = None
    position_table: PositionTable | None = None
    decoder_heads: int | None = None
    target: Target | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    pool: Pool | None = None
    pool_heads: int = 0
    names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    guessed: bool = False
    size: str | None = None
    config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.grid is not None:
            object.__setattr__(self, "frames", self.grid[0])

    def __str__(self) -> str:
        frames = "" if self.frames is None else f", {self.frames * self.tubelet} frames"
        kernels = f"tubelet {self.tubelet}, temporal kernel {self.temporal_kernel}"
        return f"{self.format}: {len(self.strides)} stages, {kernels}{frames}"

    @property
    def temporal_kernel(self) -> int:
        """Frames of the depthwise kernels; 1 for a plain ViT."""
        kernel = self.tensors.get("encoder.conv_stages.0.0.depthwise.weight")
        return 1 if kernel is None else kernel.shape[2]

    @property
    def is_image(self) -> bool:
        """True if a token has one frame, no convolution spans frames, and positions are not known to cover several."""
        return self.tubelet == 1 and self.temporal_kernel == 1 and self.frames in (None, 1)

    @property
    def says_clip(self) -> bool:
        """True if a configuration or a table of positions determines frames and pixels of a clip."""
        return self.grid is not None or POSITIONS[0] in self.tensors

    @property
    def geometry(self) -> dict[str, Any] | None:
        """Plain data for `save_file`, so that nothing is guessed when the file is read; None if it was guessed here."""
        if self.guessed:
            return None
        grids = [self.grid] if self.grid else self.fixed_grids(POSITIONS[0])
        saved = {name: getattr(self, name) for name in GEOMETRY}
        return {**saved, "grid": grids[0] if len(grids) == 1 else None}

    def stating(self, origin: str, properties: Mapping[str, Any]) -> Weights:
        """Return these weights with what a configuration states about them; what it states as None stays as it is.

        Args:
            origin: the configuration, for messages: "config.json".
            properties: fields of this class, lists in place of tuples allowed.

        Raises:
            UserError: a statement contradicts the tensors, or what their format determines.
        """
        stated: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in properties.items()
            if value is not None
        }
        known = {} if self.guessed else {name: getattr(self, name) for name in ("strides", "tubelet", "channels")}
        width = embedding_weights(self.tensors)[-1].shape[0]
        for name, value in known.items():
            if stated.get(name, value) != value:
                raise UserError(f"{origin} says {name} {stated[name]}, and the tensors are of {name} {value}")
        for name, wide in (("heads", width), ("decoder_heads", len(self.tensors.get("decoder.norm.weight", ())))):
            if wide and wide % stated.get(name, 1):
                raise UserError(f"{origin} says {stated[name]} {name.replace('_', ' ')}, which do not divide {wide}")
        classes, names = self.num_classes, stated.get("class_names")
        if names is not None and classes is not None and len(names) != classes:
            raise UserError(f"{origin} names {len(names)} classes, and the head of these tensors has {classes}")
        return replace(self, **stated)

    @property
    def num_classes(self) -> int | None:
        """Classes of the head; None: there is none, or it does not determine them."""
        biases = ("head.bias", "head.linear.bias")
        return next((len(self.tensors[name]) for name in biases if name in self.tensors), None)

    def has(self, part: str) -> bool:
        """Return True if a part is present; a decoder without its embedding is not. A probe has `head.linear`."""
        start = "decoder.embedding." if part == "decoder" else f"{part}."
        return any(name.startswith(start) for name in self.tensors)

    def without(self, *parts: str) -> Weights:
        """Return these weights without some of positions, norm, fusion, decoder and head."""
        prefixes = tuple(f"{part}." for part in parts) + (("fc_norm.",) if "norm" in parts else ())
        excluded = POSITIONS if "positions" in parts else ()
        kept = {n: t for n, t in self.tensors.items() if n not in excluded and not n.startswith(prefixes)}
        weights = replace(self, tensors=kept, config=None if parts else self.config)
        return replace(weights, grid=None, position_table=None) if excluded else weights

    def fixed_grids(self, name: str, kind: PositionTable | None = None, frames: int | None = None) -> list[Grid]:
        """Return the grids over which the positions `name`, `(1, N, D)`, equal a fixed table to rounding.

        Empty: they were learnt or are absent. Several: the table does not distinguish grids, as the flat one. The kind
        of table is by default the weights' own, and so are the token frames, else 1.
        """
        if name not in self.tensors:
            return []
        table, frames = self.tensors[name], frames or self.frames or 1
        tokens, width = table.shape[-2:]
        per_frame, rest = divmod(tokens, frames)
        if rest or width % 4:  # no table has this number of tokens, or this width
            return []
        fixed = TABLES[kind or self.position_table or "sincos"]
        # As stored: values are below 2, where neighbours are eps apart. Learnt positions differ by more.
        rounding = max(1e-4, torch.finfo(table.dtype).eps)
        first = fixed((min(frames, 2), 1, 1), width)[0]  # of a table over any grid: learnt ones are known at once
        if (table[0, 0].float() - first).abs().max() > rounding:
            return []
        grids = [(frames, h, per_frame // h) for h in range(1, per_frame + 1) if per_frame % h == 0]
        return [grid for grid in grids if (table.float() - fixed(grid, width)).abs().max() <= rounding]

    def state_dict(self) -> Tensors:
        """Return the state dict of our model: a classifier or probe if there is a head, else an autoencoder.

        Raises:
            ValueError: the decoder's positions were learnt; ours are fixed.
        """
        name = POSITIONS[1]
        if self.has("decoder") and name in self.tensors and not self.fixed_grids(name):
            raise ValueError(
                f"{self.names.get(name, name)} was learnt, or is of another kind, and our decoder has the fixed table: "
                "exclude decoder, or exclude positions to take our table instead"
            )
        tensors = {n: t for n, t in self.tensors.items() if n != name and not n.startswith("feature_heads.")}
        if self.has("head.linear") or self.has("head.features"):
            return tensors
        if self.has("head"):
            return {n.removeprefix("fc_"): t for n, t in tensors.items() if not n.startswith("norm.")}
        if self.fixed_grids(POSITIONS[0]):
            del tensors[POSITIONS[0]]
        return {n: t for n, t in tensors.items() if not n.startswith("fc_norm.")}


def embedding_weights(tensors: Tensors) -> list[Tensor]:
    """Return the weights of the stages' embeddings in order."""
    return [t for name, t in sorted(tensors.items()) if re.fullmatch(r"encoder\.embeddings\.\d\.linear\.weight", name)]


def summarize_names(names: Iterable[str]) -> str:
    """Join names; those that differ only from their first number on are one, with their count."""
    heads = Counter(re.sub(r"\.\d.*", "...", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in heads.items())
