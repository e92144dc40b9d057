"""The study: does pretraining help, and does the hybrid? The demo's task at length, for several models and seeds.

    make study                                           # hours on a CPU, minutes on a GPU
    python tools/study.py --output runs/study --seeds 3 --pretrain-epochs 40 --finetune-epochs 40 --device cuda

Each model is pretrained on all clips of camera motion, finetuned on the labelled ones and tested on photographs that no
training clip shows; "from scratch" is finetuned alone, for as many steps. Written after each run: results.json, and
table.md with mean and standard deviation over the seeds. A study that was interrupted goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from demo import LABELLED, accuracy_of, finetune_on, pretrain_on
from make_motion_clips import make_motion_clips

from video_convmae.engine.log import write_text


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    model: edits for pretraining and finetuning. pretraining: edits for it alone; None: there is none.
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
ENTRIES = {
    "VideoConvMAE-MSD": Entry(),
    "VideoConvMAE": Entry(pretraining=("--model.msd=false",)),
    "VideoMAE (plain ViT)": Entry(model=PLAIN),
    "from scratch (hybrid)": Entry(pretraining=None),
    "from scratch (plain ViT)": Entry(model=PLAIN, pretraining=None),
}


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model (default %(default)s)")
    parser.add_argument("--pretrain-epochs", type=float, help="passes over the clips; none: the demo's")
    parser.add_argument("--finetune-epochs", type=float, help="passes over the labelled clips; none: the demo's")
    parser.add_argument("--labelled", type=int, nargs="+", default=[LABELLED], help="labelled clips, one study each")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda")
    given = parser.parse_args()
    data = given.output / "data"
    make_motion_clips(data)
    results = Results(
        given.output, {"pretrain_epochs": given.pretrain_epochs, "finetune_epochs": given.finetune_epochs}
    )
    for labelled in given.labelled:
        for seed in range(given.seeds):
            for name in ENTRIES:
                if not results.has(name, labelled, seed):
                    results.add(name, labelled, seed, run_once(name, labelled, seed, data, given))
    print(results.table())


def run_once(name: str, labelled: int, seed: int, data: Path, given: argparse.Namespace) -> dict[str, float]:
    """Pretrain, finetune and test one model with one seed; its accuracies and the seconds it took."""
    print(f"\n{name}, seed {seed}, {labelled} labelled clips", flush=True)
    entry, started = ENTRIES[name], time.perf_counter()
    shared = [*entry.model, f"--seed={seed}", f"--device={given.device}"]
    folder = given.output / "runs" / f"{list(ENTRIES).index(name)}_{seed}"
    weights = None
    if entry.pretraining is not None:
        weights = folder / "pretrain"
        if not (weights / "metrics.json").exists():  # the same for any number of labelled clips
            epochs = [f"--train.epochs={given.pretrain_epochs}"] if given.pretrain_epochs else []
            pretrain_on(data, weights, *shared, *entry.pretraining, *epochs)
    epochs = [f"--train.epochs={given.finetune_epochs}"] if given.finetune_epochs else []
    finetune_on(data, labelled, folder / f"finetune_{labelled}", weights, *shared, *epochs)
    accuracy = accuracy_of(folder / f"finetune_{labelled}")
    return accuracy | {"seconds": time.perf_counter() - started}


class Results:
    """What was measured so far, in results.json and table.md."""

    def __init__(self, folder: Path, settings: dict[str, float | None]) -> None:
        self._folder = folder
        self._path = folder / "results.json"
        self._settings = settings
        known = json.loads(self._path.read_text()) if self._path.exists() else {"rows": [], "settings": settings}
        if known["settings"] != settings:
            raise SystemExit(f"{self._path} is of {known['settings']}, asked for is {settings}: give another --output")
        self.rows = known["rows"]

    def has(self, name: str, labelled: int, seed: int) -> bool:
        """Whether this run is done."""
        return any((row["model"], row["labelled"], row["seed"]) == (name, labelled, seed) for row in self.rows)

    def add(self, name: str, labelled: int, seed: int, values: dict[str, float]) -> None:
        """Take a run in."""
        about = {"commit": commit(), "machine": machine()}
        self.rows.append({"model": name, "labelled": labelled, "seed": seed, **values, **about})
        write_text(self._path, json.dumps({"rows": self.rows, "settings": self._settings}, indent=1) + "\n")
        write_text(self._folder / "table.md", self.table() + "\n")

    def table(self) -> str:
        """Top-1, mean and standard deviation over the seeds; a column for each number of labelled clips."""
        numbers = list(dict.fromkeys(row["labelled"] for row in self.rows))
        heads = " | ".join(f"top-1, {number} labelled clips" for number in numbers)
        lines = [f"| model | {heads} |", "|---" * (len(numbers) + 1) + "|"]
        for name in ENTRIES:
            cells = []
            for number in numbers:
                values = [row["top1"] for row in self.rows if (row["model"], row["labelled"]) == (name, number)]
                spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1%}{spread} ({len(values)})" if values else "-")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        where = dict.fromkeys(f"{row['machine']}, commit {row['commit']}" for row in self.rows)
        return "\n".join([*lines, "", f"{'; '.join(where)}; {self._settings}"])


def machine() -> str:
    """What the study runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is measured; "unknown" outside of a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
