"""Named sizes: numbers only."""

from __future__ import annotations

from dataclasses import dataclass


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
    """The numbers of a size. Raises ValueError with the choices."""
    if name not in SIZES:
        raise ValueError(f"size is {name!r}; expected one of {', '.join(SIZES)}")
    return SIZES[name]
