"""A page of HTML in one file: curves as SVG, tables, pictures and clips inside it; no script, nothing from a network.

Colours and sizes are in page.css, which is put into the page: light and dark, a phone's width, print.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

MOST_POINTS = 300  # of a curve; of a longer one, means over equal runs of points
COLOURS = 6  # of curves in page.css

Cell = str | tuple[str, float]  # of a table: text, and a share of 0..1 that is drawn behind it
Point = tuple[float, float | None]  # step and value; None: not finite


@dataclass(frozen=True)
class Curve:
    """A line of a plot. A baseline, with which others are compared, is grey and dashed."""

    name: str
    points: Sequence[Point]
    is_baseline: bool = False


@dataclass(frozen=True)
class Plot:
    """Curves over optimizer steps, on an axis from 0. unit: of the values; "%": they are fractions."""

    title: str
    curves: Sequence[Curve]
    unit: str = ""


@dataclass(frozen=True)
class Clip:
    """An animated picture, and its first frame for those who asked their system for less motion; both WebP."""

    animation: bytes
    still: bytes
    width: int
    height: int

    def __len__(self) -> int:
        """Bytes in the page, which holds them as base64."""
        return 4 * (len(self.animation) + len(self.still)) // 3


def encode_clip(frames: np.ndarray, fps: float = 8, quality: int = 80) -> Clip:
    """Encode frames `(T, H, W, 3)` uint8, played without end."""
    pictures = [Image.fromarray(frame) for frame in frames]
    animation, still = BytesIO(), BytesIO()
    pictures[0].save(still, "webp", quality=quality)
    pictures[0].save(
        animation,
        "webp",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=0,
        quality=quality,
    )
    return Clip(animation.getvalue(), still.getvalue(), frames.shape[2], frames.shape[1])


def draw_clip(clip: Clip, alt: str) -> str:
    """Return a clip as HTML; `alt` says what it shows."""
    still, animation = (f"data:image/webp;base64,{_base64(each)}" for each in (clip.still, clip.animation))
    return (
        f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
        f'<img src="{animation}" width="{clip.width}" height="{clip.height}" alt="{escape(alt)}"></picture>'
    )


def draw_heat_map(shares: np.ndarray, alt: str) -> str:
    """Return `(rows, columns)` of 0..1 as a picture, a pixel a cell, darker where larger; NaN: an empty cell.

    The root makes rare cells visible. It is drawn in opacity, so that it fits a light page and a dark one.
    """
    pixels = np.zeros((*shares.shape, 4), np.uint8)
    pixels[..., :3] = (61, 127, 214)
    pixels[..., 3] = np.round(255 * np.sqrt(np.nan_to_num(shares)))
    file = BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "png")
    height, width = shares.shape
    source = f"data:image/png;base64,{_base64(file.getvalue())}"
    return f'<img class="map" src="{source}" width="{width}" height="{height}" alt="{escape(alt)}">'


def draw_table(head: Sequence[str], rows: Iterable[Sequence[Cell]], caption: str = "", kind: str = "") -> str:
    """Return a table; the first column is each row's head. kind: a class of page.css."""

    def cell(value: Cell) -> str:
        text, share = (value, None) if isinstance(value, str) else value
        style = "" if share is None else f' style="--share:{share:.3f}"'
        return f"<td{style}>{escape(text)}</td>"

    lines = "".join(
        f'<tr><th scope="row">{escape(str(first))}</th>{"".join(map(cell, rest))}</tr>' for first, *rest in rows
    )
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    css = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{css}>{title}<thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>'


def draw_note(text: str) -> str:
    """Return a muted sentence."""
    return f'<p class="note">{escape(text)}</p>'


