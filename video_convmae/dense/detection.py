"""Mask R-CNN on a backbone's pyramid: torchvision's parts, with what detectron2's recipes have and these lack.

Written here: pooling of regions by aligned bilinear sampling; plain L1 losses of boxes (detectron2's smooth L1 has beta
0 by default, in the proposal network and in the box head; torchvision's has 1/9 in both); losses as sums and counts, so
that they are the same on any number of processes; and a choice of anchors and proposals that depends on the picture
alone, not on those beside it.

Letters: B pictures, K objects of one picture, R regions of all pictures, C classes without the background.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .backbone import Backbone
from .options import DetectorConfig, HeadNorm

Sizes = Sequence[tuple[int, int]]  # (height, width) of each picture, without its padding
Losses = dict[str, Tensor]

ANCHORS = (32, 64, 128, 256, 512)  # side of a square anchor on each level, finest first
MASK_SIDE = 28  # pixels of a predicted mask


class Detections(NamedTuple):
    """What is found on one picture, best first.

    boxes: `(K, 4)` x1 y1 x2 y2, in pixels of the model's input.
    labels: `(K,)`, from 1.
    scores: `(K,)`.
    masks: `(K, 28, 28)` probabilities over the box (`paste_masks` puts them on a picture); None: boxes alone.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None


class RegionNorm(nn.BatchNorm2d):
    """BatchNorm over regions, of which there may be none."""

    def forward(self, input: Tensor) -> Tensor:
        """`(R, C, H, W)` -> the same shape."""
        if input.numel():
            return super().forward(input)
        return input * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)  # gradients of zero, not none


NORMS: dict[HeadNorm, Callable[..., nn.Module]] = {
    "batch": RegionNorm,  # over all processes: engine/parallel.py
    "channel": LayerNorm2d,
}


