"""Released layouts: the names and shapes that others gave to the same tensors.

A layout is a small table of name patterns (theirs, ours), read in either direction. The tensors differ in that a
convolution with kernel = stride is a Linear here, over values in the order (pt, ph, pw, c), and that the cells under a
fusion's window are nested (packing.py): permutations, so a tensor goes there and back bit for bit.

Names and shapes were taken from the released code's state dictionaries: ConvMAE 4c97b4c and FastConvMAE 0039734, EasyCV
(FastConvMAE), mmpretrain pull request 1196, VideoMAE 14ef8d8, MAE efb2a80, transformers 5.23.

Letters: O values out, C channels, [t] h w a kernel, D width of a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from video_convmae.models.packing import nest, unnest

Tensors: TypeAlias = "dict[str, Tensor]"
Rows: TypeAlias = "tuple[tuple[str, str], ...]"


@dataclass(frozen=True)
class Geometry:
    """What the tensors' values run over, as far as names do not say.

    strides: spatial, of each stage. tubelet: frames of a token. channels: of a pixel. frames: of the token grid that
    positions are over, an image's being one; None: not known.
    """

    strides: tuple[int, ...]
    tubelet: int = 1
    channels: int = 3
    frames: int | None = None


# Layouts: their names and ours. "#" is a number, "*" the rest of a name; the first row that fits counts.


@dataclass(frozen=True)
class Layout:
    """A family of released checkpoints.

    title: its name.
    marker: a name in every one of its files, perhaps behind a prefix; `dims` is that tensor's number of axes.
    rows: (theirs, ours), prefix off; used in both directions.
    aliases: further rows, for reading.
    dropped: their names without a counterpart here -> why that is right.
    companions: prefix of the encoder -> prefix of the decoder in the same file.
    qkv: how attention is stored: `joint`, with q and v biases alone (`bias`), or as three matrices (`split`).
    prefixes: of encoder and norm when written for (pretraining, finetuning).
    position_table: the fixed table it was trained with.
    """

    title: str
    marker: str
    dims: int
    rows: Rows
    aliases: Rows = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    companions: Mapping[str, str] = field(default_factory=dict)
    qkv: Literal["joint", "bias", "split"] = "joint"
    prefixes: tuple[str, str] = ("", "")
    position_table: Literal["sincos", "flat"] = "sincos"


def _timm_blocks(theirs: str, ours: str) -> Rows:
    return ((f"{theirs}.#.attn.*", f"{ours}.#.attention.*"), (f"{theirs}.#.*", f"{ours}.#.*"))


def _videomae_biases(theirs: str, ours: str) -> Rows:
    return (
        (f"{theirs}.#.attn.q_bias", f"{ours}.#.attention.query.bias"),
        (f"{theirs}.#.attn.v_bias", f"{ours}.#.attention.value.bias"),
    )


def _hugging_face_blocks(theirs: str, ours: str) -> Rows:
    return (
        (f"{theirs}.#.attention.attention.q_bias", f"{ours}.#.attention.query.bias"),  # as on the hub, until 5.0
        (f"{theirs}.#.attention.attention.v_bias", f"{ours}.#.attention.value.bias"),
        (f"{theirs}.#.attention.output.dense.*", f"{ours}.#.attention.proj.*"),  # before the next: it fits proj too
        (f"{theirs}.#.attention.attention.*", f"{ours}.#.attention.*"),
        (f"{theirs}.#.intermediate.dense.*", f"{ours}.#.mlp.fc1.*"),
        (f"{theirs}.#.output.dense.*", f"{ours}.#.mlp.fc2.*"),
        (f"{theirs}.#.layernorm_before.*", f"{ours}.#.norm1.*"),
        (f"{theirs}.#.layernorm_after.*", f"{ours}.#.norm2.*"),
    )


def _vit_mae_blocks(now: str, until_5: str, ours: str) -> Rows:
    attention = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "proj"))
    return (
        *((f"{now}.#.attention.{theirs}.*", f"{ours}.#.attention.{name}.*") for theirs, name in attention),
        (f"{now}.#.mlp.*", f"{ours}.#.mlp.*"),
        (f"{now}.#.layernorm_before.*", f"{ours}.#.norm1.*"),
        (f"{now}.#.layernorm_after.*", f"{ours}.#.norm2.*"),
        *_hugging_face_blocks(until_5, ours),
    )


def _conv_blocks(theirs: str, stage: int) -> Rows:
    ours = f"encoder.conv_stages.{stage}"
    return (
        (f"{theirs}.#.conv1.*", f"{ours}.#.proj_in.*"),
        (f"{theirs}.#.conv2.*", f"{ours}.#.proj_out.*"),
        (f"{theirs}.#.attn.*", f"{ours}.#.depthwise.*"),
        (f"{theirs}.#.*", f"{ours}.#.*"),
    )


_MAE_DECODER: Rows = (
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.positions"),
    ("decoder_embed.*", "decoder.embedding.*"),
    ("decoder_norm.*", "decoder.norm.*"),
    ("decoder_pred.*", "decoder.prediction.*"),
    *_timm_blocks("decoder_blocks", "decoder.blocks"),
)
_CLASSIFIER: Rows = (("fc_norm.*", "fc_norm.*"), ("head.*", "head.*"))
NO_CLS = "a CLS token; ours has none, its row of the position table is dropped too"

CONVMAE = Layout(
    title="ConvMAE",
    marker="patch_embed1.proj.weight",
    dims=4,
    rows=(
        ("pos_embed", "encoder.positions"),
        ("patch_embed1.proj.*", "encoder.embeddings.0.linear.*"),
        ("patch_embed1.norm.*", "encoder.embeddings.0.norm.*"),
        ("patch_embed2.proj.*", "encoder.embeddings.1.linear.*"),
        ("patch_embed2.norm.*", "encoder.embeddings.1.norm.*"),
        ("patch_embed3.proj.*", "encoder.embeddings.2.linear.*"),
        ("patch_embed3.norm.*", "encoder.embeddings.2.norm.*"),
        ("patch_embed4.*", "encoder.projection.*"),
        ("stage1_output_decode.*", "fusion.joints.0.*"),
        ("stage2_output_decode.*", "fusion.joints.1.*"),
        *_conv_blocks("blocks1", 0),
        *_conv_blocks("blocks2", 1),
        *_timm_blocks("blocks3", "encoder.attention_blocks"),
        ("norm.*", "norm.*"),
        *_CLASSIFIER,
        *_MAE_DECODER,
    ),
    aliases=(("head_0.fc_cls.*", "head.*"),),  # EasyCV's classifier, whose heads are numbered
    dropped={"cls_token": NO_CLS},
    companions={"encoder.": "decoder."},  # EasyCV's pretraining
)
MMPRETRAIN = Layout(
    title="mmpretrain ConvViT",
    marker="patch_embeds.0.projection.weight",
    dims=4,
    rows=(
        ("pos_embed", "encoder.positions"),
        ("patch_embeds.3.*", "encoder.projection.*"),
        ("patch_embeds.#.projection.*", "encoder.embeddings.#.linear.*"),
        ("patch_embeds.#.norm.*", "encoder.embeddings.#.norm.*"),
        ("layers.2.#.attn.*", "encoder.attention_blocks.#.attention.*"),
        ("layers.2.#.ffn.layers.0.0.*", "encoder.attention_blocks.#.mlp.fc1.*"),
        ("layers.2.#.ffn.layers.1.*", "encoder.attention_blocks.#.mlp.fc2.*"),
        ("layers.2.#.ln1.*", "encoder.attention_blocks.#.norm1.*"),
        ("layers.2.#.ln2.*", "encoder.attention_blocks.#.norm2.*"),
        ("layers.#.#.conv1.*", "encoder.conv_stages.#.#.proj_in.*"),
        ("layers.#.#.conv2.*", "encoder.conv_stages.#.#.proj_out.*"),
        ("layers.#.#.attn.*", "encoder.conv_stages.#.#.depthwise.*"),
        ("layers.#.#.ln1.*", "encoder.conv_stages.#.#.norm1.*"),
        ("layers.#.#.ln2.*", "encoder.conv_stages.#.#.norm2.*"),
        ("layers.#.#.mlp.*", "encoder.conv_stages.#.#.mlp.*"),
        ("ln1.*", "norm.*"),
        ("head.fc.*", "head.*"),
    ),
)
VIDEOMAE = Layout(
    title="VideoMAE",
    marker="patch_embed.proj.weight",
    dims=5,
    rows=(
        ("pos_embed", "encoder.positions"),  # only where it was learnt
        ("patch_embed.proj.*", "encoder.embeddings.0.linear.*"),
        *_videomae_biases("blocks", "encoder.attention_blocks"),
        *_timm_blocks("blocks", "encoder.attention_blocks"),
        ("norm.*", "norm.*"),
        *_CLASSIFIER,
        ("mask_token", "decoder.mask_token"),
        ("encoder_to_decoder.*", "decoder.embedding.*"),
        *_videomae_biases("decoder.blocks", "decoder.blocks"),
        *_timm_blocks("decoder.blocks", "decoder.blocks"),
        ("decoder.norm.*", "decoder.norm.*"),
        ("decoder.head.*", "decoder.prediction.*"),
    ),
    qkv="bias",
    prefixes=("encoder.", ""),
    position_table="flat",
)
HUGGING_FACE = Layout(
    title="Hugging Face VideoMAE",
    marker="embeddings.patch_embeddings.projection.weight",
    dims=5,
    rows=(
        ("embeddings.patch_embeddings.projection.*", "encoder.embeddings.0.linear.*"),
        *_hugging_face_blocks("encoder.layer", "encoder.attention_blocks"),
        ("layernorm.*", "norm.*"),
        ("fc_norm.*", "fc_norm.*"),
        ("classifier.*", "head.*"),
        ("mask_token", "decoder.mask_token"),
        ("encoder_to_decoder.*", "decoder.embedding.*"),
        *_hugging_face_blocks("decoder.decoder_layers", "decoder.blocks"),
        ("decoder.norm.*", "decoder.norm.*"),
        ("decoder.head.*", "decoder.prediction.*"),
    ),
    qkv="split",
    prefixes=("videomae.", "videomae."),
    position_table="flat",
)
MAE = Layout(
    title="MAE",
    marker="patch_embed.proj.weight",
    dims=4,
    rows=(
        ("pos_embed", "encoder.positions"),
        ("patch_embed.proj.*", "encoder.embeddings.0.linear.*"),
        *_timm_blocks("blocks", "encoder.attention_blocks"),
        ("norm.*", "norm.*"),
        *_CLASSIFIER,
        *_MAE_DECODER,
    ),
    dropped={"cls_token": NO_CLS},
    companions={"encoder.": "decoder."},
)
HUGGING_FACE_MAE = Layout(
    title="Hugging Face MAE",
    marker="embeddings.patch_embeddings.projection.weight",
    dims=4,
    rows=(
        ("embeddings.position_embeddings", "encoder.positions"),
        ("embeddings.patch_embeddings.projection.*", "encoder.embeddings.0.linear.*"),
        *_vit_mae_blocks("layers", "encoder.layer", "encoder.attention_blocks"),
        ("layernorm.*", "norm.*"),
        ("decoder.mask_token", "decoder.mask_token"),
        ("decoder.decoder_pos_embed", "decoder.positions"),
        ("decoder.decoder_embed.*", "decoder.embedding.*"),
        *_vit_mae_blocks("decoder.decoder_layers", "decoder.decoder_layers", "decoder.blocks"),
        ("decoder.decoder_norm.*", "decoder.norm.*"),
        ("decoder.decoder_pred.*", "decoder.prediction.*"),
    ),
    dropped={"embeddings.cls_token": NO_CLS},
)
LAYOUTS = (CONVMAE, MMPRETRAIN, HUGGING_FACE, VIDEOMAE, HUGGING_FACE_MAE, MAE)

# Names


def translate(name: str, rows: Rows) -> str | None:
    """The other side of the first row that a name fits; None if there is none."""
    for pattern, other in rows:
        if match := _regex(pattern).fullmatch(name):
            values = match.groups()
            return "".join(map("".join, zip_longest(re.split(r"[#*]", other), values, fillvalue="")))
    return None


def matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern with "#" for a number and "*" for the rest of a name."""
    return _regex(pattern).fullmatch(name) is not None


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)"))


