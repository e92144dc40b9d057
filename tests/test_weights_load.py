"""Loading weights into models: what fits, what is an error, grids, probes, reports."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from weight_cases import (
    IMAGE,
    ONE_EACH,
    PLAIN,
    TINY,
    VIDEO,
    assert_same,
    autoencoder,
    classifier,
    probe,
    run_of,
    scrambled,
    tokens_differ,
    without,
    without_time,
)

from video_convmae import create_autoencoder, create_classifier
from video_convmae.cli import inflate as inflate_command
from video_convmae.masking import Grid
from video_convmae.models import positions
from video_convmae.models.classifier import Classifier
from video_convmae.models.encoder import Encoder
from video_convmae.weights.arguments import model_arguments
from video_convmae.weights.files import save_file
from video_convmae.weights.formats import read_weights, to_format
from video_convmae.weights.inflate import inflate
from video_convmae.weights.load import load_weights, model_from
from video_convmae.weights.options import Inflation

# What does not fit


def test_what_matters_is_an_error_and_leaves_the_model_alone() -> None:
    released = to_format(autoencoder(), "convmae")
    finetuned = to_format(classifier(), "convmae")
    token = {name.replace("fc_norm", "norm"): tensor for name, tensor in finetuned.items()}
    plain = to_format(classifier(**PLAIN, strides=(16,), learnable_positions=False), "videomae")
    other_decoder = create_autoencoder("base", **{**IMAGE, "decoder": (32, 2, 2)})
    ratios = {n: t.repeat_interleave(2, 0) if n.startswith("blocks2.0.mlp.fc1") else t for n, t in released.items()}
    for model, state, message in [
        (autoencoder(), {"weight": torch.zeros(1)}, "no known format"),
        (autoencoder(), {"model": {"epoch": 3}}, "expected names and tensors"),
        (autoencoder(), {**released, "blocks3.0.gamma_1": torch.zeros(24)}, "gamma_1 has no place"),
        (classifier(), {**released, "position_bias": torch.zeros(24)}, "does not have: position_bias"),
        (autoencoder(), without(released, "blocks2.1.norm1."), "norm1.weight is missing"),
        (autoencoder(), without(released, "norm."), "a decoder but no norm"),
        (autoencoder(), without(released, "stage"), "a decoder but no fusion"),
        (autoencoder(), without(released, "decoder_norm."), "model's decoder: .* decoder.norm.weight is missing"),
        (autoencoder(msd=False), released, "trained with the fusion"),
        (autoencoder(depths=(1, 2, 1)), released, "attention_blocks.1.norm1.weight has no place"),
        (autoencoder(widths=(8, 12, 32)), released, r"is \(24, 48\), expected \(32, 48\)"),
        (autoencoder(**VIDEO), released, "give|inflat"),
        (other_decoder, released, "exclude decoder"),
        (autoencoder(), finetuned, "learnable_positions=True"),
        (classifier(), token, "trained on one token"),
        (classifier(**{**PLAIN, "position_table": "sincos"}, strides=(16,)), plain, "position_table='flat'"),
        (autoencoder(), ratios, "do not fit"),
    ]:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_weights(model, state)
        assert_same(model.state_dict(), before)
    with pytest.raises(ValueError, match="MLP ratios"):
        model_arguments(ratios)
    with pytest.raises(ValueError, match="exclude has encoder"):
        load_weights(autoencoder(), released, exclude=["encoder"])


def test_parts_can_be_left_out() -> None:
    released = to_format(autoencoder(), "convmae")
    model = create_autoencoder("base", **{**IMAGE, "decoder": (32, 2, 2)}, msd=False)
    report = load_weights(model, released, exclude=["decoder", "fusion"])
    assert {name.split(".")[0] for name in report.missing} == {"decoder"}
    assert "excluded as asked: decoder, fusion" in str(report)


def test_pretraining_into_a_classifier() -> None:
    """As the released main_finetune: positions are taken, norm over tokens, fusion and decoder have no place."""
    source = autoencoder()
    released = to_format(source, "convmae")
    model = create_classifier("base", num_classes=3, **without(IMAGE, "decoder"))
    report = load_weights(model, released)
    assert set(report.missing) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert "norm.weight" in report.unexpected
    assert "decoder_pos_embed" in report.unexpected
    assert "stage1_output_decode.weight" in report.unexpected
    assert torch.equal(model.encoder.positions, released["pos_embed"])
    assert torch.equal(model.norm.weight, torch.ones(24))
    bare = Encoder(model.encoder.config)
    assert load_weights(bare, source.state_dict()).missing == ("encoder.positions",)
    assert_same(without(bare.state_dict(), "positions"), without(model.encoder.state_dict(), "positions"))


# What tensors do not say: windows, grid, kind of positions


@pytest.mark.parametrize("inflation", [None, Inflation()])
@pytest.mark.parametrize(
    "settings",
    [
        ONE_EACH,
        {**PLAIN, "position_table": "sincos", "strides": (16,), "tubelet": 1},
        {**VIDEO, "tubelet": 4},
        {**VIDEO, "tubelet": 4, "temporal_kernel": 1},
        {**VIDEO, "channels": 1},
    ],
)
@pytest.mark.parametrize("build", [autoencoder, classifier])
def test_a_models_own_state_dict_comes_back(build: Callable, settings: dict, inflation: Inflation | None) -> None:
    source, model = build(**settings), build(**settings)
    scrambled(model, seed=1)
    report = load_weights(model, source.state_dict(), inflation=inflation)
    assert_same(model.state_dict(), source.state_dict())
    assert not report.missing
    assert not report.reshaped


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_ours_says_whether_it_is_of_images(tmp_path: Path, suffix: str) -> None:
    source, path = classifier(**ONE_EACH), tmp_path / f"video.{suffix}"
    weights = read_weights(source)
    save_file(weights.state_dict(), path, geometry=weights.geometry)
    assert not read_weights(path).is_image
    with pytest.raises(ValueError, match="4 frames"):
        inflate(path)
    model = classifier(**{**ONE_EACH, "num_frames": 2})
    report = load_weights(model, path, inflation=Inflation())
    assert "positions resized from the grid (4, 4, 4) to (2, 4, 4)" in report.notes
    sizes = model_arguments(path)
    assert (sizes["num_frames"], sizes["tubelet"], sizes["image_size"]) == (4, 1, 64)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_converted_file_says_its_grid(tmp_path: Path, suffix: str) -> None:
    """128 positions are 8 frames of 4 x 4, and to a model of 2 token frames they might be 2 of 8 x 8."""
    source, path = str(tmp_path / "image.pth"), str(tmp_path / f"video.{suffix}")
    torch.save({"model": to_format(classifier(), "convmae")}, source)
    inflate_command.main([source, path, "--num-frames", "16"])
    report = load_weights(classifier(**VIDEO), path)
    assert "positions resized from the grid (8, 4, 4) to (2, 4, 4)" in report.notes
    bare = inflate(source, num_frames=16).state_dict()
    with pytest.raises(ValueError, match=r"may be over the grid \(2, 8, 8\) or \(8, 4, 4\)"):
        load_weights(classifier(**VIDEO), bare)
    report = load_weights(classifier(**VIDEO), replace(read_weights(bare), grid=(8, 4, 4)))
    assert "positions resized from the grid (8, 4, 4) to (2, 4, 4)" in report.notes
    report = load_weights(classifier(**VIDEO), bare, exclude=["positions"])
    assert report.missing == ("encoder.positions",)


def test_positions_of_an_image_or_of_a_clip_are_told_apart_or_are_an_error() -> None:
    image = classifier()
    video = classifier(num_frames=4, tubelet=1, temporal_kernel=1, image_size=64)
    with pytest.raises(ValueError, match=r"\(1, 4, 4\) or \(4, 2, 2\)"):
        load_weights(video, image.state_dict(), inflation=Inflation())
    report = load_weights(video, read_weights(image), inflation=Inflation())
    assert "inflated" in report.format
    assert not report.reshaped


def test_a_runs_configuration_says_what_its_tensors_do_not() -> None:
    settings = {"size": "base", "num_frames": 4, "image_size": 32, "heads": 2}
    plain = {"widths": [24], "depths": [2], "strides": [16]}
    weights = read_weights(run_of(autoencoder(**PLAIN, strides=(16,)), **settings, **plain, position_table="flat"))
    assert (weights.grid, weights.position_table) == ((2, 2, 2), "flat")
    with pytest.raises(ValueError, match="position_table='flat'"):
        load_weights(classifier(**{**PLAIN, "position_table": "sincos"}, strides=(16,)), weights)

    other = {**settings, **{name: TINY[name] for name in ("widths", "depths")}, "image_size": [32, 64], "tubelet": 4}
    source = autoencoder(**{**VIDEO, "tubelet": 4, "image_size": (32, 64)})
    weights = read_weights(run_of(source, **other))
    assert weights.grid == (1, 2, 4)
    assert (weights.strides, weights.tubelet) == ((4, 2, 2), 4)
    assert model_arguments(weights)["image_size"] == (32, 64)
    again, _ = model_from(weights, heads=2, decoder=TINY["decoder"])
    assert again.encoder.config == source.encoder.config
    assert_same(again.state_dict(), source.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fixed_tables_are_known_in_half_precision(dtype: torch.dtype) -> None:
    released = {name: tensor.to(dtype) for name, tensor in to_format(autoencoder(), "convmae").items()}
    assert not load_weights(autoencoder(), released).missing
    assert not load_weights(autoencoder(**VIDEO), released, inflation=Inflation()).missing
    assert "encoder.positions" not in inflate(released).state_dict()
    learnt = {**released, "pos_embed": released["pos_embed"] + 0.05}
    with pytest.raises(ValueError, match="learnable_positions=True"):
        load_weights(autoencoder(), learnt)


def test_learnt_positions_are_not_lost() -> None:
    released = to_format(autoencoder(), "convmae")
    learnt = {**released, "decoder_pos_embed": released["decoder_pos_embed"] + 0.01}
    with pytest.raises(ValueError, match="decoder_pos_embed was learnt"):
        read_weights(learnt).state_dict()
    with pytest.raises(ValueError, match=r"decoder_pos_embed is not the fixed .*exclude \[positions\]"):
        load_weights(autoencoder(), learnt)
    model = autoencoder()
    for weights in (read_weights(learnt).without("positions"), read_weights(released)):
        assert model.load_state_dict(weights.state_dict())
    assert not load_weights(model, learnt, exclude=["positions"]).missing


def test_a_fixed_table_may_be_over_any_rectangle() -> None:
    released = to_format(autoencoder(image_size=(32, 128)), "convmae")  # 2 x 8 tokens, as many as 4 x 4
    assert read_weights(released).geometry["grid"] == (1, 2, 8)
    model = classifier()
    assert "positions resized from the grid (1, 2, 8) to (1, 4, 4)" in load_weights(model, released).notes
    assert not load_weights(autoencoder(), released).missing


def learnt_of(grid: Grid, **settings: object) -> Classifier:
    """A plain ViT's classifier whose positions were learnt over a grid."""
    t, h, w = grid
    clip = {"num_frames": 2 * t, "image_size": (16 * h, 16 * w)}
    return classifier(**{**PLAIN, **clip, "strides": (16,), "learnable_positions": True, **settings})


