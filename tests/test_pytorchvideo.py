"""pytorchvideo's models as baselines: the library's own logits, its published files, and the usual commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from clips import encode
from processes import ENVIRONMENT, torchrun
from states import load_state
from torch import Tensor, nn

from video_convmae import read_frames
from video_convmae.cli import main
from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.config import EvaluateConfig, FinetuneConfig
from video_convmae.data.sampling import dense_views
from video_convmae.engine.features import read_features
from video_convmae.engine.optim import parameter_groups
from video_convmae.engine.parallel import SyncedBatchNorm, _synchronise_batch_norms
from video_convmae.engine.tasks import Classification
from video_convmae.errors import Note
from video_convmae.models.pytorchvideo import LibraryClassifier
from video_convmae.models.sizes import LIBRARY, LIBRARY_MODELS, ClassifierConfig
from video_convmae.predictor import load
from video_convmae.weights.formats import read_weights
from video_convmae.weights.formats.pytorchvideo import PROTOCOLS, preprocessing
from video_convmae.weights.load import load_weights, model_from

pytest.importorskip("pytorchvideo.models", reason="pytorchvideo is not installed (pip install -e '.[baselines]')")
ROOT = Path(__file__).parent.parent
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LIBRARY_MODELS if name != "x3d_xs"]


def library(name: str, **arguments: Any) -> Any:
    """The library's own model in evaluation mode, with random weights that no normalisation hides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorchvideo.models import hub

        torch.manual_seed(0)
        net = getattr(hub, name)(**arguments)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1)  # published training starts some at 0
    return net.eval()


def command(*words: str) -> int:
    with mock.patch.object(sys, "argv", ["video-convmae"]):
        return main(*words)


def published(net: nn.Module, path: Path) -> Path:
    torch.save({"model_state": net.state_dict()}, path)
    return path


