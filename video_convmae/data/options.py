"""Options of the data pipeline: list formats, frame readers, augmentation, test views, mixing.

Standard library only, so that configurations can be parsed and `--help` printed without importing torch or timm.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from video_convmae.bounds import Bounds, check_bounds

ListFormat = Literal["video", "frames", "image"]
SamplingKind = Literal["dense", "uniform"]
ReaderName = Literal["auto", "torchcodec", "pyav", "decord", "torchcodec_cuda"]
# Fields of a data configuration that say how its files are loaded, and change no value.
LOADING = ("workers", "start_method", "decode_timeout", "memory", "cache", "cache_size")

UNIFORM_HAS_NO_RATE = "which takes frames over the whole video, at no rate; expected dense sampling, or no fps"

# Names of files that the readers can open, of whichever case. MPEG transport streams are named so that they are listed
# and refused with a reason, not passed over.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".avif"),
)
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mp4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".ismv", ".insv", ".lrv"),
    *(".webm", ".mkv", ".mk3d", ".avi", ".divx", ".xvid", ".wmv", ".asf", ".flv", ".rm", ".rmvb", ".wtv"),
    *(".mpg", ".mpeg", ".mpe", ".m2p", ".m1v", ".m2v", ".mpv", ".vob", ".ogv", ".ogm", ".gif", ".mxf", ".nut", ".dv"),
    *(".y4m", ".ivf", ".obu", ".h264", ".264", ".avc", ".h265", ".265", ".hevc", ".mjpeg", ".mjpg"),
    *(".ts", ".mts", ".m2ts"),
)

# timm ignores parts that it does not know ("rand-mx", "rand-tnone"): a typing error would pass as a setting.
_RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|n\d+|p\d+(\.\d+)?|mstd\d+(\.\d+)?|mmax\d+|inc[01]|tweights|t3aw?))*", flags=re.ASCII
)


@dataclass(frozen=True)
class AugmentationConfig:
    """Augmentation of a training clip, in this order: crop, resize, flip, RandAugment, random erasing."""

    crop: Literal["multi_scale", "random_resized", "whole"] = "multi_scale"
    """multi_scale (VideoMAE), random_resized (MAE), or whole: the full frame, resized."""
    scales: Annotated[tuple[float, ...], Bounds(above=0, most=1)] = (1.0, 0.875, 0.75, 0.66)
    """multi_scale: side of the crop over the frame's short side."""
    area: Annotated[tuple[float, float], Bounds(above=0, most=1)] = (0.5, 1.0)
    """random_resized: range of the crop's share of the frame's area."""
    aspect: Annotated[tuple[float, float], Bounds(above=0)] = (3 / 4, 4 / 3)
    """random_resized: range of the aspect ratio, width over height."""
    flip: bool = False
    """Mirror half of the clips. Leave it off where class names mention left or right."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """bilinear or bicubic."""
    rand_augment: str | None = None
    """timm's configuration string, for example rand-m7-n4-mstd0.5-inc1; none: no RandAugment."""
    reprob: Annotated[float, Bounds(least=0, most=1)] = 0.0
    """Random erasing: probability that a rectangle, the same in every frame of the clip, becomes noise."""
    on_device: bool = False
    """Resize and flip training clips on the device, with the same crops. For machines with few CPU cores. Cannot be
    combined with rand_augment or reprob."""

    def __post_init__(self) -> None:
        if self.crop not in ("multi_scale", "random_resized", "whole"):
            raise ValueError(f"augmentation.crop is {self.crop!r}; expected 'multi_scale', 'random_resized' or 'whole'")
        if not all(0 < scale <= 1 for scale in self.scales) or not self.scales:
            raise ValueError(f"augmentation.scales is {self.scales}; expected numbers above 0 and up to 1")
        _check_order(self, "area", "aspect")
        if not 0 <= self.reprob <= 1:
            raise ValueError(f"augmentation.reprob is {self.reprob}; expected a probability, from 0 to 1")
        if self.rand_augment is not None and not _RAND_AUGMENT.fullmatch(self.rand_augment):
            raise ValueError(
                f"augmentation.rand_augment is {self.rand_augment!r}; expected rand and any of -m7 -n4 -p0.5 -mstd0.5 "
                "-mmax10 -inc1 -tweights, for example rand-m7-n4-mstd0.5-inc1"
            )
        if self.on_device and (self.rand_augment is not None or self.reprob > 0):
            raise ValueError(
                "augmentation.on_device is on, and rand_augment or reprob, which need the resized clip on the CPU; "
                "expected one or the other: turn on_device off"
            )


