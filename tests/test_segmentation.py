"""Segmentation: heads, losses, sliding windows, data, transforms, evaluation."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import ENVIRONMENT, torchrun
from torch import Tensor, nn
from weight_cases import TINY, golden, scrambled

from video_convmae.build_dense import load_dense_weights
from video_convmae.cli import evaluate, predict, train_segmentation
from video_convmae.cli.parser import parse
from video_convmae.config_dense import TrainDetectionConfig
from video_convmae.data.datasets import SampleKey
from video_convmae.data.decoding import DecodeError
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.dense_transforms import fit
from video_convmae.data.options import CropConfig
from video_convmae.data.segmentation import (
    Labels,
    SegmentationDataset,
    SegmentationTestDataset,
    classes_seen,
    distort,
    draw_crop,
    read_pairs,
)
from video_convmae.data.text import ListError
from video_convmae.dense.detection import Detector
from video_convmae.dense.options import SegmenterConfig
from video_convmae.dense.segmentation import IGNORED, AuxiliaryHead, Segmenter, UperNet, pixel_losses, slide
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.segmentation import SegmentationInference, SegmentationResult, confusion_matrix
from video_convmae.engine.tasks import Normalizer
from video_convmae.errors import UserError
from video_convmae.runs import load_segmenter
from video_convmae.visualize.segments import overlay, palette

SIZES = {name: value for name, value in TINY.items() if name != "decoder"}
LEVELS = (6, 8, 10, 10)


def segmenter(classes: int = 4, **options: object) -> Segmenter:
    torch.manual_seed(0)
    head = {"head_width": 8, "auxiliary_width": 4, "relative_positions": "block", "pyramid": "convolution"}
    return Segmenter(SegmenterConfig(**{**SIZES, **head, "image_size": 64, **options}), classes)


# Heads


def upernet_heads(dtype: torch.dtype = torch.float64) -> tuple[UperNet, AuxiliaryHead, nn.Module, nn.Module]:
    """Our heads and transformers', with our weights in both."""
    upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet", reason="transformers has UperNet")
    from transformers import UperNetConfig

    config = UperNetConfig(
        backbone_config={"model_type": "resnet"}, hidden_size=8, pool_scales=[1, 2, 3, 6], auxiliary_channels=5,
        auxiliary_num_convs=1, auxiliary_in_channels=LEVELS[2], num_labels=4,
    )  # fmt: skip
    ours, auxiliary = UperNet(LEVELS, 4, 8, (1, 2, 3, 6), 0.1), AuxiliaryHead(LEVELS[2], 4, 5, 0.1)
    theirs, fcn = upernet.UperNetHead(config, list(LEVELS)), upernet.UperNetFCNHead(config, list(LEVELS))
    for one, other, pattern in (
        (ours, theirs, {"pools": "psp_modules", "laterals": "lateral_convs", "smoothing": "fpn_convs"}),
        (auxiliary, fcn, {}),
    ):
        scrambled(one.to(dtype).eval())
        for module in one.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_()
                module.running_var.uniform_(0.5, 2)
        state = {}
        for name, tensor in one.state_dict().items():
            for our_word, their_word in {**pattern, "fusion": "fpn_bottleneck"}.items():
                name = name.replace(f"{our_word}.", f"{their_word}.", 1)
            parts = name.split(".")
            if parts[0] == "psp_modules":  # (pool, convolution with norm) are 0 and 1 there, too
                state[".".join([*parts[:3], {"0": "conv", "1": "batch_norm"}[parts[3]], *parts[4:]])] = tensor
            elif one is auxiliary:
                renamed = {"0.0": "convs.0.conv", "0.1": "convs.0.batch_norm", "2": "classifier"}
                key = ".".join(parts[:-1])
                state[f"{renamed[key]}.{parts[-1]}"] = tensor
            elif parts[0] == "classifier":
                state[name] = tensor
            else:
                *start, part, last = parts
                state[".".join([*start, {"0": "conv", "1": "batch_norm"}[part], last])] = tensor
        other.to(dtype).eval().load_state_dict(state)
    return ours, auxiliary, theirs, fcn


