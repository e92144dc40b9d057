"""Measure how a training step's cost grows with frames, resolution, mask ratio and batch, and plot it.

    video-convmae benchmark scale --device cuda --precision bf16 --plot docs/scale.png --json scale.json
    video-convmae benchmark scale                     # on a CPU: a small model, few clips a step

One thing is varied at a time, from a middle that all share. Every point has a process of its own, which starts empty:
seconds a clip, the median of its steps, and peak memory. The counted line beside the measured points is the
multiply-adds by formula, scaled to meet the measurement of ours in the middle: points above the line cost more than
their arithmetic. Beside memory stand 16 bytes a parameter, for weight, gradient and AdamW's two averages.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from video_convmae.machine import describe_machine

from .step import Runner, own_process, resolve_step_options

SWEEPS: dict[str, tuple[str, tuple[float, ...]]] = {  # option: its axis label, its values
    "frames": ("frames", (8, 16, 32, 64)),
    "image_size": ("pixels along a side", (112, 160, 224, 320, 448)),
    "ratio": ("share hidden", (0.75, 0.8, 0.85, 0.9, 0.95)),
    "batch": ("clips a step", (1, 2, 4, 8, 16, 32, 64)),
}
MAX_BATCH = {"cuda": 64, "cpu": 4}
MIDDLE = {  # the options that are not varied
    "cuda": {"size": "base", "frames": 16, "image_size": 224, "ratio": 0.9, "batch": 16},
    "cpu": {"size": "small", "frames": 16, "image_size": 224, "ratio": 0.9, "batch": 1},
}


def run_scale(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every sweep and write the plot; returns the points."""
    kind = "cuda" if args.device.startswith("cuda") else "cpu"
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = resolve_step_options(argparse.Namespace(**vars(args) | MIDDLE[kind] | given))
    machine = describe_machine(args.device)
    rows = measure_sweeps(args, MAX_BATCH[kind])
    middle = f"{args.size}, {args.frames}x{args.image_size}, {args.mask} {args.ratio}, batch {args.batch}"
    where = f"{machine['device']}, {args.precision}, {args.threads} threads, commit {machine['commit']}"
    plot_sweeps(rows, args, f"{middle}; {where}", args.plot)
    print(f"{args.plot} written")
    return machine | {"precision": args.precision, "threads": args.threads, "middle": middle, "points": rows}


def measure_sweeps(args: argparse.Namespace, max_batch: int) -> list[dict[str, Any]]:
    """Measure every point of every sweep, for ours and the sides of --vs."""
    rows: list[dict[str, Any]] = []
    known: dict[tuple[Any, ...], dict[str, float]] = {}
    for field, (_, values) in SWEEPS.items():
        largest = max_batch if field == "batch" else max(values)
        for value in sorted({*(value for value in values if value <= largest), getattr(args, field)}):
            for side in ("ours", *args.vs):
                point = argparse.Namespace(**vars(args) | {field: value})
                key = (side, *(getattr(point, name) for name in SWEEPS))
                if key not in known:  # the middle belongs to every sweep
                    known[key] = measure_point(point, side)
                rows.append({"sweep": field, "value": value, "side": side, **known[key]})
                print(*(f"{name} {number}" for name, number in rows[-1].items()), sep=", ", flush=True)
    return rows


def measure_point(args: argparse.Namespace, name: str) -> dict[str, float]:
    """Measure one side at one point, in a process of its own; a point that runs out of memory has no numbers."""
    with own_process() as process:
        return process.submit(_measure_here, args, name).result()


def _measure_here(args: argparse.Namespace, name: str) -> dict[str, float]:
    runner = Runner(args, name)
    point: dict[str, float] = {
        "multiply_adds": sum(runner.side.multiply_adds.values()),
        "fixed_bytes": 16 * sum(parameter.numel() for parameter in runner.side.model.parameters()),
    }
    try:
        seconds = [sum(runner.step()) for _ in range(args.warmup + args.repeats)][args.warmup :]
    except torch.OutOfMemoryError:
        return point
    return point | {
        "seconds_per_clip": statistics.median(seconds) / args.batch,
        "peak_memory_bytes": runner.peak_memory(),
    }


def plot_sweeps(rows: list[dict[str, Any]], args: argparse.Namespace, title: str, path: Path) -> None:
    """Plot time above, memory below, one column a sweep, as PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(SWEEPS), 7), layout="constrained")
    axes = figure.subplots(2, len(SWEEPS))
    # Ours in the middle sets the rate of every counted line.
    middle = next(row for row in rows if row["side"] == "ours" and row["value"] == getattr(args, row["sweep"]))
    rate = middle["multiply_adds"] / middle["seconds_per_clip"]
    for column, (field, (label, _)) in enumerate(SWEEPS.items()):
        for number, side in enumerate(("ours", *args.vs)):
            points = [row for row in rows if row["sweep"] == field and row["side"] == side]
            measured = [row for row in points if "seconds_per_clip" in row]
            values, colour = [row["value"] for row in measured], f"C{number}"
            seconds, memory = ([row[name] for row in measured] for name in ("seconds_per_clip", "peak_memory_bytes"))
            axes[0, column].plot(values, seconds, "o-", color=colour, label=side)
            counted = [row["multiply_adds"] / rate for row in points]
            axes[0, column].plot([row["value"] for row in points], counted, ":", color=colour, label=f"{side}, counted")
            axes[1, column].plot(values, [count / 2**30 for count in memory], "o-", color=colour, label=side)
            fixed = [row["fixed_bytes"] / 2**30 for row in points]
            name = f"{side}, 16 bytes a parameter"
            axes[1, column].plot([row["value"] for row in points], fixed, ":", color=colour, label=name)
        for row, name in enumerate(("seconds a clip", "peak memory in GiB")):
            axes[row, column].set(xlabel=label, ylim=(0, None))
            if column == 0:
                axes[row, column].set_ylabel(name)
                axes[row, column].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
