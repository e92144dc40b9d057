"""Named sizes and the options of the models: numbers only, read without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from typing import Any, Literal, TypeVar, get_args

Implementation = Literal["packed", "dense"]
PositionTable = Literal["sincos", "flat"]
Target = Literal["patch", "patch_channel", "none"]
ProbeKind = Literal["linear", "attentive", "knn"]


@dataclass(frozen=True)
class Size:
    """Widths, depths and spatial strides of the stages, heads of the last; (width, depth, heads) of the decoders."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: int
    strides: tuple[int, ...]
    video_decoder: tuple[int, int, int]
    image_decoder: tuple[int, int, int]


HYBRID = (4, 2, 2)  # a token covers 16 pixels, 4x4 cells of stage 1, 2x2 of stage 2
PLAIN = (16,)  # a plain ViT: no convolutional stage

SIZES = {
    "tiny": Size((48, 96, 192), (1, 1, 4), 3, HYBRID, (96, 2, 3), (96, 2, 3)),
    "small": Size((128, 256, 384), (2, 2, 11), 6, HYBRID, (192, 4, 3), (256, 8, 8)),
    "base": Size((256, 384, 768), (2, 2, 11), 12, HYBRID, (384, 4, 6), (512, 8, 16)),
    "large": Size((384, 768, 1024), (2, 2, 20), 16, HYBRID, (512, 12, 8), (512, 8, 16)),
    "huge": Size((768, 1024, 1280), (2, 2, 31), 16, HYBRID, (512, 12, 8), (512, 8, 16)),
    "vit_tiny": Size((192,), (6,), 3, PLAIN, (96, 2, 3), (96, 2, 3)),
    "vit_small": Size((384,), (12,), 6, PLAIN, (192, 4, 3), (256, 8, 8)),
    "vit_base": Size((768,), (12,), 12, PLAIN, (384, 4, 6), (512, 8, 16)),
    "vit_large": Size((1024,), (24,), 16, PLAIN, (512, 12, 8), (512, 8, 16)),
    "vit_huge": Size((1280,), (32,), 16, PLAIN, (512, 12, 8), (512, 8, 16)),
}


def size_named(name: str) -> Size:
    """Return the numbers of a size.

    Raises:
        ValueError: an unknown name; the message has the choices.
    """
    if name not in SIZES:
        raise ValueError(f"size is {name!r}; expected one of {', '.join(SIZES)}")
    return SIZES[name]


