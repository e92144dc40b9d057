"""The configuration of a run: plain dataclasses. They describe and build nothing (build.py does).

    video-convmae pretrain --config video/pretrain_k400_base --optim.base_lr 3e-4
    video-convmae pretrain --help-all           every field, explained
    video-convmae pretrain ... --print_config   the whole run

An unknown field or a wrong type is an error that names the field. Options of one part (model, data, engine, weights)
are defined beside that part. Nothing here imports torch, so that `--help` is fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal, TypeVar

from jsonargparse import ArgumentParser

from video_convmae.bounds import Bounds, check_bounds
from video_convmae.data.options import (
    UNIFORM_HAS_NO_RATE,
    AugmentationConfig,
    ListFormat,
    MixingConfig,
    ReaderName,
    SamplingKind,
)
from video_convmae.engine.options import (
    HANG_TIMEOUT,
    FeatureKind,
    LogConfig,
    OptimConfig,
    Precision,
    ProbeConfig,
    ProtocolConfig,
    SweepConfig,
    TargetConfig,
    TrainConfig,
)
from video_convmae.errors import UserError
from video_convmae.models.sizes import AutoencoderConfig, ClassifierConfig, Pool, library_model
from video_convmae.weights.options import Inflation


@dataclass(frozen=True)
class MaskConfig:
    """The tokens hidden from the encoder, and those that are predicted."""

    kind: Literal["tube", "random", "frame", "block"] = "tube"
    """tube: one spatial mask repeated in time; random: every token for itself; frame: whole frames; block: cuboids."""
    ratio: Annotated[float, Bounds(above=0, below=1)] = 0.9
    """Fraction of the tokens that is hidden."""
    decoder_ratio: Annotated[float | None, Bounds(above=0, most=1)] = None
    """Fraction of the hidden tokens that is predicted, in running cells (VideoMAE V2; faster); none: all of them."""
    count: Annotated[int, Bounds(least=1)] = 1
    """Masks of a clip with no visible token in common, all learned from in one step (FastConvMAE); not of blocks."""

    def __post_init__(self) -> None:
        check_bounds(self, "mask.{}")
        if self.count > 1 and self.kind == "block":
            raise ValueError(f"mask.count is {self.count} and mask.kind block; expected 1 mask of blocks")


@dataclass(frozen=True)
class ListConfig:
    """One list of a mixture; what it leaves out is that of `data`."""

    list: str
    """List file."""
    root: str | None = None
    """Folder that its relative paths are joined to."""
    weight: Annotated[float | None, Bounds(above=0)] = None
    """Its share of an epoch's samples, relative to the other lists'; none, of all lists: their numbers of records."""
    format: ListFormat | None = None
    """Contents of a line; an image is shown as a still clip."""
    sampling: SamplingKind | None = None
    """dense or uniform."""
    stride: Annotated[int | None, Bounds(least=1)] = None
    """Frames of the file from one of a dense clip to the next; replaces data.fps."""
    fps: Annotated[float | None, Bounds(above=0)] = None
    """Frames a second of a dense clip; replaces data.stride."""

    @property
    def options(self) -> dict[str, Any]:
        """What it says of its own about its samples."""
        return {name: value for name in OF_A_LIST if (value := getattr(self, name)) is not None}


OF_A_LIST = ("format", "sampling", "stride", "fps")  # fields of data that each list of a mixture may set; so is root


@dataclass(frozen=True)
class SourceConfig:
    """Data of a training run, of whatever kind."""

    train: tuple[ListConfig, ...] | str
    """List file, whose forms data_lists/README.md describes; or several: list, root, weight, format, sampling, stride,
    fps of each (docs/data.md, Several lists)."""
    root: str = ""
    """Folder that the list's relative paths are joined to."""
    decode_timeout: Annotated[float, Bounds(above=0)] = 60.0
    """Seconds after which a decode is ended and its record counts as bad."""
    max_bad_fraction: Annotated[float, Bounds(least=0, most=1)] = 0.01
    """Fraction of the list that may be bad before the run stops."""
    memory: Annotated[float, Bounds(least=0)] = 0.0
    """GiB of decoded training records that each loading process keeps in memory: for small clips, which take longer to
    decode than to train on."""
    mean: Annotated[tuple[float, float, float], Bounds(least=0, most=1)] = (0.485, 0.456, 0.406)
    """Mean of each channel, for pixels from 0 to 1: of mmaction2's [123.675, ...], for pixels to 255, a 255th."""
    std: Annotated[tuple[float, float, float], Bounds(above=0, most=1)] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, for pixels from 0 to 1."""
    workers: Annotated[int, Bounds(least=0)] = 8
    """Loading processes of each device."""
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    """Start method of the loading processes; none: the platform's default."""

    @property
    def train_names(self) -> str:
        """The training lists, for messages."""
        return self.train if isinstance(self.train, str) else ", ".join(each.list for each in self.train)


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The list, and how clips are made of its records."""

    format: ListFormat = "video"
    """Contents of a line: video, frames or image."""
    reader: ReaderName = "auto"
    """auto, torchcodec, pyav, decord, or torchcodec_cuda, which decodes on the GPU and is never chosen by auto. auto is
    resolved once and written into the run's configuration."""
    max_side: Annotated[int, Bounds(least=1)] = 4096
    """Longest side of a decoded picture; larger ones are divided by 2, 3, ... when they are read. 16 frames of 8K take
    1.6 GB in each of two processes; by this default a quarter of it."""
    cache: str | None = None
    """Folder of the copies of files that are named by URL (s3://...), of all processes of a machine; none:
    video-convmae/objects in ~/.cache."""
    cache_size: Annotated[float, Bounds(above=0)] = 100.0
    """GiB that this folder may hold."""
    sampling: SamplingKind = "dense"
    """dense: frames `stride` apart (Kinetics); uniform: one of each of T segments (Something-Something)."""
    stride: Annotated[int, Bounds(least=1)] = 4
    """Frames of the file from one of a dense clip to the next; with fps it does not count."""
    fps: Annotated[float | None, Bounds(above=0)] = None
    """Frames a second of a dense clip, by the times at which the file shows its frames, whatever its rate: 7.5 is every
    fourth of 30. Replaces stride; none: stride counts. Not for folders of pictures, which have no times."""
    repeats: Annotated[int, Bounds(least=1)] = 1
    """Clips of each decoded record, each with its own start, crop and mask; not counted in the batch size."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Augmentation of a training clip."""

    def __post_init__(self) -> None:
        if self.train == ():
            raise ValueError("data.train is an empty list; expected a list file, or several")
        if isinstance(self.train, str) and self.train.startswith("[{"):  # on the command line
            names = ", ".join(each.name for each in fields(ListConfig))
            raise ValueError(f"data.train is {self.train!r}; expected a list file, or several, each with {names}")
        lists = [each for each in self.train if isinstance(each, ListConfig)]
        for each in lists:
            check_bounds(each, f"{{}} of {each.list} in data.train")
        weights = [each.weight for each in lists]
        if None in weights and any(weights):
            raise ValueError(f"data.train has weights {weights}; expected one for every list, or for none")
        if self.fps is not None and self.sampling == "uniform":
            raise ValueError(f"data.fps is {self.fps} and data.sampling uniform, {UNIFORM_HAS_NO_RATE}")
        if self.fps is not None and self.format == "frames":
            raise ValueError(
                f"data.fps is {self.fps} and data.format frames: a folder of pictures does not say when each is shown; "
                "expected data.stride, in pictures, and no data.fps"
            )
        if lists:
            _ = self.sources  # which are checked as this is

    @property
    def sources(self: Data) -> tuple[Data, ...]:
        """The data of each list: of one list this, of a mixture with what the list says in its place."""
        if isinstance(self.train, str):
            return (self,)
        return tuple(replace(self, train=each.list, **_of_list(each, self)) for each in self.train)


