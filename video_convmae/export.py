"""Files that other programs run: a model by torch.export or ONNX, compared with the model before it takes its name.

The file's input is `clips (B, 3, T, H, W)`, normalised, of any number B of clips; of a segmenter `images (B, 3, H, W)`.
Its output is `logits (B, classes)`, of a segmenter `(B, classes, H / 4, W / 4)`, or of a pretrained model `tokens
(B, N, D)`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from video_convmae.atomic import refuse_overwriting, replacing
from video_convmae.config import DataConfig, LabelledDataConfig, SourceConfig
from video_convmae.dense.segmentation import Segmenter
from video_convmae.engine.checkpoint import Checkpoint, find_weights
from video_convmae.errors import UserError
from video_convmae.models import positions
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe
from video_convmae.models.pytorchvideo import LibraryClassifier
from video_convmae.predictor import load
from video_convmae.runs import load_segmenter, run_kind
from video_convmae.weights.files import parts_of

Format = Literal["onnx", "torch"]
Model: TypeAlias = "Autoencoder | Classifier | Probe | LibraryClassifier | Segmenter"
ClipModel = TypeVar("ClipModel", bound=Autoencoder | Classifier | Probe)
Runner: TypeAlias = Callable[[Tensor], Tensor]

BATCHES = (1, 3)  # that the file is tried with; it is traced with 2
TOLERANCE = 1e-4  # of the largest value of the output; on a CPU 1e-6 is usual
ABOUT = "video_convmae"  # name of what a user must know, in JSON: an entry of ONNX's metadata, a file of torch.export's
ONE_FILE = 2**31 - 2**20  # bytes of a protobuf message, less its graph


@dataclass(frozen=True)
class Exported:
    """An exported file.

    shape: of the input, without B. difference: the largest from the model, over the largest value of its output.
    """

    path: Path
    input: str
    shape: tuple[int, ...]
    output: str
    difference: float

    def __str__(self) -> str:
        sizes = ", ".join(str(size) for size in self.shape)
        return (
            f"{self.path}: {self.input} (B, {sizes}) -> {self.output}; equal to the model for {BATCHES[0]} and "
            f"{BATCHES[1]} of them, to {self.difference:.1e} of the largest value"
        )


class Exportable(nn.Module):
    """A model with one input and one output: of a pretrained model the tokens, of others the logits."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch to tokens or logits."""
        if isinstance(self.model, Autoencoder):
            return self.model.encode(x)
        return self.model(x)[0] if isinstance(self.model, Segmenter) else self.model(x)


def export(
    source: str | Path | Checkpoint,
    format: Format,
    output: str | Path,
    *,
    num_frames: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    ema: bool | None = None,
) -> Exported:
    """Export a model to a file. The file is run and compared with the model, and only then has its name.

    Args:
        source: a run folder, a checkpoint, a published file: anything that `load` takes, or a segmenter's run.
        format: `onnx`, or `torch` for a file of torch.export.
        output: the file.
        num_frames, image_size: of a clip, where it is not the model's own; positions are resized.
        ema: as in `load`.

    Raises:
        UserError: the source is a detector, a clip does not fit, a package is missing, the output is a folder or the
            weights themselves, the model cannot be exported, or the file computes something else.
    """
    if format not in get_args(Format):
        raise UserError(f"format is {format!r}; expected one of {', '.join(get_args(Format))}")
    if format == "onnx":
        _require_onnx()
    path = Path(output).expanduser()
    if path.is_dir():
        raise UserError(f"{output} is a folder; expected the name of a file to write")
    found = source if isinstance(source, Checkpoint) else find_weights(source)
    refuse_overwriting([path], found.path.iterdir() if isinstance(found, Checkpoint) else [found, *parts_of(found)])
    model, shape, about = _load(source, found, num_frames, image_size, ema)
    names = ("images" if len(shape) == 3 else "clips", "tokens" if isinstance(model, Autoencoder) else "logits")
    write = _write_onnx if format == "onnx" else _write_torch
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), replacing(path, "wb") as file:  # after an error there is no file
        try:
            with _quiet():
                run = write(Exportable(_with_plain_operators(model)).eval(), shape, names, about, Path(file.name))
        except UserError:
            raise
        except Exception as error:  # of many kinds, over many lines
            first = next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())
            raise UserError(f"{source} cannot be exported as {format}: {first.strip()[:300]}") from error
        difference = _compare(run, Exportable(model).eval(), shape)
    return Exported(path, names[0], shape, names[1], difference)


def _load(
    source: str | Path | Checkpoint,
    found: Path | Checkpoint,
    num_frames: int | None,
    image_size: int | tuple[int, int] | None,
    ema: bool | None,
) -> tuple[Model, tuple[int, ...], dict[str, Any]]:
    """Load what was found, for clips of a size; return model, shape of its input, and what a user must know."""
    kind = run_kind(found)
    if kind == "detection":
        raise UserError(
            f"{source} is a detector, which cannot be traced: how many boxes are left after suppression, and the level "
            "that each is read from, depend on the picture; expected a classifier, a pretrained model or a segmenter"
        )
    if kind == "segmentation":
        if num_frames is not None:
            raise UserError(f"{source} is a segmenter, which has no frames; leave out the number of frames")
        segmenter, config = load_segmenter(found, ema)
        labels = config.data.labels if isinstance(config.data.labels, tuple) else None
        size = _pair(config.validate.window if image_size is None else image_size)
        return segmenter, (3, *size), _about(config.data, labels)
    loaded = load(found, ema=ema)
    about = _about(loaded.config.data, loaded.class_names)
    if isinstance(loaded.model, LibraryClassifier):
        if num_frames is not None or image_size is not None:
            raise UserError(f"{source} is a model of pytorchvideo, for its own clips; leave out the size of a clip")
        return loaded.model.eval(), loaded.model.config.clip_shape, about
    model: Autoencoder | Classifier | Probe = with_clip(loaded.model, num_frames, image_size)
    return model, model.encoder.config.clip_shape, about


