"""Format of a family of published checkpoints, and the translation of names and values that all families share.

The tensors differ from ours in two ways. A convolution with kernel = stride is a Linear here, over nested cells
(models/packing.py), and attention may be stored as separate query, key and value. Both are permutations of values, so a
tensor that is read and written again is equal bit for bit.

Letters: O output channels, C input channels, t h w a kernel, D width of a token.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product, zip_longest
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor

from video_convmae.models.packing import nest, unnest
from video_convmae.models.sizes import PositionTable

from ..files import Tensors
from ..state import POSITIONS, Weights, embedding_weights, summarize_names

_BRACES = re.compile(r"{(.*?)}")
NO_CLS = "a CLS token; ours has none, its row of the position table is dropped too"


@dataclass(frozen=True)
class Format:
    """A family of published checkpoints.

    title: name in messages.
    marker: name of a tensor in all of its files, possibly behind a prefix. ndim: that tensor's number of dimensions.
    names: their names without the prefix -> ours, see `name_table`; for reading and writing.
    aliases: further names, for reading.
    dropped: their names without a counterpart here -> reason.
    separate_qkv: endings of the tensors that are stored for query, key and value apart.
    prefixes: of encoder and norm, written for (pretraining, finetuning).
    position_table: fixed table that the models were trained with.
    after_read: completes weights that were read.
    before_write: checks and completes weights for writing, given the `image_size` of `to_format`. None: not writable.
    """

    title: str
    marker: str
    ndim: int
    names: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    separate_qkv: tuple[str, ...] = ()
    prefixes: tuple[str, str] = ("", "")
    position_table: PositionTable = "sincos"
    after_read: Callable[[Weights], Weights] = lambda weights: weights
    before_write: Callable[[Weights, Any], Weights] | None = None

    def find_prefix(self, tensors: Tensors) -> str | None:
        """Return the prefix of the marker (`encoder.`, `backbone.`, nothing); None if this is another format."""
        for name, tensor in tensors.items():
            if name == self.marker or name.endswith("." + self.marker):
                return name.removesuffix(self.marker) if tensor.ndim == self.ndim else None
        return None

    def read(self, given: Tensors, prefix: str) -> Weights:
        """Translate their tensors to ours. A name that this format does not have is a ValueError."""
        tensors: Tensors = {}
        names, dropped, unknown = {}, {}, []
        for theirs, tensor in given.items():
            name = theirs.removeprefix(prefix)
            if name in self.dropped:
                dropped[theirs] = self.dropped[name]
            elif ours := translate(name, self.aliases) or translate(name, self.names):
                names[ours], tensors[ours] = theirs, tensor
            else:
                unknown.append(theirs)
        if unknown:
            raise ValueError(f"{self.title} weights with names that it does not have: {summarize_names(unknown)}")
        kernels = embedding_weights(tensors)  # (O, C, [t], h, w), without t for an image
        strides, is_video = tuple(kernel.shape[-1] for kernel in kernels), kernels[0].ndim == 5
        tensors = {name: to_our_values(name, t, strides) for name, t in merge_qkv(tensors).items()}
        weights = Weights(
            self.title,
            tensors,
            strides,
            tubelet=kernels[0].shape[2] if is_video else 1,
            channels=kernels[0].shape[1],
            frames=None if is_video else 1,
            position_table=self.position_table,
            names={name: names.get(name) or names.get(name.replace(".qkv.", ".query."), name) for name in tensors},
            dropped=dropped,
        )
        return self.after_read(weights)

    def write(self, weights: Weights) -> Tensors:
        """Translate our tensors to theirs, without checking that this format can hold the model."""
        prefix = self.prefixes[0 if "decoder.mask_token" in weights.tensors else 1]
        names = {ours: theirs for theirs, ours in self.names.items()}
        written: Tensors = {}
        tensors = weights.without("feature_heads").tensors
        for name, tensor in split_qkv(tensors, self.separate_qkv).items():
            theirs = translate(name, names)
            if theirs is None:
                raise ValueError(f"{self.title} has no name for {name}")
            prefixed = prefix + theirs if name.startswith(("encoder.", "norm.")) else theirs
            written[prefixed] = to_their_values(name, tensor, weights, self.ndim).contiguous()
        return written


def argument_properties(arguments: argparse.Namespace, weights: Weights) -> dict[str, Any]:
    """Return what the arguments of the training state, which ConvMAE, MAE and VideoMAE keep in their checkpoints."""
    given = vars(arguments)
    properties: dict[str, Any] = {}
    is_image = weights.frames == 1
    normalises = given.get("normlize_target", given.get("norm_pix_loss"))
    if weights.has("decoder") and isinstance(normalises, bool):
        properties["target"] = ("patch" if is_image else "patch_channel") if normalises else "none"
    frames, side = given.get("num_frames"), given.get("input_size")
    if not is_image and isinstance(frames, int) and isinstance(side, int):
        patch, table = prod(weights.strides), weights.tensors.get(POSITIONS[0])
        grid = (frames // weights.tubelet, side // patch, side // patch)
        if table is None or table.shape[1] == prod(grid):
            properties["grid"] = grid
    if isinstance(given.get("sampling_rate"), int) and not is_image:
        properties["preprocessing"] = {"data.stride": given["sampling_rate"]}
    return properties


# Names. In a pattern "#" is a number and "*" the rest of a name; the first pattern that matches counts.


def name_table(text: str, their_prefix: str = "", our_prefix: str = "") -> dict[str, str]:
    """Expand a table of patterns, theirs and ours, to a mapping.

    A row `stage{1,2}.*  fusion.{0,1}.*` stands for `stage1.*  fusion.0.*` and `stage2.*  fusion.1.*`. The prefixes, for
    example of numbered blocks, are put before every name.
    """
    names = {}
    for theirs, ours in filter(None, map(str.split, text.splitlines())):
        braces = zip(_BRACES.findall(theirs), _BRACES.findall(ours))
        for choice in product(*(zip(left.split(","), right.split(",")) for left, right in braces)):
            left, right = theirs, ours
            for their_word, our_word in choice:
                left, right = _BRACES.sub(their_word, left, count=1), _BRACES.sub(our_word, right, count=1)
            names[their_prefix + left] = our_prefix + right
    return names


def translate(name: str, names: Mapping[str, str]) -> str | None:
    """Return the counterpart of a name; None if it matches no pattern."""
    for pattern, other in names.items():
        if match := _compile(pattern).fullmatch(name):
            literals = re.split(r"[#*]", other)
            return "".join(map("".join, zip_longest(literals, match.groups(), fillvalue="")))
    return None


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)"))


# Values


def merge_qkv(tensors: Tensors) -> Tensors:
    """Join separate query, key and value to qkv. An absent key bias is zero; another absence is a ValueError."""
    merged = dict(tensors)
    for name in tensors:
        if not name.endswith((".query.bias", ".query.weight")):
            continue
        query, key, value = (name.replace(".query.", f".{third}.") for third in ("query", "key", "value"))
        if name.endswith("bias"):
            merged.setdefault(key, torch.zeros_like(tensors[name]))
        if missing := [third for third in (key, value) if third not in merged]:
            raise ValueError(f"{', '.join(missing)} is missing beside {name}")
        merged[name.replace(".query.", ".qkv.")] = torch.cat([merged.pop(third) for third in (query, key, value)])
    return merged


def split_qkv(tensors: Tensors, endings: tuple[str, ...]) -> Tensors:
    """Invert `merge_qkv` for names with these endings. The key bias is left out: softmax does not depend on it."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        if ".qkv." in name and name.endswith(endings):
            thirds = dict(zip(("query", "key", "value"), tensor.chunk(3)))
            split |= {name.replace("qkv", third): values for third, values in thirds.items()}
            split.pop(name.replace("qkv.bias", "key.bias"), None)
        else:
            split[name] = tensor
    return split