Data = TypeVar("Data", bound=DataConfig)


def _of_list(config: ListConfig, data: DataConfig) -> dict[str, Any]:
    """Return the fields of data that a list of a mixture sets.

    Its stride takes the place of `data.fps`; pictures and uniform sampling have no rate.
    """
    has_rate = config.format in (None, "video") and config.sampling in (None, "dense") and config.stride is None
    rate = {} if has_rate else {"fps": None}
    return {"root": data.root if config.root is None else config.root} | rate | config.options


@dataclass(frozen=True)
class LabelledDataConfig(DataConfig):
    """Lists with classes."""

    validation: str | None = None
    """List of validation records, with the same format and root; none: no validation."""
    labels: str | tuple[str, ...] | None = None
    """Class names: kinetics400, something_something_v2, a file whose line n (from 0) names class n, or the names; none:
    the file beside the list (train.labels.txt beside train.txt), or the class folders. A run writes the names into its
    own configuration."""
    num_classes: Annotated[int | None, Bounds(least=1)] = None
    """Number of classes; none: the number of names, else the largest label plus one."""
    multi_label: bool | None = None
    """A record may have several classes (`path 3,7`), each a yes or no of its own; none: whether one of the lists has
    such a record. A run writes it into its own configuration."""
    balanced: bool = False
    """Show every class equally often: an epoch is as long as the list, rare classes repeat their records and frequent
    ones leave some out, others in each epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balanced and not isinstance(self.train, str):
            raise ValueError(
                "data.balanced is on and data.train several lists, with weights; expected one or the other"
            )


@dataclass(frozen=True)
class InitConfig:
    """Initial weights of a new run. A resumed run takes its own checkpoint instead."""

    weights: str | None = None
    """Checkpoint, run folder, published file (weights/formats/ has the families), folder of Hugging Face's, or the name
    of shipped weights (tiny-moving-digits); none: random."""
    inflation: Inflation = field(default_factory=Inflation)
    """Conversion of image weights to video weights: average or center, over the frames of a token and of a kernel."""
    exclude: tuple[Literal["positions", "norm", "fusion", "decoder", "head"], ...] = ()
    """Parts of the file that are not loaded; instead of learnt positions, pretraining and probes have a fixed table."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options of every training run."""

    output: str
    """Run folder; the same command on a folder that holds a run resumes it."""
    init: InitConfig = field(default_factory=InitConfig)
    """Initial weights."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch, precision and parallelism."""
    log: LogConfig = field(default_factory=LogConfig)
    """Where a run logs to, pictures, and measurements beside the log."""
    hang_timeout: Annotated[float, Bounds(above=0)] = HANG_TIMEOUT
    """Seconds without progress, for data or for other processes, after which a process ends and says what each does."""
    device: str = "auto"
    """auto (CUDA if available), cpu, cuda, or one device such as cuda:1."""
    seed: Annotated[int, Bounds(least=0, most=2**63 - 1)] = 0
    """Seed of every random number of the run."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """A pretraining run."""

    data: DataConfig
    """The list, and how clips are made of its records."""
    model: AutoencoderConfig  # no default: an instance is resolved, and edits of single fields come before
    """The autoencoder."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """The tokens hidden from the encoder."""
    targets: tuple[TargetConfig, ...] = ()
    """What is predicted: a list of name, teacher, weights, tokens, layer, loss, weight, warmup_steps, momentum, frames,
    image_size (docs/pretraining.md, Targets); empty: the pixels of hidden tokens."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Probes of the features on a labelled list."""

    def __post_init__(self) -> None:
        names = [each.name for each in self.targets]
        if len(set(names)) != len(names):
            raise ValueError(f"targets are named {', '.join(names)}; expected a name of its own for each")
        for each in self.targets:
            self.model.check_layer(each.name, each.layer)
        if len({each.momentum for each in self.targets if each.teacher == "ema"}) > 1:
            raise ValueError("targets of ema have different momentum; expected one: they share the average")
        stills = [each.train for each in self.data.sources if each.format == "image"]
        if stills and isinstance(self.data.train, tuple) and self.model.num_frames > 1 and self.mask.kind != "tube":
            raise ValueError(
                f"mask.kind is {self.mask.kind} and {stills[0]} in data.train holds images; expected tube: an image is "
                "a still clip, in which any other mask shows at one time what it hides at another"
            )

    @property
    def predicts_pixels(self) -> bool:
        """Whether pixels are a target."""
        return not self.targets or any(each.teacher is None for each in self.targets)


