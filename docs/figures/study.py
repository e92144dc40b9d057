"""Draw study.svg: accuracy with 200 labels against the length of pretraining, from the rows of `make study`.

They are in docs/study.json.

python docs/figures/study.py [FOLDER]
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from svg import BLUE, INK, ORANGE, Drawing

HERE = Path(__file__).parent
PRETRAINED, SCRATCH, BASELINE = "VideoConvMAE-MSD", "from scratch (hybrid)", "motion energy + logistic regression"
LEFT, TOP, WIDTH, HEIGHT = 76, 60, 470, 270  # of the axes


def draw_study(path: Path) -> None:
    """Write the figure: the mean over the seeds, lines for a standard deviation, and what needs no pretraining."""
    rows = json.loads((HERE.parent / "study.json").read_text("utf-8"))
    few = [row for row in rows if (row["task"], row["labels"], row["steps"]) in (("how", 200, 400), ("how", 200, 0))]
    curve: dict[int, list[float]] = {}
    for row in few:
        if row["model"] == PRETRAINED:
            curve.setdefault(row["pretrain_steps"], []).append(row["top1"])
    flat = {name: [row["top1"] for row in few if row["model"] == name] for name in (SCRATCH, BASELINE)}
    longest = max(curve)

    def place(steps: float, top1: float) -> tuple[float, float]:
        return LEFT + WIDTH * steps / longest, TOP + HEIGHT * (1 - top1)

    drawing = Drawing(860, TOP + HEIGHT + 84, "Accuracy with 200 labels against pretraining steps")
    drawing.text(14, 28, "Which of eight ways does the digit move? 200 labels", 17, "start", font_weight="bold")
    for percent in range(0, 101, 25):
        _, y = place(0, percent / 100)
        drawing.line([(LEFT, y), (LEFT + WIDTH, y)], stroke_opacity=0.3, stroke_width=1)
        drawing.text(LEFT - 8, y + 5, f"{percent}%", 14, "end")
    for steps in (0, *sorted(curve)):
        drawing.text(place(steps, 0)[0], TOP + HEIGHT + 22, f"{steps:,}", 14)
    drawing.text(LEFT + WIDTH / 2, TOP + HEIGHT + 44, "pretraining steps of 16 clips without labels", 14)
    for values, colour, label in zip(flat.values(), (ORANGE, INK), ("from scratch", "motion energy, regression")):
        if values:
            y = place(0, statistics.mean(values))[1]
            drawing.line([(LEFT, y), (LEFT + WIDTH, y)], stroke=colour, stroke_dasharray="6 4", stroke_width=2)
            drawing.text(LEFT + WIDTH + 10, y + 5, f"{label}: {statistics.mean(values):.0%}", 14, "start", fill=colour)
    points = [place(steps, statistics.mean(values)) for steps, values in sorted(curve.items())]
    drawing.line(points, stroke=BLUE, stroke_width=2.5)
    for (x, y), (_, values) in zip(points, sorted(curve.items())):
        drawing.rect(x - 4, y - 4, 8, 8, rx=4, fill=BLUE)
        if len(values) > 1:
            spread = HEIGHT * statistics.stdev(values)
            drawing.line([(x, y - spread), (x, y + spread)], stroke=BLUE)
    last = curve[longest]
    x, y = points[-1]
    drawing.text(
        x + 10, y + 5, f"{PRETRAINED}: {statistics.mean(last):.0%}", 14, "start", fill=BLUE, font_weight="bold"
    )
    seeds = "one seed" if len(last) == 1 else f"mean and standard deviation of {len(last)} seeds"
    commits = ", ".join(sorted({row["commit"] for row in few}))
    note = f"Measured here ({seeds}) at commit {commits}; digits and photographs of the test are in no training clip."
    drawing.text(14, TOP + HEIGHT + 72, note, 13, "start")
    drawing.write(path)


if __name__ == "__main__":
    draw_study(Path(sys.argv[1] if len(sys.argv) > 1 else HERE) / "study.svg")
