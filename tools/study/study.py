"""The study: does pretraining help, which encoder, which mask? Measured on moving digits, in hours on a CPU.

    make study                                     # estimated at nine hours on two idle CPU cores
    python -m tools.study --quick                  # one seed, three models, which way the digit moves
    python -m tools.study --scale 4 --device cuda  # four times the clips and the pretraining steps
    python -m tools.study --world doom             # another world: which button is held in Doom (tools.study.doom)

Each model is pretrained on all training clips without labels, and then measured with few: *how* (which of eight ways a
digit moves) and *what* (which digit). Validation clips show digits and photographs that no training clip shows. Models
from scratch are only finetuned: for as many steps and, in a column of their own, for five times as many. Ablations, a
model with one thing changed, are pretrained for half as many steps, with one seed, beside the model with nothing
changed. On a CPU each core trains a model of its own. *How* with the fewest labels comes first, for every model, and
then the rest.

results.json, a list of rows, curves.json, what the logs of pretraining say, and table.md are written after every
measurement. The same command resumes the study.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2.functional import center_crop

from tools.study.clips import SETTINGS_FILE, make_digit_clips
from tools.study.doom import CLASSES, make_doom_clips
from tools.study.training import finetune_on, pretrain_on
from video_convmae.atomic import read_json, read_json_lines, write_text
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.records import read_list
from video_convmae.engine.baselines import fit_and_score, mean_frame, motion_energy
from video_convmae.engine.checkpoint import checkpoint_name
from video_convmae.engine.distributed import choose_device
from video_convmae.machine import describe_machine

PRETRAIN_STEPS, ABLATION_STEPS, PRETRAIN_BATCH = 8000, 4000, 32  # of configs/debug/demo.yaml
TRAIN_CLIPS, VALIDATION_CLIPS, SIZE = 20_000, 2_000, 32

Edits = tuple[str, ...]
Row = dict[str, Any]  # model, task, protocol, labels, seed, top1, steps, pretrain_steps, commit, device


@dataclass(frozen=True)
class StudyModel:
    """A model of the study.

    model: edits of every configuration. stages: edits of each pretraining, which starts from the one before; none: from
    scratch. several: measured with several seeds, on both tasks and in every way; otherwise it is an ablation. curve:
    also measured after shorter pretraining. cost: of a step, against that of one mask; as many times fewer steps are
    taken. teacher: the model whose features the visible tokens also mimic.
    """

    model: Edits = ()
    stages: tuple[Edits, ...] = ((),)
    several: bool = False
    curve: bool = False
    cost: int = 1
    teacher: str | None = None

    @property
    def steps(self) -> float:
        """Steps of each pretraining, at scale 1."""
        return (PRETRAIN_STEPS if self.several else ABLATION_STEPS) / self.cost if self.stages else 0


# A plain ViT of as many parameters as the demo's hybrid (926,888 and 921,032).
PLAIN = (
    "--model.size=vit_tiny",
    "--model.widths=[120]",
    "--model.depths=[5]",
    "--model.strides=[8]",
    "--model.position_table=flat",
)


class World(NamedTuple):
    """Where clips come from.

    make: folder, training clips, validation clips -> the clips and their lists. tasks: labels of each clip. edits: of
    every configuration.
    """

    make: Callable[[Path, int, int], None]
    tasks: tuple[str, ...]
    edits: Edits = ()


def _make_doom(folder: Path, train: int, validation: int) -> None:
    per_start = len(CLASSES)
    make_doom_clips(folder, train // per_start * per_start, validation // per_start * per_start, SIZE)


WORLDS = {
    "digits": World(make_digit_clips, ("how", "what")),
    "doom": World(_make_doom, ("how",), ("--data.stride=2",)),  # its clips have 16 frames, models see 8
}
IMAGE = ("--model.num_frames=1", "--mask.kind=random", "--mask.ratio=0.75")
MODELS = {  # numbered by place in run_folder: append only
    "VideoConvMAE-MSD": StudyModel(several=True, curve=True),
    "VideoConvMAE": StudyModel(model=("--model.msd=false",), several=True),
    "VideoMAE (plain ViT)": StudyModel(model=PLAIN, several=True),
    "from scratch (hybrid)": StudyModel(stages=(), several=True),
    "from scratch (plain ViT)": StudyModel(model=PLAIN, stages=(), several=True),
    "MSD, half of the hidden tokens predicted": StudyModel(stages=(("--mask.decoder_ratio=0.5",),)),
    "MSD, tube mask 0.75": StudyModel(stages=(("--mask.kind=tube", "--mask.ratio=0.75"),)),
    "MSD, tube mask 0.9": StudyModel(stages=(("--mask.kind=tube", "--mask.ratio=0.9"),)),
    "MSD, random mask 0.75": StudyModel(stages=(("--mask.kind=random", "--mask.ratio=0.75"),)),
    "MSD, temporal kernel 1": StudyModel(model=("--model.temporal_kernel=1",)),
    "MSD, temporal kernel 5": StudyModel(model=("--model.temporal_kernel=5",)),
    "MSD, learning rate too high": StudyModel(stages=(("--optim.lr=3e-2",),)),
    "image MSD, inflated": StudyModel(stages=(IMAGE,)),
    "image MSD, inflated, pretrained on video": StudyModel(stages=(IMAGE, ())),
    # Two masks that hide half take 1.97 times the CPU time of one (median of 25 pairs, batch 32): nothing is shared.
    "MSD, fast: two masks, half of the steps": StudyModel(stages=(("--mask.count=2",),), cost=2),
    "MSD, v2: taught by VideoConvMAE-MSD": StudyModel(teacher="VideoConvMAE-MSD"),
    "MSD, nothing changed": StudyModel(),
}
BASELINES = {"motion energy + logistic regression": motion_energy, "mean frame + logistic regression": mean_frame}
QUICK = ("VideoConvMAE-MSD", "VideoMAE (plain ViT)", "from scratch (hybrid)")


@dataclass(frozen=True)
class Measurement:
    """What is measured of a model: a column of the table.

    labels: labelled clips. steps: of the optimizer. edits: of configs/debug/finetune_demo.yaml.
    """

    task: Literal["how", "what"]
    protocol: Literal["finetune", "attentive", "logistic", "knn"]
    labels: int
    steps: int
    edits: Edits = ()

    @property
    def title(self) -> str:
        """Head of the column."""
        steps = f", {self.steps} steps" if self.protocol == "finetune" else ""
        return f"*{self.task}*, {self.protocol}, {self.labels} labels{steps}"

    def matches(self, row: Row) -> bool:
        """Return whether a row is a result of it; a baseline stands with the models that were finetuned as long."""
        if (self.task, self.labels) != (row["task"], row["labels"]):
            return False
        if row["model"] in BASELINES:
            return self.protocol == "finetune" and self != FIVE_TIMES_AS_LONG
        return (self.protocol, self.steps) == (row["protocol"], row["steps"])


UNMIXED = ("--mixing.mixup=0", "--mixing.cutmix=0")
ATTENTIVE = (*UNMIXED, "--mixing.smoothing=0", "--optim.weight_decay=0", "--model.probe=attentive")
FEW_LABELS = Measurement("how", "finetune", 200, 400)
MEASUREMENTS = (
    FEW_LABELS,
    Measurement("how", "finetune", 1000, 400),
    # With the mean over tokens *what* stays at chance: a digit is few of the 64 tokens (docs/results.md).
    Measurement("what", "finetune", 10_000, 2000, (*UNMIXED, "--validate.every_steps=200", "--model.pool=motion")),
    Measurement("how", "attentive", 1000, 1000, ATTENTIVE),
    # A linear probe that is fitted at once, on the mean token and its mean change over time.
    Measurement("how", "logistic", 1000, 1, ("--model.probe=logistic", "--model.pool=difference")),
    Measurement("how", "knn", VALIDATION_CLIPS // 2, 0),  # of the probe beside pretraining: half the validation clips
)
ABLATED = tuple(column for column in MEASUREMENTS if column is FEW_LABELS or column.protocol in ("logistic", "knn"))
FIVE_TIMES_AS_LONG = Measurement("how", "finetune", 1000, 2000)  # of models from scratch
CURVE = (500, 1000, 2000, 4000)  # steps of pretraining after which few labels are also tried


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        "python -m tools.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder (default runs/study, of another world runs/study_WORLD)")
    parser.add_argument("--world", choices=WORLDS, default="digits", help="default %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each of the first five models (default 3)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="one seed, three models, *how* with 200 labels")
    parser.add_argument("--scale", type=float, default=1, help="times as many clips and pretraining steps (default 1)")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda")
    parser.add_argument("--processes", type=int, help="models trained at a time (default: one a core; on a GPU one)")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = choose_device("auto").type
    if args.quick:
        args.models, args.seeds = list(QUICK), 1
    args.output = args.output or Path("runs/study" if args.world == "digits" else f"runs/study_{args.world}")
    settings: dict[str, Any] = {"world": args.world, "pretrain_steps": round(args.scale * PRETRAIN_STEPS)}
    require_same_study(args.output, settings)  # before its clips are replaced
    WORLDS[args.world].make(args.output / "data", round(args.scale * TRAIN_CLIPS), VALIDATION_CLIPS)
    settings["clips"] = read_json(args.output / "data" / SETTINGS_FILE)
    require_same_study(args.output, settings)
    write_text(args.output / SETTINGS_FILE, json.dumps(settings) + "\n")
    several = [(name, seed) for seed in range(args.seeds) for name in args.models if MODELS[name].several]
    models = several + [(name, 0) for name in args.models if not MODELS[name].several]
    processes = args.processes or (1 if args.device.startswith("cuda") else os.cpu_count())
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            jobs = [pool.submit(measure_baselines, args)]
            taught = [each for each in models if MODELS[each[0]].teacher]
            untaught = [each for each in models if each not in taught]
            for group, part in ((untaught, slice(1)), (taught, slice(1)), (models, slice(1, None))):
                jobs += [pool.submit(measure_model, *each, plan_model(each[0], args)[part], args) for each in group]
                for future in as_completed(jobs):
                    future.result()
    except (BrokenProcessPool, KeyboardInterrupt):
        sys.exit(f"{args.output} was interrupted; the same command resumes it")
    print(table(collect_rows(args.output)))


def require_same_study(output: Path, settings: dict[str, Any]) -> None:
    """Exit if a folder holds runs of other settings: their rows would stand beside new ones."""
    path = output / SETTINGS_FILE
    known = {"world": "digits"} | read_json(path) if path.exists() else {}
    if (output / "runs").exists() and any(known.get(name) != value for name, value in settings.items()):
        sys.exit(f"{output} holds runs on other clips or of another length; give another --output")


def plan_model(name: str, args: argparse.Namespace) -> list[tuple[Measurement, int]]:
    """Return what is measured of a model, each after how many steps of pretraining; few labels first."""
    model = MODELS[name]
    whole = round(args.scale * model.steps)
    planned = [(FEW_LABELS, whole)]
    if args.quick:
        return planned
    if model.curve:
        planned += [(FEW_LABELS, round(args.scale * steps)) for steps in CURVE]
    measured = MEASUREMENTS if model.several else ABLATED
    columns = [column for column in measured[1:] if column.task in WORLDS[args.world].tasks]
    if not model.stages:
        columns = [column for column in columns if column.protocol != "knn"] + [FIVE_TIMES_AS_LONG]
    return planned + [(column, whole) for column in columns]


def measure_model(name: str, seed: int, planned: list[tuple[Measurement, int]], args: argparse.Namespace) -> None:
    """Pretrain a model, then take every measurement that has no row yet."""
    model, data = MODELS[name], args.output / "data"
    folder = run_folder(name, seed, args)
    known = {row_key(row) for row in collect_rows(args.output)}
    for column, pretrain_steps in planned:
        row: Row = {"model": name, "task": column.task, "protocol": column.protocol, "labels": column.labels}
        row |= {"seed": seed, "steps": column.steps, "pretrain_steps": pretrain_steps}
        if row_key(row) in known:
            continue
        weights = pretrain_model(name, seed, args)
        run = folder / f"{column.task}_{column.protocol}_{column.labels}_{column.steps}_{pretrain_steps}"
        if column.protocol == "knn" and weights is not None:
            row["top1"] = json.loads((weights / "metrics.json").read_text())["probe_knn_top1"]
        else:
            if weights is not None and pretrain_steps < round(args.scale * model.steps):
                weights = weights / "checkpoints" / checkpoint_name(pretrain_steps)
            edits = [*run_settings(model, seed, args), *column.edits]
            with _ended_by_a_signal():
                metrics = finetune_on(data, column.task, column.labels, column.steps, run, weights, *edits)
            row["top1"] = metrics["val_top1"]
        row |= describe_machine(args.device)
        if column.protocol == "finetune":
            row["steps_to_half"] = steps_to_half(run)
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "row.json", json.dumps(row) + "\n")
        write_results(args.output)
        print(f"{name}, seed {seed}, {column.title}: top-1 {row['top1']:.1%}", flush=True)


def run_folder(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Return the folder of a model's runs."""
    return args.output / "runs" / f"{list(MODELS).index(name)}_{seed}"