@dataclass(frozen=True)
class ValidateConfig(ProtocolConfig):
    """Validation while a classifier is trained."""

    every: Annotated[float, Bounds(above=0)] = 1.0
    """Epochs between two validations; the last step is always followed by one."""
    every_steps: Annotated[int | None, Bounds(least=1)] = None
    """Optimizer steps between two validations; replaces every."""
    patience: Annotated[int | None, Bounds(least=1)] = None
    """Early stopping: validations in a row without a better one after which the run ends; none: it does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, "validate.{}")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A finetuning or probing run."""

    data: LabelledDataConfig
    """The lists, and how clips are made of their records."""
    model: ClassifierConfig  # no default, as above
    """The classifier or probe."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    """Mixup, cutmix and label smoothing."""
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    """Validation during training."""
    test: ProtocolConfig = field(default_factory=ProtocolConfig)
    """Protocol of `video-convmae evaluate` for this run."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Many learning rates and weight decays of a linear or attentive probe in one run."""

    def __post_init__(self) -> None:
        if heads := len(self.sweep.heads):
            given = f"sweep asks for {heads} heads"
            if self.model.probe not in ("linear", "attentive"):
                raise ValueError(f"{given} and model.probe is {self.model.probe}; expected linear or attentive")
            if self.train.precision == "fp16":
                raise ValueError(
                    f"{given} and train.precision is fp16, whose loss scale they would share; expected bf16"
                )
            if self.train.parallel == "fsdp":
                raise ValueError(f"{given} and train.parallel is fsdp; expected ddp")
            if not isinstance(self.data.train, str):
                raise ValueError(f"{given} and data.train is several lists; expected one, of which a part is held out")
        if self.model.probe is not None and self.optim.layer_decay != 1:
            raise ValueError(
                f"optim.layer_decay is {self.optim.layer_decay} and model.probe is {self.model.probe!r}; expected 1: a "
                "probed encoder's layers are frozen"
            )
        if self.model.of_library:
            self._check_library()
        if self.validate.patience is not None:
            given = f"validate.patience is {self.validate.patience} and"
            if self.data.validation is None:
                raise ValueError(f"{given} data.validation none; expected a list to validate on")
            if self.is_fitted:
                raise ValueError(f"{given} model.probe {self.model.probe}, which is fitted at once; expected none")
            if self.sweep.heads:
                raise ValueError(f"{given} sweep has heads, which are trained equally long; expected none")
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

    @property
    def is_fitted(self) -> bool:
        """Whether the run is a probe that is fitted at once, to each record's feature: no step is taken."""
        return self.model.probe in ("knn", "logistic")

    def check_fitted(self) -> None:
        """Check that a probe that is fitted at once is asked for nothing that only an epoch's samples have.

        Called where a run begins, not where a configuration is read: older runs, which ignored these, still load.

        Raises:
            UserError: it is asked for repeats, balanced classes or the weights of a mixture.
        """
        if not self.is_fitted:
            return
        weights = [each.weight for each in self.data.train if isinstance(each, ListConfig)]
        asked: dict[str, tuple[Any, Any]] = {
            "data.balanced": (self.data.balanced, False),
            "data.repeats": (self.data.repeats, 1),
            "the weight of a list of data.train": (next(filter(None, weights), None), None),
        }
        for name, (value, expected) in asked.items():
            if value != expected:
                raise UserError(
                    f"{name} is {value} and model.probe {self.model.probe}, which is fitted to every record once; "
                    f"expected {expected}"
                )

    def _check_library(self) -> None:
        """Check that nothing is asked for that rests on the blocks of our models."""
        unset: dict[str, tuple[Any, Any]] = {
            "optim.layer_decay": (self.optim.layer_decay, 1),
            "train.compile": (self.train.compile, False),
            "train.activation_checkpointing": (self.train.activation_checkpointing, "none"),
        }
        for name, (value, expected) in unset.items():
            if value != expected:
                raise ValueError(
                    f"{name} is {value} and model.size {self.model.size}; expected {expected}: it is for our own models"
                )
        if self.data.multi_label and library_model(self.model.size).one_class:
            raise ValueError(
                f"data.multi_label is true and model.size {self.model.size}, which ends with a softmax over the "
                "classes; expected a model without one (slowfast, mvit), or one class of each record"
            )


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """A trained model over a list; an option that is none is that of the run that trained the model."""

    weights: str
    """Run folder, a checkpoint of one (checkpoints/best), a published file, a folder of Hugging Face's, or the name of
    shipped weights."""
    output: str
    """Folder of the results; after an interruption the same command resumes."""
    root: str | None = None
    """Folder that the list's relative paths are joined to."""
    format: ListFormat | None = None
    """Contents of a line: video, frames or image."""
    sampling: SamplingKind | None = None
    """dense: frames `stride` apart (Kinetics); uniform: one of each of T segments (Something-Something)."""
    stride: Annotated[int | None, Bounds(least=1)] = None
    """Frames of the file from one of a dense clip to the next; of a published file: 4. Replaces a run's data.fps."""
    fps: Annotated[float | None, Bounds(above=0)] = None
    """Frames a second of a dense clip, by the times at which the file shows them; replaces a run's data.stride."""
    segments: Annotated[int | None, Bounds(least=1)] = None
    """Clips over the length of a video; for features: 1."""
    crops: Annotated[int | None, Bounds(least=1)] = None
    """Crops along the longer side of a frame; for features: 1."""
    crop_pct: Annotated[float | None, Bounds(above=0, most=1)] = None
    """Side of a crop over that of the largest one."""
    batch_size: Annotated[int | None, Bounds(least=1)] = None
    """Records whose views go through the model together; the result may depend on it in the last bits."""
    precision: Precision | None = None
    """Autocast type; none: that of the run's test or training. Of a published file: bf16."""
    workers: Annotated[int | None, Bounds(least=0)] = None
    """Loading processes of each device."""
    reader: ReaderName | None = None
    """auto, torchcodec, pyav, decord or torchcodec_cuda."""
    ema: bool | None = None
    """Use the average of the weights; none: for a classifier, if the run kept one."""
    device: str = "auto"
    """auto (CUDA if available), cpu, cuda, or one device such as cuda:1."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(InferenceConfig):
    """Test of a classifier on a list."""

    list: str | None = None
    """The list to test on; none: the run's data.validation."""
    labels: str | None = None
    """Class names, for pictures and printed names alone: kinetics400, something_something_v2, or a file."""
    maps: str | None = None
    """Of a segmenter: folder of the label maps of list; none: the usual one beside."""
    plot: bool = False
    """Also write confusion.png and classes.png, the accuracy of each class."""
    baselines: bool = False
    """Also test trivial baselines, fitted to the run's training list: the most frequent class, and logistic regression
    on frame differences and on the mean frame."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(InferenceConfig):
    """Features of every record of a list."""

    list: str
    """The list, or a folder of class folders."""
    kind: FeatureKind = "pooled"
    """pooled: one vector a record, the mean over all views; tokens: all of them, of one view."""
    window: Annotated[int | None, Bounds(least=1)] = None
    """Features of windows over whole videos of any length: frames that a window shows, as many as the model takes,
    `stride` frames of the file apart; none: one row a record."""
    hop: Annotated[int | None, Bounds(least=1)] = None
    """Frames of the file between the starts of two windows; none: window x stride. With fps it is required."""
    pool: Pool | None = None
    """How tokens are pooled: mean, difference, motion, frames, attentive (docs/finetuning.md, Pooling); none: as before
    a classifier's head, else the mean."""

    def __post_init__(self) -> None:
        if self.hop is not None and self.window is None:
            raise ValueError(f"hop is {self.hop} and window none; expected the frames of a window, for example 16")
        if self.window is not None and self.segments not in (None, 1):
            raise ValueError(
                f"segments is {self.segments} and window {self.window}; expected no segments, or no window"
            )
        if self.kind == "tokens" and self.pool is not None:
            raise ValueError(f"kind is tokens and pool {self.pool}; expected kind pooled, or no pool")


