"""Read and write files of weights without executing code that they may contain."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from video_convmae import hub
from video_convmae.atomic import replacing
from video_convmae.errors import UserError
from video_convmae.shipped import explain_download

Tensors: TypeAlias = "dict[str, Tensor]"

EXTRAS = ("config", "geometry")  # plain data beside the tensors; in .safetensors, JSON in the metadata
FOLDER_FILES = (  # in which Hugging Face's folders, and finished runs of ours, keep their weights
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a file of weights, the checkpoint folder of a run, or a folder of Hugging Face's. No pickle is executed.

    The contents determine how a file is read, not its suffix.

    Returns:
        The object given to `torch.save`; of a checkpoint `{"model", "config"}` and, with `train.ema`, `"ema"`: the
        names and shapes of the average alone, on the meta device, as the weights are taken. Of safetensors the tensors
        by name, or, with plain data beside them, `{"model": tensors, "config": ..., "geometry": ...}` as `save_file`
        was given them. Where a config.json of transformers lies beside the file, `huggingface` has its contents, too:
        `{"config", "preprocessor"}`; beside one of `save_pretrained`, `config` is of its config.json.

    Raises:
        UserError: the file is not there, is none of weights, is cut off, or holds more than tensors, plain data and an
            `argparse.Namespace`, in which published checkpoints keep their arguments.
    """
    path = Path(path).expanduser()
    try:
        if (path / "checkpoint.json").exists():
            shapes = {name: shape for name, shape in shard_shapes(path).items() if name.startswith("ema/")}
            average = {name.removeprefix("ema/"): torch.empty(shape, device="meta") for name, shape in shapes.items()}
            run = {"model": read_shards(path, "model"), "config": run_config(path)}
            return run | ({"ema": average} if average else {})
        file = find_file(path) if path.is_dir() else path
        if file is None:
            raise UserError(f"the folder has none of {', '.join(FOLDER_FILES)}")
        contents: dict[str, Any] = {}
        for part in parts_of(file):
            path = part
            contents |= _read_part(part)
        beside = _read_beside(file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        hint = "" if path.exists() else explain_download(path)
        raise UserError(f"{path} cannot be read as weights: {reason}{hint}") from error
    return (contents if "model" in contents else {"model": contents}) | beside if beside else contents


def check_finite(tensors: Tensors, names: Mapping[str, str] | None = None) -> None:
    """Raise a UserError unless every number is finite; `names` are those to say, by the tensors' own."""
    numbers = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.is_meta}
    if faults := [name for name, tensor in numbers.items() if not torch.isfinite(tensor).all()]:
        first = (names or {}).get(faults[0], faults[0])
        raise UserError(
            f"{len(faults)} of the {len(tensors)} tensors hold NaN or infinity, the first {first}: training diverged "
            "before they were saved, or the file is damaged; take an earlier checkpoint"
        )


def find_file(folder: Path) -> Path | None:
    """Return the file of weights in a folder, or the index of its shards; None: there is none."""
    return next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)


def parts_of(file: Path) -> list[Path]:
    """Return the files that hold the tensors: those that an index names, or the file itself.

    Raises:
        UserError: the index cannot be read, or a file that it names is missing.
    """
    if not file.name.endswith(".index.json"):
        return [file]
    try:
        names = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{file.name} is no index of shards: it has no weight_map") from error
    if missing := [name for name in names if not (file.parent / name).is_file()]:
        raise UserError(
            f"{len(missing)} of the {len(names)} files that {file.name} names are missing, the first {missing[0]}: "
            "download them into the same folder"
        )
    return [file.parent / name for name in names]


def _read_beside(file: Path) -> dict[str, Any]:
    """Read the configuration that `save_pretrained`, or transformers, keeps beside its weights; empty: none does."""
    if (ours := hub.read_folder(file.parent)) is not None:
        return {"config": ours.config} if file.name == hub.WEIGHTS else {}
    config = read_settings(file.with_name("config.json"))
    if config is None or "model_type" not in config:
        return {}
    preprocessor = read_settings(file.with_name("preprocessor_config.json"))
    return {"huggingface": {"config": config, "preprocessor": preprocessor}}


