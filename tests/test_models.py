"""The model's promises: no leakage, packed equals dense, the counts of the paper's sizes, every parameter alive.

`PlainConvMAE` below is a second implementation of the same equations with ordinary dense Conv3d layers, so that
packed and dense are both held against something that shares no layout code with them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from fvcore.nn import FlopCountAnalysis
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from video_convmae import create_autoencoder, create_classifier, masking
from video_convmae.models import positions
from video_convmae.models.autoencoder import Autoencoder, patch_target, undo_target
from video_convmae.models.packing import nest, put_patches, take_patches, unnest
from video_convmae.models.sizes import AutoencoderConfig, ClassifierConfig, EncoderConfig

HYBRIDS = ["tiny", "small", "base", "large", "huge"]
SIZES = [*HYBRIDS, "vit_tiny", "vit_base"]
MASKS = masking.MASKS | {"complementary": lambda grid, ratio, g: masking.complementary(grid, ratio, 2, g)[1]}
PARAMETERS = {  # without positions: encoder for images, for video, fusion
    "tiny": (2_032_896, 2_042_400, 221_568),
    "small": (21_867_264, 21_911_808, 1_180_416),
    "base": (84_455_296, 84_531_584, 4_326_912),
    "large": (272_157_312, 272_290_944, 9_439_232),
    "huge": (652_978_176, 653_194_240, 20_974_080),
}
GEOMETRIES = {
    "video": {"num_frames": 8, "image_size": 64},
    "kernel 1": {"num_frames": 4, "image_size": 64, "temporal_kernel": 1},
    "kernel 5": {"num_frames": 12, "image_size": 64, "temporal_kernel": 5},
    "strides 2,2,2": {"num_frames": 4, "image_size": 32, "strides": (2, 2, 2)},
    "strides 7,1,2": {"num_frames": 4, "image_size": 56, "strides": (7, 1, 2)},
    "not square": {"num_frames": 6, "image_size": (48, 80)},
    "tubelet 1": {"num_frames": 3, "image_size": 64, "tubelet": 1},
    "image": {"num_frames": 1, "image_size": 64},
}


def shrunk(size: str, **overrides: object) -> Autoencoder:
    """A model of that size, with one block a stage where it would be large."""
    depths = (2,) if size.startswith("vit") else (1, 1, 1)
    cut = {} if size in ("tiny", "vit_tiny") else {"depths": depths, "decoder": (96, 1, 3)}
    torch.manual_seed(0)
    return create_autoencoder(size, **{"num_frames": 4, "image_size": 64, **cut, **overrides})


def batch(model: Autoencoder, mask: str = "tube", ratio: float = 0.75, clips: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    visible = torch.stack([MASKS[mask](model.grid, ratio, generator) for _ in range(clips)])
    return torch.randn(clips, *model.encoder.config.clip_shape, generator=generator), visible


def running_cells(visible: Tensor, ratio: float) -> Tensor:
    """The tokens `(B, t, h, w)` that are predicted with decoder masking."""
    return torch.stack([masking.running_cell(of_clip, ratio) for of_clip in visible])


def hidden_pixels(model: Autoencoder, visible: Tensor) -> Tensor:
    """`visible` at pixel resolution, inverted: `(B, 1, T, H, W)`."""
    config = model.encoder.config
    fine = visible.repeat_interleave(config.tubelet, 1)
    return ~fine.repeat_interleave(config.patch, 2).repeat_interleave(config.patch, 3)[:, None]


# No leakage


@pytest.mark.parametrize("implementation", ["packed", "dense"])
@pytest.mark.parametrize(
    ("size", "mask"),
    [(size, mask) for size in SIZES for mask in MASKS if mask == "tube" or size not in ("large", "huge")],
)
def test_hidden_pixels_do_not_reach_the_tokens(size: str, mask: str, implementation: str) -> None:
    model = shrunk(size, implementation=implementation)
    clips, visible = batch(model, mask)
    hidden = hidden_pixels(model, visible)
    with torch.inference_mode():
        tokens = model.encode(clips, visible)
        for value in (torch.randn_like(clips) * 10, torch.full_like(clips, math.inf), torch.full_like(clips, math.nan)):
            assert torch.equal(model.encode(torch.where(hidden, value, clips), visible), tokens)
        assert not torch.equal(model.encode(torch.where(hidden, clips, clips + 1), visible), tokens)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_no_leakage_in_any_geometry(geometry: str) -> None:
    for implementation in ("packed", "dense"):
        model = shrunk("tiny", implementation=implementation, **GEOMETRIES[geometry])
        clips, visible = batch(model, "random")
        broken = torch.where(hidden_pixels(model, visible), math.nan, clips)
        with torch.inference_mode():
            assert torch.equal(model.encode(broken, visible), model.encode(clips, visible))


def test_visible_neighbours_do_reach_each_other_through_the_convolutions() -> None:
    """The masked convolution's purpose: without attention, a visible token still depends on a visible neighbour."""
    model = shrunk("tiny", depths=(1, 1, 0))
    visible = torch.zeros(1, *model.grid, dtype=torch.bool)
    visible[:, :, 1, 1:3] = True
    clips = torch.randn(1, *model.encoder.config.clip_shape)
    changed = clips.clone()
    changed[..., 16:32, 32:48] += 1  # the token at row 1, column 2
    with torch.inference_mode():
        before, after = (model.encode(x, visible).view(-1, 2, 192) for x in (clips, changed))
    assert not torch.equal(before[:, 0], after[:, 0])


