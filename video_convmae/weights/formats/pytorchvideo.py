"""pytorchvideo's published models (0.1.5), and runs of ours that finetuned one.

Tensors keep the library's names behind `net.`, but for the last linear layer: `head.weight` and `head.bias`, as in our
own models.

Sources: the library's docs/source/model_zoo.md (frames x sampling rate, views, accuracy) and the configurations that it
was measured with, PySlowFast's configs/Kinetics/pytorchvideo/*.yaml (crops; short side, `TRAIN_JITTER_SCALES[0]`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from video_convmae.errors import UserError
from video_convmae.models.sizes import LIBRARY, LIBRARY_MODELS, library_model

from ..files import Tensors
from ..state import Weights
from .ours import run_properties

MEAN, STD = [0.45, 0.45, 0.45], [0.225, 0.225, 0.225]
NET = "net."  # before the library's names in our state dict


@dataclass(frozen=True)
class Protocol:
    """How a published model was trained and tested on Kinetics-400.

    rate: published sampling rate: the T frames of a clip are spread from the first to the last of T x rate frames of a
    video of 30 a second. crop: pixels of a test crop. segments, crops: test views. crop_pct: side of a
    crop over the frame's short side. top1: published accuracy in percent; None: none in the library's table.
    """

    rate: int
    crop: int
    top1: float | None
    segments: int = 10
    crops: int = 3
    crop_pct: float = 1.0


PROTOCOLS = {
    "c2d_r50": Protocol(8, 256, 71.46),
    "i3d_r50": Protocol(8, 256, 73.27),
    "slow_r50": Protocol(8, 256, 74.58),
    "slowfast_r50": Protocol(2, 256, 76.94),
    "slowfast_r101": Protocol(2, 256, 77.90),
    "slowfast_16x8_r101_50_50": Protocol(2, 256, 78.70),
    "csn_r101": Protocol(2, 256, 77.00),
    "r2plus1d_r50": Protocol(4, 256, 76.01),
    "x3d_xs": Protocol(12, 182, 69.12),
    "x3d_s": Protocol(6, 182, 73.33),
    "x3d_m": Protocol(5, 256, 75.94),
    "x3d_l": Protocol(5, 356, 77.44),
    "mvit_base_16x4": Protocol(4, 224, 78.85, segments=5, crops=1, crop_pct=0.875),
    "mvit_base_32x3": Protocol(3, 224, 80.30, segments=5, crops=1, crop_pct=0.875),
}

# Tensors by which each is told, with their shapes; None: any. The first that fits counts.
_SAME = ("x3d_m", "x3d_s", "x3d_xs")  # equal in all shapes
_SIGNS: dict[str, dict[str, tuple[int, ...] | None]] = {
    "mvit_base_16x4": {"cls_positional_encoding.pos_embed_temporal": (1, 8, 96)},
    "mvit_base_32x3": {"cls_positional_encoding.pos_embed_temporal": (1, 16, 96)},
    "slowfast_16x8_r101_50_50": {
        "blocks.3.multipathway_blocks.0.res_blocks.22.branch2.conv_a.weight": (256, 1024, 1, 1, 1)
    },
    "slowfast_r101": {"blocks.3.multipathway_blocks.0.res_blocks.22.branch2.conv_a.weight": (256, 1024, 3, 1, 1)},
    "slowfast_r50": {"blocks.0.multipathway_blocks.0.conv.weight": None},
    "x3d_l": {
        "blocks.0.conv.conv_t.weight": None,
        "blocks.4.res_blocks.14.branch2.conv_a.weight": None,
    },
    "x3d_m": {"blocks.0.conv.conv_t.weight": None},
    "r2plus1d_r50": {"blocks.1.res_blocks.0.branch2.conv_b.conv_t.weight": None},
    "csn_r101": {
        "blocks.0.conv.weight": (64, 3, 3, 7, 7),
        "blocks.3.res_blocks.22.branch2.norm_b.weight": None,
    },
    "i3d_r50": {"blocks.0.conv.weight": (64, 3, 5, 7, 7), "blocks.5.res_blocks.0.branch2.conv_a.weight": None},
    "c2d_r50": {"blocks.0.conv.weight": (64, 3, 1, 7, 7), "blocks.5.res_blocks.0.branch2.conv_a.weight": None},
    "slow_r50": {"blocks.0.conv.weight": (64, 3, 1, 7, 7), "blocks.4.res_blocks.0.branch2.conv_a.weight": None},
}
MARKERS = (  # one of them is in every file
    "patch_embed.patch_model.weight",
    "blocks.0.multipathway_blocks.0.conv.weight",
    "blocks.0.conv.conv_t.weight",
    "blocks.0.conv.weight",
)


def is_library(tensors: Tensors) -> bool:
    """Return whether tensors have pytorchvideo's names, or ours of such a model."""
    return any(f"{prefix}{marker}" in tensors for prefix in ("", NET) for marker in MARKERS)


