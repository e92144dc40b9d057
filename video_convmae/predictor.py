"""A model with its preprocessing: from a file to classes or features.

predictor = video_convmae.load("runs/k400")
for prediction in predictor("clip.mp4"):
    print(f"{prediction.score:.1%} {prediction.name}")
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from video_convmae import hub
from video_convmae.build import AnyClassifier, build_normalizer, build_sampling, plan_windows
from video_convmae.config import (
    DataConfig,
    FinetuneConfig,
    LabelledDataConfig,
    PretrainConfig,
    from_plain,
    replace_options,
    to_plain,
)
from video_convmae.data.datasets import TestViewDataset
from video_convmae.data.decoding import DecodeError, record_at, resolve_reader
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.options import AugmentationConfig, ListFormat, ReaderName, ViewConfig
from video_convmae.data.records import ListError, Records, class_names
from video_convmae.data.transforms import Augmentation
from video_convmae.data.windows import Span, WindowDataset
from video_convmae.engine.checkpoint import Checkpoint, find_weights
from video_convmae.engine.evaluation import class_scores
from video_convmae.engine.options import ProtocolConfig
from video_convmae.errors import Note, UserError
from video_convmae.lists import open_process, read_class_names
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe
from video_convmae.models.pytorchvideo import LibraryClassifier
from video_convmae.models.sizes import ClassifierConfig
from video_convmae.runs import load_autoencoder, load_classifier, run_kind, run_metrics
from video_convmae.weights.formats import read_weights
from video_convmae.weights.load import READS_NO_FUSION, model_from
from video_convmae.weights.state import Weights, summarize_names


class Prediction(NamedTuple):
    """A class and its probability. Without class names, the name is the label's number."""

    name: str
    score: float
    label: int


class WindowPrediction(NamedTuple):
    """The answer for a window of a video.

    Attributes:
        number: of the window, from 0.
        total: windows of the video.
        span: where the window lies, in frames and in seconds.
        predictions: the most probable classes.
        picture: its middle frame as the model sees it, `(H, W, 3)` uint8.
    """

    number: int
    total: int
    span: Span
    predictions: list[Prediction]
    picture: np.ndarray