# Several masks of a clip


@pytest.mark.parametrize("implementation", ["packed", "dense"])
@pytest.mark.parametrize(
    ("geometry", "kind", "masks"),
    [("strides 2,2,2", "random", 4), ("strides 2,2,2", "frame", 2), ("image", "random", 4), ("video", "tube", 2)],
)
def test_masks_of_a_clip_together_equal_a_pass_each(geometry: str, kind: str, masks: int, implementation: str) -> None:
    """Loss, tokens, predictions, gradients, with decoder masking and without."""
    together, apart = (shrunk("tiny", implementation=implementation, **GEOMETRIES[geometry]).double() for _ in range(2))
    generator, clips = torch.Generator().manual_seed(1), batch(together)[0].double()
    visible = torch.stack([masking.complementary(together.grid, 0.75, masks, generator, kind) for _ in clips])
    for decoder_ratio in (None, 0.5):
        drawn = None if decoder_ratio is None else torch.stack([running_cells(v, decoder_ratio) for v in visible])
        output = together(clips, visible, drawn)
        passes = [apart(clips, visible[:, i], None if drawn is None else drawn[:, i]) for i in range(masks)]
        loss = torch.stack([each.loss for each in passes]).mean()
        assert output.loss.item() == pytest.approx(loss.item(), rel=1e-12)
        for field in ("tokens", "prediction", "target"):  # the masks of a clip follow each other
            expected = torch.stack([getattr(each, field) for each in passes], dim=1).flatten(0, 1)
            torch.testing.assert_close(getattr(output, field), expected, rtol=1e-10, atol=1e-12)
        output.loss.backward()
        loss.backward()
    for ours, theirs in zip(together.parameters(), apart.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)


def test_a_token_sees_its_own_mask_alone() -> None:
    model = shrunk("tiny")
    visible = torch.stack([masking.complementary(model.grid, 0.75, 4) for _ in range(2)])
    clips = torch.randn(2, *model.encoder.config.clip_shape)
    broken = torch.where(hidden_pixels(model, visible[:, 1]), math.nan, clips)
    with torch.inference_mode():
        tokens = model.encode(clips, visible).unflatten(0, (2, 4))
        others = model.encode(broken, visible).unflatten(0, (2, 4))
    assert torch.equal(tokens[:, 1], others[:, 1])
    assert others[:, [0, 2, 3]].isnan().all()