@pytest.mark.parametrize("sizes", [((32, 32), (16, 16), (8, 8), (3, 3)), ((20, 13), (10, 7), (5, 4), (2, 1))])
def test_the_heads_are_transformers_upernet(sizes: tuple[tuple[int, int], ...]) -> None:
    ours, auxiliary, theirs, fcn = upernet_heads()
    levels = [torch.randn(2, channels, *size, dtype=torch.float64) for channels, size in zip(LEVELS, sizes)]
    given = [level.clone() for level in levels]
    expected = theirs(given)
    torch.testing.assert_close(ours(levels), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(auxiliary(levels[2]), fcn(levels), rtol=1e-10, atol=1e-10)


def test_the_auxiliary_head_is_of_training_alone() -> None:
    model = segmenter()
    logits, auxiliary = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 4, 16, 16)
    assert auxiliary is not None
    assert auxiliary.shape == (2, 4, 4, 4)
    assert model.eval()(torch.randn(1, 3, 50, 70))[1] is None
    scales = model.layer_scales(0.5)
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert scales["backbone.positions"] == 0.125
    assert scales["head.classifier.weight"] == scales["backbone.pyramid.coarsest.0.weight"] == 1


def test_parameters_of_the_published_recipe() -> None:
    """153.1 M without the auxiliary head and the fourth level's convolution; published: 153 M."""
    config = SegmenterConfig(image_size=512, relative_positions="block", layer_scale=1, pyramid="convolution")
    with torch.device("meta"):
        model = Segmenter(config, 150)

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(model) == 160_175_664
    assert round((count(model) - count(model.auxiliary) - count(model.backbone.pyramid)) / 1e6, 1) == 153.1


def test_ignored_pixels_have_no_loss() -> None:
    logits = torch.randn(1, 4, 2, 2)
    labels = torch.full((1, 4, 4), IGNORED)
    assert [float(each) for each in pixel_losses(logits, labels)] == [0, 0]
    labels[0, 0, 0] = 2
    loss, count = pixel_losses(logits, labels)
    expected = F.interpolate(logits, size=(4, 4), mode="bilinear")[0, :, 0, 0].log_softmax(0)[2]
    assert count == 1
    torch.testing.assert_close(loss, -expected)


# Sliding windows


class Means(nn.Module):
    """A segmenter whose logits at a pixel are its window's mean and the pixel."""

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        pixel = images[:, :1]
        return torch.cat([pixel.mean(dim=(2, 3), keepdim=True).expand_as(pixel), pixel], dim=1), None


