"""What `evaluate` and `predict` do with detectors and segmenters alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from video_convmae.config import EvaluateConfig
from video_convmae.config_dense import DetectionDataConfig, SegmentationDataConfig
from video_convmae.data.options import IMAGE_SUFFIXES
from video_convmae.data.text import ListError
from video_convmae.errors import UserError

if TYPE_CHECKING:
    from video_convmae.engine.distributed import DistInfo

PICTURES = "pictures"  # folder of drawn pictures
FROM_CLASSIFIERS = (
    "format",
    "sampling",
    "stride",
    "fps",
    "segments",
    "crops",
    "crop_pct",
    "reader",
    "labels",
    "baselines",
)

Data = TypeVar("Data", DetectionDataConfig, SegmentationDataConfig)


def refuse_options(config: EvaluateConfig, kind: str, *others: str) -> None:
    """Raise a UserError if options are given that are of classifiers, or `others` that this kind of model lacks."""
    if given := [name for name in (*FROM_CLASSIFIERS, *others) if getattr(config, name) not in (None, False)]:
        raise UserError(f"{config.weights} is a {kind}, which has no {', '.join(given)}; leave it out")


def merge_data(config: EvaluateConfig, data: Data, info: DistInfo, expected: str) -> tuple[Data, str]:
    """Return how pictures are read, and the data set to test on: as the command says, else as the run did.

    Raises:
        ListError: neither names a data set; `expected` is one, in words.
    """
    from video_convmae.build import cap_workers

    workers = cap_workers(data.workers if config.workers is None else config.workers, info)
    data = replace(data, root=data.root if config.root is None else config.root, workers=workers)
    path = config.list or data.validation
    if path is None:
        raise ListError(f"the run has no data.validation; expected --list: {expected}")
    return data, path


def print_metrics(metrics: Mapping[str, Any], names: Mapping[str, str], nothing: str) -> None:
    """Print a line of metrics, and the verdict of a model that has not learned.

    Args:
        metrics: contents of metrics.json.
        names: of the fractions to print, in words.
        nothing: printed where there is none.
    """
    values = [f"{words} {metrics[name]:.2%}" for name, words in names.items() if metrics.get(name) is not None]
    counts = f"{metrics['scored']} pictures scored, {metrics['failed']} failed"
    print(f"{', '.join(values) or nothing}; {counts}; {metrics['pictures_per_second']:.2f} pictures/s", flush=True)
    if metrics["verdict"] is not None:
        print(metrics["verdict"], flush=True)


def pictures_in(files: Sequence[str]) -> list[Path]:
    """Return pictures, in folders by their names. Raises UserError: there is none."""
    found: list[Path] = []
    for file in map(Path, files):
        inside = sorted(file.iterdir()) if file.is_dir() else [file]
        found += [each for each in inside if not file.is_dir() or each.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise UserError(f"{', '.join(files)}: no pictures there; expected files, or a folder with some")
    return found
