"""The configuration of a run: dataclasses, filled from a YAML file and the command line, strictly.

    python tools/pretrain.py --config configs/video/pretrain_k400_base.yaml --optim.base_lr 3e-4
    python tools/pretrain.py --help             every field, explained
    python tools/pretrain.py ... --print_config the whole run

An unknown field or a wrong type is an error that names the field. The settings of a part stand with that part.
"""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from video_convmae.data.datasets import ClipDataset, TestViewDataset, ViewConfig
from video_convmae.data.decoding import ReaderName
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.mixing import MixingConfig
from video_convmae.data.records import ListError, ListFormat, Records, class_names, read_list
from video_convmae.data.sampling import Sampling
from video_convmae.data.transforms import Augmentation
from video_convmae.engine import checkpoint
from video_convmae.engine.distributed import HANG_TIMEOUT
from video_convmae.engine.evaluation import ProtocolConfig
from video_convmae.engine.log import LogConfig
from video_convmae.engine.optim import OptimConfig
from video_convmae.engine.trainer import TrainConfig
from video_convmae.masking import MASKS
from video_convmae.models import sizes
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe
from video_convmae.models.sizes import EncoderConfig
from video_convmae.weights.load import Inflation, LoadReport, load_weights

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class AutoencoderConfig(sizes.AutoencoderConfig):
    """Arguments of `Autoencoder`."""

    def autoencoder(self) -> Autoencoder:
        """Build the model."""
        return Autoencoder(self)


@dataclass(frozen=True)
class ClassifierConfig(sizes.ClassifierConfig):
    """Arguments of `Classifier` or, with `probe`, of `Probe`."""

    def build(self, num_classes: int) -> Classifier | Probe:
        """Build the model."""
        return Classifier(self, num_classes) if self.probe is None else Probe(self, num_classes)


@dataclass(frozen=True)
class MaskConfig:
    """What the encoder does not see."""

    kind: Literal["tube", "random", "frame", "block"] = "tube"
    """See video_convmae/masking.py."""
    ratio: float = 0.9
    """Share of the tokens that is hidden."""


@dataclass(frozen=True)
class DataConfig:
    """The list, and how clips are made of its records."""

    train: str
    """List file; data_lists/README.md tells its forms."""
    root: str = ""
    """Folder that the list's relative paths are joined to."""
    format: ListFormat = "video"
    """What a line holds: video, frames or image."""
    decoder: ReaderName = "auto"
    """auto, torchcodec, pyav, decord, or torchcodec_cuda, which decodes on the GPU; auto is never that one. It is
    resolved once and written into the run's config."""
    decode_timeout: float = 60.0
    """Seconds after which a decode is ended and its record counts as bad."""
    max_bad_fraction: float = 0.01
    """Share of the list that may be bad before the run stops."""
    sampling: Literal["dense", "uniform"] = "dense"
    """Frames `stride` apart from one place (Kinetics), or one of each of T segments (Something-Something)."""
    stride: int = 4
    """Frames between two of a dense clip."""
    repeats: int = 1
    """Clips of each decoded record: own start, crop and mask; not counted in the batch size."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """What happens to a training clip."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of each channel, for pixels from 0 to 1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Of each channel, for pixels from 0 to 1."""
    workers: int = 8
    """Loading processes of each device."""
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    """How loading processes start; none: the platform's own way."""

    def records(self) -> Records:
        """Read the list."""
        return read_list(self.train, self.format, self.root)

    def frames(self, encoder: EncoderConfig) -> Sampling:
        """Which frames make a clip that this encoder takes."""
        return Sampling(self.sampling, encoder.num_frames, self.stride)

    def clips(self, records: Records, encoder: EncoderConfig, seed: int, mask: MaskConfig | None = None) -> ClipDataset:
        """Training clips in the shape that the encoder takes."""
        return ClipDataset(
            records,
            self.frames(encoder),
            self.augmentation,
            encoder.image_size,
            None if mask is None else partial(MASKS[mask.kind], encoder.grid, mask.ratio),
            ReaderProcess(self.decoder, self.decode_timeout),
            self.repeats,
            seed,
        )

    def views(self, records: Records, encoder: EncoderConfig, views: ViewConfig) -> TestViewDataset:
        """Test views in the shape that the encoder takes."""
        decoder = ReaderProcess(self.decoder, self.decode_timeout)
        return TestViewDataset(records, self.frames(encoder), views, self.augmentation, encoder.image_size, decoder)


