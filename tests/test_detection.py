"""Mask R-CNN: pooling, losses and masks are what they claim to be, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from video_convmae.dense.detection import (
    Detections,
    Detector,
    RegionPooling,
    SeededSampler,
    crop_masks,
    level_of,
    paste_masks,
)
from video_convmae.dense.options import DetectorConfig

SIDE = 128


def target(*boxes: tuple[float, float, float, float], masks: bool = True) -> dict[str, Any]:
    marked = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(marked, boxes):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    values = {"boxes": torch.tensor(boxes).reshape(-1, 4).float(), "labels": torch.arange(len(boxes)) % 3 + 1}
    return {**values, "image_id": 7} | ({"masks": marked} if masks else {})


def detector(**options: Any) -> Detector:
    torch.manual_seed(0)
    small = {"size": "tiny", "image_size": 64, "pyramid": "max_pool", "pyramid_width": 32, "proposals": 64}
    return Detector(DetectorConfig(**{**small, **options}), num_classes=3)


PICTURES = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
SIZES = [(SIDE, SIDE), (SIDE, 96)]
TARGETS = [target((10, 12, 50, 70), (60, 20, 120, 110), (5, 90, 25, 120)), target((20, 20, 90, 100))]


def test_regions_are_sampled_aligned() -> None:
    """On a map whose values are its own pixels' centres, a cell has the coordinate of its centre."""
    maps = []
    for stride in (4, 8, 16, 32):
        places = (torch.arange(256 // stride) + 0.5) * stride
        maps.append(torch.stack([places.expand(len(places), -1), places[:, None].expand(-1, len(places))])[None])
    boxes = torch.tensor([[40.0, 60, 82, 74], [13, 9, 237, 239]])
    pooled = RegionPooling(7)(maps, [boxes])
    for box, (x, y) in zip(boxes, pooled):
        cells = (torch.arange(7) + 0.5) / 7
        torch.testing.assert_close(x, (box[0] + cells * (box[2] - box[0])).expand(7, -1))
        torch.testing.assert_close(y, (box[1] + cells * (box[3] - box[1]))[:, None].expand(-1, 7))
    sides = torch.tensor([20.0, 111, 113, 223, 225, 447, 449, 2000])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    assert level_of(boxes, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("norm", "pyramid"), [("batch", "max_pool"), ("channel", "simple")])
def test_every_parameter_learns(norm: str, pyramid: str) -> None:
    model = detector(head_norm=norm, pyramid=pyramid)
    sums, counts = model(PICTURES, SIZES, TARGETS, [1, 2])
    assert sums.keys() == counts.keys() == {"objectness", "proposal_box", "class", "box", "mask"}
    assert counts["objectness"] == 512
    assert 0 < counts["mask"] <= 32
    assert counts["class"] == counts["box"] <= 128
    sum(sums.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_anchors_are_exact_whatever_the_precision() -> None:
    """bfloat16, the type of the maps under autocast, has 8 bits: anchors would be off by 4 pixels of 1,024."""
    model, made = detector(head_norm="batch"), {}
    for dtype in (torch.float32, torch.bfloat16):
        hook = model.rpn.anchor_generator.register_forward_hook(lambda *call, d=dtype: made.__setitem__(d, call[2]))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(PICTURES, SIZES, TARGETS, [1, 2])
        hook.remove()
    for exact, given in zip(made[torch.float32], made[torch.bfloat16], strict=True):
        assert torch.equal(exact, given)
        assert given.dtype == torch.float32


def test_losses_of_a_picture_do_not_depend_on_those_beside_it() -> None:
    model = detector(head_norm="channel")
    together, counts = model(PICTURES, SIZES, TARGETS, [1, 2])
    apart = [model(PICTURES[i : i + 1], SIZES[i : i + 1], TARGETS[i : i + 1], [i + 1]) for i in range(2)]
    for name, loss in together.items():
        torch.testing.assert_close(loss, apart[0][0][name] + apart[1][0][name], rtol=1e-4, atol=1e-5)
        assert counts[name] == apart[0][1][name] + apart[1][1][name]
    others, _ = model(PICTURES, SIZES, TARGETS, [3, 2])
    assert others["objectness"] != together["objectness"]


def test_box_losses_are_plain_l1() -> None:
    """detectron2's default: a smooth L1 loss with beta 0; torchvision's would halve small distances."""
    model = detector()
    predicted, wanted = torch.tensor([[0.01, -0.2, 0.0, 3.0]]), torch.zeros(1, 4)
    model.rpn.fg_bg_sampler.generators = [torch.Generator().manual_seed(0)]
    _, loss = model.rpn.compute_loss(torch.zeros(1, 1), predicted, [torch.ones(1)], [wanted])
    assert loss.item() == pytest.approx(3.21)
    boxes, proposal = torch.tensor([[10.0, 10, 50, 60]]), torch.tensor([[12.0, 9, 52, 60]])
    heads, features = model.heads, [torch.zeros(1, 32, 32 // s, 32 // s) for s in (1, 2, 4, 8)]
    heads.fg_bg_sampler.generators = [torch.Generator().manual_seed(0)]
    nn.init.zeros_(heads.box_predictor.bbox_pred.weight)
    exact = {"boxes": boxes, "labels": torch.tensor([2]), "masks": torch.ones(1, SIDE, SIDE)}
    sums, counts = heads.losses(features, [proposal], [exact])
    assert counts["box"] == 2  # the object's own box is a proposal too, with a loss of zero
    x = 10 * (30 - 32) / 40
    y, h = 10 * (35 - 34.5) / 51, 5 * torch.log(torch.tensor(50 / 51)).item()
    assert sums["box"].item() == pytest.approx(abs(x) + abs(y) + abs(h), rel=1e-5)
    assert sums["class"].item() == pytest.approx(2 * torch.log(torch.tensor(4.0)).item(), rel=0.2)


@pytest.mark.parametrize("norm", ["batch", "channel"])
def test_pictures_without_objects_or_masks(norm: str) -> None:
    model = detector(head_norm=norm)
    sums, counts = model(PICTURES, SIZES, [target(), target((20, 20, 90, 100), masks=False)], [1, 2])
    assert sums["mask"] == counts["mask"] == 0
    sum(sums.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_boxes_alone() -> None:
    model = detector(masks=False)
    sums, _ = model(PICTURES, SIZES, [target(masks=False), target((20, 20, 90, 100), masks=False)], [1, 2])
    assert "mask" not in sums
    assert model.eval()(PICTURES, SIZES)[0].masks is None


def test_examples_are_drawn_by_their_own_generator() -> None:
    labels = torch.tensor([1.0] * 300 + [0] * 500 + [-1] * 50)
    sampler = SeededSampler(256, 0.5)

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        sampler.generators = [torch.Generator().manual_seed(seed)]
        (positives,), (negatives,) = sampler([labels])
        return positives, negatives

    positives, negatives = draw(5)
    assert (positives.sum(), negatives.sum()) == (128, 128)
    assert (labels[positives] == 1).all()
    assert (labels[negatives] == 0).all()
    assert torch.equal(draw(5)[0], positives)
    assert not torch.equal(draw(6)[0], positives)


def test_masks_return_to_their_place() -> None:
    """A disc, cropped to its box and pasted back; a box that ends outside the picture is cut."""
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(140), indexing="ij")
    disc = ((rows - 40.3) ** 2 + (columns - 71.9) ** 2 < 30**2)[None]
    box = torch.tensor([[42.0, 10, 102, 71]])
    (pasted,) = paste_masks(crop_masks(disc.to(torch.uint8), box), box, (100, 140))
    assert (pasted & disc[0]).sum() / (pasted | disc[0]).sum() > 0.97
    outside = torch.tensor([[-20.0, -10, 30, 50], [5, 5, 5, 9]])
    whole, empty = paste_masks(torch.ones(2, 28, 28), outside, (40, 25))
    assert whole.all()
    assert not empty.any()


@pytest.mark.slow
def test_a_detector_that_overfits_finds_its_objects() -> None:
    """Trained on one picture: the boxes are found, and the masks fill them."""
    model = detector(head_norm="channel")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    pictures = torch.zeros(1, 3, SIDE, SIDE)
    wanted = target((10, 12, 50, 70), (60, 20, 120, 110))
    for box, colour in zip(wanted["boxes"].int().tolist(), ([2.0, 0, 0], [0, 2.0, 0])):
        pictures[0, :, box[1] : box[3], box[0] : box[2]] = torch.tensor(colour)[:, None, None]
    for step in range(120):
        sums, counts = model(pictures, SIZES[:1], [wanted], [step])
        sum(sums[name] / counts[name] for name in sums).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        (found,) = model.eval()(pictures, SIZES[:1])
    assert isinstance(found, Detections)
    best = [int(torch.where(found.labels == label)[0][0]) for label in (1, 2)]
    assert box_iou(found.boxes[best], wanted["boxes"]).diagonal().min() > 0.7
    for place, mask in zip(best, wanted["masks"]):
        (pasted,) = paste_masks(found.masks[place][None], found.boxes[place][None], (SIDE, SIDE))
        assert (pasted & (mask > 0)).sum() / (pasted | (mask > 0)).sum() > 0.6


def test_decay_follows_the_recipe() -> None:
    model = detector()
    undecayed = model.no_weight_decay()
    assert {"neck.inner_blocks.0.1.weight", "heads.mask_head.0.1.bias"} <= undecayed
    assert "heads.box_predictor.cls_score.bias" not in undecayed
    assert "backbone.positions" in undecayed
    scales = model.layer_scales(0.8)
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert scales["backbone.embeddings.0.linear.weight"] == pytest.approx(0.8**5)
    assert scales["backbone.attention_blocks.3.mlp.fc1.bias"] == pytest.approx(0.8)
    assert scales["backbone.positions"] == scales["heads.box_predictor.cls_score.bias"] == 1
