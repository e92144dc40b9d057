"""The configuration of a run: dataclasses, filled from a YAML file and the command line, strictly.

    python tools/pretrain.py --config configs/video/pretrain_k400_base.yaml --optim.base_lr 3e-4
    python tools/pretrain.py --help             every field, explained
    python tools/pretrain.py ... --print_config the whole run

An unknown field or a wrong type is an error that names the field. The settings of a part stand with that part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from video_convmae.data.datasets import Clips
from video_convmae.data.decoding import Decoder
from video_convmae.data.isolation import IsolatedDecoder
from video_convmae.data.records import ListFormat, Records, read_list
from video_convmae.data.sampling import Sampling
from video_convmae.data.transforms import Augmentation
from video_convmae.engine import checkpoint
from video_convmae.engine.loop import TrainConfig
from video_convmae.engine.optim import OptimConfig
from video_convmae.masking import MASKS
from video_convmae.models.autoencoder import Autoencoder, Target, create_autoencoder
from video_convmae.models.weights import Inflation, LoadReport, load_weights

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class ModelConfig:
    """Arguments of `create_autoencoder`; what is none follows from size and frames."""

    size: str = "base"
    """tiny, small, base, large, huge; vit_tiny to vit_huge are plain ViTs."""
    num_frames: int = 16
    """Frames of a clip; 1 makes an image model."""
    image_size: int | tuple[int, int] = 224
    """Pixels: one number, or height and width."""
    msd: bool = True
    """Multi-scale fusion: the convolutional stages join the tokens before the final norm."""
    implementation: Literal["packed", "dense"] = "packed"
    """Compute the visible cells alone, or all of them; the result is the same."""
    strides: tuple[int, ...] | None = None
    """Spatial stride of each stage; 4, 2, 2 by default, 16 pixels a token."""
    tubelet: int | None = None
    """Frames of a token."""
    temporal_kernel: int | None = None
    """Frames that a depthwise convolution sees."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; it rises linearly from 0."""
    position_table: Literal["sincos", "flat"] = "sincos"
    """sincos over (t, h, w), or VideoMAE's flat table over the numbered tokens."""
    decoder: tuple[int, int, int] | None = None
    """Width, depth and heads of the decoder."""
    target: Target | None = None
    """Normalise a patch's pixels: patch, patch_channel, none."""

    def autoencoder(self) -> Autoencoder:
        """Build the model."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return create_autoencoder(given.pop("size"), **given)


@dataclass(frozen=True)
class MaskConfig:
    """What the encoder does not see."""

    kind: Literal["tube", "random", "frame", "block"] = "tube"
    """See video_convmae/masking.py."""
    ratio: float = 0.9
    """Share of the tokens that is hidden."""


@dataclass(frozen=True)
class DataConfig:
    """The list, and how clips are made of its records."""

    train: str
    """List file; data_lists/README.md tells its forms."""
    root: str = ""
    """Folder that the list's relative paths are joined to."""
    format: ListFormat = "video"
    """What a line holds: video, frames or image."""
    decoder: Decoder = "auto"
    """auto, torchcodec, pyav or decord; auto is resolved once and written into the run's config."""
    decode_timeout: float = 60.0
    """Seconds after which a decode is ended and its record counts as bad."""
    max_bad_fraction: float = 0.01
    """Share of the list that may be bad before the run stops."""
    sampling: Literal["dense", "uniform"] = "dense"
    """Frames `stride` apart from one place (Kinetics), or one of each of T segments (Something-Something)."""
    stride: int = 4
    """Frames between two of a dense clip."""
    repeats: int = 1
    """Clips of each decoded record: own start, crop and mask; not counted in the batch size."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Crop and flip."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of each channel, for pixels from 0 to 1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Of each channel, for pixels from 0 to 1."""
    workers: int = 8
    """Loading processes of each device."""
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    """How loading processes start; none: the platform's own way."""

    def records(self) -> Records:
        """Read the list."""
        return read_list(self.train, self.format, self.root)

    def clips(self, records: Records, model: Autoencoder, mask: MaskConfig, seed: int) -> Clips:
        """Training clips in the shape that the model takes."""
        encoder = model.encoder.config
        return Clips(
            records,
            Sampling(self.sampling, encoder.num_frames, self.stride),
            self.augmentation,
            encoder.image_size,
            partial(MASKS[mask.kind], encoder.grid, mask.ratio),
            IsolatedDecoder(self.decoder, self.decode_timeout),
            self.repeats,
            seed,
        )


@dataclass(frozen=True)
class InitConfig:
    """What a new run starts from. A run that goes on takes its own checkpoint instead."""

    weights: str | None = None
    """Checkpoint, run folder or published file (models/released.py tells the layouts); none: random."""
    inflation: Inflation = field(default_factory=Inflation)
    """How image weights become video weights: average or center, over the frames of a token and of a kernel."""

    def load(self, model: Autoencoder) -> LoadReport | None:
        """Load the weights, if any, and say what was loaded.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file does not fit the model.
        """
        if self.weights is None:
            return None
        path = Path(self.weights)
        source = checkpoint.find(path) if path.is_dir() else path
        return load_weights(model, source, inflation=self.inflation)


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run."""

    output: str
    """Run folder; the same command on a folder that holds a run goes on with it."""
    data: DataConfig
    """The list, and how clips are made of its records."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The autoencoder."""
    init: InitConfig = field(default_factory=InitConfig)
    """What the run starts from."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """What the encoder does not see."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW and its learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda."""
    seed: int = 0
    """Every random number of the run follows from it."""


Config = TypeVar("Config")


def parse(kind: type[Config], arguments: Sequence[str] | None = None) -> Config:
    """Read a configuration from `--config FILE` and edits of single fields.

    Args:
        kind: the run's dataclass.
        arguments: as on the command line; None reads that.

    An unknown field or a wrong type ends the program with a message that names it.
    """
    parser = ArgumentParser(description=kind.__doc__)
    parser.add_argument(
        "--config", action="config", help="YAML file; fields after it on the command line replace its own."
    )
    parser.add_class_arguments(kind)
    values = parser.instantiate(parser.parse_args(arguments)).as_dict()
    return kind(**{name: value for name, value in values.items() if name != "config"})


def plain(config: Any) -> dict[str, Any]:
    """A configuration as what YAML and checkpoints hold: dicts, lists, numbers, strings."""

    def simplify(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: simplify(item) for key, item in value.items()}
        return [simplify(item) for item in value] if isinstance(value, (tuple, list)) else value

    return simplify(asdict(config))


def write_yaml(config: Any, path: Path) -> None:
    """Write a configuration so that `--config` reads it again."""
    path.write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")


def from_plain(kind: type[Config], values: dict[str, Any]) -> Config:
    """The configuration that `plain` took apart, checked as strictly as a file."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind)
    return kind(**parser.instantiate(parser.parse_object(values)).as_dict())


def load_autoencoder(path: str | Path, ema: bool = False) -> tuple[Autoencoder, PretrainConfig]:
    """A pretrained model in evaluation mode, and the configuration of its run.

    Args:
        path: a checkpoint, or a run folder (its newest checkpoint).
        ema: take the moving average of the weights, where the run kept one (`train.ema`).

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is no checkpoint of a pretraining run, or holds no average.
    """
    path = checkpoint.find(path)
    state = checkpoint.load(path)
    config = from_plain(PretrainConfig, state["config"])
    weights = state["ema"] if ema else state["model"]
    if weights is None:
        raise ValueError(f"{path} holds no average of the weights: the run had no train.ema")
    model = config.model.autoencoder()
    model.load_state_dict(weights)
    return model.eval(), config
