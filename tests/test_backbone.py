"""The backbone of dense tasks: any size, relative positions, pyramids, weights."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from weight_cases import TINY, autoencoder, classifier, golden, run_of, scrambled

from video_convmae.dense import attention
from video_convmae.dense.attention import attend_decomposed, attend_with_table, join_windows, split_windows
from video_convmae.dense.backbone import Backbone
from video_convmae.dense.options import BackboneConfig
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.encoder import Encoder
from video_convmae.models.sizes import EncoderConfig
from video_convmae.weights.load import load_weights

SIZES = {name: value for name, value in TINY.items() if name != "decoder"}
DET = {"window": 2, "global_blocks": (0,), "relative_positions": "shared", "pyramid": "max_pool"}
VITDET = {"window": 3, "global_blocks": (1,), "relative_positions": "decomposed", "pyramid": "simple"}
SEG = {"relative_positions": "block", "pyramid": "convolution", "layer_scale": 1.0}
RECIPES = {"det": DET, "vitdet": VITDET, "seg": SEG}


def backbone(**options: object) -> Backbone:
    """A small backbone with random weights, positions and norms included."""
    torch.manual_seed(0)
    return scrambled(Backbone(BackboneConfig(**{**SIZES, "image_size": 64, **options}))).eval()


def images(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", [True, False], ids=["learnable", "fixed"])
def test_without_options_it_is_the_encoder(positions: bool) -> None:
    model = backbone(learnable_positions=positions)
    encoder = Encoder(EncoderConfig(**SIZES, num_frames=1, image_size=64, learnable_positions=positions))
    encoder.init_weights()
    encoder.load_state_dict(model.state_dict())
    expected = encoder.forward_intermediates(images()[:, :, None], intermediates_only=True)
    levels = model(images())
    assert [level.shape[2] for level in levels] == [16, 8, 4]
    for level, grid in zip(levels, expected):
        torch.testing.assert_close(level, grid[:, :, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [(64, 64), (50, 71), (96, 33), (17, 130)])
def test_any_size(recipe: str, size: tuple[int, int]) -> None:
    model = backbone(**RECIPES[recipe])
    levels = model(images(*size))
    for level, channels, stride in list(zip(levels, model.channels, model.strides))[:3]:
        assert level.shape == (2, channels, *(-(-pixels // stride) for pixels in size))
        assert level.isfinite().all()
    assert len(levels) == len(model.channels) == 4
    assert levels[3].shape[1] == model.channels[3]


def test_the_fourth_level_is_as_released() -> None:
    assert [tuple(level.shape[2:]) for level in backbone(**SEG)(images(512, 512, 1))] == [
        (128, 128),
        (64, 64),
        (32, 32),
        (15, 15),
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_size_between_tokens_is_padded_with_zeros(recipe: str) -> None:
    model = backbone(**RECIPES[recipe])
    given = images(60, 50)
    padded = model.stages(F.pad(given, (0, 14, 0, 4)))
    cropped = [x[:, :, : -(-60 // s), : -(-50 // s)] for x, s in zip(padded, (4, 8, 16))]
    if recipe != "vitdet":
        for level, expected in zip(model(given), cropped):
            torch.testing.assert_close(level, expected, rtol=0, atol=0)
    for level, expected in zip(model(images()), model.pyramid(model.stages(images()))):
        torch.testing.assert_close(level, expected, rtol=0, atol=0)  # nothing to pad


def materialised_table(table: Tensor, height: int, width: int) -> Tensor:
    """The bias of every pair, by its definition: `(1, heads, N, N)`."""
    cells = list(product(range(height), range(width)))
    middle = table.shape[0] // 2, table.shape[1] // 2
    rows = [[table[middle[0] + i - a, middle[1] + j - b] for a, b in cells] for i, j in cells]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)[None]


@pytest.mark.parametrize("values", [2**24, 100], ids=["at once", "by rows"])
@pytest.mark.parametrize("grid", [(4, 3), (3, 5), (1, 4)])
def test_a_table_against_a_materialised_bias(
    monkeypatch: pytest.MonkeyPatch, values: int, grid: tuple[int, int]
) -> None:
    monkeypatch.setattr(attention, "BIAS_VALUES", values)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, prod(grid), 8, generator=generator, dtype=torch.float64).requires_grad_()
    table = torch.randn(9, 11, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = attend_with_table(q, k, v, table, grid)
    scores = q @ k.transpose(-1, -2) / 8**0.5 + materialised_table(table, *grid)
    expected = scores.softmax(-1) @ v
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    given = torch.autograd.grad((ours * weights).sum(), (table, q, k, v), retain_graph=True)
    wanted = torch.autograd.grad((expected * weights).sum(), (table, q, k, v), retain_graph=True)
    for one, other in zip(given, wanted):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", [(4, 3), (3, 5)])
def test_decomposed_positions_against_a_materialised_bias(grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, prod(grid), 8, generator=generator, dtype=torch.float64).requires_grad_()
    rows, columns = torch.randn(2, 11, 8, generator=generator, dtype=torch.float64).requires_grad_()
    cells = list(product(range(grid[0]), range(grid[1])))
    vectors = torch.stack([torch.stack([rows[5 + i - a] + columns[5 + j - b] for a, b in cells]) for i, j in cells])
    scores = q @ k.transpose(-1, -2) / 8**0.5 + torch.einsum("bnqd,qkd->bnqk", q, vectors)
    expected = scores.softmax(-1) @ v
    ours = attend_decomposed(q, k, v, rows, columns, grid)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (rows, columns, q)) for y in (ours, expected))):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_offsets_keep_their_meaning_on_smaller_grids_and_stretch_on_larger_ones() -> None:
    table = torch.arange(-3.0, 4)
    assert attention.fit_offsets(table, 2, 0).tolist() == [-1, 0, 1]
    larger = attention.fit_offsets(table, 8, 0)
    assert len(larger) == 15
    assert larger[7] == 0
    assert (larger.diff() >= 0).all()


def test_windows_are_squares_of_the_grid() -> None:
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    windows = split_windows(x, 2)
    assert windows.shape == (12, 2, 2, 1)
    assert torch.equal(windows[1], x[0, :2, 2:4])
    assert torch.equal(join_windows(windows, (4, 6)), x)


def test_a_windowed_block_does_not_see_another_window() -> None:
    model = backbone(window=2, depths=(1, 2, 1), relative_positions="shared")
    given = torch.randn(1, 4, 4, 24)
    block, other = model.attention_blocks[0], given.clone()
    other[:, 2:] += 1
    table = model.window_positions
    torch.testing.assert_close(block(given, table)[:, :2], block(other, table)[:, :2], rtol=0, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("format", ["ours", "classifier", "released", "finetuned"])
def test_image_weights_load(recipe: str, format: str) -> None:
    """A checkpoint of pretraining and one of finetuning, and the released layouts of both, at another size."""
    if format in ("ours", "classifier"):
        source = autoencoder() if format == "ours" else classifier(learnable_positions=True)
        weights, sizes = run_of(source, **settings_of(source)), SIZES
        width = source.encoder.attention_blocks[0].norm1.weight
    else:
        weights = golden("convmae" if format == "released" else "convvit")
        width = weights["blocks3.0.norm1.weight"]
        sizes = golden_sizes(weights)
    model = backbone(**{**RECIPES[recipe], **sizes, "image_size": 96})
    report = load_weights(model, weights)
    assert set(report.missing) >= model.added > set()
    assert {name.removeprefix("encoder.") for name in report.loaded} == set(model.state_dict()) - model.added
    assert torch.equal(model.attention_blocks[0].norm1.weight, width)
    assert model(images(96, 64))[0].isfinite().all()


def settings_of(model: Autoencoder | Classifier) -> dict[str, object]:
    """What a run's configuration says of its encoder."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(model.encoder.config).items()}


