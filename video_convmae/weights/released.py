"""Checkpoints of any layout, read into `Weights` under our names, and written; what a model must be to hold them.

Letters: N tokens, D width of a token.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from video_convmae.models import positions
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.sizes import SIZES, EncoderConfig, Size

from .files import read
from .layouts import (
    CONVMAE,
    HUGGING_FACE,
    HUGGING_FACE_MAE,
    LAYOUTS,
    MAE,
    MMPRETRAIN,
    NO_CLS,
    VIDEOMAE,
    Geometry,
    Layout,
    Tensors,
    merge_qkv,
    to_layout,
    to_our_values,
    translate,
)

PARTS = ("encoder", "norm", "fusion", "decoder", "head")  # of a model; the encoder is all that is always needed
WRITTEN = {"convmae": CONVMAE, "videomae": VIDEOMAE, "huggingface": HUGGING_FACE}
POSITIONS = ("encoder.positions", "decoder.positions")
_OURS = "encoder.embeddings.0.linear.weight"
_EPS_OF_HUGGING_FACE = {
    HUGGING_FACE.title: "LayerNorm eps 1e-12 (1e-5 in the decoder's norm and fc_norm)",
    HUGGING_FACE_MAE.title: "LayerNorm eps 1e-12",
}
_WRAPPERS = ("module.", "model.", "_orig_mod.", "state_dict.")  # put before every name by DDP, Lightning, compile


@dataclass(frozen=True)
class Weights:
    """A checkpoint under our names.

    layout: what was recognised, for people.
    tensors: our names -> tensors in our order of values. A classifier's norm is `fc_norm.*` here, `norm.*` is the one
        over tokens; `encoder.positions` and `decoder.positions` may be there although a model computes its fixed ones.
    geometry: of the windows.
    position_table: the fixed table the weights were trained with; None: not known.
    names: our names -> those in the file.
    dropped: names in the file that have no counterpart here -> why.
    notes: sentences for the report.
    grid: the token grid that positions, learnt or fixed, are over, where the source says it.
    bare: tensors of ours without a word on their windows and grid, as of a state dict: the geometry is a guess.
    """

    layout: str
    tensors: Tensors
    geometry: Geometry
    position_table: Literal["sincos", "flat"] | None = None
    names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    grid: positions.Grid | None = None
    bare: bool = False

    @property
    def frames(self) -> int | None:
        """Of the token grid that positions are over, an image's being one; None: not known."""
        return self.grid[0] if self.grid is not None else self.geometry.frames

    @property
    def temporal_kernel(self) -> int:
        """Frames of the depthwise kernels; 1 for a plain ViT."""
        kernel = self.tensors.get("encoder.conv_stages.0.0.depthwise.weight")
        return 1 if kernel is None else kernel.shape[2]

    @property
    def is_image(self) -> bool:
        """One frame a token, no convolution looks at another frame, and no more frames are known of."""
        return self.geometry.tubelet == 1 and self.temporal_kernel == 1 and self.frames in (None, 1)

    def has(self, part: str) -> bool:
        """Whether a part (encoder, norm, fusion, decoder, head) is there; a decoder without its embedding is not."""
        if part == "decoder":
            return "decoder.embedding.weight" in self.tensors
        return any(name.startswith(part + ".") for name in self.tensors)

    @property
    def is_probe(self) -> bool:
        """Whether the head is that of our `Probe`, which stands on the norm over tokens."""
        return "head.linear.weight" in self.tensors

    def state_dict(self) -> Tensors:
        """What `load_state_dict` of our model takes: a classifier or probe if there is a head, else an autoencoder.

        Raises:
            ValueError: the decoder's positions were learnt, and ours are fixed.
        """
        name = POSITIONS[1]
        if self.has("decoder") and name in self.tensors and not self.fixed_grids(name):
            raise ValueError(
                f"{self.names.get(name, name)} was learnt, or is of another kind, and our decoder has the fixed table: "
                "leave out the decoder, or positions to take our table in its place"
            )
        tensors = {n: t for n, t in self.tensors.items() if n != name}
        if self.is_probe:
            return tensors
        if not self.has("head"):
            if self.fixed_grids(POSITIONS[0]):
                del tensors[POSITIONS[0]]
            return {n: t for n, t in tensors.items() if not n.startswith("fc_norm.")}
        return {n.removeprefix("fc_"): t for n, t in tensors.items() if not n.startswith("norm.")}

    def about(self) -> dict[str, Any] | None:
        """What `files.save` keeps beside these tensors, so that nothing is guessed when they are read again.

        It is plain data, and None of bare tensors: a guess is not written down.
        """
        if self.bare:
            return None
        grids = [self.grid] if self.grid else self.fixed_grids(POSITIONS[0])
        grid = grids[0] if len(grids) == 1 else None
        return {**asdict(self.geometry), "frames": self.frames, "grid": grid, "position_table": self.position_table}

    def fixed_grids(self, name: str) -> list[positions.Grid]:
        """The grids over which the fixed table is the one of this name; none if there is no such table."""
        kind, frames = self.position_table or "sincos", self.frames or 1
        return fixed_grids(self.tensors[name], kind, frames) if name in self.tensors else []

    def without(self, *parts: str) -> Weights:
        """These weights without some of positions, norm, fusion, decoder and head."""
        left = tuple(part + "." for part in parts)
        gone = {n for n in self.tensors if n.startswith(left) or ("positions" in parts and n in POSITIONS)}
        weights = replace(self, tensors={n: t for n, t in self.tensors.items() if n not in gone})
        return replace(weights, grid=None, position_table=None) if "positions" in parts else weights


