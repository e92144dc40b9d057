"""Checkpoints of every known layout into ours and back, reports and errors, image weights into video."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from video_convmae import create_autoencoder, create_classifier, masking
from video_convmae.cli import convert as convert_command
from video_convmae.cli import inflate as inflate_command
from video_convmae.models import positions
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.encoder import Encoder
from video_convmae.models.probe import Probe, create_probe
from video_convmae.weights.arguments import model_arguments
from video_convmae.weights.files import read_file as read
from video_convmae.weights.files import save_file as save
from video_convmae.weights.formats import read_weights, to_format
from video_convmae.weights.inflate import inflate
from video_convmae.weights.load import load_weights, model_from
from video_convmae.weights.options import Inflation

GOLDEN = Path(__file__).parent / "golden"
TINY = {"widths": (8, 12, 24), "depths": (1, 2, 2), "heads": 2, "decoder": (16, 2, 2)}
IMAGE = {"num_frames": 1, "image_size": 64, **TINY}
VIDEO = {"num_frames": 4, "image_size": 64, **TINY}
PLAIN = {"num_frames": 4, "image_size": 32, "widths": (24,), "depths": (2,), "heads": 2, "position_table": "flat"}


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, norms and positions too, so that a swapped or forgotten tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def size_of(settings: dict[str, object]) -> str:
    """Size whose name a file's reader gives to other widths and depths, too."""
    return "vit_base" if settings.get("strides") == (16,) else "base"


def autoencoder(**settings: object) -> Autoencoder:
    return scrambled(create_autoencoder(size_of(settings), **{**IMAGE, **settings}))


def classifier(num_classes: int = 5, **settings: object) -> Classifier:
    settings = {name: value for name, value in {**IMAGE, **settings}.items() if name != "decoder"}
    return scrambled(create_classifier(size_of(settings), num_classes=num_classes, **settings))


def probe(num_classes: int = 5, **settings: object) -> Probe:
    return create_probe("base", num_classes=num_classes, **without({**IMAGE, **settings}, "decoder"))


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key.removeprefix("w:"): torch.from_numpy(file[key]) for key in file.files if key.startswith("w:")}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor, theirs[name]), name


# There and back


