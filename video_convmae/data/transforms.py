"""Crops, flips, RandAugment, erasing: one draw for every frame of a clip.

A draw is data (`ClipTransform`), made from the frame size and a generator; `apply` does the work on uint8 frames.
Nothing is converted to float here: the batch crosses to the device as bytes and is normalised there.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from .ragged import RaggedCrops

# Erased pixels become normal noise in normalised space; clips are bytes here, so the noise is shaped to ImageNet's.
_MEAN = 255 * torch.tensor([0.485, 0.456, 0.406])
_STD = 255 * torch.tensor([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class ClipTransform:
    """What is done to each frame of a clip: a window in pixels, and what becomes of it. The window alone by default.

    flip: it is mirrored.
    rand_augment: seed of RandAugment's operations; None: none.
    erasing: seed of the erased rectangle and its noise; None: nothing is erased.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    rand_augment: int | None = None
    erasing: int | None = None


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training clip, in this order: crop, resize, flip, RandAugment, erasing.

    VideoMAE has RandAugment work on whole frames, before the crop. Here it works on what the crop leaves, which takes a
    third of the time (224 x 224 pixels of 320 x 426).
    """

    crop: Literal["multi_scale", "random_resized", "whole"] = "multi_scale"
    """multi_scale (VideoMAE), random_resized (MAE), or whole: the frame as it is, resized."""
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """multi_scale: side of the window over the frame's short side."""
    area: tuple[float, float] = (0.5, 1.0)
    """random_resized: share of the frame's area."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """random_resized: width over height."""
    flip: bool = False
    """Mirror half of the clips. Never where a label names left or right."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """bilinear or bicubic."""
    rand_augment: str | None = None
    """timm's configuration string, such as rand-m7-n4-mstd0.5-inc1; none: no RandAugment."""
    reprob: float = 0.0
    """Share of the clips in which a rectangle, the same in every frame, becomes noise."""
    on_device: bool = False
    """Resize and flip training clips on the device, where they are normalised; the crops are the same. For CPUs that
    are short. Not with rand_augment or reprob."""

    def __post_init__(self) -> None:
        if self.crop not in ("multi_scale", "random_resized", "whole"):
            raise ValueError(f"augmentation.crop is {self.crop!r}; expected 'multi_scale', 'random_resized' or 'whole'")
        if not all(0 < scale <= 1 for scale in self.scales) or not self.scales:
            raise ValueError(f"augmentation.scales is {self.scales}; expected numbers above 0 and up to 1")
        if not 0 <= self.reprob <= 1:
            raise ValueError(f"augmentation.reprob is {self.reprob}; expected a share of the clips, from 0 to 1")
        if self.rand_augment is not None:
            _check_rand_augment(self.rand_augment)
        if self.on_device and (self.rand_augment is not None or self.reprob > 0):
            raise ValueError(
                "augmentation.on_device is on, and rand_augment or reprob, which need the resized clip on the CPU; "
                "expected one or the other: turn on_device off"
            )

    def draw(self, height: int, width: int, generator: torch.Generator | None = None) -> ClipTransform:
        """What to do to a clip whose frames have that size. What is switched off draws nothing."""
        if self.crop == "multi_scale":
            window = multi_scale_crop(height, width, self.scales, generator)
        elif self.crop == "random_resized":
            window = random_resized_crop(height, width, self.area, self.aspect, generator)
        else:
            window = 0, 0, height, width
        flip = self.flip and bool(torch.rand((), generator=generator) < 0.5)
        operations = None if self.rand_augment is None else _seed(generator)
        erase = self.reprob > 0 and bool(torch.rand((), generator=generator) < self.reprob)
        return ClipTransform(*window, flip=flip, rand_augment=operations, erasing=_seed(generator) if erase else None)

    def apply(
        self, frames: np.ndarray, crop: ClipTransform, size: tuple[int, int], places: np.ndarray | None = None
    ) -> Tensor:
        """RGB frames `(F, H, W, 3)` uint8 -> clip `(3, T, *size)` uint8 of those at `places` `(T,)`; None: of all.

        A crop that holds no seeds (a test window) is only cut out, flipped and resized.
        """
        # Channels-last bytes are what torchvision's fast resize wants: 2-3 ms for 16 frames of 340x256 to 224.
        clip = torch.from_numpy(_window(frames, crop, places)).permute(0, 3, 1, 2)
        clip = tvf.resize(clip, list(size), InterpolationMode(self.interpolation), antialias=True)
        if crop.flip:
            clip = clip.flip(-1)
        if self.rand_augment is not None and crop.rand_augment is not None:
            clip = rand_augment(clip, self.rand_augment, crop.rand_augment)
        if crop.erasing is not None:
            clip = erase_rectangle(clip, crop.erasing)
        return _by_channel(clip)