@dataclass(frozen=True)
class LabelledDataConfig(DataConfig):
    """Lists with classes."""

    validation: str | None = None
    """List of validation records, with the same format and root; none: nothing is validated."""
    labels: str | tuple[str, ...] | None = None
    """File of class names, line n (from 0) names class n, or the names; none: the file beside the list
    (train.labels.txt beside train.txt), or the class folders. A run writes the names into its own configuration."""
    num_classes: int | None = None
    """Classes; none: as many as there are names, else the largest label and one."""

    def validation_records(self) -> Records:
        """Read the validation list.

        Raises:
            ListError: the configuration has none, or its classes are others than the training list's.
        """
        if self.validation is None:
            raise ListError("data.validation is none: name a list to validate or test on")
        ours, theirs = self.class_names(), class_names(self.validation, self.root)
        if ours is not None and theirs is not None and ours != tuple(theirs):
            source = self.train if self.labels is None else "data.labels"
            raise ListError(
                f"the classes of {source} ({len(ours)}) and of {self.validation} ({len(theirs)}) differ, so their "
                "numbers mean different things: list both with the same class names (tools/make_list.py); for a list "
                "with classes of its own set data.labels to null"
            )
        return read_list(self.validation, self.format, self.root)

    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, where something says them."""
        if isinstance(self.labels, tuple):
            return self.labels
        if not self.train and self.labels is None:  # a published file's usual settings: there is no list
            return None
        names = class_names(self.train, self.root, self.labels)
        return None if names is None else tuple(names)

    def count_classes(self, *lists: Records) -> int:
        """How many classes the model must tell apart.

        Raises:
            ListError: a label is missing or beyond `num_classes`, there are more or fewer names, or left and right are
                labels and clips are flipped.
        """
        names = self.class_names()
        largest = max(int(records.labels.max()) for records in lists)
        count = self.num_classes or (len(names) if names else largest + 1)
        if names and len(names) != count:
            raise ListError(
                f"data.num_classes is {count} and there are {len(names)} class names, the first {names[0]!r}; expected "
                "as many: leave data.num_classes out, or name the file of all classes with data.labels"
            )
        for records in lists:
            check_labels(records, count)
        if self.augmentation.flip and names is None:
            warnings.warn(
                "data.augmentation.flip is on and no class names are known: whether a class names left or right cannot "
                "be checked; name them with data.labels",
                stacklevel=2,
            )
        sided = [name for name in names or [] if {"left", "right"} & set(re.split(r"[\W_]+", name.lower()))]
        if sided and self.augmentation.flip:
            raise ListError(
                f"data.augmentation.flip is on and {len(sided)} classes name left or right, the first {sided[0]!r}: a "
                "flipped clip would have a wrong label; turn it off"
            )
        return count


def check_labels(records: Records, num_classes: int, least: int = 0) -> None:
    """Raise a ListError unless every label lies in `least` (-1: may be missing) to `num_classes - 1`."""
    for wrong in np.flatnonzero((records.labels < least) | (records.labels >= num_classes))[:1]:
        record = records[int(wrong)]
        if record.label is None:
            raise ListError(
                f"{record.path} has no label, like {int((records.labels < 0).sum())} of the {len(records)} records of "
                "its list; expected 'path label' in every line (data_lists/README.md)"
            )
        raise ListError(
            f"{record.path} has the label {record.label}; expected 0 to {num_classes - 1}: there are {num_classes} "
            "classes, as data.num_classes, the class names or the trained model say"
        )


@dataclass(frozen=True)
class InitConfig:
    """What a new run starts from. A run that goes on takes its own checkpoint instead."""

    weights: str | None = None
    """Checkpoint, run folder or published file (models/released.py tells the layouts); none: random."""
    inflation: Inflation = field(default_factory=Inflation)
    """How image weights become video weights: average or center, over the frames of a token and of a kernel."""
    exclude: tuple[Literal["positions", "norm", "fusion", "decoder", "head"], ...] = ()
    """What of the file is not taken; in place of learnt positions, pretraining and probes have their fixed table."""

    def load(self, model: Autoencoder | Classifier | Probe) -> LoadReport | None:
        """Load the weights, if any, and say what was loaded.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file does not fit the model.
        """
        if self.weights is None:
            return None
        path = Path(self.weights)
        source = checkpoint.find(path) if path.is_dir() else path
        return load_weights(model, source, inflation=self.inflation, exclude=self.exclude)


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run."""

    output: str
    """Run folder; the same command on a folder that holds a run goes on with it."""
    data: DataConfig
    """The list, and how clips are made of its records."""
    model: AutoencoderConfig  # no default: jsonargparse would take its resolved numbers for those of every size
    """The autoencoder."""
    init: InitConfig = field(default_factory=InitConfig)
    """What the run starts from."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """What the encoder does not see."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is logged besides the usual."""
    hang_timeout: float = HANG_TIMEOUT
    """Seconds without progress, for data or for other processes, after which a process ends and says what each does."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda."""
    seed: int = 0
    """Every random number of the run follows from it."""


@dataclass(frozen=True)
class ValidateConfig(ProtocolConfig):
    """What is measured on the validation list while a classifier is trained."""

    every: float = 1.0
    """Epochs between two measurements; the last step is always followed by one."""