# Packed equals dense


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def gradients(model: Autoencoder, clips: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, tokens and every parameter's gradient; the loss also reads the tokens, so that nothing is left out."""
    output = model(clips, visible)
    (output.loss + output.tokens.square().mean()).backward()
    return output.loss, output.tokens, {name: p.grad for name, p in model.named_parameters()}


def without_key_bias(name: str, gradient: Tensor) -> Tensor:
    """Softmax does not feel the key bias: its gradient is rounding error around zero, of no relative precision."""
    if name.endswith("qkv.bias"):
        q, _, v = gradient.chunk(3)
        return torch.cat([q, v])
    return gradient


def assert_equal(ours: Autoencoder, theirs: nn.Module, mask: str, dtype: torch.dtype) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    clips, visible = batch(ours, mask)
    clips = clips.to(dtype)
    loss, tokens, grads = gradients(ours, clips, visible)
    their_loss, their_tokens, their_grads = gradients(theirs, clips, visible)
    assert relative(loss, their_loss) < tolerance
    assert relative(tokens, their_tokens) < tolerance
    assert grads.keys() == their_grads.keys()
    for name in grads:
        ours_, theirs_ = (without_key_bias(name, g[name]) for g in (grads, their_grads))
        assert relative(ours_, theirs_) < tolerance, name


def pair(size: str, dtype: torch.dtype = torch.float64, **overrides: object) -> tuple[Autoencoder, Autoencoder]:
    packed = shrunk(size, implementation="packed", **overrides).to(dtype)
    dense = shrunk(size, implementation="dense", **overrides).to(dtype)
    dense.load_state_dict(packed.state_dict())
    return packed, dense


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_packed_equals_dense(size: str, mask: str) -> None:
    packed, dense = pair(size)
    assert [n for n, _ in packed.named_parameters()] == [n for n, _ in dense.named_parameters()]
    assert_equal(packed, dense, mask, torch.float64)


@pytest.mark.parametrize("size", ["large", pytest.param("huge", marks=pytest.mark.slow)])
def test_packed_equals_dense_at_large_widths(size: str) -> None:
    packed, dense = pair(size, num_frames=2, image_size=(32, 64))
    for mask in MASKS:
        packed.zero_grad()
        dense.zero_grad()
        assert_equal(packed, dense, mask, torch.float64)


@pytest.mark.parametrize("mask", ["tube", "random"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_packed_equals_dense_in_any_geometry(geometry: str, mask: str) -> None:
    assert_equal(*pair("tiny", **GEOMETRIES[geometry]), mask, torch.float64)


@pytest.mark.parametrize("mask", MASKS)
def test_packed_equals_dense_in_float32(mask: str) -> None:
    assert_equal(*pair("tiny", torch.float32), mask, torch.float32)


class PlainConvMAE(nn.Module):
    """The autoencoder with ordinary dense convolutions on `(B, C, t, H, W)`, reading the parameters of ours."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model
        self.pyramid: list[Tensor] = []  # of the last forward pass, zero where hidden

    def named_parameters(self, *args: object, **kwargs: object):  # the gradients are compared name by name
        return self.model.named_parameters()

    def encode(self, clips: Tensor, visible: Tensor) -> Tensor:
        model, config = self.model, self.model.encoder.config
        x, branches = clips, []
        self.pyramid = []
        for i, (embedding, stride) in enumerate(zip(model.encoder.embeddings, config.strides)):
            tubelet = config.tubelet if i == 0 else 1
            kernel = rearrange(embedding.linear.weight, "o (t h w c) -> o c t h w", t=tubelet, h=stride, w=stride)
            x = F.conv3d(x, kernel, embedding.linear.bias, stride=(tubelet, stride, stride))
            x = self.pointwise(lambda y, e=embedding: F.gelu(e.norm(y)), x)
            if i == len(config.strides) - 1:
                break
            side = math.prod(config.strides[i + 1 :])
            shown = visible.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, None]
            for block in model.encoder.conv_stages[i]:
                y = self.pointwise(lambda z, b=block: b.proj_in(b.norm1(z)), x)
                weight = block.depthwise.weight
                padding = [size // 2 for size in weight.shape[2:]]
                y = F.conv3d(torch.where(shown, y, 0), weight, block.depthwise.bias, padding=padding, groups=y.shape[1])
                x = x + self.pointwise(block.proj_out, y)
                x = x + self.pointwise(lambda z, b=block: b.mlp(b.norm2(z)), x)
            self.pyramid.append(torch.where(shown, x, 0))
            if model.fusion is not None:
                joint = model.fusion.joints[i]
                kernel = self.unnested(joint.weight, config.strides[i + 1 :])
                branches.append(F.conv3d(x, kernel, joint.bias, stride=(1, side, side)))
        x = model.encoder.projection(rearrange(x, "b c t h w -> b (t h w) c"))
        x = (x + model.encoder.positions)[visible.flatten(1)].view(len(x), -1, x.shape[-1])
        for block in model.encoder.attention_blocks:
            x = block(x)
        for branch in branches:
            branch = rearrange(branch, "b c t h w -> b (t h w) c")
            x = x + branch[visible.flatten(1)].view_as(x)
        return model.norm(x)

    def forward(self, clips: Tensor, visible: Tensor) -> Output:
        model, config = self.model, self.model.encoder.config
        tokens = self.encode(clips, visible)
        patch = config.patch
        patches = rearrange(clips, "b c (t u) (h p) (w q) -> b (t h w) (u p q) c", u=config.tubelet, p=patch, q=patch)[
            ~visible.flatten(1)
        ].view(len(clips), -1, config.tubelet * patch * patch, config.channels)
        mean, variance = patches.mean(2, keepdim=True), patches.var(2, keepdim=True, unbiased=True)
        target = ((patches - mean) / (variance.sqrt() + 1e-6)).flatten(2)
        packing = model.encoder.packing(clips, visible)
        prediction = model.decoder(tokens, packing)
        return Output((prediction - target).square().mean(), tokens)

    @staticmethod
    def pointwise(function, x: Tensor) -> Tensor:
        return function(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

    @staticmethod
    def unnested(weight: Tensor, later: tuple[int, ...]) -> Tensor:
        """A fusion Linear's weight over nested cells as a convolution kernel `(out, in, 1, side, side)`."""
        if len(later) == 2:
            return rearrange(
                weight, "o (a b c d i) -> o i 1 (a c) (b d)", a=later[1], b=later[1], c=later[0], d=later[0]
            )
        return rearrange(weight, "o (a b i) -> o i 1 a b", a=later[0], b=later[0])


class Output:
    def __init__(self, loss: Tensor, tokens: Tensor) -> None:
        self.loss, self.tokens = loss, tokens


@pytest.mark.parametrize("geometry", ["video", "kernel 5", "strides 2,2,2", "not square"])
def test_both_equal_plain_convolutions(geometry: str) -> None:
    packed, dense = pair("tiny", **GEOMETRIES[geometry])
    reference, _ = pair("tiny", **GEOMETRIES[geometry])
    reference.load_state_dict(packed.state_dict())
    assert_equal(packed, PlainConvMAE(reference), "random", torch.float64)
    reference.zero_grad()
    assert_equal(dense, PlainConvMAE(reference), "tube", torch.float64)


# The pyramid


@pytest.mark.parametrize("mask", ["tube", "random"])
@pytest.mark.parametrize("geometry", ["video", "strides 7,1,2", "not square", "image"])
def test_the_pyramid_equals_plain_convolutions(geometry: str, mask: str) -> None:
    packed, dense = pair("tiny", **GEOMETRIES[geometry])
    reference = PlainConvMAE(packed)
    clips, visible = batch(packed, mask)
    clips = clips.double()
    for shown in (visible, None):
        with torch.inference_mode():
            index = torch.ones_like(visible) if shown is None else shown
            reference.encode(clips, index)
            for model in (packed, dense):
                tokens, grids = model.encoder.forward_intermediates(clips, shown)
                expected = model.encoder(clips, model.encoder.packing(clips, shown)).tokens
                assert torch.equal(tokens, expected)
                assert [grid.shape for grid in grids[:-1]] == [grid.shape for grid in reference.pyramid]
                assert all(relative(ours, theirs) < 1e-12 for ours, theirs in zip(grids, reference.pyramid))
                last = grids[-1].permute(0, 2, 3, 4, 1)
                assert torch.equal(last[index].view_as(tokens), tokens)
                assert not last[~index].any()


@pytest.mark.parametrize("size", ["tiny", "vit_tiny"])
@pytest.mark.parametrize("frames", [1, 4])
def test_pyramid_shapes_and_the_choice_of_stages(size: str, frames: int) -> None:
    model = shrunk(size, num_frames=frames, image_size=(64, 96)).encoder
    t = max(1, frames // 2)
    stages = [(48, t, 16, 24), (96, t, 8, 12), (192, t, 4, 6)] if size == "tiny" else [(192, t, 4, 6)]
    count = len(stages)
    clips = torch.randn(2, *model.config.clip_shape)
    for indices, chosen in [(None, stages), (1, stages[-1:]), (count, stages), ([0, -1], [stages[0], stages[-1]])]:
        grids = model.forward_intermediates(clips, indices=indices, intermediates_only=True)
        assert [tuple(grid.shape[1:]) for grid in grids] == list(dict.fromkeys(chosen))
    for wrong in (0, count + 1, [count], [-count - 1], []):
        with pytest.raises(ValueError, match="indices is"):
            model.forward_intermediates(clips, indices=wrong)


@pytest.mark.parametrize("implementation", ["packed", "dense"])
def test_hidden_pixels_do_not_reach_the_pyramid_and_gradients_do(implementation: str) -> None:
    model = shrunk("tiny", implementation=implementation)
    clips, visible = batch(model, "random")
    hidden = hidden_pixels(model, visible)
    broken = torch.where(hidden, math.nan, clips).requires_grad_()
    grids = model.encoder.forward_intermediates(broken, visible, intermediates_only=True)
    expected = model.encoder.forward_intermediates(clips, visible, intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grids, expected))
    if implementation == "packed":  # dense computes the hidden cells, so NaN times zero reaches the gradients
        sum(grid.square().sum() for grid in grids).backward()
        assert broken.grad.isfinite().all()
        assert not broken.grad[hidden.expand_as(clips)].any()


# Counts


@pytest.mark.parametrize("size", HYBRIDS)
def test_parameter_counts(size: str) -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        image, video = create_autoencoder(size, num_frames=1), create_autoencoder(size)
    assert (
        count(image.encoder) + count(image.norm),
        count(video.encoder) + count(video.norm),
        count(video.fusion),
    ) == PARAMETERS[size]


@pytest.mark.parametrize(
    ("size", "options", "millions"),
    [
        ("small", {}, 21.9),
        ("small", {"heads": 12}, 21.9),
        ("base", {}, 84.6),
        ("large", {}, 272),
        ("large", {"depths": (2, 2, 23)}, 310),
        ("large", {"depths": (2, 2, 23), "mlp_ratio": (8, 8, 4)}, 322),
        ("huge", {"strides": (7, 1, 2)}, 651),
        ("huge", {"mlp_ratio": (8, 8, 4)}, 679),
        ("huge", {"widths": (1024, 1280, 1408), "depths": (3, 3, 38), "strides": (7, 1, 2)}, 997),
    ],
)
def test_image_encoders_in_the_shapes_that_sources_name(size: str, options: dict, millions: float) -> None:
    """shared/reference/convmae_family.md section 2.2: with positions and norm."""
    with torch.device("meta"):
        model = create_autoencoder(size, num_frames=1, **options)
    counted = [*model.encoder.parameters(), *model.norm.parameters(), model.encoder.positions]
    assert sum(each.numel() for each in counted) / 1e6 == pytest.approx(millions, abs=0.051 if millions < 100 else 0.51)


def test_mlp_ratios_are_one_number_or_one_a_stage() -> None:
    config = EncoderConfig(size="tiny", mlp_ratio=[8, 8, 4])
    assert config.mlp_ratios == (8, 8, 4)
    assert EncoderConfig(size="tiny").mlp_ratios == (4, 4, 4)
    with pytest.raises(ValueError, match=r"mlp_ratio is \(8, 4\); expected one number, or 3, one a stage"):
        EncoderConfig(size="tiny", mlp_ratio=(8, 4))


def test_classifier_has_the_published_86_million() -> None:
    with torch.device("meta"):
        model = create_classifier("base", num_classes=400)
    positions_ = model.encoder.positions.numel()
    assert positions_ == 1_204_224
    assert sum(p.numel() for p in model.parameters()) - positions_ == 84_839_184


def test_multiply_adds_of_the_base_model() -> None:
    """97.8 G dense, 39.1 G packed; 17.2 and 11.2 G for an image at 0.75 (docs/performance.md, PRETRAIN.md)."""
    with torch.device("meta"):
        models = {
            (frames, name): create_autoencoder("base", num_frames=frames, implementation=name)
            for frames in (16, 1)
            for name in ("dense", "packed")
        }
    totals = {key: sum(m.multiply_adds(160 if key[0] == 16 else 49).values()) / 1e9 for key, m in models.items()}
    assert {key: round(total, 1) for key, total in totals.items()} == {
        (16, "dense"): 97.8,
        (16, "packed"): 39.1,
        (1, "dense"): 17.2,
        (1, "packed"): 11.2,
    }


def test_multiply_adds_with_half_of_the_hidden_tokens_predicted() -> None:
    with torch.device("meta"):
        model = create_autoencoder("base")
    predicted = int(0.5 * (8 * 14 * 14 - 160))
    assert round(sum(model.multiply_adds(160, predicted).values()) / 1e9, 1) == 28.4


@pytest.mark.parametrize("decoder_ratio", [None, 0.3])
def test_multiply_adds_equal_fvcores_count_of_the_dense_model(decoder_ratio: float | None) -> None:
    model = shrunk("tiny", implementation="dense", num_frames=8, image_size=96).eval()
    inputs = clips, visible = batch(model, clips=1)
    ours = model.multiply_adds(int(visible.sum()))
    if decoder_ratio is not None:
        inputs = clips, visible, running_cells(visible, decoder_ratio)
        ours = model.multiply_adds(int(visible.sum()), int(decoder_ratio * (~visible).sum()))

    def attention(inputs: list, outputs: list) -> int:
        batch_, heads, queries, width = inputs[0].type().sizes()
        return 2 * batch_ * heads * queries * inputs[1].type().sizes()[2] * width

    analysis = FlopCountAnalysis(model, inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention)
    analysis.set_op_handle("aten::layer_norm", lambda inputs, outputs: 0)  # fvcore's own counts norms; we do not
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_module = analysis.by_module()
    assert sum(ours.values()) == analysis.total()
    assert ours["stage 1"] == by_module["encoder.conv_stages.0"]
    assert ours["stage 3"] == by_module["encoder.attention_blocks"]
    assert ours["fusion"] == by_module["fusion"]
    assert ours["decoder"] == by_module["decoder"]


# Decoder masking


@pytest.mark.parametrize("mask", ["tube", "random"])
def test_a_part_of_the_hidden_tokens_is_predicted(mask: str) -> None:
    """Targets are the whole decoder's, at fewer tokens; predictions are not: attention sees fewer mask tokens."""
    model = shrunk("tiny")
    clips, visible = batch(model, mask)
    chosen = running_cells(visible, 0.5)
    ours, theirs = model(clips, visible, chosen), model(clips, visible)
    among_hidden = torch.stack([of_clip[~shown] for of_clip, shown in zip(chosen, visible)])
    assert ours.prediction.shape == ours.target.shape == (2, int(0.5 * (~visible[0]).sum()), 2 * 16 * 16 * 3)
    assert torch.equal(ours.target.flatten(0, 1), theirs.target[among_hidden])
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.loss, F.mse_loss(ours.prediction, ours.target))
    assert not torch.allclose(ours.prediction.flatten(0, 1), theirs.prediction[among_hidden])


def test_without_attention_the_predictions_are_the_whole_decoders() -> None:
    model = shrunk("tiny", decoder=(96, 0, 3))
    clips, visible = batch(model, "random")
    predicted = running_cells(visible, 0.5)
    chosen = torch.stack([of_clip[~shown] for of_clip, shown in zip(predicted, visible)])
    ours, theirs = model(clips, visible, predicted).prediction, model(clips, visible).prediction
    assert torch.allclose(ours.flatten(0, 1), theirs[chosen], atol=1e-6)


def test_predicting_all_is_the_whole_decoder() -> None:
    model = shrunk("tiny")
    clips, visible = batch(model)
    all_, whole = model(clips, visible, running_cells(visible, 1.0)), model(clips, visible)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(all_, whole))


def test_tokens_that_are_neither_seen_nor_predicted_change_nothing() -> None:
    model = shrunk("tiny")
    clips, visible = batch(model, "random")
    predicted = running_cells(visible, 0.5)
    expected = model(clips, visible, predicted)
    broken = torch.where(hidden_pixels(model, visible | predicted), math.nan, clips)
    assert torch.equal(model(broken, visible, predicted).loss, expected.loss)
    broken = torch.where(hidden_pixels(model, visible), math.nan, clips)
    assert torch.equal(model(broken, visible, predicted).prediction, expected.prediction)


def test_every_parameter_learns_from_a_part_and_a_picture_shows_all() -> None:
    model = shrunk("tiny")
    clips, visible = batch(model)
    model(clips, visible, running_cells(visible, 0.4)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    changed = (model.reconstruct(clips, visible) != clips).any(1, keepdim=True)
    assert torch.equal(changed.unflatten(2, (-1, 2)).any(3)[..., ::16, ::16].squeeze(1), ~visible)


# Parameters


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_is_initialised(size: str) -> None:
    autoencoder = shrunk(size)
    depths = autoencoder.encoder.config.depths
    classifier = create_classifier(size, num_classes=3, num_frames=2, image_size=32, depths=depths)
    for model in (autoencoder, classifier):
        tensors = [*model.parameters(), *model.buffers()]
        with torch.no_grad():
            for tensor in tensors:
                tensor.fill_(math.nan)
        model.init_weights()
        assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_receives_a_gradient(size: str) -> None:
    model = shrunk(size)
    output = model(*batch(model))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    depths = model.encoder.config.depths
    classifier = create_classifier(size, num_classes=3, num_frames=4, image_size=64, depths=depths)
    classifier(batch(model)[0]).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in classifier.parameters())


def test_a_model_built_on_the_meta_device_is_the_same() -> None:
    ours = shrunk("tiny")
    with torch.device("meta"):
        model = create_autoencoder("tiny", num_frames=4, image_size=64)
    model.to_empty(device="cpu")
    model.init_weights()
    model.load_state_dict(ours.state_dict())
    clips, visible = batch(ours)
    assert torch.equal(model(clips, visible).loss, ours(clips, visible).loss)


# Shapes, order, targets


def test_output_shapes_and_order() -> None:
    model = shrunk("tiny", target="none")
    clips, visible = batch(model, "random")
    output = model(clips, visible)
    hidden = int((~visible[0]).sum())
    assert output.prediction.shape == output.target.shape == (2, hidden, 2 * 16 * 16 * 3)
    assert output.tokens.shape == (2, visible[0].sum(), 192)
    patches = rearrange(clips, "b c (t u) (h p) (w q) -> b (t h w) (u p q c)", u=2, p=16, q=16)
    assert torch.equal(output.target[0], patches[0][~visible[0].flatten()])
    assert torch.equal(model.encode(clips, visible), output.tokens)
    assert model.encode(clips).shape == (2, 2 * 4 * 4, 192)


@pytest.mark.parametrize("target", ["patch", "patch_channel", "none"])
def test_targets_are_normalised_and_undone(target: str) -> None:
    patches = torch.rand(2, 5, 2, 4, 4, 3, dtype=torch.float64)
    values = patch_target(patches, target).view_as(patches)
    axes = {"patch": (2, 3, 4, 5), "patch_channel": (2, 3, 4)}.get(target)
    if axes:
        assert values.mean(axes).abs().max() < 1e-12
        assert (values.var(axes) - 1).abs().max() < 1e-4
    assert torch.allclose(undo_target(values.flatten(2), patches, target), patches)


def test_reconstruction_keeps_the_visible_pixels() -> None:
    model = shrunk("tiny")
    clips, visible = batch(model)
    hidden = hidden_pixels(model, visible).expand_as(clips)
    result = model.reconstruct(clips, visible)
    assert torch.equal(result[~hidden], clips[~hidden])
    assert not torch.equal(result[hidden], clips[hidden])


def test_patches_and_cells_are_permutations() -> None:
    clips = torch.randn(2, 3, 4, 32, 48)
    index = torch.arange(2 * 2 * 3).expand(2, -1)
    assert torch.equal(put_patches(take_patches(clips, 2, 16, index), (2, 2, 3)), clips)
    grid = torch.randn(2, 2, 12, 24, 5)
    assert torch.equal(unnest(nest(grid, (2, 3)), (2, 3), (2, 12, 24)), grid)
    rows = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 1, 4, 4, 1)
    assert nest(rows, (2, 2)).flatten().tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


