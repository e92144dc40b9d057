"""Clip transforms: crop, resize, flip, RandAugment, random erasing, the same for every frame of a clip.

A drawn transform is data (`ClipTransform`), made from the frame size and a generator; `Augmentation.apply` carries it
out on uint8 frames. Nothing is converted to float here: a batch crosses to the device as bytes and is normalised there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from .options import AugmentationConfig
from .ragged import RaggedCrops

# timm erases with standard normal noise in normalised space. Clips are bytes here, so the noise gets ImageNet's mean
# and deviation.
_MEAN = 255 * torch.tensor([0.485, 0.456, 0.406])
_STD = 255 * torch.tensor([0.229, 0.224, 0.225])
_SEEDS = 2**32  # NumPy takes smaller seeds only


@dataclass(frozen=True)
class ClipTransform:
    """A drawn transform of a clip: a crop in pixels, and what follows it. By default only the crop.

    Args:
        top, left, height, width: the crop.
        flip: mirror every frame.
        rand_augment_seed: seed of RandAugment's operations; None: no RandAugment.
        erase_seed: seed of the erased rectangle and its noise; None: no erasing.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    rand_augment_seed: int | None = None
    erase_seed: int | None = None

    def crop(self, frames: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
        """Crop the frames at `places`, None: all: `(F, H, W, 3)` -> `(T, height, width, 3)`, contiguous."""
        crop = frames[:, self.top : self.top + self.height, self.left : self.left + self.width]
        return np.ascontiguousarray(crop if places is None else crop[places])  # copies no pixel outside the crop


@dataclass(frozen=True)
class Augmentation:
    """Draw and apply the transforms of training clips; resize test crops by the same interpolation.

    The order is crop, resize, flip, RandAugment, random erasing. VideoMAE runs RandAugment on whole frames, before the
    crop. Here it runs on the resized crop, which takes a third of the time (224 x 224 pixels in place of 320 x 426).

    Raises:
        ValueError: timm cannot follow `config.rand_augment`.
    """

    config: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        if (policy := self.config.rand_augment) is None:
            return
        try:
            rand_augment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), policy, 0)
        except ValueError as error:  # a weighted set has fewer operations than n asks for
            raise ValueError(
                f"augmentation.rand_augment is {policy!r}, which timm cannot follow ({error}); give another, for "
                "example rand-m7-n4-mstd0.5-inc1"
            ) from error

    def draw(self, height: int, width: int, generator: torch.Generator | None = None) -> ClipTransform:
        """Draw the transform of a clip with frames of that size, in pixels. A disabled part draws no number."""
        config = self.config
        if config.crop == "multi_scale":
            crop = multi_scale_crop(height, width, config.scales, generator)
        elif config.crop == "random_resized":
            crop = random_resized_crop(height, width, config.area, config.aspect, generator)
        else:
            crop = 0, 0, height, width
        flip, rand_augment_seed, erase_seed = False, None, None
        if config.flip:
            flip = bool(torch.rand((), generator=generator) < 0.5)
        if config.rand_augment is not None:
            rand_augment_seed = int(torch.randint(_SEEDS, (), generator=generator))
        if config.reprob > 0 and torch.rand((), generator=generator) < config.reprob:
            erase_seed = int(torch.randint(_SEEDS, (), generator=generator))
        return ClipTransform(*crop, flip, rand_augment_seed, erase_seed)

    def apply(
        self, frames: np.ndarray, transform: ClipTransform, size: tuple[int, int], places: np.ndarray | None = None
    ) -> Tensor:
        """Transform a clip.

        Args:
            frames: `(F, H, W, 3)` uint8, RGB.
            transform: drawn for frames of that size, or a test crop.
            size: (height, width) of the result.
            places: `(T,)` indices of the clip's frames among `frames`; None: all of them.

        Returns:
            `(3, T, *size)` uint8, contiguous.
        """
        # Channels-last bytes take torchvision's fast resize: 2-3 ms for 16 frames of 340x256 to 224.
        clip = torch.from_numpy(transform.crop(frames, places)).permute(0, 3, 1, 2)
        clip = tvf.resize(clip, list(size), InterpolationMode(self.config.interpolation), antialias=True)
        if transform.flip:
            clip = clip.flip(-1)
        if self.config.rand_augment is not None and transform.rand_augment_seed is not None:
            clip = rand_augment(clip, self.config.rand_augment, transform.rand_augment_seed)
        if transform.erase_seed is not None:
            clip = erase_rectangle(clip, transform.erase_seed)
        # NumPy takes 0.8 ms to bring the channels to the front, one by one; torch's contiguous() takes 1.4.
        pixels = clip.permute(1, 0, 2, 3).numpy()
        result = np.empty(pixels.shape, dtype=np.uint8)
        for channel, values in zip(result, pixels):
            channel[...] = values
        return torch.from_numpy(result)

    def crop_only(
        self, frames: np.ndarray, transform: ClipTransform, size: tuple[int, int], places: np.ndarray | None = None
    ) -> RaggedCrops:
        """Crop a clip and leave resizing and flipping to the device; arguments as for `apply`."""
        pixels = transform.crop(frames, places)
        flat = torch.from_numpy(pixels).view(-1)
        return RaggedCrops(flat, (pixels.shape[:3],), (transform.flip,), size, self.config.interpolation)


