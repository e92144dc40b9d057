"""Files of finished runs, without a run: a model's tensors beside the configuration that a run would write."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from video_convmae.config import (
    DataConfig,
    FinetuneConfig,
    LabelledDataConfig,
    PretrainConfig,
    to_plain,
)
from video_convmae.config_dense import SegmentationDataConfig, SegmentationTestConfig, TrainSegmentationConfig
from video_convmae.dense.segmentation import Segmenter
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe
from video_convmae.models.sizes import ClassifierConfig
from video_convmae.weights.files import save_file

SETTINGS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "reader": "pyav"}


def finished_run(model: Autoencoder | Classifier | Probe | Segmenter, folder: Path, **data: Any) -> Path:
    """Write the model.safetensors of a run, and return the run's folder."""
    config: Any
    if isinstance(model, Segmenter):
        test = SegmentationTestConfig(window=64, stride=32)
        source = SegmentationDataConfig(train="", num_classes=model.num_classes, **data)
        config = TrainSegmentationConfig(output="runs/x", data=source, model=model.config, validate=test)
    else:
        shape = model.decoder.config if isinstance(model, Autoencoder) else model.encoder.config
        settings = {**SETTINGS, "format": "image" if shape.num_frames == 1 else "video", "stride": 2, **data}
        if isinstance(model, Autoencoder):
            config = PretrainConfig(output="runs/x", data=DataConfig(train="/lists/own.txt", **settings), model=shape)
        else:
            assert isinstance(shape, ClassifierConfig)
            assert {field.name for field in fields(shape)} >= {"probe", "pool"}
            labelled = LabelledDataConfig(train="/lists/own.txt", num_classes=model.num_classes, **settings)
            config = FinetuneConfig(output="runs/x", data=labelled, model=shape)
    save_file(model.state_dict(), folder / "model.safetensors", config=to_plain(config))
    return folder