# Reading


def weights_of(source: str | Path | Mapping[str, Any] | Weights | nn.Module) -> Weights:
    """Weights of any known layout under our names; which one it is, is found out from names and shapes.

    Args:
        source: a file, what such a file holds (the tensors may be under `model`, `state_dict` or `module`), a model of
            ours, or weights that were read before.

    Raises:
        ValueError: an unknown layout, a name that the layout does not have, or tensors that do not fit together.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        return _weights_of_model(source)
    given = read(source) if isinstance(source, (str, Path)) else source
    state = _without_wrappers(_tensors_in(given))
    if _OURS in state:
        return _from_ours(state, given)
    for layout in LAYOUTS:
        prefix = _prefix(state, layout)
        if prefix is not None:
            return _from_layout(state, layout, prefix)
    markers = ", ".join(layout.marker for layout in LAYOUTS)
    raise ValueError(
        f"no known layout: none of {_OURS}, {markers} is among the {len(state)} names {summarize_names(list(state))}"
    )


def _tensors_in(state: Mapping[str, Any]) -> Tensors:
    for key in ("model", "state_dict", "module"):
        if isinstance(state.get(key), Mapping):
            return _tensors_in(state[key])
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        got = summarize_names(map(str, others)) or "nothing"
        raise ValueError(f"expected names and tensors, or them under model, state_dict or module; got {got}")
    return dict(state)


def _without_wrappers(state: Tensors) -> Tensors:
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            return _without_wrappers({name.removeprefix(wrapper): tensor for name, tensor in state.items()})
    return state


def _prefix(state: Tensors, layout: Layout) -> str | None:
    """What stands before the layout's marker: `encoder.`, `backbone.`, nothing; None if the marker is not there."""
    for name, tensor in state.items():
        if name == layout.marker or name.endswith("." + layout.marker):
            return name.removesuffix(layout.marker) if tensor.ndim == layout.dims else None
    return None


