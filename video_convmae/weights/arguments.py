"""Arguments of a model that holds given weights."""

from __future__ import annotations

from math import isqrt, prod
from typing import Any, Literal

from video_convmae.models.sizes import SIZES, Pool

from .files import Tensors
from .formats import Source, read_weights
from .formats.pytorchvideo import clip_of
from .state import POSITIONS, Weights, embedding_weights


def model_arguments(source: Source, kind: Literal["autoencoder", "classifier"] | None = None) -> dict[str, Any]:
    """Return the arguments of `create_autoencoder` or `create_classifier` for a model that holds these weights.

    Shapes determine all but heads, target and the clip, which a configuration in the file or beside it may state.
    Heads that nothing states are assumed as in our size of the same widths and depths, else width // 64 (in the decoder
    of an image model width // 32); the target as our default; the clip, if there is neither grid nor positions, as 16
    frames (1 for an image model) of 224x224 pixels. The grid of positions alone is assumed square.

    Args:
        source: as in `read_weights`.
        kind: model to build; None: a classifier if there is a head, else an autoencoder.

    Raises:
        ValueError: different MLP ratios within a stage, or a probe's weights.
    """
    weights = read_weights(source)
    if weights.has("head.linear") and kind is None:
        raise ValueError("a probe's weights: build it with create_probe, or read its run with video_convmae.load")
    if weights.size is not None:
        classes = {} if weights.num_classes is None else {"num_classes": weights.num_classes}
        return {"size": weights.size, **clip_of(weights, tested=True), **classes}
    arguments = encoder_arguments(weights)
    if kind == "classifier" or (kind is None and weights.has("head")):
        if weights.position_table == "flat" and POSITIONS[0] not in weights.tensors:
            arguments["learnable_positions"] = False
        return arguments | (_head_arguments(weights) if weights.has("head") else {})
    if not weights.has("decoder"):
        return arguments | {"msd": True}
    width, depth = len(weights.tensors["decoder.embedding.bias"]), count_blocks(weights.tensors, "decoder.blocks")
    size = SIZES[arguments["size"]]
    named = size.image_decoder if weights.is_image else size.video_decoder
    assumed = named[2] if named[:2] == (width, depth) else max(1, width // (32 if weights.is_image else 64))
    heads = weights.decoder_heads or assumed
    return arguments | {
        "msd": weights.has("fusion") or len(weights.strides) == 1,
        "decoder": (width, depth, heads),
        "decoder_mlp_ratio": _mlp_ratio(weights.tensors, ["decoder.blocks"]),
        "target": weights.target or ("patch" if weights.is_image else "patch_channel"),
    }


def encoder_arguments(weights: Weights) -> dict[str, Any]:
    """Return those arguments of `model_arguments` that concern the encoder; of pytorchvideo, size and clip."""
    if weights.size is not None:
        return {"size": weights.size, **clip_of(weights, tested=False)}
    tensors, last = weights.tensors, len(weights.strides) - 1
    stages = [*(f"encoder.conv_stages.{stage}" for stage in range(last)), "encoder.attention_blocks"]
    widths = tuple(len(kernel) for kernel in embedding_weights(tensors))
    depths = tuple(count_blocks(tensors, stage) for stage in stages)
    named = next((name for name, size in SIZES.items() if (size.widths, size.depths) == (widths, depths)), None)
    frames = weights.frames or (1 if weights.is_image else max(1, 16 // weights.tubelet))
    arguments = {
        "size": named or ("base" if last else "vit_base"),
        "widths": widths,
        "depths": depths,
        "heads": weights.heads or (SIZES[named].heads if named else max(1, widths[last] // 64)),
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
    if POSITIONS[0] in tensors and not weights.fixed_grids(POSITIONS[0]):
        arguments["learnable_positions"] = True
    return arguments | ({"position_table": "flat"} if weights.position_table == "flat" else {})


def _image_size(weights: Weights, frames: int) -> int | tuple[int, int]:
    patch, table = prod(weights.strides), weights.tensors.get(POSITIONS[0])
    if weights.grid is not None:
        height, width = (side * patch for side in weights.grid[1:])
        return height if height == width else (height, width)
    tokens = 0 if table is None else table.shape[1]
    side = isqrt(tokens // frames)
    return side * patch if side and side**2 * frames == tokens else 224


def count_blocks(tensors: Tensors, blocks: str) -> int:
    """Return the number of blocks whose names begin so."""
    return sum(name.startswith(f"{blocks}.") and name.endswith(".norm1.weight") for name in tensors)


def _mlp_ratio(tensors: Tensors, stages: list[str]) -> float | tuple[float, ...]:
    """Return the MLP ratio of the stages: one number, or where they differ (ConvMAE's large and huge) one of each."""
    ratios = []
    for stage in stages:
        names = [name for name in tensors if name.startswith(f"{stage}.") and name.endswith("fc1.weight")]
        found = sorted({tensors[name].shape[0] / tensors[name].shape[1] for name in names})
        if len(found) > 1:
            raise ValueError(f"the blocks of {stage} have MLP ratios {found}; ours have one in a stage")
        ratios.append(found[0] if found else 4.0)
    return ratios[0] if len(set(ratios)) == 1 else tuple(ratios)


def _head_arguments(weights: Weights) -> dict[str, Any]:
    """Return the arguments of a classifier's head and of the pooling before it, as stated.

    Else the width of the head over that of a token says how the tokens are pooled.
    """
    classes, width = weights.tensors["head.weight"].shape
    *stages, token = (len(kernel) for kernel in embedding_weights(weights.tensors))
    widths: dict[int, Pool] = {token: "mean", 2 * token: "difference", token + 2 * sum(stages or [token]): "motion"}
    pool = "attentive" if weights.has("pooling") else weights.pool or widths.get(width, "frames")
    arguments: dict[str, Any] = {"num_classes": classes}
    if pool == "attentive":
        depth = 1 + count_blocks(weights.tensors, "pooling.blocks")
        return arguments | {"pool": pool, "pool_depth": depth, "pool_heads": weights.pool_heads}
    return arguments if pool == "mean" else arguments | {"pool": pool}