@dataclass(frozen=True)
class FinetuneConfig:
    """A finetuning or probing run."""

    output: str
    """Run folder; the same command on a folder that holds a run goes on with it."""
    data: LabelledDataConfig
    """The lists, and how clips are made of their records."""
    model: ClassifierConfig  # no default, as above
    """The classifier."""
    init: InitConfig = field(default_factory=InitConfig)
    """What the run starts from."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    """Mixup, cutmix and label smoothing."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is logged besides the usual."""
    hang_timeout: float = HANG_TIMEOUT
    """Seconds without progress, for data or for other processes, after which a process ends and says what each does."""
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    """The validation during training."""
    test: ProtocolConfig = field(default_factory=ProtocolConfig)
    """The protocol of tools/evaluate.py for this run."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda."""
    seed: int = 0
    """Every random number of the run follows from it."""

    def __post_init__(self) -> None:
        if self.model.probe is not None and self.optim.layer_decay != 1:
            raise ValueError(
                f"optim.layer_decay is {self.optim.layer_decay} and model.probe is {self.model.probe!r}; expected 1: a "
                "probed encoder's layers are frozen"
            )
        if self.model.probe is not None and self.model.head_dropout:
            raise ValueError(
                f"model.head_dropout is {self.model.head_dropout} and model.probe is {self.model.probe!r}; expected 0: "
                "a probe's head has no dropout"
            )
        clips = self.train.batch_size * self.data.repeats
        if self.mixing.mixes and clips % 2:
            raise ValueError(
                f"train.batch_size x data.repeats is {clips}; mixup and cutmix take pairs: make it even, or set "
                "mixing.mixup and mixing.cutmix to 0"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """A test of a classifier on a list; what is none is as in the run that trained it."""

    weights: str
    """Run folder, a checkpoint of one (checkpoints/best), or a published classifier."""
    output: str
    """Folder for predictions.csv, scores.npz and metrics.json; after an interruption the same command goes on."""
    list: str | None = None
    """The list to test on; none: the run's data.validation."""
    root: str | None = None
    """Folder that the list's relative paths are joined to."""
    format: ListFormat | None = None
    """What a line holds: video, frames or image."""
    sampling: Literal["dense", "uniform"] | None = None
    """Frames `stride` apart (Kinetics), or one of each of T segments (Something-Something); published: dense."""
    stride: int | None = None
    """Frames between two of a dense clip; of a published classifier: 4."""
    labels: str | None = None
    """File of class names; they are needed for pictures and printed names alone."""
    segments: int | None = None
    """Clips over the length of a video."""
    crops: int | None = None
    """Windows along the longer side of a frame."""
    crop_pct: float | None = None
    """Side of a window over the largest one's."""
    batch_size: int | None = None
    """Records whose views go through the model together."""
    precision: Literal["bf16", "fp16", "fp32"] | None = None
    """Autocast type."""
    workers: int | None = None
    """Loading processes of each device."""
    decoder: ReaderName | None = None
    """auto, torchcodec, pyav, decord or torchcodec_cuda."""
    ema: bool | None = None
    """Test the average of the weights; none: where the run kept one."""
    plot: bool = False
    """Also write confusion.png and classes.png, the accuracy of each class."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda."""


Config = TypeVar("Config")


def parse(kind: type[Config], arguments: Sequence[str] | None = None) -> Config:
    """Read a configuration from `--config FILE` and edits of single fields.

    Args:
        kind: the run's dataclass.
        arguments: as on the command line; None reads that.

    An unknown field or a wrong type ends the program with a message that names it. A field that is true or false is
    true where its name stands alone.
    """
    parser = ArgumentParser(description=kind.__doc__)
    parser.add_argument(
        "--config", action="config", help="YAML file; fields after it on the command line replace its own."
    )
    parser.add_class_arguments(kind)
    for action in parser._actions:  # a switch: `--plot` alone says what `--plot true` says
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True
    values = parser.instantiate(parser.parse_args(arguments)).as_dict()
    return kind(**{name: value for name, value in values.items() if name != "config"})


def run_tool(kind: type[Config], program: Callable[[Config], Any], arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run a tool; what its user can mend ends it with one line.

    An error that this package raises itself (a list, a setting, a file that is not there) is worded for that. One that
    comes from elsewhere is a fault of the package, and keeps its traceback.
    """
    try:
        program(parse(kind, arguments))
    except (ValueError, FileNotFoundError, ImportError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if Path(__file__).parent not in Path(frame.f_code.co_filename).parents:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def plain(config: Any) -> dict[str, Any]:
    """A configuration as what YAML and checkpoints hold: dicts, lists, numbers, strings."""

    def simplify(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: simplify(item) for key, item in value.items()}
        return [simplify(item) for item in value] if isinstance(value, (tuple, list)) else value

    return simplify(asdict(config))


def write_yaml(config: Any, path: Path) -> None:
    """Write a configuration so that `--config` reads it again."""
    path.write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")


def from_plain(kind: type[Config], values: dict[str, Any]) -> Config:
    """The configuration that `plain` took apart, checked as strictly as a file.

    Raises:
        ValueError: a field is unknown, missing or of a wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        return kind(**parser.instantiate(parser.parse_object(values)).as_dict())
    except Exception as error:
        raise ValueError(f"no {kind.__name__} of this version: {error}") from error