def test_video_positions_at_one_frame_are_the_image_table() -> None:
    image = positions.sincos((1, 14, 14), 768)
    video = positions.sincos((8, 14, 14), 768).view(8, 196, 768)
    time = video[:, :1] - image[:1]
    assert torch.allclose(video, image + time, atol=1e-6)
    column = torch.arange(14.0)[:, None] / 10000 ** (torch.arange(192) / 192)
    assert torch.allclose(image.view(14, 14, 768)[3, :, :192], column.sin(), atol=1e-5)  # width comes first


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_frames": 5}, "multiple of the tubelet"),
        ({"image_size": 60}, "multiples of the spatial stride"),
        ({"widths": (8, 8)}, "differ in length"),
        ({"implementation": "sparse"}, "packed"),
        ({"target": "edges"}, "target"),
        ({"decoder": (96, 2)}, "decoder is"),
        ({"position_table": "learned"}, "position_table"),
        ({"temporal_kernel": 2}, "odd"),
        ({"heads": 7}, "heads"),
        ({"drop_path": 1.5}, "drop_path is 1.5; expected 0 or more and less than 1"),
        ({"decoder": (96, -1, 3)}, "decoder is"),
        ({"depths": (1, -1, 1)}, "depths is"),
        ({"strides": (4, 0, 2)}, "strides is"),
        ({"tubelet": -2}, "tubelet is"),
        ({"mlp_ratio": -1}, "mlp_ratio is"),
    ],
)
def test_impossible_models_are_errors(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_autoencoder("tiny", **{"num_frames": 4, "image_size": 64, **wrong})


@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig("base"),
        AutoencoderConfig("base", num_frames=1, image_size=(48, 80), target="none"),
        AutoencoderConfig("vit_tiny", decoder=(96, 1, 3), strides=(8,)),
        ClassifierConfig("tiny", num_frames=4, learnable_positions=False),
        ClassifierConfig("tiny", probe="knn"),
    ],
)
def test_options_hold_the_numbers_and_survive_a_round_trip(config: EncoderConfig) -> None:
    """Through JSON too, which has lists in place of tuples, and through jsonargparse, as config.yaml of a run."""
    values = asdict(config)
    assert config.grid[1] * config.patch == config.clip_shape[2]
    for name in ("widths", "depths", "heads", "strides", "tubelet", "temporal_kernel", "decoder", "target"):
        assert values.get(name) not in ((), 0, "auto"), name
    assert type(config)(**values) == config
    assert type(config)(**json.loads(json.dumps(values))) == config
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(type(config))
    plain = json.loads(json.dumps(values))
    assert type(config)(**parser.instantiate(parser.parse_object(plain)).as_dict()) == config


