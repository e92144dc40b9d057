"""Targets beside pixels: heads and losses, teachers and their features, runs that learn from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from clips import pictures
from PIL import Image
from safetensors.torch import save_file
from states import load_state
from torch import Tensor, nn

from video_convmae import create_autoencoder, masking
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import PretrainConfig
from video_convmae.engine.options import TargetConfig
from video_convmae.engine.teachers import Teacher, load_own, load_teacher, load_timm
from video_convmae.errors import UserError
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.sizes import AutoencoderConfig, EncoderConfig, FeatureTarget
from video_convmae.models.targets import feature_loss
from video_convmae.runs import load_autoencoder
from video_convmae.visualize.reconstruct import reconstruct_clips
from video_convmae.weights.load import load_weights

VIDEO = {"size": "tiny", "num_frames": 4, "image_size": 64}
GRID = (2, 4, 4)
TARGETS = (
    FeatureTarget("mimic", 5, "visible"),
    FeatureTarget("early", 6, "visible", layer=1, loss="cosine"),
    FeatureTarget("late", 6, "visible", layer=2),
    FeatureTarget("hidden", 7, "hidden"),
)


def model_with(targets: tuple[FeatureTarget, ...] = TARGETS, pixels: bool = True, **options: object) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(**{**VIDEO, **options}), targets, pixels)


def features_of(targets: tuple[FeatureTarget, ...] = TARGETS, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {each.name: torch.randn(batch, 32, each.width, generator=generator) for each in targets}


def clips_and_masks(masks: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    visible = torch.stack([masking.draw("random", GRID, 0.75, None, generator, masks)[0] for _ in range(2)])
    return torch.randn(2, 3, 4, 64, 64, generator=generator), visible


# The model


def test_without_other_targets_names_and_values_are_those_of_pixels_alone() -> None:
    clips, visible = clips_and_masks()
    model, plain = model_with(()), create_autoencoder(**VIDEO)
    assert not any("feature" in name for name in model.state_dict())
    plain.load_state_dict(model.state_dict())
    output = model(clips, visible)
    assert torch.equal(output.loss, (output.prediction - output.target).square().mean())
    assert len(output) == 4  # loss, prediction, target, tokens
    assert model(clips, visible, weights={"pixels": 1.0}).losses == {"pixels": output.loss}
    assert torch.equal(output.loss, plain(clips, visible).loss)


@pytest.mark.parametrize("implementation", ["packed", "dense"])
def test_the_loss_is_the_weighted_sum_and_every_parameter_learns(implementation: str) -> None:
    clips, visible = clips_and_masks()
    model = model_with(implementation=implementation)
    weights = {"mimic": 2.0, "early": 0.5, "pixels": 0.25}
    output = model(clips, visible, features=features_of(), weights=weights)
    assert list(output.losses) == ["pixels", "mimic", "early", "late", "hidden"]
    total = sum(weights.get(name, 1) * loss for name, loss in output.losses.items())
    assert torch.allclose(output.loss, total)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    dense = model_with(implementation="dense" if implementation == "packed" else "packed")
    dense.load_state_dict(model.state_dict())
    for name, loss in dense(clips, visible, features=features_of()).losses.items():
        assert torch.allclose(loss, output.losses[name], rtol=1e-5)


def test_targets_at_hidden_tokens_share_the_decoder_but_for_its_last_block() -> None:
    own = {name for name in model_with(()).state_dict() if name.startswith("decoder.")}
    names = {name for name in model_with((TARGETS[3],)).state_dict() if "feature" in name}
    last = {name for name in own if name.startswith("decoder.blocks.1.")}
    assert len(names) == len(last) + 4  # norm and head
    assert model_with(TARGETS).multiply_adds(8)["decoder"] > model_with(()).multiply_adds(8)["decoder"]


@pytest.mark.parametrize(("target", "trained"), [("hidden", "decoder.blocks.0."), ("mimic", "decoder.none")])
def test_without_pixels_nothing_of_the_decoder_is_trained_for_them(target: str, trained: str) -> None:
    clips, visible = clips_and_masks()
    targets = tuple(each for each in TARGETS if each.name == target)
    model = model_with(targets, pixels=False)
    output = model(clips, visible, features=features_of())
    assert output.loss is output.losses[target]
    assert output.prediction.shape[1] == output.target.shape[1] == 0
    output.loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    learnt = [name for name, p in model.named_parameters() if p.requires_grad and name.startswith("decoder.")]
    assert any(name.startswith(trained) for name in learnt) == bool(learnt)
    assert not any(name.startswith(("decoder.blocks.1.", "decoder.prediction")) for name in learnt)


@pytest.mark.parametrize("decoder_ratio", [None, 0.5])
def test_several_masks_are_so_many_passes(decoder_ratio: float | None) -> None:
    clips, visible = clips_and_masks(masks=3)
    predicted = None
    if decoder_ratio is not None:
        predicted = torch.stack([torch.stack([masking.running_cell(m, 0.5) for m in masks]) for masks in visible])
    model, features = model_with(), features_of()
    together = model(clips, visible, predicted, features).losses
    apart = [
        model(clips, visible[:, i], None if predicted is None else predicted[:, i], features).losses for i in range(3)
    ]
    for name, loss in together.items():
        assert torch.allclose(loss, torch.stack([each[name] for each in apart]).mean(), rtol=1e-5), name


@pytest.mark.parametrize("implementation", ["packed", "dense"])
def test_hidden_pixels_reach_no_prediction(implementation: str) -> None:
    """But for the target itself: a teacher sees the whole clip, as it should."""
    clips, visible = clips_and_masks()
    model, features = model_with(implementation=implementation), features_of()
    pixels = visible.repeat_interleave(2, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)[:, None]
    before = model(clips, visible, features=features).losses
    after = model(torch.where(pixels, clips, torch.nan), visible, features=features).losses
    assert after["pixels"].isnan()
    for each in TARGETS:
        assert torch.equal(before[each.name], after[each.name]), each.name


def test_each_token_is_compared_with_the_features_of_its_place() -> None:
    clips, visible = clips_and_masks()
    model, features = model_with(TARGETS[:1] + TARGETS[3:]), features_of()
    before = model(clips, visible, features=features).losses
    shown = visible.flatten(1)[..., None]
    others = {name: torch.where(shown, each, each + torch.randn(each.shape)) for name, each in features.items()}
    after = model(clips, visible, features=others).losses
    assert torch.equal(before["mimic"], after["mimic"])
    assert not torch.equal(before["hidden"], after["hidden"])
    others = {name: torch.where(shown, each + torch.randn(each.shape), each) for name, each in features.items()}
    after = model(clips, visible, features=others).losses
    assert torch.equal(before["hidden"], after["hidden"])
    assert not torch.equal(before["mimic"], after["mimic"])


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
def test_a_teachers_scale_and_offset_do_not_matter(loss: str) -> None:
    features, prediction = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    assert torch.allclose(
        feature_loss(prediction, features, loss), feature_loss(prediction, 7 * features + 3, loss), atol=1e-4
    )
    normalised = (features - features.mean(-1, keepdim=True)) / features.std(-1, correction=0, keepdim=True)
    assert feature_loss(normalised, features, loss) == pytest.approx(0, abs=1e-4)
    assert feature_loss(prediction.bfloat16(), features, loss).dtype == torch.float32


def test_impossible_targets_of_a_model_are_errors() -> None:
    for target, message in (
        (FeatureTarget("pixels", 3), "is named 'pixels'"),
        (FeatureTarget("keys", 3), "is named 'keys'"),
        (FeatureTarget("x", 3, "visible", layer=3), "is 3; expected 1 to 2, a convolutional stage, or none"),
    ):
        with pytest.raises(ValueError, match=message):
            model_with((target,))
    with pytest.raises(ValueError, match="has no target"):
        model_with((), pixels=False)
    clips, visible = clips_and_masks()
    with pytest.raises(ValueError, match="features of the target mimic are missing; expected"):
        model_with()(clips, visible)
    with pytest.raises(ValueError, match=r"mimic are \(1, 32, 5\); expected .* = \(2, 32, 5\)"):
        model_with()(clips, visible, features=features_of(batch=1))


# Teachers


class Means(nn.Module):
    """Means over the pixels of 16 x 16 patches and over pairs of frames; of one frame, of that."""

    def forward(self, clips: Tensor) -> Tensor:
        return nn.functional.avg_pool3d(clips, (min(2, clips.shape[2]), 16, 16))


def means_teacher(size: int, frames: int | None) -> Teacher:
    return Teacher(Means(), 3, ((0.5,) * 3, (0.25,) * 3), (size, size), frames, "means")


STUDENT = EncoderConfig(**VIDEO)


def patch_means(clips: Tensor, *frames: int) -> Tensor:
    """Normalised means over the given frames of every token, `(B, N, 3)`."""
    means = clips.unflatten(2, (2, 2))[:, :, :, list(frames)].mean(3)
    means = means.unflatten(3, (4, 16)).unflatten(5, (4, 16)).mean(dim=(4, 6))
    return ((means - 0.5) / 0.25).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("frames", "every", "expected"), [(1, False, (1,)), (1, True, (0, 1)), (4, False, (0, 1)), (None, False, (0, 1))]
)
def test_features_stand_at_the_tokens_that_they_are_of(
    frames: int | None, every: bool, expected: tuple[int, ...]
) -> None:
    clips = torch.rand(2, 3, 4, 64, 64)
    features = means_teacher(64, frames).features(clips, STUDENT, every)
    assert torch.allclose(features, patch_means(clips, *expected), atol=1e-5)


def test_input_and_tokens_are_resampled() -> None:
    """A clip that brightens over space and time, seen by teachers of other sizes: the middle of the grid agrees."""
    ramp = (torch.arange(64.0)[None, :] + 0.5 * torch.arange(64.0)[:, None]).div(128).expand(1, 3, 4, 64, 64)
    clips = ramp + 0.05 * torch.arange(4.0)[:, None, None]
    expected = patch_means(clips, 0, 1).unflatten(1, GRID)
    for size, frames in ((128, 4), (32, 8), (96, 2)):
        features = means_teacher(size, frames).features(clips, STUDENT).unflatten(1, GRID)
        assert features.shape == expected.shape
        assert torch.allclose(features[:, :, 1:3, 1:3].mean(1), expected[:, :, 1:3, 1:3].mean(1), atol=0.05), size
    still = clips[:, :, :1].expand(-1, -1, 4, -1, -1)
    image = means_teacher(32, 1).features(still, STUDENT).unflatten(1, GRID)
    assert torch.equal(image[:, 0], image[:, 1])


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of timm's, as a file."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("teachers") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), path)
    return path


def test_a_timm_model_gives_its_patch_tokens(vit: Path) -> None:
    model = timm.create_model("test_vit", num_classes=7).eval()
    teacher = load_timm("test_vit", None if vit is None else str(vit))
    model.load_state_dict(load_state_of(vit))
    assert (teacher.size, teacher.frames, teacher.width) == ((160, 160), 1, 64)
    images = torch.rand(2, 3, 1, 160, 160)
    student = EncoderConfig(size="tiny", num_frames=1, image_size=160)
    with torch.no_grad():
        expected = model.forward_features((images.squeeze(2) - 0.5) / 0.5)[:, model.num_prefix_tokens :]
    assert torch.allclose(teacher.features(images, student), expected, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training
    smaller = load_timm("test_vit", str(vit), image_size=64)
    assert smaller.features(torch.rand(1, 3, 4, 64, 64), STUDENT).shape == (1, 32, 64)


def load_state_of(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_a_folder_of_hugging_faces_gives_what_transformers_gives(tmp_path: Path) -> None:
    from transformers import VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

    torch.manual_seed(4)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "tubelet_size": 2, "patch_size": 16}
    videomae = VideoMAEConfig(
        **sizes, image_size=64, num_frames=4, intermediate_size=96, use_mean_pooling=False, layer_norm_eps=1e-6
    )
    vjepa2 = VJEPA2Config(**sizes, crop_size=64, frames_per_clip=8, pred_hidden_size=24, pred_num_attention_heads=2,
                          pred_num_hidden_layers=1)  # fmt: skip
    clips = torch.rand(2, 3, 4, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    processor = {"image_mean": mean.flatten().tolist(), "image_std": std.flatten().tolist()}
    frames = ((clips - mean) / std).transpose(1, 2)
    for model, options, name in (
        (VideoMAEModel(videomae), {}, "preprocessor_config.json"),
        (VJEPA2Model(vjepa2), {"skip_predictor": True}, "video_preprocessor_config.json"),
    ):
        folder = tmp_path / type(model).__name__
        model.eval().save_pretrained(folder)
        (folder / name).write_text(json.dumps({"image_processor_type": "x", **processor}))
        with torch.no_grad():
            expected = model(frames, **options).last_hidden_state
        teacher = load_teacher(TargetConfig("video", str(folder)))
        assert torch.allclose(teacher.features(clips, STUDENT), expected, atol=2e-4)


# Runs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures without labels."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        Image.fromarray(pictures(1, seed=number)[0]).save(folder / f"{number}.png")
    (folder / "list.txt").write_text("".join(f"{number}.png 0\n" for number in range(12)))
    return folder


def run_config(images: Path, output: Path, targets: object, *edits: str) -> PretrainConfig:
    return parse(
        PretrainConfig,
        [
            "--config=debug/pretrain",
            f"--targets={json.dumps(targets)}",
            *(f"--model.{name}={value}" for name, value in (("num_frames", 1), ("image_size", 32), ("size", "tiny"))),
            f"--model.{'strides'}=[4,2,1]",
            *(f"--data.{name}={value}" for name, value in (("train", images / "list.txt"), ("root", images))),
            "--data.format=image",
            "--data.workers=0",
            "--mask.kind=random",
            "--train.batch_size=6",
            "--train.max_steps=12",
            "--device=cpu",
            f"--output={output}",
            *edits,
        ],
    )


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_pixels_alone_named_or_not_give_the_same_run(images: Path, tmp_path: Path) -> None:
    pretrain(run_config(images, tmp_path / "default", [], "--train.max_steps=3"))
    pretrain(run_config(images, tmp_path / "named", [{"name": "pixels"}], "--train.max_steps=3"))
    default, named = load_state(tmp_path / "default"), load_state(tmp_path / "named")
    assert default["model"].keys() == named["model"].keys()
    assert all(torch.equal(tensor, named["model"][name]) for name, tensor in default["model"].items())
    assert not any("loss_pixels" in line or "feature_rank" in line for line in log(tmp_path / "default"))
    for ours, theirs in zip(log(tmp_path / "named"), log(tmp_path / "default"), strict=True):
        assert ours["loss_pixels"] == ours["loss"] == theirs["loss"]


def every_kind(vit: Path, own: Path) -> list[dict]:
    """Pixels, and a target of each kind of teacher and place."""
    return [
        {"name": "pixels", "weight": 0.5},
        {"name": "clip", "teacher": "timm:test_vit", "weights": str(vit), "tokens": "visible"},
        {"name": "early", "teacher": "timm:test_vit", "weights": str(vit), "tokens": "visible", "layer": 1},
        {"name": "own", "teacher": str(own), "tokens": "hidden", "loss": "cosine"},
        {"name": "average", "teacher": "ema", "tokens": "visible", "momentum": 0.9, "warmup_steps": 8},
    ]


@pytest.fixture(scope="module")
def own(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run, of other sizes."""
    output = tmp_path_factory.mktemp("own") / "run"
    edits = ("--model.image_size=64", "--model.widths=[16,32,64]", "--model.heads=4", "--train.max_steps=2")
    pretrain(run_config(images, output, [], *edits))
    return output


