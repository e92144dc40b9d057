"""Every configuration loads, builds its model, and takes two steps of a shrunken copy; what is unknown is an error."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import yaml
from clips import encode, pictures
from PIL import Image
from safetensors.torch import save_file
from states import load_state

from video_convmae import create_autoencoder, create_classifier
from video_convmae.build import build_classifier
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import fields_of, merge, parse, read_config
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import (
    AutoencoderConfig,
    ClassifierConfig,
    FinetuneConfig,
    PretrainConfig,
    TargetConfig,
    flatten,
    from_plain,
    to_plain,
)
from video_convmae.config_dense import TrainDetectionConfig, TrainSegmentationConfig
from video_convmae.data.records import ListError, Record, Records
from video_convmae.dense.detection import Detector
from video_convmae.engine import checkpoint
from video_convmae.lists import count_classes
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.probe import Probe
from video_convmae.runs import load_autoencoder, load_classifier
from video_convmae.weights.formats import to_format

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FINETUNING = [path for path in CONFIGS if path.name.startswith(("finetune", "probe"))]
DETECTION = [path for path in CONFIGS if "detection" in (path.parent.name, path.stem.removesuffix("_scenes"))]
SEGMENTATION = [path for path in CONFIGS if "segmentation" in (path.parent.name, path.stem.removesuffix("_scenes"))]
LIBRARY = ("mvit", "slowfast", "x3d")  # baselines of pytorchvideo: tests/test_pytorchvideo.py builds them
PRETRAINING = [path for path in CONFIGS if path not in [*FINETUNING, *DETECTION, *SEGMENTATION]]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def shipped_name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def kind_of(path: Path) -> type:
    if path in DETECTION:
        return TrainDetectionConfig
    if path in SEGMENTATION:
        return TrainSegmentationConfig
    return FinetuneConfig if path in FINETUNING else PretrainConfig


def load(path: Path, *arguments: str) -> PretrainConfig:
    return parse(PretrainConfig, [f"--config={path}", *arguments])


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(4):
        encode(folder / f"{i}.mp4", 24)
        (folder / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures(1, seed=i)[0]).save(folder / "images" / str(i % 2) / f"{i}.png")
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i}\n" for i in range(4)))
    (folder / "pairs.txt").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(4)))
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_opens_with_the_command_that_runs_it(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    kinds = {FinetuneConfig: "finetune", PretrainConfig: "pretrain", TrainDetectionConfig: "train-detection"}
    kinds |= {TrainSegmentationConfig: "train-segmentation"}
    command = kinds[kind_of(path)]
    assert re.search(rf"(video-convmae|-m video_convmae) {command} ", " ".join(head[:3]))
    assert f"--config {shipped_name(path)} " in " ".join([*head, ""])


# Fields that a variant inherits and that its file did not state before it had a base: the dataclasses' own defaults.
INHERITED = {
    "video/finetune_hmdb51_base": {"data.labels": None},
    "video/finetune_ssv2_base": {"data.stride": 4},
    "video/finetune_ssv2_videomae_base": {"data.stride": 4},
    "video/finetune_ucf101_base": {"data.labels": None},
    "video/pretrain_k400_spatiotemporal_base": {
        "data.augmentation.scales": [1.0, 0.875, 0.75, 0.66],
        "model.msd": True,
    },
    "video/pretrain_k400_videomae_base": {"model.msd": True},
    "video/pretrain_ssv2_videomae_base": {"model.msd": True},
    "video/probe_k400_attentive_base": {"optim.optimizer": "adamw"},
}


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_states_what_it_stated_when_it_was_written_out_whole(path: Path) -> None:
    """Every value, with those of the files it extends, as in tests/data/configurations.json."""
    whole = json.loads((ROOT / "tests" / "data" / "configurations.json").read_text())[shipped_name(path)]
    inherited = INHERITED.get(shipped_name(path), {})
    assert dict(flatten(read_config(path))) == whole | inherited
    kind = kind_of(path)
    defaults = dict(flatten(to_plain(parse(kind, ["--output=x", "--data.train=x"]))))
    assert {field: defaults[field] for field in inherited} == inherited


def test_a_variant_states_only_what_differs() -> None:
    for path in CONFIGS:
        values = yaml.safe_load(path.read_text())
        if (base := values.pop("extends", None)) is not None:
            inherited = dict(flatten(read_config(base, path.parent)))
            same = {field for field, value in flatten(values) if field in inherited and inherited[field] == value}
            assert same <= {"data.augmentation.flip"}, path  # Something-Something states it, whatever its base does


def test_extends_merges_groups_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: debug/pretrain\nmodel: {widths: [8, 8, 8]}\nmask: {kind: random}\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.yaml").write_text("extends: ../a.yaml\nmodel: {widths: [16, 16, 16]}\noptim: {lr: null}\n")
    values = read_config(tmp_path / "deep" / "b.yaml")
    assert values == merge(
        read_config("debug/pretrain"),
        {"model": {"widths": [16, 16, 16]}, "mask": {"kind": "random"}, "optim": {"lr": None}},
    )
    config = load(tmp_path / "deep" / "b.yaml", "--mask.ratio=0.5", "--model.heads=4")
    assert config.model.widths == (16, 16, 16)
    assert (config.mask.kind, config.mask.ratio, config.optim.lr) == ("random", 0.5, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: run.yaml", "run.yaml extends itself"),
        ("extends: between.yaml", "run.yaml extends itself, by way of"),
        ("extends: nowhere", "cannot read the configuration 'nowhere'"),
        ("- output", "run.yaml holds list; expected fields"),
        ("output: [", "run.yaml is no YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_of_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "between.yaml").write_text("extends: run.yaml")
    with pytest.raises(SystemExit) as end:
        load(tmp_path / "run.yaml")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("video-convmae pretrain: error: ")
    assert message in line


@pytest.mark.parametrize("path", PRETRAINING, ids=name)
def test_the_whole_model_builds(path: Path) -> None:
    with torch.device("meta"):
        model = Autoencoder(load(path).model)
    if path.parent.name == "image":
        assert model.grid == (1, 14, 14)
    if path.parent.name == "video":
        grid = (4, 4, 4) if "tiny" in path.name else (8, 7, 7)
        assert model.grid == (grid if "pretrain_own" in path.name else (8, 14, 14))
        least = 85e6 if "base" in path.name else 1e6 if "tiny" in path.name else 20e6
        assert sum(p.numel() for p in model.parameters()) > least
        assert (model.fusion is not None and len(model.fusion.joints) > 0) == (
            any(part in path.name for part in ("_msd", "_fast", "_v2", "pretrain_own"))
        )


OF_ONE_SIZE = ("strides", "decoder", "from_weights")  # what a file states that fits no tiny model


def small_model(path: Path, frames: int) -> dict[str, Any]:
    """The model of a file with a tiny size."""
    stated = read_config(path)["model"]
    size = "vit_tiny" if stated["size"].startswith("vit") else "tiny"
    small = {"size": size, "num_frames": frames, "image_size": 32}
    return {field: value for field, value in stated.items() if field not in OF_ONE_SIZE} | small


@pytest.fixture(scope="module")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model of timm's, as a file."""
    path = tmp_path_factory.mktemp("teacher") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return str(path)


