"""Read weights of any known format, and write published formats. One file for each family of formats.

A new family needs a `Format`, in a file of its own here, and a place in FORMATS.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from video_convmae.errors import UserError
from video_convmae.shipped import find_shipped_weights

from ..files import Tensors, check_finite, read_file
from ..options import WRITABLE
from ..state import Weights, embedding_weights
from ..wrapping import find_model
from . import ours, pytorchvideo
from .base import Format, argument_properties
from .convmae import CONVMAE, MMPRETRAIN
from .huggingface import HF_MAE, HF_VIDEOMAE, folder_properties
from .mae import MAE
from .videomae import VIDEOMAE

FORMATS = (CONVMAE, MMPRETRAIN, HF_VIDEOMAE, VIDEOMAE, HF_MAE, MAE)
_WRITERS: dict[str, Format] = dict(zip(WRITABLE, (CONVMAE, VIDEOMAE, HF_VIDEOMAE), strict=True))
_KINDS = {"decoder": "pretraining", "head.linear": "probe", "head": "finetuning"}  # by the first part that is present

Source: TypeAlias = str | Path | Mapping[str, Any] | Weights | nn.Module


def read_weights(source: Source) -> Weights:
    """Read weights of any known format under our names; the format is recognised by names and shapes.

    Args:
        source: a file or a folder of Hugging Face's, the name of shipped weights, the contents of a file (see
            wrapping.py for where the tensors may be), a model of ours, or weights that were read before.

    Raises:
        ValueError: an unknown format, a name that the format does not have, tensors that do not fit together or are not
            finite, or a configuration in or beside the file that contradicts them.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        weights = ours.from_model(source)
    elif isinstance(source, (str, Path)):
        contents = read_file(find_shipped_weights(source) or source)
        try:
            weights = _read_contents(contents, Path(source).stem)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
    else:
        weights = _read_contents(source)
    kind = next((kind for part, kind in _KINDS.items() if weights.has(part)), "encoder only")
    return replace(weights, format=f"{weights.format} {kind}")


def _read_contents(contents: Mapping[str, Any], name: str | None = None) -> Weights:
    markers = [ours.MARKER, *dict.fromkeys(family.marker for family in FORMATS), *pytorchvideo.MARKERS]
    found = find_model(contents, markers, ours.ALONE)
    if pytorchvideo.is_library(found.tensors):
        weights = pytorchvideo.read(found.tensors, contents, name)
    else:
        weights = _translate(found.tensors, contents)
    check_finite(weights.tensors, weights.names)
    return replace(weights, dropped={**weights.dropped, **found.dropped}, notes=(*weights.notes, *found.notes))


def _translate(tensors: Tensors, contents: Mapping[str, Any]) -> Weights:
    """Translate the tensors of one model, and add what the contents of their file state."""
    if ours.MARKER in tensors:
        return ours.from_tensors(tensors, contents)
    for family in FORMATS:
        if (prefix := family.find_prefix(tensors)) is None:
            continue
        weights = family.read(tensors, prefix)
        if isinstance(arguments := contents.get("args"), argparse.Namespace):
            weights = weights.stating("args in the file", argument_properties(arguments, weights))
        if isinstance(folder := contents.get("huggingface"), Mapping) and family in (HF_VIDEOMAE, HF_MAE):
            weights = weights.stating("config.json", folder_properties(folder, weights))
        if isinstance(geometry := contents.get("geometry"), Mapping):
            weights = weights.stating("the file's metadata", ours.known_properties(geometry))
        return weights
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if name.endswith(tuple(f.marker for f in FORMATS))}
    raise UserError(f"no known format: {shapes} has another number of dimensions than in any")


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
