"""Draw study.svg: accuracy with 200 labels against the length of pretraining, from the rows of `make study`.

    python docs/figures/study.py [FOLDER]

The rows are in docs/study.json; every one was measured by this project.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from svg import BLUE, INK, ORANGE, Axes, Drawing

HERE = Path(__file__).parent
PRETRAINED = "VideoConvMAE-MSD"
OTHERS = (  # name in the rows, colour, dashes, label
    ("VideoMAE (plain ViT)", ORANGE, "none", "plain ViT, pretrained"),
    ("motion energy + logistic regression", INK, "2 4", "frame differences, regression"),
    ("from scratch (hybrid)", BLUE, "6 4", "hybrid from scratch"),
)
BOX = 76, 60, 470, 270  # of the axes: left, top, width, height


def draw_study(path: Path) -> None:
    """Write the figure: means over the seeds with their standard deviations."""
    rows = json.loads((HERE.parent / "study.json").read_text("utf-8"))
    few = [row for row in rows if (row["task"], row["labels"], row["steps"]) in (("how", 200, 400), ("how", 200, 0))]
    curve: dict[int, list[float]] = {}
    for row in few:
        if row["model"] == PRETRAINED:
            curve.setdefault(row["pretrain_steps"], []).append(row["top1"])
    longest, seeds = max(curve), len({row["seed"] for row in few})

    drawing = Drawing(900, 442, "Accuracy with 200 labels against pretraining steps")
    drawing.text(14, 28, "Which of eight ways does the digit move? 200 labels", 17, "start", font_weight="bold")
    percent = [(value / 100, f"{value}%") for value in range(0, 101, 25)]
    ticks = [(steps, f"{steps:,}") for steps in (0, *sorted(curve)) if not 0 < steps < longest / 10]
    axes = Axes(drawing, BOX, (0, longest), (0, 1), (ticks, percent))
    drawing.text(BOX[0] + BOX[2] / 2, BOX[1] + BOX[3] + 44, "pretraining steps of 32 clips without labels", 14)
    scratch = [row["top1"] for row in few if row["model"] == OTHERS[-1][0]]
    axes.curve([(0, scratch), *sorted(curve.items())], BLUE)
    labels = [(statistics.mean(curve[longest]), f"{PRETRAINED}, pretrained", BLUE)]
    for name, colour, dashes, label in OTHERS:
        values = [row["top1"] for row in few if row["model"] == name]
        if not values:
            continue
        mean = statistics.mean(values)
        trained = any(row["pretrain_steps"] for row in few if row["model"] == name)
        start = [] if trained else [(0, [mean])]
        axes.curve([*start, (longest, values)], colour, stroke_dasharray=dashes)
        if trained:
            x, y = axes.place(longest, mean)
            drawing.rect(x - 4, y - 4, 8, 8, rx=4, fill=colour)
        labels.append((mean, label, colour))
    below = 0.0
    for mean, label, colour in sorted(labels, reverse=True):  # from the top; none is written over another
        x, y = axes.place(longest, mean)
        below = max(y + 5, below + 18)
        drawing.text(x + 12, below, f"{label}: {mean:.0%}", 14, "start", fill=colour)
    spread = "one seed" if seeds == 1 else f"mean and standard deviation of up to {seeds} seeds"
    drawn = {PRETRAINED, *(name for name, *_ in OTHERS)}
    commits = ", ".join(sorted({row["commit"] for row in few if row["model"] in drawn}))
    drawing.text(14, 412, f"Measured here ({spread}) at commits {commits};", 13, "start")
    drawing.text(14, 430, "digits and photographs of the test are in no training clip.", 13, "start")
    drawing.write(path)


if __name__ == "__main__":
    draw_study(Path(sys.argv[1] if len(sys.argv) > 1 else HERE) / "study.svg")
