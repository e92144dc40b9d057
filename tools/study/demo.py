"""The demo: make clips of camera motion, pretrain a small VideoConvMAE on them, finetune it to tell the motions apart.

    make demo

leaves in runs/demo: metrics.json, the pictures loss.png, reconstruction.png, reconstruction.mp4 and predictions.png,
and the runs in pretrain/, finetuned/ and scratch/ (the same finetuning without pretraining). Pretraining sees all
training clips, finetuning the labels of a few. Validation clips show photographs that are in no training clip.

It exits with an error if nothing was learned: the error on the hidden pixels of validation clips must be 0.9 of the
better baseline's or less, and the finetuned model must be right about at least half of the clips (chance is 12.5%).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw

import video_convmae
from tools.study.clips import make_motion_clips
from video_convmae.cli import evaluate
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import EvaluateConfig, FinetuneConfig, PretrainConfig
from video_convmae.data.records import read_list
from video_convmae.engine.log import write_text
from video_convmae.runs import load_autoencoder
from video_convmae.visualize.reconstruct import (
    caption,
    draw_masks,
    hidden_error,
    middle_clips,
    reconstruct,
    write_picture,
    write_video,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "debug"
MOST = 0.9  # of the better baseline's error
LEAST = 0.5  # of the clips; one in eight is chance
LABELLED = 80  # of the training clips; pretraining sees them all


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything the demo makes")
    output: Path = parser.parse_args().output
    started = time.perf_counter()

    print("Clips of camera motion over photographs, h264 mp4:", flush=True)
    data = output / "data"
    make_motion_clips(data)
    print("Pretraining:", flush=True)
    pretrain_on(data, output / "pretrain")
    errors = show_reconstructions(output / "pretrain", data, output)
    draw_loss(output / "pretrain" / "log.jsonl", output / "loss.png")
    accuracy = {}
    for name, weights in (("finetuned", output / "pretrain"), ("scratch", None)):
        print(f"Finetuning from {'the pretrained weights' if weights else 'scratch, for as many steps'}:", flush=True)
        finetune_on(data, LABELLED, output / name, weights)
        accuracy[name] = accuracy_of(output / name)
    show_predictions(output / "finetuned", data, output / "predictions.png")

    metrics = {
        "seconds": time.perf_counter() - started,
        "clips_per_second": json.loads((output / "pretrain" / "metrics.json").read_text())["clips_per_second"],
        "reconstruction": errors,
        **accuracy,
    }
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(report(metrics))
    print(f"Look at the pictures in {output}.")
    if complaint := not_learned(metrics):
        sys.exit(complaint)


def pretrain_on(data: Path, run: Path, *edits: str) -> None:
    """Pretrain on the clips; a run that was interrupted goes on, a finished one is done again."""
    _forget_finished(run)
    arguments = [f"--config={CONFIGS / 'demo.yaml'}", f"--output={run}", f"--data.train={data / 'train.txt'}"]
    pretrain(parse(PretrainConfig, [*arguments, f"--data.root={data}", *edits]))
    _check_finished(run)


def finetune_on(data: Path, labelled: int, run: Path, weights: Path | None, *edits: str) -> None:
    """Finetune on the first so many training clips (classes and photographs take turns), pretrained or from scratch."""
    _forget_finished(run)
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
    _check_finished(run)


def accuracy_of(run: Path) -> dict[str, float]:
    """Multi-view top-1 and top-5 of a run's last checkpoint on the validation clips, by tools/evaluate.py."""
    metrics = evaluate.run(parse(EvaluateConfig, [f"--weights={run}", f"--output={run / 'test'}", "--plot=true"]))
    return {name: metrics[name] for name in ("top1", "top5")}


def show_reconstructions(run: Path, data: Path, output: Path) -> dict[str, float]:
    """Pictures of validation clips, masked and reconstructed; the errors on all of them."""
    model, config = load_autoencoder(run)
    clips = middle_clips(read_list(data / "validation.txt", root=data), config, model.encoder.config.image_size)
    result = reconstruct(model, config, clips, draw_masks(model, config, len(clips)))
    some = slice(0, 36, 9)  # classes take turns, then photographs: four of each
    shown = reconstruct(model, config, clips[some], result.visible[some])
    write_picture(shown, output / "reconstruction.png", caption(config, model))
    write_video(shown, output / "reconstruction.mp4")
    return hidden_error(model, result)


def show_predictions(run: Path, data: Path, picture: Path, shown: int = 8) -> None:
    """The first, middle and last frame of some validation clips, their classes and what the model takes them for."""
    predictor = video_convmae.load(run)
    records = read_list(data / "validation.txt", root=data)
    step = max(1, len(records) // shown) + 1  # classes take turns: one of each
    rows = []
    for record in [records[i * step % len(records)] for i in range(shown)]:
        (best, second) = predictor(record.path, top=2)
        frames = predictor.pictures(record.path, predictor.middle)[0].permute(1, 2, 3, 0).numpy()
        strip = [Image.fromarray(frames[i]).resize((96, 96)) for i in (0, len(frames) // 2, len(frames) - 1)]
        rows.append((strip, f"is: {predictor.name(record.label)}", best, second))
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
    """The training loss over steps, as PNG."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="step", ylabel="mean squared error of hidden patches (training)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(picture, dpi=120)


def report(metrics: dict[str, Any]) -> str:
    """What the demo found, whichever model won."""
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


def not_learned(metrics: dict[str, Any]) -> str | None:
    """What failed, if something did."""
    errors, top1 = metrics["reconstruction"], metrics["finetuned"]["top1"]
    best = min(errors["mean_colour_mse"], errors["nearest_patch_mse"])
    if errors["mse"] > MOST * best:
        return (
            f"pretraining has not learned: {errors['mse']:.4f} is more than {MOST} of the better baseline's {best:.4f}"
        )
    if top1 < LEAST:
        return f"finetuning has not learned: top-1 {top1:.1%} is under {LEAST:.0%} (chance is 12.5%)"
    return None


def _forget_finished(run: Path) -> None:
    if (run / "metrics.json").exists():
        shutil.rmtree(run)


def _check_finished(run: Path) -> None:
    """Leave if a signal ended the run: nothing may be measured on half of one."""
    if not (run / "metrics.json").exists():
        sys.exit(f"{run} was interrupted; the same command goes on from there")


if __name__ == "__main__":
    main()