def test_positions_are_learnable_in_finetuning_alone() -> None:
    assert ClassifierConfig().learnable_positions
    assert not ClassifierConfig(probe="linear").learnable_positions
    assert not ClassifierConfig(learnable_positions=False).learnable_positions
    assert not AutoencoderConfig().learnable_positions
    assert (ClassifierConfig().head_init_std, ClassifierConfig(probe="linear").head_init_std) == (2e-5, 0.01)


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="expected one of tiny"):
        create_autoencoder("enormous")
    with pytest.raises(TypeError, match="unknown overrides: hieght"):
        create_autoencoder("tiny", hieght=3)


def test_impossible_batches_are_errors() -> None:
    model = shrunk("tiny")
    clips, visible = batch(model)
    uneven = visible.clone()
    uneven[0] = True
    for wrong_clips, wrong_visible, message in [
        (clips[:, :, :2], visible, "clips are"),
        (clips, visible[:, :, :2], "visible is"),
        (clips, uneven, "same number"),
        (clips, torch.zeros_like(visible), "at least one"),
        (clips, torch.ones_like(visible), "nothing is hidden"),
        (clips, visible.float(), "expected bool"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(wrong_clips, wrong_visible)
    for wrong_predicted, message in [
        (~visible[:, :1], "predicted is"),
        ((~visible).float(), "predicted is"),
        (~visible & uneven, "predicted tokens"),
        (torch.zeros_like(visible), "predicted tokens"),
        (torch.ones_like(visible), "predicted token is visible"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(clips, visible, wrong_predicted)