@dataclass(frozen=True)
class Predictor(hub.Pretrained):
    """A model in evaluation mode with its preprocessing.

    `save_pretrained(folder)`, `push_to_hub(name)` and `Predictor.from_pretrained(folder or name)` keep all of it, and
    the numbers of the run in the model card (hub.py). The run's paths are left out.

    Files are decoded in a separate process, which lives as long as the predictor: not for several threads at once. The
    model computes in float32, or under the caller's autocast.

    model: may be moved to another device.
    config: of the run; for a published file, what its configuration states (config.json and preprocessor_config.json of
        Hugging Face's), else the usual settings of its kind.
    class_names: None if nothing names them.
    metrics: of the run.
    """

    model: Autoencoder | AnyClassifier
    config: PretrainConfig | FinetuneConfig
    class_names: tuple[str, ...] | None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, path: str | Path, top: int = 5, views: ViewConfig | None = None) -> list[Prediction]:
        """Return the `top` most probable classes of a video or image file, or of a folder of frames.

        Of a model that answers with several classes each has a probability of its own.

        Of several series of pictures in a folder, `folder/img_*` is one.

        Args:
            path: the file.
            top: number of classes.
            views: segments and crops that are averaged; None: the run's test protocol.

        Raises:
            DecodeError: the file cannot be read.
            TypeError: the model was pretrained only: it has no classes.
        """
        clips = self.clips(
            path, views or (self.config.test if isinstance(self.config, FinetuneConfig) else self.middle)
        )
        return self._best(self._scores(clips).mean(dim=0), top)

    def windows(
        self,
        path: str | Path,
        *,
        hop: int | None = None,
        stride: int | None = None,
        fps: float | None = None,
        top: int = 5,
        batch_size: int = 8,
    ) -> Iterator[WindowPrediction]:
        """Yield the most probable classes of each window of a video of any length, as the video is read.

        A window has as many frames as the model takes; the crops of the run's test are averaged. Memory holds a few
        frames and a batch, however long the video is.

        Args:
            path: the file, or a folder of frames.
            hop: frames of the file between the starts of two windows; None: a window's frames times the stride. With
                fps it is required.
            stride: frames of the file from one of a window to the next; None: the run's.
            fps: frames a second of a window, in place of the stride; None: the run's.
            top: number of classes.
            batch_size: windows that go through the model together.

        Raises:
            DecodeError: the file cannot be read, or not further; the windows before that were yielded.
            TypeError: the model was pretrained only: it has no classes.
            UserError: nothing says how far apart the frames or the windows are.
        """
        options = (("stride", stride), ("fps", fps))
        given: dict[str, Any] = {name: value for name, value in options if value is not None}
        encoder = self.model.config
        given |= {"sampling": "dense"} if given else {}
        # A file without times is a file that cannot be read, as without windows, and no contradiction of options.
        data = replace_options(replace(self.config.data, train=""), {**given, "format": "video"})
        plan = plan_windows(data, encoder, encoder.num_frames, hop)
        test = self.config.test if isinstance(self.config, FinetuneConfig) else self.middle
        views = self._views(path, data, ViewConfig(1, test.crops, test.crop_pct))
        for batch in WindowDataset(views, plan.hop, batch_size, [(0, 0)]):
            if batch.spans:
                scores = self._scores(self.normalise(batch.clips)).unflatten(0, (-1, test.crops)).mean(dim=1)
                pictures = batch.clips[:: test.crops, :, encoder.num_frames // 2].permute(0, 2, 3, 1).numpy()
                for place, span in enumerate(batch.spans):
                    best = self._best(scores[place], top)
                    yield WindowPrediction(batch.first + place, batch.total, span, best, pictures[place])
            if batch.error is not None:
                raise DecodeError(batch.error)

    def _scores(self, clips: Tensor) -> Tensor:
        """Return the probabilities of clips, `(B, classes)`."""
        if isinstance(self.model, Autoencoder):
            raise TypeError("a pretrained autoencoder has no classes; features() works, finetuning adds classes")
        with torch.inference_mode():
            return class_scores(self.model(clips), bool(getattr(self.config.data, "multi_label", False)))

    def _best(self, scores: Tensor, top: int) -> list[Prediction]:
        best = scores.topk(min(top, len(scores)))
        return [Prediction(self.name(i), s, i) for s, i in zip(best.values.tolist(), best.indices.tolist())]

    def features(self, path: str | Path, views: ViewConfig | None = None) -> Tensor:
        """Return tokens `(V, N, D)` of the file's V views, the output of `encode`. None: one view, `middle`.

        Those of a pretrained model or a probe are after fusion and norm, those of a classifier before its norm.

        Raises:
            DecodeError: the file cannot be read.
        """
        if isinstance(self.model, LibraryClassifier):
            raise TypeError(f"the model is {self.model.config.size}; expected one of ours: it has no tokens")
        with torch.inference_mode():
            return self.model.encode(self.clips(path, views or self.middle))

    @property
    def middle(self) -> ViewConfig:
        """One view, in the middle in time and space; its crop is as large as in the run's test."""
        return ViewConfig(crop_pct=self.config.test.crop_pct if isinstance(self.config, FinetuneConfig) else 1.0)

    def clips(self, path: str | Path, views: ViewConfig) -> Tensor:
        """Return the file's views normalised, `(V, C, T, H, W)` on the model's device.

        Raises:
            DecodeError: the file cannot be read.
        """
        return self.normalise(self.pictures(path, views))

    def normalise(self, pictures: Tensor) -> Tensor:
        """Normalise views `(V, C, T, H, W)` uint8, on the model's device and of its type."""
        parameter = next(self.model.parameters())
        return build_normalizer(self.config.data, parameter.device).normalise(pictures).to(parameter.dtype)

    def pictures(self, path: str | Path, views: ViewConfig) -> Tensor:
        """Return the file's views before normalisation, `(V, C, T, H, W)` uint8 RGB on the CPU.

        A folder holds frames, `folder/img_*` is one of several series in it, and a file is an image or a video,
        whatever the model was trained on.

        Raises:
            DecodeError: the file cannot be read.
        """
        sample = self._views(path, self.config.data, views)[0]
        if sample.bad_records:
            raise DecodeError(sample.bad_records[0].error)
        assert isinstance(sample.clips, Tensor)  # test views are never ragged
        return sample.clips

    def _views(self, path: str | Path, data: DataConfig, views: ViewConfig) -> TestViewDataset:
        """Return the views of a list of one file."""
        record, encoder = record_at(path), self.model.config
        sampling, augmentation = build_sampling(data, encoder), Augmentation(data.augmentation)
        records, size = Records([record], record.format), encoder.clip_shape[2:]
        return TestViewDataset(records, sampling, views, augmentation, size, self._reader)

    def name(self, label: int) -> str:
        """Return the name of a class, or its number if it has none."""
        names = self.class_names or ()
        return names[label] if label < len(names) else str(label)

    @cached_property
    def _reader(self) -> ReaderProcess:
        return open_process(self.config.data)

    def _hub_folder(self) -> hub.Folder:
        if isinstance(self.model, LibraryClassifier):
            raise UserError("a model of pytorchvideo is not saved for the hub; expected one of ours")
        own = self.model._hub_folder()
        config = to_plain(self.config) | {"model": to_plain(self.model.encoder.config)}
        if self.class_names is not None:
            config["data"]["labels"] = list(self.class_names)
        return hub.Folder(own.architecture, config, own.num_classes, self.metrics)

    def _hub_tensors(self) -> dict[str, Tensor]:
        assert not isinstance(self.model, LibraryClassifier)
        return self.model._hub_tensors()

    @classmethod
    def _from_folder(cls, folder: Path) -> Predictor:
        return load(folder)


def load(
    path_or_run: str | Path | Checkpoint,
    *,
    labels: str | Path | None = None,
    ema: bool | None = None,
    reader: ReaderName | None = None,
) -> Predictor:
    """Load a model with its preprocessing and class names.

    Args:
        path_or_run: a run folder, a checkpoint, a published file, a folder of `save_pretrained` or of Hugging Face's,
            or the name of shipped weights (tiny-moving-digits).
        labels: class names: a file whose line n names class n, or a shipped name; None: those of the run or file.
        ema: take the moving average of the weights; None: for a classifier, if the run kept one.
        reader: auto, torchcodec, pyav or decord; None: the run's, or another if that does not work here.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is of no known family (weights/formats/), or there are more or fewer names than classes.
        ImportError: the reader does not work here.
    """
    source = path_or_run if isinstance(path_or_run, Checkpoint) else find_weights(path_or_run)
    kind = run_kind(source)
    names: tuple[str, ...] | None = None
    model: Autoencoder | AnyClassifier
    config: PretrainConfig | FinetuneConfig
    if kind in ("detection", "segmentation"):
        path = path_or_run.path if isinstance(path_or_run, Checkpoint) else path_or_run
        raise UserError(f"{path} is a run of {kind}; expected a classifier or a pretrained model")
    if kind == "pretrain":
        model, config = load_autoencoder(source, bool(ema))
    elif kind == "finetune":
        model, config = load_classifier(source, ema)
    else:
        model, config = _load_published(source.path if isinstance(source, Checkpoint) else source)
    if isinstance(config, FinetuneConfig):
        names = read_class_names(config.data)
    if labels is not None:
        names = tuple(class_names("", labels=labels) or ())
        classes = getattr(config.data, "num_classes", None)
        if classes is not None and len(names) != classes:
            raise ListError(
                f"{labels} names {len(names)} classes and the model has {classes}: line n must name class n"
            )
    chosen = _working_reader(config.data.reader) if reader is None else resolve_reader(reader)
    data = replace(config.data, reader=chosen)
    metrics = run_metrics(source)
    return Predictor(model, replace(config, data=data), names, metrics)  # type: ignore[arg-type]  # data of the same kind


def _working_reader(reader: ReaderName) -> ReaderName:
    """Return a run's reader, or one that works if the run's does not: the frames are the same (data/decoding/)."""
    try:
        return resolve_reader(reader)
    except ImportError as error:
        substitute = resolve_reader("auto")
        warnings.warn(f"{substitute} decodes in place of the run's {reader}: {error}", Note, stacklevel=3)
        return substitute


def _load_published(path: Path) -> tuple[Autoencoder | AnyClassifier, PretrainConfig | FinetuneConfig]:
    """Load a published file. Only parts that the file holds are built and read.

    The settings are those that its configuration states, else the usual ones of its kind, with a note.
    """
    if path.name == hub.WEIGHTS and (saved := hub.read_folder(path.parent)) is not None:  # a model that was saved alone
        whole = {kind.__name__: kind for kind in (Autoencoder, Classifier, Probe)}.get(saved.architecture)
        if whole is None:
            raise UserError(f"{path.parent} holds a {saved.architecture}; expected Autoencoder, Classifier or Probe")
        warnings.warn(f"{path.parent} is a model without preprocessing: the usual one is assumed", Note, stacklevel=3)
        alone: Autoencoder | Classifier | Probe = whole.from_pretrained(path.parent)
        return alone, _usual_settings(alone)
    weights = read_weights(path)
    # Without a decoder the sizes cannot say whether there was a fusion; an untrained one would spoil the features.
    built = {} if weights.has("head") else {"msd": weights.has("fusion")}
    try:
        model, report = model_from(weights, **built)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if untrained := [name for name in report.missing if not name.startswith("decoder.")]:
        warnings.warn(f"{path} does not hold {summarize_names(untrained)}: they are untrained", Note, stacklevel=3)
    if isinstance(model, Autoencoder) and model.may_lack_fusion:
        warnings.warn(f"{path}: the model {READS_NO_FUSION}", Note, stacklevel=3)
    config = _with_settings(_usual_settings(model), weights)
    if assumed := [*report.assumed, *_assumed_settings(weights, config)]:
        warnings.warn(f"{path} does not say all that it needs; assumed: {', '.join(assumed)}", Note, stacklevel=3)
    return model.eval(), config


def _with_settings(config: PretrainConfig | FinetuneConfig, weights: Weights) -> PretrainConfig | FinetuneConfig:
    """Return a configuration with the settings and class names that a file states."""
    plain = to_plain(config)
    stated = dict(weights.preprocessing) | {"data.labels": weights.class_names and list(weights.class_names)}
    for name, value in stated.items():
        *groups, field = name.split(".")
        place = plain
        for group in groups:
            place = place.get(group, {})
        if field in place:
            place[field] = value
    if isinstance(config, PretrainConfig):
        return from_plain(PretrainConfig, plain)
    return from_plain(FinetuneConfig, plain)


def _assumed_settings(weights: Weights, config: PretrainConfig | FinetuneConfig) -> list[str]:
    """Return in words which settings of the clips nothing states."""
    data, assumed = config.data, []
    if not {"data.mean", "data.std"} <= weights.preprocessing.keys():
        assumed.append("ImageNet's mean and deviation of pixels")
    if data.format != "image" and not {"data.stride", "data.fps"} & weights.preprocessing.keys():
        assumed.append(f"frames {data.stride} apart")
    return assumed


def _usual_settings(model: Autoencoder | AnyClassifier) -> PretrainConfig | FinetuneConfig:
    """Return the usual settings: images resized to 256 and cropped to 224, bicubic; videos dense, stride 4."""
    is_image = model.config.num_frames == 1
    augmentation = AugmentationConfig(interpolation="bicubic" if is_image else "bilinear")
    list_format: ListFormat = "image" if is_image else "video"
    if isinstance(model, Autoencoder):
        data = DataConfig(train="", format=list_format, augmentation=augmentation)
        return PretrainConfig(output="", data=data, model=model.decoder.config)
    assert isinstance(model.config, ClassifierConfig)
    test = ProtocolConfig(crop_pct=0.875) if is_image else ProtocolConfig(segments=5, crops=3)
    return FinetuneConfig(
        output="",
        data=LabelledDataConfig(train="", format=list_format, augmentation=augmentation, num_classes=model.num_classes),
        model=model.config,
        test=test,
    )
