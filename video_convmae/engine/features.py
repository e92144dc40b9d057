"""Features of a list: what a model makes of every record, in one file.

    table = features.read("features/features.npz")
    table.features[~table.failed]           # (R, D) pooled, or (R, N, D) tokens, in the list's order

They are computed as scores are (evaluate.py): the list is cut into fixed chunks that are dealt whole, so that the file
is the same for any number of processes; a record that cannot be read is reported, and its row is zeros; an interrupted
extraction goes on. Rows stay in each process's own file until all are there, and are then copied into one: at no time
are more than a chunk in memory.

The file is a NumPy archive, as scores.npz is and with the same names: NumPy alone reads it, and nothing is pickled.

Letters: R records, N tokens, D width of a token.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from contextlib import closing
from math import prod
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from video_convmae.data.datasets import BadRecord, TestViewDataset
from video_convmae.data.records import Records
from video_convmae.models.autoencoder import Autoencoder, FusedEncoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe

from . import distributed
from .distributed import DistInfo
from .evaluation import ChunkStore, ProtocolConfig, in_order, score_chunks
from .tasks import Normalizer

Kind = Literal["pooled", "tokens"]
Model = Autoencoder | Classifier | Probe


class FeatureTable(NamedTuple):
    """The features of a list, in its order.

    features: `(R, D)` or `(R, N, D)` float32; zeros where the record could not be read.
    labels: `(R,)` int64, -1 where the list has none.
    failed: `(R,)` bool.
    records: `(R,)`, their paths.
    about: whose features these are, and how they were made.
    """

    features: np.ndarray
    labels: np.ndarray
    failed: np.ndarray
    records: np.ndarray
    about: dict[str, Any]


def compute_of(model: Model, kind: Kind) -> Callable[[Tensor], Tensor]:
    """Clips `(B, C, T, H, W)` -> their features, `(B, D)` pooled or `(B, N, D)` tokens, as `source` says."""

    def tokens(clips: Tensor) -> Tensor:
        return model.encode(clips).float()

    def pooled(clips: Tensor) -> Tensor:
        mean = tokens(clips).mean(dim=1)
        return model.norm(mean) if isinstance(model, Classifier) else mean

    return {"pooled": pooled, "tokens": tokens}[kind]


def shape_of(model: Model, kind: Kind) -> tuple[int, ...]:
    """The shape of a record's features."""
    width = model.encoder.width
    return (width,) if kind == "pooled" else (prod(model.encoder.config.grid), width)


def source(model: Model, kind: Kind) -> str:
    """Where in the model features are read, in words."""
    if not isinstance(model, FusedEncoder):
        tokens = "tokens after the last attention block, before any norm"
        return (
            tokens if kind == "tokens" else "the mean over the tokens, after the norm: what the classifier's head reads"
        )
    fused = model.fusion is not None and len(model.fusion.joints) > 0
    tokens = f"tokens after {'fusion and the' if fused else 'the'} final norm, with which they were pretrained"
    return tokens if kind == "tokens" else f"the mean over the {tokens}"


def extract(
    model: Model,
    kind: Kind,
    views: TestViewDataset,
    pixels: Normalizer,
    config: ProtocolConfig,
    group: DistInfo,
    workers: int,
    start_method: str | None,
    folder: Path,
) -> None:
    """Compute the features of every record whose features are not in the folder yet; `write` makes one file of them.

    Args:
        model: on the group's device, not wrapped.
        kind: pooled features are averaged over the views; tokens are those of one view.
        views, pixels, config, group, workers, start_method: as in `evaluate.evaluate`.
        folder: one that all processes see.

    Raises:
        ValueError: tokens of several views.
    """
    if kind == "tokens" and views.views.count > 1:
        raise ValueError(
            f"{views.views.segments} segments x {views.views.crops} crops were asked for; expected 1 x 1 for tokens: "
            "those of different views show different places, and their mean shows none"
        )
    kept = ChunkStore(folder, shape_of(model, kind), group.rank)
    with closing(kept):
        compute, done = compute_of(model, kind), kept.records()
        chunks = score_chunks(model, compute, views, pixels, config, group, workers, start_method, done, True)
        with closing(chunks):
            for chunk in chunks:
                kept.add(chunk)
    distributed.barrier()


def write(
    folder: Path, shape: tuple[int, ...], records: Records, path: Path, about: dict[str, Any]
) -> tuple[BadRecord, ...]:
    """Make one file of what `extract` left in a folder. Same features, same bytes.

    Args:
        folder: it stays as it is.
        shape: of a record's features.
        records: the list.
        path: the file, renamed to this when it is whole.
        about: what it says of itself: plain data.

    Returns:
        What could not be read, in the list's order.

    Raises:
        RuntimeError: features are missing.
    """
    kept = ChunkStore(folder, shape, 0)
    maps = kept.mapped()
    places = {
        int(record): (number, row) for number, rows in enumerate(maps) for row, record in enumerate(rows["record"])
    }
    missing = len(records) - len(places)
    if missing:
        raise RuntimeError(
            f"the features of {missing} of {len(records)} records are not in {folder}: the processes of all machines "
            "must write to the same file system"
        )
    rows = [places[index] for index in range(len(records))]
    partial = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, "features") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(records), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for number, row in rows:
                file.write(maps[number]["values"][row].tobytes())
        others = {
            "labels": records.labels,
            "failed": np.array([maps[number]["failed"][row] for number, row in rows]),
            "records": np.array([record.path for record in records]),
            "about": np.array(json.dumps(about)),
        }
        for name, array in others.items():
            with _member(archive, name) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    partial.replace(path)
    return in_order(kept.faults())


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """An array of an archive, to be written; without the time of day, so that the same arrays are the same bytes."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def read(path: str | Path) -> FeatureTable:
    """Read a file of features.

    Raises:
        OSError, ValueError: there is no such file, or it is none of features.
    """
    with np.load(path, allow_pickle=False) as file:
        if absent := [name for name in FeatureTable._fields if name not in file]:
            raise ValueError(f"{path} holds no {', '.join(absent)}; expected a file of tools/extract_features.py")
        arrays = {name: file[name] for name in FeatureTable._fields}
    return FeatureTable(**arrays | {"about": json.loads(str(arrays["about"]))})
