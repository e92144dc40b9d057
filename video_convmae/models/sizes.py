"""Sizes and options of the models, without torch: named sizes and the dataclasses that `Autoencoder`, `Classifier` and
`Probe` are built from. They are the fields `--model.*` of the command line.

Letters: C channels, T H W frames and pixels of a clip; t h w the token grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import prod
from typing import Annotated, Any, Literal, TypeVar, get_args

from video_convmae.bounds import Bounds, check_bounds

Implementation = Literal["packed", "dense"]
PositionTable = Literal["sincos", "flat"]
Pool = Literal["mean", "difference", "motion", "frames", "attentive"]
FrozenPart = Literal["embeddings", "conv_stages", "positions"]
ProbeKind = Literal["linear", "attentive", "knn", "logistic"]
Target = Literal["patch", "patch_channel", "none"]
TargetTokens = Literal["visible", "hidden"]
FeatureLoss = Literal["smooth_l1", "cosine"]


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
    """Return the numbers of a named size. Raises ValueError with the choices."""
    if name.startswith(LIBRARY):
        raise ValueError(f"size is {name!r}; expected one of {', '.join(SIZES)}: models of pytorchvideo only classify")
    if name not in SIZES:
        raise ValueError(f"size is {name!r}; expected one of {', '.join(SIZES)}")
    return SIZES[name]


@dataclass(frozen=True)
class LibraryModel:
    """A model of pytorchvideo's hub, to compare with: frames and pixels of its training clips, and what they must be
    multiples of. one_class: it ends with a softmax over the classes at each place, which is for one class of a record.
    """

    num_frames: int
    image_size: int
    frames_multiple: int = 1
    pixels_multiple: int = 1
    one_class: bool = False


LIBRARY = "pytorchvideo/"  # before a name of pytorchvideo.models.hub, in place of a size
LIBRARY_MODELS = {
    "c2d_r50": LibraryModel(8, 224, frames_multiple=2),
    "i3d_r50": LibraryModel(8, 224, frames_multiple=2),
    "slow_r50": LibraryModel(8, 224),
    "slowfast_r50": LibraryModel(32, 224, frames_multiple=4),  # the slow pathway sees every fourth frame
    "slowfast_r101": LibraryModel(32, 224, frames_multiple=4),
    "slowfast_16x8_r101_50_50": LibraryModel(64, 224, frames_multiple=4),
    "csn_r101": LibraryModel(32, 224),
    "r2plus1d_r50": LibraryModel(16, 224, one_class=True),
    "x3d_xs": LibraryModel(4, 160, one_class=True),
    "x3d_s": LibraryModel(13, 160, one_class=True),
    "x3d_m": LibraryModel(16, 224, one_class=True),
    "x3d_l": LibraryModel(16, 312, one_class=True),
    "mvit_base_16x4": LibraryModel(16, 224, frames_multiple=2, pixels_multiple=32),
    "mvit_base_32x3": LibraryModel(32, 224, frames_multiple=2, pixels_multiple=32),
}


def library_model(size: str) -> LibraryModel:
    """Return the numbers of a size that begins with `pytorchvideo/`. Raises ValueError with the choices."""
    name = size.removeprefix(LIBRARY)
    if name not in LIBRARY_MODELS:
        raise ValueError(f"size is {size!r}; expected {LIBRARY} and one of {', '.join(LIBRARY_MODELS)}")
    return LIBRARY_MODELS[name]


@dataclass(frozen=True)
class EncoderConfig:
    """Encoder options. A field left at its default of (), 0 or None is set from `size` and `num_frames`.

    That happens once, on construction, so an instance always holds the numbers and `type(c)(**asdict(c)) == c`.
    `dataclasses.replace(config, size=...)` therefore keeps the old size's widths: construct a new one instead. Nor can
    a run's dataclass have an instance as its default: jsonargparse would take its numbers for those of every size.

    A plain ViT is one stage with one stride. An image encoder has one frame, tubelet 1 and temporal kernel 1.

    Raises:
        ValueError: an unknown size or numbers that do not fit together.
    """

    size: str = field(default="base", compare=False)  # equal numbers are equal models, under any name
    """tiny, small, base, large, huge; vit_tiny to vit_huge are plain ViTs; to finetune also a model of pytorchvideo to
    compare with, pytorchvideo/mvit_base_16x4 (docs/evaluation.md)."""
    num_frames: Annotated[int, Bounds(least=0)] = 16
    """Frames per clip; 1 makes an image model."""
    image_size: Annotated[int | tuple[int, int], Bounds(least=0)] = 224
    """Input pixels: one number, or height and width."""
    widths: Annotated[tuple[int, ...], Bounds(least=1)] = ()
    """Channels of each stage; the last stage is attention, those before it are convolutional."""
    depths: Annotated[tuple[int, ...], Bounds(least=0)] = ()
    """Blocks of each stage."""
    heads: Annotated[int, Bounds(least=0)] = 0
    """Number of attention heads."""
    strides: Annotated[tuple[int, ...], Bounds(least=1)] = ()
    """Spatial stride of each stage; 4, 2, 2 by default, 16 pixels a token."""
    tubelet: Annotated[int, Bounds(least=0)] = 0
    """Frames per token."""
    temporal_kernel: Annotated[int, Bounds(least=0)] = 0
    """Depthwise kernel size over frames, odd."""
    spatial_kernel: Annotated[int, Bounds(least=1)] = 5
    """Depthwise kernel size over rows and columns, odd."""
    mlp_ratio: Annotated[float | tuple[float, ...], Bounds(above=0)] = 4
    """Hidden channels of an MLP over its input channels: one number, or one for each stage."""
    channels: Annotated[int, Bounds(least=1)] = 3
    """Input channels."""
    drop_path: Annotated[float, Bounds(least=0, below=1)] = 0.0
    """Stochastic depth rate of the last block; it rises linearly from 0."""
    position_table: PositionTable = "sincos"
    """sincos over (t, h, w), or VideoMAE's flat table over the numbered tokens."""
    learnable_positions: bool | None = None
    """Train the encoder's positions, starting from the table; by default only in finetuning."""
    implementation: Implementation = "packed"
    """Compute the visible cells alone (packed), or all of them (dense); the result is the same."""

    def __post_init__(self) -> None:
        check_bounds(self)
        named, image = size_named(self.size), self.num_frames == 1
        self._resolve(
            widths=named.widths,
            depths=named.depths,
            heads=named.heads,
            strides=named.strides,
            tubelet=1 if image else 2,
            temporal_kernel=1 if image else 3,
            learnable_positions=False,
        )
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        if self.num_frames < 1:
            raise ValueError(f"num_frames is {self.num_frames}; expected 1 or more (0 only with model.from_weights)")
        if not len(self.widths) == len(self.depths) == len(self.strides) >= 1:
            raise ValueError(
                f"widths {self.widths}, depths {self.depths} and strides {self.strides} differ in length; "
                "expected one of each for every stage"
            )
        if isinstance(self.mlp_ratio, tuple) and len(self.mlp_ratio) != len(self.widths):
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; expected one number, or {len(self.widths)}, one a stage")
        if self.num_frames % self.tubelet:
            raise ValueError(f"num_frames is {self.num_frames}; expected a multiple of the tubelet, {self.tubelet}")
        if any(pixels < 1 or pixels % self.patch for pixels in self.clip_shape[2:]):
            raise ValueError(
                f"image_size is {self.image_size}; expected multiples of the spatial stride {self.patch} "
                f"(strides {self.strides})"
            )
        *others, width = self.widths
        if self.heads < 1 or width % self.heads:
            raise ValueError(f"heads is {self.heads}; expected a number that divides the last of widths, {width}")
        if self.position_table == "sincos" and width % 4:
            raise ValueError(
                f"widths is {self.widths}; expected a multiple of 4 as the last: positions are sines of it"
            )
        if others and any(size % 2 == 0 for size in self.kernel):
            raise ValueError(
                f"temporal_kernel is {self.temporal_kernel} and spatial_kernel {self.spatial_kernel}; expected odd ones"
            )
        if self.implementation not in get_args(Implementation):
            raise ValueError(f"implementation is {self.implementation!r}; expected 'packed' or 'dense'")
        if self.position_table not in get_args(PositionTable):
            raise ValueError(f"position_table is {self.position_table!r}; expected sincos or flat")
        for name in ("patch", "grid", "kernel", "clip_shape", "mlp_ratios", "later_strides"):
            getattr(self, name)  # computed now: torch.compile cannot trace cached_property's lock (Python 3.11)

    def _resolve(self, **defaults: Any) -> None:
        """Set the named fields that were left at their class defaults, and turn lists (from JSON, YAML) into tuples."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in defaults and value == option.default:
                value = defaults[option.name]
            object.__setattr__(self, option.name, tuple(value) if isinstance(value, list) else value)

    @cached_property
    def patch(self) -> int:
        """Pixels along a token's side."""
        return prod(self.strides)

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        """Token grid (t, h, w)."""
        _, frames, height, width = self.clip_shape
        return frames // self.tubelet, height // self.patch, width // self.patch

    @cached_property
    def kernel(self) -> tuple[int, int, int]:
        """Depthwise kernel size (kt, kh, kw)."""
        return self.temporal_kernel, self.spatial_kernel, self.spatial_kernel

    @cached_property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Shape (C, T, H, W) of one clip."""
        assert isinstance(self.image_size, tuple)  # since __post_init__
        return (self.channels, self.num_frames, *self.image_size)

    @cached_property
    def mlp_ratios(self) -> tuple[float, ...]:
        """MLP ratio of each stage."""
        return self.mlp_ratio if isinstance(self.mlp_ratio, tuple) else (self.mlp_ratio,) * len(self.widths)

    @cached_property
    def later_strides(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, the strides of the stages after it: the nesting of its cells in a token."""
        return tuple(self.strides[stage + 1 :] for stage in range(len(self.strides)))


