"""Options of loading and converting weights, read without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EXCLUDABLE = ("positions", "norm", "fusion", "decoder", "head")  # parts that need not be loaded
WRITABLE = ("convmae", "videomae", "huggingface")  # formats that `to_format` writes


@dataclass(frozen=True)
class Inflation:
    """Conversion of image weights to video weights."""

    embedding: Literal["average", "center"] = "average"
    """First embedding over the frames of a token: average repeats and divides, center puts the image kernel on the
    middle frame."""
    depthwise: Literal["average", "center"] = "center"
    """Depthwise kernels over time, likewise. Only center keeps the image model's tokens on a still clip: an average
    reads zero padding beyond the first and last frames and dims them."""

    def __post_init__(self) -> None:
        for name in ("embedding", "depthwise"):
            if getattr(self, name) not in ("average", "center"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected 'average' or 'center'")