def run_settings(model: StudyModel, seed: int, args: argparse.Namespace) -> list[str]:
    """Return the edits of all runs of a model."""
    return [*model.model, *WORLDS[args.world].edits, f"--seed={seed}", f"--device={args.device}"]


def pretrain_model(name: str, seed: int, args: argparse.Namespace) -> Path | None:
    """Pretrain a model, unless that is done; returns the run of the last stage. None: a model from scratch."""
    model, data = MODELS[name], args.output / "data"
    folder, settings = run_folder(name, seed, args), run_settings(model, seed, args)
    weights: Path | None = None
    every = CURVE[0] * PRETRAIN_BATCH / TRAIN_CLIPS  # in epochs: CURVE[0] steps times the scale, as in plan_model
    watch = [f"--probe.list={data / 'validation_how.txt'}", f"--probe.records={VALIDATION_CLIPS}"]
    watch += [f"--train.keep_every={every}", f"--probe.every={every}"]
    if model.teacher is not None:
        teacher = pretrain_model(model.teacher, seed, args)
        features = f"{{name: features, teacher: {teacher}, tokens: visible}}"
        settings.append(f"--targets=[{{name: pixels}}, {features}]")
    for number, edits in enumerate(model.stages):
        start = [] if weights is None else [f"--init.weights={weights}"]
        weights = folder / f"pretrain_{number}"
        length = f"--train.max_steps={round(args.scale * model.steps)}"
        with _ended_by_a_signal():
            pretrain_on(data, weights, *settings, *start, length, *watch, *edits)
    return weights