def draw_details(summary: str, text: str) -> str:
    """Return text as it is, folded away behind its summary."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def draw_plot(plot: Plot) -> str:
    """Return a figure: title and legend with last values as text, the curves as SVG with axes.

    Raises:
        ValueError: no curve has a finite value.
    """
    curves = [curve for curve in plot.curves if any(value is not None for _, value in curve.points)]
    finite = [value for curve in curves for _, value in curve.points if value is not None]
    if not finite:
        raise ValueError(f"{plot.title}: no value is finite")
    steps = [step for curve in curves for step, _ in curve.points]
    low, high = min(finite), max(finite)
    y_ticks = nice_ticks(min(0.0, low), high, 4)
    x_ticks = [*(tick for tick in nice_ticks(0, max(steps), 4) if tick <= 0.85 * max(steps)), max(steps)]
    left, top, width, height = 48, 10, 364, 156
    x_end, (y_low, y_high) = max(max(steps), 1e-9), (min(y_ticks[0], low), max(y_ticks[-1], high))

    def place(step: float, value: float) -> str:
        y = top + height * (1 - (value - y_low) / (y_high - y_low))
        return f"{left + width * step / x_end:.1f},{y:.1f}"

    parts = []
    for tick in y_ticks:
        y = place(0, tick).split(",")[1]
        parts.append(f'<path class="grid" d="M{left},{y}h{width}"/>')
        label = _tick_label(tick, plot.unit, y_high)
        parts.append(f'<text x="{left - 6}" y="{y}" dy=".32em" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        x = place(tick, y_low).split(",")[0]
        parts.append(f'<path class="tick" d="M{x},{top + height}v4"/>')
        anchor = "end" if tick == x_ticks[-1] and tick else "middle"
        parts.append(f'<text x="{x}" y="{top + height + 17}" text-anchor="{anchor}">{tick:,.0f}</text>')
    parts.append(f'<text x="{left + width}" y="{top + height + 32}" text-anchor="end">optimizer step</text>')
    legend, spoken, number = [], [], 0
    for curve in curves:
        number += not curve.is_baseline
        style = "baseline" if curve.is_baseline else f"curve c{(number - 1) % COLOURS + 1}"
        parts += _draw_lines(curve, style, place)
        known = [(step, value) for step, value in curve.points if value is not None]
        (first_step, first), (last_step, last) = known[0], known[-1]
        legend.append(
            f'<li class="{style}"><i></i>{escape(curve.name)} <b>{show(last, plot.unit)}</b>'
            + ("" if curve.points[-1][1] is not None else " (last finite)")
            + "</li>"
        )
        spoken.append(
            f"{curve.name} from {show(first, plot.unit)} at step {first_step:,.0f} to {show(last, plot.unit)} at "
            f"step {last_step:,.0f}"
        )
    label = f"{plot.title} over optimizer steps: {'; '.join(spoken)}"
    svg = f'<svg viewBox="0 0 420 202" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    unit = f" ({plot.unit})" if plot.unit and plot.unit != "%" else ""
    return f"<figure><h3>{escape(plot.title + unit)}</h3><ul class=legend>{''.join(legend)}</ul>{svg}</figure>"


def _draw_lines(curve: Curve, style: str, place: Callable[[float, float], str]) -> list[str]:
    """Return a curve's lines, cut where a value is not finite; a point that stands alone is a dot."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in thin(curve.points):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((step, value))
    lines = []
    for piece in filter(None, pieces):
        if len(piece) == 1:
            x, y = place(*piece[0]).split(",")
            lines.append(f'<circle class="{style}" cx="{x}" cy="{y}" r="2.5"/>')
        else:
            lines.append(f'<polyline class="{style}" points="{" ".join(place(*point) for point in piece)}"/>')
    return lines


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most `most` points: of more, the means over runs of equal length; the last point stays as it is."""
    if len(points) <= most:
        return list(points)
    length = math.ceil((len(points) - 1) / (most - 1))
    thinned: list[Point] = []
    for start in range(0, len(points) - 1, length):
        run = points[start : min(start + length, len(points) - 1)]
        values = [value for _, value in run if value is not None]
        mean = sum(values) / len(values) if values else None
        thinned.append((sum(step for step, _ in run) / len(run), mean))
    return [*thinned, points[-1]]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers that cover the range; the first is at most `low`, the last at least `high`."""
    if high <= low:
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)
    size = 10 ** math.floor(math.log10((high - low) / count))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (size * factor) <= count + 1e-9)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _tick_label(value: float, unit: str, largest: float) -> str:
    """Format a value of an axis: as short as it can be, all of a small axis in powers of ten."""
    if unit == "%":
        return f"{100 * value:.4g}%"
    return _power_of_ten(value) if value and largest < 0.01 else f"{value:,.10g}" if value >= 1000 else f"{value:.6g}"


def show(value: float | None, unit: str = "", digits: int = 4) -> str:
    """Format a number: a percentage for the unit "%", else significant digits, in powers of ten where small."""
    if value is None:
        return "not finite"
    if unit == "%":
        return f"{100 * value:.1f}%"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return _power_of_ten(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _power_of_ten(value: float) -> str:
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits}e{int(exponent)}"


def write_page(title: str, head: str, sections: Sequence[tuple[str, str]], foot: str) -> str:
    """Return the page: `head` as HTML, and a title and HTML for each section."""
    css = Path(__file__).with_name("page.css").read_text("utf-8")
    body = "".join(f"<section><h2>{escape(name)}</h2>{html}</section>" for name, html in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{css}</style></head>\n"
        f"<body><header>{head}</header>\n<main>{body}</main>\n<footer>{escape(foot)}</footer></body></html>\n"
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
