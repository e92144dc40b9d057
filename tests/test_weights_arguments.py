"""Arguments of the model that holds given weights, from their shapes."""

from __future__ import annotations

import pytest
import torch
from weight_cases import (
    VIDEO,
    autoencoder,
    classifier,
)

from video_convmae import create_autoencoder, create_classifier
from video_convmae.weights.arguments import model_arguments
from video_convmae.weights.formats import to_format


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