def test_mimic_and_pixel_losses_fall_together(
    images: Path, vit: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = run_config(images, tmp_path, every_kind(vit, own), "--train.max_steps=40", "--train.save_every=100")
    assert pretrain(config) == 40
    lines = log(tmp_path)
    for name in ("loss_pixels", "loss_clip", "loss_early", "loss_own"):
        first, last = (np.mean([line[name] for line in part]) for part in (lines[:5], lines[-5:]))
        assert last < 0.95 * first, name
    weights = [0.5, 1, 1, 1, min(1, 20 / 8)]
    names = [f"loss_{name}" for name in ("pixels", "clip", "early", "own", "average")]
    line = lines[20]
    assert line["loss"] == pytest.approx(sum(w * line[n] for w, n in zip(weights, names)), rel=1e-5)
    assert lines[0]["loss"] == pytest.approx(sum(w * lines[0][n] for w, n in zip(weights[:4], names)), rel=1e-5)
    assert all(1 <= line["feature_rank"] <= 6 for line in lines)
    told = capsys.readouterr().out
    assert "target clip: timm:test_vit of" in told
    assert "at visible tokens, stage 1" in told
    assert "predicting nothing" in told
    assert json.loads((tmp_path / "metrics.json").read_text())["learned"] is not None
    model, again = load_autoencoder(tmp_path)
    assert again.targets == config.targets
    assert not model.targets


def test_a_resumed_run_is_exact_with_its_average(images: Path, vit: Path, own: Path, tmp_path: Path) -> None:
    edits = ("--train.save_every=2", "--train.keep=20", "--train.log_every=2", "--train.ema=0.9")
    config = run_config(images, tmp_path, every_kind(vit, own), *edits)
    pretrain(config)
    whole, lines = load_state(tmp_path, "model", "ema", "optimizer", "teacher"), log(tmp_path)
    assert {name.split(".")[0] for name in whole["teacher"]} == {"encoder", "fusion", "norm"}
    assert any(not torch.equal(tensor, whole["model"][name]) for name, tensor in whole["teacher"].items())
    for path in (tmp_path / "checkpoints").glob("step_*"):
        if path.name > "step_00000004":
            shutil.rmtree(path)
    assert load_state(tmp_path)["step"] == 4
    assert pretrain(config) == 12
    resumed = load_state(tmp_path, "model", "ema", "optimizer", "teacher")
    for part in ("model", "ema", "optimizer", "teacher"):
        assert all(torch.equal(tensor, resumed[part][name]) for name, tensor in whole[part].items()), part
    timed = ("clips_per_second", "data_wait", "seconds_per_step", "eta_seconds")
    for ours, theirs in zip(log(tmp_path), lines, strict=True):
        assert {n: v for n, v in ours.items() if n not in timed} == {n: v for n, v in theirs.items() if n not in timed}


def test_the_average_follows_the_encoder(images: Path, tmp_path: Path) -> None:
    """At momentum 0 it is the encoder of the step before."""
    targets = [{"name": "average", "teacher": "ema", "tokens": "hidden", "momentum": 0.0}]
    pretrain(run_config(images, tmp_path, targets, "--train.max_steps=3"))
    with pytest.raises(UserError, match="predicts no pixels, its targets are average"):
        reconstruct_clips(*load_autoencoder(tmp_path), torch.zeros(1, 3, 1, 32, 32), torch.ones(1, 1, 4, 4).bool())
    state = load_state(tmp_path, "model", "teacher")
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in state["teacher"].items())