def multi_scale_crop(
    height: int, width: int, scales: tuple[float, ...], generator: torch.Generator | None = None
) -> tuple[int, int, int, int]:
    """Draw VideoMAE's multi-scale crop: (top, left, height, width) in pixels.

    Height and width are scales of the short side, the same one or two that are neighbours in the list. The crop sits at
    one of 13 places: corners, edge centres, the centre, and the quarter points between them.
    """
    short = min(height, width)
    pairs = [(i, j) for i in range(len(scales)) for j in range(len(scales)) if abs(i - j) <= 1]
    i, j = pairs[int(torch.randint(len(pairs), (), generator=generator))]
    crop_height, crop_width = max(1, int(short * scales[i])), max(1, int(short * scales[j]))
    places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(y, x) for y in (1, 3) for x in (1, 3)]
    y, x = places[int(torch.randint(len(places), (), generator=generator))]
    return y * ((height - crop_height) // 4), x * ((width - crop_width) // 4), crop_height, crop_width


def random_resized_crop(
    height: int,
    width: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator | None = None,
) -> tuple[int, int, int, int]:
    """Draw Inception's crop, of a random area and aspect ratio: (top, left, height, width) in pixels.

    After ten draws that do not fit, return the largest centred crop of an allowed aspect ratio.

    Args:
        height, width: of the frame.
        area: range of the share of the frame's area.
        aspect: range of width over height.
        generator: source of the numbers.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        share, position = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        pixels = height * width * (area[0] + share * (area[1] - area[0]))
        ratio = math.exp(low + position * (high - low))
        crop_height, crop_width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(torch.randint(height - crop_height + 1, (), generator=generator))
            left = int(torch.randint(width - crop_width + 1, (), generator=generator))
            return top, left, crop_height, crop_width
    crop_height, crop_width = min(height, round(width / aspect[0])), min(width, round(height * aspect[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def rand_augment(clip: Tensor, policy: str, seed: int) -> Tensor:
    """Apply timm's RandAugment, with the same operations and magnitudes for every frame.

    Args:
        clip: `(T, 3, H, W)` uint8.
        policy: timm's configuration string.
        seed: of the operations, below 2**32.

    Returns:
        `(T, 3, H, W)` uint8.

    Raises:
        ValueError: timm cannot follow the policy.
    """
    transform = _timm_rand_augment(policy, (clip.shape[-2], clip.shape[-1]))
    frames = []
    with preserve_random_state():
        for frame in clip.permute(0, 2, 3, 1).contiguous().numpy():
            # timm draws from both generators while it works on a frame.
            random.seed(seed)
            np.random.seed(seed)
            frames.append(np.asarray(transform(Image.fromarray(frame))))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the global generators of Python and NumPy on leaving."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@lru_cache(maxsize=8)
def _timm_rand_augment(policy: str, size: tuple[int, int]) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform  # here: workers start sooner without RandAugment

    settings = {
        "translate_const": int(0.45 * min(size)),
        "img_mean": tuple(_MEAN.round().int().tolist()),  # fills what a shear or a rotation uncovers
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform = rand_augment_transform(policy, settings)
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    # At full magnitude (m9 with mstd0.5 reaches it) timm would keep 0 bits: black frames, and an error in Pillow 13.
    return ImageOps.posterize(image, max(1, bits))


def erase_rectangle(clip: Tensor, seed: int) -> Tensor:
    """Apply random erasing: a rectangle, the same in every frame, becomes noise, different in every pixel and frame.

    The noise is standard normal in the space that ImageNet's mean and deviation normalise; as bytes: mean + deviation x
    noise, rounded and clamped to 0 .. 255.

    Args:
        clip: `(T, 3, H, W)` uint8; it is not changed.
        seed: of the rectangle and the noise.

    Returns:
        `(T, 3, H, W)` uint8.
    """
    generator = torch.Generator().manual_seed(seed)
    top, left, height, width = _erased_rectangle(clip.shape[-2], clip.shape[-1], generator)
    noise = torch.randn(len(clip), height, width, 3, generator=generator)
    pixels = (_MEAN + _STD * noise).round_().clamp_(0, 255).to(torch.uint8)
    erased = clip.clone()
    erased[:, :, top : top + height, left : left + width] = pixels.permute(0, 3, 1, 2)
    return erased


def _erased_rectangle(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Draw timm's rectangle: 2% to a third of the area, 0.3 to 1/0.3 times as high as wide: (top, left, height, width).

    Smaller than the frame in both directions; after ten draws that are not, an empty one.
    """
    spread = -math.log(0.3)
    for _ in range(10):
        share, shape = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        pixels = height * width * (0.02 + share * (1 / 3 - 0.02))
        ratio = math.exp((2 * shape - 1) * spread)
        high, wide = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < high < height and 0 < wide < width:
            top = int(torch.randint(height - high + 1, (), generator=generator))
            left = int(torch.randint(width - wide + 1, (), generator=generator))
            return top, left, high, wide
    return 0, 0, 0, 0


def view_crops(
    height: int, width: int, size: tuple[int, int], count: int, crop_pct: float = 1.0
) -> list[ClipTransform]:
    """Spread test crops of the shape of `size` evenly along the side with more to spare; a single one is centred.

    Three crops of a wide frame are left, centre, right. Resized by `Augmentation.apply`, a crop equals resizing the
    short side and cropping.

    Args:
        height, width: of the frame.
        size: (height, width) of the clip.
        count: crops.
        crop_pct: side of a crop over that of the largest; 0.875 is 224 pixels of a short side of 256.

    Raises:
        ValueError: `crop_pct` is not above 0 and up to 1.
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct}; expected a number above 0 and up to 1")
    scale = crop_pct * min(height / size[0], width / size[1])
    crop_height, crop_width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    spare_height, spare_width = height - crop_height, width - crop_width
    crops = []
    for place in [0.5] if count == 1 else [i / (count - 1) for i in range(count)]:
        down, across = (place, 0.5) if spare_height > spare_width else (0.5, place)
        crops.append(ClipTransform(round(down * spare_height), round(across * spare_width), crop_height, crop_width))
    return crops
