"""Draw adaptation.svg: the loss of weights that are adapted to new videos, beside pretraining from nothing on them.

    python docs/figures/adaptation.py [FOLDER]

The values are in docs/adaptation.json: those of log.jsonl, measured by this project as docs/pretraining.md says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from svg import BLUE, INK, ORANGE, Drawing, draw_legend, draw_panel

HERE = Path(__file__).parent
RUNS = {"from the shipped weights, peak 3e-4": BLUE, "from nothing, peak 1e-3": ORANGE}
PANELS = (  # title, ticks along y, the runs that are drawn
    ("Loss (predicting nothing: 1)", ((0, "0"), (0.4, ".4"), (0.8, ".8"), (1.2, "1.2")), 2),
    ("The same, from the weights alone", ((0.2, ".2"), (0.3, ".3"), (0.4, ".4")), 1),
)
STEPS = (0, 100, 200, 300)
TOP, WIDTH, HEIGHT = 74, 370, 200  # of a panel


def draw_adaptation(path: Path) -> None:
    """Write the figure: the loss of both runs, and that of the first on a scale of its own."""
    runs = json.loads((HERE.parent / "adaptation.json").read_text("utf-8"))
    drawing = Drawing(960, 374, "Loss over the steps of adapting weights to new videos, and from nothing")
    drawing.text(14, 28, "What a normal loss is, on videos of one's own", 17, "start", font_weight="bold")
    for number, (title, ticks, count) in enumerate(PANELS):
        left = 56 + number * (WIDTH + 100)
        axes = draw_panel(drawing, title, (left, TOP, WIDTH, HEIGHT), STEPS, ticks)
        for name, colour in list(RUNS.items())[:count]:
            axes.curve([(step, [min(height, ticks[-1][0])]) for step, height in runs[name]], colour)
    draw_legend(drawing, RUNS, 324, 440)
    note = "110 clips of 16 real files, steps of 16; one run each; measured here: docs/adaptation.json."
    drawing.text(14, 362, note, 13, "start", fill=INK)
    drawing.write(path)


if __name__ == "__main__":
    draw_adaptation(Path(sys.argv[1] if len(sys.argv) > 1 else HERE) / "adaptation.svg")