@contextmanager
def _ended_by_a_signal() -> Iterator[None]:
    """End this process where a signal stopped its run, and with it the pool: it would begin its next model."""
    try:
        yield
    except SystemExit:
        os._exit(1)


def measure_baselines(args: argparse.Namespace) -> None:
    """Fit the trivial baselines to the labelled clips of each task; without a GPU, seeds or steps."""
    known = {row_key(row) for row in collect_rows(args.output)}
    for column in (FEW_LABELS,) if args.quick else MEASUREMENTS:
        row: Row = {"task": column.task, "protocol": "linear", "labels": column.labels}
        row |= {"seed": 0, "steps": 0, "pretrain_steps": 0}
        missing = [name for name in BASELINES if row_key(row | {"model": name}) not in known]
        if column.protocol != "finetune" or column.task not in WORLDS[args.world].tasks or not missing:
            continue
        train, train_labels = _read_clips(args.output / "data", f"train_{column.task}", column.labels)
        test, test_labels = _read_clips(args.output / "data", f"validation_{column.task}", None)
        for name in missing:
            features = [BASELINES[name](clips).numpy() for clips in (train, test)]
            fit = fit_and_score(features[0], train_labels, features[1], test_labels)
            result = row | {"model": name, "top1": fit.top1, **describe_machine()}
            folder = args.output / "runs" / "baselines" / f"{name.split()[0]}_{column.task}_{column.labels}"
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "row.json", json.dumps(result) + "\n")
            write_results(args.output)
            print(f"{name}, {column.title}: top-1 {fit.top1:.1%}", flush=True)


