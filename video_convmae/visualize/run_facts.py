"""What a run folder says of itself without its weights, as parts of a report: the head, curves, values, bad records.

Any run folder will do: one that is still going, was interrupted, or has no validation.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import yaml

from video_convmae.atomic import read_json, read_json_lines
from video_convmae.engine.log import SCORES, judge_log
from video_convmae.engine.metrics import Values
from video_convmae.errors import UserError
from video_convmae.runs import RunKind, kind_of

from .page import Curve, Plot, draw_details, draw_plot, draw_table, show

FAILED_SHOWN = 10

WORDS: dict[RunKind, str] = {
    "pretrain": "Pretraining",
    "finetune": "Finetuning",
    "detection": "Training of a detector",
    "segmentation": "Training of a segmenter",
}
Plots = tuple[tuple[str, str, dict[str, str]], ...]
# Title, unit, and the logged values with their names; "loss_*": those of several targets or heads.
RESULTS: Plots = (
    ("Loss", "", {"loss": "loss", "loss_*": "", "loss_nothing": "predicting nothing"}),
    (
        "Accuracy",
        "%",
        {
            "val_top1": "validation top-1",
            "train_top1": "train top-1",
            "val_top5": "validation top-5",
            "val_largest_class": "largest class",
        },
    ),
    ("Mean average precision", "%", {"val_map": "validation mAP", "val_chance_map": "chance"}),
    ("Average precision", "%", {"val_box_ap": "box AP", "val_mask_ap": "mask AP", "val_box_ap50": "box AP50"}),
    ("Overlap", "%", {"val_miou": "mIoU", "val_largest_class_miou": "largest class"}),
    ("Accuracy of pixels", "%", {"val_aacc": "validation", "train_aacc": "training"}),
    ("Probes of the features", "%", {"probe_linear_top1": "linear", "probe_knn_top1": "nearest neighbours"}),
    ("Effective rank of the features", "", {"probe_rank": "probed records", "feature_rank": "training clips"}),
)
TRAINING: Plots = (
    ("Learning rate", "", {"lr": "learning rate"}),
    ("Gradient norm", "", {"grad_norm": "gradient norm"}),
    ("Deviation of the features", "", {"probe_std": "probed records"}),
    ("Speed", "clips/s", {"clips_per_second": "clips/s"}),
    ("Waiting for data", "%", {"data_wait": "share of the time"}),
)
BASELINES = ("loss_nothing", "val_largest_class", "val_chance_map", "val_largest_class_miou")
COUNTS = ("step", "epoch", "eta_seconds", "val_scored", "val_failed", "probe_scored", "probe_failed", "bad_records")


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself without its weights.

    config: plain data of config.yaml.
    lines: of log.jsonl, in order.
    metrics: of metrics.json; empty where the run has not ended.
    starts: the first line of each process of rank 0: when, where and how it ran.
    """

    folder: Path
    kind: RunKind
    config: dict[str, Any]
    lines: list[Values]
    metrics: Values
    starts: list[dict[str, Any]]
    last_time: str | None

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.folder.resolve().name

    @cached_property
    def last(self) -> Values:
        """The last value of everything that is logged."""
        return {name: value for line in self.lines for name, value in line.items()} or self.metrics

    @cached_property
    def steps(self) -> int | None:
        """Optimizer steps of the whole run; None: nothing is logged that says so."""
        if (fixed := self.config["train"].get("max_steps")) is not None:
            return fixed
        known = [line["step"] / line["epoch"] for line in self.lines if line.get("epoch")]
        return round(self.config["train"]["epochs"] * known[-1]) if known else None

    def points(self, name: str) -> list[tuple[float, float | None]]:
        """Return a logged value by step."""
        return [(line["step"], line[name]) for line in self.lines if name in line]


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: it is none, or a file in it is damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml; expected the --output of a training run")
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is damaged, or was edited: it is no YAML ({error})") from error
    kind = kind_of(config)
    if kind is None:
        raise UserError(f"{path} is not the configuration of a run of this project")
    log, metrics, own = folder / "log.jsonl", folder / "metrics.json", folder / "logs" / "rank_0000.jsonl"
    ranks = read_json_lines(own) if own.exists() else []
    return Run(
        folder,
        kind,
        config,
        read_json_lines(log) if log.exists() else [],
        read_json(metrics) if metrics.exists() else {},
        [line for line in ranks if "host" in line],
        ranks[-1].get("time") if ranks else None,
    )


def files_read(run: Run) -> list[Path]:
    """Return the files that a page of a run is made of: everything in its folder but pages, and its lists."""
    data, probe = run.config["data"], run.config.get("probe") or {}
    train = data.get("train")
    listed = [each["list"] for each in train] if isinstance(train, list) else [train]
    listed += [data.get("validation"), probe.get("list")]
    own = [path for path in run.folder.rglob("*") if path.is_file() and path.suffix != ".html"]
    return own + [Path(path) for path in listed if path]


# Head