Config = TypeVar("Config")


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as dicts, lists, numbers and strings, for YAML and checkpoints."""

    def simplify(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: simplify(item) for key, item in value.items()}
        return [simplify(item) for item in value] if isinstance(value, (tuple, list)) else value

    return simplify(asdict(config))


def from_plain(kind: type[Config], values: dict[str, Any]) -> Config:
    """Return the configuration that `to_plain` turned into plain data. Types and the options' own checks are
    checked as in a file; bounds of other fields are the command line's.

    Raises:
        UserError: a field is unknown, missing or of a wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        return kind(**parser.instantiate(parser.parse_object(values)).as_dict())
    except Exception as error:
        raise UserError(f"no {kind.__name__} of this version: {error}") from error


def replace_options(data: Data, given: dict[str, Any]) -> Data:
    """Return the data of a run with options in their place; --stride and --sampling uniform replace a run's fps.

    Raises:
        UserError: the options contradict one another, or the run.
    """
    if {"stride", "fps"} <= given.keys():
        raise UserError(
            f"--stride {given['stride']} and --fps {given['fps']:g} are both given; expected one: frames of the file, "
            "or frames a second"
        )
    if "stride" in given or given.get("sampling") == "uniform":
        given = {"fps": None} | given
    try:
        return replace(data, **given)
    except ValueError as error:
        raise UserError(str(error)) from error


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested groups."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
