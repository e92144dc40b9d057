"""Image weights to video weights: a still clip has the tokens of the image, `video-convmae inflate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from weight_cases import (
    PLAIN,
    VIDEO,
    autoencoder,
    classifier,
    golden,
    mae,
    tokens_differ,
    without_time,
)

from video_convmae import create_autoencoder
from video_convmae.cli import inflate as inflate_command
from video_convmae.models import positions
from video_convmae.weights.files import read_file, save_file
from video_convmae.weights.formats import to_format
from video_convmae.weights.inflate import inflate
from video_convmae.weights.load import load_weights, model_from
from video_convmae.weights.options import Inflation

# Image weights into video


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("embedding", ["average", "center"])
@pytest.mark.parametrize("kind", ["pretraining", "finetuning"])
def test_a_still_clip_has_the_images_tokens(kind: str, embedding: str, kernel: int, tubelet: int) -> None:
    image = autoencoder() if kind == "pretraining" else classifier()
    settings = {"num_frames": 3 * tubelet, "tubelet": tubelet, "temporal_kernel": kernel}
    video = (autoencoder if kind == "pretraining" else classifier)(**settings)
    report = load_weights(video, image.state_dict(), inflation=Inflation(embedding=embedding))
    assert not report.missing
    assert "inflated" in report.format
    without_time(video, image)
    assert tokens_differ(image, video, masked=False) < 1e-5
    assert tokens_differ(image, video, masked=True) < 1e-5


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("embedding", ["average", "center"])
@pytest.mark.parametrize("name", ["convmae", "fastconvmae", "convvit"])
def test_a_still_clip_has_the_images_tokens_with_released_weights(
    name: str, embedding: str, kernel: int, tubelet: int
) -> None:
    image, _ = model_from(golden(name), heads=4)
    frames = 2 * tubelet
    weights = inflate(golden(name), num_frames=frames, tubelet=tubelet, temporal_kernel=kernel, embedding=embedding)
    video, report = model_from(weights, heads=4)
    config = video.encoder.config
    assert (config.grid, config.tubelet, config.temporal_kernel) == ((2, 14, 14), tubelet, kernel)
    assert not report.missing
    without_time(video, image)
    assert tokens_differ(image, video, masked=False) < 1e-5
    assert tokens_differ(image, video, masked=True) < 1e-5


def test_an_averaged_depthwise_kernel_cannot() -> None:
    """Zero padding takes a third of the first and the last frame's sum: they are dimmed, and attention spreads it."""
    image, video = autoencoder(), autoencoder(num_frames=6, tubelet=2, temporal_kernel=3)
    load_weights(video, image.state_dict(), inflation=Inflation(depthwise="average"))
    without_time(video, image)
    assert tokens_differ(image, video, masked=False) > 1e-2


def test_positions_and_decoder_of_inflated_weights() -> None:
    image = autoencoder()
    weights = inflate(to_format(image, "convmae"), num_frames=4)
    assert (weights.tensors["encoder.positions"][0] - positions.sincos((2, 4, 4), 24)).abs().max() < 1e-6
    finetuned = classifier()
    video = classifier(num_frames=8, image_size=32)
    report = load_weights(video, finetuned.state_dict(), inflation=Inflation())
    assert "encoder.positions" in report.reshaped
    space = positions.resize(finetuned.encoder.positions[0], (1, 4, 4), (1, 2, 2))
    expected = (space + positions.time(4, 24)[:, None]).flatten(0, 1)
    assert torch.allclose(video.encoder.positions[0], expected, atol=1e-6)

    video = autoencoder(**VIDEO)
    load_weights(video, image.state_dict(), inflation=Inflation())
    without_time(video, image)
    for name in ("weight", "bias"):
        frames = getattr(video.decoder.prediction, name).chunk(2)
        assert all(torch.equal(frame, getattr(image.decoder.prediction, name)) for frame in frames)
    narrow = autoencoder(**{**VIDEO, "decoder": (8, 1, 2)})
    report = load_weights(narrow, image.state_dict(), inflation=Inflation())
    assert "the decoder does not fit and is new" in str(report)
    assert {name.split(".")[0] for name in report.missing} == {"decoder"}


def test_plain_image_weights_into_video() -> None:
    image, _ = model_from(mae(class_token=False).state_dict(), heads=2)
    settings = {**PLAIN, "position_table": "sincos", "num_frames": 6, "strides": (16,)}
    video = classifier(**settings)
    load_weights(video, image.state_dict(), inflation=Inflation())
    assert tokens_differ(image, without_time(video, image), masked=False) < 1e-5


def test_impossible_inflations_are_errors() -> None:
    with pytest.raises(ValueError, match="only image weights"):
        inflate(autoencoder(**VIDEO))
    with pytest.raises(ValueError, match="odd kernel"):
        inflate(autoencoder(), temporal_kernel=2)
    with pytest.raises(ValueError, match="multiple of the tubelet"):
        inflate(autoencoder(), num_frames=3)
    with pytest.raises(ValueError, match="embedding is 'middle'"):
        Inflation(embedding="middle")


# The tool


def test_the_tool_inflates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = autoencoder()
    save_file(to_format(image, "convmae"), tmp_path / "image.pth")
    inflate_command.main([str(tmp_path / "image.pth"), str(tmp_path / "video.pth"), "--num-frames", "4"])
    assert "depthwise kernels over 3 frames (center)" in capsys.readouterr().out
    video = create_autoencoder("base", **VIDEO)
    assert video.load_state_dict(read_file(tmp_path / "video.pth")["model"])
    assert not load_weights(video, tmp_path / "video.pth").missing
    assert tokens_differ(image, without_time(video, image), masked=True) < 1e-5
