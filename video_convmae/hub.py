"""Folders of a model, as on the Hugging Face hub: save, load, upload, and the card.

    predictor = video_convmae.load("runs/own")
    predictor.save_pretrained("own")                    # or push_to_hub("me/own")
    Classifier.from_pretrained("own")                   # the model alone; Predictor.from_pretrained: with preprocessing

A folder holds model.safetensors, config.json and README.md, the card. config.json:

    library_name, library_version
    architecture   Autoencoder, Classifier or Probe
    num_classes    of a classifier or probe, else null
    metrics        of the run, as it wrote them; empty: none
    config         of the run, without its paths; of a model that was saved alone, `model` is all there is
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar, TypeVar

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

import video_convmae
from video_convmae.atomic import replacing, write_text
from video_convmae.errors import UserError

LIBRARY = "video_convmae"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# Of a run's configuration: where it lay on a machine. A folder may be published.
_PATHS: dict[str, Any] = {
    "output": "",
    "init.weights": None,
    "data.train": "",
    "data.root": "",
    "data.validation": None,
    "data.cache": None,
    "validate.patience": None,  # which needs a list to validate on
    "probe.list": None,
    "targets": [],
}
_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")  # of from_pretrained
_HUB_ERRORS = (EntryNotFoundError, HTTPError, OSError)  # HTTPError: of the hub's client, requests or httpx
_NUMBERS = {  # of a run's metrics, that its card shows
    "val_top1": "top-1, validation",
    "val_top5": "top-5, validation",
    "val_mean_class_accuracy": "mean class accuracy, validation",
    "val_map": "mAP, validation",
    "val_macro_f1": "macro F1, validation",
    "val_loss": "loss, validation",
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "mean class accuracy",
    "map": "mAP",
    "macro_f1": "macro F1",
    "scored": "records scored",
    "loss": "last training loss",
    "loss_nothing": "loss of predicting nothing",
    "probe_knn_top1": "nearest-neighbour probe, top-1",
    "probe_linear_top1": "linear probe, top-1",
    "probe_rank": "effective rank of the features",
    "epoch": "epochs",
    "step": "optimizer steps",
}
Model = TypeVar("Model", bound="Pretrained")
Alone = TypeVar("Alone", bound="PretrainedModel")


@dataclass(frozen=True)
class Folder:
    """What a folder holds beside the tensors: see the head of this file."""

    architecture: str
    config: dict[str, Any]
    num_classes: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> dict[str, Any]:
        """Fields of the model's configuration."""
        return self.config["model"]