@dataclass(frozen=True)
class EncoderConfig:
    """Options of an encoder. A field left empty, 0 or auto is resolved from size and num_frames on construction.

    The last stage is attention, those before it are convolutional; a plain ViT is one stage with one stride. An image
    encoder has one frame, tubelet 1 and temporal kernel 1. An instance holds resolved numbers, so that
    `dataclasses.replace(config, size=...)` does not resolve them again: build a new one.
    """

    size: str = "base"
    """tiny, small, base, large, huge; vit_tiny to vit_huge are plain ViTs."""
    num_frames: int = 16
    """Frames of a clip; 1 makes an image model."""
    image_size: int | tuple[int, int] = 224
    """Pixels: one number, or height and width."""
    widths: tuple[int, ...] = ()
    """Channels per stage."""
    depths: tuple[int, ...] = ()
    """Blocks per stage."""
    heads: int = 0
    """Number of attention heads."""
    strides: tuple[int, ...] = ()
    """Spatial stride per stage; 4, 2, 2 by default, 16 pixels a token."""
    tubelet: int = 0
    """Frames of a token; 2 by default, 1 for images."""
    temporal_kernel: int = 0
    """Frames of a depthwise kernel; 3 by default, 1 for images."""
    spatial_kernel: int = 5
    """Cells along a side of a depthwise kernel."""
    mlp_ratio: float = 4
    """Hidden width of an MLP divided by its width."""
    channels: int = 3
    """Channels of a pixel."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; it rises linearly from 0."""
    position_table: PositionTable = "sincos"
    """sincos over (t, h, w), or VideoMAE's flat table over the numbered tokens."""
    learnable_positions: bool | None = None
    """Learn the positions, from the table on; none: in a finetuned classifier."""
    implementation: Implementation = "packed"
    """Compute the visible cells alone (packed), or all of them (dense); the result is the same."""

    def __post_init__(self) -> None:
        named, is_image = size_named(self.size), self.num_frames == 1
        defaults: dict[str, Any] = {
            "widths": named.widths,
            "depths": named.depths,
            "heads": named.heads,
            "strides": named.strides,
            "tubelet": 1 if is_image else 2,
            "temporal_kernel": 1 if is_image else 3,
        }
        for name, default in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, default)
        if self.learnable_positions is None:
            object.__setattr__(self, "learnable_positions", self._learns_positions())
        for name in ("widths", "depths", "strides"):  # lists, as a configuration file has them
            object.__setattr__(self, name, tuple(getattr(self, name)))
        size = self.image_size
        object.__setattr__(self, "image_size", (size, size) if isinstance(size, int) else tuple(size))
        self._check()

    def _learns_positions(self) -> bool:
        return False

    def _check(self) -> None:
        if not len(self.widths) == len(self.depths) == len(self.strides) >= 1:
            raise ValueError(
                f"widths {self.widths}, depths {self.depths} and strides {self.strides} differ in length; "
                "expected one of each for every stage"
            )
        if self.num_frames % self.tubelet:
            raise ValueError(f"num_frames is {self.num_frames}; expected a multiple of the tubelet, {self.tubelet}")
        if any(size % self.patch for size in self.frame_size):
            raise ValueError(
                f"image_size is {self.image_size}; expected multiples of the spatial stride {self.patch} "
                f"(strides {self.strides})"
            )
        _check_choice("implementation", self.implementation, Implementation)
        _check_choice("position_table", self.position_table, PositionTable)

    @cached_property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        assert not isinstance(self.image_size, int)  # resolved in __post_init__
        return self.image_size

    @cached_property
    def patch(self) -> int:
        """Pixels along a token's side."""
        return prod(self.strides)

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        """The token grid (t, h, w)."""
        height, width = self.frame_size
        return self.num_frames // self.tubelet, height // self.patch, width // self.patch

    @cached_property
    def kernel(self) -> tuple[int, int, int]:
        """Depthwise kernel (kt, kh, kw)."""
        return self.temporal_kernel, self.spatial_kernel, self.spatial_kernel

    @cached_property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one clip."""
        return (self.channels, self.num_frames, *self.frame_size)

    @cached_property
    def cell_factors(self) -> tuple[tuple[int, ...], ...]:
        """Strides of the stages after each stage: the nesting of its cells in a token."""
        return tuple(self.strides[stage + 1 :] for stage in range(len(self.strides)))


@dataclass(frozen=True)
class AutoencoderConfig(EncoderConfig):
    """Options of a masked autoencoder. A field left empty, 0 or auto is resolved from size and num_frames."""

    msd: bool = True
    """Multi-scale decoder: the convolutional stages are fused into the tokens before the final norm."""
    decoder: tuple[int, int, int] | tuple[()] = ()
    """Width, depth and heads of the decoder."""
    decoder_mlp_ratio: float = 4
    """Hidden width of a decoder MLP divided by its width."""
    target: Literal["auto"] | Target = "auto"
    """Normalisation of a patch's pixels: patch, patch_channel, none; auto: patch for images, else patch_channel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named, is_image = size_named(self.size), self.num_frames == 1
        if not self.decoder:
            object.__setattr__(self, "decoder", named.image_decoder if is_image else named.video_decoder)
        object.__setattr__(self, "decoder", tuple(self.decoder))
        if self.target == "auto":
            object.__setattr__(self, "target", "patch" if is_image else "patch_channel")
        _check_choice("target", self.target, Target)


@dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    """Options of a classifier, or with `probe` of a probe."""

    probe: ProbeKind | None = None
    """Freeze the encoder and train this head on its features: linear, attentive, or knn, which stores the features of
    the training list and trains nothing; none: finetune everything."""
    msd: bool = True
    """Probes read the tokens after fusion and norm, as pretrained. A finetuned classifier has no fusion."""
    head_init_std: float | None = None
    """Deviation of the head's initial weights; none: 2e-5 to finetune (ConvMAE; VideoMAE scales 0.02 by 0.001), 0.01 to
    probe."""
    head_dropout: float = 0.0
    """Dropout before the head of a finetuned classifier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe is not None:
            _check_choice("probe", self.probe, ProbeKind)
        if self.head_init_std is None:
            object.__setattr__(self, "head_init_std", 2e-5 if self.probe is None else 0.01)
        elif not self.head_init_std > 0:
            raise ValueError(f"head_init_std is {self.head_init_std}; expected a deviation above 0")
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"head_dropout is {self.head_dropout}; expected a fraction, 0 or more and less than 1")

    def _learns_positions(self) -> bool:
        return self.probe is None


Options = TypeVar("Options", bound=EncoderConfig)


def build_options(kind: type[Options], **options: Any) -> Options:
    """Build a configuration from keyword arguments.

    Raises:
        TypeError: an option that is no field; the message has the known ones.
        ValueError: values that do not fit together.
    """
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"unknown overrides: {', '.join(unknown)}; known: {', '.join(known)}")
    return kind(**options)


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(get_args(choices))}")