@dataclass(frozen=True)
class JitterConfig:
    """Pictures of detection. In training: flip, large-scale jitter, crop of a fixed size; in tests: resize."""

    size: Annotated[int, Bounds(least=1)] = 1024
    """Side of the crop in pixels, and of the longer side of a picture at scale 1."""
    scales: Annotated[tuple[float, float], Bounds(above=0)] = (0.1, 2.0)
    """Range of the scale."""
    flip: bool = True
    """Mirror half of the pictures."""
    pad: bool = True
    """Pad pictures smaller than the crop to its size with grey, in tests too; else they stay smaller."""
    test_shortest: Annotated[int, Bounds(least=1)] = 1024
    """Shorter side of a test picture in pixels, where the longer one allows."""
    test_longest: Annotated[int, Bounds(least=1)] = 1024
    """Longer side of a test picture in pixels, at most."""

    def __post_init__(self) -> None:
        check_bounds(self, "augmentation.{}")
        _check_order(self, "scales")


@dataclass(frozen=True)
class CropConfig:
    """Pictures of segmentation. In training: resize, crop, flip, distort; in tests: resize to ratio 1."""

    crop: Annotated[int, Bounds(least=1)] = 512
    """Side of the crop in pixels; smaller pictures are padded with grey, which is ignored."""
    shortest: Annotated[int, Bounds(least=1)] = 512
    """Shorter side of a picture at ratio 1, where the longer one allows."""
    longest: Annotated[int, Bounds(least=1)] = 2048
    """Longer side of a picture at ratio 1, at most."""
    ratios: Annotated[tuple[float, float], Bounds(above=0)] = (0.5, 2.0)
    """Range of the ratio in training."""
    cat_max: Annotated[float, Bounds(above=0, most=1)] = 0.75
    """Largest share of a class in a crop, which is else drawn again, at most ten times; 1: any."""
    flip: bool = True
    """Mirror half of the pictures."""
    distortion: bool = True
    """Distort brightness, contrast, saturation and hue, each of half of the pictures."""

    def __post_init__(self) -> None:
        check_bounds(self, "augmentation.{}")
        _check_order(self, "ratios")


def _check_order(augmentation: object, *names: str) -> None:
    """Raise a ValueError if a range of an augmentation begins with the larger number."""
    for name in names:
        least, most = getattr(augmentation, name)
        if least > most:
            raise ValueError(f"augmentation.{name} is {[least, most]}; expected the smaller number first")


@dataclass(frozen=True)
class ViewConfig:
    """Test views of a record: clips in time x crops in space."""

    segments: Annotated[int, Bounds(least=1)] = 1
    """Clips, spread over the length of a video."""
    crops: Annotated[int, Bounds(least=1)] = 1
    """Crops, spread along the longer side of a frame."""
    crop_pct: Annotated[float, Bounds(above=0, most=1)] = 1.0
    """Side of a crop over that of the largest one; 0.875 is resizing to 256 and cropping 224."""

    def __post_init__(self) -> None:
        if self.segments < 1 or self.crops < 1:
            raise ValueError(f"segments is {self.segments} and crops {self.crops}; expected 1 or more")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}; expected more than 0 and up to 1")

    @property
    def count(self) -> int:
        """Views of one record."""
        return self.segments * self.crops


@dataclass(frozen=True)
class MixingConfig:
    """Mixup, cutmix and label smoothing."""

    mixup: Annotated[float, Bounds(least=0)] = 0.8
    """Alpha of mixup's beta distribution; 0: no mixup."""
    cutmix: Annotated[float, Bounds(least=0)] = 1.0
    """Alpha of cutmix's beta distribution; 0: no cutmix."""
    probability: Annotated[float, Bounds(least=0, most=1)] = 1.0
    """Share of the batches that are mixed."""
    switch: Annotated[float, Bounds(least=0, most=1)] = 0.5
    """Share of the mixed batches that use cutmix, where both are on."""
    smoothing: Annotated[float, Bounds(least=0, most=1)] = 0.1
    """Label smoothing: share of a label that is spread evenly over all classes."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"mixing.{name} is {value}; expected a number above 0, or 0 for none")
        for name in ("probability", "switch", "smoothing"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"mixing.{name} is {value}; expected a share, from 0 to 1")

    @property
    def mixes(self) -> bool:
        """True if clips are mixed; otherwise labels are smoothed at most."""
        return self.probability > 0 and (self.mixup > 0 or self.cutmix > 0)