def small_target(target: TargetConfig, file: str) -> TargetConfig:
    """The target with a small teacher: of timm, or the average of the encoder in place of another."""
    if target.teacher is None:
        return target
    if target.weights is not None:
        return replace(target, teacher="timm:test_vit", weights=file)
    return replace(target, teacher="ema")


@pytest.mark.parametrize("path", PRETRAINING, ids=name)
def test_a_shrunken_copy_takes_two_steps(path: Path, videos: Path, small_teacher: str, tmp_path: Path) -> None:
    config = load(path)
    frames, images = (1, "images") if config.data.format == "image" else (4, "list.txt")
    small = replace(
        config,
        output=str(tmp_path),
        device="cpu",
        model=AutoencoderConfig(**small_model(path, frames)),
        targets=tuple(small_target(target, small_teacher) for target in config.targets),
        data=replace(config.data, train=str(videos / images), root=str(videos), reader="pyav", workers=0),
        train=replace(config.train, batch_size=2, accumulate=1, effective_batch=2, max_steps=2, log_every=1),
        optim=replace(config.optim, warmup_steps=0),
    )
    assert pretrain(small) == 2
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((tmp_path / "metrics.json").read_text())["loss"] > 0
    model, again = load_autoencoder(tmp_path)
    assert again == small
    assert model.grid[0] == max(1, frames // 2)


@pytest.mark.parametrize("path", [p for p in FINETUNING if not any(n in p.name for n in LIBRARY)], ids=name)
def test_the_whole_classifier_builds(path: Path) -> None:
    config = parse(FinetuneConfig, [f"--config={path}"])
    if config.model.from_weights:  # VideoMAE's
        config = replace(config, model=config.model.with_encoder({"size": "vit_base", "position_table": "flat"}))
    with torch.device("meta"):
        model = build_classifier(config.model, 400)
    assert isinstance(model, Probe) == (config.model.probe is not None)
    if path.parent.name != "debug":
        own = (8, 8, 8) if "tiny" in path.name else (8, 7, 7)
        grid = own if "own" in path.name and "published" not in path.name else (8, 14, 14)
        assert model.encoder.config.grid == ((1, 14, 14) if path.parent.name == "image" else grid)


@pytest.mark.parametrize("path", FINETUNING, ids=name)
def test_a_shrunken_classifier_takes_two_steps(path: Path, videos: Path, tmp_path: Path) -> None:
    config = parse(FinetuneConfig, [f"--config={path}"])
    frames, images = (1, "images") if config.data.format == "image" else (4, "list.txt")
    heads = replace(config.sweep, lr=config.sweep.lr[:2], weight_decay=config.sweep.weight_decay[:1])
    source = str(videos / ("pairs.txt" if heads.lr else images))
    small = replace(
        config,
        output=str(tmp_path),
        device="cpu",
        sweep=heads,
        model=ClassifierConfig(**small_model(path, frames)),
        data=replace(
            config.data,
            train=source,
            validation=source,
            root=str(videos),
            labels=None,
            num_classes=None,
            reader="pyav",
            workers=0,
        ),
        train=replace(config.train, batch_size=2, accumulate=1, effective_batch=2, max_steps=2, log_every=1),
        optim=replace(config.optim, warmup_steps=0),
        validate=replace(config.validate, precision="fp32"),
        test=replace(config.test, precision="fp32"),
    )
    steps = 0 if config.model.probe in ("knn", "logistic") else 2
    assert finetune(small) == steps
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["val_scored"] == 4
    if heads.lr:
        assert len(metrics["sweep"]["heads"]) == 2
    elif steps:
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 2]  # the last is the validation's
        assert metrics["best"]["top1"] == metrics["val_top1"]
    model, again = load_classifier(tmp_path)
    classes = 2 if frames == 1 or heads.lr else 4
    assert again.data.num_classes == classes
    assert replace(again, data=small.data) == small
    if steps and not heads.lr:
        best, _ = load_classifier(tmp_path / "checkpoints" / "best")
        assert best.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("path", [p for p in PRETRAINING if "k400" in p.name or "ssv2" in p.name], ids=name)