def read_settings(path: Path) -> dict[str, Any] | None:
    """Read a JSON file beside weights; None: there is none. Raises a UserError if it is no JSON."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path.name} beside it is no JSON: {error}") from error
    return values if isinstance(values, dict) else None


def _read_part(path: Path) -> dict[str, Any]:
    """Read one file."""
    with open(path, "rb") as file:
        start = file.read(512)
    if (fault := _foreign_contents(start)) is not None:
        raise UserError(fault)
    if is_safetensors(start):
        return _read_safetensors(path)
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(file, map_location="cpu", weights_only=True)  # given a path, it would heed the suffix
    except Exception as error:  # torch raises several kinds, with advice that would execute the file
        raise UserError(_refusal(path, start, str(error))) from error
    if not isinstance(contents, Mapping):
        raise UserError(f"it holds a {type(contents).__name__}; expected tensors by name")
    return dict(contents)


def is_safetensors(start: bytes) -> bool:
    """Return True if a file that starts so has the safetensors format: the length of a JSON header, then the header."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        tensors, extras = safetensors_torch.load_file(path), _read_extras(path)
    except SafetensorError as error:
        raise UserError(
            f"it is cut off or damaged ({path.stat().st_size:,} bytes; {error}): download or copy it again"
        ) from error
    return {"model": tensors, **extras} if extras else tensors


def _foreign_contents(start: bytes) -> str | None:
    """Return what is wrong with a file that starts so; None: it may be one of weights."""
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", start)
        bytes_there = f" of {int(size[1]):,} bytes" if size else ""
        return f"it is the pointer of Git LFS to a file{bytes_there}, not that file: run `git lfs pull` in its folder"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<error")):
        return (
            "it is a web page, not weights: the link led to a page (a login, a preview, an error); open it in a browser"
        )
    if all(byte >= 32 or byte in b"\t\r\n" for byte in start) and not start.startswith(b"PK"):
        shown = " ".join(start[:60].decode("utf-8", "replace").split())
        return f"it is text, which begins {shown!r}: give the file of the weights, or download it again"
    others = {b"\x1f\x8b": "gzip", b"7z": "7z", b"Rar!": "rar", b"\x93NUMPY": "NumPy", b"\x89HDF": "HDF5"}
    kind = next((kind for magic, kind in others.items() if start.startswith(magic)), None)
    return None if kind is None else f"it is a {kind} file; expected safetensors or a file of torch.save"


def _refusal(path: Path, start: bytes, said: str) -> str:
    """Return why `torch.load` did not read a file, in a sentence of ours."""
    if "TorchScript" in said or "constants.pkl" in said:
        return "it is a TorchScript program, not weights: save its state_dict() with torch.save"
    if found := re.search(r"GLOBAL ([\w.]+)", said):
        return (
            f"beside tensors it holds a Python object, {found[1]}, and to read it would execute code of the file. Ask "
            "its authors for safetensors; or, if you trust them, save the tensors alone in a Python of your own: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], 'tensors.pth')"
        )
    if start.startswith(b"PK") or "central directory" in said or "EOF" in said or "Ran out of input" in said:
        return f"it is cut off, or no file of torch.save ({path.stat().st_size:,} bytes): download or copy it again"
    said = said.partition("WeightsUnpickler error:")[2] or said
    line = next((line.strip() for line in said.splitlines() if line.strip()), "unknown")
    return f"it is neither safetensors nor a file of torch.save with tensors and plain data alone ({line[:200]})"


def save_file(
    tensors: Tensors,
    path: str | Path,
    config: Mapping[str, Any] | None = None,
    geometry: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors with plain data beside them; `read_file` returns both. A file of this name is replaced at the end.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:  # opened for both: the system's error names the file
        if path.suffix != ".safetensors":
            torch.save({"model": tensors, **extras}, file)
            return
        metadata = {"format": "pt", **{name: json.dumps(value) for name, value in extras.items()}}
        try:
            safetensors_torch.save_file(tensors, file.name, metadata=metadata)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be written: {error}") from error


def run_config(path: Path) -> dict[str, Any] | None:
    """Return the configuration of the run that wrote a checkpoint folder or a file of weights; None: no run did."""
    if path.is_dir():
        return json.loads((path / "checkpoint.json").read_text(encoding="utf-8")).get("config")
    if path.name == hub.WEIGHTS and (ours := hub.read_folder(path.parent)) is not None:
        return ours.config
    with open(path, "rb") as file:
        start = file.read(16)
    if is_safetensors(start):
        return _read_extras(path).get("config")
    if not start.startswith(b"PK"):  # of torch.save
        return None
    with torch.serialization.safe_globals([argparse.Namespace]):
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return contents.get("config") if isinstance(contents, Mapping) else None


def _read_extras(path: Path) -> dict[str, Any]:
    """Return the plain data of ours in the metadata of safetensors; others may use the same words for texts."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    extras = {}
    for name in EXTRAS:
        try:
            value = json.loads(metadata.get(name, "null"))
        except ValueError:
            continue
        if isinstance(value, dict):
            extras[name] = value
    return extras


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
