"""Small models with random weights, and comparisons, for the tests of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from video_convmae import create_autoencoder, create_classifier, masking
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe, create_probe

GOLDEN = Path(__file__).parent / "golden"
TINY = {"widths": (8, 12, 24), "depths": (1, 2, 2), "heads": 2, "decoder": (16, 2, 2)}
IMAGE = {"num_frames": 1, "image_size": 64, **TINY}
VIDEO = {"num_frames": 4, "image_size": 64, **TINY}
PLAIN = {"num_frames": 4, "image_size": 32, "widths": (24,), "depths": (2,), "heads": 2, "position_table": "flat"}


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every parameter, of norms and positions too, so that a swapped or forgotten tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def size_of(settings: dict[str, object]) -> str:
    """The size that `model_arguments` names for widths and depths of no size."""
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
    """Compare bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor, theirs[name]), name


def mae(**settings: object) -> timm.models.VisionTransformer:
    """A classifier of MAE: timm's, with its names."""
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=5, global_pool="avg", **settings
    )
    return scrambled(model).eval()


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(names)}


ONE_EACH = {"num_frames": 4, "tubelet": 1, "temporal_kernel": 1}  # a video model whose tensors have an image's shapes


def run_of(model: nn.Module, **config: object) -> dict:
    """Contents of a run's checkpoint."""
    return {"model": model.state_dict(), "config": {"model": {"probe": None, "heads": None, **config}}}


def still(images: Tensor, frames: int) -> Tensor:
    return images.expand(-1, -1, frames, -1, -1)


def without_time(model: nn.Module, image: nn.Module) -> nn.Module:
    """Set the table over time to zero: every frame has the image's positions."""
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
