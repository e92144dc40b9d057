"""A model with its preprocessing: from a file to classes or features.

predictor = video_convmae.load("runs/k400")
for prediction in predictor("clip.mp4"):
    print(f"{prediction.score:.1%} {prediction.name}")
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from video_convmae.config import (
    AutoencoderConfig,
    ClassifierConfig,
    DataConfig,
    FinetuneConfig,
    LabelledDataConfig,
    PretrainConfig,
)
from video_convmae.data.datasets import TestViewDataset, ViewConfig
from video_convmae.data.decoding import DecodeError, ReaderName, resolve_reader
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.records import IMAGE_SUFFIXES, ListError, ListFormat, Record, Records, class_names
from video_convmae.data.transforms import Augmentation
from video_convmae.engine import checkpoint
from video_convmae.engine.evaluation import ProtocolConfig
from video_convmae.engine.tasks import Normalizer
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe
from video_convmae.runs import load_autoencoder, load_classifier, run_kind
from video_convmae.weights.load import model_from
from video_convmae.weights.released import summarize_names, weights_of


class Prediction(NamedTuple):
    """A class and its probability. Without class names, the name is the label's number."""

    name: str
    score: float
    label: int


@dataclass(frozen=True)
class Predictor:
    """A model in evaluation mode, and all that lies between a file and its input.

    Files are decoded in a process of its own, which can be ended and lives as long as the predictor: not for several
    threads at once. The model computes in float32, or as an autocast of the caller says.

    model: what was trained; it may be moved to another device.
    config: of the run; for a published file, the usual settings of its kind.
    class_names: where something says them.
    """

    model: Autoencoder | Classifier | Probe
    config: PretrainConfig | FinetuneConfig
    class_names: tuple[str, ...] | None

    def __call__(self, path: str | Path, top: int = 5, views: ViewConfig | None = None) -> list[Prediction]:
        """The `top` most probable classes of a video or image file, or of a folder of frames.

        Args:
            path: the file.
            top: how many classes.
            views: segments and crops that are averaged; None: the run's test protocol.

        Raises:
            DecodeError: the file cannot be read.
            TypeError: the model was pretrained only: it has no classes.
        """
        if isinstance(self.model, Autoencoder):
            raise TypeError("a pretrained autoencoder has no classes; features() works, tools/finetune.py adds classes")
        clips = self.clips(path, views or self.config.test)
        with torch.inference_mode():
            scores = self.model(clips).float().softmax(dim=1).mean(dim=0)
        best = scores.topk(min(top, len(scores)))
        return [Prediction(self.name(i), s, i) for s, i in zip(best.values.tolist(), best.indices.tolist())]

    def features(self, path: str | Path, views: ViewConfig | None = None) -> Tensor:
        """Tokens `(V, N, D)` of the file's V views, as `encode` gives them. None: one view, `middle`.

        A pretrained model's and a probe's are those after fusion and norm, a classifier's those before its norm.

        Raises:
            DecodeError: the file cannot be read.
        """
        with torch.inference_mode():
            return self.model.encode(self.clips(path, views or self.middle))

    @property
    def middle(self) -> ViewConfig:
        """One view, of the middle in time and space; its window is as large as in the run's test."""
        return ViewConfig(crop_pct=self.config.test.crop_pct if isinstance(self.config, FinetuneConfig) else 1.0)

    def clips(self, path: str | Path, views: ViewConfig) -> Tensor:
        """The file's views as the model takes them, `(V, C, T, H, W)` on its device.

        Raises:
            DecodeError: the file cannot be read.
        """
        return self.normalise(self.pictures(path, views))

    def normalise(self, pictures: Tensor) -> Tensor:
        """Views `(V, C, T, H, W)` uint8 -> as the model takes them, on its device."""
        data, device = self.config.data, next(self.model.parameters()).device
        return Normalizer(data.mean, data.std, device).normalise(pictures)

    def pictures(self, path: str | Path, views: ViewConfig) -> Tensor:
        """The file's views as a person looks at them, `(V, C, T, H, W)` uint8 on the CPU.

        A folder is one of frames, and a file an image or a video, whatever the model was trained on.

        Raises:
            DecodeError: the file cannot be read.
        """
        data, encoder = self.config.data, self.model.encoder.config
        record = Record(str(path), format=_format(Path(path)))
        records, size = Records([record], record.format), encoder.image_size
        sample = TestViewDataset(records, data.frames(encoder), views, data.augmentation, size, self._decoder)[0]
        if sample.faults:
            raise DecodeError(sample.faults[0].error)
        return sample.clips

    def name(self, label: int) -> str:
        """The name of a class."""
        return self.class_names[label] if label < len(self.class_names or ()) else str(label)

    @cached_property
    def _decoder(self) -> ReaderProcess:
        return ReaderProcess(self.config.data.decoder, self.config.data.decode_timeout)


