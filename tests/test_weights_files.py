"""Files of weights: suffixes, and pickles with foreign code."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file as save_safetensors
from weight_cases import (
    IMAGE,
    assert_same,
    classifier,
)

from video_convmae import create_classifier
from video_convmae.weights.files import read_file, save_file
from video_convmae.weights.formats import to_format
from video_convmae.weights.load import load_weights


def test_files(tmp_path: Path) -> None:
    source = classifier()
    released = to_format(source, "convmae")
    arguments = argparse.Namespace(lr=1e-3, model="convvit_base_patch16")
    torch.save({"model": released, "args": arguments, "epoch": 99, "scaler": {}}, tmp_path / "released.pth")
    torch.save({"model": source.state_dict(), "step": 7}, tmp_path / "ours.pt")
    save_safetensors(source.state_dict(), tmp_path / "ours.safetensors")
    save_file(released, tmp_path / "released.safetensors")
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
        read_file(path)
    assert not trace.exists()
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_file(tmp_path / "absent.pth")
