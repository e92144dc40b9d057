"""The image encoders in timm: the properties that timm's own tests check, and our weights under its names."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from test_backbone import golden_sizes
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from weight_cases import autoencoder, classifier, golden, scrambled

import video_convmae.timm  # registers the models
from video_convmae.weights.files import save_file
from video_convmae.weights.formats import to_format

SMALL = {"widths": (8, 12, 24), "depths": (1, 1, 2), "heads": 2}


def create(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("convmae_base", **{"img_size": 64, "num_classes": 5, **SMALL, **options}).eval()


def images(height: int = 64, width: int = 64, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def test_names_are_listed_with_their_default_configuration() -> None:
    names = timm.list_models("convmae_*")
    assert names == [f"convmae_{size}" for size in ("base", "huge", "large", "small", "tiny")]
    assert timm.list_models("convmae_*", pretrained=True) == []
    for name in ("convmae_base", "convmae_tiny"):
        with torch.device("meta"):
            model = timm.create_model(name)
        config = model.default_cfg
        assert model.pretrained_cfg is config
        assert (config["architecture"], config["input_size"], config["num_classes"]) == (name, (3, 224, 224), 1000)
        assert f"{config['classifier']}.weight" in model.state_dict()
        assert f"{config['first_conv']}.weight" in model.state_dict()
        assert model.num_classes == 1000
        assert [info["reduction"] for info in model.feature_info] == [4, 8, 16]
        model.reset_classifier(0)
        if name == "convmae_base":  # INTERFACES: the encoder with its norm, and learnable positions
            assert sum(p.numel() for p in model.parameters()) == 84_455_296 + 196 * 768


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (50, 71)])
def test_shapes_of_any_size(size: tuple[int, int]) -> None:
    model, batch = create(), images(*size)
    features = model.forward_features(batch)
    assert features.shape == (2, model.num_features, -(-size[0] // 16), -(-size[1] // 16))
    assert model(batch).shape == (2, 5)
    assert torch.equal(model.forward_head(features), model(batch))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model(batch).isfinite().all()


def test_positions_for_any_size() -> None:
    """Of the pictures with their padding, so that they are read as they are."""
    for size, tokens in ((50, 16), ((50, 71), 20), ((64, 80), 20)):
        for options in ({}, {"features_only": True}):
            model = create(img_size=size, **options)
            positions = model.state_dict()["model.encoder.positions" if options else "encoder.positions"]
            assert positions.shape == (1, tokens, 24)
    assert create(img_size=50, strides=(2, 2, 2)).encoder.positions.shape == (1, 49, 24)


def test_the_classifier_is_reset() -> None:
    model = create()
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(images()).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, model.num_features, 4, 4)
    assert create(num_classes=0, global_pool="")(images()).shape == (2, 24, 4, 4)
    model.reset_classifier(7, "avg")
    assert model(images()).shape == (2, 7)
    assert create(global_pool="catavgmax")(images()).shape == (2, 5)
    assert create(num_classes=0)(images()).shape == (2, 24)


@pytest.mark.parametrize("indices", [None, (0, 2), (-1,), (1,)])
def test_features_only(indices: tuple[int, ...] | None) -> None:
    model = create(features_only=True, **({} if indices is None else {"out_indices": indices})).eval()
    outputs = model(images(96, 48))
    assert len(outputs) == len(model.feature_info.channels()) == len(indices or range(3))
    for output, channels, reduction in zip(outputs, model.feature_info.channels(), model.feature_info.reduction()):
        assert output.shape == (2, channels, 96 // reduction, 48 // reduction)
    whole = create()
    whole.load_state_dict({**whole.state_dict(), **model.model.state_dict()})
    for output, wanted in zip(outputs, whole.forward_intermediates(images(96, 48), indices, intermediates_only=True)):
        torch.testing.assert_close(output, wanted)


def test_intermediates() -> None:
    model, batch = create(), images()
    last, maps = model.forward_intermediates(batch)
    assert torch.equal(last, model.forward_features(batch))
    assert torch.equal(maps[-1], last)
    (channels_last,) = model.forward_intermediates(batch, 1, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(channels_last.permute(0, 3, 1, 2), last)
    tokens = model.get_intermediate_layers(batch, n=2)
    assert [tuple(each.shape) for each in tokens] == [(2, 16, 24)] * 2
    assert torch.equal(tokens[-1], last.flatten(2).transpose(1, 2))
    (first,) = model.get_intermediate_layers(images(50, 71), n=[0], reshape=True, norm=True)
    assert first.shape == (2, 24, 4, 5)
    with pytest.raises(ValueError, match="no class token"):
        model.get_intermediate_layers(batch, return_prefix_tokens=True)


def test_every_parameter_learns_and_checkpointing_changes_nothing() -> None:
    model = create(head_init_std=0.1).train()
    gradients = []
    for enable in (False, True, False):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images()).square().mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(gradients[0], gradients[1]):
        torch.testing.assert_close(one, other)


def test_options_reach_the_encoder() -> None:
    model = create(in_chans=5, drop_path_rate=0.2, drop_rate=0.3, dtype=torch.bfloat16)
    assert model(images(channels=5).bfloat16()).dtype == torch.bfloat16
    assert model.encoder.config.drop_path == 0.2
    assert model.head_drop.p == 0.3
    with pytest.raises(TypeError, match="depth"):
        create(depth=3)


def test_channels_last_changes_nothing() -> None:
    """As timm's train.py asks with --channels-last; the layout reaches the depthwise kernels."""
    for options in ({}, {"features_only": True, "out_indices": (1,)}):
        model, batch = create(head_init_std=0.1, **options), images(50, 71)
        expected = model(batch)
        model = model.to(memory_format=torch.channels_last)
        kernels = [p for p in model.parameters() if p.ndim == 5]
        assert len(kernels) == 2
        assert all(p[:, :, 0].is_contiguous(memory_format=torch.channels_last) for p in kernels)
        for one, other in zip(model(batch.to(memory_format=torch.channels_last)), expected):
            torch.testing.assert_close(one, other)
        assert all(isinstance(p, nn.Parameter) for p in model.double().parameters())
        assert all(p.dtype == torch.float64 and p.requires_grad for p in model.parameters())


