"""A run folder, a checkpoint or a published file -> a model and its configuration."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError
from torch import Tensor, nn

from video_convmae import hub
from video_convmae.atomic import read_json
from video_convmae.build import AnyClassifier, build_classifier
from video_convmae.config import FinetuneConfig, PretrainConfig, from_plain
from video_convmae.config_dense import TrainDetectionConfig, TrainSegmentationConfig
from video_convmae.dense.detection import Detector
from video_convmae.dense.segmentation import Segmenter
from video_convmae.engine.checkpoint import Checkpoint, find_weights
from video_convmae.errors import UserError
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.lora import merge_lora
from video_convmae.weights.files import check_finite, read_file, run_config

Source = str | Path | Checkpoint
RunKind = Literal["pretrain", "finetune", "detection", "segmentation"]
Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)

COMMANDS: dict[RunKind, str] = {  # that make a run of each kind
    "pretrain": "pretrain",
    "finetune": "finetune",
    "detection": "train-detection",
    "segmentation": "train-segmentation",
}


def run_kind(source: Source) -> RunKind | None:
    """Return the kind of run that wrote a checkpoint or a file of weights; None: no run of ours."""
    try:
        return kind_of(source.config if isinstance(source, Checkpoint) else run_config(Path(source)))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, UnpicklingError):
        return None


def kind_of(config: Any) -> RunKind | None:
    """Return the kind of run of a configuration as plain data; None: of none of ours."""
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
    weights, config, path = _read_run(source, "pretrain", PretrainConfig, ema)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("feature_heads.")}
    return _filled(Autoencoder(config.model), weights, path), config


def load_classifier(source: Source, ema: bool | None = None) -> tuple[AnyClassifier, FinetuneConfig]:
    """Load a finetuned or probed model in evaluation mode, and the configuration of its run; LoRA's changes are merged.

    Args:
        source: a checkpoint (`checkpoints/best` is the best), a run folder (its newest checkpoint), or the
            model.safetensors of a finished run.
        ema: take the moving average of the weights; None: if the run kept one, which is what it validated.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is no checkpoint of a finetuning run, or holds no average.
    """
    weights, config, path = _read_run(source, "finetune", FinetuneConfig, ema)
    weights = merge_lora(weights, config.model.lora_scale)
    config = replace(config, model=replace(config.model, lora_rank=0))
    return _filled(build_classifier(config.model, _num_classes(config, path)), weights, path), config


def load_detector(source: Source, ema: bool | None = None) -> tuple[Detector, TrainDetectionConfig]:
    """Load a detector in evaluation mode, and the configuration of its run; the arguments are `load_classifier`'s.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is no checkpoint of a detector, or holds no average.
    """
    weights, config, path = _read_run(source, "detection", TrainDetectionConfig, ema)
    return _filled(Detector(config.model, len(config.data.labels)), weights, path), config


def load_segmenter(source: Source, ema: bool | None = None) -> tuple[Segmenter, TrainSegmentationConfig]:
    """Load a segmenter in evaluation mode, and the configuration of its run; the arguments are `load_classifier`'s.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is no checkpoint of a segmenter, or holds no average.
    """
    weights, config, path = _read_run(source, "segmentation", TrainSegmentationConfig, ema)
    return _filled(Segmenter(config.model, _num_classes(config, path)), weights, path), config


def run_metrics(source: Checkpoint | Path) -> dict[str, Any]:
    """Return what is known of a model's numbers: numbers and verdicts of its run's metrics.json, and of its test.

    Those of the run count for the checkpoint that they were measured on; those of `RUN/test` for the weights that were
    tested. A folder of `save_pretrained` states them itself. Empty: there are none.
    """
    path = (source.path if isinstance(source, Checkpoint) else source).resolve()
    if isinstance(source, Path) and path.name == hub.WEIGHTS and (found := hub.read_folder(path.parent)) is not None:
        return dict(found.metrics)
    run = path.parent.parent if isinstance(source, Checkpoint) else path.parent
    metrics: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        whole = read_json(run / "metrics.json")
        best = whole.get("best") or {}
        if isinstance(source, Path) or source.step == whole["step"]:
            metrics = whole
        elif source.step == best.get("step"):
            metrics = {name if name == "step" else f"val_{name}": value for name, value in best.items()}
    with suppress(OSError, ValueError):
        tested = read_json(run / "test" / "metrics.json")
        if Path(tested["weights"]).resolve() == path:
            metrics = metrics | tested
    return {n: v for n, v in metrics.items() if n == "verdict" or isinstance(v, (bool, int, float))}


def _read_run(
    source: Source, kind: RunKind, config: type[Config], ema: bool | None
) -> tuple[dict[str, Tensor], Config, Path]:
    """Read weights, configuration and path of a run of one kind. Raises as `load_classifier` does."""
    if not isinstance(source, Checkpoint):
        source = find_weights(source)
    path = source.path if isinstance(source, Checkpoint) else source
    if run_kind(source) != kind:
        raise UserError(f"{path} is not a checkpoint of `video-convmae {COMMANDS[kind]}`")
    weights, plain = _read(source, ema)
    return weights, from_plain(config, plain), path


def _num_classes(config: FinetuneConfig | TrainSegmentationConfig, path: Path) -> int:
    if config.data.num_classes is None:
        raise UserError(f"{path} does not say its number of classes; expected data.num_classes in it")
    return config.data.num_classes


def _filled(model: Model, weights: dict[str, Tensor], path: Path) -> Model:
    """Load the weights of a run into the model of its configuration; return it in evaluation mode."""
    try:
        check_finite(weights)
        model.load_state_dict(weights)
    except (UserError, RuntimeError) as error:
        reason = "" if isinstance(error, UserError) else "its tensors are not those of the configuration in it: "
        raise UserError(f"{path}: {reason}{error}") from error
    return model.eval()


def _read(source: Checkpoint | Path, ema: bool | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and configuration; `ema` None takes the average if there is one."""
    if isinstance(source, Path):  # model.safetensors: the average if the run kept one
        state = read_file(source)
        return state["model"], state["config"]
    average = {} if ema is False else source.tensors("ema")
    if ema and not average:
        raise UserError(f"{source.path} holds no average of the weights: the run had no train.ema")
    return average or source.tensors("model"), source.config
