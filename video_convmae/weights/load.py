"""Load weights into our models.

    load_weights(model, "convmae_base.pth")                                     # prints as a report
    model, report = model_from("videomae_k400.pth", num_frames=16)              # a model of the file's sizes
    load_weights(video_model, "convmae_base.pth", inflation=Inflation())        # image weights start a video run

Letters: N tokens, D width of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from math import isqrt, prod
from typing import Any, Literal

import torch
from torch import nn

from video_convmae.masking import Grid
from video_convmae.models import positions
from video_convmae.models.autoencoder import Autoencoder, FusedEncoder, create_autoencoder
from video_convmae.models.classifier import Classifier, create_classifier
from video_convmae.models.encoder import Encoder
from video_convmae.models.probe import Probe
from video_convmae.models.sizes import SIZES, EncoderConfig

from .files import Tensors
from .formats import Source, read_weights
from .formats.base import NO_CLS
from .formats.ours import rename_norm
from .inflate import inflate
from .options import EXCLUDABLE, Inflation
from .state import PARTS, POSITIONS, Weights, embedding_weights, summarize_names


@dataclass(frozen=True)
class LoadReport:
    """Result of loading weights.

    format: recognised format and kind.
    loaded: our names that were filled.
    missing: our names that the file does not hold; they keep their initial values.
    unexpected: names in the file without a place in the model.
    reshaped: our names whose tensors had another shape: positions, which were resized (loaded), and a head for other
        classes (new).
    notes: remarks in sentences.
    """

    format: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.format}: {len(self.loaded)} tensors loaded"]
        for title in ("missing", "unexpected", "reshaped"):
            lines.append(f"  {title}: {summarize_names(getattr(self, title)) or 'none'}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def load_weights(
    model: Autoencoder | Classifier | Probe | Encoder,
    source: Source,
    *,
    inflation: Inflation | None = None,
    exclude: Collection[str] = (),
) -> LoadReport:
    """Load weights of any known format into a model. An error leaves the model unchanged.

    The encoder must be in the file and fit. Norm, fusion, decoder and head are loaded if the file has them, and are
    else reported as missing. A head for another number of classes stays new; learnable positions of another grid are
    resized; a fixed position table is compared with the model's own. Parts of the file without a place in the model,
    as a decoder for a classifier, are reported as unexpected. A probe does not train the norm and fusion that it reads:
    the file must have them, too.

    Args:
        model: model to fill, not wrapped.
        source: as in `read_weights`.
        inflation: conversion of image weights for a video model; then a decoder that does not fit stays new.
        exclude: parts that are not loaded: positions, norm, fusion, decoder, head.

    Raises:
        ValueError: as `read_weights`; the encoder or another part does not fit; positions of another kind, or of an
            ambiguous grid; image weights for a video model without `inflation`; a head that was not trained on the mean
            over tokens; no norm or fusion for a probe that reads it; a fusion that the model would not read.
    """
    if unknown := sorted(set(exclude) - set(EXCLUDABLE)):
        raise ValueError(f"exclude has {', '.join(unknown)}; expected some of {', '.join(EXCLUDABLE)}")
    whole = read_weights(source)
    config = model.config if isinstance(model, Encoder) else model.encoder.config
    weights = _resolve_frames(_resolve_strides(whole.without(*exclude), config), config, inflation)
    inflated = weights.is_image and config.num_frames > 1
    if inflated and inflation is None:
        raise ValueError(
            f"{weights.format} weights of an image model for a video model: load them with an Inflation, or inflate "
            "them (video-convmae inflate)"
        )
    if inflated and inflation is not None:
        kernels = {"tubelet": config.tubelet, "temporal_kernel": config.temporal_kernel}
        weights = inflate(weights, num_frames=config.num_frames, **kernels, **asdict(inflation))
    _check_parts(model, weights, whole)
    excluded = [f"left out as asked: {', '.join(exclude)}"] if exclude else []
    plan = _Plan(model, config, weights, notes=[*weights.notes, *_notes_on_parts(model, whole), *excluded])
    plan.add_positions()
    for part in PARTS:
        plan.add_part(part, may_be_new=inflated and part == "decoder")
    if "decoder.mask_token" in plan.values and POSITIONS[1] in weights.tensors:
        plan.compare_table(POSITIONS[1])
    return plan.load()


def _resolve_strides(weights: Weights, config: EncoderConfig) -> Weights:
    """Replace guessed strides, tubelet and channels by the model's, if its embeddings have the same shapes."""
    inputs = (config.channels * config.tubelet, *config.widths[:-1])
    expected = [values * stride**2 for values, stride in zip(inputs, config.strides)]
    same = expected == [kernel.shape[1] for kernel in embedding_weights(weights.tensors)]
    if not weights.guessed or not same or weights.temporal_kernel != _temporal_kernel(config):
        return weights
    return replace(weights, strides=config.strides, tubelet=config.tubelet, channels=config.channels)