def test_positions_of_another_clip_with_as_many_tokens_are_said() -> None:
    """256 tokens are 4 x 8 x 8 or 16 x 4 x 4: taken as they are, the first would be scrambled by the second."""
    file, model = learnt_of((4, 8, 8)), learnt_of((16, 4, 4))
    published = to_format(file, "videomae")
    assert "positions over the grid (16, 4, 4)" in load_weights(model, published).assumed
    report = load_weights(model, replace(read_weights(published), grid=(4, 8, 8)))
    assert "positions resized from the grid (4, 8, 8) to (16, 4, 4)" in report.notes
    assert not any("positions" in each for each in report.assumed)
    arguments = argparse.Namespace(num_frames=8, input_size=128)
    report = load_weights(model, {"module": published, "args": arguments})  # as VideoMAE's checkpoints say it
    assert "positions resized from the grid (4, 8, 8) to (16, 4, 4)" in report.notes
    assert "positions over the grid (16, 4, 4)" in load_weights(model, file.state_dict()).assumed  # maybe its very own
    report = load_weights(learnt_of((2, 6, 6)), learnt_of((2, 4, 4)).state_dict())
    assert "positions over the grid (2, 4, 4)" in report.assumed


def test_the_usual_clip_is_assumed_and_said() -> None:
    """1568 tokens of a file that does not say its clip: 16 frames of 224 x 224 pixels, in the first place."""
    published = to_format(learnt_of((8, 14, 14)), "videomae")
    for grid in ((8, 14, 14), (8, 16, 16)):
        assert "positions over the grid (8, 14, 14)" in load_weights(learnt_of(grid), published).assumed
    for grid in ((32, 7, 7), (32, 8, 8)):
        with pytest.raises(ValueError, match=r"\(8, 14, 14\) or \(32, 7, 7\)"):
            load_weights(learnt_of(grid), published)
    for grid in ((16, 14, 14), (8, 16, 16)):  # of a longer or a larger clip, for a model of that very clip
        report = load_weights(learnt_of(grid), to_format(learnt_of(grid), "videomae"))
        assert f"positions over the grid {grid}" in report.assumed