def golden_sizes(weights: dict[str, Tensor]) -> dict[str, object]:
    """Widths and depths of the golden weights."""
    depths = tuple(
        1 + max(int(name.split(".")[1]) for name in weights if name.startswith(f"blocks{stage}."))
        for stage in (1, 2, 3)
    )
    widths = tuple(len(weights[f"blocks{stage}.0.norm1.weight"]) for stage in (1, 2, 3))
    ratio = len(weights["blocks3.0.mlp.fc1.bias"]) / widths[2]
    return {"widths": widths, "depths": depths, "heads": 2, "mlp_ratio": ratio}


def test_layer_scales() -> None:
    model = backbone(**SEG)
    scales = model.layer_scales(0.5)
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert scales["positions"] == scales["embeddings.0.linear.weight"] == 0.5**3
    assert scales["attention_blocks.1.attention.relative_positions"] == 0.5
    assert scales["pyramid.coarsest.0.weight"] == 1


def test_parameters_of_the_published_recipes() -> None:
    """Base: the encoder's 84,453,760 without a norm, its positions, and what each recipe adds."""
    with torch.device("meta"):
        base = Backbone(BackboneConfig(image_size=224))
        det = Backbone(
            BackboneConfig(
                image_size=1024, window=16, global_blocks=(0, 3, 6, 10), relative_positions="shared", pyramid="max_pool"
            )
        )
        seg = Backbone(BackboneConfig(image_size=512, relative_positions="block", layer_scale=1, pyramid="convolution"))
    assert count(base) == 84_455_296 - 2 * 768 + 196 * 768
    assert count(det) - count(base) == (64 * 64 - 196) * 768 + (31 * 31 + 127 * 127) * 12
    level = 9 * 768 * 768 + 768 + 2 * 768
    assert count(seg) - count(base) == (32 * 32 - 196) * 768 + 11 * (63 * 63 * 12 + 2 * 768) + level


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_blocks": (0,)}, "global_blocks is (0,) without windows; expected window above 0"),
        ({"window": 2, "global_blocks": (2,)}, "global_blocks is (2,); expected blocks 0 to 1"),
        ({"relative_positions": "swin"}, "relative_positions is 'swin'; expected one of none, shared"),
        ({"num_frames": 2}, "num_frames is 2; expected 1"),
        ({"relative_size": 100}, "relative_size is 100; expected a multiple of the stride 16"),
    ],
)
def test_errors_name_the_option(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        BackboneConfig(**{**SIZES, "image_size": 64, **options})
    assert message in str(caught.value)


def test_gradients_reach_every_parameter() -> None:
    for options in RECIPES.values():
        model = backbone(**options).train()
        sum(level.square().mean() for level in model(images())).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
