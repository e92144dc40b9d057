"""Weights that come with the package: found by name, of a size to ship, of no machine; and how a run becomes one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from clips import encode

import video_convmae
from tools.study import ship
from video_convmae import cli, shipped
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import FinetuneConfig, PretrainConfig
from video_convmae.models import positions
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.weights.files import read_file
from video_convmae.weights.formats import read_weights

NAME = "tiny-moving-squares"
SIZES = ("--model.widths=[16,24,48]", "--model.depths=[1,1,2]", "--model.heads=4", "--model.strides=[2,2,2]")
FILES = sorted(shipped.WEIGHTS.glob("*.safetensors"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(4):
        encode(folder / f"{i}.mp4", 20 + i, size=(64, 64), seed=i)
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(4)))
    return folder


def data(videos: Path) -> list[str]:
    edits = [f"--data.train={videos / 'list.txt'}", f"--data.root={videos}", "--data.workers=0", "--data.stride=1"]
    edits += ["--device=cpu", "--train.precision=fp32", "--train.batch_size=2", "--train.max_steps=2"]
    return [*edits, "--optim.warmup_steps=0"]


@pytest.fixture(scope="module")
def run(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining of 8 frames of 32 pixels."""
    output = tmp_path_factory.mktemp("run")
    clip = ["--model.num_frames=8", "--model.image_size=32", "--model.decoder=[16,1,2]"]
    pretrain(parse(PretrainConfig, ["--config=debug/pretrain", *data(videos), *SIZES, *clip, f"--output={output}"]))
    return output


@pytest.fixture
def weights(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same run as shipped weights, in a package and a working folder of this test."""
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path / "pretrained")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return ship.ship(run, NAME)


def finetuning(videos: Path, *edits: str) -> FinetuneConfig:
    config = [
        "--config=debug/finetune",
        *data(videos),
        f"--data.validation={videos / 'list.txt'}",
        "--output=finetuned",
    ]
    return parse(FinetuneConfig, [*config, f"--init.weights={NAME}", *edits])


def test_a_finished_run_becomes_weights_of_no_machine(run: Path, weights: Path, videos: Path) -> None:
    ours, theirs = read_file(weights), read_file(run / "model.safetensors")
    assert all(torch.equal(ours["model"][name], tensor.half()) for name, tensor in theirs["model"].items())
    assert ours["config"]["model"] == theirs["config"]["model"]
    assert str(videos) in json.dumps(theirs["config"])
    assert "/" not in json.dumps(ours["config"])


def test_a_run_whose_paths_are_unknown_or_that_is_too_large_is_refused(
    run: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="expected less than 1,000"):
        ship.ship(run, "other")
    monkeypatch.delitem(ship.MACHINE, "data.train")
    with pytest.raises(ValueError, match=r"data\.train is .*looks like a path"):
        ship.ship(run, "other")
    assert shipped.shipped_weights() == [NAME]


@pytest.mark.parametrize("name", [NAME, f"{NAME}.safetensors"])
def test_weights_load_by_name(run: Path, weights: Path, videos: Path, name: str) -> None:
    ours, theirs = video_convmae.load(name), video_convmae.load(run)
    assert isinstance(ours.model, Autoencoder)
    found = ours.features(videos / "0.mp4")
    torch.testing.assert_close(
        found, theirs.features(videos / "0.mp4"), atol=1e-2, rtol=1e-2
    )  # it lies there as float16
    assert read_weights(name).heads == 4


def test_a_path_wins_over_a_name(run: Path, weights: Path, videos: Path) -> None:
    Path(NAME).symlink_to(run)
    assert video_convmae.load(NAME).config.data.train == str(videos / "list.txt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-moving-square", f"did you mean {NAME}"),
        ("convmae", f"shipped weights: {NAME}"),
        ("runs/k400", "with checkpoints/ in it$"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_what_is_shipped(weights: Path, name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        video_convmae.load(name)


def test_commands_take_the_name(weights: Path, videos: Path) -> None:
    video, listed = str(videos / "0.mp4"), [f"--list={videos / 'list.txt'}", f"--root={videos}"]
    for command in (
        ["features", f"--weights={NAME}", *listed, "--output=features", "--workers=0", "--device=cpu"],
        ["show-features", NAME, video, "--output=features.png"],
        ["reconstruct", NAME, video, "--output=pictures"],
        ["convert", NAME, "converted.safetensors"],
    ):
        assert cli.run(command[0], command[1:]) == 0
    assert all(Path(file).exists() for file in ("features/features.npz", "features.png", "pictures/reconstruction.png"))
    assert read_weights("converted.safetensors").heads == 4


def test_another_clip_and_other_classes_can_be_finetuned(
    weights: Path, videos: Path, capsys: pytest.CaptureFixture
) -> None:
    """Positions are the fixed table over the pretrained grid, resized to the model's."""
    finetune(finetuning(videos, *SIZES, "--model.num_frames=16", "--model.image_size=64", "--optim.lr=0"))
    said = capsys.readouterr().out
    assert "positions resized from the grid (4, 4, 4) to (8, 8, 8)" in said
    state = read_file("finetuned/model.safetensors")["model"]
    table = positions.resize(positions.sincos((4, 4, 4), 48), (4, 4, 4), (8, 8, 8))
    torch.testing.assert_close(state["encoder.positions"][0], table)
    kernel = "encoder.attention_blocks.0.mlp.fc1.weight"
    assert torch.equal(state[kernel], read_file(weights)["model"][kernel])


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (["--model.strides=[4,2,2]", *SIZES[:3]], r"set --model\.strides \[2,2,2\] \(now \[4,2,2\]\)\. "),
        (
            SIZES[2:],
            r"set --model\.widths \[16,24,48\] \(now \[48,96,192\]\), --model\.depths \[1,1,2\] \(now \[1,1,4\]\)\. ",
        ),
        ([*SIZES, "--model.heads=2"], r"trained with 4 attention heads .* set --model\.heads 4"),
    ],
)
def test_an_encoder_of_other_sizes_is_an_error_that_says_which(
    weights: Path, videos: Path, edits: list[str], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        finetune(finetuning(videos, *edits, "--model.num_frames=8", "--model.image_size=32"))


@pytest.mark.skipif(not FILES, reason="no weights are shipped yet: tools/study/ship.py writes them")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_weights_are_small_and_of_no_machine_and_have_a_card(path: Path) -> None:
    assert path.stat().st_size < ship.MAX_BYTES
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("# ")
    assert "/" not in json.dumps(read_file(path)["config"])
    loaded = video_convmae.load(path.stem)
    assert loaded.model.encode(torch.zeros(1, *loaded.model.encoder.config.clip_shape)).isfinite().all()