class Pretrained(ModelHubMixin, library_name=LIBRARY):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of huggingface_hub. A class says what it saves and how it
    is built: `_hub_folder`, `_hub_tensors` and `_from_folder`.
    """

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Make an instance. The mixin's own would keep the arguments, to save what is saved here."""
        return object.__new__(cls)

    @classmethod
    def from_pretrained(cls: type[Model], pretrained_model_name_or_path: str | Path, **options: Any) -> Model:
        """Load a folder that `save_pretrained` wrote, or download one.

        Args:
            pretrained_model_name_or_path: folder, or name on the Hugging Face hub (user/model).
            options: of the download: revision, token, cache_dir, force_download, local_files_only.

        Raises:
            UserError: another option; there is no such folder, it cannot be downloaded, or it holds something else.
        """
        return cls._from_folder(find_folder(pretrained_model_name_or_path, **options))

    @classmethod
    def _from_folder(cls: type[Model], folder: Path) -> Model:
        raise NotImplementedError

    def _hub_folder(self) -> Folder:
        raise NotImplementedError

    def _hub_tensors(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def save_pretrained(self, *args: Any, **options: Any) -> str | None:
        """Save the model, as the mixin does. Raises UserError, before anything is written: it cannot be saved."""
        self._hub_folder()
        return super().save_pretrained(*args, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model, as the mixin does.

        Raises:
            UserError: it cannot be saved, which is found before a repository is made, or cannot be uploaded.
        """
        self._hub_folder()
        try:
            return super().push_to_hub(repo_id, **options)
        except HFValidationError as error:
            raise UserError(f"{repo_id} is no name on the Hugging Face hub; expected user/model") from error
        except _HUB_ERRORS as error:
            raise UserError(
                f"{repo_id} cannot be uploaded to the Hugging Face hub ({_reason(error)}); check the name, the network "
                "and the token (hf auth login), or save_pretrained into a folder"
            ) from error

    def _save_pretrained(self, save_directory: Path) -> None:
        write_folder(save_directory, self._hub_folder(), self._hub_tensors())

    def generate_model_card(self, *args: Any, **options: Any) -> ModelCard:
        """Return the card: what the model is, how to load it, and the numbers of its run.

        An existing README.md is left as it is.
        """
        return write_card(self._hub_folder(), self._hub_tensors())


class PretrainedModel(Pretrained):
    """Folders of a model alone, without preprocessing; `_from_config` builds it.

    architecture: name of the class, in config.json.
    """

    architecture: ClassVar[str]

    @classmethod
    def _from_config(cls, found: Folder) -> Any:
        raise NotImplementedError

    @classmethod
    def _from_folder(cls: type[Alone], folder: Path) -> Alone:
        found, tensors = open_folder(folder, cls.architecture)
        try:
            model = cls._from_config(found)
            model.load_state_dict(tensors)
        except (TypeError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())[:300]
            raise UserError(
                f"{folder} makes no model of version {video_convmae.__version__}: {text}; save it again"
            ) from error
        return model.eval()


def find_folder(name: str | Path, **options: Any) -> Path:
    """Return a folder of this name, or that of a download from the hub.

    Args:
        name: folder, or name on the hub.
        options: as of `Pretrained.from_pretrained`.

    Raises:
        UserError: an option is unknown, or there is neither; the message is one line.
    """
    if unknown := [option for option in options if option not in _OPTIONS]:
        raise UserError(
            f"{', '.join(unknown)}: no option of from_pretrained; expected {', '.join(_OPTIONS)}; a model has the "
            "sizes and classes it was saved with (for others create_classifier, then load_weights)"
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    missing = f"there is no folder {name}, and "
    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS, CARD], **options))
    except HFValidationError as error:
        raise UserError(f"{missing}it is no name on the Hugging Face hub; expected a folder, or user/model") from error
    except _HUB_ERRORS as error:
        raise UserError(
            f"{missing}{name} cannot be downloaded from the Hugging Face hub ({_reason(error)}); check the name and "
            "the network, or give a folder"
        ) from error


def _reason(error: BaseException) -> str:
    """Return an error's kind and the first sentence of its message."""
    line = next((line for line in str(error).splitlines() if line.strip()), "").removeprefix("Got: ")
    return shorten(f"{type(error).__name__}: {line.partition('. ')[0].rstrip('.')}", 300, placeholder=" ...")


def read_folder(path: Path) -> Folder | None:
    """Return what a folder of ours states in its config.json; None: it is none of ours.

    Raises:
        UserError: it is one of ours, and damaged.
    """
    file = path / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # others keep other things under this name
        return None
    if not isinstance(values, dict) or values.get("library_name") != LIBRARY:
        return None
    config = values.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict) or "architecture" not in values:
        raise UserError(f"{file} has no architecture, or no config with a model in it; save the model again")
    return Folder(values["architecture"], config, values.get("num_classes"), values.get("metrics") or {})


def open_folder(path: Path, architecture: str) -> tuple[Folder, dict[str, Tensor]]:
    """Read a folder of one architecture.

    Raises:
        UserError: it holds no model of ours, or another.
    """
    found = read_folder(path)
    if found is None:
        raise UserError(
            f"{path} has no {CONFIG} of save_pretrained; expected such a folder (a run: video_convmae.load; weights "
            "of others: load_weights)"
        )
    if found.architecture != architecture:
        raise UserError(f"{path} holds a {found.architecture}: call {found.architecture}.from_pretrained")
    try:
        return found, safetensors_torch.load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / WEIGHTS} cannot be read: {error}") from error