@pytest.mark.parametrize("size", [(10, 10), (10, 23), (17, 11), (4, 30), (5, 6)])
def test_windows_cover_the_picture_and_are_averaged(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    logits = slide(Means(), images, 10, 7, 2)
    torch.testing.assert_close(logits[:, 1], images[:, 0])
    total, seen = torch.zeros(2, *size), torch.zeros(*size)
    for top in {min(place, max(0, size[0] - 10)) for place in range(0, max(1, size[0] - 10 + 7), 7)}:
        for left in {min(place, max(0, size[1] - 10)) for place in range(0, max(1, size[1] - 10 + 7), 7)}:
            part = images[:, 0, top : top + 10, left : left + 10]
            total[:, top : top + 10, left : left + 10] += part.mean(dim=(1, 2))[:, None, None]
            seen[top : top + 10, left : left + 10] += 1
    assert seen.min() == 1 or size in ((10, 23), (17, 11), (4, 30))
    torch.testing.assert_close(logits[:, 0], total / seen)


# Data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures with ADE20K's folders: a left half of class 1 and a right half of class 2, a row without a class."""
    numbers = np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 3)):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number in range(count):
            height, width = 40 + 4 * number, 64 - 3 * number
            labels = np.ones((height, width), np.uint8)
            labels[:, width // 2 :] = 2
            labels[0] = 0
            pixels = np.stack([40 + 80 * labels] * 3, axis=-1) + numbers.integers(0, 20, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"images/{split}/{number}.png")
            Image.fromarray(labels).save(tmp_path / f"annotations/{split}/{number}.png")
    return tmp_path


SMALL = CropConfig(crop=32, shortest=32, longest=64)
ADE = Labels(2, zero_is_ignored=True)


def dataset(folder: Path, config: CropConfig = SMALL, labels: Labels = ADE, **options: object) -> SegmentationDataset:
    records = read_pairs(folder / "images/training")
    return SegmentationDataset(records, labels, config, ReaderProcess("pyav"), **options)


def test_a_sample_is_a_function_of_seed_epoch_and_record(folder: Path) -> None:
    first, again, other = dataset(folder), dataset(folder), dataset(folder, seed=1)
    for key in (SampleKey(0, 2), SampleKey(3, 5)):
        assert torch.equal(first[key].image, again[key].image)
        assert torch.equal(first[key].target, again[key].target)
        assert not torch.equal(first[key].image, other[key].image)
    assert first[SampleKey(0, 2)].image.shape == (3, 32, 32)
    assert first[SampleKey(0, 2)].target.dtype == torch.int64


def test_labels_follow_their_pixels(folder: Path) -> None:
    """Bright pixels have class 1, dark ones class 0, whatever flip, ratio and crop."""
    data = dataset(folder, CropConfig(crop=32, shortest=32, longest=64, distortion=False))
    flips = set()
    for epoch in range(8):
        sample = data[SampleKey(epoch, epoch % 6)]
        flips.add(sample.transform.flip)
        bright = sample.image.float().mean(dim=0) > 170
        seen = sample.target != IGNORED
        assert (bright == (sample.target == 1))[seen].float().mean() > 0.93
    assert flips == {True, False}


def test_a_crop_is_drawn_again_where_one_class_covers_it() -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 30:] = 1
    config = CropConfig(crop=32, shortest=64, longest=64, ratios=(1, 1), cat_max=0.75)
    shares = []
    for seed in range(20):
        seen = draw_crop(labels, config, torch.Generator().manual_seed(seed)).mask(labels)
        shares.append(np.bincount(seen.reshape(-1)).max() / seen.size)
    assert np.mean(np.array(shares) < 0.75) >= 0.9
    one = np.zeros((64, 64), np.uint8)  # no crop fits: the tenth is taken
    assert draw_crop(one, config, torch.Generator().manual_seed(0)).crop == (32, 32)


def test_ratio_one_fits_both_sides() -> None:
    config = CropConfig()
    assert fit(480, 640, config.shortest, config.longest) == (512, 683)
    assert fit(100, 1000, config.shortest, config.longest) == (205, 2048)
    assert fit(480, 640, 0.5 * config.shortest, 0.5 * config.longest) == (256, 341)


