"""Draw speed.svg: the measured training speed of packed evaluation over that of other implementations.

    python docs/figures/speed.py [FOLDER]

All numbers come from docs/performance.json; every one was measured by this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from svg import BLUE, ORANGE, Drawing

HERE = Path(__file__).parent
GROUPS = (  # heading, then (measurement, label)
    (
        "against the same model, computed densely",
        (
            ("packed-vs-dense", "video, 2 clips a step"),
            ("images-packed-vs-dense", "images, 75% hidden, 32 a step"),
        ),
    ),
    (
        "against transformers' VideoMAE-B, a plain ViT",
        (
            ("packed-vs-videomae-b8", "8 clips a step"),
            ("compiled-vs-compiled-videomae-b8", "8 clips, both compiled"),
            ("packed-vs-videomae-b8-memory-kept", "8 clips, both keep freed memory"),
            ("packed-vs-videomae-b2", "2 clips a step"),
            ("compiled-vs-compiled-videomae-b2", "2 clips, both compiled"),
        ),
    ),
    (
        "against predicting all hidden tokens",
        (("half-predicted-vs-all", "half of them predicted, 2 clips"),),
    ),
)
LEFT, UNIT = 296, 185  # the zero of the bars, and the width of a ratio of 1


def draw_speed(path: Path) -> None:
    """Write the figure: a bar for each ratio, with the range of its pairs."""
    steps = {row["name"]: row for row in json.loads((HERE.parent / "performance.json").read_text("utf-8"))["step"]}
    rows = sum(len(bars) for _, bars in GROUPS)
    bottom = 66 + 38 * len(GROUPS) + 30 * rows
    drawing = Drawing(900, bottom + 82, "Measured training speed of VideoConvMAE, packed, over other implementations")
    drawing.text(
        14,
        28,
        "Training speed of VideoConvMAE-MSD base, packed: ratio of clips a second",
        17,
        "start",
        font_weight="bold",
    )
    y, used = 40, []
    for heading, bars in GROUPS:
        y += 38
        drawing.text(14, y - 8, heading, 15, "start", font_weight="bold")
        for name, label in bars:
            used.append(steps[name])
            _draw_bar(drawing, y, label, steps[name])
            y += 30
    drawing.line([(LEFT + UNIT, 64), (LEFT + UNIT, bottom - 10)], stroke_dasharray="4 4")
    drawing.text(LEFT + UNIT, bottom + 6, "1: equally fast", 14)
    (machine,), (commit,) = {row["machine"] for row in used}, {row["commit"] for row in used}
    notes = (
        f"Measured here on a CPU at commit {commit}; no published numbers.",
        f"{machine}. Clips of 16 × 224 × 224, 90% hidden.",
        "Bars: median over pairs of training steps taken in turns; lines: lowest and highest pair.",
    )
    for place, note in enumerate(notes):
        drawing.text(14, bottom + 34 + 19 * place, note, 13, "start")
    drawing.write(path)


def _draw_bar(drawing: Drawing, y: float, label: str, row: dict) -> None:
    """Draw one ratio: blue where packed is faster, orange where it is slower."""
    ratio, pairs = row["ratio"], row["pairs"]
    drawing.text(LEFT - 12, y + 17, label, 15, "end")
    drawing.rect(LEFT, y, UNIT * ratio, 22, rx=3, fill=BLUE if ratio >= 1 else ORANGE, fill_opacity=0.65)
    low, high = LEFT + UNIT * min(pairs), LEFT + UNIT * max(pairs)
    drawing.line([(low, y + 11), (high, y + 11)])
    for x in (low, high):
        drawing.line([(x, y + 7), (x, y + 15)])
    drawing.text(high + 10, y + 17, f"{ratio:.2f}", 15, "start", font_weight="bold")


if __name__ == "__main__":
    draw_speed(Path(sys.argv[1] if len(sys.argv) > 1 else HERE) / "speed.svg")
