"""Convert image weights to video weights.

Letters: N tokens, D width of a token, O output channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from video_convmae.models.positions import time

from .formats import Source, read_weights
from .options import Inflation
from .state import POSITIONS, Weights

_OF_PIXELS = ("data.mean", "data.std")  # of an image's preprocessing, what is a video's too


def inflate(
    source: Source,
    *,
    tubelet: int = 2,
    temporal_kernel: int = 3,
    num_frames: int = 16,
    embedding: Literal["average", "center"] = "average",
    depthwise: Literal["average", "center"] = "center",
) -> Weights:
    """Convert image weights to video weights.

    The first embedding is spread over the tubelet and the depthwise kernels over time, the table over time is added to
    positions, and the decoder predicts every frame of a token as it predicted the image. All else works within a frame
    or on tokens and is unchanged. With a `center` depthwise kernel, the tokens of a still clip are the image model's,
    except for the table over time.

    Args:
        source: as in `read_weights`.
        tubelet, temporal_kernel: frames of a token, and of the depthwise kernels (odd).
        num_frames: frames of a clip, which the positions will cover.
        embedding, depthwise: see `Inflation`.

    Raises:
        ValueError: the weights are not of an image model, or the numbers do not fit together.
    """
    Inflation(embedding, depthwise)  # checks both
    weights = read_weights(source)
    if not weights.is_image:
        raise ValueError(f"only image weights can be inflated; these are {weights}")
    if tubelet < 1 or num_frames % tubelet or temporal_kernel % 2 == 0:
        raise ValueError(
            f"tubelet {tubelet}, {num_frames} frames, temporal kernel {temporal_kernel}: expected frames a multiple of "
            "the tubelet and an odd kernel"
        )
    frames = num_frames // tubelet
    tensors = dict(weights.tensors)
    for name, tensor in weights.tensors.items():
        if name == "encoder.embeddings.0.linear.weight":
            tensors[name] = _spread(tensor[:, None], tubelet, embedding).flatten(1)
        elif name.endswith(".depthwise.weight"):
            tensors[name] = _spread(tensor[:, 0], temporal_kernel, depthwise)[:, None]
        elif name in POSITIONS:
            tensors[name] = _add_time(tensor, frames)
        elif name.startswith("decoder.prediction."):
            tensors[name] = torch.cat([tensor] * tubelet)
    notes = {
        "encoder.embeddings.": f"the first embedding over {tubelet} frames ({embedding})",
        "encoder.conv_stages.": f"depthwise kernels over {temporal_kernel} frames ({depthwise})",
        "encoder.positions": f"positions over {frames} token frames, the sine-cosine table over time added",
        "decoder.prediction.": f"the decoder's prediction is repeated over {tubelet} frames, the rest of it unchanged",
    }
    present = [note for prefix, note in notes.items() if any(name.startswith(prefix) for name in tensors)]
    return replace(
        weights,
        format=f"{weights.format}, inflated",
        tensors=tensors,
        tubelet=tubelet,
        frames=frames,
        grid=None if weights.grid is None else (frames, *weights.grid[1:]),
        preprocessing={name: weights.preprocessing[name] for name in _OF_PIXELS if name in weights.preprocessing},
        guessed=False,
        config=None,
        notes=(*weights.notes, *(f"inflated: {note}" for note in present)),
    )


def _spread(kernel: Tensor, frames: int, inflation: str) -> Tensor:
    """`(O, 1, ...)` -> `(O, frames, ...)` with the same sum over frames."""
    if inflation == "average":
        return torch.cat([kernel / frames] * frames, dim=1)
    spread = torch.zeros_like(kernel).repeat_interleave(frames, dim=1)
    spread[:, frames // 2] = kernel[:, 0]
    return spread


def _add_time(table: Tensor, frames: int) -> Tensor:
    """Positions `(1, h w, D)` -> `(1, t h w, D)`: the table over time is added and the sum rounded once."""
    over_time = time(frames, table.shape[-1]).to(table.device, torch.promote_types(table.dtype, torch.float32))
    return (table + over_time[:, None]).to(table.dtype).flatten(0, 1)[None]