@dataclass(frozen=True)
class AutoencoderConfig(EncoderConfig):
    """Autoencoder options. The decoder and the target, too, are set from `size` and `num_frames` by default."""

    msd: bool = True
    """Multi-scale decoder (MSD): fuse the convolutional stages into the tokens before the final norm."""
    decoder: Annotated[tuple[int, ...], Bounds(least=0)] = ()
    """Width, depth and heads of the decoder."""
    decoder_mlp_ratio: Annotated[float, Bounds(above=0)] = 4
    """Hidden channels of a decoder MLP over its input channels."""
    target: Target | Literal["auto"] = "auto"
    """Normalisation of a target patch: patch, patch_channel or none; auto: patch for images, else patch_channel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named, image = size_named(self.size), self.num_frames == 1
        self._resolve(
            decoder=named.image_decoder if image else named.video_decoder,
            target="patch" if image else "patch_channel",
        )
        if len(self.decoder) != 3:
            raise ValueError(f"decoder is {self.decoder}; expected (width, depth, heads)")
        width, _, heads = self.decoder
        if width < 4 or width % 4 or heads < 1 or width % heads:
            raise ValueError(f"decoder is {self.decoder}; expected a width that 4 and the number of heads divide")
        if self.target not in get_args(Target):
            raise ValueError(f"target is {self.target!r}; expected one of {', '.join(get_args(Target))}")

    def check_layer(self, target: str, layer: int | None) -> None:
        """Check the convolutional stage at which a target of features is predicted.

        Raises:
            ValueError: the encoder has no such stage.
        """
        stages = len(self.widths) - 1
        if layer is not None and not 1 <= layer <= stages:
            expected = f"1 to {stages}, a convolutional stage, or none" if stages else "none: a plain ViT has no stages"
            raise ValueError(f"layer of the target {target!r} is {layer}; expected {expected}")


@dataclass(frozen=True)
class FeatureTarget:
    """Features of a teacher that an autoencoder predicts beside pixels, or in place of them.

    name: of its head and of its loss.
    width: of a feature.
    tokens: where they are predicted: at the visible tokens by the encoder, or at the hidden ones by the decoder.
    layer: convolutional stage, from 1, whose output predicts them at visible tokens; None: the encoder's tokens.
    loss: smooth L1, or 1 - cosine.
    """

    name: str
    width: int
    tokens: TargetTokens = "visible"
    layer: int | None = None
    loss: FeatureLoss = "smooth_l1"


@dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    """Classifier options and, with `probe`, those of a probe. Positions are learnable in a classifier alone.

    With `from_weights` an instance is not resolved or checked: `with_encoder` does that.
    """

    from_weights: bool = False
    """Take the encoder from init.weights: of size, widths, depths, heads, strides, tubelet, kernels and position_table
    those that are not set here, of num_frames and image_size those that are 0."""
    probe: ProbeKind | None = None
    """Freeze the encoder and train this head on its features: linear or attentive; knn, which stores the training
    features and trains nothing; logistic, fitted at once by regularised logistic regression, for few labels. none:
    finetune everything."""
    pool: Pool = "mean"
    """What the head reads: the mean over tokens; difference, beside it their mean change over time; motion, beside it
    the convolutional stages' change, on average and where it is largest; frames, the mean of each time; attentive, what
    a learnt query reads (classifier; as a probe it is the attentive one)."""
    pool_depth: Annotated[int, Bounds(least=1)] = 1
    """Attentive pooling and probe: blocks; all but the last are self-attention (V-JEPA: 1, V-JEPA 2: 4)."""
    pool_heads: Annotated[int, Bounds(least=0)] = 0
    """Attentive pooling and probe: attention heads; 0: those of the encoder."""
    msd: bool = True
    """Probes read the tokens after fusion and norm, as pretrained. A finetuned classifier has no fusion."""
    head_init_std: Annotated[float | None, Bounds(above=0)] = None
    """Standard deviation of the head's initial weights; none: 2e-5 to finetune (ConvMAE; VideoMAE scales 0.02 by
    0.001), 0.01 to probe."""
    head_dropout: Annotated[float, Bounds(least=0, below=1)] = 0.0
    """Dropout rate before the head of a finetuned classifier."""
    freeze: tuple[FrozenPart, ...] = ()
    """Parts of a classifier's encoder that are not trained: embeddings, conv_stages, positions."""
    freeze_blocks: Annotated[int, Bounds(least=0)] = 0
    """First attention blocks that are not trained."""
    lora_rank: Annotated[int, Bounds(least=0)] = 0
    """LoRA: train the encoder by low-rank changes of its attention alone (qkv and proj), of this rank, with norm and
    head; 0: no LoRA. Needs peft: pip install "video-convmae[lora]"."""
    lora_alpha: Annotated[float, Bounds(above=0)] = 16.0
    """LoRA: the changes are scaled by lora_alpha / lora_rank."""

    def __post_init__(self) -> None:
        if self.from_weights:
            self._resolve()
            return
        if self.of_library:
            self._check_library()
            return
        finetuned = self.probe is None
        self._resolve(learnable_positions=finetuned, head_init_std=2e-5 if finetuned else 0.01)
        super().__post_init__()
        if self.probe not in (None, *get_args(ProbeKind)):
            raise ValueError(f"the probe's kind is {self.probe!r}; expected one of {', '.join(get_args(ProbeKind))}")
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool is {self.pool!r}; expected one of {', '.join(get_args(Pool))}")
        self._check_pool()
        self._check_trained()

    @property
    def of_library(self) -> bool:
        """Whether it is a model of pytorchvideo, of which only the clip, the dropouts and the head's start are set."""
        return self.size.startswith(LIBRARY)

    def _check_library(self) -> None:
        """Take frames and pixels that are 0 from the model's training, and check what is set."""
        known = library_model(self.size)
        self._resolve()
        object.__setattr__(self, "num_frames", self.num_frames or known.num_frames)
        size = self.image_size or known.image_size
        object.__setattr__(self, "image_size", (size, size) if isinstance(size, int) else size)
        drops = ("drop_path",) if self.size.startswith(f"{LIBRARY}mvit") else ()
        settable = {"size", "num_frames", "image_size", "head_init_std", "head_dropout", *drops}
        for option in fields(self):
            if option.name not in settable and (value := getattr(self, option.name)) != option.default:
                raise ValueError(
                    f"{option.name} is {value!r} and size {self.size}; expected {option.default!r}: of a model of "
                    f"pytorchvideo only {', '.join(sorted(settable))} can be set"
                )
        _, frames, height, width = self.clip_shape
        if frames % known.frames_multiple or height % known.pixels_multiple or width % known.pixels_multiple:
            raise ValueError(
                f"num_frames is {frames} and image_size {self.image_size}; expected multiples of "
                f"{known.frames_multiple} frames and {known.pixels_multiple} pixels with {self.size}"
            )

    def _check_pool(self) -> None:
        if self.probe == "attentive" and self.pool not in ("mean", "attentive"):
            raise ValueError(f"pool is {self.pool!r} and probe 'attentive'; expected mean, or a linear probe")
        if self.pool == "attentive" and self.probe not in (None, "attentive"):
            raise ValueError(f"pool is 'attentive' and probe {self.probe!r}; expected probe attentive")
        if self.pool in ("motion", "difference") and self.grid[0] < 2:
            raise ValueError(
                f"pool is {self.pool} and {self.num_frames} frames of tubelet {self.tubelet} make one token in time; "
                "expected 2 or more: take more frames, or pool mean"
            )
        if not self.pools_attentively and (self.pool_depth, self.pool_heads) != (1, 0):
            raise ValueError(
                f"pool_depth is {self.pool_depth} and pool_heads {self.pool_heads}; expected 1 and 0, or pool or probe "
                "attentive"
            )
        if self.pools_attentively and self.widths[-1] % (self.pool_heads or self.heads):
            raise ValueError(f"pool_heads is {self.pool_heads}; expected a number that divides {self.widths[-1]}")

    @property
    def frozen(self) -> list[str]:
        """The options that freeze weights of a classifier's encoder, with their values, for messages."""
        asked = {"freeze": self.freeze, "freeze_blocks": self.freeze_blocks, "lora_rank": self.lora_rank}
        return [f"{name} is {list(v) if isinstance(v, tuple) else v}" for name, v in asked.items() if v]

    def _check_trained(self) -> None:
        given = self.frozen
        if given and self.probe is not None:
            raise ValueError(f"{given[0]} and probe {self.probe!r}; expected none: a probe's encoder is frozen whole")
        if self.lora_rank and len(given) > 1:
            raise ValueError(f"{given[0]} and {given[-1]}; expected one: with LoRA the encoder itself is frozen")
        if self.freeze_blocks > self.depths[-1]:
            raise ValueError(f"freeze_blocks is {self.freeze_blocks}; expected at most {self.depths[-1]}, all of them")
        if "conv_stages" in self.freeze and len(self.widths) == 1:
            raise ValueError("freeze has conv_stages; expected embeddings or positions: a plain ViT has no such stages")

    @property
    def lora_scale(self) -> float | None:
        """Factor of LoRA's changes; None: no LoRA."""
        return self.lora_alpha / self.lora_rank if self.lora_rank else None

    @property
    def pools_attentively(self) -> bool:
        """Whether a learnt query reads the tokens."""
        return self.pool == "attentive" or self.probe == "attentive"

    def with_encoder(self, encoder: Mapping[str, Any]) -> ClassifierConfig:
        """Return these options, resolved, with fields of an encoder where they are not set (see `from_weights`)."""
        options = {option.name: getattr(self, option.name) for option in fields(self)} | {"from_weights": False}
        unset = {option.name: option.default for option in fields(EncoderConfig)} | {"num_frames": 0, "image_size": 0}
        taken = {n: v for n, v in encoder.items() if n == "size" or options[n] == unset[n]}
        clip = {name: getattr(EncoderConfig, name) for name in ("num_frames", "image_size") if not options[name]}
        return ClassifierConfig(**{**options, **clip, **taken})


Config = TypeVar("Config", bound=EncoderConfig)


def apply_overrides(kind: type[Config], overrides: Mapping[str, Any], **given: Any) -> Config:
    """Return `kind(**given, **overrides)` of a `create_*` function.

    Raises:
        ValueError: a value that does not fit.
        TypeError: an override that is no field, or one that the function fixes; the message lists the known ones.
    """
    known = [option.name for option in fields(kind) if option.name not in given]
    if unknown := sorted(set(overrides) - set(known)):
        raise TypeError(f"unknown overrides: {', '.join(unknown)}; known: {', '.join(known)}")
    return kind(**given, **overrides)