def cut(
    frames: np.ndarray, crop: ClipTransform, size: tuple[int, int], interpolation: str, places: np.ndarray | None = None
) -> RaggedCrops:
    """What a crop leaves of RGB frames `(F, H, W, 3)` uint8 at `places`, for a device to resize and to flip."""
    window = _window(frames, crop, places)
    pixels = torch.from_numpy(window).view(-1)
    return RaggedCrops(pixels, (window.shape[:3],), (crop.flip,), size, interpolation)


def _window(frames: np.ndarray, crop: ClipTransform, places: np.ndarray | None) -> np.ndarray:
    """The window of the frames at `places`, contiguous; no more than it is copied."""
    window = frames[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    return np.ascontiguousarray(window if places is None else window[places])


def _by_channel(clip: Tensor) -> Tensor:
    """`(T, 3, H, W)` uint8 -> `(3, T, H, W)`, contiguous. NumPy takes 0.8 ms for it, torch 1.4."""
    pixels = clip.permute(1, 0, 2, 3).numpy()
    result = np.empty(pixels.shape, dtype=np.uint8)
    for channel, values in zip(result, pixels):
        channel[...] = values
    return torch.from_numpy(result)


def multi_scale_crop(
    height: int, width: int, scales: tuple[float, ...], generator: torch.Generator | None = None
) -> tuple[int, int, int, int]:
    """VideoMAE's multi-scale crop: (top, left, height, width).

    Height and width are scales of the short side that lie next to each other in the list at most; the window sits at
    one of 13 places: corners, edge centres, the centre, and the quarter points between them.
    """
    short = min(height, width)
    pairs = [(i, j) for i in range(len(scales)) for j in range(len(scales)) if abs(i - j) <= 1]
    i, j = pairs[_pick(len(pairs), generator)]
    crop_height, crop_width = max(1, int(short * scales[i])), max(1, int(short * scales[j]))
    places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(y, x) for y in (1, 3) for x in (1, 3)]
    y, x = places[_pick(len(places), generator)]
    return y * ((height - crop_height) // 4), x * ((width - crop_width) // 4), crop_height, crop_width


def random_resized_crop(
    height: int,
    width: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator | None = None,
) -> tuple[int, int, int, int]:
    """Inception's crop: (top, left, height, width) of a random area and aspect ratio.

    After ten draws that do not fit, the largest centred window whose aspect ratio is allowed.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        share, position = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        pixels = height * width * (area[0] + share * (area[1] - area[0]))
        ratio = math.exp(low + position * (high - low))
        crop_height, crop_width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = _pick(height - crop_height + 1, generator)
            left = _pick(width - crop_width + 1, generator)
            return top, left, crop_height, crop_width
    crop_height, crop_width = min(height, round(width / aspect[0])), min(width, round(height * aspect[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def rand_augment(clip: Tensor, policy: str, seed: int) -> Tensor:
    """timm's RandAugment, the same operations with the same strength on every frame.

    Args:
        clip: `(T, 3, H, W)` uint8.
        policy: timm's configuration string.
        seed: of the operations, below 2**32.
    """
    transform = _rand_augment(policy, tuple(clip.shape[-2:]))
    frames = []
    with kept_random_state():
        for frame in clip.permute(0, 2, 3, 1).contiguous().numpy():
            # timm draws from both while it works on a frame.
            random.seed(seed)
            np.random.seed(seed)
            frames.append(np.asarray(transform(Image.fromarray(frame))))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Python's and NumPy's global generators go on afterwards as if nothing had been drawn within."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@lru_cache(maxsize=8)
def _rand_augment(policy: str, size: tuple[int, int]) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform  # here, for workers that do without start sooner

    settings = {
        "translate_const": int(0.45 * min(size)),
        "img_mean": tuple(_MEAN.round().int().tolist()),  # what a shear or a turn uncovers
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform = rand_augment_transform(policy, settings)
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    # At full magnitude (m9 with mstd0.5 gets there) timm would keep 0 bits: black frames, and an error in Pillow 13.
    return ImageOps.posterize(image, max(1, bits))


# timm passes over parts that it does not know ("rand-mx", "rand-tnone"), so that a slip would look like a setting.
_RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|n\d+|p\d+(\.\d+)?|mstd\d+(\.\d+)?|mmax\d+|inc[01]|tweights|t3aw?))*", flags=re.ASCII
)


def _check_rand_augment(policy: str) -> None:
    """Raises ValueError where timm would misread the policy or could not follow it."""
    name, example = f"augmentation.rand_augment is {policy!r}", "for example rand-m7-n4-mstd0.5-inc1"
    if not _RAND_AUGMENT.fullmatch(policy):
        raise ValueError(f"{name}; expected rand and any of -m7 -n4 -p0.5 -mstd0.5 -mmax10 -inc1 -tweights, {example}")
    try:
        rand_augment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), policy, 0)
    except ValueError as error:  # a weighted set has fewer operations than n asks for
        raise ValueError(f"{name}, which timm cannot follow ({error}); give another, {example}") from error


def erase_rectangle(clip: Tensor, seed: int) -> Tensor:
    """Random erasing: a rectangle, the same in every frame, becomes noise, different in every pixel of every frame.

    The noise is standard normal in space that ImageNet's mean and deviation normalise: as bytes, mean + deviation x
    noise, rounded and cut to 0 .. 255.

    Args:
        clip: `(T, 3, H, W)` uint8; it is not changed.
        seed: of the rectangle and the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    top, left, height, width = erasing_window(*clip.shape[-2:], generator)
    noise = torch.randn(len(clip), height, width, 3, generator=generator)
    pixels = (_MEAN + _STD * noise).round_().clamp_(0, 255).to(torch.uint8)
    erased = clip.clone()
    erased[:, :, top : top + height, left : left + width] = pixels.permute(0, 3, 1, 2)
    return erased


def erasing_window(height: int, width: int, generator: torch.Generator | None = None) -> tuple[int, int, int, int]:
    """A rectangle of 2% to a third of the area, 0.3 to 1/0.3 as high as wide: (top, left, height, width).

    Smaller than the frame both ways; after ten draws that are not, an empty one.
    """
    spread = -math.log(0.3)
    for _ in range(10):
        share, shape = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        pixels = height * width * (0.02 + share * (1 / 3 - 0.02))
        ratio = math.exp((2 * shape - 1) * spread)
        high, wide = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < high < height and 0 < wide < width:
            return _pick(height - high + 1, generator), _pick(width - wide + 1, generator), high, wide
    return 0, 0, 0, 0


def _pick(count: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(count, (), generator=generator))


def _seed(generator: torch.Generator | None) -> int:
    return _pick(2**32, generator)  # NumPy takes no larger one


def view_crops(
    height: int, width: int, size: tuple[int, int], count: int, crop_pct: float = 1.0
) -> list[ClipTransform]:
    """Test windows of the shape of `size`, spread evenly along the side that has more to spare; one lies in the middle.

    Three windows on a wide frame are left, centre, right. Resized by `Augmentation.apply`, a window shows what resizing
    the short side and cropping would.

    Args:
        height, width: of the frame.
        size: (height, width) of the clip.
        count: windows.
        crop_pct: side of a window over that of the largest; 0.875 is 224 pixels of a short side of 256.

    Raises:
        ValueError: `crop_pct` is not above 0 and up to 1.
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct}; expected a number above 0 and up to 1")
    scale = crop_pct * min(height / size[0], width / size[1])
    window_height, window_width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    spare_height, spare_width = height - window_height, width - window_width
    crops = []
    for place in [0.5] if count == 1 else [i / (count - 1) for i in range(count)]:
        down, across = (place, 0.5) if spare_height > spare_width else (0.5, place)
        crops.append(
            ClipTransform(round(down * spare_height), round(across * spare_width), window_height, window_width)
        )
    return crops
