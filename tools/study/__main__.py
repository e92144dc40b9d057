"""The study of pretraining and of the hybrid encoder: the demo's task for several models and seeds.

    make study                                           # an hour on two CPU cores
    python -m tools.study --output runs/study --seeds 5 --labelled 40 80 160 320 --pretrain-epochs 96 --device cuda

Each model is pretrained on all clips of camera motion, finetuned on the labelled ones and tested on photographs that no
training clip shows; "from scratch" is finetuned alone. Every finetuning takes as many steps, whatever the number of
labelled clips. On a CPU each core trains a model of its own. results.json, and table.md with mean and standard
deviation over the seeds, are written after every model. The same command resumes an interrupted study.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from video_convmae.benchmark.environment import describe_machine

from tools.study.clips import make_motion_clips
from tools.study.demo import CONFIGS, LABELLED, finetune_on, measure_accuracy, pretrain_on
from video_convmae.atomic import write_text
from video_convmae.cli.parser import parse
from video_convmae.config import FinetuneConfig


@dataclass(frozen=True)
class StudyModel:
    """A model of the study, a row of its table.

    model: configuration edits for pretraining and finetuning. pretraining: edits for it alone; None: no pretraining.
    """

    model: tuple[str, ...] = ()
    pretraining: tuple[str, ...] | None = ()


# A plain ViT of as many parameters as the demo's hybrid (926,888 and 921,032).
PLAIN = (
    "--model.size=vit_tiny",
    "--model.widths=[120]",
    "--model.depths=[5]",
    "--model.strides=[8]",
    "--model.position_table=flat",
)
MODELS = {
    "VideoConvMAE-MSD": StudyModel(),
    "VideoConvMAE": StudyModel(pretraining=("--model.msd=false",)),
    "VideoMAE (plain ViT)": StudyModel(model=PLAIN),
    "from scratch (hybrid)": StudyModel(pretraining=None),
    "from scratch (plain ViT)": StudyModel(model=PLAIN, pretraining=None),
}
StudyRow = dict[str, Any]  # model, seed, labelled, top1, top5, device, commit


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        "python -m tools.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model (default %(default)s)")
    parser.add_argument("--pretrain-epochs", type=float, help="passes over the clips (default: the demo's)")
    parser.add_argument("--finetune-steps", type=int, default=400, help="optimizer steps (default %(default)s)")
    parser.add_argument("--labelled", type=int, nargs="+", default=[LABELLED, 4 * LABELLED], help="labelled clips")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    make_motion_clips(args.output / "data")
    settings = {name: getattr(args, name) for name in ("pretrain_epochs", "finetune_steps")}
    results = StudyResults(args.output, settings)
    for row in measure_missing(args, results):
        results.add(row)
        print(
            f"{row['model']}, seed {row['seed']}, {row['labelled']} labelled clips: top-1 {row['top1']:.1%}", flush=True
        )
    print(results.table())


def measure_missing(args: argparse.Namespace, results: StudyResults) -> Iterator[StudyRow]:
    """Yield the rows that are missing, as they are done: one model at a time on a GPU, one a core on a CPU."""
    processes = 1 if args.device.startswith("cuda") else os.cpu_count()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = []
        for seed in range(args.seeds):
            for name in MODELS:
                missing = [labelled for labelled in args.labelled if not results.has(name, labelled, seed)]
                if missing:
                    futures.append(pool.submit(measure_model, name, seed, missing, args))
        for future in as_completed(futures):
            yield from future.result()


def measure_model(name: str, seed: int, labelled: list[int], args: argparse.Namespace) -> list[StudyRow]:
    """Pretrain a model, then finetune and test it with each number of labelled clips; returns a row for each."""
    entry, data = MODELS[name], args.output / "data"
    edits = [*entry.model, f"--seed={seed}", f"--device={args.device}"]
    folder = args.output / "runs" / f"{list(MODELS).index(name)}_{seed}"
    weights = None
    if entry.pretraining is not None:
        weights = folder / "pretrain"
        if not (weights / "metrics.json").exists():
            epochs = [f"--train.epochs={args.pretrain_epochs}"] if args.pretrain_epochs else []
            pretrain_on(data, weights, *edits, *entry.pretraining, *epochs)
    batch = parse(FinetuneConfig, [f"--config={CONFIGS / 'finetune_demo.yaml'}"]).train.batch_size
    rows = []
    for number in labelled:
        epochs = args.finetune_steps * batch / number
        length = [f"--train.epochs={epochs}", f"--validate.every={epochs / 4}"]
        target = folder / f"finetune_{number}"
        if not (target / "test" / "metrics.json").exists():
            finetune_on(data, number, target, weights, *edits, *length)
        rows.append({"model": name, "seed": seed, "labelled": number, **measure_accuracy(target)})
    return [row | describe_machine(args.device) for row in rows]


class StudyResults:
    """The rows measured so far, in results.json and table.md."""

    def __init__(self, folder: Path, settings: dict[str, float | None]) -> None:
        self._folder = folder
        self._path = folder / "results.json"
        self._settings = settings
        self.rows: list[StudyRow] = []
        if self._path.exists():
            known = json.loads(self._path.read_text())
            if known["settings"] != settings:
                raise SystemExit(f"{self._path} has {known['settings']}, not {settings}: give another --output")
            self.rows = known["rows"]

    def has(self, name: str, labelled: int, seed: int) -> bool:
        """Return whether this run is done."""
        return any((row["model"], row["labelled"], row["seed"]) == (name, labelled, seed) for row in self.rows)

    def add(self, row: StudyRow) -> None:
        """Add a row and write both files."""
        self.rows.append(row)
        write_text(self._path, json.dumps({"rows": self.rows, "settings": self._settings}, indent=1) + "\n")
        write_text(self._folder / "table.md", self.table() + "\n")

    def table(self) -> str:
        """Return top-1, mean and standard deviation over the seeds, with a column for each number of labelled clips."""
        numbers = sorted({row["labelled"] for row in self.rows})
        heads = " | ".join(f"top-1, {number} labelled clips" for number in numbers)
        lines = [f"| model | {heads} |", "|---" * (len(numbers) + 1) + "|"]
        for name in MODELS:
            cells = []
            for number in numbers:
                values = [row["top1"] for row in self.rows if (row["model"], row["labelled"]) == (name, number)]
                spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1%}{spread} ({len(values)})" if values else "-")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        machines = dict.fromkeys(f"{row['device']}, commit {row['commit']}" for row in self.rows)
        return "\n".join([*lines, "", f"{'; '.join(machines)}; {self._settings}"])


if __name__ == "__main__":
    main()