def inputs(name: str, clips: Tensor) -> Any:
    """What the library takes: of SlowFast, the frames of both pathways."""
    if not name.startswith("slowfast"):
        return clips
    frames = clips.shape[2]
    return [clips[:, :, torch.linspace(0, frames - 1, frames // 4).long()], clips]


@pytest.fixture(scope="module")
def x3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = library("x3d_xs", model_num_class=5)
    nn.init.normal_(net.blocks[-1].proj.weight, std=0.5)  # scores far from one another
    return published(net, tmp_path_factory.mktemp("weights") / "X3D_XS.pyth")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(4):
        encode(folder / f"{i}.mp4", 60 + 3 * i, size=(182, 260), seed=i)
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i}\n" for i in range(4)))
    return folder


# The model


@pytest.mark.parametrize("name", ["x3d_xs", *SLOW])
def test_a_published_file_gives_the_librarys_output(name: str, tmp_path: Path) -> None:
    """Logits bit for bit; where the library ends with a softmax, its probabilities."""
    net = library(name)
    model, report = model_from(published(net, tmp_path / f"{name}.pyth"))
    assert report.missing == report.unexpected == report.assumed == ()
    assert model.config.size == LIBRARY + name
    assert model.config.image_size == (PROTOCOLS[name].crop,) * 2
    clips = torch.randn(1, *model.config.clip_shape)
    with torch.inference_mode():
        theirs, logits = net(inputs(name, clips)), model.eval()(clips)
        places = -(-PROTOCOLS[name].crop // 32) - -(-LIBRARY_MODELS[name].image_size // 32)
        if name.startswith(("x3d", "r2plus1d")):
            assert places > 0  # the published crop is seen at several places
            torch.testing.assert_close(logits.softmax(dim=1), theirs, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(logits, theirs)


def test_logits_at_one_place_are_bit_equal_without_the_softmax(x3d: Path) -> None:
    model = LibraryClassifier(ClassifierConfig(size="pytorchvideo/x3d_xs", num_frames=0, image_size=0), 5).eval()
    load_weights(model, x3d)
    net = library("x3d_xs", model_num_class=5)
    net.load_state_dict(torch.load(x3d, weights_only=True)["model_state"])
    net.blocks[-1].activation = None
    clips = torch.randn(2, 3, 4, 160, 160)
    with torch.inference_mode():
        assert torch.equal(model(clips), net(clips))
        assert torch.equal(model.projection(model.pooled(clips)), net(clips))


def test_slowfast_makes_both_pathways_of_one_clip() -> None:
    """At small clips too: the pooling is as large as they allow."""
    from pytorchvideo.models.slowfast import create_slowfast

    config = ClassifierConfig(size="pytorchvideo/slowfast_r50", num_frames=8, image_size=64)
    model = LibraryClassifier(config, 5).eval()
    net = create_slowfast(model_num_class=5, head_pool_kernel_sizes=((2, 2, 2), (8, 2, 2))).eval()
    load_weights(model, {"model_state": net.state_dict()})
    clips = torch.randn(1, 3, 8, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(clips), net([clips[:, :, [0, 7]], clips]))


@pytest.mark.slow
def test_multiply_adds_are_the_published_ones() -> None:
    """MViT's row of the library's table; the convolutional ones were counted without norms there."""
    published = {"mvit_base_16x4": (0, 70.80, 0.01), "slowfast_r50": (256, 65.71, 0.02), "slow_r50": (256, 54.52, 0.02)}
    for name, (pixels, giga, close) in published.items():
        config = ClassifierConfig(size=LIBRARY + name, num_frames=0, image_size=pixels)
        assert LibraryClassifier(config, 400).multiply_adds()["net"] / 1e9 == pytest.approx(giga, rel=close)


def test_weight_decay_of_mvit_follows_the_published_configuration() -> None:
    """PySlowFast: ZERO_WD_1D_PARAM is True, ZERO_DECAY_POS_CLS False."""
    model = LibraryClassifier(ClassifierConfig(size="pytorchvideo/mvit_base_16x4", num_frames=4, image_size=64), 5)
    decayed, _ = parameter_groups(model.named_parameters(), 0.05)
    own = {id(parameter) for parameter in decayed["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    tables = ("cls_token", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class")
    assert {f"net.cls_positional_encoding.{name}" for name in tables} <= names
    assert names == {name for name, parameter in model.named_parameters() if parameter.ndim > 1}


def test_every_batch_norm_is_synchronised_between_processes() -> None:
    model = LibraryClassifier(ClassifierConfig(size="pytorchvideo/x3d_xs", num_frames=4, image_size=32), 5)
    names = model.state_dict().keys()
    norms = sum(isinstance(module, nn.BatchNorm3d) for module in model.modules())
    _synchronise_batch_norms(model)
    assert norms == sum(isinstance(module, SyncedBatchNorm) for module in model.modules()) > 10
    assert model.state_dict().keys() == names


# Files


def test_files_that_differ_in_nothing_are_told_by_their_name_or_assumed(x3d: Path, tmp_path: Path) -> None:
    assert read_weights(x3d).size == "pytorchvideo/x3d_xs"
    state = torch.load(x3d, weights_only=True)["model_state"]
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "weights.pt")
    weights = read_weights(tmp_path / "weights.pt")  # a plain state dict
    assert (weights.size, weights.guessed) == ("pytorchvideo/x3d_m", True)
    with pytest.warns(Note, match="assumed: pytorchvideo/x3d_m: X3D-XS, S and M have the same shapes"):
        predictor = load(tmp_path / "weights.pt")
    assert predictor.config.data.mean == (0.45, 0.45, 0.45)
    assert predictor.config.data.std == (0.225, 0.225, 0.225)
    assert (predictor.config.test.segments, predictor.config.test.crops) == (10, 3)


def test_every_tensor_has_its_place_and_the_head_is_the_last_layer() -> None:
    """MViT's blocks have projections of their own."""
    net = library("mvit_base_16x4", head_num_classes=5)
    weights = read_weights({"model_state": net.state_dict()})
    assert len(weights.tensors) == len(net.state_dict())
    assert {name for name in weights.tensors if name.startswith("head.")} == {"head.weight", "head.bias"}
    assert torch.equal(weights.tensors["head.weight"], net.head.proj.weight)
    model, report = model_from(weights)
    assert report.missing == report.unexpected == ()
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in model.net.state_dict().items())


def test_the_stride_is_nearest_to_the_published_frames() -> None:
    strides = {name: preprocessing(LIBRARY + name)["data.stride"] for name in PROTOCOLS}
    assert strides | {"slow_r50": 9, "x3d_xs": 16, "x3d_m": 5, "mvit_base_16x4": 4, "slowfast_r50": 2} == strides
    assert PROTOCOLS.keys() == LIBRARY_MODELS.keys()


def test_evaluation_is_the_librarys_recipe(x3d: Path, videos: Path, tmp_path: Path) -> None:
    """Two clips of each video, frames spread evenly; three crops of the short side; softmax, then the mean."""
    options = ["--segments=2", "--precision=fp32", "--workers=0", "--device=cpu", "--reader=pyav"]
    (tmp_path / "two.txt").write_text("0.mp4 0\n1.mp4 1\n")
    where = [f"--weights={x3d}", f"--list={tmp_path / 'two.txt'}", f"--root={videos}", f"--output={tmp_path}"]
    metrics = evaluate(parse(EvaluateConfig, [*where, *options]))
    assert (metrics["scored"], metrics["views"]) == (2, [2, 3])
    net = library("x3d_xs", model_num_class=5)
    net.load_state_dict(torch.load(x3d, weights_only=True)["model_state"])
    with np.load(tmp_path / "scores.npz") as file:
        scores = file["scores"]
    assert np.ptp(scores, axis=1).min() > 0.1
    for i in range(2):
        frames = torch.from_numpy(read_frames(videos / f"{i}.mp4")).permute(3, 0, 1, 2) / 255  # (C, T, H, W)
        views = []
        for start in (0, frames.shape[1] - 49):
            clip = frames[:, start + torch.linspace(0, 48, 4).long()]
            views += [clip[..., left : left + 182] for left in (0, 39, 78)]
        with torch.inference_mode():
            theirs = net((torch.stack(views) - 0.45) / 0.225).mean(dim=0)
        np.testing.assert_allclose(scores[i], theirs, rtol=1e-4, atol=1e-6)
    assert (dense_views(60, 4, 16, 2)[:, 0] == [0, 11]).all()


def test_weights_that_do_not_fit_are_one_line(x3d: Path, tmp_path: Path) -> None:
    def config(size: str) -> ClassifierConfig:
        return ClassifierConfig(size=size, num_frames=4, image_size=32)

    with pytest.raises(ValueError, match=r"set --model.size pytorchvideo/x3d_xs and its clip, --model.num_frames 4"):
        load_weights(LibraryClassifier(config("pytorchvideo/slow_r50"), 5), x3d)
    from video_convmae import create_classifier

    ours = create_classifier("tiny", num_classes=5, num_frames=4, image_size=32)
    with pytest.raises(ValueError, match=r"expected --model\.size pytorchvideo/x3d_xs to finetune"):
        load_weights(ours, x3d)
    with pytest.raises(ValueError, match="expected weights of that library"):
        load_weights(LibraryClassifier(config("pytorchvideo/x3d_xs"), 5), ours)
    state = torch.load(x3d, weights_only=True)["model_state"]
    torch.save({"blocks.0.conv.weight": state["blocks.0.conv.conv_t.weight"]}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no model of pytorchvideo that is known here"):
        read_weights(tmp_path / "other.pth")


# The commands


def arguments(videos: Path, output: Path, *edits: str) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'debug' / 'finetune.yaml'}",
        f"--data.train={videos / 'list.txt'}",
        f"--data.validation={videos / 'list.txt'}",
        f"--data.root={videos}",
        "--data.reader=pyav",
        "--data.workers=0",
        "--data.mean=[0.45,0.45,0.45]",
        "--data.std=[0.225,0.225,0.225]",
        "--data.augmentation.rand_augment=null",
        "--model.size=pytorchvideo/x3d_xs",
        "--model.image_size=32",
        "--optim.layer_decay=1",
        "--device=cpu",
        f"--output={output}",
        *edits,
    ]


def run(videos: Path, output: Path, *edits: str) -> int:
    return finetune(parse(FinetuneConfig, arguments(videos, output, *edits)))


def test_a_run_resumes_exactly_and_is_evaluated(
    x3d: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = (f"--init.weights={x3d}", "--train.ema=0.9", "--model.head_dropout=0.5", "--train.save_every=1")
    edits += ("--validate.every=10",)
    run(videos, tmp_path / "whole", *edits)
    assert "the head is new: 5 classes in the file, 4 in the model" in capsys.readouterr().out

    step, seen = Classification.__call__, []

    def interrupted(self: Classification, batch: Any) -> Any:
        seen.append(batch)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Classification, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(videos, tmp_path / "cut", *edits)
    monkeypatch.undo()
    run(videos, tmp_path / "cut", *edits)
    whole, cut = (load_state(tmp_path / name) for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 4
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, cut[part][name]) for name, tensor in whole[part].items())

    config = [f"--weights={tmp_path / 'cut'}", "--device=cpu", "--workers=0", "--segments=1", "--crops=1"]
    metrics = evaluate(parse(EvaluateConfig, [*config, f"--output={tmp_path / 'test'}"]))
    assert (metrics["scored"], metrics["views"]) == (4, [1, 1])
    assert read_weights(tmp_path / "cut" / "checkpoints" / "best").size == "pytorchvideo/x3d_xs"  # starts another run


@pytest.mark.slow
def test_a_published_file_predicts_and_gives_features(
    x3d: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("predict", str(x3d), str(videos / "0.mp4"), "--device=cpu", "--top=2") == 0
    assert capsys.readouterr().out.count("%") == 2
    listed = [f"--list={videos / 'list.txt'}", f"--root={videos}", f"--output={tmp_path}"]
    assert command("features", f"--weights={x3d}", *listed, "--device=cpu", "--workers=0") == 0
    table = read_features(tmp_path / "features.npz")
    assert table.features.shape == (4, 2048)
    assert "last linear layer" in table.about["source"]


@pytest.mark.slow
def test_one_and_two_processes_agree(x3d: Path, videos: Path, tmp_path: Path) -> None:
    """Losses, running statistics included; and the bytes of an evaluation."""
    losses, predictions = [], []
    for count in (1, 2):
        folder = tmp_path / str(count)
        edits = [
            "--train.effective_batch=4",
            "--train.batch_size=4",
            "--mixing.mixup=0",
            "--mixing.cutmix=0",
            f"--init.weights={x3d}",
        ]
        program = torchrun(count, "-m", "video_convmae", "finetune", *arguments(videos, folder, *edits))
        program.append("--data.augmentation.reprob=0")
        done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        options = [f"--weights={tmp_path / '1'}", f"--output={folder / 'test'}", "--device=cpu", "--workers=0"]
        done = subprocess.run(torchrun(count, "-m", "video_convmae", "evaluate", *options), env=ENVIRONMENT)
        assert done.returncode == 0
        predictions.append((folder / "test" / "predictions.csv").read_bytes())
    (first, second), (also_first, also_second) = losses
    assert first == pytest.approx(also_first, rel=1e-5)
    assert second == pytest.approx(also_second, rel=1e-3)  # Adam's first step is the gradients' signs
    assert predictions[0] == predictions[1]


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        (["--model.size=pytorchvideo/x3d"], "expected pytorchvideo/ and one of c2d_r50, "),
        (["--model.size=pytorchvideo/mvit_base_16x4", "--model.image_size=100"], "32 pixels with pytorchvideo/mvit"),
        (["--model.size=pytorchvideo/slowfast_r50", "--model.num_frames=6"], "expected multiples of 4 frames"),
        (["--model.probe=linear"], "probe is 'linear' and size pytorchvideo/x3d_xs; expected None"),
        (["--model.pool=motion"], "pool is 'motion' and size"),
        (["--model.drop_path=0.1"], "drop_path is 0.1 and size"),
        (["--optim.layer_decay=0.75"], "optim.layer_decay is 0.75 and model.size pytorchvideo/x3d_xs; expected 1"),
        (["--train.compile"], "train.compile is True and model.size"),
        (
            ["--data.multi_label=true"],
            "x3d_xs, which ends with a softmax over the classes; expected a model without one",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(
    edits: list[str], said: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        run(videos, tmp_path, *edits)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_commands_for_tokens_refuse_it_in_one_line(
    x3d: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    where = [f"--list={videos / 'list.txt'}", f"--root={videos}", f"--output={tmp_path}", "--device=cpu"]
    pretrain = ["--config", "debug/pretrain", "--data.train", str(videos / "list.txt")]
    for words, said in (
        (["features", f"--weights={x3d}", "--kind=tokens", *where], "expected pooled: ours alone have tokens"),
        (["show-features", str(x3d), str(videos / "0.mp4"), f"--output={tmp_path / 'a.png'}"], "expected one of ours"),
        (["convert", str(x3d), str(tmp_path / "a.safetensors")], "has one format alone"),
        (["pretrain", *pretrain, "--model.size=pytorchvideo/x3d_m"], "models of pytorchvideo only classify"),
    ):
        with suppress(SystemExit):
            assert command(*words) != 0
        error = capsys.readouterr().err.strip()
        assert said in error.splitlines()[-1]


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorchvideo", "pytorchvideo.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=re.escape("pip install 'video-convmae[baselines]'")):
        LibraryClassifier(ClassifierConfig(size="pytorchvideo/x3d_xs"), 5)


@pytest.mark.parametrize("name", ["k400_mvit_base", "k400_slowfast_r50", "k400_x3d_m"])
def test_the_shipped_configurations_state_the_published_clips(name: str) -> None:
    config = parse(FinetuneConfig, [f"--config=video/finetune_{name}"])
    stated = preprocessing(config.model.size)
    known = LIBRARY_MODELS[config.model.size.removeprefix(LIBRARY)]
    assert (config.data.mean, config.data.std) == (tuple(stated["data.mean"]), tuple(stated["data.std"]))
    assert config.data.stride == stated["data.stride"]
    assert (config.model.num_frames, config.model.image_size) == (known.num_frames, (known.image_size,) * 2)
    test = [stated[f"test.{field}"] for field in ("segments", "crops", "crop_pct")]
    assert [config.test.segments, config.test.crops, config.test.crop_pct] == test
    text = (ROOT / "configs" / "video" / f"finetune_{name}.yaml").read_text()
    assert f"published: {PROTOCOLS[config.model.size.removeprefix(LIBRARY)].top1:.2f} top-1" in text
    written = yaml.safe_load(text)
    assert written["model"]["size"] == config.model.size


@pytest.mark.slow
def test_the_benchmark_compares_them(tmp_path: Path) -> None:
    small = ["--size=tiny", "--frames=4", "--image-size=32", "--repeats=1", "--warmup=0", "--threads=1", "--batch=1"]
    file = tmp_path / "models.json"
    others = ["--vs", "vit_tiny", "pytorchvideo/x3d_xs"]
    assert command("benchmark", "models", *small, *others, f"--json={file}") == 0
    result = json.loads(file.read_text())
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == ["tiny", "vit_tiny", "pytorchvideo/x3d_xs"]
    assert rows["pytorchvideo/x3d_xs"]["test_clip"] == [4, 182]
    assert all(row[task]["clips_per_second"] > 0 for row in rows.values() for task in ("finetune", "test"))
