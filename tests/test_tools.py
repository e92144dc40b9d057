"""Reconstructions and their error, and `benchmark step` and `scale`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
import torch
from clips import encode, save_series
from PIL import Image

from video_convmae import create_autoencoder, masking
from video_convmae.benchmark import main as benchmark
from video_convmae.benchmark import reading
from video_convmae.benchmark import scale as benchmark_scale
from video_convmae.benchmark import step as benchmark_step
from video_convmae.cli import run as run_command
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.cli.reconstruct import main as draw_reconstructions
from video_convmae.config import PretrainConfig
from video_convmae.data.options import ReaderName
from video_convmae.engine.parallel import RECOMPUTED
from video_convmae.runs import load_autoencoder
from video_convmae.visualize import reconstruct

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of two steps, and its folder of videos."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(2):
        encode(folder / f"{i}.mp4", 24)
    (folder / "list.txt").write_text("0.mp4\n1.mp4\n")
    edits = [f"--data.train={folder / 'list.txt'}", f"--data.root={folder}", f"--output={folder / 'run'}"]
    config = ROOT / "configs" / "debug" / "pretrain.yaml"
    pretrain(parse(PretrainConfig, [f"--config={config}", "--device=cpu", "--data.workers=0", *edits]))
    return folder / "run", folder


def test_reconstruct_writes_a_picture_and_a_playable_mp4(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint, folder = run
    videos = [str(folder / "0.mp4"), str(folder / "1.mp4")]
    assert draw_reconstructions([str(checkpoint), *videos, f"--output={tmp_path}"]) == 0
    assert "mean and variance of each channel are the original's" in capsys.readouterr().out
    with Image.open(tmp_path / "reconstruction.png") as picture:
        assert picture.width >= 4 * 64
        assert picture.height > 2 * 3 * 64
    with av.open(str(tmp_path / "reconstruction.mp4")) as video:
        frames = list(video.decode(video=0))
    assert len(frames) == 16  # 4 frames, played 4 times
    assert (frames[0].width, frames[0].height) == (3 * 3 * 64, 2 * 3 * 64)


def test_the_average_of_the_weights_is_there_or_an_error(run: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"the run had no train\.ema"):
        load_autoencoder(run[0], ema=True)


def test_reconstruct_ends_with_one_line_about_a_bad_file(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    for arguments, message in (
        ([str(run[0]), str(tmp_path / "bad.mp4")], "bad.mp4"),
        ([str(tmp_path), str(run[1] / "0.mp4")], str(tmp_path)),
        ([str(run[0]), str(run[1] / "0.mp4"), "--ema"], "the run had no train.ema"),
    ):
        assert run_command("reconstruct", [*arguments, f"--output={tmp_path / 'pictures'}"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("video-convmae reconstruct: error: ")
        assert message in line


def test_reconstruct_reads_what_predict_reads(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = save_series(tmp_path / "clip", 24, "img_*.png", "flow_x_*.png")
    arguments = [f"--output={tmp_path}", str(run[0]), str(run[1] / "0.mp4")]
    assert draw_reconstructions([*arguments, f"{folder}/img_*"]) == 0
    capsys.readouterr()
    assert run_command("reconstruct", [*arguments, str(folder)]) == 1
    assert "holds 2 series of pictures: img_* (24), flow_x_* (24)" in capsys.readouterr().err


def test_the_caption_is_honest() -> None:
    config = parse(PretrainConfig, ["--output=x", "--data.train=y"])
    texts = {}
    for target in ("none", "patch", "patch_channel"):
        model = create_autoencoder("tiny", num_frames=2, image_size=32, target=target)
        texts[target] = reconstruct.write_caption(config, model)
    assert "the model's pixels alone" in texts["none"]
    assert "each patch's mean colour and variance are the original's" in texts["patch"]
    assert "of each channel are the original's" in texts["patch_channel"]


def test_hidden_error_and_its_baselines() -> None:
    """One frame of four patches: the first is seen and white, the others are hidden and grey, grey, black."""
    model = create_autoencoder("tiny", num_frames=1, image_size=32)
    original = torch.zeros(1, 3, 1, 32, 32, dtype=torch.uint8)
    original[..., :16, :16], original[..., :16, 16:], original[..., 16:, :16] = 255, 51, 51
    reconstructed = original.clone()
    reconstructed[..., 16:, 16:] = 51
    visible = torch.tensor([True, False, False, False]).view(1, 1, 2, 2)
    result = reconstruct.Reconstructions(original, original, reconstructed, visible)
    errors = reconstruct.measure_hidden_error(model, result)
    assert errors["mse"] == pytest.approx(0.2**2 / 3)
    assert errors["mean_colour_mse"] == pytest.approx((0.8**2 * 2 + 1) / 3)
    assert errors["nearest_patch_mse"] == pytest.approx((0.8**2 * 2 + 1) / 3)
    assert errors["psnr"] == pytest.approx(-10 * np.log10(0.2**2 / 3))
    assert errors["mean_patch_mse"] == pytest.approx(0)  # normalised patches: each has its own mean, here one colour
    config = parse(PretrainConfig, ["--output=x", "--data.train=y"])
    model.target = "none"
    caption = reconstruct.write_caption(config, model, result)
    assert "; squared error 0.0133, of the visible patches' mean colour 0.7600; hidden patches are" in caption


def test_the_masked_clip_hides_what_the_model_does_not_see(run: tuple[Path, Path]) -> None:
    model, config = load_autoencoder(run[0])
    clips = torch.randint(0, 256, (2, 3, 4, 64, 64), dtype=torch.uint8)
    visible = reconstruct.draw_masks(model, replace(config), 2)
    result = reconstruct.reconstruct_clips(model, config, clips, visible)
    shown = visible.repeat_interleave(2, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)[:, None].expand_as(clips)
    assert torch.equal(result.masked[shown], clips[shown])
    assert (result.masked[~shown] == reconstruct.GREY).all()
    assert torch.equal(result.reconstructed[shown], clips[shown])


SMALL = ["--size=tiny", "--frames=4", "--image-size=64", "--batch=1", "--repeats=2", "--ratio=0.75", "--threads=1"]


def run_benchmark(tmp_path: Path, *arguments: str) -> dict:
    file = tmp_path / "step.json"
    assert benchmark.main(["step", f"--json={file}", *SMALL, *arguments]) == 0
    return json.loads(file.read_text())


def test_benchmark_writes_what_it_measured(tmp_path: Path) -> None:
    """Each side in a process of its own, which starts slowly: once here, below without."""
    result = run_benchmark(tmp_path, "--vs=dense")
    assert {"model", "against", "device", "precision", "threads", "batch", "ratio", "pairs", "commit"} <= set(result)
    assert result["against"] == "dense"
    assert [len(pair) for pair in result["pairs"]] == [2, 2]
    for side in (result["ours"], result["theirs"]):
        assert side["clips_per_second"] > 0
        assert side["peak_memory_bytes"] > 2**20
        assert 0 < side["share_of_matrix_rate"] < 2
        assert side["forward_multiply_adds_per_clip"] == sum(side["multiply_adds"].values())
        parts = [side[f"{part}_seconds"] for part in ("forward", "backward", "optimizer")]
        assert sum(parts) == pytest.approx(side["seconds_per_step"], rel=0.5)
    assert result["ours"]["forward_multiply_adds_per_clip"] < result["theirs"]["forward_multiply_adds_per_clip"]
    assert result["ours"]["conv_stage_bytes_per_clip"] < result["theirs"]["conv_stage_bytes_per_clip"]


@pytest.mark.parametrize(
    ("rival", "task"),
    [
        ("packed", "pretrain"),
        ("videomae", "image"),
        ("hf-videomae", "pretrain"),
        ("hf-videomae", "image"),
        ("dense", "finetune"),
    ],
)
def test_benchmark_measures_every_kind_of_step(
    rival: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_step, "own_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(benchmark_step, "matrix_rate", lambda device, precision, clock: 1e9)
    options = {
        "pretrain": ["--decoder-ratio=0.5"],
        "finetune": ["--task=finetune", "--profile", "--clock=cpu"],
        "image": ["--frames=1"],
    }
    result = run_benchmark(tmp_path, f"--vs={rival}", *options[task])
    assert result["ratio"] > 0
    printed = capsys.readouterr().out
    assert "clips/s" in printed
    share = re.search(r"masked depthwise convolution: ([\d.]+)% of them", printed)
    assert (share is not None and 0 < float(share[1]) < 100) == (task == "finetune" and rival == "dense")


def test_benchmark_counts_what_transformers_embeds() -> None:
    """Hidden patches too, which at base size makes 35.4 G of our plain ViT's 33.8 G."""
    args = benchmark.parse_arguments(["step", "--size=tiny", "--image-size=64", "--batch=1"])
    args = benchmark_step.resolve_step_options(args)
    ours, theirs = (benchmark_step.build_side(args, name).multiply_adds for name in ("videomae", "hf-videomae"))
    tokens, visible = 8 * 4 * 4, 8 * 2
    assert theirs == ours | {"embeddings": tokens * 1536 * 192}
    assert ours["embeddings"] == visible * 1536 * 192