def test_a_fixed_table_says_its_grid_to_a_model_with_as_many_tokens() -> None:
    bare = classifier(**{**VIDEO, "num_frames": 8, "image_size": 128}).state_dict()
    bare["encoder.positions"] = positions.sincos((4, 8, 8), 24)[None]
    report = load_weights(classifier(**{**VIDEO, "num_frames": 32}), bare)
    assert "positions resized from the grid (4, 8, 8) to (16, 4, 4)" in report.notes
    assert not any("positions" in each for each in report.assumed)
    flat = learnt_of((4, 8, 8)).state_dict()  # the same over any grid
    flat["encoder.positions"] = positions.flat((4, 8, 8), 24)[None]
    model = learnt_of((16, 4, 4))
    assert not any("positions" in each for each in load_weights(model, flat).assumed)
    assert torch.equal(model.encoder.positions, flat["encoder.positions"])


# The fusion


def test_a_norm_that_may_have_followed_a_fusion_is_said() -> None:
    released = to_format(autoencoder(), "convmae")
    encoder = without(released, "mask_token", "decoder", "stage")  # convmae_base.pth
    model = autoencoder(msd=False)
    assert "the model reads no fusion" in str(load_weights(model, encoder))
    assert "the model reads no fusion" in str(load_weights(model, released, exclude=["decoder", "fusion"]))
    never = autoencoder(msd=False)  # a decoder says what it was trained with
    for report in (
        load_weights(autoencoder(msd=False), never.state_dict()),
        load_weights(autoencoder(), released),
        load_weights(classifier(), encoder),
        load_weights(autoencoder(**PLAIN, strides=(16,), msd=False), autoencoder(**PLAIN, strides=(16,)).state_dict()),
    ):
        assert "fusion: if" not in str(report)


