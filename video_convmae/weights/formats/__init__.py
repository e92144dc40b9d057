"""Read weights of any known format, and write published formats. One file for each family of formats.

A new family needs a `Format`, in a file of its own here, and a place in FORMATS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from video_convmae.shipped import find_shipped_weights

from ..files import Tensors, read_file
from ..options import WRITABLE
from ..state import Weights, embedding_weights, summarize_names
from . import ours
from .base import Format
from .convmae import CONVMAE, MMPRETRAIN
from .huggingface import HF_MAE, HF_VIDEOMAE
from .mae import MAE
from .videomae import VIDEOMAE

FORMATS = (CONVMAE, MMPRETRAIN, HF_VIDEOMAE, VIDEOMAE, HF_MAE, MAE)
_WRITERS: dict[str, Format] = dict(zip(WRITABLE, (CONVMAE, VIDEOMAE, HF_VIDEOMAE), strict=True))
_KINDS = {"decoder": "pretraining", "head.linear": "probe", "head": "finetuning"}  # by the first part that is present
_WRAPPERS = ("module.", "model.", "_orig_mod.", "state_dict.")  # prefixes of DDP, Lightning, torch.compile

Source: TypeAlias = str | Path | Mapping[str, Any] | Weights | nn.Module


def read_weights(source: Source) -> Weights:
    """Read weights of any known format under our names; the format is recognised by names and shapes.

    Args:
        source: a file, the name of shipped weights, the contents of a file (the tensors may be under `model`,
            `state_dict` or `module`), a model of ours, or weights that were read before.

    Raises:
        ValueError: an unknown format, a name that the format does not have, or tensors that do not fit together.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        weights = ours.from_model(source)
    else:
        if isinstance(source, (str, Path)):
            source = read_file(find_shipped_weights(source) or source)
        weights = _read_contents(source)
    kind = next((kind for part, kind in _KINDS.items() if weights.has(part)), "encoder only")
    return replace(weights, format=f"{weights.format} {kind}")


def _read_contents(contents: Mapping[str, Any]) -> Weights:
    tensors = _without_wrapper(_find_tensors(contents))
    if ours.MARKER in tensors:
        return ours.from_tensors(tensors, contents)
    for family in FORMATS:
        if (prefix := family.find_prefix(tensors)) is not None:
            return family.read(tensors, prefix)
    markers = ", ".join(dict.fromkeys([ours.MARKER, *(family.marker for family in FORMATS)]))
    raise ValueError(f"no known format: none of {markers} is among the {len(tensors)} names {summarize_names(tensors)}")


def _find_tensors(contents: Mapping[str, Any]) -> Tensors:
    for key in ("model", "state_dict", "module"):
        if isinstance(contents.get(key), Mapping):
            return _find_tensors(contents[key])
    others = [str(name) for name, value in contents.items() if not isinstance(value, Tensor)]
    if others or not contents:
        got = summarize_names(others) or "nothing"
        raise ValueError(f"expected names and tensors, or them under model, state_dict or module; got {got}")
    return dict(contents)


def _without_wrapper(tensors: Tensors) -> Tensors:
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            return _without_wrapper({name.removeprefix(wrapper): tensor for name, tensor in tensors.items()})
    return tensors


def to_format(source: Source, name: str, image_size: int | tuple[int, int] | None = None) -> Tensors:
    """Return weights in a published format: pretraining if they have a decoder, else finetuning.

    Args:
        source: as in `read_weights`.
        name: `convmae` for image hybrids, `videomae` and `huggingface` for plain ViTs.
        image_size: pixels for which the fixed position tables of `convmae` are made; None: the model's or run's own,
            or 224 if the source does not have them.

    Raises:
        ValueError: the format is unknown, or cannot hold these weights.
    """
    writer = _WRITERS.get(name)
    if writer is None or writer.before_write is None:
        raise ValueError(f"format is {name!r}; expected one of {', '.join(WRITABLE)} (MAE has a CLS token, ours none)")
    weights = read_weights(source)
    if weights.has("fc_norm") and len(weights.tensors["fc_norm.weight"]) != len(embedding_weights(weights.tensors)[-1]):
        raise ValueError("the published formats hold classifiers on the mean over tokens; this one pools motion")
    return writer.write(writer.before_write(weights, image_size))