def test_masks_of_one_decoded_clip_save_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "videoconvmae_files"
    folder.mkdir()
    encode(folder / "0.mp4", 40, size=(64, 96))
    (folder / "list.txt").write_text("0.mp4 0\n")
    monkeypatch.setattr(benchmark_step, "make_files", lambda *_: folder / "list.txt")
    monkeypatch.setattr(benchmark_step, "gettempdir", lambda: str(tmp_path))
    args = benchmark.parse_arguments(["step", "--image-size=64", "--masks=3", "--ratio=0.75", "--loading"])
    measured = benchmark_step.measure_loading(benchmark_step.resolve_step_options(args))
    assert measured["masks"] == 3
    assert measured["theirs"] > measured["ours"] > 0
    with pytest.raises(ValueError, match="--loading with 1 masks and 16 frames; expected several of both"):
        benchmark_step.run_step(benchmark.parse_arguments(["step", "--loading"]))


def test_benchmark_scale_draws_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_scale, "SWEEPS", {"frames": ("frames", (2, 4)), "ratio": ("hidden", (0.5,))})
    monkeypatch.setattr(benchmark_scale, "measure_point", benchmark_scale._measure_here)  # a process starts slowly
    plot, numbers = tmp_path / "scale.png", tmp_path / "scale.json"
    options = ["--image-size=32", "--ratio=0.75", "--batch=1", "--repeats=1", "--vs=dense", "--threads=1"]
    assert benchmark.main(["scale", "--frames=4", *options, f"--plot={plot}", f"--json={numbers}"]) == 0
    points = json.loads(numbers.read_text())["points"]
    assert [(row["sweep"], row["value"]) for row in points[::2]] == [
        ("frames", 2), ("frames", 4), ("ratio", 0.5), ("ratio", 0.75),
    ]  # fmt: skip
    assert all(row["seconds_per_clip"] > 0 and row["fixed_bytes"] > 0 for row in points)
    assert Image.open(plot).width > 400


def test_benchmark_offers_the_choices_of_its_modules() -> None:
    """They stand twice, so that `--help` needs no torch."""
    assert set(benchmark.STEP_SIDES) == {*benchmark_step.RIVALS, *benchmark_step.PEERS}
    assert set(benchmark.READ_SIDES) == set(reading.RIVALS)
    assert set(benchmark.MASK_KINDS) == set(masking.MASKS)
    assert set(benchmark.PRECISIONS) == set(benchmark_step.DTYPES)
    assert set(benchmark.ACTIVATION_CHECKPOINTING) == set(RECOMPUTED)
    assert set(benchmark.READERS) == set(get_args(ReaderName))


@pytest.mark.parametrize("command", [[], ["step"], ["scale"], ["loader"], ["packing"]])
def test_help_of_benchmark_imports_no_torch(command: list[str]) -> None:
    program = (
        "import sys\nfrom video_convmae.cli.benchmark import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.exit(str(sorted({'torch', 'av', 'timm', 'matplotlib'} & set(sys.modules)) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""
    assert "usage: video-convmae benchmark" in done.stdout
    assert not command or "--json" in done.stdout