def _read_clips(data: Path, name: str, count: int | None) -> tuple[torch.Tensor, np.ndarray]:
    """Return the first clips of a list, `(R, C, T, H, W)` uint8, without the margin of training clips; their labels."""
    records = read_list(data / f"{name}.txt", root=data)
    with ReaderProcess("pyav") as process:
        clips = []
        for record in list(records)[:count]:
            with process.open(record) as reader:
                clips.append(torch.from_numpy(reader.read(np.arange(len(reader)))))
    pixels = torch.stack(clips).permute(0, 4, 1, 2, 3)
    return center_crop(pixels, [SIZE, SIZE]), records.labels[:count]


def row_key(row: Row) -> tuple:
    """Return what tells a row from others."""
    return tuple(row[name] for name in ("model", "task", "protocol", "labels", "seed", "steps", "pretrain_steps"))


def steps_to_half(run: Path) -> int | None:
    """Return the first validated step of a run that passes 50%; None: none did."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return next((line["step"] for line in lines if (line.get("val_top1") or 0) > 0.5), None)


def collect_rows(output: Path) -> list[Row]:
    """Return the rows of results.json and of all measurements in the folder: a kill loses none."""
    known = json.loads((output / "results.json").read_text()) if (output / "results.json").exists() else []
    found = [json.loads(path.read_text()) for path in sorted(output.glob("runs/*/*/row.json"))]
    rows = {row_key(row): row for row in known + found}
    order = [*MODELS, *BASELINES]
    return sorted(rows.values(), key=lambda row: (order.index(row["model"]), row["seed"]))


def collect_curves(output: Path) -> list[Row]:
    """Return loss, nearest neighbours, linear probe, effective rank and deviation over the steps of each pretraining.

    One row a run; a value is a list of (step, value). A model that is pretrained in stages shows the first. A run that
    was ended before its first line has none.
    """
    curves = []
    for folder in sorted(output.glob("runs/*/pretrain_0")):
        number, seed = map(int, folder.parent.name.split("_"))
        log = folder / "log.jsonl"
        lines = read_json_lines(log) if log.exists() else []
        row: Row = {"model": list(MODELS)[number], "seed": seed}
        for name in ("loss", "probe_knn_top1", "probe_linear_top1", "probe_rank", "probe_std"):
            row[name] = [(line["step"], round(line[name], 4)) for line in lines if line.get(name) is not None]
        if row["loss"]:
            curves.append(row)
    return curves


def write_results(output: Path) -> None:
    """Write results.json, curves.json and table.md."""
    rows = collect_rows(output)
    write_rows(output / "results.json", rows)
    write_rows(output / "curves.json", collect_curves(output))
    write_text(output / "table.md", table(rows) + "\n")


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a list of rows as JSON, one a line."""
    write_text(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def table(rows: list[Row]) -> str:
    """Return two tables, of the models and of the ablations, and where they were measured.

    A cell is top-1 in percent after a model's longest pretraining, mean and standard deviation over the seeds (and
    their number); of *what* also the first validation above 50%, in steps, mean over the seeds that reach it.
    """
    ablations = [name for name, model in MODELS.items() if not model.several]
    models = [name for name in [*MODELS, *BASELINES] if name not in ablations]
    tables = [_table(rows, names) for names in (models, ablations)]
    return "\n\n".join([*filter(None, tables), origins(rows)])


def _table(rows: list[Row], names: list[str]) -> str:
    """Return a table of some models; empty: nothing of them was measured."""
    shown = {name: [row for row in rows if row["model"] == name] for name in names}
    longest = {name: max(row["pretrain_steps"] for row in of) for name, of in shown.items() if of}
    shown = {name: [row for row in shown[name] if row["pretrain_steps"] == longest[name]] for name in longest}
    columns = [
        column
        for column in (*MEASUREMENTS, FIVE_TIMES_AS_LONG)
        if any(column.matches(row) for of in shown.values() for row in of)
    ]
    if not columns:
        return ""
    heads = ["model", "pretraining steps", *(column.title for column in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, of in shown.items():
        cells = [name, f"{longest[name]:,}"]
        for column in columns:
            matching = [row for row in of if column.matches(row)]
            cells.append(cell([row["top1"] for row in matching]))
            halves = [row["steps_to_half"] for row in matching if row.get("steps_to_half")]
            if column.task == "what" and halves:
                cells[-1] += f", 50% at step {statistics.mean(halves):.0f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def origins(rows: list[Row]) -> str:
    """Return the machines and commits that rows were measured with."""
    commits: dict[str, dict[str, None]] = {}
    for row in rows:
        commits.setdefault(row["device"], {})[row["commit"]] = None
    return "; ".join(f"{device}, commit{'s' if len(of) > 1 else ''} {', '.join(of)}" for device, of in commits.items())


def cell(values: list[float]) -> str:
    """Format the results of several seeds."""
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} ({len(values)})"