def _from_layout(state: Tensors, layout: Layout, prefix: str) -> Weights:
    prefixes = [p for p in (prefix, layout.companions.get(prefix)) if p]
    names: dict[str, str] = {}
    tensors: Tensors = {}
    dropped: dict[str, str] = {}
    unknown = []
    for given, tensor in state.items():
        name = next((given.removeprefix(p) for p in prefixes if given.startswith(p)), given)
        ours = translate(name, (*layout.aliases, *layout.rows))
        if name in layout.dropped:
            dropped[given] = layout.dropped[name]
        elif ours is None:
            unknown.append(given)
        else:
            names[ours], tensors[ours] = given, tensor
    if unknown:
        raise ValueError(
            f"{layout.title} weights with names that this layout does not have: {summarize_names(unknown)}"
        )
    geometry = _geometry_of_kernels(tensors)
    tensors = {name: to_our_values(name, tensor, geometry) for name, tensor in merge_qkv(tensors).items()}
    names = {name: names.get(name) or names.get(name.replace(".qkv.", ".query."), name) for name in tensors}
    weights = Weights(layout.title, tensors, geometry, layout.position_table, names, dropped)
    for finish in (_without_cls, _finish_videomae, _finish_hugging_face, _finish_mmpretrain, _finish_second_version):
        weights = finish(weights, layout)
    return replace(weights, layout=f"{weights.layout} {_role(weights)}")


def _from_ours(state: Tensors, source: Mapping[str, Any]) -> Weights:
    if unknown := [name for name in state if name.split(".")[0] not in PARTS]:
        raise ValueError(f"weights with names that no model of ours has: {summarize_names(unknown)}")
    if "head.weight" in state:
        state = _with_fc_norm(state)
    said = _said_by_run(source) or _said_by_about(source) or {"geometry": _guessed_geometry(state), "bare": True}
    weights = Weights("VideoConvMAE", state, names={name: name for name in state}, **said)
    return replace(weights, layout=f"VideoConvMAE {_role(weights)}")


