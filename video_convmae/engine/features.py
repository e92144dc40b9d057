"""Features of a list in one file.

    table = read_features("features/features.npz")
    table.features[~table.failed]           # (R, D) pooled, or (R, N, D) tokens, in the list's order

Rows stay in each process's own file until all are finished and are then copied into one: never more than a chunk is in
memory. The file is a NumPy archive without pickles, with the names of an evaluation's scores.npz.

Letters: R records, N tokens, D width of a token.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from contextlib import closing
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from torch import Tensor

from video_convmae.data.datasets import BadRecord
from video_convmae.data.records import Records
from video_convmae.errors import UserError
from video_convmae.models.autoencoder import FusedEncoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.pytorchvideo import LibraryClassifier

from .distributed import barrier
from .inference import ChunkStore, ListInference, Model, in_list_order
from .options import FeatureKind


class FeatureTable(NamedTuple):
    """The features of a list, in its order.

    features: `(R, D)` or `(R, N, D)` float32; zeros where the record could not be read.
    labels: `(R,)` int64, -1 where the list has none.
    failed: `(R,)` bool.
    records: `(R,)`, their paths.
    about: model, list and views of the features, as plain data.
    """

    features: np.ndarray
    labels: np.ndarray
    failed: np.ndarray
    records: np.ndarray
    about: dict[str, Any]


def feature_function(model: Model, kind: FeatureKind) -> Callable[[Tensor], Tensor]:
    """Return clips `(B, C, T, H, W)` -> features, `(B, D)` pooled or `(B, N, D)` tokens; see `feature_source`."""

    if isinstance(model, LibraryClassifier):
        _refuse_tokens(model, kind)
        return lambda clips: model.pooled(clips).float()

    def tokens(clips: Tensor) -> Tensor:
        return model.encode(clips).float()

    def pooled(clips: Tensor) -> Tensor:
        mean = tokens(clips).mean(dim=1)
        return model.norm(mean) if isinstance(model, Classifier) else mean

    return {"pooled": pooled, "tokens": tokens}[kind]


def feature_shape(model: Model, kind: FeatureKind) -> tuple[int, ...]:
    """Return the shape of a record's features. Raises UserError: tokens are asked for, and there are none."""
    if isinstance(model, LibraryClassifier):
        _refuse_tokens(model, kind)
        return (model.projection.in_features,)
    width = model.encoder.width
    return (width,) if kind == "pooled" else (prod(model.encoder.config.grid), width)


def _refuse_tokens(model: LibraryClassifier, kind: FeatureKind) -> None:
    if kind == "tokens":
        raise UserError(f"kind is tokens and the model {model.config.size}; expected pooled: ours alone have tokens")


def feature_source(model: Model, kind: FeatureKind) -> str:
    """Say where in the model features are read."""
    if isinstance(model, LibraryClassifier):
        return "the input of the last linear layer, the mean over the places that it sees"
    if not isinstance(model, FusedEncoder):
        if kind == "tokens":
            return "tokens after the last attention block, before any norm"
        return "the mean over the tokens, after the norm: the input of the classifier's head"
    fused = model.fusion is not None and len(model.fusion.joints) > 0
    tokens = f"tokens after {'fusion and the' if fused else 'the'} final norm, with which they were pretrained"
    return tokens if kind == "tokens" else f"the mean over the {tokens}"


def extract_rows(inference: ListInference, kind: FeatureKind, folder: Path) -> None:
    """Compute the features of every record that the folder does not hold yet; `write_features` joins them.

    Args:
        inference: the model over the list.
        kind: pooled features are averaged over the views; tokens are those of one view.
        folder: visible to all processes.

    Raises:
        ValueError: tokens of several views.
    """
    views = inference.views.views
    if kind == "tokens" and views.count > 1:
        raise UserError(
            f"{views.segments} segments x {views.crops} crops were asked for; expected 1 x 1 for tokens: those of "
            "different views show different places, and their mean shows none"
        )
    store = ChunkStore(folder, feature_shape(inference.model, kind), inference.info.rank)
    done = store.stored_records()
    compute = feature_function(inference.model, kind)
    with closing(store), closing(inference.chunks(compute, done, show=True)) as chunks:
        for chunk in chunks:
            store.add(chunk)
    barrier()


def write_features(
    folder: Path, shape: tuple[int, ...], records: Records, path: Path, about: dict[str, Any]
) -> tuple[BadRecord, ...]:
    """Join the rows that `extract_rows` left in a folder into one file. The same features give the same bytes.

    Args:
        folder: left unchanged.
        shape: of a record's features.
        records: the list.
        path: of the file, which is renamed to this name when it is whole.
        about: model, list and views, as plain data.

    Returns:
        Records that could not be read, in the list's order.

    Raises:
        RuntimeError: features are missing.
    """
    store = ChunkStore(folder, shape, 0)
    maps = store.mapped_rows()
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
    return in_list_order(store.bad_records())


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Open an array of an archive for writing, without the time of day: the same arrays give the same bytes."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def read_features(path: str | Path) -> FeatureTable:
    """Read a file of features.

    Raises:
        OSError, ValueError: there is no such file, or it holds no features.
    """
    with np.load(path, allow_pickle=False) as file:
        if absent := [name for name in FeatureTable._fields if name not in file]:
            raise UserError(f"{path} holds no {', '.join(absent)}; expected a file of `video-convmae features`")
        arrays = {name: file[name] for name in FeatureTable._fields}
    return FeatureTable(**arrays | {"about": json.loads(str(arrays["about"]))})
