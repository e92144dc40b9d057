"""Exported files: ONNX and torch.export of every kind of model, compared, or nothing written; and what they rest on."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from run_files import finished_run
from torch import nn
from weight_cases import classifier, scrambled

import video_convmae
from video_convmae import create_autoencoder, create_classifier, create_probe, masking
from video_convmae.cli import run as run_command
from video_convmae.dense.options import SegmenterConfig
from video_convmae.dense.segmentation import Segmenter
from video_convmae.errors import UserError
from video_convmae.export import ABOUT, Exportable, export, with_clip

SMALL = {"widths": (8, 12, 16), "depths": (1, 1, 1), "heads": 2, "image_size": 32}
NAMES = ("pouring", "stirring", "waving")


def clips(model: nn.Module, count: int) -> torch.Tensor:
    return torch.randn(count, *model.encoder.config.clip_shape, generator=torch.Generator().manual_seed(9))


def small(kind: str, frames: int = 4) -> nn.Module:
    torch.manual_seed(0)
    if kind == "autoencoder":
        return scrambled(create_autoencoder("base", num_frames=frames, decoder=(16, 1, 2), **SMALL)).eval()
    if kind == "classifier":
        return scrambled(create_classifier("base", num_classes=3, num_frames=frames, **SMALL)).eval()
    probe = scrambled(create_probe("base", num_classes=3, num_frames=frames, kind=kind, **SMALL)).eval()
    if kind == "knn":
        probe.head.fit(torch.randn(9, 16), torch.arange(9) % 3)
    return probe


def run_torch(path: Path, batch: torch.Tensor) -> torch.Tensor:
    return torch.export.load(path).module()(batch)


def run_onnx(path: Path, batch: torch.Tensor, name: str = "clips") -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


@pytest.mark.parametrize(
    "kind", ["classifier", "knn", *(pytest.param(k, marks=pytest.mark.slow) for k in ("autoencoder", "attentive"))]
)
def test_torch_export_of_a_run(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = small(kind, frames=1 if kind == "classifier" else 4)
    data = {"format": "video"} if kind == "autoencoder" else {"format": "video", "labels": NAMES}
    run, file = finished_run(model, tmp_path / "run", **data), tmp_path / "files" / "model.pt2"
    assert run_command("export", [str(run), "--format=torch", f"--output={file}"]) == 0
    assert f"clips {model.encoder.config.clip_shape}".replace("(3", "(B, 3") in capsys.readouterr().out
    extra = {ABOUT: ""}
    program = torch.export.load(file, extra_files=extra).module()
    for count in (1, 4):
        batch = clips(model, count)
        torch.testing.assert_close(program(batch), Exportable(model)(batch), rtol=1e-4, atol=1e-4)
    about = json.loads(extra[ABOUT])
    assert about["mean"] == [0.4, 0.5, 0.6]
    assert about["stride"] == 2
    assert about.get("class_names") == (None if kind == "autoencoder" else list(NAMES))
    assert [each.name for each in file.parent.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    "kind",
    ["classifier", *(pytest.param(k, marks=pytest.mark.slow) for k in ("autoencoder", "linear", "attentive", "knn"))],
)
def test_onnx_of_a_run(kind: str, tmp_path: Path) -> None:
    model = small(kind, frames=1)
    result = export(finished_run(model, tmp_path / "run"), "onnx", tmp_path / "model.onnx")
    assert result.difference < 1e-4
    assert result.output == ("tokens" if kind == "autoencoder" else "logits")
    batch = clips(model, 5)
    expected = Exportable(model)(batch).detach()
    torch.testing.assert_close(run_onnx(result.path, batch), expected, rtol=1e-4, atol=1e-4)
    metadata = {entry.key: entry.value for entry in onnx.load(result.path).metadata_props}
    assert json.loads(metadata[ABOUT])["std"] == [0.2, 0.3, 0.25]


@pytest.mark.slow
def test_onnx_of_a_video_model_and_of_a_published_file_at_another_size(tmp_path: Path) -> None:
    model = small("classifier")
    run = finished_run(model, tmp_path / "run")
    result = export(run, "onnx", tmp_path / "model.onnx", num_frames=6, image_size=(48, 32))
    assert result.shape == (3, 6, 48, 32)
    other = with_clip(model, 6, (48, 32))
    batch = clips(other, 2)
    torch.testing.assert_close(run_onnx(result.path, batch), other(batch).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_segmenters(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**SMALL, "image_size": 64, "relative_positions": "block", "pyramid": "convolution"}
    model = scrambled(Segmenter(SegmenterConfig(**sizes, head_width=8, auxiliary_width=4, pools=(1, 2)), 3)).eval()
    file = export(finished_run(model, tmp_path / "run"), format, tmp_path / "model").path
    images = torch.randn(3, 3, 64, 64)
    result = run_torch(file, images) if format == "torch" else run_onnx(file, images, "images")
    torch.testing.assert_close(result, model(images)[0].detach(), rtol=1e-4, atol=1e-4)


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("classifier", frames=1)
    run = finished_run(model, tmp_path / "run")

    def wrong(exportable: nn.Module, *rest: object) -> object:
        return lambda batch: exportable(batch) * 1.01

    monkeypatch.setattr(video_convmae.export, "_write_torch", wrong)
    (tmp_path / "old.pt2").write_text("old")
    with pytest.raises(UserError, match=r"differs from the model by 1\.0e-02 .* nothing is written"):
        export(run, "torch", tmp_path / "old.pt2")
    assert (tmp_path / "old.pt2").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(small("classifier", frames=1), tmp_path / "run")
    file = f"--output={tmp_path / 'model'}"
    for options, message in (
        ([str(run), "--format=torch", "--image-size", "33"], "expected multiples of the spatial stride 16"),
        ([str(tmp_path / "none"), "--format=torch"], "no checkpoint at"),
    ):
        assert run_command("export", [*options, file]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run_command("export", [str(run), "--format=onnx", file]) == 1
    assert 'pip install "video-convmae[export]"' in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_weights_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever names the weights, and the file to write: the weights that are read stay, and a folder is no file."""
    weights = finished_run(small("classifier", frames=1), tmp_path / "run") / "model.safetensors"
    before = weights.read_bytes()
    (tmp_path / "link").symlink_to(weights)
    for source, output, message in (
        (weights, weights, "is read by this command and would be overwritten"),
        (weights.parent, weights, "is read by this command and would be overwritten"),
        (weights.parent, tmp_path / "link", "is read by this command and would be overwritten"),
        (weights, weights.parent, "is a folder; expected the name of a file to write"),
        (tmp_path / "none", weights.parent, "is a folder; expected the name of a file to write"),  # before any work
    ):
        assert run_command("export", [str(source), "--format=torch", f"--output={output}"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{output} {message}" in line
    assert weights.read_bytes() == before
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["link", "model.safetensors", "run"]


def test_a_detector_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(small("classifier", frames=1), tmp_path / "run")
    monkeypatch.setattr("video_convmae.export.run_kind", lambda source: "detection")
    with pytest.raises(UserError, match="is a detector, which cannot be traced: how many boxes"):
        export(run, "torch", tmp_path / "model.pt2")


@pytest.mark.parametrize("kind", ["autoencoder", "classifier", "knn"])
def test_a_model_for_other_clips_has_the_same_weights(kind: str) -> None:
    model = small(kind)
    same = with_clip(model, implementation="dense")
    batch = clips(model, 2)
    torch.testing.assert_close(Exportable(same)(batch), Exportable(model)(batch), rtol=1e-5, atol=1e-5)
    other = with_clip(model, 8, 64)
    assert other.encoder.config.grid == (4, 4, 4)
    assert Exportable(other)(clips(other, 2)).isfinite().all()
    assert torch.equal(other.encoder.attention_blocks[0].norm1.weight, model.encoder.attention_blocks[0].norm1.weight)
    assert model.encoder.config.implementation == "packed"


# What it rests on: nothing of a batch of whole clips depends on data.


@pytest.mark.parametrize("implementation", ["packed", pytest.param("dense", marks=pytest.mark.slow)])
def test_a_classifier_compiles_whole_for_any_batch(implementation: str) -> None:
    model = with_clip(small("classifier", frames=1), implementation=implementation)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")  # the graph; its code is slow's
    for count in (2, 3):
        batch = clips(model, count)
        torch.testing.assert_close(compiled(batch), model(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_classifier_learns() -> None:
    """With the compiler's own code, forward and backward, on one graph for all batches."""
    model = small("classifier").train()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for count in (2, 3, 5):
            batch = clips(model, count)
            expected = torch.autograd.grad(model(batch).square().sum(), list(model.parameters()))
            given = torch.autograd.grad(compiled(batch).square().sum(), list(model.parameters()))
            for one, other in zip(given, expected):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["classifier", "autoencoder", "linear", "attentive", "knn"])
def test_half_precision_modules(kind: str, dtype: torch.dtype) -> None:
    model = small(kind)
    batch = clips(model, 2)
    with torch.no_grad():
        expected = Exportable(model)(batch).softmax(-1)
        half = model.to(dtype)
        given = Exportable(half)(batch.to(dtype)).float().softmax(-1)
    torch.testing.assert_close(given, expected, rtol=0.1, atol=0.1 if kind == "knn" else 0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_modules_have_gradients(dtype: torch.dtype) -> None:
    model, learner = small("autoencoder").to(dtype), small("classifier").to(dtype)
    batch = clips(model, 2).to(dtype)
    visible = torch.stack([masking.tube(model.grid, 0.5, torch.Generator().manual_seed(i)) for i in range(2)])
    model(batch, visible).loss.backward()
    learner(batch).sum().backward()
    for each in (model, learner):
        assert all(p.grad is not None and p.grad.dtype == dtype for p in each.parameters())


def test_whole_clips_need_no_values_of_a_mask() -> None:
    """The same tokens as under a mask that is full, and no tensor is read on the way."""
    model = classifier(image_size=32, num_frames=1)
    batch = clips(model, 2)
    full = torch.ones(2, *model.encoder.config.grid, dtype=torch.bool)
    assert torch.equal(model.encode(batch), model.encode(batch, full))
    meta = model.to("meta")
    assert meta.encode(batch.to("meta")).shape == (2, 4, 24)
