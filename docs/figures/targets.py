"""Draw targets.svg: the log of a ConvMAE-v2 run, and that of a run whose features collapse.

    python docs/figures/targets.py [FOLDER]

The values are in docs/targets.json: those of log.jsonl, measured by this project as docs/pretraining.md says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from svg import BLUE, INK, ORANGE, Drawing, draw_legend, draw_panel

HERE = Path(__file__).parent
RUNS = {"pixels, and a teacher's features at visible tokens": BLUE, "an average of the encoder alone": ORANGE}
PANELS = (  # value, title, ticks along y
    ("loss_pixels", "Pixel loss (predicting nothing: 1)", ((0, "0"), (0.4, ".4"), (0.8, ".8"), (1.2, "1.2"))),
    ("loss_features", "Loss of the features", ((0, "0"), (0.15, ".15"), (0.3, ".3"), (0.45, ".45"))),
    ("feature_rank", "Effective rank of the features", ((0, "0"), (15, "15"), (30, "30"), (45, "45"))),
)
STEPS = (0, 2000, 4000)
TOP, WIDTH, HEIGHT = 74, 230, 200  # of a panel


def draw_targets(path: Path) -> None:
    """Write the figure: a panel for each value, a line for each run that has it."""
    runs = json.loads((HERE.parent / "targets.json").read_text("utf-8"))
    drawing = Drawing(960, 374, "Losses and effective rank over the steps of two runs with targets of features")
    drawing.text(14, 28, "A loss that falls says little: the features live, or die", 17, "start", font_weight="bold")
    for number, (value, title, ticks) in enumerate(PANELS):
        left = 56 + number * (WIDTH + 80)
        axes = draw_panel(drawing, title, (left, TOP, WIDTH, HEIGHT), STEPS, ticks)
        for name, colour in RUNS.items():
            if value in runs[name]:
                axes.curve([(step, [height]) for step, height in runs[name][value]], colour)
    draw_legend(drawing, RUNS, 324, 440)
    note = "Moving digits, steps of 32 (the second run has 200); one run each; measured here: docs/targets.json."
    drawing.text(14, 362, note, 13, "start", fill=INK)
    drawing.write(path)


if __name__ == "__main__":
    draw_targets(Path(sys.argv[1] if len(sys.argv) > 1 else HERE) / "targets.svg")
