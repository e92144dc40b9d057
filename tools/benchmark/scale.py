"""Measure how a training step's cost grows with frames, resolution, mask ratio and batch, and plot it.

    python tools/benchmark.py scale --device cuda --precision bf16 --plot docs/scale.png --json scale.json
    python tools/benchmark.py scale                     # on a CPU: a small model, few clips a step

One thing is varied at a time, from a middle that all share. Every point is a process of its own, which starts empty:
seconds a clip, the median of its steps, and peak memory. The counted line beside the measured points is the
multiply-adds by formula, scaled so that it meets the first side's measurement in the middle: points above the line cost
more than arithmetic tells. Beside memory stand 16 bytes a parameter, for weight, gradient and AdamW's two averages.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from video_convmae.benchmark.step import PEERS, RIVALS, Runner, own_process, resolve
from video_convmae.benchmark.step import add_options as add_step_options

SWEEPS = {  # what is varied: its name in a picture, its values
    "frames": ("frames", (8, 16, 32, 64)),
    "image_size": ("pixels along a side", (112, 160, 224, 320, 448)),
    "ratio": ("share hidden", (0.75, 0.8, 0.85, 0.9, 0.95)),
    "batch": ("clips a step", (1, 2, 4, 8, 16, 32, 64)),
}
MOST_CLIPS = {"cuda": 64, "cpu": 4}  # a step
MIDDLE = {  # where nothing is varied
    "cuda": {"size": "base", "frames": 16, "image_size": 224, "ratio": 0.9, "batch": 16},
    "cpu": {"size": "small", "frames": 16, "image_size": 224, "ratio": 0.9, "batch": 1},
}


def measure_point(given: argparse.Namespace, name: str) -> dict[str, float]:
    """One side's step at one point, in a process of its own; memory that does not suffice makes a point without
    numbers."""
    with own_process() as process:
        return process.submit(_measure_here, given, name).result()


def _measure_here(given: argparse.Namespace, name: str) -> dict[str, float]:
    runner = Runner(given, name)
    point = {
        "multiply_adds": sum(runner.side.multiply_adds.values()),
        "fixed_bytes": 16 * sum(parameter.numel() for parameter in runner.side.model.parameters()),
    }
    try:
        seconds = [sum(runner.step()) for _ in range(given.warmup + given.repeats)][given.warmup :]
    except torch.OutOfMemoryError:
        return point
    return point | {
        "seconds_per_clip": statistics.median(seconds) / given.batch,
        "peak_memory_bytes": runner.peak_memory(),
    }


def sweep(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every point of every sweep, for ours and what it is measured against."""
    kind = "cuda" if given.device.startswith("cuda") else "cpu"
    middle = argparse.Namespace(**{key: value for key, value in vars(given).items() if key != "run"})
    rows, known = [], {}
    for field, (_, values) in SWEEPS.items():
        most = MOST_CLIPS[kind] if field == "batch" else max(values)
        for value in sorted({*(value for value in values if value <= most), getattr(middle, field)}):
            for side in ("ours", *given.vs):
                point = argparse.Namespace(**vars(middle) | {field: value})
                key = (side, *(getattr(point, name) for name in SWEEPS))
                if key not in known:  # the middle belongs to every sweep
                    known[key] = measure_point(point, side)
                rows.append({"sweep": field, "value": value, "side": side, **known[key]})
                print(*(f"{name} {number}" for name, number in rows[-1].items()), sep=", ", flush=True)
    return rows


def draw(rows: list[dict[str, Any]], given: argparse.Namespace, title: str, path: Path) -> None:
    """Time above, memory below, one column a sweep.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(SWEEPS), 7), layout="constrained")
    axes = figure.subplots(2, len(SWEEPS))
    middle = next(
        row for row in rows if row["side"] == "ours" and row["value"] == getattr(given, row["sweep"])
    )  # "ours" in the middle sets the rate of every counted line
    rate = middle["multiply_adds"] / middle["seconds_per_clip"]
    for column, (field, (label, _)) in enumerate(SWEEPS.items()):
        for number, side in enumerate(("ours", *given.vs)):
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
        for row, name in enumerate(("seconds a clip", "GiB at most")):
            axes[row, column].set(xlabel=label, ylim=(0, None))
            if column == 0:
                axes[row, column].set_ylabel(name)
                axes[row, column].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def add_command(commands: argparse._SubParsersAction, about: Callable[[str], dict[str, str]]) -> None:
    """Add `scale` to the command line; `about` tells device and commit."""
    parser = commands.add_parser(
        "scale",
        help="cost against frames, resolution, ratio and batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_step_options(parser)
    parser.set_defaults(**dict.fromkeys(("size", *SWEEPS)))
    sides = [*RIVALS, *PEERS]
    parser.add_argument("--vs", nargs="*", default=["dense", "videomae"], choices=sides, help="measured beside ours")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each point that count")
    parser.add_argument("--plot", type=Path, default=Path("scale.png"), help="PNG to write")
    parser.add_argument("--json", type=Path, help="file for the numbers")

    def run(given: argparse.Namespace) -> None:
        for field, value in MIDDLE["cuda" if given.device.startswith("cuda") else "cpu"].items():
            setattr(given, field, getattr(given, field) if getattr(given, field) is not None else value)
        resolve(given)
        facts = about(given.device)
        rows = sweep(given)
        middle = f"{given.size}, {given.frames}x{given.image_size}, {given.mask} {given.ratio}, batch {given.batch}"
        machine = f"{facts['device']}, {given.precision}, {given.threads} threads, commit {facts['commit']}"
        draw(rows, given, f"{middle}; {machine}", given.plot)
        print(f"{given.plot} written")
        if given.json:
            result = facts | {"precision": given.precision, "threads": given.threads, "middle": middle, "points": rows}
            given.json.write_text(json.dumps(result, indent=2) + "\n")

    parser.set_defaults(run=run)
