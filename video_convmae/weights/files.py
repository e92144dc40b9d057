"""Read and write files of weights without executing code that they may contain."""

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

EXTRAS = ("config", "geometry")  # plain data beside the tensors; in .safetensors, JSON in the metadata


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a file of weights, or the checkpoint folder of a run. No pickled code is executed.

    Returns the object given to `torch.save`; of `.safetensors` the tensors by name, or, with plain data beside them,
    `{"model": tensors, "config": ..., "geometry": ...}` as `save_file` was given them.

    Raises:
        ValueError: the file cannot be read, or holds more than tensors, plain data and an `argparse.Namespace`, in
            which published checkpoints keep their arguments.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return {"model": read_shards(path, "model"), "config": run_config(path)}
        if path.suffix == ".safetensors":
            tensors, extras = safetensors_torch.load_file(path), _read_extras(path)
            return {"model": tensors, **extras} if extras else tensors
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error


def save_file(
    tensors: Tensors,
    path: str | Path,
    config: Mapping[str, Any] | None = None,
    geometry: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors with plain data beside them; `read_file` returns both.

    Args:
        tensors: tensors by name.
        path: file; with a suffix other than .safetensors, `torch.save` writes `{"model": tensors, ...}`.
        config: configuration of a run. geometry: `Weights.geometry` of converted weights.
    """
    path = Path(path)
    tensors = {
        name: tensor.contiguous().clone() for name, tensor in tensors.items()
    }  # safetensors refuses shared memory
    extras = {name: value for name, value in zip(EXTRAS, (config, geometry)) if value is not None}
    if path.suffix == ".safetensors":
        metadata = {"format": "pt", **{name: json.dumps(value) for name, value in extras.items()}}
        safetensors_torch.save_file(tensors, path, metadata=metadata)
    else:
        torch.save({"model": tensors, **extras}, path)


def run_config(path: Path) -> dict[str, Any] | None:
    """Return the configuration of the run that wrote a checkpoint folder or `.safetensors` file; None: no run did."""
    if path.is_dir():
        return json.loads((path / "checkpoint.json").read_text(encoding="utf-8")).get("config")
    return _read_extras(path).get("config") if path.suffix == ".safetensors" else None


def _read_extras(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return {name: json.loads(metadata[name]) for name in EXTRAS if name in metadata}


def read_shards(folder: Path, *parts: str) -> Tensors:
    """Read the tensors of a checkpoint folder, each assembled from the files of all processes that wrote it.

    With `parts`, only tensors `part/name` of these are read, and returned by `name`; without, all by `part/name`.
    """
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            # torch.distributed.checkpoint notes for each piece its first index in the whole tensor.
            sharding = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in file.keys():  # noqa: SIM118, it is no mapping
                if not parts or name.partition("/")[0] in parts:
                    offsets = sharding.get(name, {}).get("saved_offsets", [])
                    pieces.setdefault(name, []).append((offsets, file.get_tensor(name)))
    return {name.partition("/")[2] if parts else name: _assemble(found) for name, found in pieces.items()}


def shard_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the names of the tensors in a checkpoint folder, each with the shape of one of its pieces.

    A piece has the whole tensor's number of dimensions, so `()` is a scalar; its lengths may be smaller.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _assemble(pieces: list[tuple[list[int], Tensor]]) -> Tensor:
    """Join the pieces of one tensor at their offsets."""
    if len(pieces) == 1:
        return pieces[0][1]
    ends = [[start + size for start, size in zip(offsets, piece.shape)] for offsets, piece in pieces]
    tensor = pieces[0][1].new_empty([max(along) for along in zip(*ends)])
    for (offsets, piece), end in zip(pieces, ends):
        tensor[tuple(slice(*span) for span in zip(offsets, end))] = piece
    return tensor
