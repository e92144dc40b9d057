"""A configuration of a dense task -> model, data, trainer: detection and segmentation, beside build.py.

What both kinds of build need (the assembling of a trainer, optimizer, initial weights) is in build.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from torch.utils.data import Dataset

from video_convmae.build import Parts
from video_convmae.config import SourceConfig
from video_convmae.data.datasets import SampleKey
from video_convmae.data.decoding import DecodeError
from video_convmae.data.loader import collate_pictures
from video_convmae.data.records import ListError
from video_convmae.engine.distributed import DistInfo, all_gather_object
from video_convmae.engine.optim import Optimization
from video_convmae.engine.tasks import Task
from video_convmae.engine.validation import Validation
from video_convmae.weights.load import LoadReport


class PictureRecords(Protocol):
    """Records of a dense task: pictures and what is marked on them."""

    def __len__(self) -> int: ...

    def digest(self) -> str: ...


def picture_parts(
    data: SourceConfig,
    info: DistInfo,
    model: nn.Module,
    dataset: Dataset[Any],
    records: PictureRecords,
    task: Callable[[nn.Module], Task],
    validation: Callable[[Optimization, int], Validation | None],
    load_weights: Callable[[], LoadReport | None],
) -> Parts:
    """Return the parts of a run on pictures; the arguments are those of `Parts`."""
    return Parts(
        model=model,
        data=data,
        dataset=dataset,
        digest=records.digest(),
        task=task,
        validation=validation,
        try_records=lambda: try_pictures(data, dataset, info),
        load_weights=load_weights,
        collate=collate_pictures,
    )


def try_pictures(data: SourceConfig, dataset: Dataset[Any], info: DistInfo) -> None:
    """Read one training sample: a wrong folder is met before any work. The main process does it for all.

    Raises:
        ListError: it cannot be read, and neither can those that would replace it.
    """
    error = None
    if info.is_main:
        try:
            dataset[SampleKey(0, 0)]
        except DecodeError as met:
            error = f"{data.train}: {met}; check data.root, which is {data.root!r}, and the files"
    if (error := all_gather_object(error)[0]) is not None:
        raise ListError(error)