def _resolve_frames(weights: Weights, config: EncoderConfig, inflation: Inflation | None) -> Weights:
    """Determine if weights are of images or of clips where both have the same shapes: tubelet and temporal kernel 1.

    Only the positions differ then; without them an inflation would change nothing.
    """
    same_shapes = (config.tubelet, _temporal_kernel(config)) == (1, 1) and config.num_frames > 1
    if not same_shapes or not weights.is_image or weights.frames is not None:
        return weights
    if POSITIONS[0] in weights.tensors:
        return replace(weights, frames=_find_grid(weights, config)[0])
    return replace(weights, frames=config.grid[0] if inflation is None else 1)


def _temporal_kernel(config: EncoderConfig) -> int:
    """Frames of the model's depthwise kernels; 1 for a plain ViT, which has none."""
    return config.temporal_kernel if len(config.strides) > 1 else 1


def _check_parts(model: nn.Module, weights: Weights, whole: Weights) -> None:
    """Raise if the model would read an untrained part, or not read a part that the others were trained with.

    Args:
        model: model to fill.
        weights: weights without the excluded parts.
        whole: all weights.
    """
    if isinstance(model, Classifier) and weights.has("head") and not whole.has("fc_norm"):
        raise ValueError(
            f"the head of these {weights.format} weights was trained on one token or is a probe's, not a classifier's "
            "on the mean over tokens; exclude head to load the encoder alone"
        )
    if isinstance(model, FusedEncoder) and model.fusion is None and weights.has("fusion"):
        raise ValueError("these weights were trained with the fusion: build the model with msd=True or exclude fusion")
    read = {name.split(".")[0] for name in model.state_dict()} & {"norm", "fusion"}  # a plain ViT fuses nothing
    for part in sorted(read, reverse=True):
        if isinstance(model, Autoencoder) and weights.has("decoder") and not weights.has(part):
            raise ValueError(f"{weights.format} weights with a decoder but no {part}: msd=False, or exclude decoder")
        if isinstance(model, Probe) and not weights.has(part):
            wanted, hint = {
                "norm": ("norm over tokens", "Probe pretraining weights: a finetuned norm is over the mean of tokens"),
                "fusion": ("fusion", "Build the probe with msd=False"),
            }[part]
            raise ValueError(
                f"no {wanted} comes from these {weights.format} weights: a probe would read its own, untrained and "
                f"frozen. {hint}"
            )


def _notes_on_parts(model: nn.Module, whole: Weights) -> list[str]:
    notes = [f"{name} dropped: {reason}" for name, reason in whole.dropped.items() if reason is not NO_CLS]
    if isinstance(model, Classifier) and whole.has("norm"):
        notes.append("a classifier has no place for pretraining's norm over tokens, fusion and decoder")
    may_have_had_fusion = len(whole.strides) > 1 and (whole.has("fusion") or not whole.has("decoder"))
    if isinstance(model, Probe) and model.fusion is None and may_have_had_fusion:
        notes.append(
            "the probe reads no fusion: if these weights were pretrained with one, as the released ConvMAE was, their "
            "norm followed it and was not trained on what the probe reads"
        )
    return notes


