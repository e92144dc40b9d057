"""Options of the models for dense tasks, without torch. They are the fields `--model.*` of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Annotated, Literal, get_args

from video_convmae.bounds import Bounds
from video_convmae.models.sizes import EncoderConfig

RelativePositions = Literal["none", "shared", "decomposed", "block"]
HeadNorm = Literal["batch", "channel"]
Pyramid = Literal["none", "max_pool", "simple", "convolution"]


@dataclass(frozen=True)
class BackboneConfig(EncoderConfig):
    """Options of a backbone: an image encoder for pictures of any size.

    Recipes (docs: DETECTION.md, SEGMENTATION.md): DET has window 16, global blocks 0, 3, 6, 10, shared relative
    positions and max_pool; ViTDet style window 14, global blocks 1, 4, 7, 10, decomposed and simple; SEG block and
    convolution, layer_scale 1.

    Raises:
        ValueError: see EncoderConfig; frames, a block or relative positions that do not exist.
    """

    num_frames: Annotated[int, Bounds(least=1, most=1)] = 1
    """A backbone is of images: 1."""
    image_size: Annotated[int | tuple[int, int], Bounds(least=0)] = 224
    """Pixels, one number or height and width, whose grid the table of positions has; it is resized to each picture."""
    relative_size: Annotated[int, Bounds(least=0)] = 0
    """Pixels along the side of the pictures that relative positions of the whole image are made for. A smaller one
    reads the middle of the tables, for a larger one they are resized. 0: the longer side of image_size."""
    window: Annotated[int, Bounds(least=0)] = 0
    """Tokens along the side of an attention window; 0: every block attends to the whole image."""
    global_blocks: Annotated[tuple[int, ...], Bounds(least=0)] = ()
    """Attention blocks, from 0, that attend to the whole image where the others have windows."""
    relative_positions: RelativePositions = "none"
    """Bias of attention: shared, two tables over (rows, columns), one of all windows and one of all global blocks
    (ConvMAE's detector); block, a table in each block (its segmenter); decomposed, products of the query with vectors
    of the row and of the column (ViTDet); none."""
    layer_scale: Annotated[float, Bounds(least=0)] = 0.0
    """Initial factor of each channel of a residual branch of attention blocks, learnt; 0: no factors."""
    pyramid: Pyramid = "none"
    """Levels: none, the stages' outputs; max_pool or convolution, a coarser one beside them; simple, four levels from
    the last output alone (ViTDet)."""
    pyramid_width: Annotated[int, Bounds(least=1)] = 256
    """Channels of the levels of a simple pyramid."""

    def __post_init__(self) -> None:
        self._resolve(learnable_positions=True)
        super().__post_init__()
        height, width = self.clip_shape[2:]
        self._resolve(relative_size=max(height, width))
        for name, choices in (("relative_positions", RelativePositions), ("pyramid", Pyramid)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(choices))}")
        if self.num_frames != 1:
            raise ValueError(f"num_frames is {self.num_frames}; expected 1: a backbone is of images")
        if self.global_blocks and not self.window:
            raise ValueError(f"global_blocks is {self.global_blocks} without windows; expected window above 0")
        if any(not 0 <= block < self.depths[-1] for block in self.global_blocks):
            raise ValueError(f"global_blocks is {self.global_blocks}; expected blocks 0 to {self.depths[-1] - 1}")
        if self.relative_size % self.patch:
            raise ValueError(f"relative_size is {self.relative_size}; expected a multiple of the stride {self.patch}")

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Pixels along a cell's side of each stage: 4, 8, 16."""
        return tuple(accumulate(self.strides, mul))

    def window_of(self, block: int) -> int:
        """Return the side of an attention block's windows in tokens; 0: it attends to the whole image."""
        return 0 if block in self.global_blocks else self.window


@dataclass(frozen=True)
class DetectorConfig(BackboneConfig):
    """Options of Mask R-CNN. A simple pyramid is read as it is; other pyramids go through a feature pyramid network.

    Raises:
        ValueError: see BackboneConfig; a pyramid without the four levels that the heads read.
    """

    pyramid: Pyramid = "max_pool"
    """Levels: max_pool, the stages' outputs and a coarser one (DET), or simple, four levels from the last output alone
    (ViTDet)."""
    head_norm: HeadNorm = "batch"
    """Norm of the feature pyramid network and the heads: batch, over all processes (DET), or channel, a LayerNorm
    (ViTDet)."""
    proposals: Annotated[int, Bounds(least=4)] = 512
    """Proposals of a training picture that the box head learns from; a quarter of them also teach masks."""
    masks: bool = True
    """Predict masks; off for data with boxes alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pyramid not in ("max_pool", "simple") or self.stage_strides[-1] != 16:
            raise ValueError(
                f"pyramid is {self.pyramid} and a token covers {self.stage_strides[-1]} pixels; expected max_pool or "
                "simple, and 16: the heads read levels of strides 4 to 32"
            )
        if self.head_norm not in get_args(HeadNorm):
            raise ValueError(f"head_norm is {self.head_norm!r}; expected batch or channel")


@dataclass(frozen=True)
class SegmenterConfig(BackboneConfig):
    """Options of a segmenter: a backbone with UperNet. Defaults of the heads are those of ConvMAE's recipe."""

    head_width: Annotated[int, Bounds(least=1)] = 768
    """Channels of UperNet."""
    pools: Annotated[tuple[int, ...], Bounds(least=1)] = (1, 2, 3, 6)
    """Sides of the grids that UperNet pools the last level to."""
    head_dropout: Annotated[float, Bounds(least=0, below=1)] = 0.1
    """Dropout rate of whole channels before the classifiers."""
    auxiliary_width: Annotated[int, Bounds(least=1)] = 256
    """Channels of the auxiliary head."""
    auxiliary_weight: Annotated[float, Bounds(least=0)] = 0.4
    """Weight of its loss."""
