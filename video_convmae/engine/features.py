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
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from torch import Tensor

from video_convmae.atomic import replacing
from video_convmae.data.datasets import BadRecord
from video_convmae.data.labels import label_array
from video_convmae.data.options import ViewConfig
from video_convmae.data.records import Records
from video_convmae.errors import UserError
from video_convmae.models.autoencoder import FusedEncoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.pooling import pool_features, pooled_width
from video_convmae.models.probe import AttentiveHead, Probe
from video_convmae.models.pytorchvideo import LibraryClassifier
from video_convmae.models.sizes import Pool

from .distributed import barrier
from .inference import ChunkStore, ListInference, Model, in_list_order
from .options import FeatureKind


class FeatureTable(NamedTuple):
    """The features of a list, in its order.

    features: `(R, D)` or `(R, N, D)` float32; zeros where the record could not be read.
    labels: `(R,)` int64, -1 where the list has none; of records with several classes `(R, classes)` bool.
    failed: `(R,)` bool.
    records: `(R,)`, their paths.
    about: model, list and views of the features, as plain data.
    """

    features: np.ndarray
    labels: np.ndarray
    failed: np.ndarray
    records: np.ndarray
    about: dict[str, Any]


def feature_function(model: Model, kind: FeatureKind, pool: Pool | None = None) -> Callable[[Tensor], Tensor]:
    """Return clips `(B, C, T, H, W)` -> features, `(B, K)` pooled or `(B, N, D)` tokens; see `feature_source`.

    Args:
        model: on its device.
        kind: pooled or tokens.
        pool: how they are pooled; None: as before the head of a classifier, with its norm; else the mean.

    Raises:
        UserError: the model cannot pool so.
    """
    if isinstance(model, LibraryClassifier):
        _refuse_options(model, kind, pool)
        return lambda clips: model.pooled(clips).float()
    if kind == "tokens":
        return lambda clips: model.encode(clips).float()
    pool, own = _resolve_pool(model, pool)

    def pooled(clips: Tensor) -> Tensor:
        features = model.features(clips)
        if own and isinstance(model, Classifier):
            return model.norm(model.pool(features)).float()
        if own:
            assert isinstance(model, Probe)
            assert isinstance(model.head, AttentiveHead)
            return model.head.read(features.tokens).float()
        levels = [level.float() for level in features.pyramid] if pool == "motion" else []
        return pool_features(features.tokens.float(), levels, pool, model.encoder.config.grid[0])

    return pooled


def _refuse_options(model: LibraryClassifier, kind: FeatureKind, pool: Pool | None) -> None:
    if kind == "tokens":
        raise UserError(f"kind is tokens and the model {model.config.size}; expected pooled: ours alone have tokens")
    if pool is not None:
        raise UserError(f"pool is {pool} and the model {model.config.size}; expected none: it pools as its head does")


def _resolve_pool(model: Model, pool: Pool | None) -> tuple[Pool, bool]:
    """Return the kind of pooling, and whether it is what the model's own head reads: a classifier's, with its norm, or
    an attentive probe's.

    Raises:
        UserError: the model cannot pool so.
    """
    own: Pool = model.config.pool if isinstance(model, Classifier) else "mean"
    is_attentive = isinstance(model, Probe) and isinstance(model.head, AttentiveHead)
    chosen = pool or own
    if chosen == "attentive" and not is_attentive and own != "attentive":
        raise UserError(
            "--pool attentive reads with a trained query, and this model has none: expected mean, difference, frames "
            "or motion, or a run with model.pool or model.probe attentive"
        )
    if chosen in ("motion", "difference") and model.config.grid[0] < 2:
        raise UserError(f"--pool {chosen} needs two tokens in time, and this model has one; expected mean or frames")
    return chosen, chosen == "attentive" or (isinstance(model, Classifier) and chosen == own)


