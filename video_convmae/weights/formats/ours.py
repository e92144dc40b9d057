"""Our own names: models, checkpoints of runs, converted files and bare state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from math import isqrt
from typing import Any, TypeVar

from torch import nn

from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.lora import merge_lora, stated_scale
from video_convmae.models.sizes import EncoderConfig

from ..files import Tensors
from ..state import GEOMETRY, PARTS, Weights, embedding_weights, summarize_names

_STATED = ("strides", "tubelet", "channels", "heads", "grid", "position_table")  # by a model's or run's configuration
_PREPROCESSING = (  # by a run's
    *("data.format", "data.mean", "data.std", "data.sampling", "data.stride", "data.fps"),
    "data.multi_label",
    "data.augmentation.interpolation",
    *("test.segments", "test.crops", "test.crop_pct"),
)
MARKER = "encoder.embeddings.0.linear.weight"
ALONE = MARKER.removeprefix("encoder.")  # the same in an encoder that was saved without the rest
Value = TypeVar("Value")


def from_model(model: nn.Module) -> Weights:
    """Take the weights of an Autoencoder or Classifier, with the properties of its encoder."""
    if not isinstance(model, (Autoencoder, Classifier)):
        raise ValueError(f"a {type(model).__name__}; expected an Autoencoder or a Classifier")
    tensors = model.state_dict()
    if isinstance(model, Classifier):
        tensors = rename_norm(merge_lora(tensors, model.config.lora_scale))
    properties = _properties(model.encoder.config)
    if isinstance(model, Classifier):
        properties |= {"pool": model.config.pool, "pool_heads": model.config.pool_heads}
    if isinstance(model, Autoencoder):
        properties |= {"decoder_heads": model.decoder.config.decoder[2], "target": model.target}
    return Weights("VideoConvMAE", tensors, **properties)


def from_tensors(tensors: Tensors, contents: Mapping[str, Any]) -> Weights:
    """Take tensors with our names. The contents of their file may state what they do not determine."""
    if unknown := [name for name in tensors if name.split(".")[0] not in PARTS]:
        raise ValueError(f"weights with names that no model of ours has: {summarize_names(unknown)}")
    config, geometry = contents.get("config"), contents.get("geometry")
    model = config.get("model") if isinstance(config, Mapping) else None
    tensors = merge_lora(tensors, stated_scale(model))
    tensors = rename_norm(tensors) if "head.weight" in tensors else tensors
    if isinstance(model, Mapping) and {"size", "num_frames", "image_size"} <= model.keys():  # a run's
        assert isinstance(config, Mapping)
        options = {name: model[name] for name in EncoderConfig.__dataclass_fields__ if model.get(name) is not None}
        encoder = _properties(EncoderConfig(**options)) | {"heads": model.get("heads")}
        weights = Weights("VideoConvMAE", tensors, **encoder, config=config)
        return weights.stating("the run's configuration", run_properties(config, weights))
    if isinstance(geometry, Mapping) and geometry.get("strides"):  # `Weights.geometry`, of a converted file
        weights = Weights("VideoConvMAE", tensors, tuple(geometry["strides"]), guessed=True)
        return replace(weights.stating("the file's metadata", known_properties(geometry)), guessed=False)
    return Weights("VideoConvMAE", tensors, **_guess(tensors))


def known_properties(geometry: Mapping[str, Any]) -> dict[str, Any]:
    """Return those entries of a file's `Weights.geometry` that this version knows."""
    return {name: geometry[name] for name in (*GEOMETRY, "grid") if name in geometry}


def run_properties(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Return what the configuration of a run states beside the encoder."""
    model, data = config["model"], config.get("data") or {}
    labels = data.get("labels")
    properties: dict[str, Any] = {
        "preprocessing": {name: value for name in _PREPROCESSING if (value := _field(config, name)) is not None},
        "class_names": labels if isinstance(labels, (list, tuple)) and weights.num_classes else None,
        "pool": model.get("pool"),
        "pool_heads": model.get("pool_heads"),
    }
    if weights.has("decoder"):
        decoder, target = model.get("decoder"), model.get("target")
        properties |= {
            "decoder_heads": decoder[2] if decoder else None,
            "target": None if target == "auto" else target,
        }
    return properties


def _field(config: Mapping[str, Any], name: str) -> Any:
    """Return a field of a configuration by its dotted name; None: it is not there."""
    value: Any = config
    for word in name.split("."):
        value = value.get(word) if isinstance(value, Mapping) else None
    return value


def rename_norm(values: Mapping[str, Value]) -> dict[str, Value]:
    """Rename a classifier's `norm.*` to `fc_norm.*`, its name in `Weights`."""
    return {"fc_" + name if name.startswith("norm.") else name: value for name, value in values.items()}


def _properties(config: EncoderConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _STATED}


def _guess(tensors: Tensors) -> dict[str, Any]:
    """Guess the properties from shapes, for three channels and the smallest tubelet that leaves square patches."""
    kernels = embedding_weights(tensors)
    areas = [kernel.shape[1] // before.shape[0] for before, kernel in pairwise(kernels)]
    area, tubelet = kernels[0].shape[1] // 3, 1
    while area % tubelet or isqrt(area // tubelet) ** 2 * tubelet != area:
        tubelet += 1
    return {"strides": tuple(map(isqrt, (area // tubelet, *areas))), "tubelet": tubelet, "guessed": True}