@pytest.mark.parametrize("strides", [(4, 2, 2), (7, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize("kind", ["pretraining", "finetuning"])
def test_round_trip_through_the_convmae_layout(kind: str, strides: tuple[int, ...]) -> None:
    settings = {"strides": strides, "image_size": 2 * int(np.prod(strides))}
    model = autoencoder(**settings) if kind == "pretraining" else classifier(**settings)
    released = to_format(model, "convmae")
    assert f"ConvMAE {kind}" == read_weights(released).format
    again, report = model_from(released, heads=2, **({"decoder": TINY["decoder"]} if kind == "pretraining" else {}))
    assert again.encoder.config == model.encoder.config
    assert_same(again.state_dict(), model.state_dict())
    assert not report.missing
    assert not report.unexpected
    assert_same(read_weights(released).state_dict(), model.state_dict())


@pytest.mark.parametrize("layout", ["videomae", "huggingface"])
@pytest.mark.parametrize("kind", ["pretraining", "finetuning"])
def test_round_trip_through_the_videomae_layouts(kind: str, layout: str) -> None:
    settings = {**PLAIN, **({"learnable_positions": False} if kind == "finetuning" else {})}
    model = autoencoder(**settings, strides=(16,)) if kind == "pretraining" else classifier(**settings, strides=(16,))
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            parameter.data.chunk(3)[1].zero_()  # the layouts have no key bias: softmax does not feel it
        if name == "decoder.embedding.bias":
            parameter.data.zero_()  # nor this one
    released = to_format(model, layout)
    decoder = {"decoder": TINY["decoder"]} if kind == "pretraining" else {}
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
        (autoencoder(**VIDEO), "convmae", "holds image models of three stages"),
        (autoencoder(), "videomae", "hold plain ViTs"),
        (autoencoder(**PLAIN, strides=(16,)), "huggingface", "no bias between encoder and decoder"),
        (autoencoder(), "mae", "expected one of convmae, videomae, huggingface"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_format(model, layout)


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
    assert "missing: fusion.joints... (4), decoder.mask_token" in str(report)
    assert "decoder.blocks... (24)" in str(report)


def test_second_version_has_a_cls_token() -> None:
    source = autoencoder()
    released = to_format(source, "convmae")
    released = {name: tensor for name, tensor in released.items() if not name.startswith("decoder")}
    released["cls_token"] = torch.randn(1, 1, 24)
    released["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), released["pos_embed"]], dim=1)
    model = create_autoencoder("base", **IMAGE)
    report = load_weights(model, released)
    assert report.format == "ConvMAE-v2 encoder only"
    assert "CLS token" in str(report)
    assert set(report.unexpected) == {
        *("cls_token", "mask_token", "stage1_output_decode.weight", "stage1_output_decode.bias"),
        *("stage2_output_decode.weight", "stage2_output_decode.bias"),
    }
    assert_same(model.encoder.state_dict(), source.encoder.state_dict())


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
    model = create_autoencoder("base", **IMAGE) if kind == "pretraining" else classifier()
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
    save(to_format(ours, "huggingface"), tmp_path / "model.safetensors")
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


def mae(**settings: object) -> timm.models.VisionTransformer:
    """MAE's classifier is timm's, with its names."""
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=5, global_pool="avg", **settings
    )
    return scrambled(model).eval()


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


# Files


def test_files(tmp_path: Path) -> None:
    source = classifier()
    released = to_format(source, "convmae")
    arguments = argparse.Namespace(lr=1e-3, model="convvit_base_patch16")
    torch.save({"model": released, "args": arguments, "epoch": 99, "scaler": {}}, tmp_path / "released.pth")
    torch.save({"model": source.state_dict(), "step": 7}, tmp_path / "ours.pt")
    save_file(source.state_dict(), tmp_path / "ours.safetensors")
    save(released, tmp_path / "released.safetensors")
    for path in tmp_path.iterdir():
        model = create_classifier("base", num_classes=5, **{n: v for n, v in IMAGE.items() if n != "decoder"})
        report = load_weights(model, path)
        assert_same(model.state_dict(), source.state_dict())
        assert not report.missing
        assert not report.unexpected


class Stranger:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_strange_code_is_executed(tmp_path: Path) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "executed"
    arguments = argparse.Namespace(path=Stranger(trace))
    torch.save({"model": to_format(classifier(), "convmae"), "args": arguments}, path)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read(path)
    assert not trace.exists()
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read(tmp_path / "absent.pth")


# What does not fit


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(names)}


def test_what_matters_is_an_error_and_leaves_the_model_alone() -> None:
    released = to_format(autoencoder(), "convmae")
    finetuned = to_format(classifier(), "convmae")
    token = {name.replace("fc_norm", "norm"): tensor for name, tensor in finetuned.items()}
    plain = to_format(classifier(**PLAIN, strides=(16,), learnable_positions=False), "videomae")
    other_decoder = create_autoencoder("base", **{**IMAGE, "decoder": (32, 2, 2)})
    ratios = {n: t.repeat_interleave(2, 0) if n.startswith("blocks1.0.mlp.fc1") else t for n, t in released.items()}
    for model, state, message in [
        (autoencoder(), {"weight": torch.zeros(1)}, "no known format"),
        (autoencoder(), {"model": {"epoch": 3}}, "expected names and tensors"),
        (autoencoder(), {**released, "blocks3.0.gamma_1": torch.zeros(24)}, "gamma_1 has no place"),
        (classifier(), {**released, "position_bias": torch.zeros(24)}, "does not have: position_bias"),
        (autoencoder(), without(released, "blocks2.1.norm1."), "norm1.weight is missing"),
        (autoencoder(), without(released, "norm."), "a decoder but no norm"),
        (autoencoder(), without(released, "stage"), "a decoder but no fusion"),
        (autoencoder(), without(released, "decoder_norm."), "decoder: decoder.norm.weight is missing"),
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

ONE_EACH = {"num_frames": 4, "tubelet": 1, "temporal_kernel": 1}  # a video model whose tensors have an image's shapes


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
    save(weights.state_dict(), path, geometry=weights.geometry)
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


def run_of(model: nn.Module, **config: object) -> dict:
    """What the checkpoint of a run holds."""
    return {"model": model.state_dict(), "config": {"model": {"probe": None, "heads": None, **config}}}


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


def test_the_tables_of_a_released_layout_are_the_runs_own(tmp_path: Path) -> None:
    settings = {"size": "base", "num_frames": 1, "image_size": 64, "widths": TINY["widths"], "depths": TINY["depths"]}
    torch.save(run_of(autoencoder(), **settings), tmp_path / "run.pth")
    given = [str(tmp_path / "run.pth"), str(tmp_path / "convmae.pth"), "--to", "convmae"]
    for more, tokens in [([], 16), (["--image-size", "32"], 4)]:
        convert_command.main([*given, *more])
        assert read(tmp_path / "convmae.pth")["model"]["pos_embed"].shape == (1, tokens, 24)


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


# Sizes


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "huge"])
def test_sizes_are_found_in_the_shapes(size: str) -> None:
    with torch.device("meta"):
        model = create_autoencoder(size, num_frames=1)
    sizes = model_arguments(to_format(model, "convmae"))
    assert sizes["size"] == size
    with torch.device("meta"):
        again = create_autoencoder(**sizes)
    assert again.encoder.config == model.encoder.config
    assert again.decoder.blocks[0].attention.heads == model.decoder.blocks[0].attention.heads
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


def test_sizes_of_our_own_weights() -> None:
    for model in (
        autoencoder(),
        autoencoder(**VIDEO),
        classifier(),
        autoencoder(**{**VIDEO, "strides": (7, 1, 2), "image_size": 28}),
    ):
        sizes = model_arguments(model.state_dict())
        config = model.encoder.config
        for name in ("widths", "depths", "strides", "tubelet", "mlp_ratio", "channels"):
            assert sizes[name] == getattr(config, name)
        assert sizes["temporal_kernel"] == config.temporal_kernel


def test_layers_of_the_released_base_model() -> None:
    """26 groups in the released code are 13 scales, with and without weight decay."""
    with torch.device("meta"):
        model = create_classifier("base", num_frames=1, num_classes=1000)
    scales = model.layer_scales(0.65)
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert len(set(scales.values())) == 13
    assert round(scales["encoder.projection.weight"], 5) == 0.00569
    assert scales["encoder.attention_blocks.10.mlp.fc1.bias"] == 0.65
    assert scales["head.weight"] == scales["norm.bias"] == 1


# Image weights into video


def still(images: Tensor, frames: int) -> Tensor:
    return images.expand(-1, -1, frames, -1, -1)


def without_time(model: nn.Module, image: nn.Module) -> nn.Module:
    """The table over time zeroed: every frame has the image's positions."""
    with torch.no_grad():
        model.encoder.positions.copy_(image.encoder.positions.repeat(1, model.encoder.config.grid[0], 1))
    return model


def tokens_differ(image: nn.Module, video: nn.Module, masked: bool) -> float:
    """The largest difference between the image model's tokens and those of each frame of a still clip."""
    t, h, w = video.encoder.config.grid
    images = torch.randn(2, *image.encoder.config.clip_shape, generator=torch.Generator().manual_seed(3))
    visible = masking.tube((1, h, w), 0.75).expand(2, 1, h, w) if masked else None
    tubes = None if visible is None else visible.expand(2, t, h, w)
    with torch.inference_mode():
        expected = image.encode(images, visible)
        tokens = video.encode(still(images, video.encoder.config.num_frames), tubes)
    return (tokens.unflatten(1, (t, -1)) - expected[:, None]).abs().max().item()


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


def test_the_tool_converts_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = golden("convmae")
    torch.save({"model": source, "args": argparse.Namespace(lr=1.0)}, tmp_path / "released.pth")
    ours, again = str(tmp_path / "ours.safetensors"), str(tmp_path / "again.pth")
    convert_command.main([str(tmp_path / "released.pth"), ours])
    convert_command.main([ours, again, "--to", "convmae"])
    printed = capsys.readouterr().out
    assert "ConvMAE pretraining: 119 tensors; encoder, fusion, decoder" in printed
    back = read(again)["model"]
    for table in ("pos_embed", "decoder_pos_embed"):
        assert (back.pop(table) - source.pop(table)).abs().max() < 1e-6
    assert_same(back, source)


def test_the_tool_inflates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = autoencoder()
    save(to_format(image, "convmae"), tmp_path / "image.pth")
    inflate_command.main([str(tmp_path / "image.pth"), str(tmp_path / "video.pth"), "--num-frames", "4"])
    assert "depthwise kernels over 3 frames (center)" in capsys.readouterr().out
    video = create_autoencoder("base", **VIDEO)
    assert video.load_state_dict(read(tmp_path / "video.pth")["model"])
    assert not load_weights(video, tmp_path / "video.pth").missing
    assert tokens_differ(image, without_time(video, image), masked=True) < 1e-5