def _about(data: SourceConfig, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Return what a user of a file must know: mean and deviation of pixels from 0 to 1, frames apart, classes."""
    about: dict[str, Any] = {"mean": list(data.mean), "std": list(data.std)}
    if isinstance(data, DataConfig) and data.format != "image":
        about |= {"sampling": data.sampling}
        if data.sampling == "dense":
            about |= {"stride": data.stride} if data.fps is None else {"fps": data.fps}
    if isinstance(data, LabelledDataConfig) and data.multi_label:
        about["multi_label"] = True  # the sigmoid of a logit is its probability
    return about if class_names is None else {**about, "class_names": list(class_names)}


def with_clip(
    model: ClipModel, num_frames: int | None = None, image_size: int | tuple[int, int] | None = None, **changes: Any
) -> ClipModel:
    """Return a model with the same weights for clips of another size, in evaluation mode.

    Learnt positions are resized, fixed ones computed for the new grid.

    Args:
        model: of any kind.
        num_frames, image_size: of a clip; None: the model's own.
        changes: other fields of its configuration, that change no tensor.

    Raises:
        UserError: the sizes do not fit the model.
    """
    given = {"num_frames": num_frames, "image_size": image_size, **changes}
    old = model.encoder.config
    try:
        config: Any = replace(old, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UserError(str(error)) from error
    if getattr(config, "pool", None) == "frames" and config.grid[0] != old.grid[0]:
        raise UserError(f"the head reads each time of {old.num_frames} frames apart (model.pool frames); keep them")
    other: Any
    if isinstance(model, Autoencoder):
        other = Autoencoder(config, model.targets, model.predicts_pixels)
    else:
        other = type(model)(config, model.num_classes)
    state = model.state_dict()
    if (learnt := state.get("encoder.positions")) is not None:
        state["encoder.positions"] = positions.resize(learnt[0], old.grid, config.grid)[None]
    other = other.to(next(model.parameters()))
    other.load_state_dict(state)
    return other.eval()


def _with_plain_operators(model: Model) -> Model:
    """Return the model computed by PyTorch's operators alone, which other programs have, and not by kernels of ours.

    With nothing hidden `dense` computes what `packed` does.
    """
    return model if isinstance(model, Segmenter | LibraryClassifier) else with_clip(model, implementation="dense")


def _trace(model: Exportable, shape: tuple[int, ...]) -> ExportedProgram:
    """Trace a model for any number of inputs of one shape."""
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},))


def _write_torch(
    model: Exportable, shape: tuple[int, ...], names: tuple[str, str], about: Mapping[str, Any], path: Path
) -> Runner:
    """Write a file of torch.export, and return what its program computes when it is read again."""
    with open(path, "wb") as file:
        torch.export.save(_trace(model, shape), file, extra_files={ABOUT: json.dumps(about)})
    with open(path, "rb") as file:  # given a path, it would warn of its suffix
        return torch.export.load(file).module()


def _write_onnx(
    model: Exportable, shape: tuple[int, ...], names: tuple[str, str], about: Mapping[str, Any], path: Path
) -> Runner:
    """Write an ONNX file, and return what onnxruntime computes with it."""
    import onnxruntime

    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > ONE_FILE:
        raise UserError(
            f"the model has {size / 1e9:.1f} GB and an ONNX file holds 2 GB at most; expected a smaller one, or the "
            "format torch"
        )
    # The mathematical attention: PyTorch 2.14 cannot take its fused one with a bias apart for ONNX.
    with sdpa_kernel(SDPBackend.MATH):
        program = torch.onnx.export(
            _trace(model, shape),
            (torch.zeros(2, *shape),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=[names[0]],
            output_names=[names[1]],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update({ABOUT: json.dumps(about)})
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {names[0]: batch.numpy()})[0])


def _compare(run: Runner, model: nn.Module, shape: tuple[int, ...]) -> float:
    """Return the largest difference of a file's outputs from the model's, over the largest value of these.

    Raises:
        UserError: it is above the tolerance, or the shapes differ.
    """
    differences = []
    for count in BATCHES:
        batch = torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))
        expected, given = model(batch), run(batch)
        if given.shape != expected.shape:
            raise UserError(
                f"the exported file gives {tuple(given.shape)} for {count} inputs, and the model "
                f"{tuple(expected.shape)}: nothing is written"
            )
        finite = expected.isfinite()  # a class without a vote has the logit minus infinity
        difference = torch.where(finite, given - expected, torch.where(given == expected, 0.0, torch.inf)).abs().max()
        differences.append((difference / expected[finite].abs().max().clamp(min=1e-6)).item())
    largest = max(differences)
    if not largest <= TOLERANCE:
        raise UserError(
            f"the exported file differs from the model by {largest:.1e} of its largest value, for {BATCHES[0]} or "
            f"{BATCHES[1]} inputs; expected {TOLERANCE:.0e} at most: nothing is written"
        )
    return largest


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _require_onnx() -> None:
    """Raise a UserError unless the packages are installed that ONNX files are written and run with."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f'{name} is not installed: pip install "video-convmae[export]", or take the format torch')


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the exporters' warnings, which concern their own parts."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
