"""The demo: make clips of camera motion, pretrain a small VideoConvMAE on them, finetune it to tell the motions apart.

    make demo

writes to runs/demo: metrics.json, the pictures loss.png, reconstruction.png, reconstruction.mp4 and predictions.png,
and the runs in pretrain/, finetuned/ and scratch/ (the same finetuning without pretraining). Pretraining sees all
training clips, finetuning the labels of a few. Validation clips show photographs that are in no training clip.

It exits with an error if nothing was learned: the error on the hidden pixels of validation clips must be at most 0.9 of
the better baseline's, and the top-1 accuracy of the finetuned model at least 50% (chance is 12.5%).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from tools.study.finished import is_finished, require_finished

import video_convmae
from tools.study.clips import make_motion_clips
from video_convmae.atomic import write_text
from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import EvaluateConfig, FinetuneConfig, PretrainConfig
from video_convmae.data.records import read_list
from video_convmae.runs import load_autoencoder
from video_convmae.visualize.reconstruct import (
    draw_masks,
    measure_hidden_error,
    read_middle_clips,
    reconstruct_clips,
    write_caption,
    write_reconstruction_picture,
    write_reconstruction_video,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "debug"
MAX_ERROR_RATIO = 0.9  # of the model's error to that of the better baseline
MIN_TOP1 = 0.5  # chance is 0.125
LABELLED = 80  # training clips whose labels are read; pretraining sees all clips


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

    print("Clips of camera motion over photographs, h264 mp4:", flush=True)
    data = output / "data"
    make_motion_clips(data)
    print("Pretraining:", flush=True)
    pretrain_on(data, output / "pretrain")
    errors = draw_reconstructions(output / "pretrain", data, output)
    draw_loss(output / "pretrain" / "log.jsonl", output / "loss.png")
    accuracy = {}
    for name, weights in (("finetuned", output / "pretrain"), ("scratch", None)):
        print(f"Finetuning from {'the pretrained weights' if weights else 'scratch, for as many steps'}:", flush=True)
        finetune_on(data, LABELLED, output / name, weights)
        accuracy[name] = measure_accuracy(output / name)
    draw_predictions(output / "finetuned", data, output / "predictions.png")

    metrics = {
        "seconds": time.perf_counter() - started,
        "clips_per_second": json.loads((output / "pretrain" / "metrics.json").read_text())["clips_per_second"],
        "reconstruction": errors,
        **accuracy,
    }
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(report_demo(metrics))
    print(f"The pictures are in {output}.")
    if failure := find_failure(metrics):
        sys.exit(failure)


def pretrain_on(data: Path, run: Path, *edits: str) -> None:
    """Pretrain on the clips; resumes an interrupted run and repeats a finished one."""
    _remove_finished(run)
    arguments = [f"--config={CONFIGS / 'demo.yaml'}", f"--output={run}", f"--data.train={data / 'train.txt'}"]
    pretrain(parse(PretrainConfig, [*arguments, f"--data.root={data}", *edits]))
    require_finished(run)


def finetune_on(data: Path, labelled: int, run: Path, weights: Path | None, *edits: str) -> None:
    """Finetune on the first `labelled` training clips (classes alternate, then photographs)."""
    _remove_finished(run)
    lines = (data / "train.txt").read_text().splitlines(keepends=True)
    (data / f"labelled_{labelled}.txt").write_text("".join(lines[:labelled]))
    arguments = [
        f"--config={CONFIGS / 'finetune_demo.yaml'}",
        f"--output={run}",
        f"--data.train={data / f'labelled_{labelled}.txt'}",
        f"--data.validation={data / 'validation.txt'}",
        f"--data.labels={data / 'labels.txt'}",
        f"--data.root={data}",
    ]
    start = [] if weights is None else [f"--init.weights={weights}"]
    finetune(parse(FinetuneConfig, [*arguments, *start, *edits]))
    require_finished(run)


def measure_accuracy(run: Path) -> dict[str, float]:
    """Return the multi-view top-1 and top-5 of a run's last checkpoint on the validation clips."""
    metrics = evaluate(parse(EvaluateConfig, [f"--weights={run}", f"--output={run / 'test'}", "--plot=true"]))
    return {name: metrics[name] for name in ("top1", "top5")}


