"""Files of weights: what they hold, read and written without running a stranger's code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

Tensors: TypeAlias = "dict[str, Tensor]"


ABOUT = ("config", "geometry")  # beside the tensors, as JSON in the metadata of .safetensors: see `save`


def read_file(path: str | Path) -> dict[str, Any]:
    """What a file holds: `.safetensors` as that, anything else as `torch.save` wrote it. No pickled code is executed.

    Of all classes only `argparse.Namespace` is allowed, which the released checkpoints keep their arguments in. A
    checkpoint of a run of ours is a folder; its weights are under `model`, its configuration under `config`, as in the
    `model.safetensors` that the run leaves at its end. Weights that `save` wrote are under `model` too where it wrote
    something beside them.

    Raises:
        ValueError: the file cannot be read, or holds more than tensors, plain data and that.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return {"model": read_shards(path, "model"), "config": run_config(path)}
        if path.suffix == ".safetensors":
            tensors, about = safetensors_torch.load_file(path), _about(path)
            return {"model": tensors, **about} if about else tensors
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error


def run_config(path: Path) -> dict[str, Any] | None:
    """The configuration in a checkpoint folder or a `.safetensors` of a run of ours, as plain data; None elsewhere."""
    if path.is_dir():
        return json.loads((path / "checkpoint.json").read_text(encoding="utf-8")).get("config")
    return _about(path).get("config") if path.suffix == ".safetensors" else None


def _about(path: Path) -> dict[str, Any]:
    """What `save` wrote beside the tensors of a `.safetensors`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return {name: json.loads(metadata[name]) for name in ABOUT if name in metadata}


def read_shards(folder: Path, *parts: str) -> Tensors:
    """The tensors of a checkpoint folder, put together from the files of all processes that wrote it.

    torch.distributed.checkpoint notes in each file where in the whole tensor its pieces lie.

    Args:
        folder: of `shard-*.safetensors`.
        parts: only tensors `part/name` of these parts, under their names without it; none: all, under whole names.
    """
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in file.keys():  # noqa: SIM118, it is no mapping
                if not parts or name.partition("/")[0] in parts:
                    offsets = places.get(name, {}).get("saved_offsets", [])
                    pieces.setdefault(name, []).append((offsets, file.get_tensor(name)))
    return {name.partition("/")[2] if parts else name: _assembled(found) for name, found in pieces.items()}


def shard_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names of the tensors in a checkpoint folder and the shape of a piece of each: no more than `()` says much."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _assembled(pieces: list[tuple[list[int], Tensor]]) -> Tensor:
    """One tensor of its pieces and where they begin in it."""
    if len(pieces) == 1:
        return pieces[0][1]
    ends = [[start + size for start, size in zip(offsets, piece.shape)] for offsets, piece in pieces]
    tensor = pieces[0][1].new_empty([max(along) for along in zip(*ends)])
    for (offsets, piece), end in zip(pieces, ends):
        tensor[tuple(slice(*span) for span in zip(offsets, end))] = piece
    return tensor


def save_file(
    tensors: Tensors,
    path: str | Path,
    config: Mapping[str, Any] | None = None,
    geometry: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors, and plain data that `read` gives back beside them.

    `.safetensors` has the data in its metadata; anything else is `{"model": tensors, ...}` by `torch.save`.

    Args:
        tensors: by name.
        path: of the file.
        config: of a run of ours.
        geometry: of converted weights, as `Weights.about` tells it.
    """
    path = Path(path)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    about = {name: value for name, value in zip(ABOUT, (config, geometry)) if value is not None}
    if path.suffix == ".safetensors":
        metadata = {"format": "pt", **{name: json.dumps(value) for name, value in about.items()}}
        safetensors_torch.save_file(tensors, path, metadata=metadata)
    else:
        torch.save({"model": tensors, **about}, path)