class _Plan:
    """Tensors to load, copied at the end, so that an error leaves the model unchanged."""

    def __init__(self, model: nn.Module, config: EncoderConfig, weights: Weights, notes: list[str]) -> None:
        # State-dict entries only: fixed position tables are not among them. Names as in Weights.
        targets = model.state_dict()
        if isinstance(model, Encoder):
            targets = {f"encoder.{name}": tensor for name, tensor in targets.items()}
        self.targets = rename_norm(targets) if isinstance(model, Classifier) else targets
        self.config = config
        self.weights = weights
        self.values: Tensors = {}
        self.compared: list[str] = []
        self.reshaped: list[str] = []
        self.notes = notes

    def load(self) -> LoadReport:
        """Fill the model."""
        with torch.no_grad():
            for name, value in self.values.items():
                self.targets[name].copy_(value)
        weights = self.weights
        accounted = {*self.values, *self.reshaped, *self.compared}
        unexpected = [weights.names.get(name, name) for name in weights.tensors if name not in accounted]
        missing = [name for name in self.targets if name not in accounted]
        loaded, missing, reshaped = (
            tuple(name.removeprefix("fc_") for name in names) for names in (self.values, missing, self.reshaped)
        )
        unexpected = (*unexpected, *weights.dropped)
        return LoadReport(weights.format, loaded, missing, unexpected, reshaped, tuple(self.notes))

    def add_part(self, part: str, may_be_new: bool) -> None:
        """Load a part whole if the file has it, or leave it new and note it.

        Raises:
            ValueError: it does not fit, is not the head, and not `may_be_new`.
        """
        wanted, given = (_select(tensors, part) for tensors in (self.targets, self.weights.tensors))
        if not wanted or (part != "encoder" and not self.weights.has(part)):
            return
        faults = _compare_shapes(wanted, given)
        if not faults:
            self.values |= given
        elif part == "head" and given.keys() != wanted.keys():
            self.notes.append("the head is new: the file's is of another kind")
        elif part == "head":
            self.reshaped += sorted(wanted)
            theirs, ours = (list(tensors.values())[-1].shape[0] for tensors in (given, wanted))
            self.notes.append(f"the head is new: {theirs} classes in the file, {ours} in the model")
        elif may_be_new:
            self.notes.append(f"the {part} does not fit and is new: {faults[0]}")
        else:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            hint = "" if part == "encoder" else f", or exclude {part}"
            raise ValueError(
                f"{self.weights.format} weights do not fit the model's {part}: {'; '.join(faults[:3])}{more}. "
                f"Build the model with the arguments of model_arguments(weights){hint}"
            )

    def add_positions(self) -> None:
        """Load learnable positions, resized to the model's grid; compare fixed ones with the model's own.

        Raises:
            ValueError: positions of another kind, or over an unknown grid.
        """
        name, weights, config = POSITIONS[0], self.weights, self.config
        table, grid = weights.tensors.get(name), weights.grid
        if table is None or table.shape[-1] != config.widths[-1]:
            if weights.position_table not in (None, config.position_table):
                raise ValueError(
                    f"{weights.format} weights were trained with the {weights.position_table} position table, the "
                    f"model has {config.position_table}: build it with position_table={weights.position_table!r}"
                )
            if grid in (None, config.grid):  # the model's initial table is that of these weights
                return
            table = positions.TABLES[config.position_table](grid, config.widths[-1])[None]
        elif name not in self.targets:
            self.compare_table(name)
            return
        if name not in self.targets:
            return
        grid = grid or _find_grid(weights, config)
        self.values[name] = positions.resize(table[0], grid, config.grid)[None]
        if grid != config.grid:
            self.reshaped.append(name)
            self.notes.append(f"positions resized from the grid {grid} to {config.grid}")

    def compare_table(self, name: str) -> None:
        """Raise if positions of the file are not the fixed table over their grid; the model has its own, over its grid.

        Raises:
            ValueError: they were learnt, or are of another kind.
        """
        weights, table = self.weights, self.config.position_table
        tokens = weights.tensors[name].shape[-2]
        counts = {weights.frames} if weights.frames else _possible_frames(weights, tokens, self.config.grid) | {1}
        if not any(weights.fixed_grids(name, table, count) for count in counts):
            learn = ", or build the model with learnable_positions=True to load them" if name == POSITIONS[0] else ""
            raise ValueError(
                f"{weights.names.get(name, name)} is not the fixed {table} table that the model has: it was learnt, or "
                "is of another kind. Exclude positions (on the command line --init.exclude [positions]) to keep the "
                f"model's own{learn}"
            )
        self.compared.append(name)