def to_our_values(name: str, tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a published tensor, under our name, in our shape and order of values."""
    if factors := _nesting(name, strides):  # (O, C, [t], h, w) -> (O, t * cells * C); nest's axes are (O, t, h, w, C)
        kernel = tensor if tensor.ndim == 5 else tensor.unsqueeze(2)
        return nest(kernel.movedim(1, -1), factors).flatten(1)
    if name.endswith(".depthwise.weight"):
        return tensor.unsqueeze(2)
    if name in POSITIONS:
        return tensor.reshape(1, -1, tensor.shape[-1])  # mmpretrain's is (1, h, w, D)
    return tensor.flatten() if name == "decoder.mask_token" else tensor


def to_their_values(name: str, tensor: Tensor, weights: Weights, ndim: int) -> Tensor:
    """Invert `to_our_values`; kernels get `ndim` dimensions."""
    if factors := _nesting(name, weights.strides):
        side = prod(factors)
        cells = tensor.reshape(tensor.shape[0], weights.tubelet, side**2, -1)
        kernel = unnest(cells, factors, (weights.tubelet, side, side)).movedim(-1, 1)
        return kernel if ndim == 5 else kernel.squeeze(2)
    if name.endswith(".depthwise.weight"):
        return tensor.squeeze(2)
    return tensor[None, None] if name == "decoder.mask_token" else tensor


def _nesting(name: str, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the `factors` of models/packing.py for the cells under a kernel; empty: the tensor is not from a kernel.

    An embedding covers its own stride, a fusion the strides of all later stages, a 1x1 convolution one cell.
    """
    if match := re.fullmatch(r"(encoder\.embeddings|fusion\.joints)\.(\d+)(\.linear)?\.weight", name):
        stage = int(match[2])
        return strides[stage + 1 :] if match[1].startswith("fusion") else strides[stage : stage + 1]
    is_pointwise = re.fullmatch(r"encoder\.conv_stages\..*(proj_in|proj_out|fc1|fc2)\.weight", name)
    return (1,) if is_pointwise else ()


def drop_cls_position(weights: Weights, always: bool = True) -> Weights:
    """Drop the row of a CLS token, the first, from the position tables of weights that had one; add a note.

    always: False drops it only if the rows are not a square.
    """
    if NO_CLS not in weights.dropped.values():
        return weights
    tensors = dict(weights.tensors)
    for name in POSITIONS:
        if name in tensors and (always or isqrt(tensors[name].shape[1]) ** 2 != tensors[name].shape[1]):
            tensors[name] = tensors[name][:, 1:]
    note = (
        "the CLS token and its position were dropped, as ours has none; it took part in attention, so tokens differ "
        "from the released model's"
    )
    return replace(weights, tensors=tensors, notes=(*weights.notes, note))