def read(given: Tensors, contents: Mapping[str, Any], name: str | None) -> Weights:
    """Take the tensors of a model of pytorchvideo.

    X3D-XS, S and M have the same shapes: a run's configuration tells them apart, else the name of the file, else M is
    assumed, and `guessed` says so.

    Args:
        given: by the library's names.
        contents: of the file; a run of ours states its model there.
        name: of the file, without its suffix; None: there is no file.

    Raises:
        UserError: the tensors are of no model of the library's hub.
    """
    given = {theirs.removeprefix(NET): tensor for theirs, tensor in given.items()}
    config = contents.get("config")
    config = config if isinstance(config, Mapping) and "model" in config else None
    size, guessed = _find_size(given, name) if config is None else (config["model"]["size"], False)
    names = {ours: theirs for theirs, ours in our_names(given).items()}
    short = size.removeprefix(LIBRARY)
    weights = Weights(
        f"pytorchvideo {short}",
        {ours: given[theirs] for ours, theirs in names.items()},
        strides=(),
        frames=library_model(size).num_frames,
        names=names,
        guessed=guessed,
        size=size,
        preprocessing=preprocessing(size),
        config=config,
    )
    return weights if config is None else replace(weights, **run_properties(config, weights))


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Return our name of each of the library's tensors: those of the last linear layer are `head.*`.

    It is `head.proj` in MViT, whose blocks have a `proj` of their own, and `blocks.5.proj` or `blocks.6.proj` else.
    """
    names = list(names)
    last = r"head\.proj\." if any(name.startswith("patch_embed.") for name in names) else r"blocks\.[56]\.proj\."
    return {name: re.sub(f"^{last}", "head.", name) if re.match(last, name) else NET + name for name in names}


def clip_of(weights: Weights, tested: bool) -> dict[str, Any]:
    """Return `num_frames` and `image_size` of the clips that weights were trained on, or are tested on."""
    assert weights.size is not None
    if weights.config is not None:
        return {name: weights.config["model"][name] for name in ("num_frames", "image_size")}
    known, short = library_model(weights.size), weights.size.removeprefix(LIBRARY)
    return {"num_frames": known.num_frames, "image_size": PROTOCOLS[short].crop if tested else known.image_size}


def _find_size(tensors: Tensors, name: str | None) -> tuple[str, bool]:
    """Return the size that tensors are of, and whether others have the same shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fitting = (
        short
        for short, signs in _SIGNS.items()
        if all(sign in shapes and shape in (None, shapes[sign]) for sign, shape in signs.items())
    )
    short = next(fitting, None)
    if short is None:
        raise UserError(f"no model of pytorchvideo that is known here; expected one of {', '.join(LIBRARY_MODELS)}")
    if short not in _SAME:
        return LIBRARY + short, False
    said = next((each for each in _SAME if name and re.search(rf"(?i){each}(?![a-z])", name)), None)
    return LIBRARY + (said or short), said is None


def preprocessing(size: str) -> dict[str, Any]:
    """Return how clips are made for a published model, by names of a run's configuration.

    The stride is the whole number nearest to the distance of the published frames: (T x rate - 1) / (T - 1), which is
    4.2 for MViT-B 16x4, 2.03 for SlowFast, 5.27 for X3D-M and 9 for Slow 8x8.
    """
    protocol, frames = PROTOCOLS[size.removeprefix(LIBRARY)], library_model(size).num_frames
    return {
        "data.format": "video",
        "data.mean": MEAN,
        "data.std": STD,
        "data.sampling": "dense",
        "data.stride": round((frames * protocol.rate - 1) / (frames - 1)),
        "data.augmentation.interpolation": "bilinear",
        "test.segments": protocol.segments,
        "test.crops": protocol.crops,
        "test.crop_pct": protocol.crop_pct,
    }