def draw_head(run: Run) -> str:
    """Return what the run is, whether it learned, its most important numbers, and when, where and how it ran."""
    learned, verdict = judge(run)
    mark = {True: " good", False: " bad", None: ""}[learned]
    parts = [f'<p class="kind">{escape(describe_kind(run))}</p><h1>{escape(run.name)}</h1>']
    parts.append(f'<p class="verdict{mark}">{escape(verdict)}</p>')
    numbers = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="beside">{escape(beside)}</dd></div>'
        for name, value, beside in head_numbers(run)
    )
    parts.append(f'<dl class="numbers">{numbers}</dl>')
    parts.append(f'<p class="facts">{escape(" · ".join(head_facts(run)))}</p>')
    command = run.starts[-1].get("command") if run.starts else None
    if command is not None:
        parts.append(draw_details("Command", command))
    return "".join(parts)


def describe_kind(run: Run) -> str:
    """Return the kind of run, its model, clip and mask in a line."""
    model, data = run.config["model"], run.config["data"]
    words = ["Probing" if model.get("probe") else WORDS[run.kind]]
    size = model.get("image_size")
    sides = size if isinstance(size, list) else [size, size] if size else []
    frames = [model["num_frames"]] if model.get("num_frames", 1) > 1 else []
    words[0] += f" of {model['size']}" if model.get("size") else ""
    if sides:
        words.append(" × ".join(str(each) for each in (*frames, *sides)))
    if mask := run.config.get("mask"):
        words.append(f"{mask['kind']} mask {mask['ratio']:.0%}")
    classes = data.get("num_classes") or len(data.get("labels") or ())
    if run.kind != "pretrain" and classes:
        words.append(f"{classes} classes")
    return ", ".join(words)


def judge(run: Run) -> tuple[bool | None, str]:
    """Return whether the run learned (None: nothing says so) and a sentence."""
    learned, reason = run.metrics.get("learned"), run.metrics.get("verdict")
    is_finished = bool(run.metrics)
    if not is_finished and "loss_nothing" in run.last:
        judged = judge_log(run.lines, run.last)
        learned, reason = judged["learned"], judged["verdict"]
    elif not is_finished:
        learned, reason = run.last.get("val_learned"), run.last.get("val_verdict")
    if is_finished:
        state = "Finished"
    elif not run.lines:
        state = "Begun; no step is logged yet"
    else:
        of = "" if run.steps is None else f" of {run.steps:,}"
        state = f"Not finished: step {run.last['step']:,}{of} is the last that is logged"
        state += f", at {_time(run.last_time)}" if run.last_time else ""
    if learned is None:
        return None, f"{state}; nothing measured says whether it learned."
    so_far = "" if is_finished else " so far"
    if learned:
        return True, f"{state}. It has learned{so_far}: better than {_trivial(run)}."
    return False, f"{state}. It has not learned{so_far}: {str(reason).rstrip('.')}."


def _trivial(run: Run) -> str:
    """Return what a run that learned is better than."""
    if run.kind == "pretrain":
        return "predicting nothing, and its features have not died"
    if run.config["data"].get("multi_label"):
        return "scores that tell nothing"
    return {"detection": "finding nothing", "segmentation": "always predicting the largest class"}.get(
        run.kind, "always answering the most frequent class"
    )


def head_numbers(run: Run) -> list[tuple[str, str, str]]:
    """Return the most important numbers: name, value, and what it is to be compared with."""
    last, numbers = run.last, []
    for name, words in SCORES.items():
        scores = [(value, step) for step, value in run.points(f"val_{name}") if value is not None]
        if not scores and run.metrics.get(f"val_{name}") is not None:  # a probe that was fitted at once
            scores = [(run.metrics[f"val_{name}"], run.metrics["step"])]
        if scores:
            best, step = max(scores, key=lambda each: each[0])
            largest = last.get("val_largest_class" if name == "top1" else f"val_largest_class_{name}")
            compared = [] if largest is None else [f"largest class {show(largest, '%')}"]
            chance = last.get(f"val_chance_{name}")
            compared += [] if chance is None else [f"chance {show(chance, '%')}"]
            compared += [] if step == scores[-1][1] else [f"best {show(best, '%')} at step {step:,}"]
            numbers.append((f"Validation {words}", show(scores[-1][0], "%"), "; ".join(compared)))
    if last.get("train_top1") is not None:
        numbers.append(("Train top-1", show(last["train_top1"], "%"), "augmented clips"))
    if "loss" in last:
        nothing = last.get("loss_nothing")
        beside = "" if nothing is None else f"predicting nothing {show(nothing)}"
        loss = last.get("loss_pixels", last["loss"])
        numbers.append(("Loss of pixels" if "loss_pixels" in last else "Loss", show(loss), beside))
    for name, words, unit in (("probe_linear_top1", "Linear probe", "%"), ("probe_rank", "Effective rank", "")):
        values = [value for _, value in run.points(name) if value is not None]
        if values:
            numbers.append((words, show(values[-1], unit), f"{show(values[0], unit)} at the start"))
    if last.get("step"):
        of = "" if run.steps is None or run.metrics else f"of {run.steps:,}"
        epochs = "" if last.get("epoch") is None else f"{show(last['epoch'])} epochs"
        numbers.append(("Steps", f"{last['step']:,}", of or epochs))
    return numbers