def test_stages_that_are_not_wanted_are_not_computed() -> None:
    model, batch = create(), images(50, 71)
    calls: list[nn.Module] = []
    for block in (*model.encoder.conv_stages[1], *model.encoder.attention_blocks):
        block.register_forward_hook(lambda module, *rest: calls.append(module))
    whole = model.forward_intermediates(batch, intermediates_only=True)
    assert len(calls) == 3
    for count, blocks in ((1, 0), (2, 1), (3, 3)):
        calls.clear()
        last, maps = model.forward_intermediates(batch, range(count), stop_early=True)
        assert len(calls) == blocks
        assert torch.equal(last, maps[-1])
        assert all(torch.equal(one, other) for one, other in zip(maps, whole))
        assert len(maps) == count
    (first,) = model.forward_intermediates(batch, [0], norm=True, stop_early=True, intermediates_only=True)
    assert torch.equal(first, whole[0])  # the norm is of the last stage
    assert torch.equal(model.forward_intermediates(batch, [0])[0], model.forward_features(batch))


@pytest.mark.parametrize("indices", [(0,), (1,), (0, 1), (-1,), 2])
def test_stages_that_are_not_wanted_are_pruned(indices: int | tuple[int, ...]) -> None:
    model, batch = create(), images(50, 71)
    expected = model.forward_intermediates(batch, indices, intermediates_only=True)
    kept = model.prune_intermediate_layers(indices)
    given = model.forward_intermediates(batch, kept, intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))
    width = model.feature_info[max(kept)]["num_chs"]
    assert (model.num_features, model.num_classes) == (width, 0)
    assert model.forward_features(batch).shape[1] == model(batch).shape[1] == width
    model(batch).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # what is left is needed
    assert ("encoder.attention_blocks.0.norm1.weight" in model.state_dict()) == (max(kept) == 2)
    model.reset_classifier(4, "avg")
    assert model(batch).shape == (2, 4)


def test_groups_of_layer_decay() -> None:
    model = create()
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scales = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert named["encoder.positions"] == (named["encoder.embeddings.0.linear.weight"][0], 0.0)
    first, second, head = (
        named[name][0]
        for name in (
            "encoder.attention_blocks.0.mlp.fc1.weight",
            "encoder.attention_blocks.1.mlp.fc1.weight",
            "head.weight",
        )
    )
    assert named["encoder.conv_stages.0.0.mlp.fc1.weight"][0] < first < second < head == 1.0


def test_it_computes_what_our_classifier_does(tmp_path: Path) -> None:
    """A run's weights, at the size that they were made for and at another."""
    ours = scrambled(classifier(num_classes=5, depths=(1, 1, 2))).eval()
    save_file(ours.state_dict(), tmp_path / "model.safetensors")
    model = create(checkpoint_path=str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(model(images()), ours(images()[:, :, None]), rtol=1e-4, atol=1e-4)
    larger = create(checkpoint_path=str(tmp_path / "model.safetensors"), img_size=96)
    assert larger.encoder.positions.shape == (1, 36, 24)
    assert torch.equal(larger.head.weight, ours.head.weight)


def test_pretrained_and_released_weights(tmp_path: Path) -> None:
    pretrained = autoencoder(depths=(1, 1, 2))
    torch.save(to_format(pretrained, "convmae"), tmp_path / "convmae.pth")
    for options in ({}, {"features_only": True}):
        loaded = create(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "convmae.pth")}, **options)
        encoder = loaded.model.encoder if options else loaded.encoder
        assert torch.equal(encoder.projection.weight, pretrained.encoder.projection.weight)
    released = golden("convvit")
    model = timm.create_model(
        "convmae_base", img_size=64, num_classes=len(released["head.bias"]), **golden_sizes(released)
    )
    model.load_state_dict(released)
    assert torch.equal(model.head.weight, released["head.weight"])


def test_a_head_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """Of ten classes into five, and of pretraining into a classifier: nothing is left new without a word."""
    ten, pretrained = create(num_classes=10), autoencoder(depths=(1, 1, 2))
    torch.save(to_format(pretrained, "convmae"), tmp_path / "convmae.pth")
    model = create()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"head.weight \(5, 24\).*head.weight \(10, 24\).*num_classes=0"):
        model.load_state_dict(ten.state_dict())
    with pytest.raises(RuntimeError, match=r"norm.weight \(24,\).* none of them; expected"):
        create(checkpoint_path=str(tmp_path / "convmae.pth"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    report = model.load_state_dict(ten.state_dict(), strict=False)
    assert report.missing_keys == report.unexpected_keys == ["head.weight", "head.bias"]
    assert torch.equal(model.encoder.projection.weight, ten.encoder.projection.weight)
    features = create(num_classes=0, checkpoint_path=str(tmp_path / "convmae.pth"))
    assert torch.equal(features.encoder.projection.weight, pretrained.encoder.projection.weight)
    features.reset_classifier(5)
    assert features(images()).shape == (2, 5)


def test_import_leaves_the_rest_alone() -> None:
    assert video_convmae.timm.ConvMAE.__module__ == "video_convmae.timm"
    assert timm.is_model("vit_base_patch16_224")
