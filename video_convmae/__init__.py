"""VideoConvMAE: masked autoencoding of video and images with hybrid conv-transformer encoders."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; at run time see __getattr__
    from video_convmae import masking
    from video_convmae.data.decoding import count_frames, read_frames
    from video_convmae.models.autoencoder import create_autoencoder
    from video_convmae.models.classifier import create_classifier
    from video_convmae.models.probe import create_probe
    from video_convmae.predictor import Predictor, load
    from video_convmae.weights.load import load_weights

__version__ = "0.1.0"
__all__ = [
    "Predictor",
    "count_frames",
    "create_autoencoder",
    "create_classifier",
    "create_probe",
    "load",
    "load_weights",
    "masking",
    "read_frames",
]

# Imported on first use: a reading process and `--help` import parts of this package without paying for torch.
_HOMES = {
    "Predictor": "video_convmae.predictor",
    "count_frames": "video_convmae.data.decoding",
    "create_autoencoder": "video_convmae.models.autoencoder",
    "create_classifier": "video_convmae.models.classifier",
    "create_probe": "video_convmae.models.probe",
    "load": "video_convmae.predictor",
    "load_weights": "video_convmae.weights.load",
    "read_frames": "video_convmae.data.decoding",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "masking":
        return importlib.import_module("video_convmae.masking")
    raise AttributeError(f"module 'video_convmae' has no attribute {name!r}")