def merge_qkv(tensors: Tensors) -> Tensors:
    """Separate query, key and value joined to qkv; a key bias that is not there is zero.

    Raises:
        ValueError: another third is missing.
    """
    whole = dict(tensors)
    for name in tensors:
        if not name.endswith((".query.bias", ".query.weight")):
            continue
        third = {kind: name.replace(".query.", f".{kind}.") for kind in ("query", "key", "value")}
        if name.endswith("bias"):
            whole.setdefault(third["key"], torch.zeros_like(tensors[name]))
        if missing := [part for part in third.values() if part not in whole]:
            raise ValueError(f"{', '.join(missing)} is missing beside {name}")
        whole[name.replace(".query.", ".qkv.")] = torch.cat([whole.pop(part) for part in third.values()])
    return whole


def _split(tensors: Tensors, qkv: str) -> Tensors:
    """The inverse of `merge_qkv` for a layout's `qkv`. A key bias is left out: softmax does not feel it."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        if qkv == "joint" or ".qkv." not in name or (qkv == "bias" and name.endswith(".weight")):
            split[name] = tensor
            continue
        for kind, part in zip(("query", "key", "value"), tensor.chunk(3)):
            if not (kind == "key" and name.endswith(".bias")):
                split[name.replace(".qkv.", f".{kind}.")] = part
    return split


# Values: a convolution's kernel and our Linear


def to_our_values(name: str, tensor: Tensor, geometry: Geometry) -> Tensor:
    """A released tensor, under our name, in our shape and order of values."""
    for pattern, (forward, _) in _VALUES.items():
        if matches(name, pattern):
            return forward(tensor, name, geometry)
    return tensor


def to_their_values(name: str, tensor: Tensor, geometry: Geometry, hybrid: bool) -> Tensor:
    """The inverse of `to_our_values`; `hybrid` layouts have 1x1 convolutions where ours has Linear layers."""
    for pattern, (_, backward) in _VALUES.items():
        if matches(name, pattern) and (hybrid or "conv_stages" not in name):
            return backward(tensor, name, geometry)
    return tensor


def _kernel_to_linear(kernel: Tensor, name: str, geometry: Geometry) -> Tensor:
    """`(O, C, [t], h, w)` -> `(O, t h w C)`."""
    return kernel.movedim(1, -1).flatten(1)


def _linear_to_kernel(weight: Tensor, name: str, geometry: Geometry) -> Tensor:
    stage = int(name.split(".")[2])
    stride = geometry.strides[stage]
    plain = len(geometry.strides) == 1 and geometry.tubelet > 1
    window = (geometry.tubelet, stride, stride) if plain else (stride, stride)
    return weight.view(weight.shape[0], *window, -1).movedim(-1, 1)


def _kernel_to_nested(kernel: Tensor, name: str, geometry: Geometry) -> Tensor:
    """`(O, C, side, side)` over a token -> `(O, cells C)` over nested cells."""
    factors = geometry.strides[int(name.split(".")[2]) + 1 :]
    return nest(kernel.permute(0, 2, 3, 1)[:, None], factors).flatten(1)


def _nested_to_kernel(weight: Tensor, name: str, geometry: Geometry) -> Tensor:
    factors = geometry.strides[int(name.split(".")[2]) + 1 :]
    side = math.prod(factors)
    cells = weight.view(weight.shape[0], 1, side * side, -1)
    return unnest(cells, factors, (1, side, side))[:, 0].permute(0, 3, 1, 2)


Change: TypeAlias = "Callable[[Tensor, str, Geometry], Tensor]"
_POINTWISE: tuple[Change, Change] = (
    lambda kernel, *_: kernel.flatten(1),
    lambda weight, *_: weight[:, :, None, None],
)
_TABLE: tuple[Change, Change] = (lambda table, *_: table.reshape(1, -1, table.shape[-1]), lambda table, *_: table)
_VALUES: dict[str, tuple[Change, Change]] = {
    "encoder.embeddings.#.linear.weight": (_kernel_to_linear, _linear_to_kernel),
    "encoder.conv_stages.#.#.depthwise.weight": (lambda k, *_: k.unsqueeze(2), lambda k, *_: k.squeeze(2)),
    "encoder.conv_stages.#.#.proj_in.weight": _POINTWISE,
    "encoder.conv_stages.#.#.proj_out.weight": _POINTWISE,
    "encoder.conv_stages.#.#.mlp.fc1.weight": _POINTWISE,
    "encoder.conv_stages.#.#.mlp.fc2.weight": _POINTWISE,
    "fusion.joints.#.weight": (_kernel_to_nested, _nested_to_kernel),
    "decoder.mask_token": (lambda token, *_: token.flatten(), lambda token, *_: token[None, None]),
    "encoder.positions": _TABLE,  # mmpretrain's is (1, h, w, D)
    "decoder.positions": _TABLE,
}


def to_layout(tensors: Tensors, geometry: Geometry, layout: Layout) -> Tensors:
    """Tensors under our names as a layout has them, without a look at whether it can hold them all."""
    prefix = layout.prefixes[0 if "decoder.mask_token" in tensors else 1]
    rows = tuple((ours, theirs) for theirs, ours in layout.rows)
    released: Tensors = {}
    for name, tensor in _split(tensors, layout.qkv).items():
        theirs = translate(name, rows)
        if theirs is None:
            raise ValueError(f"{layout.title} has no name for {name}")
        if name.startswith(("encoder.", "norm.")):
            theirs = prefix + theirs
        released[theirs] = to_their_values(name, tensor, geometry, layout is CONVMAE).contiguous()
    return released