def draw_reconstructions(run: Path, data: Path, output: Path) -> dict[str, float]:
    """Draw some validation clips, masked and reconstructed; returns the errors on all of them."""
    model, config = load_autoencoder(run)
    clips = read_middle_clips(
        read_list(data / "validation.txt", root=data), config, model.encoder.config.clip_shape[2:]
    )
    result = reconstruct_clips(model, config, clips, draw_masks(model, config, len(clips)))
    some = slice(0, 36, 9)  # classes alternate, then photographs: four of each
    shown = reconstruct_clips(model, config, clips[some], result.visible[some])
    write_reconstruction_picture(shown, output / "reconstruction.png", write_caption(config, model))
    write_reconstruction_video(shown, output / "reconstruction.mp4")
    return measure_hidden_error(model, result)


def draw_predictions(run: Path, data: Path, picture: Path, shown: int = 8) -> None:
    """Draw the first, middle and last frame of some validation clips, with their classes and the two most probable."""
    predictor = video_convmae.load(run)
    records = read_list(data / "validation.txt", root=data)
    step = max(1, len(records) // shown) + 1  # classes alternate: one of each
    rows = []
    for record in [records[i * step % len(records)] for i in range(shown)]:
        (best, second) = predictor(record.path, top=2)
        frames = predictor.pictures(record.path, predictor.middle)[0].permute(1, 2, 3, 0).numpy()
        strip = [Image.fromarray(frames[i]).resize((96, 96)) for i in (0, len(frames) // 2, len(frames) - 1)]
        rows.append((strip, f"is: {predictor.name(record.label or 0)}", best, second))
    sheet = Image.new("RGB", (3 * 100 + 330, 100 * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (strip, truth, best, second) in enumerate(rows):
        for column, frame in enumerate(strip):
            sheet.paste(frame, (100 * column, 100 * place))
        right = truth == f"is: {best.name}"
        draw.text((310, 100 * place + 15), truth, "black")
        draw.text((310, 100 * place + 40), f"{best.score:.0%} {best.name}", "green" if right else "red")
        draw.text((310, 100 * place + 60), f"{second.score:.0%} {second.name}", "grey")
    sheet.save(picture)


def draw_loss(log: Path, picture: Path) -> None:
    """Draw the training loss over steps, as PNG."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="step", ylabel="mean squared error of hidden patches (training)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(picture, dpi=120)


def report_demo(metrics: dict[str, Any]) -> str:
    """Return the results as text, whichever model is ahead."""
    errors, finetuned, scratch = metrics["reconstruction"], metrics["finetuned"], metrics["scratch"]
    ahead = finetuned["top1"] - scratch["top1"]
    verdict = "Pretraining helped" if ahead > 0 else "Pretraining did not help in so short a time"
    return f"""
On validation clips of photographs never seen in training, in {metrics["seconds"]:.0f} s in all:
  mean squared error of hidden pixels
    VideoConvMAE            {errors["mse"]:.4f}   (PSNR {errors["psnr"]:.1f} dB)
    mean visible colour     {errors["mean_colour_mse"]:.4f}
    nearest visible patch   {errors["nearest_patch_mse"]:.4f}
  camera motion, eight classes (chance is 12.5%)
    pretrained, finetuned   top-1 {finetuned["top1"]:.1%}   top-5 {finetuned["top5"]:.1%}
    from scratch            top-1 {scratch["top1"]:.1%}   top-5 {scratch["top5"]:.1%}
  {verdict}: {ahead:+.1%} (one seed; make study measures several)."""


def find_failure(metrics: dict[str, Any]) -> str | None:
    """Return the reason if a model has not learned, else None."""
    errors, top1 = metrics["reconstruction"], metrics["finetuned"]["top1"]
    best = min(errors["mean_colour_mse"], errors["nearest_patch_mse"])
    if errors["mse"] > MAX_ERROR_RATIO * best:
        return (
            f"pretraining has not learned: the error is {errors['mse']:.4f}; expected at most {MAX_ERROR_RATIO} of the "
            f"better baseline's {best:.4f}"
        )
    if top1 < MIN_TOP1:
        return f"finetuning has not learned: top-1 is {top1:.1%}; expected at least {MIN_TOP1:.0%} (chance is 12.5%)"
    return None


def _remove_finished(run: Path) -> None:
    if is_finished(run):
        shutil.rmtree(run)


if __name__ == "__main__":
    main()
