"""Our own names: models, checkpoints of runs, converted files and bare state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import isqrt
from typing import Any, TypeVar

from torch import nn

from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.sizes import EncoderConfig

from ..files import Tensors
from ..state import PARTS, Weights, embedding_weights, summarize_names

_STATED = ("strides", "tubelet", "channels", "heads", "grid", "position_table")  # by a model's or run's configuration
MARKER = "encoder.embeddings.0.linear.weight"
Value = TypeVar("Value")


def from_model(model: nn.Module) -> Weights:
    """Take the weights of an Autoencoder or Classifier, with the properties of its encoder."""
    if not isinstance(model, (Autoencoder, Classifier)):
        raise ValueError(f"a {type(model).__name__}; expected an Autoencoder or a Classifier")
    tensors = model.state_dict()
    tensors = rename_norm(tensors) if isinstance(model, Classifier) else tensors
    return Weights("VideoConvMAE", tensors, **_properties(model.encoder.config))


def from_tensors(tensors: Tensors, contents: Mapping[str, Any]) -> Weights:
    """Take tensors with our names. The contents of their file may state what they do not determine."""
    if unknown := [name for name in tensors if name.split(".")[0] not in PARTS]:
        raise ValueError(f"weights with names that no model of ours has: {summarize_names(unknown)}")
    tensors = rename_norm(tensors) if "head.weight" in tensors else tensors
    config, geometry = contents.get("config"), contents.get("geometry")
    model = config.get("model") if isinstance(config, Mapping) else None
    if isinstance(model, Mapping) and {"size", "num_frames", "image_size"} <= model.keys():  # a run's
        options = {name: model[name] for name in EncoderConfig.__dataclass_fields__ if model.get(name) is not None}
        properties = _properties(EncoderConfig(**options)) | {"heads": model.get("heads")}
    elif isinstance(geometry, Mapping):  # `Weights.geometry`, of a converted file
        properties = {name: tuple(value) if isinstance(value, list) else value for name, value in geometry.items()}
    else:
        properties = _guess(tensors)
    return Weights("VideoConvMAE", tensors, **properties)


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
