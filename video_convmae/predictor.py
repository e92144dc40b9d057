"""A model with its preprocessing: from a file to classes or features.

predictor = video_convmae.load("runs/k400")
for prediction in predictor("clip.mp4"):
    print(f"{prediction.score:.1%} {prediction.name}")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from video_convmae.config import (
    ClassifierConfig,
    DataConfig,
    FinetuneConfig,
    LabelledDataConfig,
    ModelConfig,
    PretrainConfig,
)
from video_convmae.data.datasets import ViewConfig
from video_convmae.data.decoding import DecodeError
from video_convmae.data.records import Record, Records, class_names
from video_convmae.data.transforms import Augmentation
from video_convmae.engine import checkpoint
from video_convmae.engine.evaluate import ProtocolConfig
from video_convmae.engine.tasks import Pixels
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier, Probe
from video_convmae.models.weights import model_from
from video_convmae.runs import load_autoencoder, load_classifier, run_kind, with_decoder


class Prediction(NamedTuple):
    """A class and its probability. Without class names, the name is the label's number."""

    name: str
    score: float
    label: int


@dataclass(frozen=True)
class Predictor:
    """A model in evaluation mode, and all that lies between a file and its input.

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
        """Tokens `(V, N, D)` of the file's V views, as `encode` gives them. None: one view of the middle.

        Raises:
            DecodeError: the file cannot be read.
        """
        with torch.inference_mode():
            return self.model.encode(self.clips(path, views or ViewConfig()))

    def clips(self, path: str | Path, views: ViewConfig) -> Tensor:
        """The file's views as the model takes them, `(V, C, T, H, W)` on its device.

        Raises:
            DecodeError: the file cannot be read.
        """
        data = self.config.data
        records = Records([Record(str(path), format=data.format)], data.format)
        sample = data.views(records, self.model.encoder.config, views)[0]
        if sample.faults:
            raise DecodeError(sample.faults[0].error)
        device = next(self.model.parameters()).device
        return Pixels(data.mean, data.std, device).normalise(sample.clips)

    def name(self, label: int) -> str:
        """The name of a class."""
        return self.class_names[label] if self.class_names else str(label)


def load(path_or_run: str | Path, *, labels: str | Path | None = None, ema: bool | None = None) -> Predictor:
    """A model with its preprocessing and class names.

    Args:
        path_or_run: a run folder or a checkpoint of tools/pretrain.py or tools/finetune.py, or a published file.
        labels: a file of class names, line n names class n; None: as the run's configuration finds them.
        ema: take the moving average of the weights; None: for a classifier, where the run kept one.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is none that is known (models/released.py tells the layouts).
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
        model, _ = model_from(path)
        config = _usual_settings(model.eval())
        names = None
    if labels is not None:
        names = class_names("", labels=labels)
    return Predictor(model, with_decoder(config), None if names is None else tuple(names))


def _usual_settings(model: Autoencoder | Classifier) -> PretrainConfig | FinetuneConfig:
    """What a published file does not say: images by 256 to 224 pixels, bicubic; videos dense, four frames apart."""
    encoder = model.encoder.config
    shape = {"num_frames": encoder.num_frames, "image_size": encoder.image_size}
    is_image = encoder.num_frames == 1
    how = Augmentation(interpolation="bicubic" if is_image else "bilinear")
    data = {"train": "", "format": "image" if is_image else "video", "augmentation": how}
    if isinstance(model, Autoencoder):
        return PretrainConfig("", DataConfig(**data), ModelConfig(**shape))
    test = ProtocolConfig(crop_share=0.875) if is_image else ProtocolConfig(segments=5, crops=3)
    labelled = LabelledDataConfig(**data, num_classes=model.head.out_features)
    return FinetuneConfig("", labelled, ClassifierConfig(**shape), test=test)