def write_folder(path: Path, folder: Folder, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and config.json; each is replaced whole."""
    values = {
        "library_name": LIBRARY,
        "library_version": video_convmae.__version__,
        "architecture": folder.architecture,
        "num_classes": folder.num_classes,
        "metrics": dict(folder.metrics),
        "config": without_paths(folder.config),
    }
    with replacing(path / WEIGHTS, "wb") as file:
        contiguous = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        safetensors_torch.save_file(contiguous, file.name, metadata={"format": "pt"})
    write_text(path / CONFIG, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration without places on a machine."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    for name, empty in _PATHS.items():
        *groups, last = name.split(".")
        place: Any = copy
        for group in groups:
            place = place.get(group, {})
        if last in place:
            place[last] = empty
    return copy


def write_card(folder: Folder, tensors: Mapping[str, Tensor]) -> ModelCard:
    """Write the card of a model."""
    model, data = folder.model, folder.config.get("data") or {}
    is_image = model["num_frames"] == 1
    task = "image-feature-extraction" if is_image else "feature-extraction"
    if folder.num_classes is not None:
        task = "image-classification" if is_image else "video-classification"
    numbers = [f"| {text} | {_number(folder.metrics[n])} |" for n, text in _NUMBERS.items() if _is_number(folder, n)]
    lines = [
        f"# {folder.architecture}, {model['size']}",
        "",
        f"{_describe(folder)} {sum(tensor.numel() for tensor in tensors.values()) / 1e6:.1f} million values. Made with "
        f"VideoConvMAE {video_convmae.__version__}.",
        "",
        "```python",
        "import video_convmae",
        "from video_convmae.predictor import Predictor",
        "",
        'predictor = Predictor.from_pretrained("THIS")  # a folder, or user/model',
        'predictor("clip.mp4")' if folder.num_classes is not None else 'predictor.features("clip.mp4")',
        "```",
        "",
        "## Input",
        "",
        f"- clips (B, {model['channels']}, {model['num_frames']}, {_size(model['image_size'])})",
        *_describe_data(data, is_image),
        "",
        "## Numbers of its run",
        "",
        *(["| | |", "|---|---|", *numbers] if numbers else ["None are known."]),
    ]
    if isinstance(verdict := folder.metrics.get("verdict"), str):
        lines += ["", f"The run's own verdict: {verdict}"]
    if labels := data.get("labels"):
        lines += ["", "## Classes", "", ", ".join(map(str, labels)) if isinstance(labels, list) else str(labels)]
    card = ModelCardData(library_name=LIBRARY, pipeline_tag=task, tags=["masked-autoencoder", "convmae"])
    return ModelCard(f"---\n{card.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def _describe(folder: Folder) -> str:
    model = folder.model
    kind = "image" if model["num_frames"] == 1 else "video"
    if folder.architecture == "Autoencoder":
        return f"A masked autoencoder of {kind}s: its encoder gives features."
    if folder.architecture == "Probe":
        return f"A {model['probe']} probe for {folder.num_classes} classes on a frozen pretrained {kind} encoder."
    return f"A {kind} classifier for {folder.num_classes} classes."


def _describe_data(data: Mapping[str, Any], is_image: bool) -> list[str]:
    if not data:
        return ["- the preprocessing is not known: the model was saved alone"]
    lines = [f"- pixels from 0 to 1, less the mean {data['mean']}, over the deviation {data['std']}"]
    if not is_image:
        apart = f"{data['stride']} frames apart" if data.get("fps") is None else f"{data['fps']:g} a second"
        apart = apart if data["sampling"] == "dense" else "one of each of as many segments"
        lines.append(f"- frames: {data['sampling']}, {apart}")
    if data.get("multi_label"):
        lines.append("- a clip may have several classes: the sigmoid of a logit is its probability")
    return lines


def _size(size: Any) -> str:
    return ", ".join(map(str, size)) if isinstance(size, (list, tuple)) else f"{size}, {size}"


def _is_number(folder: Folder, name: str) -> bool:
    return isinstance(folder.metrics.get(name), (int, float))


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