class Detector(nn.Module):
    """Mask R-CNN.

    The proposal network has two convolutions, the box head four and a linear layer, the mask head four and a
    transposed one (Li et al., Benchmarking Detection Transfer Learning with Vision Transformers, 2021).

    Args:
        config: backbone and heads.
        num_classes: C, without the background.

    OF_CLASSES: prefixes of the parameters that belong to single classes.
    """

    OF_CLASSES = ("heads.box_predictor.", "heads.mask_predictor.mask_fcn_logits.")

    def __init__(self, config: DetectorConfig, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.backbone = Backbone(config)
        norm, width = NORMS[config.head_norm], config.pyramid_width
        self.neck: nn.Module = CoarsestLevel()
        if config.pyramid != "simple":
            self.neck = FeaturePyramidNetwork(list(self.backbone.channels), width, LastLevelMaxPool(), norm)
        self.rpn = ProposalNetwork(width)
        self.heads = RegionHeads(width, num_classes, norm, config.proposals, config.masks)

    def forward(
        self,
        images: Tensor,
        sizes: Sizes,
        targets: Sequence[dict[str, Any]] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Losses, Losses] | list[Detections]:
        """Return the losses of a training batch, or what is found on pictures.

        Args:
            images: `(B, 3, H, W)` normalised, padded to one size.
            sizes: of the pictures, without padding.
            targets: in training, as torchvision takes them; one without `masks` takes no part in the mask loss.
            seeds: in training, one a picture: its anchors and proposals are drawn with it.

        Returns:
            In training each loss as a sum over what it counts, and that count; else detections.
        """
        features = self.neck(OrderedDict(enumerate(self.backbone(images))))
        pictures = ImageList(images, list(sizes))
        if not self.training:
            proposals, _ = self.rpn(pictures, features)
            return self.heads.detect(list(features.values())[:4], proposals, sizes)
        assert targets is not None
        assert seeds is not None
        generators = [torch.Generator(images.device).manual_seed(seed) for seed in seeds]
        self.rpn.fg_bg_sampler.generators = self.heads.fg_bg_sampler.generators = generators
        proposals, sums = self.rpn(pictures, features, targets)
        anchors = images.new_tensor(self.rpn.fg_bg_sampler.batch_size_per_image * len(images))
        head_sums, counts = self.heads.losses(list(features.values())[:4], proposals, targets)
        return sums | head_sums, dict.fromkeys(sums, anchors) | counts

    def layer_scales(self, decay: float) -> dict[str, float]:
        """Return every parameter's learning-rate scale: of blocks as `Backbone.layer_scales` says, of others 1.

        The released recipe gives positions the scale 1, not that of the first layer.
        """
        scales = {f"backbone.{n}": scale for n, scale in self.backbone.layer_scales(decay).items()}
        scales["backbone.positions"] = 1.0
        return {name: scales.get(name, 1.0) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of norms, positions and tables of relative positions; biases decay, as in detectron2."""
        norms = {
            f"{module_name}.{name}"
            for module_name, module in self.named_modules()
            if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm))
            for name, _ in module.named_parameters(recurse=False)
        }
        tables = {name for name, _ in self.named_parameters() if name.endswith("positions")}
        return norms | tables


class CoarsestLevel(nn.Module):
    """Adds a level of half the resolution to a simple pyramid: every second pixel of its coarsest one."""

    def forward(self, features: OrderedDict[Any, Tensor]) -> OrderedDict[Any, Tensor]:
        """Return the maps and one more."""
        features["pool"] = next(reversed(features.values()))[..., ::2, ::2]
        return features


# Regions


class SeededSampler:
    """Draws positive and negative examples of each picture with a generator of its own.

    Attributes:
        generators: of the pictures, on their device; set before a forward pass.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        self.batch_size_per_image, self.positive_fraction = batch_size_per_image, positive_fraction
        self.generators: list[torch.Generator] = []

    def __call__(self, labels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return boolean masks of the chosen positive (label above 0) and negative (0) examples, a pair a picture."""
        positives, negatives = [], []
        for each, generator in zip(labels, self.generators, strict=True):
            most = int(self.batch_size_per_image * self.positive_fraction)
            positives.append(_choose(each >= 1, most, generator))
            negatives.append(_choose(each == 0, self.batch_size_per_image - int(positives[-1].sum()), generator))
        return positives, negatives


def _choose(candidates: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return a mask of at most so many of the candidates."""
    places = torch.where(candidates)[0]
    order = torch.randperm(len(places), generator=generator, device=places.device)
    chosen = torch.zeros_like(candidates)
    chosen[places[order[:most]]] = True
    return chosen


class RegionPooling(nn.Module):
    """Samples the features of regions, each from the level that fits its size (Lin et al., 2017), aligned.

    A region's edges are continuous coordinates, so that pixel 0 has its centre at 0.5 (detectron2's ROIAlignV2).

    Args:
        side: of the result in cells.
        strides: of the levels, finest first, each twice the one before.
    """

    def __init__(self, side: int, strides: tuple[int, ...] = (4, 8, 16, 32)) -> None:
        super().__init__()
        self.side, self.strides = side, strides

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Maps `(B, c, h, w)` and boxes `(K, 4)` of each picture -> `(R, c, side, side)` float32."""
        regions = numbered(boxes)
        levels = level_of(regions[:, 1:], len(self.strides))
        pooled = features[0].new_zeros(len(regions), features[0].shape[1], self.side, self.side, dtype=torch.float32)
        for level, (feature, stride) in enumerate(zip(features, self.strides)):
            places = torch.where(levels == level)[0]
            # Also without a region: every map is part of the graph on every process.
            sampled = roi_align(feature.float(), regions[places], self.side, 1 / stride, aligned=True)
            pooled = pooled.index_put((places,), sampled.float())
        return pooled


def numbered(boxes: Sequence[Tensor]) -> Tensor:
    """Return boxes `(K, 4)` of each picture as `(R, 5)`: place of the picture in the batch, x1, y1, x2, y2."""
    return torch.cat([F.pad(each, (1, 0), value=place) for place, each in enumerate(boxes)])


def level_of(boxes: Tensor, levels: int) -> Tensor:
    """Return the level of boxes `(R, 4)`, 0 the finest: a box of 224 x 224 pixels belongs to the third."""
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    return (2 + torch.log2(sides / 224 + 1e-8)).floor().clamp(0, levels - 1).long()


class ProposalHead(RPNHead):
    """A proposal head whose outputs are float32: bfloat16 has no pixel of a coordinate of 1,000."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return objectness and box deltas of each level."""
        logits, deltas = super().forward(x)
        return [each.float() for each in logits], [each.float() for each in deltas]


class Anchors(AnchorGenerator):
    """torchvision's anchors, always float32: it gives them the type of the maps, and bfloat16 is off by 4 pixels."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each picture, `(A, 4)`."""
        return super().forward(image_list, [each.new_empty(each.shape, dtype=torch.float32) for each in feature_maps])


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, with detectron2's settings; its losses are sums."""

    fg_bg_sampler: SeededSampler

    def __init__(self, channels: int) -> None:
        anchors = Anchors(tuple((size,) for size in ANCHORS), ((0.5, 1.0, 2.0),) * len(ANCHORS))
        super().__init__(
            anchors,
            ProposalHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.fg_bg_sampler = SeededSampler(256, 0.5)

    def forward(
        self, images: ImageList, features: dict[Any, Tensor], targets: Sequence[dict[str, Any]] | None = None
    ) -> tuple[list[Tensor], Losses]:
        """Return the proposals of each picture and, in training, the sums of the losses."""
        proposals, losses = super().forward(images, features, None if targets is None else list(targets))
        names = {"loss_objectness": "objectness", "loss_rpn_box_reg": "proposal_box"}
        return proposals, {names[name]: loss for name, loss in losses.items()}

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the sums over the drawn anchors: of the cross-entropy, and of the L1 distance of positive ones."""
        chosen = self.fg_bg_sampler(labels)
        positives, negatives = (torch.where(torch.cat(masks))[0] for masks in chosen)
        drawn = torch.cat([positives, negatives])
        wanted = torch.cat(regression_targets)[positives]
        box = F.l1_loss(pred_bbox_deltas[positives], wanted, reduction="sum")
        logits, target = objectness.flatten()[drawn], torch.cat(labels)[drawn]
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum"), box


class RegionHeads(RoIHeads):
    """torchvision's heads of boxes and masks, with aligned pooling, norms and sums of L1 losses.

    Args:
        channels: of the levels and the heads.
        num_classes: C.
        norm: of the convolutions.
        proposals: drawn of each training picture.
        masks: predict masks.
    """

    fg_bg_sampler: SeededSampler

    def __init__(
        self, channels: int, num_classes: int, norm: Callable[..., nn.Module], proposals: int, masks: bool
    ) -> None:
        super().__init__(
            RegionPooling(7),
            FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [4 * channels], norm),
            FastRCNNPredictor(4 * channels, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=proposals,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=RegionPooling(14) if masks else None,
            mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm) if masks else None,
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes) if masks else None,
        )
        self.fg_bg_sampler = SeededSampler(proposals, 0.25)
        self._init_as_detectron2()

    def _init_as_detectron2(self) -> None:
        """Initialise the linear layers and the last layers, which torchvision leaves at PyTorch's defaults."""
        for layer in self.box_head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)
        last = [(self.box_predictor.cls_score, 0.01), (self.box_predictor.bbox_pred, 0.001)]
        if self.has_mask():
            last.append((self.mask_predictor.mask_fcn_logits, 0.001))
        for layer, deviation in last:
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def check_targets(self, targets: Any) -> None:
        """Take targets without masks too."""

    def losses(
        self, features: Sequence[Tensor], proposals: list[Tensor], targets: Sequence[dict[str, Any]]
    ) -> tuple[Losses, Losses]:
        """Return the sums of the losses over what they count, and the counts: proposals drawn, objects with a mask.

        Args:
            features: of the levels that regions are sampled from.
            proposals: of each picture.
            targets: of each picture.
        """
        proposals, matched, labels, deltas = self.select_training_samples(list(proposals), list(targets))
        logits, predicted = self._predict_boxes(features, proposals)
        wanted = torch.cat(labels)
        positives = torch.where(wanted > 0)[0]
        of_class = predicted.view(len(predicted), -1, 4)[positives, wanted[positives]]
        sums = {
            "class": F.cross_entropy(logits, wanted, reduction="sum"),
            "box": F.l1_loss(of_class, torch.cat(deltas)[positives], reduction="sum"),
        }
        counts = dict.fromkeys(sums, logits.new_tensor(len(wanted)))
        if self.has_mask():
            sums["mask"], counts["mask"] = self._mask_loss(features, proposals, matched, labels, targets)
        return sums, counts

    def detect(self, features: Sequence[Tensor], proposals: list[Tensor], sizes: Sizes) -> list[Detections]:
        """Return what is found on each picture."""
        logits, deltas = self._predict_boxes(features, proposals)
        found = self.postprocess_detections(logits, deltas, proposals, list(sizes))
        boxes, scores, labels = found
        if not self.has_mask():
            return [Detections(*each, None) for each in zip(boxes, labels, scores)]
        masks = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()
        every = torch.cat(labels)
        chosen = masks[torch.arange(len(every), device=every.device), every - 1].sigmoid()
        split = chosen.split([len(each) for each in labels])
        return [Detections(*each) for each in zip(boxes, labels, scores, split)]

    def _predict_boxes(self, features: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes)))
        return logits.float(), deltas.float()

    def _mask_loss(
        self,
        features: Sequence[Tensor],
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: Sequence[dict[str, Any]],
    ) -> tuple[Tensor, Tensor]:
        """Return the sum over positive proposals of the mean cross-entropy of a mask's pixels, and their number."""
        places = [
            torch.where(label > 0)[0] if "masks" in target else label.new_zeros(0)
            for label, target in zip(labels, targets)
        ]
        boxes = [each[place] for each, place in zip(proposals, places)]
        wanted = torch.cat(
            [
                crop_masks(target["masks"][match[place]], box) if len(place) else box.new_zeros(0, MASK_SIDE, MASK_SIDE)
                for target, match, place, box in zip(targets, matched, places, boxes)
            ]
        )
        classes = torch.cat([label[place] for label, place in zip(labels, places)])
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()
        of_class = logits[torch.arange(len(classes), device=classes.device), classes - 1]
        loss = F.binary_cross_entropy_with_logits(of_class, wanted, reduction="sum") / MASK_SIDE**2
        return loss, logits.new_tensor(len(classes))


# Masks


def crop_masks(masks: Tensor, boxes: Tensor, side: int = MASK_SIDE) -> Tensor:
    """Return the part of each mask that a box shows, as 0 and 1: `(K, H, W)`, `(K, 4)` -> `(K, side, side)` float32."""
    regions = numbered(list(boxes[:, None]))  # each its own picture
    sampled = roi_align(masks[:, None].float(), regions, side, 1.0, aligned=True)[:, 0]
    return (sampled >= 0.5).float()


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> list[Tensor]:
    """Put masks on a picture: `(K, m, m)` over the boxes `(K, 4)` -> K boolean masks `(H, W)`, on the CPU.

    A pixel is inside where the mask, read bilinearly at the pixel's centre, reaches the threshold.
    """
    height, width = size
    pasted = []
    for mask, box in zip(masks.float().cpu(), boxes.float().cpu()):
        left, top, right, bottom = box.tolist()
        whole = torch.zeros(height, width, dtype=torch.bool)
        columns = torch.arange(max(0, int(left)), min(width, int(right) + 1)) + 0.5
        rows = torch.arange(max(0, int(top)), min(height, int(bottom) + 1)) + 0.5
        if len(columns) and len(rows) and right > left and bottom > top:
            x = 2 * (columns - left) / (right - left) - 1
            y = 2 * (rows - top) / (bottom - top) - 1
            grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
            values = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
            first_row, first_column = int(rows[0]), int(columns[0])
            whole[first_row : first_row + len(rows), first_column : first_column + len(columns)] = values >= threshold
        pasted.append(whole)
    return pasted
