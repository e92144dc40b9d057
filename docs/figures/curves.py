"""Draw curves.svg: what the logs of pretraining say while a model learns, and while one does not.

    python docs/figures/curves.py [FOLDER]

The values are in docs/curves.json, written by `make study`; every one was measured by this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from svg import BLUE, INK, ORANGE, Drawing, draw_legend, draw_panel

HERE = Path(__file__).parent
COLOURS = {"VideoConvMAE-MSD": BLUE, "VideoMAE (plain ViT)": ORANGE, "MSD, tube mask 0.75": INK}  # the last one dies
PANELS = (  # value in the log, title, ticks along y
    ("loss", "Loss (predicting nothing: 1)", ((0, "0"), (0.25, ".25"), (0.5, ".5"), (0.75, ".75"), (1, "1"))),
    ("probe_linear_top1", "Linear probe, top-1 (chance 12.5%)", ((0, "0"), (0.25, "25%"), (0.5, "50%"), (0.75, "75%"))),
    ("probe_rank", "Effective rank of the features", ((0, "0"), (20, "20"), (40, "40"), (60, "60"))),
)
TOP, WIDTH, HEIGHT = 74, 230, 220  # of a panel


def draw_curves(path: Path) -> None:
    """Write the figure: a panel for each value, a line for each model; one seed of each."""
    curves = json.loads((HERE.parent / "curves.json").read_text("utf-8"))
    shown = {row["model"]: row for row in reversed(curves) if row["model"] in COLOURS}
    last = max(step for row in shown.values() for step, _ in row["loss"])
    drawing = Drawing(960, 404, "Loss, linear probe and effective rank over the steps of pretraining")
    drawing.text(14, 28, "What the logs of pretraining say", 17, "start", font_weight="bold")
    for number, (value, title, ticks) in enumerate(PANELS):
        left = 56 + number * (WIDTH + 80)
        axes = draw_panel(drawing, title, (left, TOP, WIDTH, HEIGHT), (0, last // 2, last), ticks)
        for model, colour in COLOURS.items():
            if model in shown:
                axes.curve([(step, [min(height, ticks[-1][0])]) for step, height in shown[model][value]], colour)
    draw_legend(drawing, {model: colour for model, colour in COLOURS.items() if model in shown}, 344, 300)
    note = (
        "Moving digits, half the frames hidden or tubes; steps of 32; one seed each; measured here: docs/curves.json."
    )
    drawing.text(14, 388, note, 13, "start")
    drawing.write(path)


if __name__ == "__main__":
    draw_curves(Path(sys.argv[1] if len(sys.argv) > 1 else HERE) / "curves.svg")
