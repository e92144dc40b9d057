"""The configuration of a run of a detector or a segmenter; config.py has what it shares with runs on clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from video_convmae.bounds import Bounds
from video_convmae.config import RunConfig, SourceConfig
from video_convmae.data.options import CropConfig, JitterConfig
from video_convmae.dense.options import DetectorConfig, SegmenterConfig
from video_convmae.engine.options import Precision


@dataclass(frozen=True)
class DetectionDataConfig(SourceConfig):
    """Data sets in COCO's format: a JSON file, or the folder of a split's pictures."""

    train: str
    """Data set to train on."""
    root: str = ""
    """Folder that the data set's relative paths are joined to."""
    validation: str | None = None
    """Data set to validate and test on, with the same root; none: no validation."""
    augmentation: JitterConfig = field(default_factory=JitterConfig)
    """Pictures of training and of tests."""
    labels: tuple[str, ...] = ()
    """Names of the classes; a run writes those of its data here."""
    category_ids: tuple[int, ...] = ()
    """Ids of the categories that results are written with; a run writes those of its data here."""


@dataclass(frozen=True)
class PictureTestConfig:
    """Validation while a detector or a segmenter is trained, and its tests."""

    every: Annotated[float, Bounds(above=0)] = 1.0
    """Epochs between two validations; the last step is always followed by one."""
    every_steps: Annotated[int | None, Bounds(least=1)] = None
    """Optimizer steps between two validations; replaces every."""
    precision: Precision | None = None
    """Autocast type; none: that of the training."""


@dataclass(frozen=True)
class DetectionTestConfig(PictureTestConfig):
    """Validation while a detector is trained, and its tests."""

    batch_size: Annotated[int, Bounds(least=1)] = 1
    """Pictures that go through the model together; a score may depend on it in the last bits."""


@dataclass(frozen=True, kw_only=True)
class TrainDetectionConfig(RunConfig):
    """A training run of a detector."""

    data: DetectionDataConfig
    """The data sets, and how pictures are made of them."""
    model: DetectorConfig  # no default: see PretrainConfig.model
    """The detector."""
    validate: DetectionTestConfig = field(default_factory=DetectionTestConfig)
    """Validation during training, and tests."""

    @property
    def categories(self) -> tuple[tuple[int, str], ...]:
        """(id, name) of each class, from class 1 on."""
        return tuple(zip(self.data.category_ids, self.data.labels))


@dataclass(frozen=True)
class SegmentationDataConfig(SourceConfig):
    """Folders of pictures, and of label maps of the same names."""

    train: str
    """Folder of the training pictures."""
    root: str = ""
    """Folder that relative ones are joined to."""
    train_maps: str | None = None
    """Folder of the training label maps; none: the usual one beside (images/training: annotations/training)."""
    validation: str | None = None
    """Folder of the pictures to validate and test on; none: no validation."""
    validation_maps: str | None = None
    """Folder of their label maps; none: the usual one beside."""
    num_classes: Annotated[int | None, Bounds(least=1, most=255)] = None
    """Number of classes; none: the number of names."""
    labels: str | tuple[str, ...] | None = None
    """Class names: a file whose line n (from 0) names class n, or the names. A run writes the names here."""
    zero_is_ignored: bool = False
    """Value 0 of a label map is no class, and class 0 has the value 1 (ADE20K)."""
    ignored: Annotated[int, Bounds(least=0)] = 255
    """Value of label maps that is no class."""
    augmentation: CropConfig = field(default_factory=CropConfig)
    """Pictures of training and of tests."""


@dataclass(frozen=True)
class SegmentationTestConfig(PictureTestConfig):
    """Validation while a segmenter is trained, and its tests."""

    window: Annotated[int, Bounds(least=1)] = 512
    """Side of the sliding window in pixels."""
    stride: Annotated[int, Bounds(least=1)] = 341
    """Pixels from one window to the next, at most the side."""
    batch_size: Annotated[int, Bounds(least=1)] = 4
    """Windows of a picture that go through the model together."""

    def __post_init__(self) -> None:
        if self.stride > self.window:
            raise ValueError(
                f"validate.stride is {self.stride} and validate.window {self.window}; expected a stride of at most the "
                "window: pixels between two windows would have no prediction"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSegmentationConfig(RunConfig):
    """A training run of a segmenter."""

    data: SegmentationDataConfig
    """The folders, and how pictures are made of them."""
    model: SegmenterConfig  # no default: see PretrainConfig.model
    """The segmenter."""
    validate: SegmentationTestConfig = field(default_factory=SegmentationTestConfig)
    """Validation during training, and tests."""