def head_facts(run: Run) -> list[str]:
    """Return when and where the run ran, and of what version."""
    facts = []
    if run.starts:
        first, last = run.starts[0], run.starts[-1]
        facts.append(f"begun {_time(first['time'])}")
        if len(run.starts) > 1:
            facts.append(f"started {len(run.starts)} times, last {_time(last['time'])}")
        facts.append(" ".join(str(each) for each in (last["host"], last.get("device")) if each))
        if last.get("version"):
            commit = f", commit {last['commit']}" if last.get("commit") else ""
            facts.append(f"version {last['version']}{commit}, torch {last['torch']}")
    if "seconds" in run.metrics:
        minutes = run.metrics["seconds"] / 60
        facts.append(f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h" + " since it was last started")
    init = run.config["init"]["weights"]
    facts.append("from random weights" if init is None else f"from {init}")
    facts.append(f"seed {run.config['seed']}")
    return facts


def _time(text: str | None) -> str:
    return "an unknown time" if text is None else f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M %Z}"


# Curves and values


def draw_curves(run: Run, groups: Plots) -> str:
    """Return a plot of every group of logged values that the run has."""
    plots = []
    for title, unit, names in groups:
        curves = []
        for name, words in names.items():
            for each in _matching(run, name):
                if points := run.points(each):
                    label = words or each.removeprefix("loss_").replace("_", " ")
                    curves.append(Curve(label, points, each in BASELINES))
        if any(value is not None for curve in curves for _, value in curve.points):
            plots.append(draw_plot(Plot(title, curves, unit)))
    if not plots and "sweep" in run.metrics:
        raise UserError(f"the heads of a sweep are trained together: video-convmae report {run.folder / 'sweep'}")
    if not plots:
        raise UserError("nothing is logged yet" if run.lines or not run.metrics else "a fitted probe takes no steps")
    return f'<div class="plots">{"".join(plots)}</div>'


def _matching(run: Run, name: str) -> list[str]:
    if not name.endswith("*"):
        return [name]
    others = ("loss_nothing", "loss_scale")
    return [each for each in run.last if each.startswith(name[:-1]) and each not in others]


def draw_last_values(run: Run) -> str:
    """Return a table of every logged value: the last, at which step, and its range."""
    rows = []
    for name in run.last:
        points = run.points(name) or [(run.metrics.get("step", 0), run.metrics.get(name))]  # a probe, fitted at once
        values = [v for _, v in points if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if values and name not in ("step", "eta_seconds"):
            (step, value), unit = points[-1], _unit(name)
            shown = (show(each, unit) for each in (value, min(values), max(values)))
            last, *least_and_largest = shown
            rows.append((name, last, f"{step:,}", *least_and_largest, str(len(values))))
    if not rows:
        raise UserError("nothing is logged")
    return draw_table(("value", "last", "at step", "least", "largest", "logged"), rows)


def _unit(name: str) -> str:
    if name in COUNTS:
        return ""
    ends = ("top1", "top5", "accuracy", "_class", "largest", "data_wait", "miou", "macc", "aacc", "_map", "_f1")
    return "%" if name.endswith(ends) or "_ap" in name or "_ar" in name else ""


def draw_sweep(run: Run) -> str:
    """Return a table of the heads of a sweep, the best first; empty: the run is none, or has not ended."""
    if "sweep" not in run.metrics:
        return ""
    sweep = run.metrics["sweep"]
    chosen = sweep["chosen"]["head"]
    scores = [-1.0 if head["held_out_top1"] is None else head["held_out_top1"] for head in sweep["heads"]]
    heads = sorted(enumerate(sweep["heads"]), key=lambda each: scores[each[0]], reverse=True)
    rows = [
        ("chosen" if number == chosen else "", f"{head['lr']:g}", f"{head['weight_decay']:g}", (show(top1, "%"), top1))
        for number, head in heads
        for top1 in (head["held_out_top1"],)
    ]
    records = f"held out: {sweep['held_out']['records']} records of the training list"
    return draw_table(("", "learning rate", "weight decay", "held-out top-1"), rows, records)


def draw_bad_records(run: Run) -> str:
    """Return how many records could not be read and the first of them; empty where all could."""
    rows = []
    for path in ("bad_records.jsonl", "validation/bad_records.jsonl", "probe/bad_records.jsonl"):
        if (run.folder / path).exists():
            lines = read_json_lines(run.folder / path)
            rows += [f"{path}: {len(lines)} records", *(f"  {line['error']}" for line in lines[:FAILED_SHOWN])]
            rows += [f"  ... {len(lines) - FAILED_SHOWN} more"] if len(lines) > FAILED_SHOWN else []
    return f"<pre>{escape(chr(10).join(rows))}</pre>" if rows else ""
