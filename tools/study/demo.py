"""The demo: pretrain a small VideoConvMAE on moving digits, then finetune it to tell which way a digit moves.

    make demo

Pretraining sees all training clips without labels, and probes say what its features hold meanwhile. Finetuning sees
200 labelled clips, and is repeated from scratch for as many steps (both at once, a process each). Validation clips
show digits and photographs that are in no training clip. One seed: `make study` measures several.

It writes to runs/demo: metrics.json; curves.png; reconstruction.png and .mp4, predictions.png (the first validation
clip of each direction that shows the digit of its number); the clips in data/; the runs in pretrain/, finetuned/ and
scratch/. An interrupted demo resumes, a finished one is repeated.

It exits with an error if finetuned is not at least 15 points of top-1 above scratch, or if the squared error on hidden
pixels of validation clips is more than 0.9 of that of predicting nothing. The model predicts normalised patches: each
hidden patch's mean colour and variance are the original's. So only `mean_patch_mse`, with every hidden patch in its
own mean colour, is a fair comparison; `mean_colour_mse` and `nearest_patch_mse` know no hidden patch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import video_convmae
from tools.study.clips import HOW, clip_classes, make_digit_clips
from tools.study.training import (
    CONFIGS,
    finetune_on,
    pretrain_on,
    remove_runs_of_other_settings,
    side_by_side,
    write_labelled,
)
from video_convmae.atomic import write_text
from video_convmae.cli import run_tool
from video_convmae.data.records import Record, read_list
from video_convmae.predictor import Prediction, Predictor
from video_convmae.runs import load_autoencoder
from video_convmae.visualize.reconstruct import (
    draw_masks,
    enlarge,
    measure_hidden_error,
    read_middle_clips,
    reconstruct_clips,
    write_caption,
    write_reconstruction_picture,
    write_reconstruction_video,
)

PRETRAIN_STEPS = 900
FINETUNE_STEPS, LABELLED = 300, 200
RUNS = ("pretrain", "finetuned", "scratch")
MIN_AHEAD = 0.15  # of finetuned before scratch, in top-1
MAX_ERROR_RATIO = 0.9  # of the model's error to that of predicting nothing
GREEN, RED, GREY = "#2a7d3f", "#b3261e", "#6f6f6f"


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        "python -m tools.study.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder for all results (default %(default)s)"
    )
    output: Path = parser.parse_args().output
    started = time.perf_counter()
    torch.set_num_threads(min(2, torch.get_num_threads()))  # more only wait for each other at this size
    settings = {name: (CONFIGS / name).read_text(encoding="utf-8") for name in ("demo.yaml", "finetune_demo.yaml")}
    remove_runs_of_other_settings(output, settings, RUNS)

    print("Clips of moving digits, h264 mp4:", flush=True)
    data = output / "data"
    make_digit_clips(data)
    print("Pretraining:", flush=True)
    probe = f"--probe.list={data / 'validation_how.txt'}"
    pretrain_on(data, output / "pretrain", f"--train.max_steps={PRETRAIN_STEPS}", probe)
    errors = draw_reconstructions(output / "pretrain", data, output)
    print(f"Finetuning from the pretrained weights and from scratch, {FINETUNE_STEPS} steps each:", flush=True)
    write_labelled(data, "how", LABELLED)
    runs = {output / "finetuned": output / "pretrain", output / "scratch": None}
    calls = [partial(_finetune, data, run, weights) for run, weights in runs.items()]
    print(*side_by_side(calls, list(runs)), sep="\n", flush=True)
    draw_curves(output, output / "curves.png")
    draw_predictions([output / "finetuned", output / "scratch"], data, output / "predictions.png")

    metrics: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "clips_per_second": json.loads((output / "pretrain" / "metrics.json").read_text())["clips_per_second"],
        "reconstruction": errors,
    }
    for name in ("finetuned", "scratch"):
        values = json.loads((output / name / "metrics.json").read_text())
        metrics[name] = {"top1": values["val_top1"], "top5": values["val_top5"]}
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(report_demo(metrics))
    print(f"The pictures are in {output}.")
    if failure := find_failure(metrics):
        sys.exit(failure)


def _finetune(data: Path, run: Path, weights: Path | None) -> str:
    """Finetune; returns a line to print."""
    metrics = finetune_on(data, "how", LABELLED, FINETUNE_STEPS, run, weights, "--validate.every_steps=50")
    return f"  {run.name}: top-1 {metrics['val_top1']:.1%} after {metrics['seconds']:.0f} s"


def shown_clips(data: Path, directions: Iterable[int]) -> list[Record]:
    """Return the first validation clip of each direction that shows the digit of the same number."""
    numbers = [next(i for i in count() if clip_classes(i) == {"how": how, "what": how}) for how in directions]
    records = read_list(data / "validation_how.txt", root=data)
    return [records[number] for number in numbers]


def draw_reconstructions(run: Path, data: Path, output: Path) -> dict[str, float]:
    """Draw a validation clip of each of four directions, reconstructed; returns the errors on all clips."""
    model, config = load_autoencoder(run)
    size = model.encoder.config.clip_shape[2:]
    clips = read_middle_clips(read_list(data / "validation_how.txt", root=data), config, size)
    errors = measure_hidden_error(model, reconstruct_clips(model, config, clips, draw_masks(model, config, len(clips))))
    some = read_middle_clips(shown_clips(data, range(0, len(HOW), 2)), config, size)
    shown = reconstruct_clips(model, config, some, draw_masks(model, config, len(some)))
    write_reconstruction_picture(shown, output / "reconstruction.png", write_caption(config, model, shown))
    write_reconstruction_video(shown, output / "reconstruction.mp4")
    return errors


def draw_predictions(runs: list[Path], data: Path, picture: Path) -> None:
    """Draw, of a validation clip of each direction, four frames and each run's two most probable directions."""
    predictors = [video_convmae.load(run) for run in runs]
    records = shown_clips(data, range(len(HOW)))
    side, gap, text, top = 128, 4, 210, 30
    font, bold = ImageFont.load_default(16), ImageFont.load_default(18)
    frames = [0, 2, 5, 7]
    left = len(frames) * (side + gap) + 10
    sheet = Image.new("RGB", (left + 130 + text * len(runs), top + (side + gap) * len(records)), "white")
    draw = ImageDraw.Draw(sheet)
    heads = [(0, f"frames {', '.join(str(frame + 1) for frame in frames)}"), (left, "truth")]
    heads += [(left + 130 + text * column, run.name) for column, run in enumerate(runs)]
    for x, head in heads:
        draw.text((x, 5), head, "black", bold)
    for row, record in enumerate(records):
        y = top + (side + gap) * row
        for column, frame in enumerate(enlarge(_shown(predictors[0], record), side)[frames]):
            sheet.paste(Image.fromarray(frame), ((side + gap) * column, y))
        truth = HOW[record.label or 0]
        draw.text((left, y + side // 2 - 10), truth, "black", bold)
        for column, predictor in enumerate(predictors):
            best, second = predictor(record.path, top=2)
            x = left + 130 + text * column
            draw.text((x, y + side // 2 - 22), _line(best), GREEN if best.name == truth else RED, bold)
            draw.text((x, y + side // 2 + 4), _line(second), GREY, font)
    sheet.save(picture)


def _shown(predictor: Predictor, record: Record) -> Tensor:
    return predictor.pictures(record.path, predictor.middle)[0]


def _line(prediction: Prediction) -> str:
    return f"{prediction.score:.0%} {prediction.name}"


def draw_curves(output: Path, picture: Path) -> None:
    """Draw loss and probes over the steps of pretraining, and the accuracies over those of finetuning, as PNG."""
    logs = {name: (output / name / "log.jsonl").read_text(encoding="utf-8").splitlines() for name in RUNS}
    lines = {name: [json.loads(line) for line in log] for name, log in logs.items()}

    def plot(axes: Any, run: str, value: str, **style: Any) -> None:
        points = [(line["step"], line[value]) for line in lines[run] if line.get(value) is not None]
        if points:
            axes.plot(*zip(*points), **style)

    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, probe, accuracy = figure.subplots(1, 3)
    plot(loss, "pretrain", "loss", color="C0", label="hidden patches, training clips")
    loss.axhline(1, color="0.5", linestyle="--", label="predicting nothing")
    loss.set(title="Pretraining: loss", ylabel="mean squared error, normalised patches")
    plot(probe, "pretrain", "probe_linear_top1", color="C1", marker=".", label="linear probe")
    plot(probe, "pretrain", "probe_knn_top1", color="C2", marker=".", label="nearest neighbours")
    probe.set(title="Pretraining: what frozen features tell", ylabel="top-1, which way it moves", ylim=(0, 1))
    plot(accuracy, "finetuned", "val_top1", color="C3", marker=".", label="finetuned")
    plot(accuracy, "scratch", "val_top1", color="C4", marker=".", label="from scratch")
    accuracy.set(title=f"Finetuning with {LABELLED} labels", ylabel="top-1, validation clips", ylim=(0, 1))
    for axes in (loss, probe, accuracy):
        if axes is not loss:
            axes.axhline(1 / len(HOW), color="0.5", linestyle="--", label="chance")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=110)


def report_demo(metrics: dict[str, Any]) -> str:
    """Return the results as text, whichever model is ahead."""
    errors, finetuned, scratch = metrics["reconstruction"], metrics["finetuned"], metrics["scratch"]
    ahead = finetuned["top1"] - scratch["top1"]
    verdict = "Pretraining helped" if ahead > 0 else "Pretraining did not help"
    return f"""
On validation clips of digits and photographs never seen in training, in {metrics["seconds"]:.0f} s in all:
  mean squared error of hidden pixels, each hidden patch's mean colour and variance given
    VideoConvMAE            {errors["mse"]:.4f}   (PSNR {errors["psnr"]:.1f} dB)
    mean colour alone       {errors["mean_patch_mse"]:.4f}
  which of eight ways the digit moves, {LABELLED} labels (chance is 12.5%)
    pretrained, finetuned   top-1 {finetuned["top1"]:.1%}   top-5 {finetuned["top5"]:.1%}
    from scratch            top-1 {scratch["top1"]:.1%}   top-5 {scratch["top5"]:.1%}
  {verdict}: {100 * ahead:+.1f} points (one seed; make study measures several)."""


def find_failure(metrics: dict[str, Any]) -> str | None:
    """Return the reason if pretraining has not learned or has not helped, else None."""
    errors, finetuned, scratch = metrics["reconstruction"], metrics["finetuned"]["top1"], metrics["scratch"]["top1"]
    if errors["mse"] > MAX_ERROR_RATIO * errors["mean_patch_mse"]:
        return (
            f"pretraining has not learned: the error is {errors['mse']:.4f}; expected at most {MAX_ERROR_RATIO} times "
            f"that of predicting nothing, {errors['mean_patch_mse']:.4f}"
        )
    if finetuned < scratch + MIN_AHEAD:
        return (
            f"pretraining has not helped: top-1 is {finetuned:.1%} finetuned and {scratch:.1%} from scratch; expected "
            f"at least {100 * MIN_AHEAD:.0f} points more"
        )
    return None


if __name__ == "__main__":
    sys.exit(run_tool("tools.study.demo", main))
