"""The demo on images: pretrain a tiny model on digits without labels, then finetune it with ten labels a class.

    make demo-image

The images are the 1797 handwritten digits, 8 x 8 pixels, that ship inside the wheel of scikit-learn; nothing is
downloaded. They are written as PNG files of 32 x 32 pixels. Fifty a class are for validation and take no part in any
training; all others are for pretraining, which reads no labels; ten a class of these are the labelled ones.

For each of three seeds: pretraining; then, on the labelled digits, finetuning (`finetuned`), a linear probe of the
frozen encoder (`probed`), and the finetuning again without pretrained weights (`scratch`): same configuration, same
steps. Settings are in configs/debug/*_digits.yaml. The last checkpoint of each run is tested.

It writes to runs/demo-image: metrics.json, the images in data/, the runs in seed0/ to seed2/. An interrupted demo
resumes; a finished one is repeated. It exits with an error if the finetuned model has not learned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tools.study.training import is_finished, remove_runs_of_other_settings, require_finished
from video_convmae.atomic import write_text
from video_convmae.cli import run_tool
from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import EvaluateConfig, FinetuneConfig, PretrainConfig

CONFIGS = {
    kind: Path(__file__).parents[2] / "configs" / "debug" / f"{kind}_digits.yaml"
    for kind in ("pretrain", "finetune", "probe")
}
MODELS = {"finetuned": "finetune", "probed": "probe", "scratch": "finetune"}  # name: configuration
SEEDS = (0, 1, 2)
VALIDATION, LABELLED = 50, 10  # digits a class
SIDE = 32  # pixels
MIN_TOP1 = 0.5  # mean of the finetuned models; chance is 0.1


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        "python -m tools.study.demo_image", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo-image"), help="folder for all results (default %(default)s)"
    )
    parser.add_argument("--data_only", action="store_true", help="write the images and train nothing")
    args = parser.parse_args()
    started = time.perf_counter()
    data = args.output / "data"
    make_digits(data)
    if args.data_only:
        return
    remove_outdated_runs(args.output)
    torch.set_num_threads(1)  # a second thread gains little at this size, and waits long where the cores are shared
    top1 = [train_and_test(args.output / f"seed{seed}", data, seed) for seed in SEEDS]
    metrics = summarize_seeds(top1)
    write_text(args.output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(report_demo_image(metrics, args.output))
    print(f"{time.perf_counter() - started:.0f} s in all.")
    if (mean := metrics["finetuned"]["top1"]) < MIN_TOP1:
        sys.exit(f"the model has not learned: top-1 is {mean:.2f}; expected at least {MIN_TOP1}")


def make_digits(folder: Path) -> None:
    """Write the digits as `SPLIT/CLASS/NUMBER.png`; the split is always the same.

    `train` is for pretraining, `labelled` is the part of it for finetuning, `validation` is disjoint from both.
    """
    digits = load_digits()
    for label in range(10):
        order = np.random.default_rng([0, label]).permutation(np.flatnonzero(digits.target == label))
        validation, train = order[:VALIDATION], order[VALIDATION:]
        splits = {"validation": validation, "train": train, "labelled": train[:LABELLED]}
        for split, numbers in splits.items():
            place = folder / split / str(label)
            place.mkdir(parents=True, exist_ok=True)
            for old in place.glob("[0-9][0-9][0-9][0-9].png"):
                old.unlink()
            for number in numbers:
                grey = Image.fromarray((digits.images[number] * 255 / 16).astype(np.uint8))
                grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"{number:04d}.png")


def remove_outdated_runs(output: Path) -> None:
    """Remove the runs of a finished demo or of other settings; those of an interrupted one stay and are resumed."""
    settings = {kind: path.read_text(encoding="utf-8") for kind, path in CONFIGS.items()}
    remove_runs_of_other_settings(output, settings, [f"seed{seed}" for seed in SEEDS])


def pretrain_digits(run: Path, data: Path, seed: int, *edits: str) -> None:
    """Pretrain on the digits in `data`, with edits of the configuration, unless that is done; resume if interrupted."""
    if is_finished(run):
        return
    print(f"\nSeed {seed}, pretraining:", flush=True)
    common = [f"--output={run}", f"--seed={seed}", f"--data.train={data / 'train'}"]
    pretrain(parse(PretrainConfig, [f"--config={CONFIGS['pretrain']}", *common, *edits]))
    require_finished(run)


def train_and_test(folder: Path, data: Path, seed: int) -> dict[str, float]:
    """Carry out all runs of one seed; returns the top-1 of each model on the validation digits."""
    pretrain_digits(folder / "pretrain", data, seed)
    common = [f"--seed={seed}", f"--data.train={data / 'labelled'}", f"--data.validation={data / 'validation'}"]
    top1 = {}
    for name, kind in MODELS.items():
        print(f"\nSeed {seed}, {name}:", flush=True)
        run = folder / name
        start = [] if name == "scratch" else [f"--init.weights={folder / 'pretrain'}"]
        if not is_finished(run):
            finetune(parse(FinetuneConfig, [f"--config={CONFIGS[kind]}", f"--output={run}", *common, *start]))
            require_finished(run)
        test = parse(EvaluateConfig, [f"--weights={run}", f"--output={run / 'test'}", "--device=cpu"])
        top1[name] = evaluate(test)["top1"]
    return top1


def summarize_seeds(top1: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return the contents of metrics.json from the top-1 of each model at each seed; `top1_std` is the sample's."""
    metrics = {}
    for name in MODELS:
        seeds = [of_seed[name] for of_seed in top1]
        metrics[name] = {"top1": statistics.mean(seeds), "top1_std": statistics.stdev(seeds), "seeds": seeds}
    return metrics


def report_demo_image(metrics: dict[str, dict[str, Any]], output: Path) -> str:
    """Return the metrics as a table."""

    def seconds(name: str) -> float:
        runs = [output / f"seed{seed}" / name / "metrics.json" for seed in SEEDS]
        return statistics.mean(json.loads(run.read_text(encoding="utf-8"))["seconds"] for run in runs)

    lines = [
        f"\nTop-1 on {10 * VALIDATION} digits that took no part in training (chance: 10%), with {LABELLED} labels a "
        f"class;\n{len(SEEDS)} seeds, each with its own pretraining ({seconds('pretrain'):.0f} s):",
        "              mean    std    seeds               training",
    ]
    for name, values in metrics.items():
        seeds = " ".join(f"{top1:6.1%}" for top1 in values["seeds"])
        lines.append(f"  {name:10} {values['top1']:6.1%}  {values['top1_std']:5.1%}   {seeds}  {seconds(name):5.0f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_tool("tools.study.demo_image", main))
