"""Published formats to ours and back: names, values, outputs of the original models, `video-convmae convert`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import weight_cases as cases
from torch import Tensor, nn
from weight_cases import (
    assert_same,
    autoencoder,
    classifier,
    golden,
    mae,
    run_of,
    scrambled,
)

from video_convmae import create_autoencoder, create_classifier, masking
from video_convmae.cli import convert
from video_convmae.errors import UserError
from video_convmae.models import positions
from video_convmae.weights.files import read_file, save_file
from video_convmae.weights.formats import read_weights, to_format
from video_convmae.weights.load import load_weights, model_from

# There and back


@pytest.mark.parametrize("strides", [(4, 2, 2), (7, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize("kind", ["pretraining", "finetuning"])
def test_round_trip_through_the_convmae_layout(kind: str, strides: tuple[int, ...]) -> None:
    settings = {"strides": strides, "image_size": 2 * int(np.prod(strides))}
    model = autoencoder(**settings) if kind == "pretraining" else classifier(**settings)
    released = to_format(model, "convmae")
    assert f"ConvMAE {kind}" == read_weights(released).format
    again, report = model_from(
        released, heads=2, **({"decoder": cases.TINY["decoder"]} if kind == "pretraining" else {})
    )
    assert again.encoder.config == model.encoder.config
    assert_same(again.state_dict(), model.state_dict())
    assert not report.missing
    assert not report.unexpected
    assert_same(read_weights(released).state_dict(), model.state_dict())


@pytest.mark.parametrize("layout", ["videomae", "huggingface"])
@pytest.mark.parametrize("kind", ["pretraining", "finetuning"])
def test_round_trip_through_the_videomae_layouts(kind: str, layout: str) -> None:
    settings = {**cases.PLAIN, **({"learnable_positions": False} if kind == "finetuning" else {})}
    model = autoencoder(**settings, strides=(16,)) if kind == "pretraining" else classifier(**settings, strides=(16,))
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            parameter.data.chunk(3)[1].zero_()  # the layouts have no key bias: softmax does not feel it
        if name == "decoder.embedding.bias":
            parameter.data.zero_()  # nor this one
    released = to_format(model, layout)
    decoder = {"decoder": cases.TINY["decoder"]} if kind == "pretraining" else {}
    again, _ = model_from(released, heads=2, num_frames=4, image_size=32, **decoder)
    assert again.encoder.config == model.encoder.config
    assert_same(again.state_dict(), model.state_dict())
    assert read_weights(released).format.endswith(f"VideoMAE {kind}")


@pytest.mark.parametrize("name", ["convmae", "convvit", "fastconvmae"])
def test_released_weights_come_back(name: str) -> None:
    released = golden(name)
    again = to_format(read_weights(released), "convmae")
    assert_same(again, released)
    model, _ = model_from(released, heads=4)
    again = to_format(model, "convmae")
    tables = [] if name == "convvit" else ["pos_embed", "decoder_pos_embed"]
    for table in tables:
        assert (again.pop(table) - released.pop(table)).abs().max() < 1e-6
    assert_same(again, released)


def test_the_released_base_models_have_313_and_207_tensors() -> None:
    with torch.device("meta"):
        models = create_autoencoder("base", num_frames=1), create_classifier("base", num_frames=1, num_classes=1000)
    pretraining, finetuning = (to_format(model, "convmae") for model in models)
    assert (len(pretraining), len(finetuning)) == (313, 207)
    shapes = {
        "pos_embed": (1, 196, 768),
        "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, 196, 512),
        "patch_embed1.proj.weight": (256, 3, 4, 4),
        "patch_embed2.proj.weight": (384, 256, 2, 2),
        "patch_embed4.weight": (768, 768),
        "stage1_output_decode.weight": (768, 256, 4, 4),
        "stage2_output_decode.weight": (768, 384, 2, 2),
        "blocks1.1.conv1.weight": (256, 256, 1, 1),
        "blocks2.0.attn.weight": (384, 1, 5, 5),
        "blocks2.1.mlp.fc2.weight": (384, 1536, 1, 1),
        "blocks3.10.attn.qkv.weight": (2304, 768),
        "decoder_blocks.7.mlp.fc1.weight": (2048, 512),
        "decoder_pred.weight": (768, 512),
    }
    assert {name: tuple(pretraining[name].shape) for name in shapes} == shapes
    assert sum(t.numel() for t in finetuning.values()) == 85_374_824  # the released model's own count


def test_layouts_that_cannot_hold_a_model_say_so() -> None:
    for model, layout, message in [
        (autoencoder(**cases.VIDEO), "convmae", "holds image models of three stages"),
        (autoencoder(), "videomae", "hold plain ViTs"),
        (autoencoder(**cases.PLAIN, strides=(16,)), "huggingface", "no bias between encoder and decoder"),
        (autoencoder(), "mae", "expected one of convmae, videomae, huggingface"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_format(model, layout)


@pytest.mark.parametrize("layout", ["videomae", "huggingface"])
def test_positions_that_a_layout_cannot_hold_are_refused(layout: str) -> None:
    """Without a word, the other model would add its fixed table in their place."""
    settings = {**cases.PLAIN, "strides": (16,), "learnable_positions": True}
    learnt, pretrained = read_weights(classifier(**settings)), autoencoder(**settings)
    pretrained.decoder.embedding.bias.data.zero_()
    refused = [read_weights(pretrained), learnt.without("head"), *([learnt] if layout == "huggingface" else [])]
    for weights in refused:
        with pytest.raises(UserError, match=r"encoder\.positions was learnt.*--exclude positions") as error:
            to_format(weights, layout)
        assert "\n" not in str(error.value)
        assert not any("pos" in name for name in to_format(weights.without("positions"), layout))
    if layout == "videomae":
        assert torch.equal(to_format(learnt, layout)["pos_embed"], learnt.tensors["encoder.positions"])


def test_learnable_positions_that_are_still_the_table_need_no_place() -> None:
    model = classifier(**cases.PLAIN, strides=(16,))
    model.encoder.positions.data[0] = positions.flat(model.encoder.config.grid, 24)
    assert not any("pos" in name for name in to_format(model, "huggingface"))
    assert not any("pos" in name for name in to_format(model.state_dict(), "huggingface"))


def test_a_classifier_with_fixed_positions_has_them_in_the_convmae_layout() -> None:
    """The released classifier has them as a parameter: without them it would keep random ones."""
    model = classifier(learnable_positions=False, image_size=32)
    released = to_format(model, "convmae")
    assert released.keys() == to_format(classifier(image_size=32), "convmae").keys()
    assert torch.equal(released["pos_embed"][0], positions.sincos((1, 2, 2), 24))
    assert_same(read_weights(released).without("positions").state_dict(), model.state_dict())


# Other people's files


def test_encoder_alone_as_released() -> None:
    """convmae_base.pth: no mask token, decoder or fusion."""
    released = to_format(autoencoder(), "convmae")
    parts = ("mask_token", "decoder", "stage")
    released = {name: tensor for name, tensor in released.items() if not name.startswith(parts)}
    model = autoencoder(image_size=32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, released)
    assert report.format == "ConvMAE encoder only"
    assert {name.split(".")[0] for name in report.missing} == {"fusion", "decoder"}
    assert len(report.loaded) + len(report.missing) == len(before)
    assert not report.unexpected
    for name in report.missing:
        assert torch.equal(model.state_dict()[name], before[name])
    assert "start new: fusion.joints... (4), decoder.mask_token" in str(report)
    assert "decoder.blocks... (24)" in str(report)


def test_second_version_has_a_cls_token() -> None:
    source = autoencoder()
    released = to_format(source, "convmae")
    released = {name: tensor for name, tensor in released.items() if not name.startswith("decoder")}
    released["cls_token"] = torch.randn(1, 1, 24)
    released["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), released["pos_embed"]], dim=1)
    model = create_autoencoder("base", **cases.IMAGE)
    report = load_weights(model, released)
    assert report.format == "ConvMAE-v2 encoder only"
    assert "CLS token" in str(report)
    assert set(report.unexpected) == {
        *("cls_token", "mask_token", "stage1_output_decode.weight", "stage1_output_decode.bias"),
        *("stage2_output_decode.weight", "stage2_output_decode.bias"),
    }
    assert_same(model.encoder.state_dict(), source.encoder.state_dict())


@pytest.mark.parametrize("with_cls", [False, True])
def test_the_shapes_of_large_and_huge_are_read(with_cls: bool) -> None:
    """Sources differ: MLP ratios of 8 in the convolutional stages, tokens of 14 pixels in huge."""
    source = autoencoder(strides=(7, 1, 2), mlp_ratio=(8, 8, 4), image_size=56)
    released = {name: t for name, t in to_format(source, "convmae").items() if not name.startswith("decoder")}
    released = {name: t for name, t in released.items() if not name.startswith(("mask_token", "stage"))}
    if with_cls:
        released["cls_token"] = torch.randn(1, 1, 24)
    model, report = model_from(released, heads=2)
    config = model.encoder.config
    assert (config.strides, config.mlp_ratio, config.image_size) == ((7, 1, 2), (8, 8, 4), (56, 56))
    assert ("the CLS token and its position were dropped" in str(report)) == with_cls
    assert_same(model.encoder.state_dict(), source.encoder.state_dict())
    assert_same(model.norm.state_dict(), source.norm.state_dict())


def easycv(released: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """FastConvMAE in EasyCV: the encoder behind `encoder.` or `backbone.`, the decoder behind `decoder.`."""
    renamed = {}
    for name, tensor in released.items():
        if name.startswith("head."):
            renamed[name.replace("head.", "head_0.fc_cls.")] = tensor
        elif name.startswith(("decoder", "mask_token")):
            renamed["decoder." + name] = tensor
        else:
            renamed[("encoder." if kind == "pretraining" else "backbone.") + name] = tensor
    return renamed


MMPRETRAIN = [
    (r"patch_embed4", "patch_embeds.3"),
    (r"patch_embed(\d)\.proj", lambda m: f"patch_embeds.{int(m[1]) - 1}.projection"),
    (r"patch_embed(\d)", lambda m: f"patch_embeds.{int(m[1]) - 1}"),
    (r"blocks3\.(\d+)\.mlp\.fc1", r"layers.2.\1.ffn.layers.0.0"),
    (r"blocks3\.(\d+)\.mlp\.fc2", r"layers.2.\1.ffn.layers.1"),
    (r"blocks(\d)\.", lambda m: f"layers.{int(m[1]) - 1}."),
    (r"(layers\S+)\.norm(\d)\.", r"\1.ln\2."),
    (r"^fc_norm\.", "ln1."),
]


def mmpretrain(released: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in released.items():
        for pattern, other in MMPRETRAIN:
            name = re.sub(pattern, other, name)
        name = name.replace("head.", "head.fc.") if name.startswith("head.") else "backbone." + name
        renamed[name] = tensor.unflatten(1, (4, 4)) if name.endswith("pos_embed") else tensor
    return renamed


def ddp(released: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {"module." + name: tensor for name, tensor in released.items()}


@pytest.mark.parametrize(
    ("rename", "title", "kind"),
    [
        (ddp, "ConvMAE", "pretraining"),
        (ddp, "ConvMAE", "finetuning"),
        (easycv, "ConvMAE", "pretraining"),
        (easycv, "ConvMAE", "finetuning"),
        (mmpretrain, "mmpretrain ConvViT", "finetuning"),
    ],
)
def test_names_of_other_code_bases(rename: Callable, title: str, kind: str) -> None:
    source = autoencoder() if kind == "pretraining" else classifier()
    other = {"state_dict": rename(to_format(source, "convmae"), kind), "meta": {"epoch": 50}}
    model = create_autoencoder("base", **cases.IMAGE) if kind == "pretraining" else classifier()
    report = load_weights(model, other)
    assert report.format == f"{title} {kind}"
    assert_same(model.state_dict(), source.state_dict())
    assert not report.missing
    assert not report.unexpected


def hugging_face(kind: str, **settings: object) -> nn.Module:
    """A random model of transformers that computes as VideoMAE does: with LayerNorm eps 1e-6 throughout."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: it comes with [bench]")
    config = transformers.VideoMAEConfig(
        image_size=32,
        num_frames=4,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        use_mean_pooling=kind == "finetuning",
        layer_norm_eps=1e-6,
        num_labels=5,
        **settings,
    )
    models = {"pretraining": "VideoMAEForPreTraining", "finetuning": "VideoMAEForVideoClassification"}
    model = scrambled(getattr(transformers, models[kind])(config)).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return model