def _said_by_run(source: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the configuration of the run whose checkpoint this is says of its weights; None: there is none in it."""
    config = source.get("config")
    model = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping) or not {"size", "num_frames", "image_size"} <= model.keys():
        return None
    given = {name: model[name] for name in EncoderConfig.__dataclass_fields__ if model.get(name) is not None}
    return _said_by_encoder(EncoderConfig(**given))


def _said_by_about(source: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `Weights.about` left in a converted file; None: it is none."""
    about = source.get("geometry")
    if not isinstance(about, Mapping):
        return None
    geometry = Geometry(tuple(about["strides"]), about["tubelet"], about["channels"], about["frames"])
    grid = None if about["grid"] is None else tuple(about["grid"])
    return {"geometry": geometry, "grid": grid, "position_table": about["position_table"]}


def _said_by_encoder(config: EncoderConfig) -> dict[str, Any]:
    geometry = Geometry(config.strides, config.tubelet, config.channels, config.grid[0])
    return {"geometry": geometry, "grid": config.grid, "position_table": config.position_table}


def _weights_of_model(model: nn.Module) -> Weights:
    if not isinstance(model, (Autoencoder, Classifier)):
        raise ValueError(f"a {type(model).__name__}; expected an Autoencoder or a Classifier")
    tensors = model.state_dict()
    if isinstance(model, Classifier):
        tensors = _with_fc_norm(tensors)
    names = {name: name for name in tensors}
    weights = Weights("VideoConvMAE", tensors, names=names, **_said_by_encoder(model.encoder.config))
    return replace(weights, layout=f"VideoConvMAE {_role(weights)}")


def _with_fc_norm(tensors: Tensors) -> Tensors:
    return {"fc_" + name if name.startswith("norm.") else name: tensor for name, tensor in tensors.items()}


def _role(weights: Weights) -> str:
    if weights.has("decoder"):
        return "pretraining"
    if weights.is_probe:
        return "probe"
    return "finetuning" if weights.has("head") else "encoder only"


def _without_cls(weights: Weights, layout: Layout) -> Weights:
    """Drop the CLS token's row, the first, of the position tables."""
    if not any(reason is NO_CLS for reason in weights.dropped.values()):
        return weights
    tensors = dict(weights.tensors)
    always = layout in (MAE, HUGGING_FACE_MAE)
    for name in POSITIONS:
        table = tensors.get(name)
        if table is not None and (always or math.isqrt(table.shape[1]) ** 2 != table.shape[1]):
            tensors[name] = table[:, 1:]  # what ConvMAE-v2's table holds was never documented: the square tells
    note = (
        "the CLS token and its position were dropped, as ours has none; it took part in attention, so tokens differ "
        "from the released model's"
    )
    return replace(weights, tensors=tensors, notes=(*weights.notes, note))


def _finish_videomae(weights: Weights, layout: Layout) -> Weights:
    """VideoMAE's `encoder_to_decoder` has no bias: ours is zero."""
    if layout.position_table != "flat":
        return weights
    tensors = dict(weights.tensors)
    if "decoder.embedding.weight" in tensors:
        weight = tensors["decoder.embedding.weight"]
        tensors.setdefault("decoder.embedding.bias", weight.new_zeros(weight.shape[0]))
    return replace(weights, tensors=tensors)


def _finish_hugging_face(weights: Weights, layout: Layout) -> Weights:
    """transformers normalises with another eps than the code that these weights were trained with."""
    if layout.title not in _EPS_OF_HUGGING_FACE:
        return weights
    eps = _EPS_OF_HUGGING_FACE[layout.title]
    note = f"transformers computes these weights with {eps}; here it is 1e-6, as where they were trained"
    return replace(weights, notes=(*weights.notes, note))


def _finish_mmpretrain(weights: Weights, layout: Layout) -> Weights:
    """mmpretrain's final norm is over each token; behind a head it stands for ours, over their mean."""
    if layout is not MMPRETRAIN or not weights.has("head"):
        return weights
    note = "mmpretrain normalises every token before the mean, ours their mean, as released: logits differ a little"
    names = {"fc_" + n if n.startswith("norm.") else n: theirs for n, theirs in weights.names.items()}
    return replace(weights, tensors=_with_fc_norm(weights.tensors), names=names, notes=(*weights.notes, note))


def _finish_second_version(weights: Weights, layout: Layout) -> Weights:
    """ConvMAE-v2 has a CLS token, and carries fusion and mask token that its authors say it does not use (issue 19)."""
    if layout is not CONVMAE or not weights.dropped:
        return weights
    unused = [n for n in weights.tensors if n.startswith("fusion.")] if not weights.has("decoder") else []
    dropped = {weights.names[n]: "not used by ConvMAE-v2 (its issue 19)" for n in unused}
    tensors = {n: t for n, t in weights.tensors.items() if n not in unused}
    return replace(weights, layout="ConvMAE-v2", tensors=tensors, dropped={**weights.dropped, **dropped})


def _geometry_of_kernels(tensors: Tensors) -> Geometry:
    """From the kernels of embeddings that are still convolutions; a two-dimensional one is an image's."""
    kernels = list(embeddings(tensors))
    tubelet, frames = (kernels[0].shape[2], None) if kernels[0].ndim == 5 else (1, 1)
    return Geometry(tuple(kernel.shape[-1] for kernel in kernels), tubelet, kernels[0].shape[1], frames)


def _guessed_geometry(tensors: Tensors) -> Geometry:
    """From the Linear layers, for three channels; the tubelet is the smallest that leaves a square window."""
    first, *later = embeddings(tensors)
    windows = [kernel.shape[1] // before.shape[0] for before, kernel in zip([first, *later], later)]
    window, tubelet = first.shape[1] // 3, 1
    while window % tubelet or math.isqrt(window // tubelet) ** 2 * tubelet != window:
        tubelet += 1
    return Geometry(tuple(math.isqrt(size) for size in (window // tubelet, *windows)), tubelet)


def embeddings(tensors: Tensors) -> Iterable[Tensor]:
    """The weights of the stages' embeddings, in their order."""
    stage = 0
    while (kernel := tensors.get(f"encoder.embeddings.{stage}.linear.weight")) is not None:
        yield kernel
        stage += 1


# Writing


def release(
    source: str | Path | Mapping[str, Any] | Weights | nn.Module,
    layout: Literal["convmae", "videomae", "huggingface"],
    image_size: int | tuple[int, int] | None = None,
) -> Tensors:
    """Weights in a released layout: pretraining if they have a decoder, else finetuning.

    Args:
        source: as in `weights_of`.
        layout: `convmae` for image hybrids, `videomae` and `huggingface` for plain ViTs.
        image_size: the pixels that the fixed position tables of `convmae` are made for; None: the model's or run's own
            where the source says them, else 224.

    Raises:
        ValueError: the layout cannot hold these weights.
    """
    if layout not in WRITTEN:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(WRITTEN)} (MAE has a CLS token, ours none)")
    weights = weights_of(source)
    tensors = dict(weights.tensors)
    stages = len(weights.geometry.strides)
    if layout == "convmae":
        if stages != 3 or not weights.is_image:
            raise ValueError(f"the ConvMAE layout holds image models of three stages; {what(weights)}")
        if not weights.has("head"):
            tensors = _with_tables(weights, image_size)
    else:
        if stages != 1 or weights.position_table == "sincos":
            raise ValueError(f"the VideoMAE layouts hold plain ViTs with the flat position table; {what(weights)}")
        if tensors.pop("decoder.embedding.bias", torch.zeros(1)).any():
            raise ValueError("the VideoMAE layouts have no bias between encoder and decoder; here it is not zero")
        tensors = {name: t for name, t in tensors.items() if weights.has("head") or not name.endswith(".positions")}
    return to_layout(tensors, weights.geometry, WRITTEN[layout])


def _with_tables(weights: Weights, image_size: int | tuple[int, int] | None) -> Tensors:
    """The released models keep their frozen position tables in the file."""
    grid = weights.grid
    if image_size is not None or grid is None:
        size = 224 if image_size is None else image_size
        height, width = (size, size) if isinstance(size, int) else size
        patch = math.prod(weights.geometry.strides)
        grid = (1, height // patch, width // patch)
    tensors = dict(weights.tensors)
    like = {"encoder.positions": "encoder.projection.bias", "decoder.positions": "decoder.mask_token"}
    for name, vector in like.items():
        if vector in tensors:
            table = positions.TABLES[weights.position_table or "sincos"]
            tensors.setdefault(name, table(grid, tensors[vector].numel())[None])
    return tensors


def what(weights: Weights) -> str:
    """Half a sentence for an error."""
    frames = f"tubelet {weights.geometry.tubelet}, temporal kernel {weights.temporal_kernel}"
    if weights.frames is not None:
        frames += f", {weights.frames * weights.geometry.tubelet} frames"
    return f"this is {weights.layout}, {len(weights.geometry.strides)} stages, {frames}"


# Sizes


def sizes_of(
    source: str | Path | Mapping[str, Any] | Weights, kind: Literal["autoencoder", "classifier"] | None = None
) -> dict[str, Any]:
    """What `create_autoencoder` or `create_classifier` must be called with to hold these weights.

    Shapes give everything but: the heads (those of our size of the same widths and depths, else width // 64; for the
    decoder of an image model width // 32), and where neither a grid nor a position table is in the file the clip's size
    (16 frames, one for an image model, of 224x224 pixels). With a table alone the grid is taken to be square.

    Args:
        source: as in `weights_of`.
        kind: which of the two; by default a classifier where there is a head.

    Raises:
        ValueError: the weights cannot be held: stages with different MLP ratios, or a probe's head.
    """
    weights = weights_of(source)
    if weights.is_probe and kind is None:
        raise ValueError("a probe of ours: video_convmae.load() reads the checkpoint of its run")
    kind = kind or ("classifier" if weights.has("head") else "autoencoder")
    sizes = _encoder_sizes(weights)
    if weights.position_table == "flat":
        sizes["position_table"] = "flat"
    if kind == "classifier":
        if weights.position_table == "flat" and "encoder.positions" not in weights.tensors:
            sizes["learnable_positions"] = False
        return sizes | ({"num_classes": len(weights.tensors["head.bias"])} if weights.has("head") else {})
    if weights.has("decoder"):
        sizes |= _decoder_sizes(weights, sizes["size"])
    return sizes | {"msd": weights.has("fusion") or len(sizes["strides"]) == 1 or not weights.has("decoder")}


def _encoder_sizes(weights: Weights) -> dict[str, Any]:
    tensors, geometry = weights.tensors, weights.geometry
    widths = tuple(kernel.shape[0] for kernel in embeddings(tensors))
    frames = weights.frames or (1 if weights.is_image else max(1, 16 // geometry.tubelet))
    last = len(widths) - 1
    stages = [*(f"encoder.conv_stages.{stage}" for stage in range(last)), "encoder.attention_blocks"]
    depths = tuple(_count(tensors, stage) for stage in stages)
    named = next((name for name, size in SIZES.items() if (size.widths, size.depths) == (widths, depths)), None)
    sizes = {
        "size": named or ("base" if last else "vit_base"),
        "widths": widths,
        "depths": depths,
        "heads": SIZES[named].heads if named else max(1, widths[last] // 64),
        "strides": geometry.strides,
        "tubelet": geometry.tubelet,
        "mlp_ratio": _mlp_ratio(tensors, stages),
        "channels": geometry.channels,
        "num_frames": frames * geometry.tubelet,
        "image_size": 224,
    }
    if last:
        kernel = tensors["encoder.conv_stages.0.0.depthwise.weight"]
        sizes |= {"temporal_kernel": kernel.shape[2], "spatial_kernel": kernel.shape[-1]}
    table, patch = tensors.get("encoder.positions"), math.prod(geometry.strides)
    if weights.grid is not None:
        height, width = (side * patch for side in weights.grid[1:])
        sizes["image_size"] = height if height == width else (height, width)
    elif table is not None:
        side = math.isqrt(table.shape[1] * geometry.tubelet // sizes["num_frames"])
        if side**2 * sizes["num_frames"] == table.shape[1] * geometry.tubelet:
            sizes["image_size"] = side * patch
    return sizes


def _decoder_sizes(weights: Weights, size: str) -> dict[str, Any]:
    width = weights.tensors["decoder.embedding.bias"].numel()
    depth = _count(weights.tensors, "decoder.blocks")
    named: Size = SIZES[size]
    known = named.image_decoder if weights.is_image else named.video_decoder
    heads = known[2] if known[:2] == (width, depth) else max(1, width // (32 if weights.is_image else 64))
    return {
        "decoder": (width, depth, heads),
        "decoder_mlp_ratio": _mlp_ratio(weights.tensors, ["decoder.blocks"]),
        "target": "patch" if weights.is_image else "patch_channel",
    }


def _count(tensors: Tensors, blocks: str) -> int:
    count = 0
    while f"{blocks}.{count}.norm1.weight" in tensors:
        count += 1
    return count


def _mlp_ratio(tensors: Tensors, stages: list[str]) -> float:
    shapes = {tuple(t.shape) for n, t in tensors.items() if n.startswith(tuple(stages)) and n.endswith("fc1.weight")}
    ratios = sorted({hidden / width for hidden, width in shapes})
    if len(ratios) > 1:
        raise ValueError(f"the stages have MLP ratios {ratios}; ours has one for all, as the released base model")
    return ratios[0] if ratios else 4.0


def fixed_grids(table: Tensor, kind: str, frames: int) -> list[positions.Grid]:
    """The grids of so many frames over which the fixed table of a kind is `table`, `(1, N, D)`, to rounding.

    There is none where it was learnt, and several where a table does not tell them apart, as the flat one.
    """
    tokens, width = table.shape[-2:]
    each, rest = divmod(tokens, frames)
    if rest or width % 4:  # no table of these frames, or none of this width
        return []
    grids = [(frames, h, each // h) for h in range(1, each + 1) if each % h == 0]
    return [grid for grid in grids if _difference(table, positions.TABLES[kind](grid, width)) <= _rounding(table)]


def _difference(table: Tensor, other: Tensor) -> float:
    """The largest difference of two position tables `([1,] N, D)`."""
    return (table.float() - other).abs().max().item()


def _rounding(table: Tensor) -> float:
    """By how much a fixed table may differ from ours, as it was stored; a learnt one does by more."""
    return max(1e-4, torch.finfo(table.dtype).eps)  # values are below 2, whose neighbours are eps apart


def summarize_names(names: Iterable[str]) -> str:
    """Names in short: all that differ only from the first numbered part on are one, with their count."""
    heads = Counter(re.sub(r"\.\d.*", "...", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in heads.items())