def test_the_numbers_are_the_recipes(path: Path) -> None:
    """shared/reference/video_frameworks.md sections 1.1 and 1.4; the number of devices stands in the launch command."""
    config, text = load(path), path.read_text()
    nodes = int(re.search(r"--nnodes (\d+)", text)[1])
    batch = config.train.batch_size * 8 * nodes * config.train.accumulate
    spatiotemporal = "spatiotemporal" in path.name
    assert config.data.stride == (2 if "ssv2" in path.name else 4)
    fast = "fast" in path.name  # four masks a clip: as many masks a step and in all, so a quarter of clips and epochs
    short = "200ep" in path.name or "_v2" in path.name or spatiotemporal or fast
    assert config.train.epochs == (200 if short else 800)
    assert (config.mask.kind, config.mask.ratio) == ("random" if spatiotemporal else "tube", 0.9)
    assert (config.mask.count, config.mask.count * config.train.epochs) == (
        (4, 800) if fast else (1, config.train.epochs)
    )
    assert (batch, config.data.repeats) == ((512, 4) if spatiotemporal else (2048 // config.mask.count, 1))
    expected = (1.6e-3, 0.0, 5, 0.02) if spatiotemporal else (1.5e-4, 1e-5, 40, None)
    optim, masks = config.optim, config.mask.count
    rates = (optim.base_lr / masks, optim.base_min_lr / masks, optim.warmup_epochs * masks, optim.clip_grad)
    assert rates == pytest.approx(expected)
    assert (optim.weight_decay, optim.betas) == (0.05, (0.9, 0.95))
    assert f"Effective batch {batch} " in text


def effective_batch(config: PretrainConfig | FinetuneConfig, text: str) -> int:
    """On the devices that the launch command names; the file says the same in words."""
    devices = int(re.search(r"--nproc_per_node (\d+)", text)[1])
    batch = config.train.batch_size * devices * config.train.accumulate
    assert f"Effective batch {batch} " in text
    return batch


@pytest.mark.parametrize("path", [p for p in PRETRAINING if "in1k" in p.name], ids=name)
def test_the_numbers_of_image_pretraining_are_the_recipes(path: Path) -> None:
    """shared/reference/convmae_family.md section 2, pretrain v1 and Fast."""
    config, fast = load(path), "fast" in path.name
    optim, augmentation = config.optim, config.data.augmentation
    assert effective_batch(config, path.read_text()) == (512 if fast else 3072)
    assert config.train.epochs == (50 if fast else 200 if "200ep" in path.name or "_v2" in path.name else 1600)
    assert (optim.optimizer, optim.betas, optim.weight_decay) == ("adamw", (0.9, 0.95), 0.05)
    expected = (6e-4, 0.0, 10, None) if fast else (1.5e-4, 0.0, 40, None)
    assert (optim.base_lr, optim.base_min_lr, optim.warmup_epochs, optim.clip_grad) == expected
    assert (config.mask.kind, config.mask.ratio, config.data.repeats) == ("random", 0.75, 1)
    assert config.mask.count == (4 if fast else 1)
    assert (augmentation.crop, augmentation.area, augmentation.aspect) == ("random_resized", (0.2, 1.0), (0.75, 1.3333))
    assert (augmentation.flip, augmentation.interpolation) == (True, "bicubic")
    model = config.model
    size = path.stem.split("_")[2]
    assert (model.size, model.num_frames, model.image_size, model.msd) == (size, 1, (224, 224), True)
    assert [target.tokens for target in config.targets] == (["hidden", "visible"] if "_v2" in path.name else [])
    with torch.device("meta"):
        assert Autoencoder(model).target == "patch"  # --norm_pix_loss


def test_the_numbers_of_the_image_probe_are_the_recipes() -> None:
    """shared/reference/convmae_family.md section 2, linear probe."""
    path = ROOT / "configs" / "image" / "probe_in1k_base.yaml"
    config = parse(FinetuneConfig, [f"--config={path}"])
    optim, mixing, augmentation = config.optim, config.mixing, config.data.augmentation
    assert effective_batch(config, path.read_text()) == 4096
    assert (config.train.epochs, optim.warmup_epochs) == (90, 10)
    assert (optim.optimizer, optim.betas[0], optim.weight_decay, optim.layer_decay) == ("lars", 0.9, 0.0, 1.0)
    assert (optim.base_lr, optim.base_min_lr) == (0.1, 0.0)
    assert (augmentation.crop, augmentation.area, augmentation.flip) == ("random_resized", (0.08, 1.0), True)
    assert (augmentation.rand_augment, augmentation.reprob) == (None, 0.0)
    assert (mixing.mixup, mixing.cutmix, mixing.smoothing, config.model.drop_path) == (0.0, 0.0, 0.0, 0.0)
    assert (config.test.segments, config.test.crops, config.test.crop_pct) == (1, 1, 0.875)
    assert config.validate.crop_pct == 0.875
    with torch.device("meta"):
        head = build_classifier(config.model, 1000).head
    assert (head.head_init_std, head.norm.affine, head.norm.eps) == (0.01, False, 1e-6)


RECIPES = [p for p in FINETUNING if p.name.startswith("finetune") and "own" not in p.name and p.parent.name != "debug"]
RECIPES = [path for path in RECIPES if not any(family in path.name for family in LIBRARY)]


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_numbers_of_finetuning_are_the_recipes(path: Path) -> None:
    """shared/reference/convmae_family.md section 2, video_frameworks.md sections 1.2 and 1.4; of UCF101 VideoMAE's
    published command."""
    config, text = parse(FinetuneConfig, [f"--config={path}"]), path.read_text()
    nodes = int((re.search(r"--nnodes (\d+)", text) or [1, 1])[1])
    batch = config.train.batch_size * 8 * nodes * config.train.accumulate
    assert f"Effective batch {batch} " in text
    optim, mixing, augmentation = config.optim, config.mixing, config.data.augmentation
    assert (mixing.mixup, mixing.cutmix, mixing.smoothing, mixing.switch) == (0.8, 1.0, 0.1, 0.5)
    assert (augmentation.reprob, augmentation.area, optim.weight_decay) == (0.25, (0.08, 1.0), 0.05)
    assert (optim.betas, optim.warmup_epochs) == ((0.9, 0.999), 5)
    is_image, is_ssv2 = path.parent.name == "image", "ssv2" in path.name
    assert augmentation.flip is not is_ssv2
    assert (config.data.sampling == "uniform") == is_ssv2
    kind = next(kind for kind in FINETUNED if kind in path.name)
    assert FINETUNED[kind] == Finetuned(
        batch,
        config.data.repeats,
        config.train.epochs,
        optim.base_lr,
        optim.base_min_lr if not is_image else optim.base_min_lr * batch / 256,
        optim.layer_decay,
        config.model.drop_path,
        config.model.head_dropout,
        optim.clip_grad,
        augmentation.rand_augment,
        (config.test.segments, config.test.crops),
    )


class Finetuned(NamedTuple):
    batch: int
    repeats: int
    epochs: int
    base_lr: float
    base_min_lr: float  # of an image the lowest rate itself, as MAE's command line states it
    layer_decay: float
    drop_path: float
    head_dropout: float
    clip_grad: float | None
    rand_augment: str
    views: tuple[int, int]


SMALL = Finetuned(128, 2, 100, 5e-4, 1e-5, 0.7, 0.2, 0.5, None, "rand-m7-n4-mstd0.5-inc1", (5, 3))
FINETUNED = {
    "in1k": Finetuned(1024, 1, 100, 5e-4, 1e-6, 0.65, 0.1, 0.0, None, "rand-m9-mstd0.5-inc1", (1, 1)),
    "spatiotemporal": Finetuned(512, 2, 75, 4.8e-3, 8e-5, 0.65, 0.1, 0.3, 5.0, "rand-m7-mstd0.5-inc1", (7, 3)),
    "k400": Finetuned(512, 1, 100, 1e-3, 1e-6, 0.75, 0.1, 0.0, None, "rand-m7-n4-mstd0.5-inc1", (5, 3)),
    "ssv2": Finetuned(512, 1, 40, 5e-4, 1e-6, 0.75, 0.1, 0.0, None, "rand-m7-n4-mstd0.5-inc1", (2, 3)),
    "ucf101": SMALL,
    "hmdb51": SMALL._replace(epochs=50, views=(10, 3)),  # EVEREST's; the rest is VideoMAE's for UCF101
}


@pytest.mark.parametrize(
    "path", [p for p in FINETUNING if p.parent.name == "video" and ("k400" in p.name or "ssv2" in p.name)], ids=name
)
def test_the_classes_are_those_of_the_data_set(path: Path) -> None:
    """However few of them a list has; so a flip is an error where they name left and right, not only a warning."""
    few = Records([Record("a.mp4", 3)])
    config = parse(FinetuneConfig, [f"--config={path}"])
    assert count_classes(config.data, few) == (174 if "ssv2" in path.name else 400)
    flipped = parse(FinetuneConfig, [f"--config={path}", "--data.augmentation.flip"])
    with pytest.raises(ListError, match="name left or right") if "ssv2" in path.name else nullcontext():
        count_classes(flipped.data, few)


def test_something_something_is_never_flipped() -> None:
    for path in [*PRETRAINING, *FINETUNING]:
        kind = PretrainConfig if path in PRETRAINING else FinetuneConfig
        if "ssv2" in path.name:
            assert parse(kind, [f"--config={path}"]).data.augmentation.flip is False


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--model.sise=tiny", "model.sise"),
        ("--optim.lr=fast", "optim.lr"),
        ("--train.precision=fp8", "train.precision"),
        ("--data.augmentation.crop=none", "data.augmentation.crop"),
        ("--mask.kind=holes", "mask.kind"),
        ("--train.epoch=3", "train.epoch; did you mean train.epochs?"),
        ("--base_lr=3", "base_lr; did you mean optim.base_lr?"),
    ],
)
def test_unknown_fields_and_wrong_types_are_errors(argument: str, named: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        load(ROOT / "configs" / "debug" / "pretrain.yaml", argument)
    assert named in capsys.readouterr().err


def test_an_unknown_field_in_a_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output: runs/x\ndata: {train: a.txt}\nmodel: {sizes: base}\n")
    with pytest.raises(SystemExit):
        load(path)
    assert "sizes" in capsys.readouterr().err


def test_edits_replace_single_fields_and_the_resolved_file_reads_back(tmp_path: Path) -> None:
    path = ROOT / "configs" / "video" / "pretrain_k400_base.yaml"
    config = load(path, "--optim.lr=1e-3", "--model.image_size=[192,256]")
    assert config.optim.lr == 1e-3
    assert config.optim.base_lr == 1.5e-4
    assert config.model.image_size == (192, 256)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    assert load(tmp_path / "config.yaml") == config
    assert from_plain(PretrainConfig, to_plain(config)) == config


def test_every_field_is_explained(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(PretrainConfig, ["--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    fields = fields_of(PretrainConfig)
    for name, field in fields.items():
        assert field.explanation
        assert f"--{name} {field.explanation} (" in text
    for name in ("model.msd", "optim.base_lr", "train.on_nonfinite", "data.max_bad_fraction", "mask.ratio"):
        assert len(fields[name].explanation.split()) > 3, name


def test_a_model_configuration_says_what_it_overrides() -> None:
    config = AutoencoderConfig(size="tiny", num_frames=8, image_size=64, strides=(2, 2, 2), decoder=(48, 1, 3))
    model = Autoencoder(config)
    assert model.grid == (4, 8, 8)
    assert model.decoder.mask_token.numel() == 48
    assert model.target == "patch_channel"


@pytest.mark.parametrize(("frames", "source"), [(1, "images"), (4, "list.txt")])
def test_pretraining_starts_from_a_finetuned_classifier(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, frames: int, source: str
) -> None:
    """A released ConvViT has learnt positions, and an autoencoder fixed ones: they are left out as the error says."""
    classifier = create_classifier("tiny", num_classes=5, num_frames=1, image_size=32)
    torch.nn.init.normal_(classifier.encoder.positions)
    torch.save({"model": to_format(classifier, "convmae")}, tmp_path / "convvit.pth")
    edits = (
        f"--init.weights={tmp_path / 'convvit.pth'}",
        f"--data.train={videos / source}",
        f"--data.root={videos}",
        f"--data.format={'image' if frames == 1 else 'video'}",
        f"--output={tmp_path / 'run'}",
        f"--model.num_frames={frames}",
        "--model.image_size=32",
        "--data.workers=0",
        "--train.epochs=1",
        "--optim.lr=0",
        "--device=cpu",
    )
    path = ROOT / "configs" / "debug" / "pretrain.yaml"
    with pytest.raises(ValueError, match="pos_embed is not the fixed sincos table") as error:
        pretrain(load(path, *edits))
    option, value = re.search(r"(--init.exclude) (\[positions\])", str(error.value)).groups()
    assert pretrain(load(path, *edits, f"{option}={value}")) == 2
    assert "excluded as asked: positions" in capsys.readouterr().out
    trained = load_state(tmp_path / "run")["model"]
    name = "encoder.attention_blocks.0.mlp.fc1.weight"
    assert torch.equal(trained[name], classifier.state_dict()[name])


def test_a_video_run_starts_from_image_weights(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(7)
    image = create_autoencoder("tiny", num_frames=1, image_size=32)
    checkpoint.save_checkpoint(tmp_path, 1, {"model": image.state_dict(), "config": {}})
    config = load(
        ROOT / "configs" / "debug" / "pretrain.yaml",
        f"--init.weights={tmp_path / 'step_00000001'}",
        f"--data.train={videos / 'list.txt'}",
        f"--data.root={videos}",
        f"--output={tmp_path / 'run'}",
        "--model.image_size=32",
        "--data.workers=0",
        "--device=cpu",
        "--optim.lr=0",
    )
    pretrain(config)
    assert "inflated: depthwise kernels over 3 frames (center)" in capsys.readouterr().out
    video = load_state(tmp_path / "run")["model"]
    name = "encoder.attention_blocks.0.mlp.fc1.weight"
    assert torch.equal(video[name], image.state_dict()[name])
    shutil.rmtree(tmp_path / "step_00000001")  # a resumed run does not need its initial weights
    assert pretrain(config) == 4


def test_the_numbers_of_detection_are_the_recipes() -> None:
    """shared/reference/convmae_family.md section 3; steps on the 117,266 pictures with objects of COCO's train2017."""
    recipes = {
        "det_base": (8e-5, 1.0, 32, 92_187, 461, "shared", 16, (0, 3, 6, 10), "max_pool", "batch", True),
        "vitdet_base": (1e-4, 0.8, 16, 184_375, 250, "decomposed", 14, (1, 4, 7, 10), "simple", "channel", False),
    }
    for stem, expected in recipes.items():
        path = ROOT / "configs" / "detection" / f"{stem}.yaml"
        config = parse(TrainDetectionConfig, [f"--config={path}"])
        optim, model, augmentation = config.optim, config.model, config.data.augmentation
        batch = effective_batch(config, path.read_text())
        per_epoch = 117_266 // batch
        steps, warmup = round(config.train.epochs * per_epoch), round(optim.warmup_epochs * per_epoch)
        form = (model.relative_positions, model.window, model.global_blocks, model.pyramid, model.head_norm)
        assert (optim.lr, optim.layer_decay, batch, steps, warmup, *form, augmentation.pad) == expected
        assert (optim.weight_decay, optim.betas, model.drop_path) == (0.1, (0.9, 0.999), 0.1)
        assert (model.relative_size, model.pyramid_width, model.proposals) == (1024, 256, 512)
        assert (augmentation.size, augmentation.scales, augmentation.flip) == (1024, (0.1, 2.0), True)
        assert (augmentation.test_shortest, augmentation.test_longest) == (1024, 1024)
        drops = [round(share * steps) for share in optim.milestones]
        assert drops == ([163_889, 177_546] if stem == "vitdet_base" else [])
        with torch.device("meta"):
            detector = Detector(model, 80)
        # Published: 104 M. The first has positions of 64 x 64 tokens, the second of 14 x 14.
        parameters = {"det_base": 110_175_884, "vitdet_base": 109_704_372}[stem]
        assert sum(p.numel() for p in detector.parameters()) == parameters
        assert model.grid[1:] == {"det_base": (64, 64), "vitdet_base": (14, 14)}[stem]
