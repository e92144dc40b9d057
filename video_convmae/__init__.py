"""VideoConvMAE: masked autoencoding of video and images with hybrid conv-transformer encoders."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Names are imported when first used: a decoding process imports `video_convmae.data.decoding` without paying for torch.
_HOMES = {
    "create_autoencoder": "video_convmae.models.autoencoder",
    "create_classifier": "video_convmae.models.classifier",
    "create_probe": "video_convmae.models.probe",
    "load": "video_convmae.predictor",
    "load_weights": "video_convmae.weights.load",
}
__all__ = ["create_autoencoder", "create_classifier", "create_probe", "load", "load_weights", "masking"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "masking":
        return importlib.import_module("video_convmae.masking")
    raise AttributeError(f"module 'video_convmae' has no attribute {name!r}")