def _select(tensors: Tensors, part: str) -> Tensors:
    """Return the tensors of a part without its positions."""
    return {name: t for name, t in tensors.items() if name.startswith(f"{part}.") and name not in POSITIONS}


def _compare_shapes(wanted: Tensors, given: Tensors) -> list[str]:
    shapes = [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    missing = [f"{name} is missing" for name in wanted if name not in given]
    return shapes + missing + [f"{name} has no place" for name in given if name not in wanted]


def _find_grid(weights: Weights, config: EncoderConfig) -> Grid:
    """Return the grid of the file's positions: stated, evident from the values of a fixed table, or the only possible.

    Raises:
        ValueError: none or several are possible.
    """
    if weights.grid is not None:
        return weights.grid
    tokens, fixed = weights.tensors[POSITIONS[0]].shape[-2], weights.fixed_grids(POSITIONS[0])
    if weights.guessed and tokens == prod(config.grid) and not fixed:
        return config.grid  # a state dict of this very model
    grids = fixed if len(fixed) == 1 else _possible_grids(weights, tokens, config.grid)
    if len(grids) == 1:
        return grids[0]
    fault = f"may be over the grid {' or '.join(map(str, grids))}" if grids else "are over no grid that is known here"
    raise ValueError(
        f"{weights.names.get(POSITIONS[0], POSITIONS[0])} has {tokens} tokens, which {fault}; the model's grid is "
        f"{config.grid}. Set it with dataclasses.replace(read_weights(path), grid=...), or exclude positions (on the "
        "command line --init.exclude [positions])"
    )


def _possible_grids(weights: Weights, tokens: int, model: Grid) -> list[Grid]:
    """Return the grids of this many tokens whose frames are square or the model's."""
    counts = _possible_frames(weights, tokens, model)
    sides = [(count, isqrt(tokens // count)) for count in counts]
    grids = {(count, side, side) for count, side in sides} | {(count, *model[1:]) for count in counts}
    return sorted(grid for grid in grids if prod(grid) == tokens)


def _possible_frames(weights: Weights, tokens: int, model: Grid) -> set[int]:
    """Return the numbers of token frames: the stated one; else the model's, that of the model's height and width, 1."""
    if weights.frames is not None:
        return {weights.frames}
    t, h, w = model
    return {t, tokens // (h * w), *([1] if weights.is_image else [])} - {0}


def model_from(source: Source, **overrides: Any) -> tuple[Autoencoder | Classifier, LoadReport]:
    """Build the model that weights describe and load them: a classifier if there is a head, else an autoencoder.

    `overrides` replace arguments that `model_arguments` returns: `heads`, `image_size`, `num_frames`, ...

    Raises:
        ValueError: as `read_weights`, `model_arguments` and `load_weights`.
    """
    weights = read_weights(source)
    create: Callable[..., Autoencoder | Classifier] = create_classifier if weights.has("head") else create_autoencoder
    model = create(**{**model_arguments(weights), **overrides})
    return model, load_weights(model, weights)


def model_arguments(source: Source, kind: Literal["autoencoder", "classifier"] | None = None) -> dict[str, Any]:
    """Return the arguments of `create_autoencoder` or `create_classifier` for a model that holds these weights.

    Shapes determine all but the heads, assumed as in our size of the same widths and depths, else width // 64 (in the
    decoder of an image model width // 32); and, if the file has neither grid nor positions, the clip, assumed as 16
    frames (1 for an image model) of 224x224 pixels. The grid of positions alone is assumed square.

    Args:
        source: as in `read_weights`.
        kind: model to build; None: a classifier if there is a head, else an autoencoder.

    Raises:
        ValueError: stages with different MLP ratios, or a probe's weights.
    """
    weights = read_weights(source)
    if weights.is_probe and kind is None:
        raise ValueError(
            "these are a probe's weights: video_convmae.load() reads the checkpoint of its run; else build it with "
            "create_probe and fill it with load_weights"
        )
    arguments = _encoder_arguments(weights)
    if kind == "classifier" or (kind is None and weights.has("head")):
        if weights.position_table == "flat" and POSITIONS[0] not in weights.tensors:
            arguments["learnable_positions"] = False
        return arguments | ({"num_classes": len(weights.tensors["head.bias"])} if weights.has("head") else {})
    if weights.has("decoder"):
        arguments |= _decoder_arguments(weights, arguments["size"])
    is_plain = len(weights.strides) == 1
    return arguments | {"msd": weights.has("fusion") or is_plain or not weights.has("decoder")}


def _encoder_arguments(weights: Weights) -> dict[str, Any]:
    tensors, last = weights.tensors, len(weights.strides) - 1
    stages = [*(f"encoder.conv_stages.{stage}" for stage in range(last)), "encoder.attention_blocks"]
    widths = tuple(len(kernel) for kernel in embedding_weights(tensors))
    depths = tuple(_count_blocks(tensors, stage) for stage in stages)
    named = next((name for name, size in SIZES.items() if (size.widths, size.depths) == (widths, depths)), None)
    frames = weights.frames or (1 if weights.is_image else max(1, 16 // weights.tubelet))
    arguments = {
        "size": named or ("base" if last else "vit_base"),
        "widths": widths,
        "depths": depths,
        "heads": SIZES[named].heads if named else max(1, widths[last] // 64),
        "strides": weights.strides,
        "tubelet": weights.tubelet,
        "mlp_ratio": _mlp_ratio(tensors, stages),
        "channels": weights.channels,
        "num_frames": frames * weights.tubelet,
        "image_size": _image_size(weights, frames),
    }
    if last:
        kernel = tensors["encoder.conv_stages.0.0.depthwise.weight"]
        arguments |= {"temporal_kernel": kernel.shape[2], "spatial_kernel": kernel.shape[-1]}
    return arguments | ({"position_table": "flat"} if weights.position_table == "flat" else {})


def _image_size(weights: Weights, frames: int) -> int | tuple[int, int]:
    patch, table = prod(weights.strides), weights.tensors.get(POSITIONS[0])
    if weights.grid is not None:
        height, width = (side * patch for side in weights.grid[1:])
        return height if height == width else (height, width)
    side = 0 if table is None else isqrt(table.shape[1] // frames)
    return side * patch if table is not None and side**2 * frames == table.shape[1] else 224


def _decoder_arguments(weights: Weights, size: str) -> dict[str, Any]:
    width = weights.tensors["decoder.embedding.bias"].numel()
    depth = _count_blocks(weights.tensors, "decoder.blocks")
    named = SIZES[size].image_decoder if weights.is_image else SIZES[size].video_decoder
    heads = named[2] if named[:2] == (width, depth) else max(1, width // (32 if weights.is_image else 64))
    return {
        "decoder": (width, depth, heads),
        "decoder_mlp_ratio": _mlp_ratio(weights.tensors, ["decoder.blocks"]),
        "target": "patch" if weights.is_image else "patch_channel",
    }


def _count_blocks(tensors: Tensors, blocks: str) -> int:
    return sum(name.startswith(f"{blocks}.") and name.endswith(".norm1.weight") for name in tensors)


def _mlp_ratio(tensors: Tensors, stages: list[str]) -> float:
    shapes = {tuple(t.shape) for n, t in tensors.items() if n.startswith(tuple(stages)) and n.endswith("fc1.weight")}
    ratios = sorted({hidden / width for hidden, width in shapes})
    if len(ratios) > 1:
        raise ValueError(f"the stages have MLP ratios {ratios}; ours has one for all, as the released base model")
    return ratios[0] if ratios else 4.0