# Probes


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_pretraining_into_a_probe(kind: str) -> None:
    """Encoder, fusion and norm are taken; the decoder has no place; the head is new."""
    source = autoencoder()
    for state in (source.state_dict(), to_format(source, "convmae")):
        model = probe(kind=kind)
        head = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
        report = load_weights(model, state)
        assert set(report.missing) == {"head." + name for name in head}
        assert all(name.startswith(("decoder", "mask_token")) for name in report.unexpected)
        assert_same(without(model.state_dict(), "head."), without(source.state_dict(), "decoder."))
        assert_same(model.head.state_dict(), head)
        assert not report.notes


def test_the_released_encoder_into_a_probe() -> None:
    """convmae_base.pth has the norm but no fusion."""
    source = autoencoder()
    released = without(to_format(source, "convmae"), "mask_token", "decoder", "stage")
    model = probe(msd=False)
    report = load_weights(model, released)
    assert not report.unexpected
    assert {name.split(".")[0] for name in report.missing} == {"head"}
    assert "the probe reads no fusion" in str(report)
    assert torch.equal(model.norm.weight, source.norm.weight)
    plain = autoencoder(**PLAIN, strides=(16,))  # has nothing to fuse: with or without, there is nothing to say
    for msd in (True, False):
        settings = {**PLAIN, "strides": (16,), "msd": msd}
        report = load_weights(probe(**settings), without(plain.state_dict(), "decoder"))
        assert not report.notes


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_probes_own_weights_come_back_with_what_it_saw(kind: str) -> None:
    source = scrambled(probe(kind=kind))
    source(torch.randn(4, *source.encoder.config.clip_shape))  # the BatchNorm has seen a batch
    model = probe(kind=kind)
    report = load_weights(model, {"model": source.state_dict(), "step": 3})
    assert_same(model.state_dict(), source.state_dict())
    assert not report.missing
    assert not report.unexpected

    other = probe(num_classes=7, kind=kind)
    report = load_weights(other, source.state_dict())
    assert {name.split(".")[0] for name in report.reshaped} == {"head"}
    assert "5 classes in the file, 7 in the model" in str(report)
    another_kind = probe(kind={"linear": "attentive", "attentive": "linear"}[kind])
    assert "the head is new: the file's is of another kind" in str(load_weights(another_kind, source.state_dict()))
    assert "head.linear.weight" in load_weights(autoencoder(), source.state_dict()).unexpected
    with pytest.raises(ValueError, match="is a probe's"):
        load_weights(classifier(), source.state_dict())
    with pytest.raises(ValueError, match="create_probe"):
        model_from(source.state_dict())