def test_a_run_with_targets_is_a_teacher_and_starts_others(images: Path, vit: Path, own: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    pretrain(run_config(images, first, every_kind(vit, own), "--train.max_steps=2"))
    teacher = load_own(str(first))
    assert (teacher.width, teacher.frames, teacher.size) == (192, 1, (32, 32))
    model, config = load_autoencoder(first)
    clips = torch.rand(2, 3, 1, 32, 32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (config.data.mean, config.data.std))
    with torch.no_grad():
        expected = model.encode((clips - mean) / std)
    assert torch.allclose(teacher.features(clips, model.encoder.config), expected, atol=1e-5)
    start = (f"--init.weights={first}", "--train.max_steps=1", "--optim.lr=0")
    pretrain(run_config(images, tmp_path / "second", every_kind(vit, own), *start))
    before, after = load_state(first, "model")["model"], load_state(tmp_path / "second", "model")["model"]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    report = load_weights(Autoencoder(config.model), str(first))
    assert all("feature_heads" in name for name in report.unexpected)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"name": "clip", "teacher": "timm:vit_base_patch16_clip_224.openai"},
            "needs a file of its weights (model.saf",
        ),
        ({"name": "clip", "teacher": "timm:no_such"}, "has no model 'no_such'"),
        ({"name": "clip", "teacher": "timm:test_vit", "weights": "nowhere.pth"}, "nowhere.pth cannot be read"),
        (
            {"name": "clip", "teacher": "timm:test_vit2", "weights": "VIT"},
            "does not hold the weights of timm:test_vit2",
        ),
        ({"name": "video", "teacher": "nowhere"}, "teacher of the target 'video': no checkpoint at nowhere"),
        ({"name": "video"}, "the target 'video' has no teacher"),
        ({"name": "pixels", "tokens": "visible"}, "tokens of the target 'pixels' is visible; expected hidden"),
        ({"name": "pixels", "teacher": "ema"}, "expected another name for the features"),
        ({"name": "a b", "teacher": "ema"}, "name of the target 'a b' is a b; expected a word"),
        ({"name": "e", "teacher": "ema", "layer": 1}, "layer of the target 'e' is 1; expected none, but at visible"),
        ({"name": "e", "teacher": "ema", "layer": 5, "tokens": "visible"}, "is 5; expected 1 to 2, a convolutional st"),
        ({"name": "e", "teacher": "ema", "weights": "x"}, "weights of the target 'e' is x; expected none"),
        ({"name": "e", "teacher": "ema", "weight": 0}, "weight of the target 'e' is 0"),
        ({"name": "e", "teacher": "ema", "momentum": 1}, "momentum of the target 'e' is 1"),
        ({"name": "e", "teacher": "ema", "visible": True}, "there is no field targets.visible; did you mean"),
        ({"name": "e", "teacher": "ema", "tokens": "seen"}, "targets.tokens is seen; expected visible or hidden"),
        ({"teacher": "ema"}, "an item of targets has no name"),
    ],
)
def test_impossible_targets_are_one_line(
    target: dict, message: str, images: Path, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = {name: str(vit) if value == "VIT" else value for name, value in target.items()}
    try:
        pretrain(run_config(images, tmp_path / "run", [target]))
        said = "nothing"
    except ValueError as error:  # a UserError is one
        said = str(error)
    except SystemExit:
        said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


def test_targets_of_one_name_or_of_two_averages_are_errors(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    twice = [{"name": "a", "teacher": "ema"}, {"name": "a", "teacher": "ema"}]
    for targets, message in (
        (twice, "targets are named a, a; expected a name of its own for each"),
        ([{**twice[0], "name": "b", "momentum": 0.5}, twice[1]], "targets of ema have different momentum"),
    ):
        with pytest.raises(SystemExit):
            run_config(images, tmp_path, targets)
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
