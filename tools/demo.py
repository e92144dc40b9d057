"""The demo: make clips of camera motion, pretrain a small VideoConvMAE on them, look at its reconstructions.

    make demo

leaves in runs/demo: metrics.json, loss.png, reconstruction.png, reconstruction.mp4, and the run in pretrain/. It exits
with an error if the model has not learned: its error on the hidden pixels of validation clips, whose photographs it has
never seen, must be 0.8 of the better baseline's or less.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
from make_motion_clips import make_motion_clips
from pretrain import pretrain
from reconstruct import caption, draw_masks, hidden_error, middle_clips, reconstruct, write_picture, write_video

from video_convmae.config import PretrainConfig, parse
from video_convmae.data.records import read_list
from video_convmae.engine.log import write_text
from video_convmae.runs import load_autoencoder

CONFIG = Path(__file__).parent.parent / "configs" / "debug" / "demo.yaml"
MOST = 0.8  # of the better baseline's error


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything the demo makes")
    output: Path = parser.parse_args().output
    started = time.perf_counter()

    print("Clips of camera motion over photographs, h264 mp4:", flush=True)
    data = output / "data"
    make_motion_clips(data)
    run = output / "pretrain"
    if (run / "metrics.json").exists():  # an unfinished run goes on, a finished one is done again
        shutil.rmtree(run)
    print("Pretraining:", flush=True)
    paths = [f"--output={run}", f"--data.train={data / 'train.txt'}", f"--data.root={data}"]
    pretrain(parse(PretrainConfig, [f"--config={CONFIG}", *paths]))

    model, config = load_autoencoder(run)
    clips = middle_clips(read_list(data / "validation.txt", root=data), config, model.encoder.config.image_size)
    result = reconstruct(model, config, clips, draw_masks(model, config, len(clips)))
    errors = hidden_error(model, result)
    some = slice(0, 36, 9)  # classes take turns, then photographs: four of each
    shown = reconstruct(model, config, clips[some], result.visible[some])
    write_picture(shown, output / "reconstruction.png", caption(config, model))
    write_video(shown, output / "reconstruction.mp4")
    draw_loss(run / "log.jsonl", output / "loss.png")

    training = json.loads((run / "metrics.json").read_text())
    metrics = {
        "seconds": time.perf_counter() - started,
        "clips_per_second": training["clips_per_second"],
        "reconstruction": errors,
    }
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")

    best = min(errors["mean_colour_mse"], errors["nearest_patch_mse"])
    print(f"\nMean squared error of hidden pixels, on {len(clips)} clips of photographs never seen in training:")
    print(f"  VideoConvMAE            {errors['mse']:.4f}   (PSNR {errors['psnr']:.1f} dB)")
    print(f"  mean visible colour     {errors['mean_colour_mse']:.4f}")
    print(f"  nearest visible patch   {errors['nearest_patch_mse']:.4f}")
    print(f"Look at {output}/reconstruction.png, reconstruction.mp4 and loss.png ({metrics['seconds']:.0f} s in all).")
    if errors["mse"] > MOST * best:
        sys.exit(
            f"the model has not learned: {errors['mse']:.4f} is more than {MOST} of the better baseline's {best:.4f}"
        )


def draw_loss(log: Path, picture: Path) -> None:
    """The training loss over steps, as PNG."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="step", ylabel="mean squared error of hidden patches (training)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
