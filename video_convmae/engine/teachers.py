"""Teachers: models that do not learn, whose features an autoencoder predicts (`targets` of a run).

A teacher sees whole clips, nothing hidden, in its own normalisation and input size; its features are resampled to the
student's token grid. One of images sees the middle frame of each token, or all of them.

Letters: B clips, C channels, T H W frames and pixels; t h w the student's token grid, N = t*h*w; F width of a feature.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae.errors import UserError
from video_convmae.models.autoencoder import Autoencoder, FusedEncoder, create_autoencoder
from video_convmae.models.classifier import Classifier, create_classifier
from video_convmae.models.sizes import EncoderConfig, FeatureTarget
from video_convmae.weights.arguments import encoder_arguments
from video_convmae.weights.files import Tensors, read_file, read_settings
from video_convmae.weights.formats.huggingface import IMAGENET_MEAN, IMAGENET_STD, preprocessing
from video_convmae.weights.load import load_weights
from video_convmae.weights.state import Weights

from .checkpoint import read_found_weights
from .distributed import DistInfo
from .ema import EMA
from .options import AVERAGE, TIMM, TargetConfig
from .parallel import is_sharded, shard

Pixels = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation


class Teacher(nn.Module):
    """A frozen model and what it takes.

    Args:
        model: clips `(B, C, T, H, W)`, normalised for it, -> features `(B, F, t', h', w')` on a grid of its own.
        width: of a feature, F.
        pixels: mean and deviation of its input's channels, for pixels from 0 to 1.
        size: height and width of its input.
        frames: that it takes; 1: it is one of images; None: any number.
        words: what it is, for people.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, width: int, pixels: Pixels, size: tuple[int, int], frames: int | None, words: str
    ) -> None:
        super().__init__()
        self.model, self.width, self.size, self.frames, self.words = model, width, size, frames, words
        for name, values in zip(("mean", "std"), pixels):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, clips: Tensor, student: EncoderConfig, all_frames: bool = False) -> Tensor:
        """Return features `(B, N, F)`, float32, at the student's tokens.

        Args:
            clips: `(B, C, T, H, W)`, pixels from 0 to 1.
            student: encoder that learns from them.
            all_frames: a teacher of images sees every frame of a token, and its features are averaged; else the middle.
        """
        batch, frames, grid = len(clips), clips.shape[2], student.grid
        if self.frames == 1:
            shown = clips if all_frames else clips[:, :, student.tubelet // 2 :: student.tubelet]
            images = self._normalise(shown.transpose(1, 2).flatten(0, 1)[:, :, None])
            features = self.model(images).float()  # (B * frames, F, 1, h', w')
            features = features.unflatten(0, (batch, grid[0], -1)).mean(dim=2).squeeze(3).transpose(1, 2)
        else:
            if self.frames not in (None, frames):
                index = torch.linspace(0, frames - 1, self.frames, device=clips.device).round().long()
                clips = clips[:, :, index]
            features = self.model(self._normalise(clips)).float()
        if features.shape[2:] != grid:
            features = F.interpolate(features, size=grid, mode="trilinear", align_corners=False)
        return features.flatten(2).transpose(1, 2)

    def _normalise(self, clips: Tensor) -> Tensor:
        """Resize clips to the teacher's input and normalise them for it."""
        if clips.shape[3:] != self.size:
            frames = clips.transpose(1, 2).flatten(0, 1)
            frames = F.interpolate(frames, size=self.size, mode="bilinear", align_corners=False, antialias=True)
            clips = frames.unflatten(0, (len(clips), -1)).transpose(1, 2)
        return (clips - self.mean) / self.std


# timm


class _TimmFeatures(nn.Module):
    """The last feature map of a timm model, after its last norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map `(B, C, 1, H, W)` to `(B, F, 1, h', w')`."""
        model = cast(Any, self.model)
        (features,) = model.forward_intermediates(
            images.squeeze(2), indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return features.unsqueeze(2)


def load_timm(name: str, file: str | None, image_size: int | None = None) -> Teacher:
    """Load a model of timm from a file of its weights.

    Args:
        name: as `timm.create_model` takes it.
        file: in timm's layout, or in the authors' where timm knows it; read without executing code.
        image_size: of its input, where the model takes another than its own; None: its own.

    Raises:
        UserError: timm has no such model, no file is given, or the file does not fit.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:3]
        hint = f"; it has {', '.join(near)}, ..." if near else ""
        raise UserError(f"timm {timm.__version__} has no model {name!r}{hint}: timm.list_models() names all")
    if file is None:
        origin = timm.get_pretrained_cfg(name)
        where = f" (model.safetensors of {origin.hf_hub_id} at Hugging Face)" if origin and origin.hf_hub_id else ""
        raise UserError(
            f"timm:{name} needs a file of its weights{where}: download it and give its path as weights of this target; "
            "nothing is downloaded here"
        )
    contents = read_file(file)
    tensors = next((contents[key] for key in ("model", "state_dict", "teacher") if key in contents), contents)
    tensors = {n.removeprefix("module.").removeprefix("backbone."): t for n, t in tensors.items()}
    try:
        model = _create_timm(name, image_size)
        _fill_timm(model, tensors)
    except (RuntimeError, KeyError, ValueError, TypeError, AssertionError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file} does not hold the weights of timm:{name}: {reason}") from error
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"timm:{name} cannot be a teacher: timm gives no feature map of it (forward_intermediates)")
    given = model.pretrained_cfg
    size = (image_size, image_size) if image_size else tuple(given["input_size"][1:])
    pixels = tuple(given["mean"]), tuple(given["std"])
    maps = _TimmFeatures(model.eval())
    with torch.no_grad():  # num_features is the head's input, which a layer behind the maps may widen
        width = maps(torch.zeros(1, given["input_size"][0], 1, *size)).shape[1]
    return Teacher(maps, width, pixels, size, 1, f"timm:{name} of {file}")


def _create_timm(name: str, image_size: int | None) -> Any:
    if image_size is not None:
        with suppress(TypeError):  # of a convolutional model, which takes any size
            return timm.create_model(name, num_classes=0, img_size=image_size)
    return timm.create_model(name, num_classes=0)


def _fill_timm(model: Any, tensors: Tensors) -> None:
    """Load a file's tensors, translated as timm does for this architecture.

    timm's own loading of a model without classes leaves what is missing at random, without a word.

    Raises:
        RuntimeError: tensors are missing or have no place, but for the classifier.
    """
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    tensors = translate(tensors, model) if translate is not None else tensors
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(heads)}
    missing, unknown = model.load_state_dict(tensors, strict=False)
    if missing or unknown:
        words = [
            f"{len(names)} {text}, the first {names[0]}"
            for names, text in ((missing, "tensors are missing"), (unknown, "have no place"))
            if names
        ]
        raise RuntimeError("; ".join(words))


# Our own formats, and Hugging Face's


class _TokenFeatures(nn.Module):
    """The tokens of a model of ours as features on its grid."""

    def __init__(self, model: FusedEncoder | Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        """Map `(B, C, T, H, W)` to `(B, F, t', h', w')`."""
        return self.model.encode(clips).transpose(1, 2).unflatten(2, self.model.encoder.config.grid)


def load_own(source: str) -> Teacher:
    """Load the encoder of a run or of a published file, with norm and fusion if it has them; as `init.weights` does.

    Raises:
        UserError, FileNotFoundError: there are no weights, or they are of no model of ours.
    """
    weights = read_found_weights(source)
    model, assumed = _encoder_of(weights)
    _, frames, *size = model.encoder.config.clip_shape
    pixels = _pixels(weights.preprocessing)
    words = f"{source}, {weights.format}" + (f", assumed {', '.join(assumed)}" if assumed else "")
    return Teacher(_TokenFeatures(model), model.encoder.width, pixels, (size[0], size[1]), frames, words)


def _pixels(settings: Mapping[str, Any]) -> Pixels:
    """Return the mean and deviation that settings state by the names of ours, or ImageNet's."""
    return tuple(settings.get("data.mean") or IMAGENET_MEAN), tuple(settings.get("data.std") or IMAGENET_STD)


def _encoder_of(weights: Weights) -> tuple[FusedEncoder | Classifier, tuple[str, ...]]:
    """Return a model that holds encoder, norm and fusion, and what was assumed about it."""
    if weights.size is not None:
        raise UserError(f"the teacher is {weights.size}, which has no tokens; expected a model of ours or of timm")
    arguments = encoder_arguments(weights)
    model: Autoencoder | Classifier
    if weights.has("norm"):
        model = create_autoencoder(**arguments, msd=weights.has("fusion"))
        weights = weights.without("decoder", "head")
    else:  # a classifier's norm is over the mean of tokens
        model = create_classifier(**arguments, num_classes=1)
        weights = weights.without("decoder", "head", "fusion")
    report = load_weights(model, weights)
    return model, report.assumed


class _VJEPA2Features(nn.Module):
    """Tokens of transformers' V-JEPA 2 encoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        """Map `(B, C, T, H, W)` to `(B, F, t', h', w')`."""
        config = cast(Any, self.model).config
        tokens = self.model(clips.transpose(1, 2), skip_predictor=True).last_hidden_state
        side = config.crop_size // config.patch_size
        return tokens.transpose(1, 2).unflatten(2, (-1, side, side))


def _is_vjepa2(source: str) -> bool:
    config = read_settings(Path(source).expanduser() / "config.json")
    return config is not None and config.get("model_type") == "vjepa2"


def load_vjepa2(folder: Path) -> Teacher:
    """Load the encoder of V-JEPA 2 from a folder of Hugging Face's; it needs transformers.

    Its positions are rotary, so that it takes any number of frames that its tubelet divides.

    Raises:
        UserError: transformers is not installed, or the folder is not whole.
    """
    try:
        from transformers import VJEPA2Model
    except ImportError as error:
        raise UserError(f"{folder} holds V-JEPA 2, which transformers computes: pip install transformers") from error
    try:
        model = VJEPA2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be read as V-JEPA 2: {' '.join(str(error).split())[:300]}") from error
    given = read_settings(folder / "video_preprocessor_config.json")
    given = read_settings(folder / "preprocessor_config.json") if given is None else given
    pixels = _pixels(preprocessing(given or {}))
    side, width = model.config.crop_size, model.config.hidden_size
    return Teacher(_VJEPA2Features(model), width, pixels, (side, side), None, f"V-JEPA 2 of {folder}")


def load_teacher(target: TargetConfig) -> Teacher:
    """Load the teacher of a target, other than an average of the student.

    Raises:
        UserError: its weights cannot be had; the message names the file to provide.
    """
    source = target.teacher
    assert source is not None  # of pixels, which have no teacher
    try:
        if source.startswith(TIMM):
            return load_timm(source.removeprefix(TIMM), target.weights, target.image_size)
        return load_vjepa2(Path(source).expanduser()) if _is_vjepa2(source) else load_own(source)
    except (ValueError, OSError) as error:
        raise UserError(f"teacher of the target {target.name!r}: {error}") from error


def load_teachers(targets: Sequence[TargetConfig]) -> dict[str, Teacher]:
    """Load the frozen teachers, by their targets' names; targets of one teacher share it."""
    loaded: dict[tuple[Any, ...], Teacher] = {}
    for each in targets:
        if each.teacher not in (None, AVERAGE) and _key(each) not in loaded:
            loaded[_key(each)] = load_teacher(each)
    return {each.name: loaded[_key(each)] for each in targets if _key(each) in loaded}


def feature_targets(
    targets: Sequence[TargetConfig], teachers: Mapping[str, Teacher], width: int
) -> tuple[FeatureTarget, ...]:
    """Return what a student of tokens `width` wide predicts beside pixels."""
    return tuple(
        FeatureTarget(
            each.name, teachers[each.name].width if each.name in teachers else width, each.tokens, each.layer, each.loss
        )
        for each in targets
        if each.teacher is not None
    )


def _key(target: TargetConfig) -> tuple[Any, ...]:
    return target.teacher, target.weights, target.image_size


class StudentAverage(FusedEncoder):
    """Encoder, fusion and norm of a student, which an `EMA` fills."""

    def forward(self, clips: Tensor) -> Tensor:
        """Return features `(B, N, D)` of whole clips."""
        return self.encode(clips)


class Teachers:
    """The teachers of a run's targets, with which its task computes what the student predicts.

    average: fills the copy of the student, where a target's teacher is one.

    Args:
        targets: of the run.
        loaded: its frozen teachers, by the targets' names.
        student: unwrapped; its average is sharded if it is.
        info: the processes.
    """

    def __init__(
        self, targets: Sequence[TargetConfig], loaded: Mapping[str, Teacher], student: Autoencoder, info: DistInfo
    ) -> None:
        self.targets, self.loaded, self.student = tuple(targets), dict(loaded), student.encoder.config
        self.processes = info.world_size
        for teacher in self.loaded.values():
            teacher.to(info.device)
        self.average: EMA | None = None
        averages = [each for each in targets if each.teacher == AVERAGE]
        if averages:
            copy = StudentAverage(self.student, student.fusion is not None)
            copy.encoder.init_weights()  # tables of positions, which no state dict holds
            self.copy = copy.to(info.device).eval().requires_grad_(False)
            if is_sharded(student):
                shard(self.copy, learns=False)
            self.average = EMA(student, averages[0].momentum, self.copy.state_dict())
            self.average.resume(student)

    @torch.no_grad()
    def __call__(self, clips: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """Return the features of each target by its name, `(B, N, F)`.

        Args:
            clips: `(B, C, T, H, W)`, normalised for the student.
            pixels: the same clips from 0 to 1.
        """
        found: dict[tuple[Teacher | None, bool], Tensor] = {}  # targets of one teacher share its features
        features = {}
        for each in self.targets:
            if each.teacher is None:
                continue
            teacher = self.loaded.get(each.name)  # None: the average
            sees_all = teacher is not None and teacher.frames == 1 and each.frames == "all"
            key = teacher, sees_all
            if key not in found:
                found[key] = self.copy(clips) if teacher is None else teacher.features(pixels, self.student, sees_all)
            features[each.name] = found[key]
        return features

    def weights(self, step: int) -> dict[str, float]:
        """Return the weight of each target's loss in a step, counted from 0."""
        return {
            each.name: each.weight * min(1.0, step / each.warmup_steps) if each.warmup_steps else each.weight
            for each in self.targets
        }

    def describe(self) -> list[str]:
        """Return a line for each target, for people."""
        return [self._describe(each) for each in self.targets]

    def _describe(self, target: TargetConfig) -> str:
        weight = f"weight {target.weight:g}" + (f" after {target.warmup_steps} steps" if target.warmup_steps else "")
        if target.teacher is None:
            return f"target pixels: mean squared error at hidden tokens, {weight}"
        where = f"{target.tokens} tokens" if target.layer is None else f"visible tokens, stage {target.layer}"
        if target.teacher == AVERAGE:
            what = f"average of the encoder, momentum {target.momentum:g}"
        else:
            teacher = self.loaded[target.name]
            what = f"{teacher.words}, {teacher.width} features of {teacher.size[0]} x {teacher.size[1]} pixels"
            if teacher.frames == 1 and self.student.tubelet > 1:
                what += f", {target.frames} frame{'s' * (target.frames == 'all')} of each token"
        return f"target {target.name}: {what}; {target.loss} at {where}, {weight}"
