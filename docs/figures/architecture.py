"""Draw architecture.svg: VideoConvMAE-MSD at base size, and the part of it that packed evaluation computes.

    python docs/figures/architecture.py [FOLDER]

Widths and depths come from the package, multiply-adds from docs/performance.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from svg import BLUE, INK, ORANGE, Drawing

from video_convmae.models.sizes import size_named

HERE = Path(__file__).parent
SIZE = size_named("base")
GRID, FRAMES = 14, 8  # token positions along a side of a 224 pixel frame; token frames of 16 frames
# A tube mask at 0.9: the visible 20 of 196 positions.
VISIBLE = (6, 19, 28, 37, 44, 53, 66, 72, 85, 90, 101, 111, 118, 124, 139, 143, 157, 164, 178, 191)
CELL = 7  # side of a token in the pictures of a frame
SIDE = GRID * CELL
NEIGHBOURHOOD = {(0, 2), (1, 1)}  # visible tokens of the 3 x 3 that the stages show


def draw_architecture(path: Path) -> None:
    """Write the figure."""
    drawing = Drawing(900, 522, "VideoConvMAE: a masked autoencoder for video with a hybrid encoder")
    _define_scene(drawing)
    _draw_clip(drawing, 14, 72)
    _draw_mask(drawing, 172, 72)
    _draw_encoder(drawing)
    _draw_decoder(drawing)
    _draw_cost(drawing, 14, 376)
    drawing.write(path)


def _define_scene(drawing: Drawing) -> None:
    """Define the picture in a frame, and its visible and hidden tokens as clipping paths."""
    drawing.add("<defs>")
    drawing.add(
        f'<g id="scene"><rect width="{SIDE}" height="{SIDE}" fill="{BLUE}" fill-opacity="0.35"/>'
        f'<circle cx="68" cy="30" r="14" fill="{ORANGE}"/>'
        f'<path d="M0 70 Q24 38 48 64 T98 56 V98 H0 Z" fill="{BLUE}"/>'
        f'<path d="M0 88 Q30 66 60 84 T98 80 V98 H0 Z" fill="#2f9e6e"/></g>'
    )
    for name, positions in (("visible", VISIBLE), ("hidden", sorted(set(range(GRID**2)) - set(VISIBLE)))):
        cells = "".join(f"M{p % GRID * CELL} {p // GRID * CELL}h{CELL}v{CELL}h-{CELL}z" for p in positions)
        drawing.add(f'<clipPath id="{name}"><path d="{cells}"/></clipPath>')
    drawing.add("</defs>")


def _draw_frames(drawing: Drawing, x: float, y: float, clip: str | None) -> None:
    """Draw a stack of three frames; the scene is clipped to a set of tokens, the others are grey."""
    for offset in (16, 8):  # the L that the next frame leaves: the fills are not opaque
        corner = f"M{x + offset:g} {y - offset:g}h{SIDE}v{SIDE}h-8v{8 - SIDE}h{8 - SIDE}z"
        drawing.add(f'<path d="{corner}" fill="{INK}" fill-opacity="0.15" stroke="{INK}" stroke-opacity="0.7"/>')
    clipped = f' clip-path="url(#{clip})"' if clip else ""
    drawing.rect(x, y, SIDE, SIDE, fill=INK, fill_opacity=0.22)
    drawing.add(f'<g transform="translate({x:g} {y:g})"><use href="#scene"{clipped}/></g>')
    drawing.rect(x, y, SIDE, SIDE, fill="none", stroke=INK)


def _draw_clip(drawing: Drawing, x: float, y: float) -> None:
    drawing.text(x + SIDE / 2 + 8, 40, "Clip", 17, font_weight="bold")
    _draw_frames(drawing, x, y, None)
    drawing.text(x + SIDE / 2 + 8, y + SIDE + 22, "16 × 224 × 224")
    drawing.line([(x + SIDE + 22, y + SIDE / 2), (x + SIDE + 54, y + SIDE / 2)], arrow=True)


def _draw_mask(drawing: Drawing, x: float, y: float) -> None:
    drawing.text(x + SIDE / 2 + 8, 40, "Tube mask", 17, font_weight="bold")
    _draw_frames(drawing, x, y, "visible")
    drawing.text(x + SIDE / 2 + 8, y + SIDE + 22, "90% hidden, the")
    drawing.text(x + SIDE / 2 + 8, y + SIDE + 41, "same in all frames")
    drawing.line([(x + SIDE + 22, y + SIDE / 2), (x + SIDE + 46, y + SIDE / 2)], arrow=True)


def _draw_encoder(drawing: Drawing) -> None:
    """Draw the three stages and the paths of the fusion."""
    left, top, width, gap = 320, 56, 172, 26
    drawing.text(left + 1.5 * width + gap, 40, "Encoder", 17, font_weight="bold")
    texts = (
        (f"{FRAMES} × 56 × 56 cells", f"{SIZE.widths[0]} channels"),
        (f"{FRAMES} × 28 × 28 cells", f"{SIZE.widths[1]} channels"),
        (f"{FRAMES * len(VISIBLE)} visible tokens", f"{SIZE.widths[2]} channels"),
    )
    for stage, lines in enumerate(texts):
        x = left + stage * (width + gap)
        drawing.rect(x, top, width, 196, rx=8, fill=INK, fill_opacity=0.06, stroke=INK)
        drawing.text(x + width / 2, top + 23, f"Stage {stage + 1}", 16, font_weight="bold")
        kind = "masked convolution" if stage < 2 else "transformer"
        drawing.text(x + width / 2, top + 42, kind, 14)
        _draw_tokens(drawing, x + width / 2 - 46, top + 54, cells=(4, 2, 1)[stage])
        for place, line in enumerate(lines):
            drawing.text(x + width / 2, top + 168 + 18 * place, line, 14)
        if stage:
            drawing.line([(x - gap + 2, top + 98), (x - 2, top + 98)], arrow=True)
    bus, plus = 286, left + 2 * (width + gap) + width / 2
    for stage in range(2):
        centre = left + stage * (width + gap) + width / 2
        drawing.line([(centre, top + 198), (centre, bus), (plus - 13, bus)], arrow=True)
    drawing.text(left + width + gap / 2, bus + 20, "multi-scale fusion")
    drawing.line([(plus, top + 198), (plus, bus - 13)], arrow=True)
    drawing.add(f'<circle cx="{plus:g}" cy="{bus}" r="11" fill="none" stroke="{INK}" stroke-width="1.5"/>')
    drawing.line([(plus - 6, bus), (plus + 6, bus)])
    drawing.line([(plus, bus - 6), (plus, bus + 6)])
    drawing.line([(plus, bus + 13), (plus, 366)], arrow=True)


def _draw_tokens(drawing: Drawing, x: float, y: float, cells: int) -> None:
    """Draw 3 x 3 tokens, the visible ones cut into `cells` x `cells` cells."""
    side, step = 28, 32
    for row in range(3):
        for column in range(3):
            left, top = x + column * step, y + row * step
            if (row, column) not in NEIGHBOURHOOD:
                drawing.rect(left, top, side, side, fill="none", stroke=INK, stroke_dasharray="3 3")
                continue
            part = side / cells
            for i in range(cells * cells):
                inset = 0.75 if cells > 1 else 0
                drawing.rect(
                    left + i % cells * part + inset, top + i // cells * part + inset, part - 2 * inset,
                    part - 2 * inset, fill=BLUE,
                )  # fmt: skip


def _draw_decoder(drawing: Drawing) -> None:
    """Draw the decoder and its prediction."""
    x, y, width = 716, 368, 172
    depth = SIZE.video_decoder[1]
    drawing.rect(x, y, width, 98, rx=8, fill=INK, fill_opacity=0.06, stroke=INK)
    drawing.text(x + width / 2, y + 24, "Decoder", 16, font_weight="bold")
    drawing.text(x + width / 2, y + 46, "with mask tokens", 14)
    drawing.text(x + width / 2, y + 65, f"transformer, {depth} blocks", 14)
    drawing.text(x + width / 2, y + 84, f"{SIZE.video_decoder[0]} channels", 14)
    left = 540
    drawing.line([(x - 2, y + 49), (left + SIDE + 24, y + 49)], arrow=True)
    drawing.text(left + SIDE / 2 + 8, y - 28, "Prediction", 17, font_weight="bold")
    _draw_frames(drawing, left, y, "hidden")
    hidden = FRAMES * (GRID**2 - len(VISIBLE))
    drawing.text(left + SIDE / 2 + 8, y + SIDE + 22, f"{hidden:,} hidden patches;")
    drawing.text(left + SIDE / 2 + 8, y + SIDE + 41, "loss on these only")


def _draw_cost(drawing: Drawing, x: float, y: float) -> None:
    """Draw the legend, and bars of the multiply-adds."""
    drawing.rect(x, y - 68, 16, 16, fill=BLUE)
    drawing.text(x + 24, y - 55, "visible: computed", 14, anchor="start")
    drawing.rect(x, y - 44, 16, 16, fill="none", stroke=INK, stroke_dasharray="3 3")
    drawing.text(x + 24, y - 31, "hidden: skipped by packed evaluation", 14, anchor="start")
    drawing.text(x, y + 12, "Multiply-adds of a clip's forward pass, G", 15, anchor="start", font_weight="bold")
    counted = json.loads((HERE.parent / "performance.json").read_text(encoding="utf-8"))["counted"]["parts"]["sum"]
    bars = (
        ("dense", counted["dense"], INK),
        ("packed", counted["packed"], BLUE),
        ("VideoMAE-B", counted["videomae"], INK),
    )
    for place, (name, value, colour) in enumerate(bars):
        top = y + 28 + 34 * place
        drawing.text(x, top + 18, name, anchor="start")
        drawing.rect(x + 104, top, 3 * value, 25, rx=3, fill=colour)
        drawing.text(x + 112 + 3 * value, top + 18, f"{value}", anchor="start", font_weight="bold")


if __name__ == "__main__":
    draw_architecture(Path(sys.argv[1] if len(sys.argv) > 1 else HERE) / "architecture.svg")