def load(
    path_or_run: str | Path,
    *,
    labels: str | Path | None = None,
    ema: bool | None = None,
    decoder: ReaderName | None = None,
) -> Predictor:
    """A model with its preprocessing and class names.

    Args:
        path_or_run: a run folder or a checkpoint of tools/pretrain.py or tools/finetune.py, or a published file.
        labels: a file of class names, line n names class n; None: as the run's configuration finds them.
        ema: take the moving average of the weights; None: for a classifier, where the run kept one.
        decoder: auto, torchcodec, pyav or decord; None: the run's, or one that works where that does not.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is none that is known (models/released.py tells the layouts), or the names are not as many
            as its classes.
        ImportError: the decoder does not work here.
    """
    path = checkpoint.find(path_or_run)
    kind = run_kind(path)
    if kind == "pretrain":
        model, config = load_autoencoder(path, bool(ema))
        names = None
    elif kind == "finetune":
        model, config = load_classifier(path, ema)
        names = config.data.class_names()
    else:
        model, config = _published(path)
        names = None
    if labels is not None:
        names = class_names("", labels=labels)
        _check_names(names, config, labels)
    data = replace(config.data, decoder=_working(config.data.decoder) if decoder is None else resolve_reader(decoder))
    return Predictor(model, replace(config, data=data), None if names is None else tuple(names))


def _check_names(names: list[str], config: PretrainConfig | FinetuneConfig, labels: str | Path) -> None:
    classes = getattr(config.data, "num_classes", None)
    if classes is not None and len(names) != classes:
        raise ListError(f"{labels} names {len(names)} classes and the model has {classes}: line n must name class n")


def _working(decoder: str) -> str:
    """A run's decoder, or one that works where the run's does not: the frames are the same (data/decoding.py)."""
    try:
        return resolve_reader(decoder)
    except ImportError as error:
        instead = resolve_reader("auto")
        warnings.warn(f"{instead} decodes in place of the run's {decoder}: {error}", stacklevel=3)
        return instead


def _format(path: Path) -> ListFormat:
    """What a path is: a folder of frames, an image or a video."""
    if path.is_dir():
        return "frames"
    return "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video"


def _published(path: Path) -> tuple[Autoencoder | Classifier, PretrainConfig | FinetuneConfig]:
    """The model of a published file, and its usual settings. Only parts that the file holds are built and read."""
    weights = weights_of(path)
    # Without a decoder the sizes cannot say whether there was a fusion; an untrained one would spoil the features.
    built = {} if weights.has("head") else {"msd": weights.has("fusion")}
    model, report = model_from(weights, **built)
    if untrained := [name for name in report.missing if not name.startswith("decoder.")]:
        warnings.warn(f"{path} does not hold {summarize_names(untrained)}: they are untrained", stacklevel=3)
    return model.eval(), _usual_settings(model)


def _usual_settings(model: Autoencoder | Classifier) -> PretrainConfig | FinetuneConfig:
    """What a published file does not say: images by 256 to 224 pixels, bicubic; videos dense, four frames apart."""
    encoder = model.encoder.config
    shape = {"num_frames": encoder.num_frames, "image_size": encoder.image_size}
    is_image = encoder.num_frames == 1
    how = Augmentation(interpolation="bicubic" if is_image else "bilinear")
    data = {"train": "", "format": "image" if is_image else "video", "augmentation": how}
    if isinstance(model, Autoencoder):
        return PretrainConfig("", DataConfig(**data), AutoencoderConfig(**shape))
    test = ProtocolConfig(crop_pct=0.875) if is_image else ProtocolConfig(segments=5, crops=3)
    labelled = LabelledDataConfig(**data, num_classes=model.head.out_features)
    return FinetuneConfig("", labelled, ClassifierConfig(**shape), test=test)