def on_the_hub(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the released files, which transformers before 5.0 had too."""
    for kind in ("query", "value"):
        state = {name.replace(f"attention.{kind}.bias", f"attention.{kind[0]}_bias"): t for name, t in state.items()}
    return state


@pytest.mark.parametrize("names", [dict, on_the_hub])
def test_hugging_face_pretraining_computes_the_same(names: Callable) -> None:
    theirs = hugging_face("pretraining")
    ours, report = model_from(names(theirs.state_dict()), heads=2, num_frames=4, image_size=32, decoder=(16, 2, 2))
    assert report.format == "Hugging Face VideoMAE pretraining"
    assert "eps" in str(report)
    assert not report.missing
    clips = torch.randn(2, 3, 4, 32, 32)
    visible = masking.tube(ours.grid, 0.5).expand(2, -1, -1, -1)
    with torch.inference_mode():
        output = ours(clips, visible)
        expected = theirs(clips.transpose(1, 2), ~visible.flatten(1))
    assert (output.prediction - expected.logits).abs().max() < 1e-5
    assert abs(output.loss - expected.loss) < 1e-4  # theirs goes back to pixels with ImageNet's mean and deviation


@pytest.mark.parametrize("kind", ["pretraining", "finetuning"])
def test_what_is_written_for_hugging_face_loads_there(kind: str, tmp_path: Path) -> None:
    """Nothing missing, nothing unexpected, every value in its place: the names are theirs, not just ones we read."""
    source = hugging_face(kind)
    decoder = {"decoder": (16, 2, 2)} if kind == "pretraining" else {}
    ours, _ = model_from(source.state_dict(), heads=2, num_frames=4, image_size=32, **decoder)
    save_file(to_format(ours, "huggingface"), tmp_path / "model.safetensors")
    source.config.save_pretrained(tmp_path)
    again, said = type(source).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    assert_same(again.state_dict(), source.state_dict())


def test_hugging_face_classifier_computes_the_same() -> None:
    theirs = hugging_face("finetuning")
    ours, report = model_from(theirs.state_dict(), heads=2, num_frames=4, image_size=32)
    assert report.format == "Hugging Face VideoMAE finetuning"
    clips = torch.randn(2, 3, 4, 32, 32)
    with torch.inference_mode():
        assert (ours(clips) - theirs(clips.transpose(1, 2)).logits).abs().max() < 1e-5


def until_5(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of MAE's files on the hub, which transformers before 5.0 had too."""
    for now, before in (
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        state = {name.replace(now, before): tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize("names", [dict, until_5])
def test_hugging_face_mae_computes_the_same_but_for_the_cls_token(names: Callable) -> None:
    """Their layers on the patches alone: what is left of the model where the CLS token is dropped."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: it comes with [bench]")
    encoder = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    decoder = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    decoder = {f"decoder_{name}": value for name, value in decoder.items()}
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(image_size=32, layer_norm_eps=1e-6, **encoder, **decoder)
    )
    scrambled(theirs).eval()
    for table in (theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed):
        table.data[0, 1:] = positions.sincos((1, 2, 2), table.shape[-1])  # MAE's, as in the files on the hub
    ours, report = model_from(names(theirs.state_dict()), heads=2, decoder=(16, 2, 2))
    assert report.format == "Hugging Face MAE pretraining"
    assert report.unexpected == ("vit.embeddings.cls_token",)
    assert not report.missing
    images, visible = torch.randn(2, 3, 32, 32), torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    visible[:, 0, 0] = True  # the first two of four
    with torch.inference_mode():
        tokens = theirs.vit.embeddings.patch_embeddings(images) + theirs.vit.embeddings.position_embeddings[:, 1:]
        x = tokens[:, :2]
        for layer in theirs.vit.layers:
            x = layer(x)
        x = theirs.decoder.decoder_embed(theirs.vit.layernorm(x))
        x = torch.cat([x, theirs.decoder.mask_token.expand(2, 2, -1)], dim=1) + theirs.decoder.decoder_pos_embed[:, 1:]
        for layer in theirs.decoder.decoder_layers:
            x = layer(x)
        expected = theirs.decoder.decoder_pred(theirs.decoder.decoder_norm(x[:, 2:]))
        assert (ours(images[:, :, None], visible).prediction - expected).abs().max() < 1e-5


def test_mae_without_a_cls_token_computes_the_same() -> None:
    theirs = mae(class_token=False)
    ours, report = model_from(theirs.state_dict(), heads=2)
    assert report.format == "MAE finetuning"
    assert not report.missing
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert (ours(images[:, :, None]) - theirs(images)).abs().max() < 1e-5


def test_mae_loses_its_cls_token_and_says_so() -> None:
    state = mae().state_dict()
    assert state["pos_embed"].shape == (1, 5, 24)
    ours, report = model_from(state, heads=2)
    assert report.unexpected == ("cls_token",)
    assert "CLS token and its position were dropped" in str(report)
    assert torch.equal(ours.encoder.positions, state["pos_embed"][:, 1:])


# The command


def test_the_tables_of_a_released_layout_are_the_runs_own(tmp_path: Path) -> None:
    settings = {
        "size": "base",
        "num_frames": 1,
        "image_size": 64,
        "widths": cases.TINY["widths"],
        "depths": cases.TINY["depths"],
    }
    torch.save(run_of(autoencoder(), **settings), tmp_path / "run.pth")
    given = [str(tmp_path / "run.pth"), str(tmp_path / "convmae.pth"), "--to", "convmae"]
    for more, tokens in [([], 16), (["--image-size", "32"], 4)]:
        convert.main([*given, *more])
        assert read_file(tmp_path / "convmae.pth")["model"]["pos_embed"].shape == (1, tokens, 24)


def test_the_tool_converts_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = golden("convmae")
    torch.save({"model": source, "args": argparse.Namespace(lr=1.0)}, tmp_path / "released.pth")
    ours, again = str(tmp_path / "ours.safetensors"), str(tmp_path / "again.pth")
    convert.main([str(tmp_path / "released.pth"), ours])
    convert.main([ours, again, "--to", "convmae"])
    printed = capsys.readouterr().out
    assert "ConvMAE pretraining: 119 tensors; encoder, fusion, decoder" in printed
    back = read_file(again)["model"]
    for table in ("pos_embed", "decoder_pos_embed"):
        assert (back.pop(table) - source.pop(table)).abs().max() < 1e-6
    assert_same(back, source)


def test_the_tool_drops_learnt_positions_when_told_to(tmp_path: Path) -> None:
    """The written model has the fixed table over the clip that they covered."""
    weights = read_weights(classifier(**cases.PLAIN, strides=(16,)))
    save_file(weights.state_dict(), tmp_path / "own.safetensors", geometry=weights.geometry)
    given = [str(tmp_path / "own.safetensors"), str(tmp_path / "folder"), "--to", "huggingface", "--exclude"]
    with pytest.raises(UserError, match=r"cannot be written as huggingface: .*--exclude positions"):
        convert.main([*given, "head"])
    convert.main([*given, "positions"])
    again = read_weights(tmp_path / "folder")
    assert (again.grid, again.position_table) == ((2, 2, 2), "flat")
    assert "encoder.positions" not in again.tensors