def test_a_probe_takes_learnt_positions_and_image_weights() -> None:
    learnt = autoencoder(learnable_positions=True)
    model = probe(learnable_positions=True)
    load_weights(model, to_format(learnt, "convmae"))
    assert torch.equal(model.encoder.positions, learnt.encoder.positions)
    assert not model.encoder.positions.requires_grad
    with pytest.raises(ValueError, match="learnable_positions=True"):
        load_weights(probe(), to_format(learnt, "convmae"))

    image, video = autoencoder(), probe(**VIDEO)
    with pytest.raises(ValueError, match="Inflation"):
        load_weights(video, image.state_dict())
    load_weights(video, image.state_dict(), inflation=Inflation())
    assert tokens_differ(image, without_time(video, image), masked=False) < 1e-5


def test_a_probe_reads_nothing_untrained() -> None:
    source = autoencoder()
    released = to_format(source, "convmae")
    finetuned = [to_format(classifier(learnable_positions=False), "convmae"), classifier().state_dict()]
    for model, state, exclude, message in [
        *((probe(learnable_positions=True), state, [], "no norm over tokens comes from") for state in finetuned),
        (probe(), without(released, "norm."), [], "untrained and frozen. Probe pretraining weights"),
        (probe(), released, ["norm"], "no norm over tokens"),
        (probe(), without(released, "stage", "decoder", "mask_token"), [], "Build the probe with msd=False"),
        (probe(), released, ["fusion"], "no fusion comes from"),
        (probe(msd=False), released, [], "msd=True"),
    ]:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_weights(model, state, exclude=exclude)
        assert_same(model.state_dict(), before)
    report = load_weights(probe(msd=False), released, exclude=["fusion"])
    assert "the probe reads no fusion" in str(report)


# Head and positions


def test_another_number_of_classes_and_another_grid() -> None:
    source = classifier(num_classes=5)
    model = classifier(num_classes=7, image_size=(48, 96))
    before = model.head.weight.clone()
    report = load_weights(model, to_format(source, "convmae"))
    assert set(report.reshaped) == {"encoder.positions", "head.weight", "head.bias"}
    assert "5 classes in the file, 7 in the model" in str(report)
    assert "(1, 4, 4) to (1, 3, 6)" in str(report)
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.norm.weight, source.norm.weight)
    image = source.encoder.positions.view(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(image, size=(3, 6), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 18, 24)
    assert torch.allclose(model.encoder.positions, expected)


def test_resizing_a_table() -> None:
    table = torch.randn(2 * 3 * 4, 8)
    assert torch.equal(positions.resize(table, (2, 3, 4), (2, 3, 4)), table)
    longer = positions.resize(table, (2, 3, 4), (4, 3, 4)).view(4, 12, 8)
    assert torch.allclose(longer[0], table.view(2, 12, 8)[0])
    assert torch.allclose(longer[1], 0.75 * table.view(2, 12, 8)[0] + 0.25 * table.view(2, 12, 8)[1])
    assert positions.resize(table, (2, 3, 4), (1, 6, 2)).shape == (12, 8)
    with pytest.raises(ValueError, match="expected 12"):
        positions.resize(table, (1, 3, 4), (1, 3, 4))
