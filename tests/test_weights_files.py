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
from video_convmae.engine.checkpoint import find_weights
from video_convmae.errors import UserError
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


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 377008384\n"


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (LFS.encode(), "the pointer of Git LFS to a file of 377,008,384 bytes, not that file: run `git lfs pull`"),
        (b"\n<!DOCTYPE html><html><head><title>Sign in</title>", "a web page, not weights"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "a web page, not weights"),
        (b"Entry not found", "it is text, which begins 'Entry not found'"),
        (b'{"error": "gated"}', "it is text, which begins"),
        (b"", "it is empty"),
        (b"\x1f\x8b\x08\x00" + bytes(40), "a gzip file"),
    ],
    ids=["lfs", "html", "xml", "text", "json", "empty", "gzip"],
)
def test_what_is_no_file_of_weights_says_what_it_is(tmp_path: Path, name: str, contents: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(contents)
    for source in (tmp_path / name, *([tmp_path] if name == "pytorch_model.bin" else [])):
        with pytest.raises(UserError, match=message) as error:
            read_file(source)
        assert "\n" not in str(error.value)
        assert str(source) in str(error.value)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_that_is_cut_off_says_so(tmp_path: Path, name: str) -> None:
    save_file(classifier().state_dict(), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"is cut off, or|is cut off or damaged"):
        read_file(tmp_path / name)


def test_contents_count_and_not_the_suffix(tmp_path: Path) -> None:
    source = classifier()
    save_safetensors(source.state_dict(), tmp_path / "weights.pth")
    torch.save(source.state_dict(), tmp_path / "weights.safetensors")
    for path in tmp_path.iterdir():
        assert_same(read_file(path), source.state_dict())


def test_python_objects_are_refused_with_their_name(tmp_path: Path) -> None:
    for number, contents in enumerate(
        [{"model": classifier().state_dict(), "best": Stranger(tmp_path / "never")}, classifier()]
    ):
        torch.save(contents, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match=r"holds a Python object, [\w.]+, and to read it would execute") as error:
            read_file(tmp_path / f"{number}.pth")
        assert "\n" not in str(error.value)
        assert "Weights only load failed" not in str(error.value)
    assert not (tmp_path / "never").exists()


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(classifier().state_dict(), tmp_path / "w.safetensors")
    assert find_weights("~/w.safetensors") == tmp_path / "w.safetensors"
    assert load_weights(classifier(), "~/w.safetensors").loaded


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MCG-NJU/videomae-base", "hf download MCG-NJU/videomae-base --local-dir videomae-base, then give that folder"),
        ("https://huggingface.co/MCG-NJU/videomae-base", "hf download MCG-NJU/videomae-base"),
        ("hf://MCG-NJU/videomae-base", "hf download MCG-NJU/videomae-base"),
        ("https://example.com/weights.pth", "nothing is downloaded here: download the file and give its path"),
    ],
)
def test_a_name_on_the_hub_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for read, error in ((read_file, UserError), (find_weights, FileNotFoundError)):
        with pytest.raises(error, match=r"\(nothing is downloaded here") as raised:
            read(name)
        assert message in str(raised.value)
    (tmp_path / "MCG-NJU").mkdir()  # then it is a path
    with pytest.raises(FileNotFoundError) as raised:
        find_weights("MCG-NJU/videomae-base")
    assert "downloaded" not in str(raised.value)
