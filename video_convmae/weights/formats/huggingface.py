"""VideoMAE and MAE in Hugging Face transformers: names of 5.23, and those before 5.0, as in the files on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from video_convmae.errors import UserError

from ..state import POSITIONS, Weights, embedding_weights
from .base import NO_CLS, Format, drop_cls_position, name_table
from .mae import DECODER
from .videomae import add_embedding_bias, remove_tables

BLOCK = """
    attention.attention.{q,v}_bias          attention.{query,value}.bias
    attention.output.dense.*                attention.proj.*
    attention.attention.*                   attention.*
    {intermediate,output}.dense.*           mlp.{fc1,fc2}.*
    layernorm_{before,after}.*              {norm1,norm2}.*
"""
MAE_BLOCK_OF_5 = """
    attention.{q_proj,k_proj,v_proj,o_proj}.*   attention.{query,key,value,proj}.*
    mlp.*                                       mlp.*
    layernorm_{before,after}.*                  {norm1,norm2}.*
"""


# What transformers takes where a config.json does not have a key.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "videomae": {"num_frames": 16, "tubelet_size": 2, "decoder_num_attention_heads": 6, "norm_pix_loss": True},
    "vit_mae": {"num_frames": 1, "tubelet_size": 1, "decoder_num_attention_heads": 16, "norm_pix_loss": False},
}
_SHARED: dict[str, Any] = {
    "image_size": 224,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "use_mean_pooling": True,
    "problem_type": "single_label_classification",
}
_EPS = 1e-6  # of ours; a smaller one makes no difference where the values of a token vary
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RESAMPLING = {2: "bilinear", 3: "bicubic"}


def folder_properties(folder: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Return what config.json and preprocessor_config.json, beside the weights, state about them.

    Args:
        folder: contents of both, as `config` and `preprocessor` (None: there is none).
        weights: as read from their tensors.

    Raises:
        UserError: config.json contradicts the tensors, or states what no model of ours computes.
    """
    config = folder["config"]
    is_image = weights.frames == 1
    kind = "vit_mae" if is_image else "videomae"
    if config["model_type"] != kind:
        raise UserError(f"config.json says model_type {config['model_type']!r}, and the tensors are of a {kind}")
    config = _DEFAULTS[kind] | _SHARED | {name: value for name, value in config.items() if value is not None}
    _refuse_other_models(config, weights)
    _compare_sizes(config, weights)
    patch = prod(weights.strides)
    height, width = _pair(config["image_size"])
    for name, value, unit in (("num_frames", config["num_frames"], weights.tubelet),
                              ("image_size", height, patch), ("image_size", width, patch)):  # fmt: skip
        if value < unit or value % unit:
            raise UserError(
                f"config.json says {name} {config[name]}; expected a multiple of {unit}, the size of a token"
            )
    grid = (config["num_frames"] // weights.tubelet, height // patch, width // patch)
    positions = weights.tensors.get(POSITIONS[0])
    if positions is not None and positions.shape[1] != prod(grid):
        raise UserError(f"config.json says image_size {height} x {width}, and there are {positions.shape[1]} positions")
    target = ("patch" if is_image else "patch_channel") if config["norm_pix_loss"] else "none"
    return {
        "heads": config["num_attention_heads"],
        "decoder_heads": config["decoder_num_attention_heads"] if weights.has("decoder") else None,
        "target": target if weights.has("decoder") else None,
        "grid": grid,
        "class_names": _class_names(config) if weights.has("head") else None,
        "preprocessing": preprocessing(folder.get("preprocessor") or {}),
    }


def _refuse_other_models(config: Mapping[str, Any], weights: Weights) -> None:
    """Raise a UserError for what no model of ours computes, and no shape says."""
    if config["hidden_act"] != "gelu":
        raise UserError(f"config.json says hidden_act {config['hidden_act']!r}; expected 'gelu', which ours compute")
    if config["layer_norm_eps"] > _EPS:
        raise UserError(
            f"config.json says layer_norm_eps {config['layer_norm_eps']:g}; expected {_EPS:g} or less: ours have "
            f"{_EPS:g}, and the features would be others"
        )
    biases = [t for name, t in weights.tensors.items() if name.endswith(".attention.qkv.bias")]
    if not config.get("qv_bias", config.get("qkv_bias", True)) and any(bool(bias.any()) for bias in biases):
        raise UserError("config.json says qkv_bias false, and the tensors hold such biases, which transformers ignores")
    if weights.has("head") and config["problem_type"] != "single_label_classification":
        raise UserError(
            f"config.json says problem_type {config['problem_type']!r}; expected 'single_label_classification': ours "
            "choose one class (exclude head to load the encoder alone)"
        )
    if weights.frames != 1:  # without mean pooling there is a norm over tokens, and no fc_norm
        pools = weights.has("fc_norm") if weights.has("head") else not weights.has("norm")
        if config["use_mean_pooling"] != pools:
            norm = "fc_norm" if weights.has("head") else "layernorm"
            holds = "hold" if weights.has(norm.removeprefix("layer")) else "do not hold"
            raise UserError(
                f"config.json says use_mean_pooling {str(config['use_mean_pooling']).lower()}, and the tensors {holds} "
                f"{norm}: transformers computes another model"
            )


def _compare_sizes(config: Mapping[str, Any], weights: Weights) -> None:
    """Raise a UserError for a size that is not that of the tensors."""
    found = {
        "hidden_size": embedding_weights(weights.tensors)[-1].shape[0],
        "num_hidden_layers": _count(weights, "encoder.attention_blocks."),
        "intermediate_size": _length(weights, "encoder.attention_blocks.0.mlp.fc1.bias"),
        "num_channels": weights.channels,
        "patch_size": prod(weights.strides),
        "tubelet_size": weights.tubelet,
        "decoder_hidden_size": _length(weights, "decoder.norm.weight"),
        "decoder_num_hidden_layers": _count(weights, "decoder.blocks."),
        "decoder_intermediate_size": _length(weights, "decoder.blocks.0.mlp.fc1.bias"),
    }
    for name, value in found.items():
        if value and config.get(name, value) not in (value, [value, value]):
            raise UserError(f"config.json says {name} {config[name]}, and the tensors are of {name} {value}")
    classes = len(config.get("id2label") or ()) or config.get("num_labels")
    if classes and weights.num_classes not in (None, classes):
        raise UserError(f"config.json names {classes} classes, and the head of these tensors has {weights.num_classes}")


def _length(weights: Weights, name: str) -> int:
    return len(weights.tensors.get(name, ()))


def _count(weights: Weights, blocks: str) -> int:
    return sum(name.startswith(blocks) and name.endswith(".norm1.weight") for name in weights.tensors)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of `id2label`; None: it numbers the classes only (LABEL_0, ...)."""
    names = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    if not names or all(name == f"LABEL_{number}" for number, name in names.items()):
        return None
    if sorted(names) != list(range(len(names))):
        raise UserError(f"id2label in config.json has the numbers {sorted(names)}; expected 0 to {len(names) - 1}")
    return tuple(names[number] for number in range(len(names)))


def preprocessing(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a preprocessor_config.json by the names of ours, whose pixels are 0 to 1."""
    settings: dict[str, Any] = {}
    white = 255 * (preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1.0)
    if preprocessor.get("do_normalize", True):
        for theirs, name in (("image_mean", "data.mean"), ("image_std", "data.std")):
            if isinstance(values := preprocessor.get(theirs), list):
                settings[name] = [value / white for value in values]
    else:
        settings |= {"data.mean": [0.0, 0.0, 0.0], "data.std": [1 / white, 1 / white, 1 / white]}
    if (interpolation := _RESAMPLING.get(preprocessor.get("resample", -1))) is not None:
        settings["data.augmentation.interpolation"] = interpolation
    size, crop = preprocessor.get("size"), preprocessor.get("crop_size")
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else None
    side = crop.get("height") if isinstance(crop, Mapping) else crop
    if isinstance(edge, int) and isinstance(side, int) and preprocessor.get("do_center_crop", True) and side <= edge:
        settings["test.crop_pct"] = side / edge
    return settings


def huggingface_config(weights: Weights) -> dict[str, Any]:
    """Return the config.json that transformers needs beside weights in the layout of its VideoMAE.

    Raises:
        UserError: the number of heads, or the clip, is unknown.
    """
    heads, grid = weights.heads, weights.grid
    if heads is None or grid is None:
        unknown = "attention heads" if heads is None else "frames and pixels of a clip"
        raise UserError(f"these {weights.format} weights do not say their {unknown}, which config.json must state")
    tensors, patch = weights.tensors, prod(weights.strides)
    kind = "VideoMAEForPreTraining" if weights.has("decoder") else "VideoMAEForVideoClassification"
    config: dict[str, Any] = {
        "architectures": [kind if weights.has("decoder") or weights.has("head") else "VideoMAEModel"],
        "model_type": "videomae",
        "hidden_act": "gelu",
        "hidden_size": embedding_weights(tensors)[-1].shape[0],
        "image_size": _one_or_two(grid[1] * patch, grid[2] * patch),
        "intermediate_size": tensors["encoder.attention_blocks.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-6,
        "num_attention_heads": heads,
        "num_channels": weights.channels,
        "num_frames": grid[0] * weights.tubelet,
        "num_hidden_layers": _count(weights, "encoder.attention_blocks."),
        "patch_size": patch,
        "qkv_bias": True,
        "tubelet_size": weights.tubelet,
        "use_mean_pooling": not weights.has("norm"),  # then transformers has no norm over tokens
    }
    if weights.has("decoder"):
        config |= {
            "decoder_hidden_size": len(tensors["decoder.norm.weight"]),
            "decoder_intermediate_size": tensors["decoder.blocks.0.mlp.fc1.weight"].shape[0],
            "decoder_num_attention_heads": weights.decoder_heads,
            "decoder_num_hidden_layers": _count(weights, "decoder.blocks."),
            "norm_pix_loss": weights.target != "none",
        }
    if (classes := weights.num_classes) is not None:
        names = weights.class_names or tuple(f"LABEL_{number}" for number in range(classes))
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    return config


def preprocessor_config(weights: Weights) -> dict[str, Any]:
    """Return the preprocessor_config.json beside it; a mean and deviation that is not stated is ImageNet's."""
    stated = weights.preprocessing
    sides = dict(zip(("height", "width"), (side * prod(weights.strides) for side in (weights.grid or (1, 14, 14))[1:])))
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(stated.get("data.mean", IMAGENET_MEAN)),
        "image_std": list(stated.get("data.std", IMAGENET_STD)),
        "resample": 3 if stated.get("data.augmentation.interpolation") == "bicubic" else 2,
        "size": {"shortest_edge": round(min(sides.values()) / stated.get("test.crop_pct", 1.0))},
        "crop_size": sides,
    }


def _one_or_two(height: int, width: int) -> int | list[int]:
    return height if height == width else [height, width]


def _with_note(weights: Weights, eps: str) -> Weights:
    note = (
        f"transformers computes these weights with the LayerNorm eps of config.json, by default {eps}; here it is "
        "1e-6, as where the published ones were trained"
    )
    return replace(weights, notes=(*weights.notes, note))


def _add_attention_biases(weights: Weights) -> Weights:
    """Add the biases of query, key and value that a model with `qkv_bias` false does not have, as zero."""
    kernels = {name: t for name, t in weights.tensors.items() if name.endswith(".attention.qkv.weight")}
    zeros = {name.removesuffix("weight") + "bias": kernel.new_zeros(len(kernel)) for name, kernel in kernels.items()}
    return replace(weights, tensors={**zeros, **weights.tensors})


HF_VIDEOMAE = Format(
    title="Hugging Face VideoMAE",
    marker="embeddings.patch_embeddings.projection.weight",
    ndim=5,
    names={
        **name_table(BLOCK, "encoder.layer.#.", "encoder.attention_blocks.#."),
        **name_table(BLOCK, "decoder.decoder_layers.#.", "decoder.blocks.#."),
        **name_table(
            """
            embeddings.patch_embeddings.projection.*    encoder.embeddings.0.linear.*
            {layernorm,fc_norm,classifier}.*            {norm,fc_norm,head}.*
            mask_token                                  decoder.mask_token
            encoder_to_decoder.*                        decoder.embedding.*
            decoder.{norm,head}.*                       decoder.{norm,prediction}.*
            """
        ),
    },
    separate_qkv=("weight", "bias"),
    prefixes=("videomae.", "videomae."),
    position_table="flat",
    after_read=lambda weights: _with_note(
        add_embedding_bias(_add_attention_biases(weights)), "1e-12 (1e-5 in the decoder's norm and fc_norm)"
    ),
    before_write=remove_tables,
)
HF_MAE = Format(
    title="Hugging Face MAE",
    marker="embeddings.patch_embeddings.projection.weight",
    ndim=4,
    names={
        **name_table(MAE_BLOCK_OF_5, "layers.#.", "encoder.attention_blocks.#."),
        **name_table(MAE_BLOCK_OF_5 + BLOCK, "decoder.decoder_layers.#.", "decoder.blocks.#."),
        **name_table(BLOCK, "encoder.layer.#.", "encoder.attention_blocks.#."),
        **name_table(DECODER, "decoder."),
        "embeddings.position_embeddings": "encoder.positions",
        "embeddings.patch_embeddings.projection.*": "encoder.embeddings.0.linear.*",
        "layernorm.*": "norm.*",
    },
    dropped={"embeddings.cls_token": NO_CLS},
    after_read=lambda weights: _with_note(drop_cls_position(_add_attention_biases(weights)), "1e-12"),
)
