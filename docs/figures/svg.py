"""A small SVG writer for the figures: text in, text out, the same bytes every time.

Backgrounds are transparent, and the colour of text has a contrast of 4 or more both on white and on GitHub's dark page
(#0d1117), so one file serves both themes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

INK = "#75808c"  # text, outlines, arrows
BLUE = "#3d7fd6"  # visible, computed
ORANGE = "#c06a22"  # predicted
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


class Drawing:
    """The elements of a figure, in the order they are painted."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="{FONT}" role="img">'
        )
        self._lines = [f"<title>{escape(title)}</title>"]

    def add(self, element: str) -> None:
        """Append an element as it is."""
        self._lines.append(element)

    def rect(self, x: float, y: float, width: float, height: float, **style: object) -> None:
        """Draw a rectangle; style names are SVG's with underscores for hyphens."""
        self.add(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{_attributes(style)}/>')

    def text(self, x: float, y: float, text: str, size: int = 15, anchor: str = "middle", **style: object) -> None:
        """Write a line of text with its baseline at y."""
        style = {"fill": INK, **style}
        place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"'
        self.add(f"<text {place}{_attributes(style)}>{escape(text)}</text>")

    def line(self, points: Sequence[tuple[float, float]], arrow: bool = False, **style: object) -> None:
        """Draw connected lines, with an arrow head at the end on request."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        style = {"fill": "none", "stroke": INK, "stroke_width": 1.5, **style}
        self.add(f'<polyline points="{path}"{_attributes(style)}/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)  # arrows are horizontal or vertical
            corners = [
                (x, y),
                (x - 9 * dx - 4.5 * dy, y - 9 * dy - 4.5 * dx),
                (x - 9 * dx + 4.5 * dy, y - 9 * dy + 4.5 * dx),
            ]
            head = " ".join(f"{a:g},{b:g}" for a, b in corners)
            self.add(f'<polygon points="{head}" fill="{style["stroke"]}"/>')

    def write(self, path: Path) -> None:
        """Write the file."""
        path.write_text("\n".join([self._head, *self._lines, "</svg>"]) + "\n", encoding="utf-8")


class Axes:
    """A plot in a drawing: a rectangle, the ranges of its values, and a grid.

    Args:
        drawing: where to draw.
        box: left, top, width and height on the drawing.
        x_range, y_range: first and last value along each side.
        ticks: marks along x and along y, each a value and its label.
    """

    def __init__(
        self,
        drawing: Drawing,
        box: tuple[float, float, float, float],
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        ticks: tuple[Sequence[tuple[float, str]], Sequence[tuple[float, str]]],
    ) -> None:
        self._drawing, self._box, self._x, self._y = drawing, box, x_range, y_range
        left, top, width, height = box
        for value, label in ticks[1]:
            y = self.place(x_range[0], value)[1]
            drawing.line([(left, y), (left + width, y)], stroke_opacity=0.3, stroke_width=1)
            drawing.text(left - 8, y + 5, label, 14, "end")
        for value, label in ticks[0]:
            drawing.text(self.place(value, y_range[0])[0], top + height + 22, label, 14)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a value is drawn."""
        left, top, width, height = self._box
        right = left + width * (x - self._x[0]) / (self._x[1] - self._x[0])
        return round(right, 1), round(top + height * (1 - (y - self._y[0]) / (self._y[1] - self._y[0])), 1)

    def curve(self, points: Sequence[tuple[float, Sequence[float]]], colour: str, **style: object) -> None:
        """Draw a line through the mean of each point's values, and their standard deviation where there are several."""
        means = [(x, statistics.mean(values)) for x, values in points]
        self._drawing.line([self.place(*point) for point in means], stroke=colour, stroke_width=2.5, **style)
        for (x, mean), (_, values) in zip(means, points):
            if len(values) > 1:
                spread = statistics.stdev(values)
                self._drawing.line([self.place(x, mean - spread), self.place(x, mean + spread)], stroke=colour)


def draw_panel(
    drawing: Drawing,
    title: str,
    box: tuple[float, float, float, float],
    steps: Sequence[int],
    ticks: Sequence[tuple[float, str]],
) -> Axes:
    """Draw the title and the axes of one of several plots over training steps, whose marks are the ends of both axes.

    Args:
        drawing: where to draw.
        title: above the plot.
        box: left, top, width and height on the drawing.
        steps: marks along x.
        ticks: marks along y, each a value and its label.
    """
    left, top, width, _ = box
    drawing.text(left + width / 2, top - 16, title, 14)
    marks = [(step, f"{step:,}") for step in steps]
    return Axes(drawing, box, (steps[0], steps[-1]), (ticks[0][0], ticks[-1][0]), (marks, ticks))


def draw_legend(drawing: Drawing, colours: Mapping[str, str], y: float, gap: float) -> None:
    """Name the lines of a figure's plots, in their colours, beside each other."""
    for number, (name, colour) in enumerate(colours.items()):
        x = 56 + number * gap
        drawing.line([(x, y), (x + 26, y)], stroke=colour, stroke_width=3)
        drawing.text(x + 34, y + 5, name, 14, "start", fill=colour)


def _attributes(style: dict[str, object]) -> str:
    return "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