def feature_shape(model: Model, kind: FeatureKind, pool: Pool | None = None) -> tuple[int, ...]:
    """Return the shape of a record's features. Raises UserError: the model has none of that kind or pooling."""
    if isinstance(model, LibraryClassifier):
        _refuse_options(model, kind, pool)
        return (model.projection.in_features,)
    config = model.encoder.config
    if kind == "tokens":
        return (prod(config.grid), model.encoder.width)
    return (pooled_width(config, _resolve_pool(model, pool)[0]),)


POOLED: dict[Pool, str] = {  # in words
    "mean": "the mean over the",
    "difference": "the mean, and the mean change over time, of the",
    "motion": "the mean, and the convolutional stages' change over time beside it, of the",
    "frames": "the mean of each time over the",
    "attentive": "what the trained query reads of the",
}


def feature_source(model: Model, kind: FeatureKind, pool: Pool | None = None) -> str:
    """Say where in the model features are read."""
    if isinstance(model, LibraryClassifier):
        return "the input of the last linear layer, the mean over the places that it sees"
    if isinstance(model, FusedEncoder):
        fused = model.fusion is not None and len(model.fusion.joints) > 0
        tokens = f"tokens after {'fusion and the' if fused else 'the'} final norm, with which they were pretrained"
        if model.may_lack_fusion:
            tokens = "tokens after the final norm, without the fusion that they may have been pretrained with"
        return tokens if kind == "tokens" else f"{POOLED[_resolve_pool(model, pool)[0]]} {tokens}"
    if kind == "tokens":
        return "tokens after the last attention block, before any norm"
    chosen, own = _resolve_pool(model, pool)
    if own:
        return f"{POOLED[chosen]} tokens, after the norm: the input of the classifier's head"
    return f"{POOLED[chosen]} tokens after the last attention block, before any norm"


def check_views(kind: FeatureKind, views: ViewConfig) -> None:
    """Raise a UserError for tokens of several views."""
    if kind == "tokens" and views.count > 1:
        raise UserError(
            f"{views.segments} segments x {views.crops} crops were asked for; expected 1 x 1 for tokens: those of "
            "different views show different places, and their mean shows none"
        )


def extract_rows(inference: ListInference, kind: FeatureKind, folder: Path, pool: Pool | None = None) -> None:
    """Compute the features of every record that the folder does not hold yet; `write_features` joins them.

    Args:
        inference: the model over the list.
        kind: pooled features are averaged over the views; tokens are those of one view.
        folder: visible to all processes.
        pool: see `feature_function`.

    Raises:
        UserError: tokens of several views.
    """
    check_views(kind, inference.views.views)
    store = ChunkStore(folder, feature_shape(inference.model, kind, pool), inference.info.rank)
    done = store.stored_records()
    compute = feature_function(inference.model, kind, pool)
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
    with open_archive(path) as archive:
        features = (maps[number]["values"][row] for number, row in rows)
        write_parts(archive, "features", np.dtype("<f4"), (len(records), *shape), features)
        others = {
            "labels": label_array(records),
            "failed": np.array([maps[number]["failed"][row] for number, row in rows]),
            "records": np.array([record.path for record in records]),
            "about": np.array(json.dumps(about)),
        }
        for name, array in others.items():
            write_parts(archive, name, array.dtype, array.shape, [array])
    # What an interrupted attempt could not read, a later one may have.
    return in_list_order([record for record in store.bad_records() if others["failed"][record.index]])


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a NumPy archive for writing, which is renamed to this name when it is whole."""
    with replacing(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        yield archive


def write_parts(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], parts: Iterable[np.ndarray]
) -> None:
    """Write an array of an archive, part by part, without the time of day: the same arrays give the same bytes.

    Args:
        archive: for writing.
        name: of the array.
        dtype, shape: of the whole array.
        parts: its values in order.
    """
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        write_npy(file, dtype, shape, parts)


def write_npy(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Write an array in NumPy's format, part by part."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:
        file.write(np.ascontiguousarray(part, dtype).tobytes())


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
