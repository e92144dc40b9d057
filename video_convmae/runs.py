"""A run folder, a checkpoint or a published file -> a model and its configuration."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

from safetensors import SafetensorError
from torch import Tensor, nn

from video_convmae.build import build_classifier
from video_convmae.config import (
    FinetuneConfig,
    PretrainConfig,
    TrainDetectionConfig,
    TrainSegmentationConfig,
    from_plain,
)
from video_convmae.dense.detection import Detector
from video_convmae.dense.segmentation import Segmenter
from video_convmae.engine.checkpoint import Checkpoint, find_weights
from video_convmae.errors import UserError
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe
from video_convmae.weights.files import check_finite, read_file, run_config

Source = str | Path | Checkpoint


def run_kind(source: Source) -> Literal["pretrain", "finetune", "detection", "segmentation"] | None:
    """Return the kind of run that wrote a checkpoint or a file of weights; None: no run of ours."""
    try:
        config = source.config if isinstance(source, Checkpoint) else run_config(Path(source))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, UnpicklingError):
        return None
    if not isinstance(config, dict) or not {"data", "model", "init"} <= config.keys():
        return None
    if "head_norm" in config["model"]:
        return "detection"
    if "auxiliary_width" in config["model"]:
        return "segmentation"
    return "finetune" if "mixing" in config else "pretrain"


def load_autoencoder(source: Source, ema: bool = False) -> tuple[Autoencoder, PretrainConfig]:
    """Load a pretrained model in evaluation mode, without heads of features, and the configuration of its run.

    Args:
        source: a checkpoint, a run folder (its newest checkpoint), the model.safetensors of a finished run, or the
            name of shipped weights.
        ema: take the moving average of the weights, if the run kept one (`train.ema`).

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is no checkpoint of a pretraining run, or holds no average.
    """
    if not isinstance(source, Checkpoint):
        source = find_weights(source)
    if run_kind(source) != "pretrain":
        raise UserError(f"{_path_of(source)} is not a checkpoint of `video-convmae pretrain`")
    weights, plain = _read(source, ema)
    config = from_plain(PretrainConfig, plain)
    model = Autoencoder(config.model)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("feature_heads.")}
    _fill(model, weights, _path_of(source))
    return model.eval(), config


def load_classifier(source: Source, ema: bool | None = None) -> tuple[Classifier | Probe, FinetuneConfig]:
    """Load a finetuned or probed model in evaluation mode, and the configuration of its run.

    Args:
        source: a checkpoint (`checkpoints/best` is the best), a run folder (its newest checkpoint), or the
            model.safetensors of a finished run.
        ema: take the moving average of the weights; None: if the run kept one, which is what it validated.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is no checkpoint of a finetuning run, or holds no average.
    """
    if not isinstance(source, Checkpoint):
        source = find_weights(source)
    if run_kind(source) != "finetune":
        raise UserError(f"{_path_of(source)} is not a checkpoint of `video-convmae finetune`")
    weights, plain = _read(source, ema)
    config = from_plain(FinetuneConfig, plain)
    if config.data.num_classes is None:
        raise UserError(f"{_path_of(source)} does not say its number of classes; expected data.num_classes in it")
    model = build_classifier(config.model, config.data.num_classes)
    _fill(model, weights, _path_of(source))
    return model.eval(), config


def load_detector(source: Source, ema: bool | None = None) -> tuple[Detector, TrainDetectionConfig]:
    """Load a detector in evaluation mode, and the configuration of its run; the arguments are `load_classifier`'s.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is no checkpoint of a detector, or holds no average.
    """
    if not isinstance(source, Checkpoint):
        source = find_weights(source)
    if run_kind(source) != "detection":
        raise UserError(f"{_path_of(source)} is not a checkpoint of `video-convmae train-detection`")
    weights, plain = _read(source, ema)
    config = from_plain(TrainDetectionConfig, plain)
    model = Detector(config.model, len(config.data.labels))
    _fill(model, weights, _path_of(source))
    return model.eval(), config


def load_segmenter(source: Source, ema: bool | None = None) -> tuple[Segmenter, TrainSegmentationConfig]:
    """Load a segmenter in evaluation mode, and the configuration of its run; the arguments are `load_classifier`'s.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is no checkpoint of a segmenter, or holds no average.
    """
    if not isinstance(source, Checkpoint):
        source = find_weights(source)
    if run_kind(source) != "segmentation":
        raise UserError(f"{_path_of(source)} is not a checkpoint of `video-convmae train-segmentation`")
    weights, plain = _read(source, ema)
    config = from_plain(TrainSegmentationConfig, plain)
    if config.data.num_classes is None:
        raise UserError(f"{_path_of(source)} does not say its number of classes; expected data.num_classes in it")
    model = Segmenter(config.model, config.data.num_classes)
    _fill(model, weights, _path_of(source))
    return model.eval(), config


def _path_of(source: Checkpoint | Path) -> Path:
    return source.path if isinstance(source, Checkpoint) else source


def _fill(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load the weights of a run into the model of its configuration."""
    try:
        check_finite(weights)
        model.load_state_dict(weights)
    except (UserError, RuntimeError) as error:
        reason = "" if isinstance(error, UserError) else "its tensors are not those of the configuration in it: "
        raise UserError(f"{path}: {reason}{error}") from error


def _read(source: Checkpoint | Path, ema: bool | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and configuration; `ema` None takes the average if there is one."""
    if isinstance(source, Path):  # model.safetensors: the average if the run kept one
        state = read_file(source)
        return state["model"], state["config"]
    average = {} if ema is False else source.tensors("ema")
    if ema and not average:
        raise UserError(f"{source.path} holds no average of the weights: the run had no train.ema")
    return average or source.tensors("model"), source.config