def test_distortion_keeps_grey_grey_but_for_brightness() -> None:
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    colour = torch.stack([grey[0], grey[0] // 2, grey[0] + 50])
    results = [distort(colour, torch.Generator().manual_seed(seed)) for seed in range(30)]
    assert len({tuple(result.flatten().tolist()) for result in results}) > 20
    for seed in range(10):
        values = distort(grey, torch.Generator().manual_seed(seed))
        assert values.unique().numel() == 1
        assert 68 * 0.5 - 1 <= values.max() <= 132 * 1.5 + 1


def test_label_maps_are_checked(folder: Path) -> None:
    size = (40, 64)
    path = str(folder / "annotations/training/0.png")
    values = ADE.read(path, size)
    assert np.unique(values).tolist() == [0, 1, IGNORED]
    with pytest.raises(DecodeError, match=r"0\.png: has the value 2; expected 1 to 1, or 255 for ignored"):
        Labels(1, zero_is_ignored=True).read(path, size)
    with pytest.raises(DecodeError, match=r"0\.png: is 64x40 and its picture 40x40; expected equal"):
        ADE.read(path, (40, 40))
    with pytest.raises(DecodeError, match=r"its picture 40x64 \(turned as its EXIF data says\); expected equal"):
        ADE.read(path, size[::-1])
    with pytest.raises(DecodeError, match=r"0\.png: has the channels RGB; expected a label map"):
        ADE.read(str(folder / "images/training/0.png"), size)


def palette_map(path: Path, indices: np.ndarray, colours: list[tuple[int, int, int]]) -> str:
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette([value for colour in colours for value in colour])
    image.save(path, optimize=True)
    assert Image.open(path).mode == "P"
    return str(path)


def test_greys_of_a_palette_are_values_and_colours_are_not(tmp_path: Path) -> None:
    """A grey map that became a palette for size reads as before; indices under colours stay, as those of VOC."""
    values = np.repeat([0, 3, 7, 255], 8).reshape(8, 4)
    indices = np.repeat([2, 0, 1, 3], 8).reshape(8, 4)
    grey = palette_map(tmp_path / "grey.png", indices, [(3, 3, 3), (7, 7, 7), (0, 0, 0), (255, 255, 255)])
    assert np.array_equal(Labels(10).read(grey), values)
    shown = palette_map(tmp_path / "voc.png", indices, [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)])
    assert np.array_equal(Labels(10).read(shown), indices)
    drawn = palette_map(tmp_path / "drawn.png", indices, [(0, 0, 0), (80, 80, 80), (160, 160, 160), (240, 240, 240)])
    assert np.array_equal(Labels(4).read(drawn), indices)  # greys that are no classes
    mask = palette_map(tmp_path / "mask.png", indices % 2, [(0, 0, 0), (255, 255, 255)])
    assert np.array_equal(Labels(2).read(mask), indices % 2)


def test_values_that_mean_nothing_are_said(folder: Path) -> None:
    for classes, zero_is_ignored, ignored in ((3, False, 2), (255, True, 255)):
        with pytest.raises(ListError, match=rf"data\.ignored is {ignored}, the value of a class"):
            Labels(classes, zero_is_ignored, ignored)
    records = read_pairs(folder / "images/training")
    assert classes_seen(records, ADE) == {0, 1}
    for path in (folder / "annotations/training").iterdir():  # a binary mask
        Image.fromarray(np.where(np.arange(64) < 30, 0, 255).astype(np.uint8)[None].repeat(40, 0)).save(path)
    assert classes_seen(records, Labels(2)) == {0}


def test_a_bad_map_is_replaced_and_named(folder: Path) -> None:
    Image.fromarray(np.full((40, 64), 9, np.uint8)).save(folder / "annotations/training/0.png")
    sample = dataset(folder)[SampleKey(0, 0)]
    assert sample.index != 0
    assert "has the value 9" in sample.bad_records[0].error
    records = read_pairs(folder / "images/training")
    tested = SegmentationTestDataset(records, ADE, SMALL, ReaderProcess("pyav"))[0]
    assert (tested.target == IGNORED).all()
    assert tested.bad_records[0].index == 0


def test_folders_that_do_not_match_are_errors(folder: Path) -> None:
    assert len(read_pairs("images/validation", folder)) == 3
    assert len(read_pairs("images/validation", folder, "annotations/training")) == 3
    (folder / "annotations/validation/1.png").unlink()
    with pytest.raises(ListError, match=r"1 of the 3 pictures .* have no label map in .*, the first: 1\.png"):
        read_pairs(folder / "images/validation")
    shutil.copy(folder / "images/validation/0.png", folder / "images/validation/0.tif")
    with pytest.raises(ListError, match=r"images/validation holds 2 files named 0; expected one"):
        read_pairs(folder / "images/validation")
    with pytest.raises(ListError, match=r"no label maps were found .*data\.train_maps"):
        read_pairs(folder / "annotations/training")
    with pytest.raises(ListError, match="is no folder; expected that of the pictures"):
        read_pairs(folder / "pictures")


# Evaluation


def test_metrics_of_a_known_matrix() -> None:
    predicted = torch.tensor([[0, 0, 1], [1, 2, 2]])
    labels = torch.tensor([[0, 1, 1], [1, 1, IGNORED]])
    confusion = confusion_matrix(predicted, labels, 4)
    assert confusion.tolist() == [[1, 0, 0, 0], [1, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    metrics = SegmentationResult(confusion, 1, ()).metrics()
    assert metrics["miou"] == pytest.approx((1 / 2 + 2 / 4 + 0) / 3)  # class 3 is nowhere
    assert metrics["macc"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics["aacc"] == pytest.approx(3 / 5)
    assert metrics["largest_class_miou"] == pytest.approx(4 / 5 / 2)


def test_evaluation_does_not_depend_on_the_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two ranks compute, added, is what one computes; a bad picture is reported and not scored."""
    (folder / "images/validation/1.png").write_bytes(b"no picture")
    records = read_pairs(folder / "images/validation")
    pictures = SegmentationTestDataset(records, ADE, SMALL, ReaderProcess("pyav"))
    device = torch.device("cpu")
    model = segmenter(2).train()

    def run(rank: int, ranks: int) -> SegmentationResult:
        return SegmentationInference(
            model,
            pictures,
            Normalizer((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), device),
            lambda model, images: slide(model, images, 32, 21, 2),
            2,
            DistInfo(rank, ranks, device),
        ).run()

    whole = run(0, 1)
    monkeypatch.setattr("video_convmae.engine.segmentation.all_gather_object", lambda value: [value])
    parts = [run(rank, 2) for rank in range(2)]
    assert (parts[0].confusion + parts[1].confusion == whole.confusion).all()
    assert whole.scored == 2
    assert [record.index for record in whole.bad_records] == [1]
    assert whole.confusion.sum() == 40 * 64 - 64 + 48 * 58 - 58
    assert model.training


# Runs


def test_overlays_show_the_picture_under_colours() -> None:
    labels = np.array([[0, 1], [IGNORED, 1]])
    drawn = np.asarray(overlay(np.full((2, 2, 3), 200, np.uint8), labels, 2))
    assert (drawn[1, 0] == 200).all()
    assert (drawn[0, 1] == drawn[1, 1]).all()
    assert (drawn[0, 0] != drawn[0, 1]).any()
    assert len(np.unique(palette(150), axis=0)) == 150


def test_a_run_from_released_weights_is_tested_and_predicts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train a few steps from the released layout, evaluate, predict, and resume to the same weights."""
    weights = golden("convmae")
    torch.save({"model": weights}, folder / "convmae.pth")
    widths = [len(weights[f"blocks{stage}.0.norm1.weight"]) for stage in (1, 2, 3)]
    depths = [len({name.split(".")[1] for name in weights if name.startswith(f"blocks{s}.")}) for s in (1, 2, 3)]
    ratio = len(weights["blocks3.0.mlp.fc1.bias"]) / widths[2]
    arguments = [
        *("--config", "debug/segmentation", "--data.root", str(folder), "--data.train", "images/training"),
        *("--data.validation", "images/validation", "--data.num_classes", "2", "--data.zero_is_ignored", "true"),
        *("--data.workers", "0", "--data.augmentation.crop", "32", "--data.augmentation.shortest", "32"),
        *("--validate.window", "32", "--validate.stride", "21", "--train.epochs", "1", "--train.save_every", "0.4"),
        *("--model.widths", str(widths), "--model.depths", str(depths), "--model.heads", "2"),
        *("--model.mlp_ratio", str(ratio), "--init.weights", str(folder / "convmae.pth")),
    ]
    run = folder / "run"
    assert train_segmentation.main([*arguments, "--output", str(run)]) == 0
    assert "tensors loaded" in capsys.readouterr().out
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["val_miou"] <= 1
    before = load_segmenter(run)[0].state_dict()
    shutil.rmtree(run / "checkpoints" / "step_00000003")
    assert train_segmentation.main([*arguments, "--output", str(run)]) == 0
    after = load_segmenter(run)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    assert evaluate.main(["--weights", str(run), "--output", str(folder / "test"), "--plot"]) == 0
    metrics = json.loads((folder / "test/metrics.json").read_text())
    assert metrics["miou"] == last["val_miou"]
    elsewhere = ["--list", "images/validation", "--maps", "annotations/training"]
    assert evaluate.main(["--weights", str(run), "--output", str(folder / "other"), *elsewhere]) == 0
    assert json.loads((folder / "other/metrics.json").read_text())["aacc"] == metrics["aacc"]
    with pytest.raises(UserError, match=r"needs two or more .* raise train\.batch_size"):
        train_segmentation.main([*arguments, "--output", str(folder / "one"), "--train.batch_size", "1"])
    assert metrics["scored"] == 3
    assert len(list((folder / "test/pictures").glob("*.png"))) == 3
    assert len(json.loads((folder / "test/classes.json").read_text())) == 2
    out = folder / "predicted"
    assert predict.main([str(run), str(folder / "images/validation"), "--output", str(out)]) == 0
    label_map = np.asarray(Image.open(out / "00000_0.png"))
    assert label_map.shape == (40, 64)
    assert set(np.unique(label_map)) <= {1, 2}


def run_command(folder: Path, output: Path, *edits: str) -> list[str]:
    return [
        *("--config", "debug/segmentation", "--data.root", str(folder), "--data.train", "images/training"),
        *("--data.num_classes", "2", "--data.zero_is_ignored", "true", "--data.workers", "0"),
        *("--data.augmentation.crop", "32", "--data.augmentation.shortest", "32", "--model.head_dropout", "0"),
        *("--model.drop_path", "0", "--train.epochs", "1", "--output", str(output), "--device", "cpu", *edits),
    ]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(folder: Path, tmp_path: Path) -> None:
    """Losses, and the share of pixels that are right, whose number differs between the processes."""
    logs = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        edits = ("--train.batch_size", str(4 // processes), "--train.max_steps", "4")
        command = ("-m", "video_convmae", "train-segmentation", *run_command(folder, output, *edits))
        subprocess.run(torchrun(processes, *command), env=ENVIRONMENT, check=True, timeout=300)
        logs.append([json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()])
    for one, two in zip(*logs, strict=True):
        for name in ("loss", "loss_decode", "loss_auxiliary", "train_aacc"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_a_segmenter_starts_from_another(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it for the same classes; without the classifiers for others; not a detector from a segmenter."""
    edits = ("--train.batch_size", "2", "--train.max_steps", "1")
    assert train_segmentation.main(run_command(folder, tmp_path / "first", *edits)) == 0
    before = load_segmenter(tmp_path / "first")[0].state_dict()
    common = (*edits, "--optim.lr", "0", "--init.weights", str(tmp_path / "first"))
    for name, more in (("same", ()), ("others", ("--data.num_classes", "4"))):
        assert train_segmentation.main(run_command(folder, tmp_path / name, *common, *more)) == 0
        assert "VideoConvMAE segmentation run: " in capsys.readouterr().out
        after = load_segmenter(tmp_path / name)[0].state_dict()
        kept = [n for n in after if "running_" not in n and "num_batches" not in n]
        kept = [n for n in kept if name == "same" or not n.startswith(Segmenter.OF_CLASSES)]
        assert all(torch.equal(after[n], before[n]) for n in kept)
    detection = parse(TrainDetectionConfig, ["--config=debug/detection", f"--init.weights={tmp_path / 'first'}"])
    with pytest.raises(UserError, match="is a run of segmentation; expected one of the same task, or an encoder"):
        load_dense_weights(detection, Detector(detection.model, 2))


def test_the_number_of_classes_must_be_known(folder: Path) -> None:
    arguments = ["--config", "debug/segmentation", "--data.root", str(folder), "--output", str(folder / "run")]
    with pytest.raises(ListError, match=r"expected data\.num_classes \(ADE20K: 150\)"):
        train_segmentation.main(arguments)
